"""The public functions. Shapes, dtypes, errors and formulas are in their docstrings; semantics in
README.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor

from . import _checks, _reduction, backends
from .algebra import RowMetrics
from .autograd import DivergenceFunction, SoftmaxFunction

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ._options import DRKLOptions, Options

__all__ = ["drkl", "log_softmax", "reverse_kl", "softmax"]


def softmax(logits: Tensor, *, temperature: float | Tensor = 1.0, backend: str = "auto") -> Tensor:
    """``exp(x / temperature)`` normalised over the last dimension, as one scan and one pass that
    writes.

    Args:
        logits: ``[..., V]``, float16, bfloat16, float32 or float64. Leading strides that reduce to
            two are read in place; a strided last dimension, or more leading strides, are copied.
        temperature: positive number, or 0-dim tensor (not validated, no gradient).
        backend: ``"auto"`` (Triton on a GPU, tiled PyTorch elsewhere), ``"triton"`` or ``"tiled"``.

    Returns:
        ``[..., V]``, contiguous, in the dtype of ``logits``; computed in float32 (float64 for
        float64). Columns at -inf get 0; a row that is -inf everywhere, or holds NaN or +inf, is
        NaN.

    Raises:
        TypeError: not a tensor, or a dtype, layout or subclass that is not supported.
        ValueError: no columns, ``temperature`` not positive, ``backend`` unknown or not available
            here.

    The backward pass recomputes the probabilities from ``logits``; nothing of size V is kept.
    Second derivatives raise.
    """
    return _softmax(logits, temperature, backend, log=False)


def log_softmax(
    logits: Tensor, *, temperature: float | Tensor = 1.0, backend: str = "auto"
) -> Tensor:
    """Logarithm of :func:`softmax`: ``x / temperature - logsumexp(x / temperature)`` over the last
    dimension.

    Arguments, errors and memory as in :func:`softmax`. Columns at -inf get -inf, and their upstream
    gradient is passed on unchanged (over the temperature), as in ``torch.log_softmax``.
    """
    return _softmax(logits, temperature, backend, log=True)


def _softmax(logits: Tensor, temperature: float | Tensor, backend: str, log: bool) -> Tensor:
    _checks.logits("logits", logits)
    _checks.positive("temperature", temperature)
    _checks.one_of("backend", backend, _checks.BACKENDS)
    backend = _checks.backend(backend, logits)
    acc = torch.promote_types(logits.dtype, torch.float32)
    inv_temperature = _reduction.inverse(temperature, logits.device, acc)
    return SoftmaxFunction.apply(logits, inv_temperature, log, backend)


@overload
def reverse_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    return_metrics: Literal[False] = False,
    **options: Unpack[Options],
) -> Tensor: ...
@overload
def reverse_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    return_metrics: Literal[True],
    **options: Unpack[Options],
) -> tuple[Tensor, RowMetrics]: ...
def reverse_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
    shift: bool = False,
    vocab_mismatch: str = "error",
    support: str = "full",
    filter_value: float = float("-inf"),
    backend: str = "auto",
    return_metrics: bool = False,
) -> Tensor | tuple[Tensor, RowMetrics]:
    r"""Reverse Kullback-Leibler divergence ``KL(q || p)`` of the student's ``q`` from the teacher's
    ``p``, per token.

    .. math:: \mathrm{RKL} = \sum_k q_k (\log q_k - \log p_k), \quad q = \mathrm{softmax}(s/\tau),\
    p = \mathrm{softmax}(t/\tau)

    Args:
        student_logits, teacher_logits: ``[..., V]``, float16, bfloat16, float32 or float64, same
            leading shape and device; the dtypes may differ. Leading strides that reduce to two
            (slices and transposes of ``[B, T, V]``, expanded teachers) are read in place; a strided
            last dimension, or more leading strides, are copied.
        labels: ``[...]`` int64 or int32. Rows at ``ignore_index`` are not read: loss, gradient and
            metrics 0. The other labels do not change the loss; they fill the target fields of the
            metrics and let the arithmetic run in log-odds, which keeps its precision where the
            student is sure of the label. A label outside ``[0, V)`` makes that row's target metrics
            NaN.
        weight: ``[...]``, real. Weight of each token, without a gradient; a token of weight 0 is
            ignored.
        temperature: divides both logits. Positive number, or 0-dim tensor (not validated, no
            gradient). There is no hidden factor ``temperature**2``.
        ignore_index: the label of rows to leave out.
        reduction: ``"mean"`` (sum of weight x loss over sum of weights of the rows not ignored),
            ``"sum"`` (of weight x loss) or ``"none"`` (weight x loss, ``[...]``).
        num_items: number or 0-dim tensor that replaces the denominator of ``"mean"``: the tokens of
            the whole batch under gradient accumulation or data parallelism.
        shift: next-token form for ``[B, T, V]``: row t is scored with label and weight t + 1, the
            last row is ignored (also without labels). Nothing is sliced or copied.
        vocab_mismatch: ``"error"``, or ``"truncate"``: columns beyond the smaller vocabulary are
            left out of both distributions and get gradient 0.
        support: ``"full"``, or ``"teacher"``: columns that the teacher's logits leave out are left
            out of both distributions.
        filter_value: with ``support="teacher"``, the largest logit that means left out: what the
            mask was filled with, before the temperature (-1e4, -1e9 or ``torch.finfo(dtype).min``,
            as it is in the teacher's dtype), or anything between it and the real logits.
        backend: ``"auto"`` (Triton on a GPU, tiled PyTorch elsewhere), ``"triton"`` or ``"tiled"``.
        return_metrics: also return :class:`RowMetrics`, detached, from the same scan.

    Returns:
        The loss in nats, float32 (float64 where either side is float64): a 0-dim tensor, or
        ``[...]`` for ``"none"``. With ``return_metrics`` the pair ``(loss, RowMetrics)``. Without a
        row that counts, or with a denominator of 0, the mean is 0, connected to the graph, with
        zero gradients. The gradient goes to ``student_logits`` alone, in its dtype.

        A row whose teacher is -inf where the student is finite has loss +inf and gradient 0. A row
        with NaN or +inf, or with one side -inf everywhere, is NaN, loss and gradient; other rows
        are not touched.

    Raises:
        TypeError: wrong types, dtypes, layouts; a tensor inside a ``torch.func`` transform.
        ValueError: shapes, devices, vocabularies or options that do not fit; ``teacher_logits``
            that require grad.
        RuntimeError: differentiating the gradient (second derivatives).
    """
    return _divergence(
        None,
        student_logits,
        teacher_logits,
        labels,
        weight=weight,
        temperature=temperature,
        ignore_index=ignore_index,
        reduction=reduction,
        num_items=num_items,
        shift=shift,
        vocab_mismatch=vocab_mismatch,
        support=support,
        filter_value=filter_value,
        backend=backend,
        return_metrics=return_metrics,
    )


@overload
def drkl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    return_metrics: Literal[False] = False,
    **options: Unpack[DRKLOptions],
) -> Tensor: ...
@overload
def drkl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    return_metrics: Literal[True],
    **options: Unpack[DRKLOptions],
) -> tuple[Tensor, RowMetrics]: ...
def drkl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    gamma: float | Tensor = 0.5,
    weight: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
    shift: bool = False,
    vocab_mismatch: str = "error",
    support: str = "full",
    filter_value: float = float("-inf"),
    backend: str = "auto",
    return_metrics: bool = False,
) -> Tensor | tuple[Tensor, RowMetrics]:
    r"""Diversity-aware reverse KL: reverse KL with the weight of its non-target part made constant,
    per token.

    .. math:: \mathrm{DRKL} = \mathrm{KL}(b_q \| b_p) + \gamma\, \mathrm{KL}(\hat q \| \hat p)

    with ``b_q = (q_y, 1 - q_y)`` at the label ``y`` and ``q^`` the distribution over the other
    columns, renormalised. Reverse KL is the same sum with ``1 - q_y`` in place of ``gamma``.
    Source: Luong, Tran, Chen, "Diversity-Aware Reverse Kullback-Leibler Divergence for Large
    Language Model Distillation", arXiv 2604.00223; this is our reading of its Equation 9, and the
    default ``gamma`` is ours.

    Args:
        labels: ``[...]`` int64 or int32, required. A label outside ``[0, V)`` that is not
            ``ignore_index`` (or of weight 0) is a ValueError when the labels are on the CPU; on a
            GPU, where looking would stall the device, the row's loss and gradient are NaN.
        gamma: weight of the non-target part. Positive number, or 0-dim tensor (not validated, no
            gradient).

    All other arguments, the result and the errors are those of :func:`reverse_kl`. With
    ``support="teacher"`` and a teacher that leaves out the label, the target part is 0. Where the
    student is -inf at the label, the loss is ``-log(1 - p_y) + gamma N``; where it is finite at the
    label only, ``-log p_y``, with gradient 0.
    """
    _checks.labels_given("drkl", labels)
    _checks.positive("gamma", gamma)
    return _divergence(
        gamma,
        student_logits,
        teacher_logits,
        labels,
        weight=weight,
        temperature=temperature,
        ignore_index=ignore_index,
        reduction=reduction,
        num_items=num_items,
        shift=shift,
        vocab_mismatch=vocab_mismatch,
        support=support,
        filter_value=filter_value,
        backend=backend,
        return_metrics=return_metrics,
    )


def _divergence(
    gamma, student, teacher, labels, *, weight, ignore_index, num_items, vocab_mismatch,
    **options,
):  # fmt: skip
    """Both losses; gamma None: reverse KL. The arguments are the public ones."""
    V = _checks.logits_pair(student, teacher, vocab_mismatch)
    _checks.divergence_options(ignore_index=ignore_index, num_items=num_items, **options)
    reduction, shift, metrics = options["reduction"], options["shift"], options["return_metrics"]
    _checks.rows(labels, weight, shift, student, "student_logits")
    backend = _checks.backend(options["backend"], student)

    acc = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    inv_temperature = _reduction.inverse(options["temperature"], student.device, acc)
    gamma = None if gamma is None else _reduction.scalar(gamma, acc, student.device)
    weight = None if weight is None else weight.detach()
    codes = backends.row_labels(
        student.detach(), labels, weight, ignore_index, V, shift, gamma is not None, backend
    )
    rows = (
        codes.view(-1), inv_temperature, gamma,
        _reduction.filter_scalar(options, acc, student.device),
    )  # fmt: skip
    labelled = labels is not None
    weights = _reduction.weights(codes, weight, shift, acc)
    weights = None if weights is None else weights.view(-1)
    if num_items is not None:
        num_items = _reduction.scalar(num_items, acc, student.device)
    loss, fields = DivergenceFunction.apply(
        student, teacher, *rows, weights, num_items, V, labelled, metrics, reduction, backend
    )
    if reduction == "none":
        loss = loss.view(codes.shape)
    if not metrics:
        return loss
    rows, *others, entropy = fields.unbind(0)
    return loss, RowMetrics.of(rows, *(others if labelled else ()), entropy, codes=codes)
