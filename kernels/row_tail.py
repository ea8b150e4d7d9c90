"""Scan each row without K of its columns.

    tail[:, row] = (m, d): the largest of the other logits, and sum e^{(s_k - m) / temperature}

Reads N V elements and writes 2 N. The columns come in ascending order: a tile waits for none but
those that lie in it, which it leaves out in registers, after its load of 16 bytes a thread. Each
program finds the first of its share once.
"""

import torch
import triton
import triton.language as tl

from . import launch, tuning
from .online_softmax import LOG2E, add_tile, merge_lanes, no_columns
from .row_walk import (
    IGNORED,
    INVALID,
    Geometry,
    Pair,
    body_pointer,
    cut_row,
    end_columns,
    load_tile,
    load_vectors,
    row_pointer,
    split_tiles,
    tile_offsets,
    vectors,
)


@triton.jit
def without(x, cols, ids, i, column, stop):
    """x with -inf at the columns below ``stop``, from the i-th on, which is ``column``; and the
    next. ids: (pointer, how many, V).
    """
    while column < stop:
        x = tl.where(cols == column, float("-inf"), x)
        i += 1
        column = tl.load(ids[0] + i, mask=i < ids[1], other=ids[2])
    return x, i, column


@triton.jit
def add(S, x, scale):
    return add_tile(S, Pair(x, x), scale, False, 0)


@triton.jit(do_not_specialize=["inner_s", "V", "K"])
def row_tail_kernel(
    student_ptr, columns_ptr, label_ptr, inv_temperature_ptr, tail_ptr,
    stride_so: tl.int64, stride_si: tl.int64, inner_s, V, K,
    LANES: tl.constexpr, VEC: tl.constexpr, SPLIT: tl.constexpr, ACC: tl.constexpr,
    ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # Invariant: the lanes' states together hold the columns walked so far that are not among the
    # ids, of which the first i are behind.
    G: tl.constexpr = Geometry(LANES, VEC, ACC, ALIGNED)
    row = tl.program_id(0).to(tl.int64)
    N = tl.num_programs(0).to(tl.int64)
    label = tl.load(label_ptr + row).to(tl.int32)
    scale = tl.load(inv_temperature_ptr).to(ACC) * LOG2E
    tail_ptr += tl.program_id(1).to(tl.int64) * 2 * N + row
    S = no_columns(LANES, ACC)
    if (label != IGNORED) & (label != INVALID):
        s_row = row_pointer(student_ptr, row, stride_so, stride_si, inner_s)
        head, body = cut_row(s_row, V, G)
        s_body = body_pointer(s_row, head, G)
        first, last, is_end = split_tiles(body, SPLIT, G)
        ids = (columns_ptr + row * K, K, V)
        WIDTH: tl.constexpr = LANES * VEC
        k = tl.arange(0, BLOCK)
        all_ids = tl.load(ids[0] + k, mask=k < K, other=V)
        i = tl.sum((all_ids < head + first * WIDTH).to(tl.int32), axis=0)
        column = tl.load(ids[0] + i, mask=i < K, other=V)
        for tile in range(first, last):
            x = load_vectors(s_body, tile, G)
            cols = head + tile_offsets(tile, VEC, G)
            x, i, column = without(x, cols, ids, i, column, head + (tile + 1) * WIDTH)
            S = add(S, x, scale)
        if is_end:
            # the body's last tile, then the ends: the tail's columns follow, the head's come first
            offs, mask = vectors(body // LANES, body, -1, G)
            x = load_tile(s_body + offs, mask, float("-inf"), G)
            x, i, column = without(x, head + offs, ids, i, column, head + body * VEC)
            S = add(S, x, scale)
            cols, ends = end_columns(head, body, -1, V, G)
            x = load_tile(s_row + cols, ends, float("-inf"), G)
            x, i, column = without(x, cols, ids, i, column, V)
            x, i, column = without(x, cols, ids, i * 0, tl.load(ids[0]), head)
            S = add(S, x, scale)
    S = merge_lanes(S, scale, 0)
    tl.store(tail_ptr, S.m_s)
    tl.store(tail_ptr + N, S.d_s)


def row_tail(student, columns, label, inv_temperature, V, *, splits=None):
    """Launch the scan. student: rows; columns [N, K] int32, ascending, V where there is none; label
    [N]: rows of facts.IGNORED and INVALID are not read. Returns (m, d) [2, N].
    """
    (N, K), acc = columns.shape, inv_temperature.dtype
    tile = tuning.choose(V, student, rows=N, rule=tuning.scan_splits, splits=splits)
    parts = launch.new_output((tile.splits, 2, N), acc, label.device)
    if N:
        with launch.on_device(label.device):
            row_tail_kernel[(N, tile.splits)](
                student.tensor, columns, label, inv_temperature, parts, *student.strides,
                student.inner, V, K, LANES=tile.lanes, VEC=tile.vec, SPLIT=tile.splits > 1,
                ACC=launch.TL_DTYPE[acc], ALIGNED=launch.equally_aligned(student),
                BLOCK=triton.next_power_of_2(K), num_warps=tile.num_warps,
            )  # fmt: skip
    if tile.splits == 1:
        return parts[0]
    m, d = parts.unbind(1)
    top = m.amax(0)
    return torch.stack([top, (d * ((m - top) * inv_temperature).exp()).sum(0)])
