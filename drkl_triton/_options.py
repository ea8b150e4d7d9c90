"""The keyword options of the losses, for type checkers alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict

if TYPE_CHECKING:
    from torch import Tensor


class Options(TypedDict, total=False):
    weight: Tensor | None
    temperature: float | Tensor
    ignore_index: int
    reduction: str
    num_items: float | Tensor | None
    shift: bool
    vocab_mismatch: str
    support: str
    filter_value: float
    backend: str


class DRKLOptions(Options, total=False):
    gamma: float | Tensor


class LinearOptions(Options, total=False):
    teacher_hidden: Tensor | None
    teacher_weight: Tensor | None
    teacher_logits: Tensor | None
    student_bias: Tensor | None
    teacher_bias: Tensor | None
    student_softcap: float | None
    teacher_softcap: float | None
    student_scale: float
    teacher_scale: float
    chunk_bytes: int | None
    recompute: bool


class LinearDRKLOptions(LinearOptions, total=False):
    gamma: float | Tensor
