"""Loss and gradient of each row in one launch, with the logits read from memory once.

    two launches   2 reads, then 2 reads + 1 write     10 bytes an element of bfloat16
    one sweep      2 reads          + 1 write           6; the second reads come from the L2 cache

A team of programs shares a row. Each program publishes the sums of its share (row_sums.py), waits
until all of its team have, merges them, and writes its share of the gradient (row_grad.py): every
member of a team computes the same numbers in the same order.

Progress: programs take tickets in the order in which they start, and teams are made of tickets that
follow each other. So all members of the oldest unfinished team run or are done, as long as the card
holds a team at once; tuning.team sees to that.
"""

import torch
import triton
import triton.language as tl

from . import launch, tuning
from .online_softmax import LOG2E
from .row_grad import grad_share, store_zeros, to_output
from .row_map import divided, gradient_scalars, losses
from .row_sums import FIELDS, merge_parts, store_fields, sum_share
from .row_walk import cut_row


@triton.jit
def await_team(arrived_ptr, TEAM):
    """Says that this program has published, and waits for the others. What they have stored can be
    read afterwards: an addition releases, the next ones acquire.
    """
    tl.debug_barrier()  # whichever threads stored have done so
    arrived = tl.atomic_add(arrived_ptr, 1, sem="acq_rel") + 1
    while arrived < TEAM:
        arrived = tl.atomic_add(arrived_ptr, 0, sem="acquire")
    tl.debug_barrier()


@triton.jit
def only(x):
    """The scalar of a tensor [1]."""
    return tl.sum(x, axis=0)


@triton.jit(do_not_specialize=["N", "TEAM", "inner_s", "inner_t", "V"])
def one_sweep_kernel(
    student_ptr, teacher_ptr, label_ptr, inv_temperature_ptr, gamma_ptr, filter_ptr, weight_ptr,
    denominator_ptr, parts_ptr, team_ptr, loss_ptr, fields_ptr, dstudent_ptr,
    stride_so: tl.int64, stride_si: tl.int64, stride_to: tl.int64, stride_ti: tl.int64,
    stride_d: tl.int64, inner_s, inner_t, V, N, TEAM,
    LANES: tl.constexpr, VEC: tl.constexpr, ACC: tl.constexpr, ALIGNED: tl.constexpr,
    MERGE: tl.constexpr, LABELLED: tl.constexpr, METRICS: tl.constexpr, WAIT: tl.constexpr,
):  # fmt: skip
    # team_ptr [N + 1], zeros: how many of each row's team have published; the next ticket
    N = N.to(tl.int64)
    ticket = tl.atomic_add(team_ptr + N, 1, sem="relaxed")
    row, member = (ticket // TEAM).to(tl.int64), ticket % TEAM
    label = tl.load(label_ptr + row).to(tl.int32)
    inv_temperature = tl.load(inv_temperature_ptr).to(ACC)
    scale = inv_temperature * LOG2E
    filter_value = None
    if filter_ptr is not None:
        filter_value = tl.load(filter_ptr).to(ACC)
    sum_share(
        student_ptr, teacher_ptr, parts_ptr, row, N, label, scale, filter_value,
        stride_so, stride_si, stride_to, stride_ti, inner_s, inner_t, V, member, TEAM,
        LANES, VEC, ACC, ALIGNED, METRICS,
    )  # fmt: skip
    if WAIT:
        await_team(team_ptr + row, TEAM)

    rows = row + tl.arange(0, 1)
    mask = rows < N
    labels = tl.load(label_ptr + rows)
    sums = merge_parts(parts_ptr, rows, N, scale, TEAM, MERGE, ACC)
    HAS_GAMMA: tl.constexpr = gamma_ptr is not None
    gamma = inv_temperature
    if HAS_GAMMA:
        gamma = tl.load(gamma_ptr).to(ACC)
    if member == 0:
        out = losses(sums, labels, inv_temperature, gamma, HAS_GAMMA, LABELLED, METRICS)
        tl.store(loss_ptr + rows, out[0], mask=mask)
        if METRICS:
            store_fields(fields_ptr, N, rows, mask, out)
    upstream = tl.full([1], 1.0, ACC)
    if weight_ptr is not None:
        upstream = tl.load(weight_ptr + rows)
    if denominator_ptr is not None:
        upstream = divided(upstream, tl.load(denominator_ptr))
    m_s, m_t, shift, w1, w0, at_label, care = gradient_scalars(
        sums, labels, inv_temperature, gamma, upstream, HAS_GAMMA, LABELLED
    )
    d_row = dstudent_ptr + row * stride_d
    head, body = cut_row(d_row, V, LANES, VEC, ALIGNED)
    if only(shift) == float("inf"):
        store_zeros(d_row, head, body, V, member, TEAM, LANES, VEC, ALIGNED)
    else:
        grad_share(
            student_ptr, teacher_ptr, d_row, row, head, body, label, scale, filter_value,
            only(m_s), only(m_t), only(shift), only(w1), only(w0), only(at_label), only(care),
            stride_so, stride_si, stride_to, stride_ti, inner_s, inner_t, V, member, TEAM,
            LANES, VEC, ACC, ALIGNED,
        )  # fmt: skip


@triton.jit(do_not_specialize=["count"])
def scale_kernel(x_ptr, factor_ptr, count, ACC: tl.constexpr, BLOCK: tl.constexpr):
    factor = tl.load(factor_ptr)
    if factor != 1.0:  # as it is where the loss is what backward() was called on
        offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + offs, mask=offs < count, other=0.0).to(ACC)
        # a row that is ignored stays 0, and a factor of 0 makes 0 of everything
        x = tl.where(x == 0.0, 0.0, tl.where(factor == 0.0, 0.0, x * factor))
        tl.store(x_ptr + offs, to_output(x, x_ptr.dtype.element_ty), mask=offs < count)


SCALE_BLOCK = 2048


def scale_(x, factor):
    """x *= factor (0-dim), which costs nothing where it is 1; a factor of 0 makes 0 of whatever x
    holds. x is dense.
    """
    if x.numel():
        with launch.on_device(x.device):
            scale_kernel[(triton.cdiv(x.numel(), SCALE_BLOCK),)](
                x, factor, x.numel(), ACC=launch.TL_DTYPE[factor.dtype], BLOCK=SCALE_BLOCK
            )


def loss_and_gradient(
    student, teacher, label, inv_temperature, gamma, weight, denominator, V,
    *, filter_value=None, labelled, metrics, team=None,
):  # fmt: skip
    """Launch it. student, teacher: rows; weight [N] and denominator 0-dim, or None: each row's
    gradient is multiplied with weight / denominator. team: programs that share a row.

    Returns (loss [N], unweighted, fields [6, N] if ``metrics``, the gradient [N, columns of
    student] in the student's dtype).
    """
    N, columns = label.numel(), student.tensor.shape[-1]
    acc, device = inv_temperature.dtype, label.device
    loss, fields = launch.new_output((N,), acc, device), None
    if metrics:
        fields = launch.new_output((6, N), acc, device)
    dstudent = launch.new_output((N, columns), student.tensor.dtype, device)
    dstudent[:, V:].zero_()  # truncated columns
    if N == 0:
        return loss, fields, dstudent
    team = team or tuning.team(V, student, teacher)
    tile = tuning.choose(V, student, teacher, rows=N, splits=team)
    parts = launch.new_output((team, FIELDS.value, N), acc, device)
    # Interpreted, one after the other, programs cannot wait: a first launch publishes, and a second
    # one has all that it needs.
    waits = device.type != "cpu" or team == 1
    for _ in range(1 if waits else 2):
        arrived = loss.new_zeros(N + 1, dtype=torch.int32)
        with launch.on_device(device):
            one_sweep_kernel[(N * team,)](
                student.tensor, teacher.tensor, label, inv_temperature, gamma, filter_value, weight,
                denominator, parts, arrived, loss, fields, dstudent,
                *student.strides, *teacher.strides, dstudent.stride(0), student.inner,
                teacher.inner, V, N, team, LANES=tile.lanes, VEC=tile.vec,
                num_warps=tile.num_warps, ACC=launch.TL_DTYPE[acc], MERGE=tuning.merge_block(team),
                ALIGNED=launch.equally_aligned(student, teacher, student.like(dstudent)),
                LABELLED=labelled, METRICS=metrics, WAIT=waits,
            )  # fmt: skip
    return loss, fields, dstudent
