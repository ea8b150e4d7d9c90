"""Write the gradient of a row from its scalars: the one form that RKL's and DRKL's gradients share.

    dstudent_k = 2^{scale (s_k - m_s) - shift} (w1 ((s_k - m_s) - (t_k - m_t)) + w0)      k != label
    dstudent_label = at_label

scalars[0:7, row] = m_s, m_t, shift, w1, w0, at_label, care

A row whose shift is +inf has gradient 0 everywhere and is not read. ``care`` is 0 where no logit of
the row is infinite (the label's aside): then the product above is right as it stands. A row that is
NaN has w0 = NaN. Reads 2 N V elements and writes N V, each once.
"""

import triton
import triton.language as tl

from . import launch, tuning
from .online_softmax import LOG2E
from .row_sums import load_pair, load_whole_pair
from .row_walk import (
    body_pointer,
    cut_row,
    end_columns,
    label_place,
    row_pointer,
    share_of_row,
    split_tiles,
    tile_offsets,
    vectors,
)

SCALARS = 7


@triton.jit
def to_output(g, OUT: tl.constexpr):
    # float64 straight to bfloat16 is not a conversion every target (or the interpreter) has right
    if g.dtype == tl.float64:
        if OUT != tl.float64:
            g = g.to(tl.float32)
    return g.to(OUT)


@triton.jit
def gradient(s, t, scale, m_s, m_t, shift, w1, w0, CAREFUL: tl.constexpr, OUT: tl.constexpr):
    x = s - m_s
    e = tl.exp2(x * scale - shift)
    g = e * (w1 * (x - (t - m_t)) + w0)
    if CAREFUL:
        # The student leaves the column out, or as good as: 0, whatever the teacher says. 0 * inf is
        # NaN.
        g = tl.where(e == 0.0, tl.where(w0 == w0, 0.0, w0), g)
    return to_output(g, OUT)


@triton.jit
def grad_tiles(
    s_body, t_body, d_body, first, last, mine, picked, scale, m_s, m_t, shift, w1, w0,
    filter_value, LANES: tl.constexpr, VEC: tl.constexpr, ACC: tl.constexpr, ALIGNED: tl.constexpr,
    CAREFUL: tl.constexpr,
):  # fmt: skip
    """The tiles first ... last - 1, without ``picked`` if that is one of them."""
    UNROLL: tl.constexpr = 1 if CAREFUL else 2
    for i in tl.range(first, last - mine.to(tl.int32), loop_unroll_factor=UNROLL):
        tile = i + (i >= picked).to(tl.int32)
        s, t = load_whole_pair(s_body, t_body, tile, filter_value, LANES, VEC, ACC, ALIGNED)
        g = gradient(s, t, scale, m_s, m_t, shift, w1, w0, CAREFUL, d_body.dtype.element_ty)
        tl.store(d_body + tile_offsets(tile, LANES, VEC, ALIGNED), g)


@triton.jit
def grad_part(
    s_ptr, t_ptr, d_ptr, offs, mask, scale, m_s, m_t, shift, w1, w0, filter_value,
    ACC: tl.constexpr,
):  # fmt: skip
    """The columns under the mask."""
    s, t = load_pair(s_ptr, t_ptr, offs, mask, filter_value, ACC)
    g = gradient(s, t, scale, m_s, m_t, shift, w1, w0, True, d_ptr.dtype.element_ty)
    tl.store(d_ptr + offs, g, mask=mask)


@triton.jit
def store_zeros(
    row_ptr, head, body, V, split, splits,
    LANES: tl.constexpr, VEC: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Zero a share of a row."""
    ptr = body_pointer(row_ptr, head, ALIGNED)
    zeros = tl.zeros([LANES, VEC], row_ptr.dtype.element_ty)
    first, last, is_end = split_tiles(body, split, splits, LANES)
    for i in range(first, last):
        tl.store(ptr + tile_offsets(i, LANES, VEC, ALIGNED), zeros)
    if is_end:
        offs, mask = vectors(body // LANES, body, -1, LANES, VEC, ALIGNED)
        tl.store(ptr + offs, zeros, mask=mask)
        cols, ends = end_columns(head, body, -1, V, LANES, VEC, ALIGNED)
        tl.store(row_ptr + cols, tl.zeros([LANES, 1], row_ptr.dtype.element_ty), mask=ends)


@triton.jit
def grad_share(
    student_ptr, teacher_ptr, d_row, row, head, body, label, scale, filter_value,
    m_s, m_t, shift, w1, w0, at_label, care,
    stride_so, stride_si, stride_to, stride_ti, inner_s, inner_t, V, split, splits,
    LANES: tl.constexpr, VEC: tl.constexpr, ACC: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Write one of the row's shares of the gradient, which is not 0 everywhere."""
    s_row = row_pointer(student_ptr, row, stride_so, stride_si, inner_s)
    t_row = row_pointer(teacher_ptr, row, stride_to, stride_ti, inner_t)
    s_body = body_pointer(s_row, head, ALIGNED)
    t_body = body_pointer(t_row, head, ALIGNED)
    d_body = body_pointer(d_row, head, ALIGNED)
    skip, label_tile = label_place(label, head, body, LANES, VEC, ALIGNED)
    first, last, is_end = split_tiles(body, split, splits, LANES)
    mine = (label_tile >= first) & (label_tile < last)
    picked = tl.where(mine, label_tile, last)

    if filter_value is not None or care != 0.0:
        grad_tiles(
            s_body, t_body, d_body, first, last, mine, picked, scale, m_s, m_t, shift, w1, w0,
            filter_value, LANES, VEC, ACC, ALIGNED, True,
        )  # fmt: skip
    else:
        grad_tiles(
            s_body, t_body, d_body, first, last, mine, picked, scale, m_s, m_t, shift, w1, w0,
            None, LANES, VEC, ACC, ALIGNED, False,
        )  # fmt: skip
    if mine:
        offs, mask = vectors(picked, body, skip, LANES, VEC, ALIGNED)
        grad_part(
            s_body, t_body, d_body, offs, mask, scale, m_s, m_t, shift, w1, w0, filter_value, ACC
        )
    if is_end:
        offs, mask = vectors(body // LANES, body, skip, LANES, VEC, ALIGNED)
        grad_part(
            s_body, t_body, d_body, offs, mask, scale, m_s, m_t, shift, w1, w0, filter_value, ACC
        )
        cols, ends = end_columns(head, body, skip, V, LANES, VEC, ALIGNED)
        grad_part(
            s_row, t_row, d_row, cols, ends & (cols != label), scale, m_s, m_t, shift, w1, w0,
            filter_value, ACC,
        )  # fmt: skip
        if label >= 0:
            tl.store(d_row + label, to_output(at_label, d_row.dtype.element_ty))


@triton.jit(do_not_specialize=["inner_s", "inner_t", "V"])
def row_grad_kernel(
    student_ptr, teacher_ptr, label_ptr, scale_ptr, filter_ptr, scalars_ptr, dstudent_ptr,
    stride_so: tl.int64, stride_si: tl.int64, stride_to: tl.int64, stride_ti: tl.int64,
    stride_d: tl.int64, inner_s, inner_t, V,
    LANES: tl.constexpr, VEC: tl.constexpr, SPLIT: tl.constexpr, ACC: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    # Invariant: every column below V is written by exactly one program, once.
    row = tl.program_id(0).to(tl.int64)
    N = tl.num_programs(0).to(tl.int64)
    scalars_ptr += row
    shift = tl.load(scalars_ptr + 2 * N)
    d_row = dstudent_ptr + row * stride_d
    head, body = cut_row(d_row, V, LANES, VEC, ALIGNED)
    split, splits = share_of_row(SPLIT)
    if shift == float("inf"):
        store_zeros(d_row, head, body, V, split, splits, LANES, VEC, ALIGNED)
    else:
        m_s = tl.load(scalars_ptr)
        m_t = tl.load(scalars_ptr + N)
        w1 = tl.load(scalars_ptr + 3 * N)
        w0 = tl.load(scalars_ptr + 4 * N)
        at_label = tl.load(scalars_ptr + 5 * N)
        care = tl.load(scalars_ptr + 6 * N)
        label = tl.load(label_ptr + row).to(tl.int32)
        scale = tl.load(scale_ptr).to(ACC) * LOG2E
        filter_value = None
        if filter_ptr is not None:
            filter_value = tl.load(filter_ptr).to(ACC)
        grad_share(
            student_ptr, teacher_ptr, d_row, row, head, body, label, scale,
            filter_value, m_s, m_t, shift, w1, w0, at_label, care,
            stride_so, stride_si, stride_to, stride_ti, inner_s, inner_t, V, split, splits,
            LANES, VEC, ACC, ALIGNED,
        )  # fmt: skip


def row_grad(
    student,
    teacher,
    label,
    inv_temperature,
    scalars,
    V,
    *,
    filter_value=None,
    out=None,
    splits=None,
):
    """Launch the gradient. student, teacher: rows; scalars [7, N]. Returns [N, columns of student]
    in the student's dtype.

    out: where to write it instead, in its own dtype. The logits of either side may be there, if
    they have that dtype: each element is read and written by the same program, in this order.
    """
    N, columns = label.numel(), student.tensor.shape[-1]
    dstudent = out
    if dstudent is None:
        dstudent = launch.new_output((N, columns), student.tensor.dtype, label.device)
    if N == 0:
        return dstudent
    dstudent[:, V:].zero_()  # truncated columns
    tile = tuning.choose(V, student, teacher, rows=N, rule=tuning.gradient_splits, splits=splits)
    aligned = launch.equally_aligned(student, teacher, student.like(dstudent))
    with launch.on_device(label.device):
        row_grad_kernel[(N, tile.splits)](
            student.tensor, teacher.tensor, label, inv_temperature, filter_value, scalars, dstudent,
            *student.strides, *teacher.strides, dstudent.stride(0), student.inner, teacher.inner, V,
            LANES=tile.lanes, VEC=tile.vec, SPLIT=tile.splits > 1, num_warps=tile.num_warps,
            ACC=launch.TL_DTYPE[inv_temperature.dtype], ALIGNED=aligned,
        )  # fmt: skip
    return dstudent
