"""The ``torch.autograd.Function``s. Forward keeps O(rows) beside its inputs and backward recomputes
from the logits; LinearMeanFunction alone keeps its gradients instead.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _reduction, algebra, backends


class _SecondDerivative(torch.autograd.Function):
    """Passes a gradient on and raises when it is differentiated.

    ``once_differentiable`` alone would return a gradient that is quietly cut from the graph where
    the upstream gradient is a constant; a penalty on it would then train nothing.
    """

    @staticmethod
    def forward(ctx: Any, grad: Tensor, *sources: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        raise RuntimeError(
            "second derivatives of drkl_triton's functions are not implemented; drop "
            "create_graph=True, or use "
            "drkl_triton.reference, which is plain differentiable PyTorch"
        )


def _first_order(grad: Tensor, *sources: Tensor) -> Tensor:
    if (
        not torch.compiler.is_compiling() and torch.is_grad_enabled()
    ):  # only under create_graph=True
        return _SecondDerivative.apply(grad, *sources)
    return grad


def _save(ctx: Any, *tensors: Tensor | None) -> None:
    """``ctx.save_for_backward``, which refuses what was made under torch.inference_mode(): of such
    a tensor an ordinary one over the same memory is saved, so that hooks see it and backward frees
    it. It has no version to watch.
    """
    if not torch.compiler.is_compiling():
        tensors = [_ordinary(x) if x is not None and x.is_inference() else x for x in tensors]
    ctx.save_for_backward(*tensors)


def _ordinary(x: Tensor) -> Tensor:
    with torch.inference_mode(False):
        alias = torch.empty(0, dtype=x.dtype, device=x.device)
        return alias.set_(x.untyped_storage(), x.storage_offset(), x.shape, x.stride())


class DivergenceFunction(torch.autograd.Function):
    """Reverse KL (``gamma`` None) or DRKL of logits [..., V]: (the loss, [N] or reduced, and the
    fields of RowMetrics [6, N], or nothing). weight [N].
    """

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        label: Tensor,
        inv_temperature: Tensor,
        gamma: Tensor | None,
        filter_value: Tensor | None,
        weight: Tensor | None,
        num_items: Tensor | None,
        V: int,
        labelled: bool,
        metrics: bool,
        reduction: str,
        backend: str,
    ):
        rows = label, inv_temperature, gamma, filter_value, weight
        sums, loss, denominator, fields = backends.divergence(
            student, teacher, *rows, num_items, V, labelled, metrics, reduction, backend
        )
        if reduction != "mean":
            denominator = None
        elif num_items is not None:
            denominator = num_items
        _save(ctx, student, teacher, *rows, denominator, sums)
        ctx.options = (V, labelled, backend)
        ctx.mark_non_differentiable(fields)
        return loss, fields

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, unused: Tensor):
        dstudent = None
        if ctx.needs_input_grad[0]:
            saved = ctx.saved_tensors  # once: activation checkpointing gives them out once
            with torch.no_grad():
                dstudent = backends.divergence_backward(
                    *saved, upstream.to(saved[-1].dtype), *ctx.options
                )
            dstudent = _first_order(dstudent, saved[0], upstream)
        return dstudent, *[None] * 12


class SoftmaxFunction(torch.autograd.Function):
    """softmax or log_softmax over the last dimension."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, inv_temperature: Tensor, log: bool, backend: str
    ) -> Tensor:
        y, state = backends.softmax(logits, inv_temperature, log, backend)
        _save(ctx, logits, inv_temperature, state)
        ctx.options = (log, backend)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        logits, inv_temperature, state = ctx.saved_tensors
        dlogits = None
        if ctx.needs_input_grad[0]:
            with torch.no_grad():
                dlogits = backends.softmax_backward(
                    logits, grad, inv_temperature, state, *ctx.options
                )
            dlogits = _first_order(dlogits, logits, grad)
        return dlogits, None, None, None


class LinearFunction(torch.autograd.Function):
    """Per-row losses from hidden states: (loss [N], *metrics [N]). Backward makes the logits again.

    The tensors, here and below: the student's hidden states, matrix, bias, scale and softcap, the
    teacher's and its logits, label, inv_temperature, gamma, filter_value. ``numbers``: what the op
    takes besides.
    """

    @staticmethod
    def forward(
        ctx: Any,
        numbers: LinearNumbers,
        *tensors: Tensor | None,
    ):
        student, teacher, rows = tensors[:5], tensors[5:11], tensors[11:]
        sums, *_ = _walk(student, teacher, rows, None, None, numbers)
        out = algebra.losses(*(sums, *rows[:3]), numbers.labelled, numbers.metrics)
        _save(ctx, *tensors, sums)
        ctx.numbers = numbers
        ctx.mark_non_differentiable(*out[1:])
        return out

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *unused: Tensor):
        saved = ctx.saved_tensors
        student, teacher, rows, sums = saved[:5], saved[5:11], saved[11:15], saved[15]
        numbers = ctx.numbers
        with torch.no_grad():
            upstream = grad_loss.to(sums.dtype)
            _, *grads = _walk(student, teacher, rows, upstream, sums, numbers)
            grads = [
                g.to(x.dtype) if want else None
                for g, x, want in zip(grads, student[:3], numbers.wanted, strict=True)
            ]
        sources = [x for x in student[:3] if x is not None]
        grads = [None if g is None else _first_order(g, *sources, grad_loss) for g in grads]
        return None, *grads, *[None] * 12


class LinearMeanFunction(torch.autograd.Function):
    """The reduced loss from hidden states, with the gradients made in forward: (reduced, loss [N],
    *metrics [N]), of which the first has a gradient. Tensors as above, then the weights and the
    denominator of ``_reduction.total``, and its derivative.
    """

    @staticmethod
    def forward(
        ctx: Any,
        numbers: LinearNumbers,
        *tensors: Tensor | None,
    ):
        student, teacher, rows = tensors[:5], tensors[5:11], tensors[11:15]
        weights, denominator, upstream = tensors[15:]
        sums, *grads = _walk(student, teacher, rows, upstream, None, numbers)
        out = algebra.losses(*(sums, *rows[:3]), numbers.labelled, numbers.metrics)
        reduced = _reduction.total(out[0], weights, denominator)
        # what has a gradient, for _first_order; the rest is not needed any more
        sources = [x for x, want in zip(student[:3], numbers.wanted, strict=True) if want]
        _save(ctx, *grads, *sources)
        ctx.dtypes = [None if x is None else x.dtype for x in student[:3]]
        ctx.wanted = numbers.wanted
        ctx.mark_non_differentiable(*out)
        return reduced, *out

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *unused: Tensor):
        saved = ctx.saved_tensors
        grads, sources = saved[:3], saved[3:]
        with torch.no_grad():
            grads = [
                backends.scaled(g, grad.to(g.dtype), dtype) if want else None
                for g, dtype, want in zip(grads, ctx.dtypes, ctx.wanted, strict=True)
            ]
        grads = [None if g is None else _first_order(g, *sources, grad) for g in grads]
        return None, *grads, *[None] * 15


class LinearNumbers(NamedTuple):
    """What the losses from hidden states depend on besides tensors."""

    student_dtype: torch.dtype  # of the product
    teacher_dtype: torch.dtype | None
    V: int
    labelled: bool
    metrics: bool
    wanted: tuple[bool, bool, bool]
    may_skip: bool
    chunk_bytes: int | None
    backend: str


def _walk(student, teacher, rows, upstream, sums, numbers):
    teacher_head, teacher_logits = teacher[:5], teacher[5]
    return backends.linear(
        *(*student, numbers.student_dtype, *teacher_head, numbers.teacher_dtype, teacher_logits),
        *(*rows, upstream, sums),
        *(numbers.V, numbers.labelled, numbers.metrics),
        *(list(numbers.wanted), numbers.may_skip, numbers.chunk_bytes, numbers.backend),
    )
