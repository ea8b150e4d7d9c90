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

A tile whose logits are all finite is folded without a select (CAREFUL False): a -inf or a NaN makes
the sums NaN or infinite, which says afterwards that the row must be walked again, with them.
"""

import triton
import triton.language as tl

from .. import formulas

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
# What a and h are multiplied with: 2^-24, so that 2^22 differences of the largest logits still have
# a sum.
UNIT: tl.constexpr = tl.constexpr(formulas.UNIT)


@triton.jit
def empty_lanes(LANES: tl.constexpr, ACC: tl.constexpr):
    """The empty state of every lane: (maximum, any sum), each [LANES]."""
    # float32's own lowest number; -inf here would make (-inf) - (-inf) = NaN wherever a lane has
    # seen nothing.
    floor: tl.constexpr = -1.7976931348623157e308 if ACC == tl.float64 else -3.4028234663852886e38
    return tl.full([LANES], floor, ACC), tl.zeros([LANES], ACC)


@triton.jit
def add_tile(m_s, d_s, a, h, m_t, d_t, s, t, scale, ENTROPY: tl.constexpr, CAREFUL: tl.constexpr):
    """Fold the columns of the tiles s, t [LANES, VEC] into the lanes' state. CAREFUL: a column is
    absent where both are -inf.
    """
    new_s = tl.maximum(m_s, tl.max(s, axis=1))
    new_t = tl.maximum(m_t, tl.max(t, axis=1))
    d_s, a, h, d_t = move_maxima(m_s, d_s, a, h, m_t, d_t, new_s, new_t, scale, ENTROPY)
    x = s - new_s[:, None]
    z = t - new_t[:, None]
    e = tl.exp2(x * scale)
    d_s += tl.sum(e, axis=1)
    d_t += tl.sum(tl.exp2(z * scale), axis=1)
    if CAREFUL:
        # 0 * inf is NaN: a column the student leaves out is selected by its logit, before any
        # product. UNIT comes before the sum, which differences of masks would overflow.
        absent = s == float("-inf")
        a += tl.sum(e * tl.where(absent, 0.0, x * UNIT - z * UNIT), axis=1)
        if ENTROPY:
            h += tl.sum(e * tl.where(absent, 0.0, x * UNIT), axis=1)
    else:
        a += tl.sum(e * (x - z), axis=1) * UNIT
        if ENTROPY:
            h += tl.sum(e * x, axis=1) * UNIT
    return new_s, d_s, a, h, new_t, d_t


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
