"""The O(rows) arithmetic around the kernels that read logits, each in one launch: labels to codes,
sums to losses and their reduction, sums to the weights of the gradient. The formulas are those of
drkl_triton/facts.py.
"""

import torch
import triton
import triton.language as tl

from ..facts import METRIC_FIELDS, Weights
from . import device, launch, tuning
from .device import divided, float16_room, gradient_bound, load_parameters, losses, weights
from .online_softmax import LOG2E
from .row_sums import FIELDS, load_sums, merge_parts, store_fields
from .row_walk import IGNORED, INVALID, NO_LABEL

METRICS = len(METRIC_FIELDS)

BLOCK = 128  # rows of a program, a thread each
PARTIALS = 1024  # sums of programs that are added at a time


@triton.jit(do_not_specialize=["N", "T", "ignore_index", "V"])
def row_labels_kernel(
    label_ptr, weight_ptr, code_ptr, N, T, ignore_index, V,
    HAS_LABEL: tl.constexpr, HAS_WEIGHT: tl.constexpr, SHIFT: tl.constexpr, STRICT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = rows < N
    source = rows
    counts = mask
    if SHIFT:
        counts = mask & (rows % T != T - 1)
        source = rows + 1
    code = tl.full([BLOCK], NO_LABEL, tl.int64)
    if HAS_LABEL:
        label = tl.load(label_ptr + source, mask=counts, other=0).to(tl.int64)
        outside = (label < 0) | (label >= V)
        code = tl.where(outside, INVALID if STRICT else NO_LABEL, label)
        code = tl.where(label == ignore_index, IGNORED, code)
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + source, mask=counts, other=0)
        code = tl.where(weight == 0, IGNORED, code)
    tl.store(code_ptr + rows, tl.where(counts, code, IGNORED), mask=mask)


@triton.jit(do_not_specialize=["N", "SPLITS"])
def row_losses_kernel(
    parts_ptr, label_ptr, inv_temperature_ptr, parameters_ptr, weight_ptr, sums_ptr, fields_ptr,
    partial_ptr, N, SPLITS, stride_x: tl.int64, row_x, MERGE: tl.constexpr, REDUCE: tl.constexpr,
    TERMS: tl.constexpr, PHIS: tl.constexpr, PARAMETERS: tl.constexpr, NEEDS: tl.constexpr,
    METRICS: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    N = N.to(tl.int64)
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = rows < N
    label = tl.load(label_ptr + rows, mask=mask, other=IGNORED)
    inv_temperature = tl.load(inv_temperature_ptr).to(ACC)
    if MERGE > 1:
        scale = inv_temperature * LOG2E
        sums = merge_parts(parts_ptr, rows, N, scale, SPLITS, MERGE, NEEDS, ACC)
        store_fields(sums_ptr, N, rows, mask, sums)
    else:
        sums = load_sums(parts_ptr, N, rows, mask)
    row = tl.minimum(rows, N - 1) * row_x
    x = load_parameters(parameters_ptr, stride_x, row, PARAMETERS, ACC)
    out = losses(sums, label, inv_temperature, x, TERMS, PHIS, NEEDS, METRICS)
    weight = tl.where(label != IGNORED, 1.0, 0.0).to(ACC)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + rows, mask=mask, other=0.0)
    if REDUCE:
        pid, programs = tl.program_id(0), tl.num_programs(0)
        tl.store(partial_ptr + pid, tl.sum(weight * out[0], axis=0))
        tl.store(partial_ptr + programs + pid, tl.sum(weight, axis=0))
    else:
        loss = out[0]
        if weight_ptr is not None:
            loss = loss * weight
        tl.store(partial_ptr + rows, loss, mask=mask)
    if METRICS:
        store_fields(fields_ptr, N, rows, mask, out)


@triton.jit(do_not_specialize=["P"])
def reduce_kernel(
    partial_ptr, items_ptr, total_ptr, denominator_ptr, P, ACC: tl.constexpr, BLOCK: tl.constexpr
):
    # denominator_ptr None: the sum
    total = tl.zeros([BLOCK], ACC)
    count = tl.zeros([BLOCK], ACC)
    for i in range(0, P, BLOCK):
        offs = i + tl.arange(0, BLOCK)
        total += tl.load(partial_ptr + offs, mask=offs < P, other=0.0)
        count += tl.load(partial_ptr + P + offs, mask=offs < P, other=0.0)
    result = tl.sum(total, axis=0)
    if denominator_ptr is not None:
        denominator = tl.sum(count, axis=0)
        if items_ptr is not None:
            denominator = tl.load(items_ptr).to(ACC)
        result = divided(result, denominator)
        tl.store(denominator_ptr, denominator)
    tl.store(total_ptr, result)


@triton.jit(do_not_specialize=["N", "stride_f"])
def weights_kernel(
    sums_ptr, label_ptr, inv_temperature_ptr, parameters_ptr, upstream_ptr, weight_ptr,
    denominator_ptr, table_ptr, inv_room_ptr, N, stride_f: tl.int64, stride_u: tl.int64,
    stride_x: tl.int64, row_x, TERMS: tl.constexpr, PHIS: tl.constexpr, PARAMETERS: tl.constexpr,
    NEEDS: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    N = N.to(tl.int64)
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = rows < N
    label = tl.load(label_ptr + rows, mask=mask, other=IGNORED)
    inv_temperature = tl.load(inv_temperature_ptr).to(ACC)
    sums = load_sums(sums_ptr, stride_f, rows, mask)
    row = tl.minimum(rows, N - 1) * row_x
    x = load_parameters(parameters_ptr, stride_x, row, PARAMETERS, ACC)
    upstream = tl.load(upstream_ptr + rows * stride_u, mask=mask, other=0.0).to(ACC)
    if denominator_ptr is not None:
        upstream = divided(upstream, tl.load(denominator_ptr))
    if weight_ptr is not None:
        upstream *= tl.load(weight_ptr + rows, mask=mask, other=0.0)
    if inv_room_ptr is not None:
        bound = gradient_bound(sums, label, inv_temperature, x, TERMS, PHIS, NEEDS)
        room = float16_room(bound, upstream)
        upstream *= room
        tl.store(inv_room_ptr + rows, 1 / room, mask=mask)
    table = weights(sums, label, inv_temperature, x, upstream, TERMS, PHIS, NEEDS)
    store_fields(table_ptr, N, rows, mask, table)


def _grid(N, rows=BLOCK):
    return (-(-N // rows),)


def row_labels(labels, weight, shape, ignore_index, V, device, *, shift, strict):
    """Launch the map from labels and weight [...] to codes, int64 [...]."""
    codes = launch.new_output(shape, torch.int64, device)
    if codes.numel():
        with launch.on_device(device):
            row_labels_kernel[_grid(codes.numel())](
                None if labels is None else labels.contiguous(),
                None if weight is None else weight.contiguous(),
                codes, codes.numel(), shape[-1] if shape else 1, ignore_index, V,
                HAS_LABEL=labels is not None, HAS_WEIGHT=weight is not None, SHIFT=shift,
                STRICT=strict, BLOCK=BLOCK,
            )  # fmt: skip
    return codes


def _formulas(program, parameters):
    """(the arguments of a kernel for the parameters, its flags for the objective)."""
    parameters, count, *strides = device.parameter_arguments(parameters)
    flags = dict(
        TERMS=device.compiled(program.terms),
        PHIS=device.compiled_phis(program.phis),
        PARAMETERS=count,
    )
    return parameters, strides, flags


def row_losses(
    parts, label, inv_temperature, parameters, weight, num_items, *, program, needs, metrics,
    reduction,
):  # fmt: skip
    """Launch the losses. parts [splits, 16, N] (row_sums); parameters [P, N] or [P, 1] of the
    program (_objective.Program); weight [N]; num_items 0-dim.

    Returns (sums [16, N], the result [N] or 0-dim, its denominator if it has one, fields [7, N] if
    ``metrics``).
    """
    (splits, _, N), acc, where = parts.shape, inv_temperature.dtype, label.device
    out = lambda *shape: launch.new_output(shape, acc, where)  # noqa: E731
    sums, fields = parts[0], out(METRICS, N) if metrics else None
    rows, merge = BLOCK, 1
    if splits > 1:  # few rows, some shares of each for a thread
        sums, merge = out(FIELDS.value, N), tuning.merge_block(splits)
        rows = max(1, BLOCK // merge)
    (programs,) = _grid(N, rows)
    reduce = reduction != "none"
    partial = out(2, programs) if reduce else out(N)
    parameters, strides, formulas = _formulas(program, parameters)
    flags = dict(ACC=launch.TL_DTYPE[acc], num_warps=4)
    with launch.on_device(where):
        if N:
            row_losses_kernel[(programs,)](
                parts, label, inv_temperature, parameters, weight, sums, fields, partial, N, splits,
                *strides, MERGE=merge, REDUCE=reduce, NEEDS=needs, METRICS=metrics, BLOCK=rows,
                **formulas, **flags,
            )  # fmt: skip
        if not reduce:
            return sums, partial, None, fields
        total, denominator = out(), out() if reduction == "mean" else None
        reduce_kernel[(1,)](
            partial, num_items, total, denominator, programs, BLOCK=PARTIALS, **flags
        )
    return sums, total, denominator, fields


def row_weights(
    sums, label, inv_temperature, parameters, upstream, weight=None, denominator=None, *, program,
    needs, inv_room=None,
):  # fmt: skip
    """Launch the weights of the gradient, [13, N] (facts.Weights). upstream [N] or 0-dim; the
    others as in ``row_losses``. inv_room [N]: each row is multiplied with a power of two that keeps
    it inside float16, and its inverse is written here.
    """
    N, acc = label.numel(), inv_temperature.dtype
    table = launch.new_output((len(Weights._fields), N), acc, label.device)
    parameters, strides, formulas = _formulas(program, parameters)
    if N:
        with launch.on_device(label.device):
            weights_kernel[_grid(N)](
                sums, label, inv_temperature, parameters, upstream, weight, denominator, table,
                inv_room, N, sums.stride(0), upstream.stride(0) if upstream.dim() else 0, *strides,
                NEEDS=needs, ACC=launch.TL_DTYPE[acc], BLOCK=BLOCK, **formulas,
            )  # fmt: skip
    return table
