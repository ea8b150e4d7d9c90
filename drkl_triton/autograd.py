"""The ``torch.autograd.Function``s. Forward keeps O(rows) beside its inputs; backward recomputes
from the logits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import algebra, backends


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
