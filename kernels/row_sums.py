"""Scan each row once for the sums that the losses and their gradients are made of.

    sums[0:9, row]   = the state of the columns k != label (online_softmax.py)
    sums[9:11, row]  = s_label, t_label
    sums[11, row]    = care: 0 where every logit is finite; 1 where one of these columns is -inf,
                       say, so that the gradient needs a select, too; 2 where the teacher is -inf at
                       one where the student's logit is not (its mass may have underflowed)
    sums[12:16, row] = 0; the place of later sweeps' sums

Reads 2 N V elements (a row that needs care may be read twice), writes 16 N. With SPLIT every
program writes the sums of its share and merge_sums_kernel adds them up.
"""

import triton
import triton.language as tl

from ..facts import Mixture, Sums
from . import launch, tuning
from .online_softmax import (
    LOG2E,
    State,
    add_tile,
    empty_lanes,
    merge_lanes,
    move_maxima,
    no_columns,
)
from .row_walk import (
    IGNORED,
    INVALID,
    Geometry,
    Pair,
    beside,
    cut_row,
    end_columns,
    load_pair,
    load_view,
    load_whole_pair,
    place,
    row_pointer,
    vectors,
)

FIELDS: tl.constexpr = tl.constexpr(len(Sums._fields))
STATE: tl.constexpr = tl.constexpr(len(State._fields))


@triton.jit
def is_missing(x):
    """2 where the teacher leaves out what the student does not."""
    return ((x.t == float("-inf")) & (x.s != float("-inf"))).to(tl.int32) * 2


@triton.jit
def add_part(S, care, ptr, offs, mask, scale, view, G: tl.constexpr):
    """Load what the mask leaves, fold it into the lanes' state, and note in ``care`` the lanes
    where one of the two leaves out one of these columns.
    """
    x = load_pair(ptr, offs, mask, view, G)
    absent = ((x.s == float("-inf")) & mask).to(tl.int32)
    care = tl.maximum(care, tl.max(tl.maximum(absent, is_missing(x)), axis=1))
    return add_tile(S, x, scale, True, G.NEEDS), care


@triton.jit
def sum_uneven_parts(here, scale, G: tl.constexpr):
    """The lanes' state after all that takes a mask: tile ``picked`` without the label's vector and,
    where is_end, the body's last tile and the ends. Last comes ``care`` [LANES].
    """
    S = no_columns(G.LANES, G.ACC)
    care = tl.zeros([G.LANES], tl.int32)
    offs, mask = vectors(here.picked, here.last * G.LANES, here.skip, G)
    S, care = add_part(S, care, here.body_ptr, offs, mask, scale, here.view, G)
    if here.is_end:
        offs, mask = vectors(here.body // G.LANES, here.body, here.skip, G)
        S, care = add_part(S, care, here.body_ptr, offs, mask, scale, here.view, G)
        cols, ends = end_columns(here.head, here.body, here.skip, here.V, G)
        ends = ends & (cols != here.label)
        S, care = add_part(S, care, here.ptr, cols, ends, scale, here.view, G)
    return S, care


@triton.jit
def sum_row(here, scale, CAREFUL: tl.constexpr, G: tl.constexpr):
    """The state of the share's columns, and ``care``. Not CAREFUL: care > 0 says that the state is
    wrong, because a logit is infinite or NaN, or a difference of logits has no sum.
    """
    S, care = sum_uneven_parts(here, scale, G)
    first, stop = here.first, here.last - 1
    if not CAREFUL:
        # A padded vocabulary has its -inf at the end, which is already walked: do not even start.
        stop = tl.where(tl.max(care, axis=0) > 0, first, stop)
        # from here on no lane is empty
        top_s = S.m_s * 0 + tl.max(S.m_s, axis=0)
        top_t = S.m_t * 0 + tl.max(S.m_t, axis=0)
        S = move_maxima(S, top_s, top_t, scale, G.NEEDS)
        # two tiles at a time: their loads wait together, and what a lane costs is halved
        for i in range(first, stop - 1, 2):
            x = beside(load_whole_pair(here, i, G), load_whole_pair(here, i + 1, G))
            S = add_tile(S, x, scale, False, G.NEEDS)
        first += (stop - first) // 2 * 2
    for i in range(first, stop):
        x = load_whole_pair(here, i, G)
        S = add_tile(S, x, scale, CAREFUL, G.NEEDS)
        if CAREFUL and not G.FILTERED:
            care = tl.maximum(care, tl.max(is_missing(x), axis=1))
    S = merge_lanes(S, scale, G.NEEDS)
    care = tl.max(care, axis=0)
    if CAREFUL:
        care = tl.maximum(care, 1)
    else:
        # An infinite logit makes a NaN or an infinity of these: 0 * inf, e * inf, inf - inf. What
        # sums none of them needs no care.
        finite = (tl.abs(S.a) < float("inf")) & (tl.abs(S.h) < float("inf"))
        finite = finite & (tl.abs(S.b) < float("inf")) & (tl.abs(S.g) < float("inf"))
        care = tl.where(finite, care, 1)
    return S, care


@triton.jit
def store_state(ptr, stride_f, S, care):
    for k in tl.static_range(STATE):
        tl.store(ptr + k * stride_f, S[k])
    tl.store(ptr + (STATE + 2) * stride_f, care.to(S.m_s.dtype))
    for k in tl.static_range(STATE + 3, FIELDS):
        tl.store(ptr + k * stride_f, S.m_s * 0)


@triton.jit
def load_mixture(ptr, stride):
    return Mixture(
        tl.load(ptr), tl.load(ptr + stride), tl.load(ptr + 2 * stride), tl.load(ptr + 3 * stride)
    )


@triton.jit(do_not_specialize=["inner_s", "inner_t", "V"])
def row_sums_kernel(
    student_ptr, teacher_ptr, label_ptr, inv_temperature_ptr, filter_ptr, mixture_ptr, sums_ptr,
    stride_so: tl.int64, stride_si: tl.int64, stride_to: tl.int64, stride_ti: tl.int64,
    inner_s, inner_t, V,
    LANES: tl.constexpr, VEC: tl.constexpr, SPLIT: tl.constexpr, ACC: tl.constexpr,
    ALIGNED: tl.constexpr, NEEDS: tl.constexpr,
):  # fmt: skip
    # Invariant: the lanes' states together hold exactly the columns walked so far, the label's
    # never. The last of a row's shares has the label's logits.
    FILTERED: tl.constexpr = filter_ptr is not None
    G: tl.constexpr = Geometry(LANES, VEC, ACC, ALIGNED, FILTERED, NEEDS)
    row = tl.program_id(0).to(tl.int64)
    N = tl.num_programs(0).to(tl.int64)
    label = tl.load(label_ptr + row).to(tl.int32)
    inv_temperature = tl.load(inv_temperature_ptr).to(ACC)
    scale = inv_temperature * LOG2E
    mixture = Mixture(scale, scale, scale, scale)
    if mixture_ptr is not None:
        mixture = load_mixture(mixture_ptr + row, N)
    view = load_view(filter_ptr, mixture, inv_temperature, ACC)
    sums_ptr += tl.program_id(1).to(tl.int64) * FIELDS * N + row
    if (label != IGNORED) & (label != INVALID):
        s_row = row_pointer(student_ptr, row, stride_so, stride_si, inner_s)
        t_row = row_pointer(teacher_ptr, row, stride_to, stride_ti, inner_t)
        head, body = cut_row(s_row, V, G)
        # One tile goes before the others: the label's, which takes a mask, or any.
        here = place(Pair(s_row, t_row), head, body, V, label, view, SPLIT, G, True)
        if here.is_end:
            x = load_pair(here.ptr, label, label >= 0, view, G)
            tl.store(sums_ptr + STATE * N, x.s)
            tl.store(sums_ptr + (STATE + 1) * N, x.t)

        care = 1  # FILTERED: a teacher with -inf is what it is for
        if not FILTERED:
            S, care = sum_row(here, scale, False, G)
            store_state(sums_ptr, N, S, care)
        if care != 0:
            S, care = sum_row(here, scale, True, G)
            store_state(sums_ptr, N, S, care)
    else:
        for k in tl.static_range(FIELDS):
            tl.store(sums_ptr + k * N, scale * 0.0)


@triton.jit
def load_sums(ptr, stride_f, rows, mask):
    fields = ()
    for k in tl.static_range(FIELDS):
        if mask is None:
            fields = fields + (tl.load(ptr + k * stride_f + rows),)
        else:
            fields = fields + (tl.load(ptr + k * stride_f + rows, mask=mask, other=0.0),)
    return Sums(*fields)


@triton.jit
def merge_parts(
    parts_ptr, row, N, scale, SPLITS, BLOCK: tl.constexpr, NEEDS: tl.constexpr, ACC: tl.constexpr
):
    """The sums of one row [1] from those of its shares; the label's logits come from the last,
    which alone has them.
    """
    part = tl.arange(0, BLOCK)[:, None]
    mask = (part < SPLITS) & (row < N)[None, :]
    x = load_sums(parts_ptr, N, part.to(tl.int64) * FIELDS * N + row[None, :], mask)
    floor, _ = empty_lanes(1, ACC)
    m_s, m_t = tl.where(mask, x.m_s, floor), tl.where(mask, x.m_t, floor)
    S = State(m_s, x.d_s, x.a, x.h, m_t, x.d_t, x.b, x.g, x.c)
    S = merge_lanes(S, scale, NEEDS)
    last = parts_ptr + (SPLITS - 1) * FIELDS * N + row
    s_label = tl.load(last + STATE * N, mask=row < N, other=0.0)
    t_label = tl.load(last + (STATE + 1) * N, mask=row < N, other=0.0)
    care = tl.max(x.care, axis=0)
    none = s_label * 0
    return Sums(*S, s_label, t_label, care, none, none, none, none)


@triton.jit
def store_fields(ptr, stride_f, rows, mask, fields):
    for k in tl.static_range(len(fields)):
        tl.store(ptr + k * stride_f + rows, fields[k], mask=mask)


@triton.jit(do_not_specialize=["N", "SPLITS"])
def merge_sums_kernel(
    parts_ptr,
    scale_ptr,
    sums_ptr,
    N,
    SPLITS,
    BLOCK: tl.constexpr,
    NEEDS: tl.constexpr,
    ACC: tl.constexpr,
):
    N = N.to(tl.int64)
    rows = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    scale = tl.load(scale_ptr).to(ACC) * LOG2E
    sums = merge_parts(parts_ptr, rows, N, scale, SPLITS, BLOCK, NEEDS, ACC)
    store_fields(sums_ptr, N, rows, rows < N, sums)


def row_sum_parts(
    student,
    teacher,
    label,
    inv_temperature,
    V,
    *,
    needs,
    filter_value=None,
    mixture=None,
    splits=None,
):
    """Launch the scan. student, teacher: rows (``tensor``, ``inner``, ``strides``); label int64
    [N]; inv_temperature 0-dim; needs: the bits of facts.py that say what is summed; filter_value
    0-dim: leave out the columns where the teacher's logit is at most this; mixture [4, N]: the
    teacher is skewed (facts.Mixture). Returns the sums of every program's share, [splits, 16, N].
    """
    N, acc = label.numel(), inv_temperature.dtype
    tile = tuning.choose(V, student, teacher, rows=N, rule=tuning.scan_splits, splits=splits)
    parts = launch.new_output((tile.splits, FIELDS.value, N), acc, label.device)
    if N:
        with launch.on_device(label.device):
            row_sums_kernel[(N, tile.splits)](
                student.tensor, teacher.tensor, label, inv_temperature, filter_value, mixture,
                parts, *student.strides, *teacher.strides, student.inner, teacher.inner, V,
                LANES=tile.lanes, VEC=tile.vec, SPLIT=tile.splits > 1, num_warps=tile.num_warps,
                ALIGNED=launch.equally_aligned(student, teacher),
                ACC=launch.TL_DTYPE[acc], NEEDS=needs,
            )  # fmt: skip
    return parts


def row_sums(student, teacher, label, inv_temperature, V, *, needs, **options):
    """``row_sum_parts``, merged: [16, N]."""
    parts = row_sum_parts(student, teacher, label, inv_temperature, V, needs=needs, **options)
    splits, acc = parts.shape[0], parts.dtype
    if splits == 1 or label.numel() == 0:
        return parts[0]
    sums = launch.new_output(parts.shape[1:], acc, label.device)
    with launch.on_device(label.device):
        merge_sums_kernel[(label.numel(),)](
            parts, inv_temperature, sums, label.numel(), splits, num_warps=1,
            BLOCK=tuning.merge_block(splits), NEEDS=needs, ACC=launch.TL_DTYPE[acc],
        )  # fmt: skip
    return sums
