"""Scan each row once for the sums that softmax, RKL and DRKL and their gradients are made of.

    sums[0:6, row] = m_s, d_s, a, h, m_t, d_t   over the columns k != label (online_softmax.py)
    sums[6:8, row] = s_label, t_label
    sums[8, row]   = care: 0 where every logit is finite; 1 where one of these columns is -inf, say,
                     so that the gradient needs a select, too; 2 where the teacher is -inf at one
                     where the student's logit is not (its mass may have underflowed)

Reads 2 N V elements (a row that needs care may be read twice), writes 9 N. With SPLIT every
program writes the sums of its share and merge_sums_kernel adds them up.
"""

import triton
import triton.language as tl

from ..formulas import Sums
from . import launch, tuning
from .online_softmax import (
    LOG2E,
    add_tile,
    empty_lanes,
    merge_lanes,
    move_maxima,
)
from .row_walk import (
    IGNORED,
    INVALID,
    beside,
    body_pointer,
    cut_row,
    end_columns,
    label_place,
    load_tile,
    load_vectors,
    row_pointer,
    share_of_row,
    split_tiles,
    vectors,
)

FIELDS: tl.constexpr = tl.constexpr(9)


@triton.jit
def on_support(s, t, filter_value):
    """Both -inf, which is absent, where the teacher's logit is at most ``filter_value``."""
    if filter_value is not None:
        absent = t <= filter_value
        s = tl.where(absent, float("-inf"), s)
        t = tl.where(absent, float("-inf"), t)
    return s, t


@triton.jit
def load_pair(s_ptr, t_ptr, offs, mask, filter_value, ACC: tl.constexpr):
    """Both tiles in the accumulator's dtype; a masked column is -inf in both, which is absent."""
    s = load_tile(s_ptr + offs, mask, float("-inf"), ACC)
    t = load_tile(t_ptr + offs, mask, float("-inf"), ACC)
    return on_support(s, t, filter_value)


@triton.jit
def load_whole_pair(
    s_body, t_body, tile, filter_value, LANES: tl.constexpr, VEC: tl.constexpr, ACC: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    s = load_vectors(s_body, tile, LANES, VEC, ACC, ALIGNED)
    t = load_vectors(t_body, tile, LANES, VEC, ACC, ALIGNED)
    return on_support(s, t, filter_value)


@triton.jit
def is_missing(s, t):
    """2 where the teacher leaves out what the student does not."""
    return ((t == float("-inf")) & (s != float("-inf"))).to(tl.int32) * 2


@triton.jit
def add_part(
    m_s, d_s, a, h, m_t, d_t, care, s_ptr, t_ptr, offs, mask, scale, filter_value,
    ACC: tl.constexpr, ENTROPY: tl.constexpr,
):  # fmt: skip
    """Load what the mask leaves, fold it into the lanes' state, and note in ``care`` the lanes
    where one of the two leaves out one of these columns.
    """
    s, t = load_pair(s_ptr, t_ptr, offs, mask, filter_value, ACC)
    absent = ((s == float("-inf")) & mask).to(tl.int32)
    care = tl.maximum(care, tl.max(tl.maximum(absent, is_missing(s, t)), axis=1))
    m_s, d_s, a, h, m_t, d_t = add_tile(m_s, d_s, a, h, m_t, d_t, s, t, scale, ENTROPY, True)
    return m_s, d_s, a, h, m_t, d_t, care


@triton.jit
def sum_uneven_parts(
    s_row, t_row, s_body, t_body, label, skip, head, body, V, picked, last, is_end, scale,
    filter_value, LANES: tl.constexpr, VEC: tl.constexpr, ACC: tl.constexpr, ALIGNED: tl.constexpr,
    ENTROPY: tl.constexpr,
):  # fmt: skip
    """The lanes' state after all that takes a mask: tile ``picked`` without the label's vector and,
    where is_end, the body's last tile and the ends. Last comes ``care`` [LANES].
    """
    m_s, d_s = empty_lanes(LANES, ACC)
    m_t, d_t, a, h = m_s, d_s, d_s, d_s
    care = tl.zeros([LANES], tl.int32)
    offs, mask = vectors(picked, last * LANES, skip, LANES, VEC, ALIGNED)
    m_s, d_s, a, h, m_t, d_t, care = add_part(
        m_s, d_s, a, h, m_t, d_t, care, s_body, t_body, offs, mask, scale, filter_value,
        ACC, ENTROPY,
    )  # fmt: skip
    if is_end:
        offs, mask = vectors(body // LANES, body, skip, LANES, VEC, ALIGNED)
        m_s, d_s, a, h, m_t, d_t, care = add_part(
            m_s, d_s, a, h, m_t, d_t, care, s_body, t_body, offs, mask, scale,
            filter_value, ACC, ENTROPY,
        )  # fmt: skip
        cols, ends = end_columns(head, body, skip, V, LANES, VEC, ALIGNED)
        m_s, d_s, a, h, m_t, d_t, care = add_part(
            m_s, d_s, a, h, m_t, d_t, care, s_row, t_row, cols, ends & (cols != label), scale,
            filter_value, ACC, ENTROPY,
        )  # fmt: skip
    return m_s, d_s, a, h, m_t, d_t, care


@triton.jit
def sum_row(
    s_row, t_row, s_body, t_body, label, skip, head, body, V, first, last, picked, is_end, scale,
    filter_value, LANES: tl.constexpr, VEC: tl.constexpr, ACC: tl.constexpr, ALIGNED: tl.constexpr,
    ENTROPY: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """The row's sums (m_s, d_s, a, h, m_t, d_t), and ``care``. Not CAREFUL: care > 0 says that the
    sums are wrong, because a logit is infinite or NaN, or a difference of logits has no sum.
    """
    m_s, d_s, a, h, m_t, d_t, care = sum_uneven_parts(
        s_row, t_row, s_body, t_body, label, skip, head, body, V, picked, last, is_end, scale,
        filter_value, LANES, VEC, ACC, ALIGNED, ENTROPY,
    )  # fmt: skip
    stop = last - 1
    if not CAREFUL:
        # A padded vocabulary has its -inf at the end, which is already walked: do not even start.
        stop = tl.where(tl.max(care, axis=0) > 0, first, stop)
        # from here on no lane is empty
        top_s = m_s * 0 + tl.max(m_s, axis=0)
        top_t = m_t * 0 + tl.max(m_t, axis=0)
        d_s, a, h, d_t = move_maxima(m_s, d_s, a, h, m_t, d_t, top_s, top_t, scale, ENTROPY)
        m_s, m_t = top_s, top_t
    if not CAREFUL:
        # two tiles at a time: their loads wait together, and what a lane costs is halved
        for i in range(first, stop - 1, 2):
            tile = i + (i >= picked).to(tl.int32)
            s0, t0 = load_whole_pair(s_body, t_body, tile, None, LANES, VEC, ACC, ALIGNED)
            tile = i + 1 + (i + 1 >= picked).to(tl.int32)
            s1, t1 = load_whole_pair(s_body, t_body, tile, None, LANES, VEC, ACC, ALIGNED)
            s, t = beside(s0, s1), beside(t0, t1)
            m_s, d_s, a, h, m_t, d_t = add_tile(
                m_s, d_s, a, h, m_t, d_t, s, t, scale, ENTROPY, False
            )
        first += (stop - first) // 2 * 2
    for i in range(first, stop):
        tile = i + (i >= picked).to(tl.int32)
        s, t = load_whole_pair(s_body, t_body, tile, filter_value, LANES, VEC, ACC, ALIGNED)
        m_s, d_s, a, h, m_t, d_t = add_tile(m_s, d_s, a, h, m_t, d_t, s, t, scale, ENTROPY, CAREFUL)
        if CAREFUL and filter_value is None:
            care = tl.maximum(care, tl.max(is_missing(s, t), axis=1))
    m_s, d_s, a, h, m_t, d_t = merge_lanes(m_s, d_s, a, h, m_t, d_t, scale, ENTROPY)
    care = tl.max(care, axis=0)
    if CAREFUL:
        care = tl.maximum(care, 1)
    else:
        # an infinite logit makes a NaN or an infinity of `a`: 0 * inf, e * inf, inf - inf
        finite = (tl.abs(a) < float("inf")) & (tl.abs(h) < float("inf"))
        care = tl.where(finite, care, 1)
    return m_s, d_s, a, h, m_t, d_t, care


@triton.jit
def store_sums(ptr, stride_f, m_s, d_s, a, h, m_t, d_t, care):
    tl.store(ptr, m_s)
    tl.store(ptr + stride_f, d_s)
    tl.store(ptr + 2 * stride_f, a)
    tl.store(ptr + 3 * stride_f, h)
    tl.store(ptr + 4 * stride_f, m_t)
    tl.store(ptr + 5 * stride_f, d_t)
    tl.store(ptr + 8 * stride_f, care.to(m_s.dtype))


@triton.jit
def sum_share(
    student_ptr, teacher_ptr, sums_ptr, row, N, label, scale, filter_value,
    stride_so, stride_si, stride_to, stride_ti, inner_s, inner_t, V, split, splits,
    LANES: tl.constexpr, VEC: tl.constexpr, ACC: tl.constexpr, ALIGNED: tl.constexpr,
    ENTROPY: tl.constexpr,
):  # fmt: skip
    """Store the sums of one of the row's shares; the last one's has the label's logits."""
    # Invariant: the lanes' states together hold exactly the columns walked so far, the label's
    # never.
    sums_ptr += split.to(tl.int64) * FIELDS * N + row
    if (label != IGNORED) & (label != INVALID):
        s_row = row_pointer(student_ptr, row, stride_so, stride_si, inner_s)
        t_row = row_pointer(teacher_ptr, row, stride_to, stride_ti, inner_t)
        head, body = cut_row(s_row, V, LANES, VEC, ALIGNED)
        s_body = body_pointer(s_row, head, ALIGNED)
        t_body = body_pointer(t_row, head, ALIGNED)
        skip, label_tile = label_place(label, head, body, LANES, VEC, ALIGNED)
        first, last, is_end = split_tiles(body, split, splits, LANES)
        # One tile goes before the others: the label's, which takes a mask, or any.
        picked = tl.where((label_tile >= first) & (label_tile < last), label_tile, first)
        if is_end:
            s_label, t_label = load_pair(s_row, t_row, label, label >= 0, filter_value, ACC)
            tl.store(sums_ptr + 6 * N, s_label)
            tl.store(sums_ptr + 7 * N, t_label)

        if filter_value is not None:  # a teacher with -inf is what it is for
            care = 1
        else:
            m_s, d_s, a, h, m_t, d_t, care = sum_row(
                s_row, t_row, s_body, t_body, label, skip, head, body, V, first, last, picked,
                is_end, scale, None, LANES, VEC, ACC, ALIGNED, ENTROPY, False,
            )  # fmt: skip
            store_sums(sums_ptr, N, m_s, d_s, a, h, m_t, d_t, care)
        if care != 0:
            cm_s, cd_s, ca, ch, cm_t, cd_t, care = sum_row(
                s_row, t_row, s_body, t_body, label, skip, head, body, V, first, last, picked,
                is_end, scale, filter_value, LANES, VEC, ACC, ALIGNED, ENTROPY, True,
            )  # fmt: skip
            store_sums(sums_ptr, N, cm_s, cd_s, ca, ch, cm_t, cd_t, care)
    else:
        zero = scale * 0.0
        store_sums(sums_ptr, N, zero, zero, zero, zero, zero, zero, zero)
        tl.store(sums_ptr + 6 * N, zero)
        tl.store(sums_ptr + 7 * N, zero)


@triton.jit(do_not_specialize=["inner_s", "inner_t", "V"])
def row_sums_kernel(
    student_ptr, teacher_ptr, label_ptr, scale_ptr, filter_ptr, sums_ptr,
    stride_so: tl.int64, stride_si: tl.int64, stride_to: tl.int64, stride_ti: tl.int64,
    inner_s, inner_t, V,
    LANES: tl.constexpr, VEC: tl.constexpr, SPLIT: tl.constexpr, ACC: tl.constexpr,
    ALIGNED: tl.constexpr, ENTROPY: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    N = tl.num_programs(0).to(tl.int64)
    label = tl.load(label_ptr + row).to(tl.int32)
    scale = tl.load(scale_ptr).to(ACC) * LOG2E
    filter_value = None  # support="full". No function: those of Triton 3.6 cannot return None
    if filter_ptr is not None:
        filter_value = tl.load(filter_ptr).to(ACC)
    split, splits = share_of_row(SPLIT)
    sum_share(
        student_ptr, teacher_ptr, sums_ptr, row, N, label, scale, filter_value,
        stride_so, stride_si, stride_to, stride_ti, inner_s, inner_t, V, split, splits,
        LANES, VEC, ACC, ALIGNED, ENTROPY,
    )  # fmt: skip


@triton.jit
def load_sums(ptr, stride_f, rows, mask):
    ptr += rows
    return Sums(
        tl.load(ptr, mask=mask, other=0.0),
        tl.load(ptr + stride_f, mask=mask, other=0.0),
        tl.load(ptr + 2 * stride_f, mask=mask, other=0.0),
        tl.load(ptr + 3 * stride_f, mask=mask, other=0.0),
        tl.load(ptr + 4 * stride_f, mask=mask, other=0.0),
        tl.load(ptr + 5 * stride_f, mask=mask, other=0.0),
        tl.load(ptr + 6 * stride_f, mask=mask, other=0.0),
        tl.load(ptr + 7 * stride_f, mask=mask, other=0.0),
        tl.load(ptr + 8 * stride_f, mask=mask, other=0.0),
    )


@triton.jit
def merge_parts(parts_ptr, row, N, scale, SPLITS, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """The sums of one row [1] from those of its shares; the label's logits come from the last,
    which alone has them.
    """
    part = tl.arange(0, BLOCK)[:, None]
    mask = (part < SPLITS) & (row < N)[None, :]
    x = load_sums(parts_ptr, N, part.to(tl.int64) * FIELDS * N + row[None, :], mask)
    floor, _ = empty_lanes(1, ACC)
    m_s, d_s, a, h, m_t, d_t = merge_lanes(
        tl.where(mask, x.m_s, floor), x.d_s, x.a, x.h, tl.where(mask, x.m_t, floor), x.d_t, scale,
        True,
    )  # fmt: skip
    last = parts_ptr + (SPLITS - 1) * FIELDS * N + row
    s_label = tl.load(last + 6 * N, mask=row < N, other=0.0)
    t_label = tl.load(last + 7 * N, mask=row < N, other=0.0)
    return Sums(m_s, d_s, a, h, m_t, d_t, s_label, t_label, tl.max(x.care, axis=0))


@triton.jit
def store_fields(ptr, stride_f, rows, mask, fields):
    for k in tl.static_range(len(fields)):
        tl.store(ptr + k * stride_f + rows, fields[k], mask=mask)


@triton.jit(do_not_specialize=["N", "SPLITS"])
def merge_sums_kernel(
    parts_ptr, scale_ptr, sums_ptr, N, SPLITS, BLOCK: tl.constexpr, ACC: tl.constexpr
):
    N = N.to(tl.int64)
    rows = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    scale = tl.load(scale_ptr).to(ACC) * LOG2E
    sums = merge_parts(parts_ptr, rows, N, scale, SPLITS, BLOCK, ACC)
    store_fields(sums_ptr, N, rows, rows < N, sums)


def row_sum_parts(
    student,
    teacher,
    label,
    inv_temperature,
    V,
    *,
    filter_value=None,
    entropy=False,
    splits=None,
):
    """Launch the scan. student, teacher: rows (``tensor``, ``inner``, ``strides``); label int64
    [N]; inv_temperature 0-dim; filter_value 0-dim: leave out the columns where the teacher's logit
    is at most this. Returns the sums of every program's share, [splits, 9, N].
    """
    N, acc = label.numel(), inv_temperature.dtype
    tile = tuning.choose(V, student, teacher, rows=N, rule=tuning.scan_splits, splits=splits)
    parts = launch.new_output((tile.splits, FIELDS.value, N), acc, label.device)
    if N:
        with launch.on_device(label.device):
            row_sums_kernel[(N, tile.splits)](
                student.tensor, teacher.tensor, label, inv_temperature, filter_value, parts,
                *student.strides, *teacher.strides, student.inner, teacher.inner, V,
                LANES=tile.lanes, VEC=tile.vec, SPLIT=tile.splits > 1, num_warps=tile.num_warps,
                ALIGNED=launch.equally_aligned(student, teacher),
                ACC=launch.TL_DTYPE[acc], ENTROPY=entropy,
            )  # fmt: skip
    return parts


def row_sums(student, teacher, label, inv_temperature, V, **options):
    """``row_sum_parts``, merged: [9, N]."""
    parts = row_sum_parts(student, teacher, label, inv_temperature, V, **options)
    splits, acc = parts.shape[0], parts.dtype
    if splits == 1 or label.numel() == 0:
        return parts[0]
    sums = launch.new_output(parts.shape[1:], acc, label.device)
    with launch.on_device(label.device):
        merge_sums_kernel[(label.numel(),)](
            parts, inv_temperature, sums, label.numel(), splits, num_warps=1,
            BLOCK=tuning.merge_block(splits), ACC=launch.TL_DTYPE[acc],
        )  # fmt: skip
    return sums
