"""The losses from hidden states and output matrices, a slice of the logits at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Protocol, overload

import torch
from torch import Tensor

from . import _checks, _options, _reduction, _shard, objectives, ops
from ._named import named
from ._options import LinearOptions, Options
from .algebra import RowMetrics
from .graph import LinearCall, LinearFunction, LinearMeanFunction
from .sparse import SparseTeacher

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ._objective import Objective, Parameter
    from ._options import LinearKeywords, LinearParameters

__all__ = ["linear_divergence", "linear_drkl", "linear_reverse_kl"]


class LinearLossFunction(Protocol):
    """A loss from hidden states, called with Options, LinearOptions and its own parameters."""

    __name__: str

    @overload
    def __call__(
        self,
        student_hidden: Tensor,
        student_weight: Tensor,
        labels: Tensor | None = None,
        *,
        return_metrics: Literal[False] = False,
        **options: Unpack[LinearParameters],
    ) -> Tensor: ...
    @overload
    def __call__(
        self,
        student_hidden: Tensor,
        student_weight: Tensor,
        labels: Tensor | None = None,
        *,
        return_metrics: Literal[True],
        **options: Unpack[LinearParameters],
    ) -> tuple[Tensor, RowMetrics]: ...


@overload
def linear_divergence(
    objective: Objective,
    student_hidden: Tensor,
    student_weight: Tensor,
    labels: Tensor | None = None,
    *,
    return_metrics: Literal[False] = False,
    **options: Unpack[LinearKeywords],
) -> Tensor: ...
@overload
def linear_divergence(
    objective: Objective,
    student_hidden: Tensor,
    student_weight: Tensor,
    labels: Tensor | None = None,
    *,
    return_metrics: Literal[True],
    **options: Unpack[LinearKeywords],
) -> tuple[Tensor, RowMetrics]: ...
def linear_divergence(
    objective: Objective,
    student_hidden: Tensor,
    student_weight: Tensor,
    labels: Tensor | None = None,
    **options: Any,
) -> Tensor | tuple[Tensor, RowMetrics]:
    """Any sum of divergences, as :func:`drkl_triton.divergence`, from the last hidden states and
    the output matrices of both models; the logits exist a slice at a time.

    The arguments after ``objective``, the result and the errors are those of
    :func:`linear_reverse_kl`; no teacher is needed where no term compares with one.
    """
    return _loss("linear_divergence", objective, student_hidden, student_weight, labels, options)


def _loss(name, objective, hidden, matrix, labels, options: dict):
    if options.get("group") is None:
        return _checked(name, objective, hidden, matrix, labels, options)
    group = options["group"]
    _checks.group(group, options.get("vocab_start"))
    with _shard.together(group):
        matrix = _shard.own_rows(matrix, group)
        for part in ("student_bias", "teacher_weight", "teacher_bias"):
            options[part] = _shard.own_rows(options.get(part), group)
        options["teacher_logits"] = _shard.teacher_logits(options.get("teacher_logits"), group)
        return _checked(name, objective, hidden, matrix, labels, options)


def _checked(name, objective, hidden, matrix, labels, options: dict):
    options, heads = _options.taken(name, options, Options, LinearOptions)
    if not torch.compiler.is_compiling():
        ops.count_flops()
    _checks.objective(objective)
    student = hidden, matrix, heads.student_bias, heads.student_scale, heads.student_softcap
    teacher = (
        heads.teacher_hidden,
        heads.teacher_weight,
        heads.teacher_bias,
        heads.teacher_scale,
        heads.teacher_softcap,
    )
    given, sparse = heads.teacher_logits, isinstance(heads.teacher_logits, SparseTeacher)
    shard = None
    if options.group is not None:
        _checks.head("student", *student[:3], sharded=True)
        shard = heads.agreed(name, objective, hidden, matrix, labels, options)
        if not sparse:
            given = _shard.part_of(given, shard, -1)
        theirs = (_shard.part_of(x, shard, 0) for x in teacher[1:3])
        teacher = (teacher[0], *theirs, *teacher[3:])
    V, student_dtype, teacher_dtype = _checks.heads(
        student, teacher, given, options.vocab_mismatch, objective.needs_teacher, shard
    )
    vocabulary = V if shard is None else shard.vocabulary
    has_teacher = heads.teacher_hidden is not None or given is not None
    _checks.labels_given(name, objective, labels)
    _checks.rows(labels, options.weight, options.shift, hidden, "student_hidden")
    _checks.parameters(objective, hidden, "student_hidden")
    _checks.teacher_support(options.support, has_teacher, sparse)

    acc = torch.float32
    for x in (*student[:3], *teacher[:3], given.log_probs if sparse else given):
        acc = acc if x is None else torch.promote_types(acc, x.dtype)
    backend = _checks.backend(options.backend, hidden)
    rows = _options.rows(
        objective, hidden, vocabulary, labels, options, has_teacher, acc, backend,
        given if sparse else None,
    )  # fmt: skip
    tail, cells = "", (given, None, None)
    if sparse:
        tail, cells = given.tail, given.cells(objective, rows, vocabulary, options.temperature)
    given, columns, cell_label = cells
    reduction, codes, weights = options.reduction, rows.codes, rows.weights
    denominator = _reduction.denominator(codes, weights, reduction, options.num_items, acc)
    wanted = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in student[:3]]
    call = LinearCall(
        student_dtype=student_dtype,
        teacher_dtype=teacher_dtype,
        V=V,
        objective=objective.key,
        needs=rows.needs,
        wanted=tuple(wanted),
        may_skip=labels is not None or weights is not None or options.shift or sparse,
        chunk_bytes=heads.chunk_bytes,
        tail=tail,
        backend=backend,
        shard="" if shard is None else shard.key,
        metrics=options.return_metrics,
    )
    label = codes if shard is None else shard.labels(codes)
    tensors = (
        *_head(*student, acc, hidden.device), *_head(*teacher, acc, hidden.device),
        given, label.view(-1), rows.inv_temperature, rows.parameters, rows.filter_value, columns,
        cell_label,
    )  # fmt: skip
    if reduction == "none" or heads.recompute or not any(wanted):
        loss, fields = LinearFunction.apply(call, *tensors)
        loss = _reduction.reduce(loss.view(codes.shape), weights, denominator, reduction)
    else:
        upstream = _reduction.derivative(codes, weights, denominator, acc).view(-1)
        if weights is not None:
            weights = weights.view(-1)
        loss, fields = LinearMeanFunction.apply(call, *tensors, weights, denominator, upstream)
    if not options.return_metrics:
        return loss
    return loss, RowMetrics.of(fields, codes, labels is not None, has_teacher)


def _head(hidden, weight, bias, scale, softcap, dtype, device):
    """With the numbers as 0-dim tensors, or None where they change nothing."""
    scale = None if scale == 1 else _reduction.scalar(scale, dtype, device)
    softcap = None if softcap is None else _reduction.scalar(softcap, dtype, device)
    return hidden, weight, bias, scale, softcap


def _named(builder) -> LinearLossFunction:
    """As drkl_triton.functional's."""

    def loss(student_hidden, student_weight, labels=None, **options):
        objective = builder(**{k: options.pop(k) for k in own if k in options})
        return _loss(name, objective, student_hidden, student_weight, labels, options)

    own, name = named(loss, builder, LinearOptions, Options)
    return loss


@_named
def linear_reverse_kl() -> Objective:
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
        teacher_logits: ``[..., V']``, in place of the two, where the teacher's logits exist, or a
            :class:`drkl_triton.SparseTeacher` ``[..., K]``. Logits are read
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
    return objectives.reverse_kl()


@_named
def linear_drkl(gamma: Parameter = 0.5, skew: Parameter = 0.0) -> Objective:
    """Diversity-aware reverse KL, as :func:`drkl_triton.drkl`, from the last hidden states and the
    output matrices of both models; the logits exist a slice at a time.

    ``labels`` are required; ``gamma``, ``skew`` and the formula are those of
    :func:`drkl_triton.drkl`, all else is as in :func:`linear_reverse_kl`.
    """
    return objectives.skewed_teacher(objectives.drkl(gamma), skew)
