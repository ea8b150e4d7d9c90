"""The second sweep of an objective with pointwise terms: what they and their slopes sum up to.

    sums[14:16, row] = sum phi(log q_k, log p_k), sum dphi/dlog q_k    over the columns k != label

from the first sweep's sums, which normalise q and p. Reads 2 N V elements. With SPLIT every program
sums its share.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import device, launch, tuning
from .device import floored, load_parameters, normalised, pointwise
from .row_sums import FIELDS, load_sums
from .row_walk import (
    IGNORED,
    INVALID,
    TEACHER,
    Geometry,
    Pair,
    cut_row,
    end_columns,
    load_pair,
    load_view,
    load_whole_pair,
    place,
    row_pointer,
    vectors,
)


class Row(NamedTuple):
    """What turns a row's logits into log-probabilities, and the terms' parameters."""

    m: Pair
    normaliser: Pair
    inv_temperature: tl.tensor
    parameters: tl.tuple


@triton.jit
def add_phi(total, x, W, G: tl.constexpr):
    """Fold the pair of tiles x [LANES, VEC] into the lanes' sums."""
    log_q = floored((x.s - W.m.s) * W.inv_temperature + W.normaliser.s)
    log_p = floored((x.t - W.m.t) * W.inv_temperature + W.normaliser.t)
    value, slope = pointwise(log_q, log_p, W.parameters, G.PHIS)
    return Pair(total.s + tl.sum(value, axis=1), total.t + tl.sum(slope, axis=1))


@triton.jit
def add_phi_part(total, ptr, offs, mask, W, view, G: tl.constexpr):
    """Of the columns under the mask."""
    return add_phi(total, load_pair(ptr, offs, mask, view, G), W, G)


@triton.jit(do_not_specialize=["inner_s", "inner_t", "V"])
def row_phi_kernel(
    student_ptr, teacher_ptr, label_ptr, inv_temperature_ptr, filter_ptr, sums_ptr, parameters_ptr,
    out_ptr, stride_so: tl.int64, stride_si: tl.int64, stride_to: tl.int64, stride_ti: tl.int64,
    stride_x: tl.int64, row_x, inner_s, inner_t, V,
    LANES: tl.constexpr, VEC: tl.constexpr, SPLIT: tl.constexpr, ACC: tl.constexpr,
    ALIGNED: tl.constexpr, PHIS: tl.constexpr, PARAMETERS: tl.constexpr,
):  # fmt: skip
    # out[split, 0:2, row] = this program's share
    FILTERED: tl.constexpr = filter_ptr is not None
    G: tl.constexpr = Geometry(LANES, VEC, ACC, ALIGNED, FILTERED, TEACHER, PHIS)
    row = tl.program_id(0).to(tl.int64)
    N = tl.num_programs(0).to(tl.int64)
    label = tl.load(label_ptr + row).to(tl.int32)
    out_ptr += tl.program_id(1).to(tl.int64) * 2 * N + row
    zero = tl.zeros([LANES], ACC)
    S = Pair(zero, zero)
    if (label != IGNORED) & (label != INVALID):
        inv_t = tl.load(inv_temperature_ptr).to(ACC)
        parameters = load_parameters(parameters_ptr, stride_x, row * row_x, PARAMETERS, ACC)
        sums = load_sums(sums_ptr, N, row, None)
        log_q, log_p = normalised(sums, label, inv_t, TEACHER)
        W = Row(Pair(sums.m_s, sums.m_t), Pair(log_q, log_p), inv_t, parameters)
        view = load_view(filter_ptr, sums, inv_t, ACC)
        s_row = row_pointer(student_ptr, row, stride_so, stride_si, inner_s)
        t_row = row_pointer(teacher_ptr, row, stride_to, stride_ti, inner_t)
        head, body = cut_row(s_row, V, G)
        here = place(Pair(s_row, t_row), head, body, V, label, view, SPLIT, G, False)
        for i in range(here.first, here.last - here.mine.to(tl.int32)):
            S = add_phi(S, load_whole_pair(here, i, G), W, G)
        if here.mine:
            offs, mask = vectors(here.picked, body, here.skip, G)
            S = add_phi_part(S, here.body_ptr, offs, mask, W, view, G)
        if here.is_end:
            offs, mask = vectors(body // G.LANES, body, here.skip, G)
            S = add_phi_part(S, here.body_ptr, offs, mask, W, view, G)
            cols, ends = end_columns(head, body, here.skip, V, G)
            S = add_phi_part(S, here.ptr, cols, ends & (cols != label), W, view, G)
    tl.store(out_ptr, tl.sum(S.s, axis=0))
    tl.store(out_ptr + N, tl.sum(S.t, axis=0))


def row_phi(
    student, teacher, label, inv_temperature, parameters, sums, V, *, phis, filter_value=None,
    splits=None,
):  # fmt: skip
    """Launch the sweep, which fills in the last two rows of ``sums`` [16, N]."""
    N, acc = label.numel(), inv_temperature.dtype
    if N == 0:
        return
    tile = tuning.choose(V, student, teacher, rows=N, rule=tuning.scan_splits, splits=splits)
    parts = launch.new_output((tile.splits, 2, N), acc, label.device)
    parameters, count, *strides = device.parameter_arguments(parameters)
    with launch.on_device(label.device):
        row_phi_kernel[(N, tile.splits)](
            student.tensor, teacher.tensor, label, inv_temperature, filter_value, sums, parameters,
            parts, *student.strides, *teacher.strides, *strides, student.inner, teacher.inner, V,
            LANES=tile.lanes, VEC=tile.vec, SPLIT=tile.splits > 1, num_warps=tile.num_warps,
            ACC=launch.TL_DTYPE[acc], ALIGNED=launch.equally_aligned(student, teacher),
            PHIS=device.compiled_phis(phis), PARAMETERS=count,
        )  # fmt: skip
        torch.sum(parts, 0, out=sums[FIELDS.value - 2 :])
