"""From a row's sums to the numbers its divergence is a function of (Facts), and from how a loss
moves with them (Slopes) to the numbers of its gradient (Weights).

It is written in what PyTorch and Triton have in common: ``tl`` is a handful of functions here, and
triton.language in the copies that kernels/device.py compiles. Upper-case arguments are known when
that happens.

Notation, per row, with the label's column ``y`` taken out of the sums (no label: nothing is taken
out, and q_y = p_y = 0):

    q, p            student's and teacher's distributions at the loss's temperature
    q^, p^          the same over the columns k != y, renormalised
    x_k, z_k        s_k - m_s and t_k - m_t: raw logits below the maximum of those columns
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ._tile import exp, or_tiles, where

# Labels that are no column.
NO_LABEL = -1  # all columns count
IGNORED = -2  # the row is not read; loss and gradient 0
INVALID = -3  # a label outside the vocabulary; loss and gradient NaN
ELSEWHERE = -4  # a column of another rank (_shard.py)

UNIT = 2.0**-24  # what the sums of logits are multiplied with (kernels/online_softmax.py)
PER_UNIT = 2.0**24
MISSING = 2  # the scan's care: the teacher is -inf at a column where the student is finite

INF = float("inf")
ABSENT = -1e30  # the logarithm that pointwise terms get of a probability that is 0

# What a scan sums beside m_s and d_s; bits of NEEDS.
TEACHER = 1  # m_t, d_t
REVERSE = 2  # a
FORWARD = 4  # b
ENTROPY = 8  # h
TEACHER_ENTROPY = 16  # g
UNTEMPERED = 32  # c, where the temperature is not 1
GAPS = 64  # gap_head, gap_tail, which take sweeps of their own
PHI_ALONE = 128  # of slopes: the objective has pointwise terms and no other
SKEWED = 256  # the teacher is a Mixture
METRICS = TEACHER + REVERSE + ENTROPY + TEACHER_ENTROPY


def _maximum(x, y, **out):
    return (torch.maximum if isinstance(y, torch.Tensor) else torch.clamp_min)(x, y, **out)


def _minimum(x, y, **out):
    return (torch.minimum if isinstance(y, torch.Tensor) else torch.clamp_max)(x, y, **out)


class tl:
    """What the formulas need of triton.language, of tensors."""

    constexpr = bool
    float64 = torch.float64
    static_range = range
    where, exp, exp2, log, log2 = where, exp, *map(or_tiles, (torch.exp2, torch.log, torch.log2))
    abs, floor, ceil = map(or_tiles, (torch.abs, torch.floor, torch.ceil))
    maximum, minimum = or_tiles(_maximum), or_tiles(_minimum)


class Sums(NamedTuple):
    """Of a row (kernels/online_softmax.py, kernels/row_sums.py). What is not needed is 0."""

    m_s: Any
    d_s: Any
    a: Any
    h: Any
    m_t: Any
    d_t: Any
    b: Any
    g: Any
    c: Any
    s_label: Any
    t_label: Any
    care: Any
    # the last four of a skewed teacher: its Mixture
    gap_head: Any  # _loss.py, where the objective asks for them
    gap_tail: Any
    phi: Any  # kernels/row_phi.py, where the objective has pointwise terms
    phi_slope: Any


class Mixture(NamedTuple):
    """Of a row, what makes a skewed teacher of its logits: w q_k = exp((s_k - m_s) / temperature +
    log_q) and (1 - w) p_k likewise.
    """

    m_s: Any
    log_q: Any
    m_t: Any
    log_p: Any


class Facts(NamedTuple):
    """What a separable divergence is a function of, [N] each: log-probabilities and Kullback-
    Leibler divergences in nats, at the loss's temperature where nothing else is said. A row without
    a label has log_q = log_p = u = v = -inf.
    """

    u: Any  #: the label's log-odds, log q_y - log (1 - q_y)
    v: Any  #: the teacher's
    log_q: Any  #: log q_y
    log_rest: Any  #: log (1 - q_y)
    log_p: Any  #: log p_y
    log_p_rest: Any  #: log (1 - p_y)
    qp: Any  #: KL(q^ || p^)
    pq: Any  #: KL(p^ || q^)
    entropy: Any  #: of q^
    teacher_entropy: Any  #: of p^
    label_log_prob: Any  #: log q_y at temperature 1
    log_z: Any  #: logsumexp of the student's logits, at temperature 1
    gap_head: Any  #: sum |q - p| over the teacher's head (adaptive_kl), a constant
    gap_tail: Any  #: the same over all other columns


class Slopes(NamedTuple):
    """A loss and its derivatives by the Facts of the student. u moves with log_q and log_rest: what
    is said of it is not said again of them.
    """

    loss: Any
    u: Any = 0.0
    log_q: Any = 0.0
    log_rest: Any = 0.0
    qp: Any = 0.0
    pq: Any = 0.0
    entropy: Any = 0.0
    label_log_prob: Any = 0.0
    log_z: Any = 0.0
    phi: Any = 0.0  # pointwise divergences' own: the sum of their slopes


class Row(NamedTuple):
    """What Facts leave out: which kind of row it is, and what the weights need."""

    is_nan: Any
    no_teacher: Any  # the teacher is -inf where the student is not: KL(q || p) is +inf
    no_student: Any  # the reverse
    ratio: Any  # the mean of x_k - z_k under q^
    mean: Any  # the mean of x_k under q^
    log_d: Any
    log_dt: Any
    rest: Any  # 1 - q_y at temperature 1
    phi: Any
    phi_slope: Any


class Weights(NamedTuple):
    """What the gradient of a row is made of (kernels/row_grad.py)."""

    m_s: Any
    m_t: Any
    shift: Any
    w1: Any
    w0: Any
    at_label: Any
    care: Any
    w2: Any
    w3: Any
    w4: Any
    phi: Any  # of a skewed teacher these are its Mixture but for m_s, in this order: m_t, log_q,
    log_q: Any  # log_p
    log_p: Any


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


def is_column(label):
    """Of the vocabulary, here or on another rank."""
    return (label >= 0) | (label == ELSEWHERE)


def facts(sums, label, inv_temperature, NEEDS: tl.constexpr):
    """(Facts, Row). Edges are decided by the raw logits and by what the scan saw of them. A sum, a
    log-odds or an exponential that has overflowed or underflowed decides nothing: logits may be the
    lowest finite number, and a temperature may move any difference beyond it.
    """
    d_s, d_t = sums.d_s, sums.d_t
    log_d, log_dt = tl.log(d_s), tl.log(d_t)
    empty, empty_t = d_s == 0, d_t == 0
    has_label = is_column(label)
    ratio = divided(sums.a, d_s) * PER_UNIT
    mean = divided(sums.h, d_s) * PER_UNIT
    qp = ratio * inv_temperature + tl.where(empty, 0.0, log_dt - log_d)
    pq = divided(sums.b, d_t) * PER_UNIT * inv_temperature
    pq += tl.where(empty_t, 0.0, log_d - log_dt)
    # finite logits, too, may have a divergence that is no longer a number of this dtype
    qp = tl.where((sums.care == MISSING) | ~(tl.abs(qp) < INF), INF, qp)
    pq = tl.where(tl.abs(pq) < INF, pq, INF)
    entropy = tl.where(empty, 0.0, log_d - mean * inv_temperature)
    mean_t = divided(sums.g, d_t) * PER_UNIT
    entropy_t = tl.where(empty_t, 0.0, log_dt - mean_t * inv_temperature)

    # a log-sum-exp stays the pair (m, log d): rounded into one number at height 700 it would be off
    # by 3e-5
    s_label, t_label = sums.s_label, sums.t_label
    u = tl.where(has_label, (s_label - sums.m_s) * inv_temperature - log_d, -INF)
    v = tl.where(has_label, (t_label - sums.m_t) * inv_temperature - log_dt, -INF)
    # u, v are NaN where every column is -inf, the label's included; +inf at the label is as bad as
    # elsewhere
    is_nan = (d_s != d_s) | (label == INVALID) | (u != u) | (has_label & (s_label == INF))
    is_nan = is_nan | (~has_label & empty)
    if TEACHER & NEEDS:
        is_nan = is_nan | (d_t != d_t) | (v != v) | (has_label & (t_label == INF))
        is_nan = is_nan | (~has_label & empty_t)
    no_teacher = (qp == INF) | (has_label & (s_label != -INF) & (t_label == -INF))
    no_student = (pq == INF) | (has_label & (t_label != -INF) & (s_label == -INF))

    log_q, log_rest = log_sigmoid(u), log_sigmoid(-u)
    label_log_prob = log_q
    cool_rest = log_rest
    log_c = log_d
    odds = u
    if UNTEMPERED & NEEDS:
        log_c = tl.log(sums.c)
        odds = tl.where(has_label, (s_label - sums.m_s) - log_c, -INF)
        label_log_prob = log_sigmoid(odds)
        cool_rest = log_sigmoid(-odds)
    # whichever is larger, the label or the rest, so that little is added to it
    log_z = tl.where(odds > 0, s_label - label_log_prob, sums.m_s + (log_c - cool_rest))
    f = Facts(
        u, v, log_q, log_rest, log_sigmoid(v), log_sigmoid(-v), qp, pq, entropy, entropy_t,
        label_log_prob, log_z, sums.gap_head, sums.gap_tail,
    )  # fmt: skip
    return f, Row(
        is_nan, no_teacher, no_student, ratio, mean, log_d, log_dt, tl.exp(cool_rest),
        sums.phi, sums.phi_slope,
    )  # fmt: skip


def plus(a, b):
    return Slopes(
        a.loss + b.loss, a.u + b.u, a.log_q + b.log_q, a.log_rest + b.log_rest, a.qp + b.qp,
        a.pq + b.pq, a.entropy + b.entropy, a.label_log_prob + b.label_log_prob, a.log_z + b.log_z,
        a.phi + b.phi,
    )  # fmt: skip


def scaled(w, a):
    return Slopes(
        w * a.loss, w * a.u, w * a.log_q, w * a.log_rest, w * a.qp, w * a.pq, w * a.entropy,
        w * a.label_log_prob, w * a.log_z, w * a.phi,
    )  # fmt: skip


def some_of(x, first: tl.constexpr, count: tl.constexpr):
    part = ()
    for k in tl.static_range(count):
        part = part + (x[first + k],)
    return part


# A term of an objective is (its function, where its weight is among the parameters or -1, where its
# own parameters start there, how many they are, the Facts that make it infinite).


def floored(log_probability):
    return tl.maximum(log_probability, ABSENT)


def pointwise(log_q, log_p, x, PHIS: tl.constexpr):
    """(value, slope) of the sum of an objective's pointwise terms, where that has any, from
    :func:`floored` log-probabilities.
    """
    value = log_q
    slope = log_q
    for k in tl.static_range(len(PHIS)):
        v, s = PHIS[k][0](log_q, log_p, *some_of(x, PHIS[k][2], PHIS[k][3]))
        if PHIS[k][1] >= 0:
            v = v * x[PHIS[k][1]]
            s = s * x[PHIS[k][1]]
        value = v if k == 0 else value + v
        slope = s if k == 0 else slope + s
    return value, slope


def objective(f, row, x, TERMS: tl.constexpr, PHIS: tl.constexpr):
    """(Slopes, whether the loss is +inf). x: the parameters. A term makes its row infinite
    whatever its weight is.
    """
    no = tl.where(row.is_nan, 0.0, 0.0 * row.rest)
    total = Slopes(no, no, no, no, no, no, no, no, no, no)
    is_inf = row.is_nan & ~row.is_nan
    for k in tl.static_range(len(TERMS)):
        S = TERMS[k][0](f, *some_of(x, TERMS[k][2], TERMS[k][3]))
        is_inf = is_inf | (S.loss == INF)
        if REVERSE & TERMS[k][4]:
            is_inf = is_inf | row.no_teacher
        if FORWARD & TERMS[k][4]:
            is_inf = is_inf | row.no_student
        if TERMS[k][1] >= 0:
            S = scaled(x[TERMS[k][1]], S)
        total = plus(total, S)
    if len(PHIS) > 0:
        # every column is (1 - q_y) q^_k, so that all of them move with log_rest
        value, slope = pointwise(floored(f.log_q), floored(f.log_p), x, PHIS)
        S = Slopes(value + row.phi, log_q=slope, log_rest=row.phi_slope, phi=row.phi_slope)
        is_inf = is_inf | (tl.abs(S.loss) == INF)
        total = plus(total, S)
    return total, is_inf


METRIC_FIELDS = (
    "loss", "target_kl", "nontarget_kl", "student_target_prob", "teacher_target_prob",
    "student_entropy", "teacher_entropy",
)  # fmt: skip


def losses(
    sums, label, inv_temperature, x, TERMS: tl.constexpr, PHIS: tl.constexpr,
    NEEDS: tl.constexpr, METRICS: tl.constexpr,
):  # fmt: skip
    """The loss of a row, then, with METRICS, the other fields of RowMetrics."""
    f, row = facts(sums, label, inv_temperature, NEEDS)
    has_label, ignored = is_column(label), label == IGNORED
    S, is_inf = objective(f, row, x, TERMS, PHIS)
    loss = clean(tl.where(is_inf, INF, S.loss), row.is_nan, ignored)
    target = loss
    kl = loss
    student = loss
    teacher = loss
    entropy = loss
    teacher_entropy = loss
    if METRICS:
        target = target_kl(f)
        no_teacher = has_label & (sums.s_label != -INF) & (sums.t_label == -INF)
        # a row without a valid label has no target part
        unknown = row.is_nan | ~has_label
        target = clean(tl.where(no_teacher, INF, target), unknown, ignored)
        kl = clean(f.qp, unknown, ignored)
        student = clean(tl.exp(f.log_q), unknown, ignored)
        teacher = clean(tl.exp(f.log_p), unknown, ignored)
        entropy = clean(whole_entropy(f.log_q, f.log_rest, f.entropy), row.is_nan, ignored)
        teacher_entropy = whole_entropy(f.log_p, f.log_p_rest, f.teacher_entropy)
        teacher_entropy = clean(teacher_entropy, row.is_nan, ignored)
    return loss, target, kl, student, teacher, entropy, teacher_entropy


def target_kl(f):
    """KL(b_q || b_p)."""
    return two_point_kl(f.log_q, f.log_rest, f.log_p, f.log_p_rest)


def two_point_kl(log_a, log_rest_a, log_b, log_rest_b):
    """Each probability from its own log-odds, never by subtraction."""
    at, rest = log_a - log_b, log_rest_a - log_rest_b
    return times(tl.exp(log_a), at) + times(tl.exp(log_rest_a), rest)


def whole_entropy(log_q, log_rest, entropy):
    """Of all columns, from the label's probability and the entropy of the rest."""
    return times(tl.exp(log_rest), entropy - log_rest) - times(tl.exp(log_q), log_q)


def on_rest(S, rest):
    """What the derivative by any s_k, k != y, has of q^_k alone."""
    return (S.pq + S.log_rest - S.phi) - (S.log_q + S.log_rest) * rest - S.u


def weights(
    sums, label, inv_temperature, x, upstream, TERMS: tl.constexpr, PHIS: tl.constexpr,
    NEEDS: tl.constexpr,
):  # fmt: skip
    """What turns a row into its gradient (kernels/row_grad.py says how), ``upstream`` included.

    With the derivatives L_* of the loss by its Facts, for k != y,

        dloss/ds_k = q^_k (L_qp (log q^_k - log p^_k - qp) - L_entropy (log q^_k + entropy)
                           + L_pq - L_u + L_rest - (L_q + L_rest) (1 - q_y)) - L_pq p^_k
        dloss/ds_y = L_u + L_q (1 - q_y) - L_rest q_y

    over the temperature, and with those by the two Facts at temperature 1, of which

        dlabel_log_prob/ds_k = -q_k     dlog_z/ds_k = q_k     (and 1 - q_y, q_y at the label)
    """
    f, row = facts(sums, label, inv_temperature, NEEDS)
    S, is_inf = objective(f, row, x, TERMS, PHIS)
    q, rest = tl.exp(f.log_q), tl.exp(f.log_rest)
    level_rest = on_rest(S, rest)
    g_y = S.u + times(rest, S.log_q) - times(q, S.log_rest)
    cool = times(row.rest, S.log_z - S.label_log_prob)
    cool_y = times(row.rest, S.label_log_prob) + times(tl.exp(f.label_log_prob), S.log_z)
    d_s = tl.where(sums.d_s == 0, 1.0, sums.d_s)
    w4 = cool * 0.0
    at_label = times(g_y, upstream * inv_temperature)
    if UNTEMPERED & NEEDS:
        w4 = upstream * cool / tl.where(sums.c == 0, 1.0, sums.c)
        at_label += times(cool_y, upstream)
    else:
        level_rest += cool
        at_label += times(cool_y, upstream * inv_temperature)
    has_label = is_column(label)
    nothing = has_label & (sums.d_s == 0) & (at_label == 0)  # the label is all that there is
    is_inf = is_inf | ~(tl.abs(g_y) < INF)
    # a row that the caller weighs with 0 (num_items=0, say) has gradient 0, whatever it holds
    zero = (label == IGNORED) | (upstream == 0) | ((is_inf | nothing) & ~row.is_nan)
    live = ~(zero | row.is_nan)
    # w1 and w3 may be multiplied with the lowest finite number (a mask, where the exponential is
    # 0), so they are made small by powers of two that go to the exponential as far as that has room
    # (``shift``). Each factor takes its part, because the product may overflow before it is made
    # small. What the exponential has no room for comes back: then a product may overflow, and
    # ``care`` is needed.
    steepest = tl.maximum(tl.abs(S.qp), tl.abs(S.entropy))
    height = tl.log2(tl.abs(upstream * steepest / d_s)) + 2 * tl.log2(inv_temperature)
    # -126 and not less: a GPU's exp2 flushes
    down = tl.minimum(tl.maximum(tl.floor(-(height + 2) / 4), -126.0), 0.0)
    part = tl.exp2(down)  # w1 becomes 1/64 to 1/4
    shift = tl.maximum(4 * down, -126.0)
    back = tl.exp2(tl.minimum(shift - 4 * down, 100.0))
    inv_part = inv_temperature * part
    up = upstream * part * inv_part
    w1 = up * S.qp * inv_part / d_s * part * back
    w3 = -up * S.entropy * inv_part / d_s * part * back
    level = times(S.qp, row.ratio) * inv_temperature - S.entropy * row.mean * inv_temperature
    w0 = up * ((level_rest - level) * part) / d_s * part * back
    w2 = -divided(S.pq, sums.d_t) * (upstream * inv_temperature)
    if len(TERMS) == 0:
        w0 = -(S.log_q + S.log_rest)  # what q_k is multiplied with, beside phi's slope
    # shift = +inf tells the kernels that the row's gradient is 0 and need not be read
    shift = tl.where(zero, INF, tl.where(live, shift, 0.0))
    w0 = clean(w0, row.is_nan, zero)
    at_label = clean(at_label, row.is_nan, zero)
    care = tl.where((back > 1) & (sums.care < 1), 1.0, sums.care)
    phi = tl.where(live, upstream * inv_temperature, 0.0)
    log_q, log_p = normalisers(sums, f, row)
    if SKEWED & NEEDS:
        log_q, phi, log_p = sums.gap_tail, sums.phi, sums.phi_slope
    return Weights(
        sums.m_s, sums.m_t, shift, tl.where(live, w1, 0.0), w0, at_label, care,
        tl.where(live, w2, 0.0), tl.where(live, w3, 0.0), tl.where(live, w4, 0.0), phi, log_q,
        log_p,
    )  # fmt: skip


def normalised(sums, label, inv_temperature, NEEDS: tl.constexpr):
    """:func:`normalisers` from the sums."""
    f, row = facts(sums, label, inv_temperature, NEEDS)
    return normalisers(sums, f, row)


def normalisers(sums, f, row):
    """(of the student, of the teacher): log q_k = x_k / temperature plus this, for k != y."""
    log_q = tl.where(sums.d_s == 0, 0.0, f.log_rest - row.log_d)
    return log_q, tl.where(sums.d_t == 0, 0.0, f.log_p_rest - row.log_dt)


def log_add(a, b):
    """log(e^a + e^b); maximum() would lose a NaN."""
    log_sum = tl.where(a > b, a, b) + tl.log(1.0 + tl.exp(-tl.abs(a - b)))
    return tl.where((a == -INF) & (b == -INF), -INF, log_sum)


def skewed(s, t, mixture, inv_temperature):
    """The skewed teacher's logit, from both models': temperature log(w q + (1 - w) p)."""
    log_q = (s - mixture.m_s) * inv_temperature + mixture.log_q
    log_p = (t - mixture.m_t) * inv_temperature + mixture.log_p
    return log_add(log_q, log_p) * (1.0 / inv_temperature)


def mixture(sums, label, inv_temperature, skew):
    """(Mixture, the label's logit), from the sums of both models."""
    f, row = facts(sums, label, inv_temperature, TEACHER)
    of_q, of_p = tl.log(skew), tl.log(1.0 - skew)
    log_q, log_p = normalisers(sums, f, row)
    at_label = log_add(f.log_q + of_q, f.log_p + of_p) / inv_temperature
    at_label = tl.where(row.is_nan, float("nan"), at_label)
    return Mixture(sums.m_s, log_q + of_q, sums.m_t, log_p + of_p), at_label


def gradient_bound(
    sums, label, inv_temperature, x, TERMS: tl.constexpr, PHIS: tl.constexpr,
    NEEDS: tl.constexpr,
):  # fmt: skip
    """What no element of a row's gradient exceeds, for an upstream gradient of 1; 0 where the
    gradient is 0 or NaN.

    One term of a KL divergence, q_k log(q_k / p_k), is at least -1/e, and so at most the divergence
    plus 1/e: the others come to no less than -1/e. So |q^_k (log q^_k - log p^_k - qp)| <= qp + 1,
    and with p^ flat |q^_k (log q^_k + entropy)| <= entropy + 1. A pointwise divergence's slopes are
    not larger than a constant, for which 16 is taken.
    """
    f, row = facts(sums, label, inv_temperature, NEEDS)
    S, is_inf = objective(f, row, x, TERMS, PHIS)
    masses = tl.abs(S.u) + tl.abs(S.log_q) + tl.abs(S.log_rest) + tl.abs(S.pq) + tl.abs(S.phi)
    size = times(tl.abs(S.qp), f.qp + 1) + times(tl.abs(S.entropy), f.entropy + 1) + masses
    size = inv_temperature * (tl.where(is_inf, INF, size) + (16.0 if len(PHIS) > 0 else 0.0))
    bound = size + tl.abs(S.label_log_prob) + tl.abs(S.log_z)
    return tl.where((label == IGNORED) | row.is_nan | ~(bound < INF), 0.0, bound)


# A row whose gradient in float16 could exceed 2^15 is multiplied by a power of two of at least
# 2^FLOAT16_ROOM.
FLOAT16_ROOM = -10


def float16_room(bound, upstream):
    """The power of two, at most 1, that keeps a row's gradient inside float16."""
    size = tl.abs(bound * upstream)
    bits = tl.ceil(tl.log2(tl.where(size > 0, size, 1.0)))  # 1 for NaN, too
    return tl.exp2(tl.minimum(tl.maximum(15.0 - bits, FLOAT16_ROOM), 0.0))
