"""Write the gradient of a row from its scalars: the one form that RKL's and DRKL's gradients share.

    dstudent_k = 2^{scale (s_k - m_s) - shift} (w1 ((s_k - m_s) - (t_k - m_t)) + w0)      k != label
    dstudent_label = at_label

scalars[0:7, row] = m_s, m_t, shift, w1, w0, at_label, care

A row whose shift is +inf has gradient 0 everywhere and is not read. ``care`` is 0 where no logit of
the row is infinite (the label's aside): then the product above is right as it stands. A row that is
NaN has w0 = NaN. Reads 2 N V elements and writes N V, each once.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from . import launch, tuning
from .online_softmax import LOG2E
from .row_walk import (
    Geometry,
    Pair,
    body_pointer,
    cut_row,
    end_columns,
    load_pair,
    load_whole_pair,
    place,
    row_pointer,
    split_tiles,
    tile_offsets,
    vectors,
)

SCALARS = 7


class Scalars(NamedTuple):
    """The formula above."""

    m_s: tl.tensor
    m_t: tl.tensor
    shift: tl.tensor
    w1: tl.tensor
    w0: tl.tensor


@triton.jit
def to_output(g, OUT: tl.constexpr):
    # float64 straight to bfloat16 is not a conversion every target (or the interpreter) has right
    if g.dtype == tl.float64:
        if OUT != tl.float64:
            g = g.to(tl.float32)
    return g.to(OUT)


@triton.jit
def gradient(x, W, scale, CAREFUL: tl.constexpr, OUT: tl.constexpr):
    s = x.s - W.m_s
    e = tl.exp2(s * scale - W.shift)
    g = e * (W.w1 * (s - (x.t - W.m_t)) + W.w0)
    if CAREFUL:
        # The student leaves the column out, or as good as: 0, whatever the teacher says. 0 * inf is
        # NaN.
        g = tl.where(e == 0.0, tl.where(W.w0 == W.w0, 0.0, W.w0), g)
    return to_output(g, OUT)


@triton.jit
def grad_tiles(here, d_body, W, scale, CAREFUL: tl.constexpr, G: tl.constexpr):
    """The share's whole tiles without ``picked``, if that is one of them."""
    UNROLL: tl.constexpr = 1 if CAREFUL else 2
    for i in tl.range(here.first, here.last - here.mine.to(tl.int32), loop_unroll_factor=UNROLL):
        x = load_whole_pair(here, i, G)
        tile = i + (i >= here.picked).to(tl.int32)
        g = gradient(x, W, scale, CAREFUL, d_body.dtype.element_ty)
        tl.store(d_body + tile_offsets(tile, G.VEC, G), g)


@triton.jit
def grad_part(ptr, d_ptr, offs, mask, W, scale, filter_value, G: tl.constexpr):
    """The columns under the mask."""
    x = load_pair(ptr, offs, mask, filter_value, G)
    tl.store(d_ptr + offs, gradient(x, W, scale, True, d_ptr.dtype.element_ty), mask=mask)


@triton.jit
def store_zeros(row_ptr, head, body, V, SPLIT: tl.constexpr, G: tl.constexpr):
    """Zero this program's share of a row."""
    ptr = body_pointer(row_ptr, head, G)
    zeros = tl.zeros([G.LANES, G.VEC], row_ptr.dtype.element_ty)
    first, last, is_end = split_tiles(body, SPLIT, G)
    for i in range(first, last):
        tl.store(ptr + tile_offsets(i, G.VEC, G), zeros)
    if is_end:
        offs, mask = vectors(body // G.LANES, body, -1, G)
        tl.store(ptr + offs, zeros, mask=mask)
        cols, ends = end_columns(head, body, -1, V, G)
        tl.store(row_ptr + cols, tl.zeros([G.LANES, 1], row_ptr.dtype.element_ty), mask=ends)


@triton.jit(do_not_specialize=["inner_s", "inner_t", "V"])
def row_grad_kernel(
    student_ptr, teacher_ptr, label_ptr, scale_ptr, filter_ptr, scalars_ptr, dstudent_ptr,
    stride_so: tl.int64, stride_si: tl.int64, stride_to: tl.int64, stride_ti: tl.int64,
    stride_d: tl.int64, inner_s, inner_t, V,
    LANES: tl.constexpr, VEC: tl.constexpr, SPLIT: tl.constexpr, ACC: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    # Invariant: every column below V is written by exactly one program, once.
    FILTERED: tl.constexpr = filter_ptr is not None
    G: tl.constexpr = Geometry(LANES, VEC, ACC, ALIGNED, FILTERED, False)
    row = tl.program_id(0).to(tl.int64)
    N = tl.num_programs(0).to(tl.int64)
    scalars_ptr += row
    shift = tl.load(scalars_ptr + 2 * N)
    d_row = dstudent_ptr + row * stride_d
    head, body = cut_row(d_row, V, G)
    if shift == float("inf"):
        store_zeros(d_row, head, body, V, SPLIT, G)
    else:
        m_s = tl.load(scalars_ptr)
        m_t = tl.load(scalars_ptr + N)
        w1 = tl.load(scalars_ptr + 3 * N)
        w0 = tl.load(scalars_ptr + 4 * N)
        at_label = tl.load(scalars_ptr + 5 * N)
        care = tl.load(scalars_ptr + 6 * N)
        W = Scalars(m_s, m_t, shift, w1, w0)
        label = tl.load(label_ptr + row).to(tl.int32)
        scale = tl.load(scale_ptr).to(ACC) * LOG2E
        filter_value = scale
        if FILTERED:
            filter_value = tl.load(filter_ptr).to(ACC)
        s_row = row_pointer(student_ptr, row, stride_so, stride_si, inner_s)
        t_row = row_pointer(teacher_ptr, row, stride_to, stride_ti, inner_t)
        here = place(Pair(s_row, t_row), head, body, V, label, filter_value, SPLIT, G, False)
        d_body = body_pointer(d_row, head, G)
        if FILTERED or care != 0.0:
            grad_tiles(here, d_body, W, scale, True, G)
        else:
            grad_tiles(here, d_body, W, scale, False, G)
        if here.mine:
            offs, mask = vectors(here.picked, body, here.skip, G)
            grad_part(here.body_ptr, d_body, offs, mask, W, scale, filter_value, G)
        if here.is_end:
            offs, mask = vectors(body // G.LANES, body, here.skip, G)
            grad_part(here.body_ptr, d_body, offs, mask, W, scale, filter_value, G)
            cols, ends = end_columns(head, body, here.skip, V, G)
            ends = ends & (cols != label)
            grad_part(here.ptr, d_row, cols, ends, W, scale, filter_value, G)
            if label >= 0:
                tl.store(d_row + label, to_output(at_label, d_row.dtype.element_ty))


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
