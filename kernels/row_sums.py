"""Scan each row once for the sums that softmax, RKL and DRKL and their gradients are made of.

    sums[0:6, row] = m_s, d_s, a, h, m_t, d_t   over the columns k != label (online_softmax.py)
    sums[6:8, row] = s_label, t_label

Reads 2 N V elements, writes 8 N. With SPLITS > 1 every program writes the sums of its share and
merge_sums_kernel adds them up.
"""

import triton
import triton.language as tl

from . import launch, tuning
from .online_softmax import LOG2E, add_tile, empty_lanes, merge_lanes
from .row_walk import (
    IGNORED,
    INVALID,
    body_pointer,
    cut_row,
    end_columns,
    label_vector,
    load_tile,
    row_pointer,
    split_tiles,
    tile_offsets,
    vector_mask,
)

FIELDS = 8


@triton.jit
def load_pair(s_ptr, t_ptr, offs, mask, ACC: tl.constexpr, TEACHER_SUPPORT: tl.constexpr):
    """Both tiles in the accumulator's dtype; a masked column is -inf in both, which is absent."""
    s = load_tile(s_ptr + offs, mask, float("-inf"), ACC)
    t = load_tile(t_ptr + offs, mask, float("-inf"), ACC)
    if TEACHER_SUPPORT:
        s = tl.where(t == float("-inf"), float("-inf"), s)
    return s, t


@triton.jit
def store_sums(ptr, stride_f, m_s, d_s, a, h, m_t, d_t):
    tl.store(ptr, m_s)
    tl.store(ptr + stride_f, d_s)
    tl.store(ptr + 2 * stride_f, a)
    tl.store(ptr + 3 * stride_f, h)
    tl.store(ptr + 4 * stride_f, m_t)
    tl.store(ptr + 5 * stride_f, d_t)


@triton.jit(do_not_specialize=["inner_s", "inner_t", "V"])
def row_sums_kernel(
    student_ptr, teacher_ptr, label_ptr, scale_ptr, sums_ptr,
    stride_so: tl.int64, stride_si: tl.int64, stride_to: tl.int64, stride_ti: tl.int64,
    inner_s, inner_t, V,
    LANES: tl.constexpr, VEC: tl.constexpr, SPLITS: tl.constexpr, ACC: tl.constexpr,
    ALIGNED: tl.constexpr, TEACHER_SUPPORT: tl.constexpr, ENTROPY: tl.constexpr,
):  # fmt: skip
    # Invariant: the lanes' states together hold exactly the columns walked so far, the label's
    # never.
    row = tl.program_id(0).to(tl.int64)
    N = tl.num_programs(0).to(tl.int64)
    label = tl.load(label_ptr + row).to(tl.int32)
    scale = tl.load(scale_ptr).to(ACC) * LOG2E
    m_s, d_s = empty_lanes(LANES, ACC)
    m_t, d_t = empty_lanes(LANES, ACC)
    a, h = d_s, d_s
    sums_ptr += tl.program_id(1).to(tl.int64) * 8 * N + row

    if (label != IGNORED) & (label != INVALID):
        s_row = row_pointer(student_ptr, row, stride_so, stride_si, inner_s)
        t_row = row_pointer(teacher_ptr, row, stride_to, stride_ti, inner_t)
        head, body = cut_row(s_row, V, VEC, ALIGNED)
        s_body = body_pointer(s_row, head, ALIGNED)
        t_body = body_pointer(t_row, head, ALIGNED)
        skip = label_vector(label, head, body, VEC)
        first, last, is_end = split_tiles(body, LANES, SPLITS)
        mine = (skip >= first * LANES) & (skip < last * LANES)
        label_tile = tl.where(mine, skip // LANES, last)

        for i in range(first, last - mine.to(tl.int32)):
            offs = tile_offsets(i + (i >= label_tile).to(tl.int32), LANES, VEC)
            s, t = load_pair(s_body, t_body, offs, None, ACC, TEACHER_SUPPORT)
            m_s, d_s, a, h, m_t, d_t = add_tile(m_s, d_s, a, h, m_t, d_t, s, t, scale, ENTROPY)
        if mine:
            mask = vector_mask(label_tile, body, skip, LANES, VEC)
            offs = tile_offsets(label_tile, LANES, VEC)
            s, t = load_pair(s_body, t_body, offs, mask, ACC, TEACHER_SUPPORT)
            m_s, d_s, a, h, m_t, d_t = add_tile(m_s, d_s, a, h, m_t, d_t, s, t, scale, ENTROPY)
        if is_end:
            mask = vector_mask(body // LANES, body, skip, LANES, VEC)
            offs = tile_offsets(body // LANES, LANES, VEC)
            s, t = load_pair(s_body, t_body, offs, mask, ACC, TEACHER_SUPPORT)
            m_s, d_s, a, h, m_t, d_t = add_tile(m_s, d_s, a, h, m_t, d_t, s, t, scale, ENTROPY)
            cols, mask = end_columns(head, body, skip, V, LANES, VEC)
            s, t = load_pair(s_row, t_row, cols, mask & (cols != label), ACC, TEACHER_SUPPORT)
            m_s, d_s, a, h, m_t, d_t = add_tile(m_s, d_s, a, h, m_t, d_t, s, t, scale, ENTROPY)
            s_label, t_label = load_pair(s_row, t_row, label, label >= 0, ACC, TEACHER_SUPPORT)
            tl.store(sums_ptr + 6 * N, s_label)
            tl.store(sums_ptr + 7 * N, t_label)
    else:
        tl.store(sums_ptr + 6 * N, 0.0)
        tl.store(sums_ptr + 7 * N, 0.0)
    m_s, d_s, a, h, m_t, d_t = merge_lanes(m_s, d_s, a, h, m_t, d_t, scale, ENTROPY)
    store_sums(sums_ptr, N, m_s, d_s, a, h, m_t, d_t)


@triton.jit
def merge_sums_kernel(parts_ptr, scale_ptr, sums_ptr, SPLITS, BLOCK: tl.constexpr,
                      ACC: tl.constexpr, ENTROPY: tl.constexpr):  # fmt: skip
    # Invariant: sums = the merged parts[0:SPLITS]; the label's logits come from the last part,
    # which alone has them.
    row = tl.program_id(0).to(tl.int64)
    N = tl.num_programs(0).to(tl.int64)
    part = tl.arange(0, BLOCK)
    mask = part < SPLITS
    floor, _ = empty_lanes(BLOCK, ACC)
    ptrs = parts_ptr + part.to(tl.int64) * 8 * N + row
    m_s = tl.where(mask, tl.load(ptrs, mask=mask, other=0.0), floor)
    d_s = tl.load(ptrs + N, mask=mask, other=0.0)
    a = tl.load(ptrs + 2 * N, mask=mask, other=0.0)
    h = tl.load(ptrs + 3 * N, mask=mask, other=0.0)
    m_t = tl.where(mask, tl.load(ptrs + 4 * N, mask=mask, other=0.0), floor)
    d_t = tl.load(ptrs + 5 * N, mask=mask, other=0.0)
    scale = tl.load(scale_ptr).to(ACC) * LOG2E
    m_s, d_s, a, h, m_t, d_t = merge_lanes(m_s, d_s, a, h, m_t, d_t, scale, ENTROPY)
    store_sums(sums_ptr + row, N, m_s, d_s, a, h, m_t, d_t)
    last = parts_ptr + (SPLITS - 1) * 8 * N + row
    tl.store(sums_ptr + 6 * N + row, tl.load(last + 6 * N))
    tl.store(sums_ptr + 7 * N + row, tl.load(last + 7 * N))


def row_sums(
    student,
    teacher,
    label,
    inv_temperature,
    V,
    *,
    teacher_support=False,
    entropy=False,
    splits=None,
):
    """Launch the scan. student, teacher: rows (``tensor``, ``inner``, ``strides``); label int64
    [N]; inv_temperature 0-dim. Returns sums [8, N].
    """
    N, acc = label.numel(), inv_temperature.dtype
    tile = tuning.choose(V, student, teacher, rows=N, splits=splits)
    out = lambda *shape: launch.new_output(shape, acc, label.device)  # noqa: E731
    sums = out(FIELDS, N)
    if N == 0:
        return sums
    parts = sums if tile.splits == 1 else out(tile.splits, FIELDS, N)
    flags = dict(ACC=launch.TL_DTYPE[acc], ENTROPY=entropy)
    with launch.on_device(label.device):
        row_sums_kernel[(N, tile.splits)](
            student.tensor, teacher.tensor, label, inv_temperature, parts,
            *student.strides, *teacher.strides, student.inner, teacher.inner, V,
            LANES=tile.lanes, VEC=tile.vec, SPLITS=tile.splits, num_warps=tile.num_warps,
            ALIGNED=launch.equally_aligned(student, teacher),
            TEACHER_SUPPORT=teacher_support, **flags,
        )  # fmt: skip
        if tile.splits > 1:
            block = triton.next_power_of_2(tile.splits)
            merge_sums_kernel[(N,)](
                parts, inv_temperature, sums, tile.splits, BLOCK=block, num_warps=1, **flags
            )
    return sums
