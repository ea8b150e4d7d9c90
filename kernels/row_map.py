"""The O(rows) arithmetic around the kernels that read logits, each in one launch: labels to codes,
sums to losses and their reduction, sums to the scalars of the gradient. The formulas are those of
drkl_triton/formulas.py.
"""

import types

import torch
import triton
import triton.language as tl

from .. import formulas
from . import launch, tuning
from .online_softmax import LOG2E
from .row_sums import FIELDS, load_sums, merge_parts, store_fields
from .row_walk import IGNORED, INVALID, NO_LABEL


def device_functions(module):
    """The functions of a module as device functions: copies that see triton.language as ``tl``,
    each other, and the module's numbers as constants.
    """
    names = {"tl": tl, "__name__": module.__name__}
    for name, value in vars(module).items():
        if isinstance(value, types.FunctionType):
            value = types.FunctionType(value.__code__, names, name)
            value.__annotations__ = getattr(module, name).__annotations__
            value.__module__ = module.__name__
            names[name] = triton.jit(value)
        elif isinstance(value, int | float):
            names[name] = tl.constexpr(value)
        elif isinstance(value, type) and issubclass(value, tuple):
            names[name] = value
    return types.SimpleNamespace(**names)


_DEVICE = device_functions(formulas)
losses = _DEVICE.losses
gradient_scalars = _DEVICE.gradient_scalars
gradient_bound = _DEVICE.gradient_bound
float16_room = _DEVICE.float16_room
divided = _DEVICE.divided

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
    parts_ptr, label_ptr, inv_temperature_ptr, gamma_ptr, weight_ptr, sums_ptr, fields_ptr,
    partial_ptr, N, SPLITS, MERGE: tl.constexpr, REDUCE: tl.constexpr, LABELLED: tl.constexpr,
    METRICS: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    N = N.to(tl.int64)
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = rows < N
    label = tl.load(label_ptr + rows, mask=mask, other=IGNORED)
    inv_temperature = tl.load(inv_temperature_ptr).to(ACC)
    if MERGE > 1:
        scale = inv_temperature * LOG2E
        sums = merge_parts(parts_ptr, rows, N, scale, SPLITS, MERGE, ACC)
        store_fields(sums_ptr, N, rows, mask, sums)
    else:
        sums = load_sums(parts_ptr, N, rows, mask)
    HAS_GAMMA: tl.constexpr = gamma_ptr is not None
    gamma = inv_temperature
    if HAS_GAMMA:
        gamma = tl.load(gamma_ptr).to(ACC)
    out = losses(sums, label, inv_temperature, gamma, HAS_GAMMA, LABELLED, METRICS)
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
def gradient_scalars_kernel(
    sums_ptr, label_ptr, inv_temperature_ptr, gamma_ptr, upstream_ptr, weight_ptr, denominator_ptr,
    table_ptr, inv_room_ptr, N, stride_f: tl.int64, stride_u: tl.int64, LABELLED: tl.constexpr,
    ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = rows < N
    label = tl.load(label_ptr + rows, mask=mask, other=IGNORED)
    inv_temperature = tl.load(inv_temperature_ptr).to(ACC)
    sums = load_sums(sums_ptr, stride_f, rows, mask)
    HAS_GAMMA: tl.constexpr = gamma_ptr is not None
    gamma = inv_temperature
    if HAS_GAMMA:
        gamma = tl.load(gamma_ptr).to(ACC)
    upstream = tl.load(upstream_ptr + rows * stride_u, mask=mask, other=0.0).to(ACC)
    if denominator_ptr is not None:
        upstream = divided(upstream, tl.load(denominator_ptr))
    if weight_ptr is not None:
        upstream *= tl.load(weight_ptr + rows, mask=mask, other=0.0)
    if inv_room_ptr is not None:
        bound = gradient_bound(sums, label, inv_temperature, gamma, HAS_GAMMA, LABELLED)
        room = float16_room(bound, upstream)
        upstream *= room
        tl.store(inv_room_ptr + rows, 1 / room, mask=mask)
    table = gradient_scalars(sums, label, inv_temperature, gamma, upstream, HAS_GAMMA, LABELLED)
    store_fields(table_ptr, N.to(tl.int64), rows, mask, table)


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


def row_losses(
    parts, label, inv_temperature, gamma, weight, num_items, *, labelled, metrics, reduction
):
    """Launch the losses. parts [splits, 9, N] (row_sums); weight [N]; num_items 0-dim.

    Returns (sums [9, N], the result [N] or 0-dim, its denominator if it has one, fields [6, N] if
    ``metrics``).
    """
    (splits, _, N), acc, device = parts.shape, inv_temperature.dtype, label.device
    out = lambda *shape: launch.new_output(shape, acc, device)  # noqa: E731
    sums, fields = parts[0], out(6, N) if metrics else None
    rows, merge = BLOCK, 1
    if splits > 1:  # few rows, some shares of each for a thread
        sums, merge = out(FIELDS.value, N), tuning.merge_block(splits)
        rows = max(1, BLOCK // merge)
    (programs,) = _grid(N, rows)
    reduce = reduction != "none"
    partial = out(2, programs) if reduce else out(N)
    flags = dict(ACC=launch.TL_DTYPE[acc], num_warps=4)
    with launch.on_device(device):
        if N:
            row_losses_kernel[(programs,)](
                parts, label, inv_temperature, gamma, weight, sums, fields, partial, N, splits,
                MERGE=merge, REDUCE=reduce, LABELLED=labelled, METRICS=metrics, BLOCK=rows, **flags,
            )  # fmt: skip
        if not reduce:
            return sums, partial, None, fields
        total, denominator = out(), out() if reduction == "mean" else None
        reduce_kernel[(1,)](
            partial, num_items, total, denominator, programs, BLOCK=PARTIALS, **flags
        )
    return sums, total, denominator, fields


def gradient_table(
    sums, label, inv_temperature, gamma, upstream, weight=None, denominator=None, *, labelled,
    inv_room=None,
):  # fmt: skip
    """Launch the scalars of the gradient, [7, N]. upstream [N] or 0-dim; weight and denominator as
    in ``row_losses``. inv_room [N]: each row is multiplied with a power of two that keeps it inside
    float16, and its inverse is written here.
    """
    N, acc = label.numel(), inv_temperature.dtype
    table = launch.new_output((7, N), acc, label.device)
    if N:
        with launch.on_device(label.device):
            gradient_scalars_kernel[_grid(N)](
                sums, label, inv_temperature, gamma, upstream, weight, denominator, table, inv_room,
                N, sums.stride(0), upstream.stride(0) if upstream.dim() else 0, LABELLED=labelled,
                ACC=launch.TL_DTYPE[acc], BLOCK=BLOCK,
            )  # fmt: skip
    return table
