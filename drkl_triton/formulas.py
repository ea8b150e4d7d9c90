"""From a row's sums to its loss, its metrics and the scalars of its gradient.

Everything that tells one divergence of this family from another is in this file. It is written in
what PyTorch and Triton have in common: ``tl`` is a handful of functions here, and triton.language
in the copy that kernels/row_map.py compiles. Upper-case arguments are known when that happens.

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

from typing import Any, NamedTuple

import torch

# Labels that are no column.
NO_LABEL = -1  # all columns count
IGNORED = -2  # the row is not read; loss and gradient 0
INVALID = -3  # a label outside the vocabulary; loss and gradient NaN

UNIT = 2.0**-24  # what the sums a and h are multiplied with (kernels/online_softmax.py)
PER_UNIT = 2.0**24
MISSING = 2  # the scan's care: the teacher is -inf at a column where the student is finite

INF = float("inf")


class tl:
    """What the formulas need of triton.language, of tensors."""

    constexpr = bool
    where, exp, exp2, log, log2 = torch.where, torch.exp, torch.exp2, torch.log, torch.log2
    abs, floor, ceil = torch.abs, torch.floor, torch.ceil
    minimum, maximum = torch.clamp_max, torch.clamp_min


class Sums(NamedTuple):
    """Of a row (kernels/row_sums.py)."""

    m_s: Any
    d_s: Any
    a: Any
    h: Any
    m_t: Any
    d_t: Any
    s_label: Any
    t_label: Any
    care: Any


class Row(NamedTuple):
    """What loss and gradient share."""

    nontarget_kl: Any  # finite, or +inf; 0 where the student has nothing but the label
    slope: Any  # the mean of (s_k - m_s) - (t_k - m_t) under q^
    log_d: Any
    is_nan: Any
    is_inf: Any
    alone: Any  # the student's label is its only finite column
    u: Any  # without labels anything, and so v
    v: Any


def read(sums, label, inv_temperature, LABELLED: tl.constexpr):
    """Edges are decided by the raw logits and by what the scan saw of them. A sum, a log-odds or an
    exponential that has overflowed or underflowed decides nothing: logits may be the lowest finite
    number, and a temperature may move any difference beyond it.
    """
    d_s, d_t = sums.d_s, sums.d_t
    log_d, log_dt = tl.log(d_s), tl.log(d_t)
    empty = d_s == 0
    slope = tl.where(empty, 0.0, sums.a / tl.where(empty, 1.0, d_s)) * PER_UNIT
    nontarget = slope * inv_temperature + tl.where(empty, 0.0, log_dt - log_d)
    is_nan = (d_s != d_s) | (d_t != d_t) | (label == INVALID)
    # finite logits, too, may have a divergence that is no longer a number of this dtype
    is_inf = (sums.care == MISSING) | ~(tl.abs(nontarget) < INF)
    nontarget = tl.where(is_inf, INF, nontarget)
    nothing = empty | (d_t == 0)
    has_label = label >= 0
    u = slope
    v = slope
    if LABELLED:
        # a log-sum-exp stays the pair (m, log d): rounded into one number at height 700 it would be
        # off by 3e-5
        u = (sums.s_label - sums.m_s) * inv_temperature - log_d
        v = (sums.t_label - sums.m_t) * inv_temperature - log_dt
        # u, v are NaN where every column is -inf, the label's included; +inf at the label is as bad
        # as elsewhere
        nan_target = (u != u) | (v != v) | (sums.s_label == INF) | (sums.t_label == INF)
        is_nan = is_nan | (has_label & nan_target) | (~has_label & nothing)
        is_inf = is_inf | (has_label & (sums.s_label != -INF) & (sums.t_label == -INF))
    else:
        is_nan = is_nan | nothing
    return Row(nontarget, slope, log_d, is_nan, is_inf, has_label & empty, u, v)


def times(mass, x):
    """mass * x, and 0 where the mass is, whatever x has become: 0 log 0 = 0."""
    return tl.where(mass == 0, 0.0, mass * x)


def divided(x, denominator):
    """x / denominator, and 0 where that is 0."""
    nothing = denominator == 0
    return tl.where(nothing, 0.0, x / tl.where(nothing, 1.0, denominator))


def log_sigmoid(x):
    """log(1 / (1 + e^-x)), precise on either side."""
    y = tl.exp(-tl.abs(x))
    w = y + 1.0
    rounded = w - 1.0  # what the sum has of y; the quotient makes up for the rest
    log1p = tl.where(rounded == 0, y, tl.log(w) * (y / tl.where(rounded == 0, 1.0, rounded)))
    return tl.minimum(x, 0.0) - log1p


def clean(x, is_nan, ignored):
    return tl.where(ignored, 0.0, tl.where(is_nan, float("nan"), x))


def losses(
    sums, label, inv_temperature, gamma, HAS_GAMMA: tl.constexpr, LABELLED: tl.constexpr,
    METRICS: tl.constexpr,
):  # fmt: skip
    """The loss of a row, then the other fields of RowMetrics: with METRICS, and those of the target
    with labels; otherwise anything.
    """
    row = read(sums, label, inv_temperature, LABELLED)
    has_label, ignored = label >= 0, label == IGNORED
    kl = row.nontarget_kl
    loss = kl
    if LABELLED:
        # each probability from its own log-odds, never by subtraction
        log_q, log_rest = log_sigmoid(row.u), log_sigmoid(-row.u)
        log_p = log_sigmoid(row.v)
        q, rest = tl.exp(log_q), tl.exp(log_rest)
        target_kl = times(q, log_q - log_p) + times(rest, log_rest - log_sigmoid(-row.v))
        weight = rest
        if HAS_GAMMA:
            weight = gamma
        loss = tl.where(has_label, target_kl + times(weight, kl), kl)
    loss = clean(tl.where(row.is_inf, INF, loss), row.is_nan, ignored)
    target = loss
    student = loss
    teacher = loss
    entropy = loss
    if METRICS:
        empty = sums.d_s == 0
        mean = tl.where(empty, 0.0, sums.h / tl.where(empty, 1.0, sums.d_s)) * PER_UNIT
        entropy = row.log_d - mean * inv_temperature
        if LABELLED:
            of_label = times(rest, entropy - log_rest) - times(q, log_q)
            entropy = tl.where(has_label, of_label, entropy)
            no_teacher = (sums.s_label != -INF) & (sums.t_label == -INF)
            # a row without a valid label has no target part
            unknown = row.is_nan | ~has_label
            target = clean(tl.where(no_teacher, INF, target_kl), unknown, ignored)
            kl = clean(kl, unknown, ignored)
            student = clean(q, unknown, ignored)
            teacher = clean(tl.exp(log_p), unknown, ignored)
        entropy = clean(entropy, row.is_nan, ignored)
    return loss, target, kl, student, teacher, entropy


def weight_and_pull(row, label, gamma, HAS_GAMMA: tl.constexpr, LABELLED: tl.constexpr):
    """W and g_y of :func:`gradient_scalars`."""
    g_y = tl.where(label == label, 0.0, row.slope)
    weight = g_y + 1
    if LABELLED:
        has_label = label >= 0
        log_q, log_rest = log_sigmoid(row.u), log_sigmoid(-row.u)
        pull = row.u - row.v
        if HAS_GAMMA:
            weight = tl.where(has_label, gamma, 1.0)
        else:
            pull = pull - row.nontarget_kl
            weight = tl.where(has_label, tl.exp(log_rest), 1.0)
        g_y = tl.where(has_label, times(tl.exp(log_q + log_rest), pull), 0.0)
    return weight, g_y


def gradient_scalars(
    sums, label, inv_temperature, gamma, upstream, HAS_GAMMA: tl.constexpr, LABELLED: tl.constexpr
):
    """What turns a row into its gradient (kernels/row_grad.py says how), ``upstream`` included.

    For k != y, with the weight W = gamma (DRKL), 1 - q_y (reverse KL) or 1 (no label) and g_y the
    label's own gradient,

        dloss/ds_k = q^_k (W (log q^_k - log p^_k - N) - g_y)
        g_y        = q_y (1 - q_y) (u - v)          DRKL
                   = q_y (1 - q_y) (u - v - N)      reverse KL

    where log q^_k - log p^_k - N = ((s_k - m_s) - (t_k - m_t) - slope) / temperature.
    """
    row = read(sums, label, inv_temperature, LABELLED)
    weight, g_y = weight_and_pull(row, label, gamma, HAS_GAMMA, LABELLED)
    is_inf = row.is_inf | ~(tl.abs(g_y) < INF)
    # a row that the caller weighs with 0 (num_items=0, say) has gradient 0, whatever it holds
    zero = (label == IGNORED) | (upstream == 0) | ((is_inf | row.alone) & ~row.is_nan)
    live = ~(zero | row.is_nan)
    # w1 may be multiplied with the lowest finite number (a mask, where the exponential is 0), so it
    # is made small by powers of two that go to the exponential as far as that has room (``shift``).
    # Each factor takes its part, because the product may overflow before it is made small. What the
    # exponential has no room for comes back: then a product may overflow, and ``care`` is needed.
    d_s = sums.d_s
    height = tl.log2(tl.abs(upstream * weight / d_s)) + 2 * tl.log2(inv_temperature)
    # -126 and not less: a GPU's exp2 flushes
    down = tl.minimum(tl.maximum(tl.floor(-(height + 2) / 4), -126.0), 0.0)
    part = tl.exp2(down)  # w1 becomes 1/64 to 1/4
    shift = tl.maximum(4 * down, -126.0)
    back = tl.exp2(tl.minimum(shift - 4 * down, 100.0))
    inv_part = inv_temperature * part
    up = upstream * part * inv_part
    w1 = up * weight * inv_part / d_s * part * back
    w0 = -up * ((weight * row.slope * inv_temperature + g_y) * part) / d_s * part * back
    at_label = times(g_y, upstream * inv_temperature)
    # shift = +inf tells the kernels that the row's gradient is 0 and need not be read
    shift = tl.where(zero, INF, tl.where(live, shift, 0.0))
    w1 = tl.where(live, w1, 0.0)
    w0 = clean(w0, row.is_nan, zero)
    at_label = clean(at_label, row.is_nan, zero)
    care = tl.where((back > 1) & (sums.care < 1), 1.0, sums.care)
    return sums.m_s, sums.m_t, shift, w1, w0, at_label, care


def gradient_bound(
    sums, label, inv_temperature, gamma, HAS_GAMMA: tl.constexpr, LABELLED: tl.constexpr
):
    """What no element of a row's gradient exceeds, for an upstream gradient of 1; 0 where the
    gradient is 0 or NaN.

    One term of a KL divergence, q_k log(q_k / p_k), is at least -1/e, and so at most the divergence
    plus 1/e: the others come to no less than -1/e. So with N = KL(q^ || p^)

        |q^_k (W (log q^_k - log p^_k - N) - g_y)| <= W (N + 1) + |g_y|
    """
    row = read(sums, label, inv_temperature, LABELLED)
    weight, g_y = weight_and_pull(row, label, gamma, HAS_GAMMA, LABELLED)
    bound = inv_temperature * (weight * (row.nontarget_kl + 1) + tl.abs(g_y))
    return tl.where((label == IGNORED) | ~(bound < INF), 0.0, bound)


# A row whose gradient in float16 could exceed 2^15 is multiplied by a power of two of at least
# 2^FLOAT16_ROOM.
FLOAT16_ROOM = -10


def float16_room(bound, upstream):
    """The power of two, at most 1, that keeps a row's gradient inside float16."""
    size = tl.abs(bound * upstream)
    bits = tl.ceil(tl.log2(tl.where(size > 0, size, 1.0)))  # 1 for NaN, too
    return tl.exp2(tl.minimum(tl.maximum(15.0 - bits, FLOAT16_ROOM), 0.0))
