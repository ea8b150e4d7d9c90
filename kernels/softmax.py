"""softmax and log_softmax over rows, forward and backward, each as one scan for a row's sums and
one pass that writes.

    forward    sums m = max x_k, d = sum 2^{scale (x_k - m)}; with p_k = 2^{scale (x_k - m)} / d
               softmax      p_k
               log_softmax  (x_k - m) / temperature - log d
    backward   from the upstream gradient g, p recomputed from x and (m, log2 d)
               softmax      p_k (g_k - sum g p) / temperature
               log_softmax  (g_k - p_k sum g) / temperature

The forward reads 2 N V elements and writes N V; the backward reads 4 N V (log_softmax 3) and writes
N V. Saved between: x, 2 N.
"""

import triton
import triton.language as tl

from . import launch, tuning
from .online_softmax import LOG2E, empty_lanes
from .row_walk import (
    body_pointer,
    cut_row,
    end_columns,
    load_tile,
    load_vectors,
    row_pointer,
    split_tiles,
    tile_offsets,
    vector_mask,
)


@triton.jit
def add_exponentials(m, d, x, scale):
    """Fold the tile x [LANES, VEC] into the lanes' maximum m and sum d."""
    new = tl.maximum(m, tl.max(x, axis=1))
    d = d * tl.exp2((m - new) * scale) + tl.sum(tl.exp2((x - new[:, None]) * scale), axis=1)
    return new, d


@triton.jit
def merge_exponentials(m, d, scale):
    top = tl.max(m, axis=0)
    return top, tl.sum(d * tl.exp2((m - top) * scale), axis=0)


@triton.jit(do_not_specialize=["inner", "V"])
def softmax_sums_kernel(
    logits_ptr, scale_ptr, sums_ptr, stride_o: tl.int64, stride_i: tl.int64, inner, V,
    LANES: tl.constexpr, VEC: tl.constexpr, SPLITS: tl.constexpr, ACC: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    # sums[split, 0:2, row] = m, d of this program's columns
    row = tl.program_id(0).to(tl.int64)
    N = tl.num_programs(0).to(tl.int64)
    scale = tl.load(scale_ptr).to(ACC) * LOG2E
    m, d = empty_lanes(LANES, ACC)
    x_row = row_pointer(logits_ptr, row, stride_o, stride_i, inner)
    head, body = cut_row(x_row, V, VEC, ALIGNED)
    x_body = body_pointer(x_row, head, ALIGNED)
    first, last, is_end = split_tiles(body, LANES, SPLITS)
    for i in range(first, last):
        x = load_vectors(x_body, i, LANES, VEC, ACC, ALIGNED)
        m, d = add_exponentials(m, d, x, scale)
    if is_end:
        mask = vector_mask(body // LANES, body, -1, LANES, VEC)
        offs = tile_offsets(body // LANES, LANES, VEC)
        x = load_tile(x_body + offs, mask, float("-inf"), ACC)
        m, d = add_exponentials(m, d, x, scale)
        cols, mask = end_columns(head, body, -1, V, LANES, VEC)
        x = load_tile(x_row + cols, mask, float("-inf"), ACC)
        m, d = add_exponentials(m, d, x, scale)
    m, d = merge_exponentials(m, d, scale)
    sums_ptr += tl.program_id(1).to(tl.int64) * 2 * N + row
    tl.store(sums_ptr, m)
    tl.store(sums_ptr + N, d)


@triton.jit
def merge_state(sums_ptr, row, N, scale, SPLITS, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """(m, log2 d) of a row from the sums of its splits."""
    part = tl.arange(0, BLOCK)
    mask = part < SPLITS
    floor, _ = empty_lanes(BLOCK, ACC)
    ptrs = sums_ptr + part.to(tl.int64) * 2 * N + row
    m = tl.where(mask, tl.load(ptrs, mask=mask, other=0.0), floor)
    m, d = merge_exponentials(m, tl.load(ptrs + N, mask=mask, other=0.0), scale)
    return m, tl.log2(d)


@triton.jit
def probability(x, scale, m, log2d):
    return tl.exp2((x - m) * scale - log2d)


@triton.jit
def output(x, scale, m, log2d, LOG: tl.constexpr):
    if LOG:
        y = ((x - m) * scale - log2d) * 0.6931471805599453  # ln 2
    else:
        y = probability(x, scale, m, log2d)
    return y


@triton.jit(do_not_specialize=["inner", "V"])
def softmax_kernel(
    logits_ptr, scale_ptr, sums_ptr, out_ptr, state_ptr,
    stride_o: tl.int64, stride_i: tl.int64, stride_y: tl.int64, inner, V,
    LANES: tl.constexpr, VEC: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
    ACC: tl.constexpr, ALIGNED: tl.constexpr, LOG: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    N = tl.num_programs(0).to(tl.int64)
    OUT: tl.constexpr = out_ptr.dtype.element_ty
    scale = tl.load(scale_ptr).to(ACC) * LOG2E
    m, log2d = merge_state(sums_ptr, row, N, scale, SPLITS, BLOCK, ACC)
    if tl.program_id(1) == 0:
        tl.store(state_ptr + row, m)
        tl.store(state_ptr + N + row, log2d)
    x_row = row_pointer(logits_ptr, row, stride_o, stride_i, inner)
    y_row = out_ptr + row * stride_y
    head, body = cut_row(x_row, V, VEC, ALIGNED)
    x_body = body_pointer(x_row, head, ALIGNED)
    y_body = body_pointer(y_row, head, ALIGNED)
    first, last, is_end = split_tiles(body, LANES, SPLITS)
    for i in range(first, last):
        offs = tile_offsets(i, LANES, VEC)
        y = output(load_vectors(x_body, i, LANES, VEC, ACC, ALIGNED), scale, m, log2d, LOG)
        tl.store(y_body + offs, y.to(OUT))
    if is_end:
        offs = tile_offsets(body // LANES, LANES, VEC)
        mask = vector_mask(body // LANES, body, -1, LANES, VEC)
        y = output(load_tile(x_body + offs, mask, 0.0, ACC), scale, m, log2d, LOG)
        tl.store(y_body + offs, y.to(OUT), mask=mask)
        cols, mask = end_columns(head, body, -1, V, LANES, VEC)
        y = output(load_tile(x_row + cols, mask, 0.0, ACC), scale, m, log2d, LOG)
        tl.store(y_row + cols, y.to(OUT), mask=mask)


@triton.jit
def load_backward(
    x_ptr, g_ptr, offs, mask, scale, m, log2d, ACC: tl.constexpr, NEED_P: tl.constexpr
):
    """(g, p) of the columns under the mask; elsewhere g = p = 0. Without NEED_P the logits are not
    read and p is 1.
    """
    # -inf gives a masked column p = 0 without a select
    g = load_tile(g_ptr + offs, mask, 0.0, ACC)
    if NEED_P:
        p = probability(load_tile(x_ptr + offs, mask, float("-inf"), ACC), scale, m, log2d)
    else:
        p = tl.full(g.shape, 1.0, ACC)
    return g, p


@triton.jit
def load_whole_backward(
    x_body, g_body, tile, scale, m, log2d, LANES: tl.constexpr, VEC: tl.constexpr,
    ACC: tl.constexpr, ALIGNED: tl.constexpr, NEED_P: tl.constexpr,
):  # fmt: skip
    g = load_vectors(g_body, tile, LANES, VEC, ACC, ALIGNED)
    if NEED_P:
        p = probability(load_vectors(x_body, tile, LANES, VEC, ACC, ALIGNED), scale, m, log2d)
    else:
        p = tl.full(g.shape, 1.0, ACC)
    return g, p


@triton.jit(do_not_specialize=["inner", "inner_g", "V"])
def softmax_dot_kernel(
    logits_ptr, scale_ptr, state_ptr, grad_ptr, dot_ptr, stride_o: tl.int64, stride_i: tl.int64,
    stride_go: tl.int64, stride_gi: tl.int64, inner, inner_g, V,
    LANES: tl.constexpr, VEC: tl.constexpr, SPLITS: tl.constexpr, ACC: tl.constexpr,
    ALIGNED: tl.constexpr, LOG: tl.constexpr,
):  # fmt: skip
    # dot[split, row] = sum g p (softmax) or sum g (log_softmax) over this program's columns
    row = tl.program_id(0).to(tl.int64)
    N = tl.num_programs(0).to(tl.int64)
    scale = tl.load(scale_ptr).to(ACC) * LOG2E
    m, log2d = tl.load(state_ptr + row), tl.load(state_ptr + N + row)
    x_row = row_pointer(logits_ptr, row, stride_o, stride_i, inner)
    g_row = row_pointer(grad_ptr, row, stride_go, stride_gi, inner_g)
    head, body = cut_row(g_row, V, VEC, ALIGNED)
    x_body = body_pointer(x_row, head, ALIGNED)
    g_body = body_pointer(g_row, head, ALIGNED)
    first, last, is_end = split_tiles(body, LANES, SPLITS)
    total = tl.zeros([LANES], ACC)
    for i in range(first, last):
        g, p = load_whole_backward(
            x_body, g_body, i, scale, m, log2d, LANES, VEC, ACC, ALIGNED, not LOG
        )
        total += tl.sum(g * p, axis=1)
    # A sum of its own: Triton 3.2 to 3.7 fail to compile where a loop's sum is used twice after it.
    rest = tl.zeros([LANES], ACC)
    if is_end:
        offs = tile_offsets(body // LANES, LANES, VEC)
        mask = vector_mask(body // LANES, body, -1, LANES, VEC)
        g, p = load_backward(x_body, g_body, offs, mask, scale, m, log2d, ACC, not LOG)
        rest += tl.sum(g * p, axis=1)
        cols, mask = end_columns(head, body, -1, V, LANES, VEC)
        g, p = load_backward(x_row, g_row, cols, mask, scale, m, log2d, ACC, not LOG)
        rest += tl.sum(g * p, axis=1)
    tl.store(dot_ptr + tl.program_id(1).to(tl.int64) * N + row, tl.sum(total + rest, axis=0))


@triton.jit
def input_gradient(g, p, dot, inv_temperature, LOG: tl.constexpr):
    if LOG:
        dx = (g - p * dot) * inv_temperature
    else:
        dx = p * (g - dot) * inv_temperature
    return dx


@triton.jit(do_not_specialize=["inner", "inner_g", "V"])
def softmax_grad_kernel(
    logits_ptr, scale_ptr, state_ptr, grad_ptr, dot_ptr, dx_ptr,
    stride_o: tl.int64, stride_i: tl.int64, stride_go: tl.int64, stride_gi: tl.int64,
    stride_d: tl.int64, inner, inner_g, V,
    LANES: tl.constexpr, VEC: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
    ACC: tl.constexpr, ALIGNED: tl.constexpr, LOG: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    N = tl.num_programs(0).to(tl.int64)
    OUT: tl.constexpr = dx_ptr.dtype.element_ty
    inv_t = tl.load(scale_ptr).to(ACC)
    scale = inv_t * LOG2E
    m, log2d = tl.load(state_ptr + row), tl.load(state_ptr + N + row)
    part = tl.arange(0, BLOCK)
    dot = tl.sum(
        tl.load(dot_ptr + part.to(tl.int64) * N + row, mask=part < SPLITS, other=0.0), axis=0
    )
    x_row = row_pointer(logits_ptr, row, stride_o, stride_i, inner)
    g_row = row_pointer(grad_ptr, row, stride_go, stride_gi, inner_g)
    d_row = dx_ptr + row * stride_d
    head, body = cut_row(d_row, V, VEC, ALIGNED)
    x_body = body_pointer(x_row, head, ALIGNED)
    g_body = body_pointer(g_row, head, ALIGNED)
    d_body = body_pointer(d_row, head, ALIGNED)
    first, last, is_end = split_tiles(body, LANES, SPLITS)
    for i in range(first, last):
        offs = tile_offsets(i, LANES, VEC)
        g, p = load_whole_backward(
            x_body, g_body, i, scale, m, log2d, LANES, VEC, ACC, ALIGNED, True
        )
        tl.store(d_body + offs, input_gradient(g, p, dot, inv_t, LOG).to(OUT))
    if is_end:
        offs = tile_offsets(body // LANES, LANES, VEC)
        mask = vector_mask(body // LANES, body, -1, LANES, VEC)
        g, p = load_backward(x_body, g_body, offs, mask, scale, m, log2d, ACC, True)
        tl.store(d_body + offs, input_gradient(g, p, dot, inv_t, LOG).to(OUT), mask=mask)
        cols, mask = end_columns(head, body, -1, V, LANES, VEC)
        g, p = load_backward(x_row, g_row, cols, mask, scale, m, log2d, ACC, True)
        tl.store(d_row + cols, input_gradient(g, p, dot, inv_t, LOG).to(OUT), mask=mask)


def _flags(tile, acc):
    return dict(
        LANES=tile.lanes,
        VEC=tile.vec,
        SPLITS=tile.splits,
        ACC=launch.TL_DTYPE[acc],
        num_warps=tile.num_warps,
    )


def softmax_forward(logits, inv_temperature, N, *, log=False, splits=None):
    """Launch. logits: rows; inv_temperature 0-dim in the accumulator's dtype. Returns (output [N,
    V], state [2, N]).

    state = m, log2 d: what the backward needs besides the logits.
    """
    V, acc, device = logits.tensor.shape[-1], inv_temperature.dtype, logits.tensor.device
    tile = tuning.choose(V, logits, rows=N, splits=splits)
    y = launch.new_output((N, V), logits.tensor.dtype, device)
    state = launch.new_output((2, N), acc, device)
    if N == 0:
        return y, state
    sums = launch.new_output((tile.splits, 2, N), acc, device)
    flags = _flags(tile, acc)
    with launch.on_device(device):
        softmax_sums_kernel[(N, tile.splits)](
            logits.tensor,
            inv_temperature,
            sums,
            *logits.strides,
            logits.inner,
            V,
            ALIGNED=True,
            **flags,
        )
        softmax_kernel[(N, tile.splits)](
            logits.tensor, inv_temperature, sums, y, state, *logits.strides, V, logits.inner, V,
            ALIGNED=launch.equally_aligned(logits, logits.like(y)), LOG=log,
            BLOCK=triton.next_power_of_2(tile.splits), **flags,
        )  # fmt: skip
    return y, state


def softmax_backward(logits, grad, inv_temperature, state, *, log=False, splits=None):
    """Launch. grad: rows of the upstream gradient; state from softmax_forward. Returns [N, V] in
    the logits' dtype.
    """
    V, N, device = logits.tensor.shape[-1], state.shape[-1], state.device
    tile = tuning.choose(V, logits, grad, rows=N, splits=splits)
    dx = launch.new_output((N, V), logits.tensor.dtype, device)
    if N == 0:
        return dx
    dot = launch.new_output((tile.splits, N), state.dtype, device)
    flags = dict(_flags(tile, state.dtype), LOG=log)
    operands = (logits.tensor, inv_temperature, state, grad.tensor, dot)
    strides = (*logits.strides, *grad.strides)
    with launch.on_device(device):
        softmax_dot_kernel[(N, tile.splits)](
            *operands,
            *strides,
            logits.inner,
            grad.inner,
            V,
            ALIGNED=launch.equally_aligned(logits, grad),
            **flags,
        )
        softmax_grad_kernel[(N, tile.splits)](
            *operands, dx, *strides, V, logits.inner, grad.inner, V,
            ALIGNED=launch.equally_aligned(logits, grad, logits.like(dx)),
            BLOCK=triton.next_power_of_2(tile.splits), **flags,
        )  # fmt: skip
    return dx
