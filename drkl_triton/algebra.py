"""The table of sums [16, N] (facts.Sums), merged; and what a loss tells of its rows."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import facts
from .facts import IGNORED, UNIT, Sums

SUMS, WEIGHTS = len(Sums._fields), len(facts.Weights._fields)  # rows of the tables
AT = Sums(*range(SUMS))  # the row of a sum
AT_WEIGHT = facts.Weights(*range(WEIGHTS))
STATE = slice(0, AT.s_label)  # what is relative to maxima


class RowMetrics(NamedTuple):
    """Per-token diagnostics of a loss: detached, unweighted, at the loss's temperature, in nats.

    Every field has the leading shape ``[...]`` of the logits and dtype float32 (float64 where
    either side of the loss is float64). Rows that are ignored hold 0: for means take ``mean()``.
    Without labels there is no target, and the fields marked * are None; without a teacher
    (cross-entropy) those marked + are. They mean the same whichever loss they come with.
    """

    loss: Tensor  #: the loss itself, before weight and reduction
    target_kl: Tensor | None  #: *+ KL(b_q || b_p), the two-point part at the label
    nontarget_kl: (
        Tensor | None
    )  #: *+ N = KL(q^ || p^) over the other columns, without gamma and without 1 - q_y
    student_target_prob: Tensor | None  #: * q_y
    teacher_target_prob: Tensor | None  #: *+ p_y
    student_entropy: Tensor  #: -sum q log q
    teacher_entropy: Tensor | None  #: + -sum p log p
    counted: Tensor  #: bool: the row is not ignored; of :meth:`mean` the number of such rows

    @classmethod
    def of(cls, fields: Tensor, codes: Tensor, labelled: bool, teacher: bool) -> RowMetrics:
        """From the fields [7, N] (facts.losses) and the rows' labels [...]."""
        loss, *rest = (x.detach().view(codes.shape) for x in fields.unbind(0))
        loss = loss.clone()  # the caller may write into the loss, which is these numbers
        both = labelled and teacher
        there = both, both, labelled, both, True, teacher
        rest = (x if is_there else None for x, is_there in zip(rest, there, strict=True))
        return cls(loss, *rest, codes != IGNORED)

    def mean(self) -> RowMetrics:
        """Means over the rows that count, 0-dim; 0 without one. On each process its own: to mean
        over several, add up sums and ``counted``.
        """
        *fields, counted = self
        count = counted.sum()
        divisor = count.clamp_min(1)
        return RowMetrics(*(None if x is None else x.sum() / divisor for x in fields), count)


def formula_arguments(sums, label, inv_temperature, parameters):
    """The first arguments of the functions of facts.py."""
    parameters = () if parameters is None else parameters.unbind(0)
    return Sums(*sums.unbind(0)), label, inv_temperature, parameters


def with_outside(sums: Tensor, x: Tensor, z: Tensor, inv_temperature: Tensor) -> Tensor:
    """The sums [16, N] with one more column, of logits x, z [N], in the normalisers alone: its
    terms are what makes nothing of them in the divergences.
    """
    top_s, top_t = torch.maximum(sums[AT.m_s], x), torch.maximum(sums[AT.m_t], z)
    d_s, a, h, d_t, b, g, c = moved(sums, top_s, top_t, inv_temperature)
    q, p = torch.exp((x - top_s) * inv_temperature), torch.exp((z - top_t) * inv_temperature)
    d_s, d_t = d_s + q, d_t + p
    # in raw logits, as the sums are
    log_d, log_dt = torch.log(d_s) / inv_temperature, torch.log(d_t) / inv_temperature
    out = sums.clone()
    out[AT.m_s], out[AT.d_s], out[AT.m_t], out[AT.d_t] = top_s, d_s, top_t, d_t
    out[AT.a] = a + facts.times(q, log_d - log_dt) * UNIT
    out[AT.b] = b + facts.times(p, log_dt - log_d) * UNIT
    out[AT.h] = h + facts.times(q, log_d) * UNIT
    out[AT.g] = g + facts.times(p, log_dt) * UNIT
    return out


def merge(left: Tensor, right: Tensor, inv_temperature: Tensor) -> Tensor:
    """The sums [16, N] of two disjoint sets of columns from the sums of each (formulas:
    kernels/online_softmax.py).

    The label's logits are taken from whichever side has them; the other side holds -inf.
    """
    top_s = torch.maximum(left[AT.m_s], right[AT.m_s])
    top_t = torch.maximum(left[AT.m_t], right[AT.m_t])
    parts = [moved(part, top_s, top_t, inv_temperature) for part in (left, right)]
    d_s, a, h, d_t, b, g, c = (x + y for x, y in zip(*parts, strict=True))
    state = torch.stack([top_s, d_s, a, h, top_t, d_t, b, g, c])
    return torch.cat([state, torch.maximum(left[AT.s_label :], right[AT.s_label :])])


def moved(
    part: Tensor, top_s: Tensor, top_t: Tensor, inv_temperature: Tensor
) -> tuple[Tensor, ...]:
    """(d_s, a, h, d_t, b, g, c) relative to other maxima."""
    m_s, d_s, a, h, m_t, d_t, b, g, c = part[STATE].unbind(0)
    down_s, down_t = m_s - top_s, m_t - top_t
    rescale = torch.exp(down_s * inv_temperature)
    d_s = d_s * rescale
    empty = d_s == 0  # down_s may be anything there, and 0 * inf is NaN
    a = rescale * a + d_s * torch.where(empty, 0.0, down_s * UNIT - down_t * UNIT)
    h = rescale * h + d_s * torch.where(empty, 0.0, down_s * UNIT)
    c = c * torch.exp(down_s)
    rescale = torch.exp(down_t * inv_temperature)
    d_t = d_t * rescale
    empty = d_t == 0
    b = rescale * b + d_t * torch.where(empty, 0.0, down_t * UNIT - down_s * UNIT)
    g = rescale * g + d_t * torch.where(empty, 0.0, down_t * UNIT)
    return d_s, a, h, d_t, b, g, c
