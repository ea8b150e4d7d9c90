"""The ``torch.autograd.Function``s. Forward keeps O(rows) beside its inputs; backward recomputes
from the logits.
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


class DivergenceFunction(torch.autograd.Function):
    """Per-row reverse KL (``gamma`` None) or DRKL of logits [..., V]; returns (loss [N], *metrics
    [N]).
    """

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        label: Tensor,
        inv_temperature: Tensor,
        gamma: Tensor | None,
        V: int,
        labelled: bool,
        teacher_support: bool,
        metrics: bool,
        backend: str,
    ):
        sums = backends.row_sums(
            student, teacher, label, inv_temperature, V, teacher_support, metrics, backend
        )
        out = algebra.losses(sums, label, inv_temperature, gamma, labelled, metrics)
        # a teacher from torch.inference_mode() cannot be saved in the graph, and needs no watching
        ctx.inference_teacher = None
        if not torch.compiler.is_compiling() and teacher.is_inference():
            ctx.inference_teacher, teacher = teacher, None
        ctx.save_for_backward(student, teacher, label, inv_temperature, gamma, sums)
        ctx.options = (V, labelled, teacher_support, backend)
        ctx.mark_non_differentiable(*out[1:])
        return out

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *unused: Tensor):
        student, teacher, label, inv_temperature, gamma, sums = ctx.saved_tensors
        if teacher is None:
            teacher = ctx.inference_teacher
        V, labelled, teacher_support, backend = ctx.options
        dstudent = None
        if ctx.needs_input_grad[0]:
            with torch.no_grad():
                scalars = algebra.gradient_scalars(
                    sums, label, inv_temperature, gamma, labelled, grad_loss.to(sums.dtype)
                )
                dstudent = backends.row_grad(
                    student, teacher, label, inv_temperature, scalars, V, teacher_support, backend
                )
            dstudent = _first_order(dstudent, student, grad_loss)
        return dstudent, *[None] * 9


class SoftmaxFunction(torch.autograd.Function):
    """softmax or log_softmax over the last dimension."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, inv_temperature: Tensor, log: bool, backend: str
    ) -> Tensor:
        y, state = backends.softmax(logits, inv_temperature, log, backend)
        ctx.save_for_backward(logits, inv_temperature, state)
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

    The tensors, here and below: the student's hidden states, matrix and bias, the teacher's and its
    logits, label, inv_temperature, gamma. ``numbers``: what the op takes besides.
    """

    @staticmethod
    def forward(
        ctx: Any,
        numbers: LinearNumbers,
        *tensors: Tensor | None,
    ):
        student, teacher, rows = tensors[:3], tensors[3:7], tensors[7:10]
        sums, *_ = _linear(student, teacher, rows, None, None, numbers)
        out = algebra.losses(*(sums, *rows), numbers.labelled, numbers.metrics)
        # tensors from torch.inference_mode() cannot be saved in the graph, and need no watching
        ctx.inference_teacher = None
        if not torch.compiler.is_compiling():
            if any(x is not None and x.is_inference() for x in teacher):
                ctx.inference_teacher, teacher = teacher, (None,) * 4
        ctx.save_for_backward(*student, *teacher, *rows, sums)
        ctx.numbers = numbers
        ctx.mark_non_differentiable(*out[1:])
        return out

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *unused: Tensor):
        saved = ctx.saved_tensors
        student, teacher, rows, sums = saved[:3], saved[3:7], saved[7:10], saved[10]
        if ctx.inference_teacher is not None:
            teacher = ctx.inference_teacher
        with torch.no_grad():
            upstream = grad_loss.to(sums.dtype)
            _, *grads = _linear(student, teacher, rows, upstream, sums, ctx.numbers)
            grads = [
                g.to(x.dtype) if want else None
                for g, x, want in zip(grads, student, ctx.numbers.wanted, strict=True)
            ]
        grads = [None if g is None else _first_order(g, *student[:2], grad_loss) for g in grads]
        return None, *grads, *[None] * 7


class LinearMeanFunction(torch.autograd.Function):
    """The reduced loss from hidden states, with the gradients made in forward: (reduced, loss [N],
    *metrics [N]), of which the first has a gradient. Tensors as above, then the weights and the
    denominator of ``_reduction.reduce``, and its derivative.
    """

    @staticmethod
    def forward(
        ctx: Any,
        numbers: LinearNumbers,
        *tensors: Tensor | None,
    ):
        student, teacher, rows = tensors[:3], tensors[3:7], tensors[7:10]
        weights, denominator, upstream = tensors[10:]
        sums, *grads = _linear(student, teacher, rows, upstream, None, numbers)
        out = algebra.losses(*(sums, *rows), numbers.labelled, numbers.metrics)
        # "mean" without a denominator is the sum
        reduced = _reduction.reduce(out[0], weights, denominator, "mean")
        ctx.save_for_backward(*grads, *student[:2])
        ctx.dtypes = [None if x is None else x.dtype for x in student]
        ctx.numbers = numbers
        ctx.mark_non_differentiable(*out)
        return reduced, *out

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *unused: Tensor):
        *grads, hidden, weight = ctx.saved_tensors
        with torch.no_grad():
            grads = [
                backends.scaled(g, grad.to(g.dtype), dtype) if want else None
                for g, dtype, want in zip(grads, ctx.dtypes, ctx.numbers.wanted, strict=True)
            ]
        grads = [None if g is None else _first_order(g, hidden, weight, grad) for g in grads]
        return None, *grads, *[None] * 10


class LinearNumbers(NamedTuple):
    """What the losses from hidden states depend on besides tensors."""

    student: tuple[float, float | None, torch.dtype]  # scale, softcap, dtype of the product
    teacher: tuple[float, float | None, torch.dtype | None]
    V: int
    labelled: bool
    teacher_support: bool
    metrics: bool
    wanted: tuple[bool, bool, bool]
    may_skip: bool
    chunk_bytes: int | None
    backend: str


def _linear(student, teacher, rows, upstream, sums, numbers):
    teacher_head, teacher_logits = teacher[:3], teacher[3]
    return backends.linear(
        *(*student, *numbers.student, *teacher_head, *numbers.teacher, teacher_logits),
        *(*rows, upstream, sums),
        *(numbers.V, numbers.labelled, numbers.teacher_support, numbers.metrics),
        *(list(numbers.wanted), numbers.may_skip, numbers.chunk_bytes, numbers.backend),
    )
