"""The losses as ``nn.Module``s: options in ``__init__``, tensors in ``forward``. No parameters,
nothing in the state dict.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from . import _checks, _options, objectives
from ._options import LinearOptions, Options
from .algebra import RowMetrics
from .functional import divergence
from .linear import linear_divergence

if TYPE_CHECKING:
    from ._objective import Objective

__all__ = [
    "DRKLLoss",
    "DivergenceLoss",
    "LinearDRKLLoss",
    "LinearDivergenceLoss",
    "LinearReverseKLLoss",
    "ReverseKLLoss",
]

CALL = {"weight", "num_items"}  # what belongs to the call
LINEAR_CALL = {"teacher_hidden", "teacher_weight", "teacher_logits", "student_bias", "teacher_bias"}


class DivergenceLoss(nn.Module):
    """:func:`drkl_triton.divergence` with its objective and its options fixed, checked already in
    ``__init__``. Options, errors and formula are those of the function.

    ``forward(student_logits, teacher_logits, labels=None, *, weight=None, num_items=None)`` takes
    ``[..., V]`` logits and ``[...]`` labels and weights.
    """

    _kinds: tuple = (Options,)
    _call: set[str] = CALL

    def __init__(self, objective: Objective, **options: Any):
        super().__init__()
        _checks.objective(objective)
        self.objective = objective
        name, mine = type(self).__name__, dict(options)
        _checks.known_options(name, {k: v for k, v in options.items() if k in self._call})
        found = _options.taken(name, mine, *self._kinds)
        self.options = {
            key: value
            for kind in found
            for key, value in kind._asdict().items()
            if key not in self._call
        }

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        weight: Tensor | None = None,
        num_items: float | Tensor | None = None,
    ) -> Tensor | tuple[Tensor, RowMetrics]:
        return divergence(
            self.objective,
            student_logits,
            teacher_logits,
            labels,
            weight=weight,
            num_items=num_items,
            **self.options,
        )

    def extra_repr(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in self.options.items())
        return f"{self.objective!r}, {options}"


class ReverseKLLoss(DivergenceLoss):
    """:func:`drkl_triton.reverse_kl` as a :class:`DivergenceLoss`."""

    def __init__(self, **options: Any):
        super().__init__(objectives.reverse_kl(), **options)


class DRKLLoss(DivergenceLoss):
    """:func:`drkl_triton.drkl` as a :class:`DivergenceLoss`; ``forward`` needs labels."""

    def __init__(self, *, gamma: float | Tensor = 0.5, skew: float | Tensor = 0.0, **options: Any):
        super().__init__(objectives.skewed_teacher(objectives.drkl(gamma), skew), **options)


class LinearDivergenceLoss(DivergenceLoss):
    """:func:`drkl_triton.linear_divergence` with its objective and options fixed: those of
    :class:`DivergenceLoss`, and of the two output layers ``student_softcap``, ``teacher_softcap``
    (default None), ``student_scale``, ``teacher_scale`` (1.0), and ``chunk_bytes`` (None) and
    ``recompute`` (False).

    ``forward(student_hidden, student_weight, labels=None, *, teacher_hidden=None,
    teacher_weight=None, teacher_logits=None, student_bias=None, teacher_bias=None, weight=None,
    num_items=None)`` takes ``[..., H]`` hidden states, ``[V, H]`` matrices and ``[...]`` labels and
    weights. The matrices are no parameters of this module.
    """

    _kinds = (Options, LinearOptions)
    _call = CALL | LINEAR_CALL

    def forward(
        self,
        student_hidden: Tensor,
        student_weight: Tensor,
        labels: Tensor | None = None,
        *,
        teacher_hidden: Tensor | None = None,
        teacher_weight: Tensor | None = None,
        teacher_logits: Tensor | None = None,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
        weight: Tensor | None = None,
        num_items: float | Tensor | None = None,
    ) -> Tensor | tuple[Tensor, RowMetrics]:
        return linear_divergence(
            self.objective,
            student_hidden,
            student_weight,
            labels,
            teacher_hidden=teacher_hidden,
            teacher_weight=teacher_weight,
            teacher_logits=teacher_logits,
            student_bias=student_bias,
            teacher_bias=teacher_bias,
            weight=weight,
            num_items=num_items,
            **self.options,
        )


class LinearReverseKLLoss(LinearDivergenceLoss):
    """:func:`drkl_triton.linear_reverse_kl` as a :class:`LinearDivergenceLoss`."""

    def __init__(self, **options: Any):
        super().__init__(objectives.reverse_kl(), **options)


class LinearDRKLLoss(LinearDivergenceLoss):
    """:func:`drkl_triton.linear_drkl` as a :class:`LinearDivergenceLoss`; ``forward`` needs
    labels.
    """

    def __init__(self, *, gamma: float | Tensor = 0.5, skew: float | Tensor = 0.0, **options: Any):
        super().__init__(objectives.skewed_teacher(objectives.drkl(gamma), skew), **options)
