"""The ``torch.autograd.Function``s. Forward keeps O(rows) beside its inputs and backward recomputes
from the logits; LinearMeanFunction alone keeps its gradients instead.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _cells, _reduction, ops
from .ops import Inputs, LinearInputs


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


class Call(NamedTuple):
    """What the losses from logits depend on besides tensors."""

    V: int
    objective: str
    needs: int
    metrics: bool
    reduction: str
    tail: str  # of a sparse teacher, or ""
    backend: str
    shard: str  # _shard.agree's key, or ""


class DivergenceFunction(torch.autograd.Function):
    """A loss of logits: (the loss, [N] or reduced, and the fields of RowMetrics [7, N], or
    nothing). The tensors are those of ops.Inputs.
    """

    @staticmethod
    def forward(ctx: Any, call: Call, *tensors: Tensor | None):
        sums, loss, denominator, fields = ops.divergence(*tensors, *call)
        x = Inputs(*tensors)
        if call.reduction != "mean":
            denominator = None
        elif x.num_items is not None:
            denominator = x.num_items
        _save(ctx, *tensors, denominator, sums)
        ctx.call = call
        ctx.mark_non_differentiable(fields)
        return loss, fields

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, unused: Tensor):
        dstudent = None
        if ctx.needs_input_grad[1]:
            # once: activation checkpointing gives them out once
            *tensors, denominator, sums = ctx.saved_tensors
            call = ctx.call
            with torch.no_grad():
                dstudent = ops.divergence_backward(
                    *tensors, denominator, sums, upstream.to(sums.dtype), call.V, call.objective,
                    call.needs, call.tail, call.backend, call.shard,
                )  # fmt: skip
            dstudent = _first_order(dstudent, tensors[0], upstream)
        return None, dstudent, *[None] * (len(Inputs._fields) - 1)


class SoftmaxFunction(torch.autograd.Function):
    """softmax or log_softmax over the last dimension."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, inv_temperature: Tensor, log: bool, backend: str
    ) -> Tensor:
        y, state = ops.softmax(logits, inv_temperature, log, backend)
        _save(ctx, logits, inv_temperature, state)
        ctx.options = (log, backend)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        logits, inv_temperature, state = ctx.saved_tensors
        dlogits = None
        if ctx.needs_input_grad[0]:
            with torch.no_grad():
                dlogits = ops.softmax_backward(logits, grad, inv_temperature, state, *ctx.options)
            dlogits = _first_order(dlogits, logits, grad)
        return dlogits, None, None, None


class LogProbsFunction(torch.autograd.Function):
    """log q of some columns of logits [N, K] and of the rest [N]; columns and codes are those of
    ops.distinct.
    """

    @staticmethod
    def forward(ctx: Any, logits, ids, columns, codes, inv_temperature, backend: str, shard: str):
        table = ops.log_probs_at(logits, columns, codes, inv_temperature, backend, shard)
        _save(ctx, logits, ids, columns, codes, inv_temperature, table)
        ctx.where = backend, shard
        log_q = _cells.log_probabilities(table, inv_temperature)
        return _cells.at_ids(log_q, columns, ids, codes)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_rest: Tensor):
        logits, ids, columns, codes, inv_temperature, table = ctx.saved_tensors
        with torch.no_grad():
            cells = _cells.to_cells(grad, grad_rest, columns, ids).t()
            dlogits = ops.log_probs_at_backward(
                logits, columns, codes, inv_temperature, table, cells, *ctx.where
            )
        return _first_order(dlogits, logits, grad, grad_rest), *[None] * 6


class LinearCall(NamedTuple):
    """What the losses from hidden states depend on besides tensors."""

    student_dtype: torch.dtype  # of the product
    teacher_dtype: torch.dtype | None
    V: int
    objective: str
    needs: int
    wanted: tuple[bool, bool, bool]
    may_skip: bool
    chunk_bytes: int | None
    tail: str
    backend: str
    shard: str
    metrics: bool  # not of the op


def _linear(call: LinearCall, tensors, upstream=None, sums=None):
    # not call._replace: the Dynamo of torch 2.8 does not trace it
    *call, _ = [list(x) if isinstance(x, tuple) else x for x in call]
    return ops.linear(*tensors, upstream, sums, *call)


def _row_losses(call: LinearCall, tensors, sums: Tensor) -> Tensor:
    """The fields of RowMetrics [7, N], of which the loss is the first; without them [1, N]."""
    x = LinearInputs(*tensors)
    loss = ops.loss_of(x, None, call.V, call.objective, call.needs, call.tail, None, "")
    return torch.stack(loss.fields(sums, x.label, x.cell_label, x.parameters, call.metrics))


class LinearFunction(torch.autograd.Function):
    """Per-row losses from hidden states: the loss [N] and the fields of RowMetrics [7, N]. Backward
    makes the logits again. The tensors, here and below, are those of ops.LinearInputs.
    """

    @staticmethod
    def forward(ctx: Any, call: LinearCall, *tensors: Tensor | None):
        sums, *_ = _linear(call, tensors)
        fields = _row_losses(call, tensors, sums)
        _save(ctx, *tensors, sums)
        ctx.call = call
        ctx.mark_non_differentiable(fields)
        return fields[0].clone(), fields

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, unused: Tensor):
        *tensors, sums = ctx.saved_tensors
        call, student = ctx.call, tensors[:3]
        with torch.no_grad():
            _, *grads = _linear(call, tensors, grad_loss.to(sums.dtype), sums)
            grads = [
                g.to(x.dtype) if want else None
                for g, x, want in zip(grads, student, call.wanted, strict=True)
            ]
        sources = [x for x in student if x is not None]
        grads = [None if g is None else _first_order(g, *sources, grad_loss) for g in grads]
        return None, *grads, *[None] * (len(LinearInputs._fields) - 3)


class LinearLogProbsFunction(torch.autograd.Function):
    """As LogProbsFunction, from hidden states. Backward makes the logits again."""

    @staticmethod
    def forward(ctx: Any, call: LinearCall, ids: Tensor, *tensors: Tensor | None):
        x = LinearInputs(*tensors)
        (table, *_) = _linear(call, tensors)
        _save(ctx, ids, *tensors, table)
        ctx.call = call
        log_q = _cells.log_probabilities(table, x.inv_temperature)
        return _cells.at_ids(log_q, x.columns, ids, x.label)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_rest: Tensor):
        ids, *tensors, table = ctx.saved_tensors
        call, student, x = ctx.call, tensors[:3], LinearInputs(*tensors)
        with torch.no_grad():
            cells = _cells.to_cells(grad, grad_rest, x.columns, ids).t()
            tensors[LinearInputs._fields.index("parameters")] = cells.contiguous()
            upstream = (cells != 0).any(0).to(table.dtype)
            _, *grads = _linear(call, tensors, upstream, table)
            grads = [
                g.to(y.dtype) if want else None
                for g, y, want in zip(grads, student, call.wanted, strict=True)
            ]
        sources = [y for y in student if y is not None]
        grads = [None if g is None else _first_order(g, *sources, grad, grad_rest) for g in grads]
        return None, None, *grads, *[None] * (len(LinearInputs._fields) - 3)


class LinearMeanFunction(torch.autograd.Function):
    """The reduced loss from hidden states, with the gradients made in forward: it, and the fields
    of RowMetrics [7, N]. After the tensors of LinearInputs come the weights and the denominator of
    ``_reduction.total``, and its derivative.
    """

    @staticmethod
    def forward(ctx: Any, call: LinearCall, *tensors: Tensor | None):
        *tensors, weights, denominator, upstream = tensors
        sums, *grads = _linear(call, tensors, upstream)
        fields = _row_losses(call, tensors, sums)
        reduced = _reduction.total(fields[0], weights, denominator)
        # what has a gradient, for _first_order; the rest is not needed any more
        student = tensors[:3]
        sources = [x for x, want in zip(student, call.wanted, strict=True) if want]
        _save(ctx, *grads, *sources)
        ctx.dtypes = [None if x is None else x.dtype for x in student]
        ctx.wanted = call.wanted
        ctx.mark_non_differentiable(fields)
        return reduced, fields

    @staticmethod
    def backward(ctx: Any, grad: Tensor, unused: Tensor):
        saved = ctx.saved_tensors
        grads, sources = saved[:3], saved[3:]
        with torch.no_grad():
            grads = [
                ops.scaled(g, grad.to(g.dtype), dtype) if want else None
                for g, dtype, want in zip(grads, ctx.dtypes, ctx.wanted, strict=True)
            ]
        grads = [None if g is None else _first_order(g, *sources, grad) for g in grads]
        return None, *grads, *[None] * len(LinearInputs._fields)
