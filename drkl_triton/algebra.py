"""The tables of sums and of gradient scalars, in plain PyTorch: the formulas applied to them, and
sums merged.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import formulas
from .formulas import IGNORED, INVALID, MISSING, NO_LABEL, UNIT, Sums

__all__ = ["IGNORED", "INVALID", "MISSING", "NO_LABEL", "UNIT", "RowMetrics"]

SUMS = 9  # rows of the table of sums
SCALARS = 7  # rows of the table of gradient scalars


class RowMetrics(NamedTuple):
    """Per-token diagnostics of a loss: detached, unweighted, at the loss's temperature, in nats.

    Every field has the leading shape ``[...]`` of the logits and dtype float32 (float64 where
    either side of the loss is float64). Rows that are ignored hold 0: for means take ``mean()``.
    Without labels there is no target, and the fields marked * are None.
    """

    loss: Tensor  #: the loss itself, before weight and reduction
    target_kl: Tensor | None  #: * KL(b_q || b_p), the two-point part at the label
    nontarget_kl: (
        Tensor | None
    )  #: * N = KL(q^ || p^) over the other columns, without gamma and without 1 - q_y
    student_target_prob: Tensor | None  #: * q_y
    teacher_target_prob: Tensor | None  #: * p_y
    student_entropy: Tensor  #: -sum q log q
    counted: Tensor  #: bool: the row is not ignored; of :meth:`mean` the number of such rows

    @classmethod
    def of(cls, *fields: Tensor, codes: Tensor) -> RowMetrics:
        """From what :func:`losses` returns, [N] each, and the rows' labels [...]."""
        loss, *rest = (x.detach().view(codes.shape) for x in fields)
        loss = loss.clone()  # the caller may write into the loss, which is these numbers
        return cls(loss, *[None] * (5 - len(rest)), *rest, codes != IGNORED)

    def mean(self) -> RowMetrics:
        """Means over the rows that count, 0-dim; 0 without one. On each process its own: to mean
        over several, add up sums and ``counted``.
        """
        *fields, counted = self
        count = counted.sum()
        divisor = count.clamp_min(1)
        return RowMetrics(*(None if x is None else x.sum() / divisor for x in fields), count)


def losses(
    sums: Tensor,
    label: Tensor,
    inv_temperature: Tensor,
    gamma: Tensor | None,
    labelled: bool,
    metrics: bool,
) -> tuple[Tensor, ...]:
    """The loss of every row, [N]; with ``metrics`` also the fields of RowMetrics after it (those it
    has without labels).

    sums [9, N]; label int64 [N]; gamma None: reverse KL; labelled: whether the caller gave labels
    at all.
    """
    out = formulas.losses(
        Sums(*sums.unbind(0)), label, inv_temperature, gamma, gamma is not None, labelled, metrics
    )
    return out if metrics and labelled else (out[0], out[5]) if metrics else out[:1]


def gradient_scalars(
    sums: Tensor,
    label: Tensor,
    inv_temperature: Tensor,
    gamma: Tensor | None,
    labelled: bool,
    upstream: Tensor,
) -> Tensor:
    """The table [7, N] that turns a row into its gradient, ``upstream`` [N] included."""
    return torch.stack(
        formulas.gradient_scalars(
            Sums(*sums.unbind(0)), label, inv_temperature, gamma, upstream, gamma is not None,
            labelled,
        )
    )  # fmt: skip


def gradient_bound(
    sums: Tensor, label: Tensor, inv_temperature: Tensor, gamma: Tensor | None, labelled: bool
) -> Tensor:
    """[N]: what no element of a row's gradient exceeds."""
    return formulas.gradient_bound(
        Sums(*sums.unbind(0)), label, inv_temperature, gamma, gamma is not None, labelled
    )


def merge(left: Tensor, right: Tensor, inv_temperature: Tensor) -> Tensor:
    """The sums [9, N] of two disjoint sets of columns from the sums of each (formulas:
    kernels/online_softmax.py).

    The label's logits are taken from whichever side has them; the other side holds -inf.
    """
    top_s = torch.maximum(left[0], right[0])
    top_t = torch.maximum(left[4], right[4])
    parts = [_moved(part, top_s, top_t, inv_temperature) for part in (left, right)]
    d_s, a, h, d_t = (x + y for x, y in zip(*parts, strict=True))
    rest = torch.maximum(left[6:], right[6:])
    return torch.cat([torch.stack([top_s, d_s, a, h, top_t, d_t]), rest])


def _moved(
    part: Tensor, top_s: Tensor, top_t: Tensor, inv_temperature: Tensor
) -> tuple[Tensor, ...]:
    m_s, d_s, a, h, m_t, d_t = part[:6].unbind(0)
    down_s, down_t = m_s - top_s, m_t - top_t
    rescale = torch.exp(down_s * inv_temperature)
    d_s = d_s * rescale
    empty = d_s == 0  # down_s may be anything there, and 0 * inf is NaN
    a = rescale * a + d_s * torch.where(empty, 0.0, down_s * UNIT - down_t * UNIT)
    h = rescale * h + d_s * torch.where(empty, 0.0, down_s * UNIT)
    return d_s, a, h, d_t * torch.exp(down_t * inv_temperature)
