r"""From a row's sums to its loss, its metrics and the scalars of its gradient: O(rows) arithmetic
in plain PyTorch.

Everything that tells one divergence of this family from another is in this file. The kernels before
and after it (``row_sums``, ``row_grad``) and the tiled backend do not know which loss they serve.

Notation, per row, with the label's column ``y`` taken out of the sums (no label: all columns are
in, and there is no target part):

    u, v            log-odds of the label, student and teacher: q_y = sigmoid(u), p_y = sigmoid(v)
    nontarget_kl    N = KL(q^ || p^), the Kullback-Leibler divergence of the renormalised rest
    target_kl       KL(b_q || b_p), with b_q = (q_y, 1 - q_y) and b_p = (p_y, 1 - p_y)

    reverse KL      target_kl + (1 - q_y) N        (exact; without a label N itself)
    DRKL            target_kl +   gamma   N        gamma > 0

Source of DRKL: Luong, Tran, Chen, "Diversity-Aware Reverse Kullback-Leibler Divergence for Large
Language Model Distillation", arXiv 2604.00223; this is our reading of its Equation 9.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

# Labels that are no column (the kernels use the same numbers, kernels/row_walk.py).
NO_LABEL = -1  # all columns count
IGNORED = -2  # the row is not read; loss and gradient 0
INVALID = -3  # a label outside the vocabulary; loss and gradient NaN

SUMS = 9  # rows of the table of sums
SCALARS = 7  # rows of the table of gradient scalars
UNIT = 2.0**-24  # what the sums a and h are multiplied with (kernels/online_softmax.py)
MISSING = 2  # the scan's care: the teacher is -inf at a column where the student is finite

INF = float("inf")
NAN = float("nan")


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


class _Row(NamedTuple):
    """What loss and gradient share."""

    nontarget_kl: Tensor  # finite, or +inf; 0 where the student has nothing but the label
    slope: Tensor  # the mean of (s_k - m_s) - (t_k - m_t) under q^
    log_d: Tensor
    is_nan: Tensor
    is_inf: Tensor
    alone: Tensor  # the student's label is its only finite column
    u: Tensor | None = None
    v: Tensor | None = None
    no_target: Tensor | None = None  # student -inf at the label


def _read(sums: Tensor, inv_temperature: Tensor, labelled: bool, label: Tensor) -> _Row:
    """Edges are decided by the raw logits and by what the scan saw of them. A sum, a log-odds or an
    exponential that has overflowed or underflowed decides nothing: logits may be the lowest finite
    number, and a temperature may move any difference beyond it.
    """
    m_s, d_s, a, _, m_t, d_t, s_y, t_y, care = sums.unbind(0)
    log_d, log_dt = d_s.log(), d_t.log()
    empty = d_s == 0
    slope = torch.where(empty, 0.0, a / torch.where(empty, 1.0, d_s)) / UNIT
    nontarget = slope * inv_temperature + torch.where(empty, 0.0, log_dt - log_d)
    is_nan = d_s.isnan() | d_t.isnan() | (label == INVALID)
    # finite logits, too, may have a divergence that is no longer a number of this dtype
    is_inf = (care == MISSING) | ~nontarget.isfinite()
    nontarget = torch.where(is_inf, INF, nontarget)
    if not labelled:
        return _Row(
            nontarget, slope, log_d, is_nan | empty | (d_t == 0), is_inf, torch.zeros_like(empty)
        )
    # a log-sum-exp stays the pair (m, log d): rounded into one number at height 700 it would be off
    # by 3e-5
    u = (s_y - m_s) * inv_temperature - log_d
    v = (t_y - m_t) * inv_temperature - log_dt
    has_label = label >= 0
    # u, v are NaN where every column is -inf, the label's included; +inf at the label is as bad as
    # elsewhere
    nan_target = u.isnan() | v.isnan() | (s_y == INF) | (t_y == INF)
    is_nan = is_nan | torch.where(has_label, nan_target, empty | (d_t == 0))
    no_target = s_y == -INF
    is_inf = is_inf | (has_label & ~no_target & (t_y == -INF))
    alone = has_label & empty
    return _Row(nontarget, slope, log_d, is_nan, is_inf, alone, u, v, no_target)


def _times(mass: Tensor, x: Tensor) -> Tensor:
    """mass * x, and 0 where the mass is, whatever x has become: 0 log 0 = 0."""
    return torch.where(mass == 0, 0.0, mass * x)


def _target_kl(row: _Row) -> tuple[Tensor, Tensor, Tensor]:
    """(KL(b_q || b_p), q_y, 1 - q_y); each probability from its own log-odds, never by
    subtraction.
    """
    log_q, log_rest = logsigmoid(row.u), logsigmoid(-row.u)
    q, rest = log_q.exp(), log_rest.exp()
    at_label = _times(q, log_q - logsigmoid(row.v))
    return at_label + _times(rest, log_rest - logsigmoid(-row.v)), q, rest


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
    row = _read(sums, inv_temperature, labelled, label)
    has_label, ignored = label >= 0, label == IGNORED
    kl = row.nontarget_kl
    if labelled:
        target_kl, q, rest = _target_kl(row)
        loss = target_kl + _times(rest if gamma is None else gamma, kl)
        loss = torch.where(has_label, loss, kl)
    else:
        loss = kl
    loss = _finish(loss, row, ignored)
    if not metrics:
        return (loss,)
    mean = torch.where(row.log_d == -INF, 0.0, sums[3] / sums[1]) / UNIT
    entropy = row.log_d - mean * inv_temperature
    if not labelled:
        return loss, _clean(entropy, row.is_nan, ignored)
    h_target = -_times(q, logsigmoid(row.u))
    h_rest = _times(rest, entropy - logsigmoid(-row.u))
    entropy = torch.where(has_label, h_target + h_rest, entropy)
    target_kl = torch.where(~row.no_target & (sums[7] == -INF), INF, target_kl)
    p = torch.sigmoid(row.v)
    # a row without a valid label has no target part
    unknown = row.is_nan | ~has_label
    fields = (_clean(x, unknown, ignored) for x in (target_kl, kl, q, p))
    return loss, *fields, _clean(entropy, row.is_nan, ignored)


def _clean(x: Tensor, is_nan: Tensor, ignored: Tensor) -> Tensor:
    return torch.where(ignored, 0.0, torch.where(is_nan, NAN, x))


def _finish(loss: Tensor, row: _Row, ignored: Tensor) -> Tensor:
    return _clean(torch.where(row.is_inf, INF, loss), row.is_nan, ignored)


def gradient_scalars(
    sums: Tensor,
    label: Tensor,
    inv_temperature: Tensor,
    gamma: Tensor | None,
    labelled: bool,
    upstream: Tensor,
) -> Tensor:
    """The table [7, N] that turns a row into its gradient (kernels/row_grad.py says how),
    ``upstream`` [N] included.

    For k != y, with the weight W = gamma (DRKL), 1 - q_y (reverse KL) or 1 (no label) and g_y the
    label's own gradient,

        dloss/ds_k = q^_k (W (log q^_k - log p^_k - N) - g_y)
        g_y        = q_y (1 - q_y) (u - v)          DRKL
                   = q_y (1 - q_y) (u - v - N)      reverse KL

    where log q^_k - log p^_k - N = ((s_k - m_s) - (t_k - m_t) - slope) / temperature.
    """
    row = _read(sums, inv_temperature, labelled, label)
    weight, g_y = _weight_and_pull(row, label, gamma, labelled)
    is_inf = row.is_inf | ~g_y.isfinite()
    # a row that the caller weighs with 0 (num_items=0, say) has gradient 0, whatever it holds
    zero = (label == IGNORED) | (upstream == 0) | ((is_inf | row.alone) & ~row.is_nan)
    live = ~(zero | row.is_nan)
    poison = torch.where(row.is_nan & ~zero, NAN, torch.zeros_like(upstream))
    # w1 may be multiplied with the lowest finite number (a mask, where the exponential is 0), so it
    # is made small by powers of two that go to the exponential as far as that has room (``shift``).
    # Each factor takes its part, because the product may overflow before it is made small. What the
    # exponential has no room for comes back: then a product may overflow, and ``care`` is needed.
    d_s = sums[1]
    height = (upstream * weight / d_s).abs().log2() + 2 * inv_temperature.log2()
    down = (-(height + 2) / 4).floor().clamp(-128, 0)  # w1 becomes 1/64 to 1/4
    part = torch.exp2(down)
    shift = (4 * down).clamp_min(-126)
    back = torch.exp2((shift - 4 * down).clamp_max(100))
    inv_part = inv_temperature * part
    up = upstream * part * inv_part
    w1 = up * weight * inv_part / d_s * part * back
    w0 = -up * ((weight * row.slope * inv_temperature + g_y) * part) / d_s * part * back
    at_label = _times(g_y, upstream * inv_temperature)
    # shift = +inf tells the kernels that the row's gradient is 0 and need not be read
    shift = torch.where(zero, INF, torch.where(live, shift, 0.0))
    w1 = torch.where(live, w1, 0.0)
    w0, at_label = (torch.where(live, x, poison) for x in (w0, at_label))
    care = torch.maximum(sums[8], (back > 1).to(sums.dtype))
    return torch.stack([sums[0], sums[4], shift, w1, w0, at_label, care])


def _weight_and_pull(
    row: _Row, label: Tensor, gamma: Tensor | None, labelled: bool
) -> tuple[Tensor, Tensor]:
    """W and g_y of :func:`gradient_scalars`."""
    if not labelled:
        return torch.ones_like(row.slope), torch.zeros_like(row.slope)
    has_label = label >= 0
    log_q, log_rest = logsigmoid(row.u), logsigmoid(-row.u)
    pull = row.u - row.v if gamma is not None else row.u - row.v - row.nontarget_kl
    g_y = torch.where(has_label, _times((log_q + log_rest).exp(), pull), 0.0)
    return torch.where(has_label, log_rest.exp() if gamma is None else gamma, 1.0), g_y


def gradient_bound(
    sums: Tensor, label: Tensor, inv_temperature: Tensor, gamma: Tensor | None, labelled: bool
) -> Tensor:
    """What no element of a row's gradient exceeds, [N], for an upstream gradient of 1; 0 where the
    gradient is 0 or NaN.

    One term of a KL divergence, q_k log(q_k / p_k), is at least -1/e, and so at most the divergence
    plus 1/e: the others come to no less than -1/e. So with N = KL(q^ || p^)

        |q^_k (W (log q^_k - log p^_k - N) - g_y)| <= W (N + 1) + |g_y|
    """
    row = _read(sums, inv_temperature, labelled, label)
    weight, g_y = _weight_and_pull(row, label, gamma, labelled)
    bound = inv_temperature * (weight * (row.nontarget_kl + 1) + g_y.abs())
    return torch.where((label == IGNORED) | ~bound.isfinite(), 0.0, bound)


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
