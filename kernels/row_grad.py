"""Write the gradient of a row from its weights: one form for all losses.

    dstudent_k = 2^{scale x_k - shift} (w1 (x_k - z_k) + w3 x_k + w0) + 2^{scale z_k} w2
                 + e^{x_k} w4 + phi'(log q_k, log p_k) weight                    k != label
    dstudent_label = at_label

with x_k = s_k - m_s, z_k = t_k - m_t, and log q_k = x_k / temperature + log_q, log p_k likewise;
what SLOPES (bits of facts.py) and PHIS do not have is not computed. With SKEWED t_k is the skewed
teacher's. With PHI_ALONE it is

    dstudent_k = (phi'(log q_k, log p_k) + w0 q_k) weight

weights[:, row] are facts.Weights.

A row whose shift is +inf has gradient 0 everywhere and is not read. ``care`` is 0 where no logit of
the row is infinite (the label's aside): then the product above is right as it stands. A row that is
NaN has w0 = NaN. Reads 2 N V elements and writes N V, each once.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from ..facts import Mixture, Weights
from . import device, launch, tuning
from .device import fast_exp, floored, load_parameters, pointwise
from .online_softmax import ENTROPY, FORWARD, LOG2E, PHI_ALONE, REVERSE, UNTEMPERED
from .row_walk import (
    Geometry,
    Pair,
    body_pointer,
    cut_row,
    end_columns,
    load_pair,
    load_view,
    load_whole_pair,
    place,
    row_pointer,
    split_tiles,
    tile_offsets,
    vectors,
)

WEIGHTS: tl.constexpr = tl.constexpr(len(Weights._fields))


class Scalars(NamedTuple):
    """What the loop over a row needs: of facts.Weights, and beside them."""

    m_s: tl.tensor
    m_t: tl.tensor
    shift: tl.tensor
    w1: tl.tensor
    w0: tl.tensor
    w2: tl.tensor
    w3: tl.tensor
    w4: tl.tensor
    phi: tl.tensor
    log_q: tl.tensor
    log_p: tl.tensor
    inv_temperature: tl.tensor
    scale: tl.tensor
    parameters: tl.tuple


@triton.jit
def to_output(g, OUT: tl.constexpr):
    # float64 straight to bfloat16 is not a conversion every target (or the interpreter) has right
    if g.dtype == tl.float64:
        if OUT != tl.float64:
            g = g.to(tl.float32)
    return g.to(OUT)


@triton.jit
def gradient(x, W, CAREFUL: tl.constexpr, OUT: tl.constexpr, G: tl.constexpr):
    s = x.s - W.m_s
    z = x.t - W.m_t
    if len(G.PHIS) > 0:
        log_q = floored(s * W.inv_temperature + W.log_q)
        log_p = floored(z * W.inv_temperature + W.log_p)
        _, slope = pointwise(log_q, log_p, W.parameters, G.PHIS)
    if PHI_ALONE & G.NEEDS:
        g = (slope + W.w0 * fast_exp(log_q)) * W.phi
    else:
        e = tl.exp2(s * W.scale - W.shift)
        level = W.w0
        if REVERSE & G.NEEDS:
            level = W.w1 * (s - z) + level
        if ENTROPY & G.NEEDS:
            level = W.w3 * s + level
        g = e * level
        if CAREFUL:
            # The student leaves the column out, or as good as: 0, whatever the teacher says.
            # 0 * inf is NaN.
            g = tl.where(e == 0.0, tl.where(W.w0 == W.w0, 0.0, W.w0), g)
        if FORWARD & G.NEEDS:
            g += tl.exp2(z * W.scale) * W.w2
        if UNTEMPERED & G.NEEDS:
            g += tl.exp2(s * LOG2E) * W.w4
        if len(G.PHIS) > 0:
            g += slope * W.phi
    return to_output(g, OUT)


@triton.jit
def grad_tiles(here, d_body, W, CAREFUL: tl.constexpr, G: tl.constexpr):
    """The share's whole tiles without ``picked``, if that is one of them."""
    # two at a time hold too many registers where a second exponential meets float32 (sm_120)
    WIDE: tl.constexpr = FORWARD & G.NEEDS and d_body.dtype.element_ty.primitive_bitwidth >= 32
    UNROLL: tl.constexpr = 1 if CAREFUL or WIDE else 2
    for i in tl.range(here.first, here.last - here.mine.to(tl.int32), loop_unroll_factor=UNROLL):
        x = load_whole_pair(here, i, G)
        tile = i + (i >= here.picked).to(tl.int32)
        g = gradient(x, W, CAREFUL, d_body.dtype.element_ty, G)
        tl.store(d_body + tile_offsets(tile, G.VEC, G), g)


@triton.jit
def grad_part(ptr, d_ptr, offs, mask, W, view, G: tl.constexpr):
    """The columns under the mask."""
    x = load_pair(ptr, offs, mask, view, G)
    tl.store(d_ptr + offs, gradient(x, W, True, d_ptr.dtype.element_ty, G), mask=mask)


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


@triton.jit
def load_scalars(ptr, N, scale_ptr, ACC: tl.constexpr, parameters):
    w = ()
    for k in tl.static_range(WEIGHTS):
        w = w + (tl.load(ptr + k * N),)
    W = Weights(*w)
    inv_temperature = tl.load(scale_ptr).to(ACC)
    return Scalars(
        W.m_s, W.m_t, W.shift, W.w1, W.w0, W.w2, W.w3, W.w4, W.phi, W.log_q, W.log_p,
        inv_temperature, inv_temperature * LOG2E, parameters,
    ), W  # fmt: skip


@triton.jit(do_not_specialize=["inner_s", "inner_t", "V"])
def row_grad_kernel(
    student_ptr, teacher_ptr, label_ptr, scale_ptr, filter_ptr, weights_ptr, parameters_ptr,
    dstudent_ptr, stride_so: tl.int64, stride_si: tl.int64, stride_to: tl.int64,
    stride_ti: tl.int64, stride_d: tl.int64, stride_x: tl.int64, row_x, inner_s, inner_t, V,
    LANES: tl.constexpr, VEC: tl.constexpr, SPLIT: tl.constexpr, ACC: tl.constexpr,
    ALIGNED: tl.constexpr, SLOPES: tl.constexpr, PHIS: tl.constexpr, PARAMETERS: tl.constexpr,
):  # fmt: skip
    # Invariant: every column below V is written by exactly one program, once.
    FILTERED: tl.constexpr = filter_ptr is not None
    G: tl.constexpr = Geometry(LANES, VEC, ACC, ALIGNED, FILTERED, SLOPES, PHIS)
    row = tl.program_id(0).to(tl.int64)
    N = tl.num_programs(0).to(tl.int64)
    weights_ptr += row
    shift = tl.load(weights_ptr + 2 * N)
    d_row = dstudent_ptr + row * stride_d
    head, body = cut_row(d_row, V, G)
    if shift == float("inf"):
        store_zeros(d_row, head, body, V, SPLIT, G)
    else:
        parameters = load_parameters(parameters_ptr, stride_x, row * row_x, PARAMETERS, ACC)
        W, all_weights = load_scalars(weights_ptr, N, scale_ptr, ACC, parameters)
        label = tl.load(label_ptr + row).to(tl.int32)
        mixture = Mixture(W.m_s, W.log_q, W.phi, W.log_p)
        view = load_view(filter_ptr, mixture, W.inv_temperature, ACC)
        s_row = row_pointer(student_ptr, row, stride_so, stride_si, inner_s)
        t_row = row_pointer(teacher_ptr, row, stride_to, stride_ti, inner_t)
        here = place(Pair(s_row, t_row), head, body, V, label, view, SPLIT, G, False)
        d_body = body_pointer(d_row, head, G)
        # w1 and w3 alone are multiplied with logits
        if ((REVERSE | ENTROPY) & SLOPES) and (FILTERED or all_weights.care != 0.0):
            grad_tiles(here, d_body, W, True, G)
        else:
            grad_tiles(here, d_body, W, False, G)
        if here.mine:
            offs, mask = vectors(here.picked, body, here.skip, G)
            grad_part(here.body_ptr, d_body, offs, mask, W, view, G)
        if here.is_end:
            offs, mask = vectors(body // G.LANES, body, here.skip, G)
            grad_part(here.body_ptr, d_body, offs, mask, W, view, G)
            cols, ends = end_columns(head, body, here.skip, V, G)
            ends = ends & (cols != label)
            grad_part(here.ptr, d_row, cols, ends, W, view, G)
            if label >= 0:
                at_label = to_output(all_weights.at_label, d_row.dtype.element_ty)
                tl.store(d_row + label, at_label)


def row_grad(
    student,
    teacher,
    label,
    inv_temperature,
    weights,
    V,
    *,
    slopes,
    phis=(),
    parameters=None,
    filter_value=None,
    out=None,
    splits=None,
):
    """Launch the gradient. student, teacher: rows; weights [13, N]; slopes, phis: what they are
    made of (_objective.Program); parameters [P, N], for phis. Returns [N, columns of student] in
    the student's dtype.

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
    parameters, count, *strides = device.parameter_arguments(parameters if phis else None)
    with launch.on_device(label.device):
        row_grad_kernel[(N, tile.splits)](
            student.tensor, teacher.tensor, label, inv_temperature, filter_value, weights,
            parameters, dstudent, *student.strides, *teacher.strides, dstudent.stride(0), *strides,
            student.inner, teacher.inner, V,
            LANES=tile.lanes, VEC=tile.vec, SPLIT=tile.splits > 1, num_warps=tile.num_warps,
            ACC=launch.TL_DTYPE[inv_temperature.dtype], ALIGNED=aligned, SLOPES=slopes,
            PHIS=device.compiled_phis(phis), PARAMETERS=count,
        )  # fmt: skip
    return dstudent
