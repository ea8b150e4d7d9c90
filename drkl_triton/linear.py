"""The losses from hidden states and output matrices, a slice of the logits at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor

from . import _checks, _reduction, backends
from .algebra import RowMetrics
from .autograd import LinearFunction, LinearMeanFunction, LinearNumbers

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ._options import LinearDRKLOptions, LinearOptions

__all__ = ["linear_drkl", "linear_reverse_kl"]


@overload
def linear_reverse_kl(
    student_hidden: Tensor,
    student_weight: Tensor,
    labels: Tensor | None = None,
    *,
    return_metrics: Literal[False] = False,
    **options: Unpack[LinearOptions],
) -> Tensor: ...
@overload
def linear_reverse_kl(
    student_hidden: Tensor,
    student_weight: Tensor,
    labels: Tensor | None = None,
    *,
    return_metrics: Literal[True],
    **options: Unpack[LinearOptions],
) -> tuple[Tensor, RowMetrics]: ...
def linear_reverse_kl(
    student_hidden: Tensor,
    student_weight: Tensor,
    labels: Tensor | None = None,
    *,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    teacher_logits: Tensor | None = None,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    student_scale: float = 1.0,
    teacher_scale: float = 1.0,
    chunk_bytes: int | None = None,
    recompute: bool = False,
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
    r"""Reverse Kullback-Leibler divergence, as :func:`drkl_triton.reverse_kl`, from the last hidden
    states and the output matrices of both models; the logits exist a slice at a time.

    .. math:: s = \mathrm{cap} \tanh(z / \mathrm{cap}), \quad
        z = \mathrm{scale} \cdot (\mathrm{hidden}\, W^\top + \mathrm{bias})

    Args:
        student_hidden: ``[..., H]``, float16, bfloat16, float32 or float64: what goes into the
            student's output layer (after its last norm).
        student_weight: ``[V, H]``, the layer's matrix, in the dtype of ``student_hidden`` (under
            autocast the dtypes may differ, and the product is autocast's). A frozen matrix costs no
            gradient. Tied embeddings may be passed as they are. An adapter's ``.weight`` is the
            matrix below it: pass the sum of both.
        labels: ``[...]``, as in :func:`drkl_triton.reverse_kl`. Rows at ``ignore_index`` or of
            weight 0 are left out before the first product, which waits for the device, once forward
            and, where backward computes the logits again, once there.
        teacher_hidden, teacher_weight: ``[..., H']``, ``[V', H']``; H' may differ from H. No
            gradient: tensors that require grad must be detached.
        teacher_logits: ``[..., V']``, in place of the two, where the teacher's logits exist. Read
            in place if all rows count (under ``shift`` the last never does) and lie evenly, else
            copied a slice at a time.
        student_bias, teacher_bias: ``[V]``, ``[V']``.
        student_softcap, teacher_softcap: the cap of Gemma's ``cap * tanh(z / cap)``.
        student_scale, teacher_scale: what the model multiplies its logits with (Cohere's
            ``logit_scale``; 1 over Granite's ``logits_scaling``).
        chunk_bytes: what the slices of both models may take, one row at the least. Default: 256
            MiB; on CUDA and ROCm a quarter of the free memory, if that is more, up to 2 GiB, as a
            power of two. The number changes the order of sums, and so the last bits of
            ``d student_weight``. Not in it: gradients, and matrices converted for autocast.
        recompute: compute the logits a second time in the backward pass instead of the gradients in
            the forward pass: 4 + 2 matrix products instead of 3 + 1, and nothing of the size of the
            matrix is held between the two.

    The other arguments, the result and the errors are those of :func:`drkl_triton.reverse_kl`.

    With ``reduction`` ``"mean"`` or ``"sum"`` the gradients are made in the forward pass, where a
    gradient is wanted at all, and kept in float32; backward multiplies them by the upstream
    gradient. With ``"none"`` backward computes the logits again. The logits are float32 (float64
    where any operand is), sums of products of the operands as they are; on CUDA the gradient of the
    logits is rounded once to 16-bit operands. A NaN row makes NaN of the gradients that are sums
    over rows, those of matrix and bias.

    Raises:
        TypeError: wrong types or dtypes; a quantised matrix or a module in place of one; DTensors;
            a tensor inside a ``torch.func`` transform.
        ValueError: shapes, devices, vocabularies or options that do not fit; a teacher that
            requires grad; a matrix without elements (partitioned by ZeRO-3 or FSDP).
        RuntimeError: differentiating the gradient (second derivatives).
    """
    return _linear(
        None,
        (student_hidden, student_weight, student_bias, student_scale, student_softcap),
        (teacher_hidden, teacher_weight, teacher_bias, teacher_scale, teacher_softcap),
        teacher_logits,
        labels,
        weight=weight,
        num_items=num_items,
        vocab_mismatch=vocab_mismatch,
        chunk_bytes=chunk_bytes,
        recompute=recompute,
        temperature=temperature,
        ignore_index=ignore_index,
        reduction=reduction,
        shift=shift,
        support=support,
        filter_value=filter_value,
        backend=backend,
        return_metrics=return_metrics,
    )


@overload
def linear_drkl(
    student_hidden: Tensor,
    student_weight: Tensor,
    labels: Tensor,
    *,
    return_metrics: Literal[False] = False,
    **options: Unpack[LinearDRKLOptions],
) -> Tensor: ...
@overload
def linear_drkl(
    student_hidden: Tensor,
    student_weight: Tensor,
    labels: Tensor,
    *,
    return_metrics: Literal[True],
    **options: Unpack[LinearDRKLOptions],
) -> tuple[Tensor, RowMetrics]: ...
def linear_drkl(
    student_hidden: Tensor,
    student_weight: Tensor,
    labels: Tensor,
    *,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    teacher_logits: Tensor | None = None,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    student_scale: float = 1.0,
    teacher_scale: float = 1.0,
    chunk_bytes: int | None = None,
    recompute: bool = False,
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
    """Diversity-aware reverse KL, as :func:`drkl_triton.drkl`, from the last hidden states and the
    output matrices of both models; the logits exist a slice at a time.

    ``labels`` are required; ``gamma`` and the formula are those of :func:`drkl_triton.drkl`, all
    else is as in :func:`linear_reverse_kl`.
    """
    _checks.labels_given("linear_drkl", labels)
    _checks.positive("gamma", gamma)
    return _linear(
        gamma,
        (student_hidden, student_weight, student_bias, student_scale, student_softcap),
        (teacher_hidden, teacher_weight, teacher_bias, teacher_scale, teacher_softcap),
        teacher_logits,
        labels,
        weight=weight,
        num_items=num_items,
        vocab_mismatch=vocab_mismatch,
        chunk_bytes=chunk_bytes,
        recompute=recompute,
        temperature=temperature,
        ignore_index=ignore_index,
        reduction=reduction,
        shift=shift,
        support=support,
        filter_value=filter_value,
        backend=backend,
        return_metrics=return_metrics,
    )


def _linear(
    gamma, student, teacher, teacher_logits, labels, *,
    weight, num_items, vocab_mismatch, chunk_bytes, recompute, **options,
):  # fmt: skip
    """Both losses; gamma None: reverse KL. student, teacher: (hidden, weight, bias, scale,
    softcap).
    """
    if not torch.compiler.is_compiling():
        backends.count_flops()
    _checks.linear_options(chunk_bytes=chunk_bytes, recompute=recompute)
    _checks.divergence_options(num_items=num_items, **options)
    reduction, shift, metrics = options["reduction"], options["shift"], options["return_metrics"]
    V, student_dtype, teacher_dtype = _checks.heads(
        student, teacher, teacher_logits, vocab_mismatch
    )
    hidden, matrix, bias, *_ = student
    _checks.rows(labels, weight, shift, hidden, "student_hidden")

    acc = torch.float32
    for x in (*student[:3], *teacher[:3], teacher_logits):
        acc = acc if x is None else torch.promote_types(acc, x.dtype)
    inv_temperature = _reduction.inverse(options["temperature"], hidden.device, acc)
    gamma = None if gamma is None else _reduction.scalar(gamma, acc, hidden.device)
    weight = None if weight is None else weight.detach()
    backend = _checks.backend(options["backend"], hidden)
    codes = backends.row_labels(
        hidden.detach(), labels, weight, options["ignore_index"], V, shift, gamma is not None,
        backend,
    )  # fmt: skip
    shape, label = codes.shape, codes.view(-1)
    weights, denominator = _reduction.parts(codes, weight, reduction, num_items, shift, acc)
    wanted = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in student[:3]]
    student, teacher = (_head(*x, acc, hidden.device) for x in (student, teacher))
    numbers = LinearNumbers(
        student_dtype=student_dtype,
        teacher_dtype=teacher_dtype,
        V=V,
        labelled=labels is not None,
        metrics=metrics,
        wanted=tuple(wanted),
        may_skip=labels is not None or weight is not None or shift,
        chunk_bytes=chunk_bytes,
        backend=backend,
    )
    tensors = (*student, *teacher, teacher_logits, label, inv_temperature, gamma)
    tensors += (_reduction.filter_scalar(options, acc, hidden.device),)
    if reduction == "none" or recompute or not any(wanted):
        rows, *fields = LinearFunction.apply(numbers, *tensors)
        loss = _reduction.reduce(rows.view(shape), weights, denominator, reduction)
    else:
        upstream = _reduction.derivative(codes, weights, denominator, acc).view(-1)
        if weights is not None:
            weights = weights.view(-1)
        loss, rows, *fields = LinearMeanFunction.apply(
            numbers, *tensors, weights, denominator, upstream
        )
    return (loss, RowMetrics.of(rows, *fields, codes=codes)) if metrics else loss


def _head(hidden, weight, bias, scale, softcap, dtype, device):
    """With the numbers as 0-dim tensors, or None where they change nothing."""
    scale = None if scale == 1 else _reduction.scalar(scale, dtype, device)
    softcap = None if softcap is None else _reduction.scalar(softcap, dtype, device)
    return hidden, weight, bias, scale, softcap
