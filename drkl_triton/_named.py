"""Signatures of the public losses: options are listed in one place, callers see all of them."""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


def named(loss: Callable, builder: Callable, *kinds: type) -> tuple[tuple[str, ...], str]:
    """Give ``loss`` the name and docstring of ``builder``, and a signature: its own positional
    arguments, the builder's parameters, and the options of each kind. Returns (the names of the
    builder's parameters, its own).
    """
    keyword = inspect.Parameter.KEYWORD_ONLY
    own = list(inspect.signature(builder).parameters.values())
    *positional, labels, _ = inspect.signature(loss).parameters.values()
    if all(p.default is not p.empty for p in own) and builder().labels:
        labels = labels.replace(default=inspect.Parameter.empty)
    options = [
        inspect.Parameter(
            name, keyword, default=kind._field_defaults[name], annotation=hint.__forward_arg__
        )
        for kind in kinds
        for name, hint in kind.__annotations__.items()
    ]
    functools.update_wrapper(loss, builder)
    del loss.__wrapped__
    loss.__annotations__ = {}
    parameters = [*positional, labels, *(p.replace(kind=keyword) for p in own), *options]
    loss.__signature__ = inspect.Signature(parameters)
    return tuple(p.name for p in own), builder.__name__
