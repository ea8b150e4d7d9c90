"""The losses as ``nn.Module``s: options in ``__init__``, tensors in ``forward``. No parameters,
nothing in the state dict.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from . import _checks
from .functional import drkl, reverse_kl

__all__ = ["DRKLLoss", "ReverseKLLoss"]


class ReverseKLLoss(nn.Module):
    """:func:`drkl_triton.reverse_kl` with its options fixed. Options, errors and formula are those
    of the function.

    ``forward(student_logits, teacher_logits, labels=None, *, weight=None, num_items=None)`` takes
    ``[..., V]`` logits and ``[...]`` labels and weights; wrong options raise already in
    ``__init__``.
    """

    def __init__(
        self,
        *,
        temperature: float | Tensor = 1.0,
        ignore_index: int = -100,
        reduction: str = "mean",
        shift: bool = False,
        vocab_mismatch: str = "error",
        support: str = "full",
        backend: str = "auto",
        return_metrics: bool = False,
    ):
        super().__init__()
        _checks.one_of("vocab_mismatch", vocab_mismatch, ("error", "truncate"))
        self.options = dict(
            temperature=temperature,
            ignore_index=ignore_index,
            reduction=reduction,
            shift=shift,
            support=support,
            backend=backend,
            return_metrics=return_metrics,
        )
        _checks.divergence_options(num_items=None, **self.options)
        self.options["vocab_mismatch"] = vocab_mismatch

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor | None = None,
        *,
        weight: Tensor | None = None,
        num_items: float | Tensor | None = None,
    ) -> Any:
        return reverse_kl(
            student_logits,
            teacher_logits,
            labels,
            weight=weight,
            num_items=num_items,
            **self.options,
        )

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class DRKLLoss(ReverseKLLoss):
    """:func:`drkl_triton.drkl` with its options, ``gamma`` (default 0.5) included, fixed;
    ``forward`` needs labels.
    """

    def __init__(self, *, gamma: float | Tensor = 0.5, **options: Any):
        super().__init__(**options)
        _checks.positive("gamma", gamma)
        self.options["gamma"] = gamma

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor,
        *,
        weight: Tensor | None = None,
        num_items: float | Tensor | None = None,
    ) -> Any:
        return drkl(
            student_logits,
            teacher_logits,
            labels,
            weight=weight,
            num_items=num_items,
            **self.options,
        )
