"""The sums of one row: fold a tile into them, and merge them. One formula a helper.

A state is six numbers for some set S of columns (k runs over S, x relative to the running maxima):

    m_s = max s_k     d_s = sum 2^{scale (s_k - m_s)}
    m_t = max t_k     d_t = sum 2^{scale (t_k - m_t)}
    a = sum 2^{scale (s_k - m_s)} ((s_k - m_s) - (t_k - m_t)) UNIT
    h = sum 2^{scale (s_k - m_s)} (s_k - m_s) UNIT

with scale = log2(e) / temperature, so that a and h are in units of raw logits, times a power of two
that keeps them finite where logits are the lowest finite number (masks are written so): algebra.py
divides by it and by the temperature. The empty state is m = FLOOR, everything else 0, where FLOOR
is the lowest finite number of the accumulator: no finite logit is below it and, unlike -inf, it can
be subtracted. It is a legal logit, too: what tells an empty state is d = 0. States of disjoint sets
merge in any order.

A state is kept *per lane*: tiles are [LANES, VEC] and every reduction in the loop runs along VEC,
inside one thread. The lanes are merged once, at the end of the row, so the loop over the vocabulary
holds no barrier.

Nothing needs m to be the maximum: any number not so far below it that the sums overflow serves as
well, because a float keeps its relative precision wherever it stands. So most of a row is summed
relative to the maximum of its first tile (``add_tile_at``), with no maximum, no rescaling and no
select in the loop, and ``sums_are_good`` and ``loses_the_sure`` say afterwards whether that went
well. Where it did not (a -inf or a NaN somewhere, a logit far above the first tile's, or both
models sure of one there) ``add_tile`` does the row again with running maxima.
"""

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
# What a and h are multiplied with: 2^-24, so that 2^22 differences of the largest logits still have
# a sum. algebra.py has the same number.
UNIT: tl.constexpr = tl.constexpr(5.9604644775390625e-08)
# How far, in powers of two, sums and single exponentials may rise above m (``sums_are_good``).
MAX_SUM: tl.constexpr = tl.constexpr(4194304.0)
MAX_RISE: tl.constexpr = tl.constexpr(11.5)
# How many times the condition of a gradient's element the terms it is the difference of may be
# (``loses_the_sure``).
MAX_OFFSET: tl.constexpr = tl.constexpr(4.0)


@triton.jit
def empty_lanes(LANES: tl.constexpr, ACC: tl.constexpr):
    """The empty state of every lane: (maximum, any sum), each [LANES]."""
    # float32's own lowest number; -inf here would make (-inf) - (-inf) = NaN wherever a lane has
    # seen nothing.
    floor: tl.constexpr = -1.7976931348623157e308 if ACC == tl.float64 else -3.4028234663852886e38
    return tl.full([LANES], floor, ACC), tl.zeros([LANES], ACC)


@triton.jit
def add_tile(m_s, d_s, a, h, m_t, d_t, s, t, scale, ENTROPY: tl.constexpr):
    """Fold the columns of the tiles s, t [LANES, VEC] into the lanes' state. A column is absent
    where both are -inf.
    """
    new_s = tl.maximum(m_s, tl.max(s, axis=1))
    new_t = tl.maximum(m_t, tl.max(t, axis=1))
    d_s, a, h, d_t = move_maxima(m_s, d_s, a, h, m_t, d_t, new_s, new_t, scale, ENTROPY)
    x = s - new_s[:, None]
    z = t - new_t[:, None]
    e = tl.exp2(x * scale)
    d_s += tl.sum(e, axis=1)
    d_t += tl.sum(tl.exp2(z * scale), axis=1)
    # 0 * inf is NaN: a column the student leaves out is selected by its logit, before any product.
    absent = s == float("-inf")
    a += tl.sum(e * tl.where(absent, 0.0, x * UNIT - z * UNIT), axis=1)
    if ENTROPY:
        h += tl.sum(e * tl.where(absent, 0.0, x * UNIT), axis=1)
    return new_s, d_s, a, h, new_t, d_t


@triton.jit
def add_tile_at(d_s, a, h, d_t, s, t, m_s, m_t, scale, ENTROPY: tl.constexpr):
    """Fold the tiles s, t into sums of the tile's own shape, relative to fixed m_s, m_t; a and h
    without UNIT. Wrong, and not finite, where a logit is -inf.
    """
    x = s - m_s
    z = t - m_t
    e = tl.exp2(x * scale)
    d_s += e
    d_t += tl.exp2(z * scale)
    a += e * (x - z)
    if ENTROPY:
        h += e * x
    return d_s, a, h, d_t


@triton.jit
def sums_are_good(d_s, a, h, d_t):
    """Whether sums made by ``add_tile_at`` can be trusted. False with any NaN.

    0 * inf = NaN and e * inf = inf, so a finite `a` means that no logit was infinite. Sums below
    2^22 mean that m is at most 15 nats (at temperature 1) below the maximum: then rescaling meets
    no denormal, and differences of logits are rounded at 2^-21 or less, which a gradient of 16 bits
    hides. For float32 logits row_sums.py asks, too, that no logit is more than 8 nats above m, as
    their gradient would show it. A flat row of 262,144 columns has sums of 2^18.
    """
    finite: tl.constexpr = 3.0e38
    return (d_s < MAX_SUM) & (d_t < MAX_SUM) & (tl.abs(a) < finite) & (tl.abs(h) < finite)


@triton.jit
def loses_the_sure(d_s, a, d_t, top, scale, SPLIT: tl.constexpr):
    """Whether sums made by ``add_tile_at`` are too coarse for a column k, far above m, that both
    models are sure of.

    The gradient there is log q_k - log p_k - KL, all three nearly 0, made as the difference of two
    numbers that need not be: x_k = (s_k - m_s) - (t_k - m_t), and the mean of x, a / d_s. Rounding
    takes some eps |a / d_s| from it, and may take some eps (|log q_k| + |log p_k| + KL). With m at
    the maxima the two are nearly 0 as well.

    top: no less than the product of k's two exponentials. Of a share of the row (SPLIT) the offset
    is not known yet, as another share may have the higher m; but it is no more than what k rises
    above m in this share, the logarithm of its sum.
    """
    d_s, d_t = tl.maximum(d_s, 1.0), tl.maximum(d_t, 1.0)
    mean = a / d_s * scale
    kl = tl.abs(mean + tl.log2(d_t / d_s))
    doubt = tl.log2(d_s * d_t / tl.maximum(top, 1.0))
    offset = tl.log2(tl.maximum(d_s, d_t)) if SPLIT else tl.abs(mean)
    return offset > (doubt + kl) * MAX_OFFSET


@triton.jit
def move_maxima(m_s, d_s, a, h, m_t, d_t, new_s, new_t, scale, ENTROPY: tl.constexpr):
    """The sums (d_s, a, h, d_t), taken relative to the maxima m, made relative to higher maxima."""
    down_s = m_s - new_s
    down_t = m_t - new_t
    rescale = tl.exp2(down_s * scale)
    d_s *= rescale
    # Where nothing is left of the state down_s may be anything, even -inf: 0 * -inf would be NaN.
    empty = d_s == 0.0
    a = rescale * a + d_s * tl.where(empty, 0.0, down_s * UNIT - down_t * UNIT)
    if ENTROPY:
        h = rescale * h + d_s * tl.where(empty, 0.0, down_s * UNIT)
    return d_s, a, h, d_t * tl.exp2(down_t * scale)


@triton.jit
def merge_lanes(m_s, d_s, a, h, m_t, d_t, scale, ENTROPY: tl.constexpr):
    """Merge the states along axis 0."""
    top_s = tl.max(m_s, axis=0)
    top_t = tl.max(m_t, axis=0)
    d_s, a, h, d_t = move_maxima(m_s, d_s, a, h, m_t, d_t, top_s, top_t, scale, ENTROPY)
    d_s = tl.sum(d_s, axis=0)
    d_t = tl.sum(d_t, axis=0)
    return top_s, d_s, tl.sum(a, axis=0), tl.sum(h, axis=0), top_t, d_t
