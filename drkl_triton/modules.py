"""The losses as ``nn.Module``s: options in ``__init__``, tensors in ``forward``. No parameters,
nothing in the state dict.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from . import _checks
from .algebra import RowMetrics
from .functional import drkl, reverse_kl
from .linear import linear_drkl, linear_reverse_kl

__all__ = ["DRKLLoss", "LinearDRKLLoss", "LinearReverseKLLoss", "ReverseKLLoss"]


class _Options(nn.Module):
    """Options in ``self.options``, checked already in ``__init__``."""

    def __init__(
        self,
        *,
        temperature: float | Tensor = 1.0,
        ignore_index: int = -100,
        reduction: str = "mean",
        shift: bool = False,
        vocab_mismatch: str = "error",
        support: str = "full",
        filter_value: float = float("-inf"),
        backend: str = "auto",
        return_metrics: bool = False,
        **unknown: Any,
    ):
        super().__init__()
        _checks.known_options(type(self).__name__, unknown)
        _checks.one_of("vocab_mismatch", vocab_mismatch, ("error", "truncate"))
        self.options = dict(
            temperature=temperature,
            ignore_index=ignore_index,
            reduction=reduction,
            shift=shift,
            support=support,
            filter_value=filter_value,
            backend=backend,
            return_metrics=return_metrics,
        )
        _checks.divergence_options(num_items=None, **self.options)
        self.options["vocab_mismatch"] = vocab_mismatch

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class ReverseKLLoss(_Options):
    """:func:`drkl_triton.reverse_kl` with its options fixed. Options, errors and formula are those
    of the function.

    ``forward(student_logits, teacher_logits, labels=None, *, weight=None, num_items=None)`` takes
    ``[..., V]`` logits and ``[...]`` labels and weights; wrong options raise already in
    ``__init__``.
    """

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor | None = None,
        *,
        weight: Tensor | None = None,
        num_items: float | Tensor | None = None,
    ) -> Tensor | tuple[Tensor, RowMetrics]:
        return reverse_kl(
            student_logits,
            teacher_logits,
            labels,
            weight=weight,
            num_items=num_items,
            **self.options,
        )


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
    ) -> Tensor | tuple[Tensor, RowMetrics]:
        return drkl(
            student_logits,
            teacher_logits,
            labels,
            weight=weight,
            num_items=num_items,
            **self.options,
        )


class LinearReverseKLLoss(_Options):
    """:func:`drkl_triton.linear_reverse_kl` with its options fixed: those of
    :class:`ReverseKLLoss`, and of the two output layers ``student_softcap``, ``teacher_softcap``
    (default None), ``student_scale``, ``teacher_scale`` (1.0), and ``chunk_bytes`` (None) and
    ``recompute`` (False).

    ``forward(student_hidden, student_weight, labels=None, *, teacher_hidden=None,
    teacher_weight=None, teacher_logits=None, student_bias=None, teacher_bias=None, weight=None,
    num_items=None)`` takes ``[..., H]`` hidden states, ``[V, H]`` matrices and ``[...]`` labels and
    weights. The matrices are no parameters of this module.
    """

    _function = staticmethod(linear_reverse_kl)

    def __init__(
        self,
        *,
        student_softcap: float | None = None,
        teacher_softcap: float | None = None,
        student_scale: float = 1.0,
        teacher_scale: float = 1.0,
        chunk_bytes: int | None = None,
        recompute: bool = False,
        **options: Any,
    ):
        super().__init__(**options)
        _checks.head_numbers("student", student_scale, student_softcap)
        _checks.head_numbers("teacher", teacher_scale, teacher_softcap)
        _checks.linear_options(chunk_bytes=chunk_bytes, recompute=recompute)
        self.options |= dict(
            student_softcap=student_softcap,
            teacher_softcap=teacher_softcap,
            student_scale=student_scale,
            teacher_scale=teacher_scale,
            chunk_bytes=chunk_bytes,
            recompute=recompute,
        )

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
        return self._function(
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


class LinearDRKLLoss(LinearReverseKLLoss):
    """:func:`drkl_triton.linear_drkl` with its options, ``gamma`` (default 0.5) included, fixed;
    ``forward`` is that of :class:`LinearReverseKLLoss`, and needs labels.
    """

    _function = staticmethod(linear_drkl)

    def __init__(self, *, gamma: float | Tensor = 0.5, **options: Any):
        super().__init__(**options)
        _checks.positive("gamma", gamma)
        self.options["gamma"] = gamma
