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

from typing import NamedTuple

import triton
import triton.language as tl

from .. import formulas

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
# What a and h are multiplied with: 2^-24, so that 2^22 differences of the largest logits still have
# a sum.
UNIT: tl.constexpr = tl.constexpr(formulas.UNIT)


class State(NamedTuple):
    """The formulas above; a number each, or one a lane. The order is that of formulas.Sums."""

    m_s: tl.tensor
    d_s: tl.tensor
    a: tl.tensor
    h: tl.tensor
    m_t: tl.tensor
    d_t: tl.tensor


@triton.jit
def empty_lanes(LANES: tl.constexpr, ACC: tl.constexpr):
    """The empty state of every lane: (maximum, any sum), each [LANES]."""
    # float32's own lowest number; -inf here would make (-inf) - (-inf) = NaN wherever a lane has
    # seen nothing.
    floor: tl.constexpr = -1.7976931348623157e308 if ACC == tl.float64 else -3.4028234663852886e38
    return tl.full([LANES], floor, ACC), tl.zeros([LANES], ACC)


@triton.jit
def no_columns(LANES: tl.constexpr, ACC: tl.constexpr):
    floor, zero = empty_lanes(LANES, ACC)
    return State(floor, zero, zero, zero, floor, zero)


@triton.jit
def add_tile(S, x, scale, ENTROPY: tl.constexpr, CAREFUL: tl.constexpr):
    """Fold the columns of the pair of tiles x [LANES, VEC] into the lanes' state. CAREFUL: a column
    is absent where both are -inf.
    """
    new_s = tl.maximum(S.m_s, tl.max(x.s, axis=1))
    new_t = tl.maximum(S.m_t, tl.max(x.t, axis=1))
    S = move_maxima(S, new_s, new_t, scale, ENTROPY)
    s = x.s - new_s[:, None]
    t = x.t - new_t[:, None]
    e = tl.exp2(s * scale)
    d_s = S.d_s + tl.sum(e, axis=1)
    d_t = S.d_t + tl.sum(tl.exp2(t * scale), axis=1)
    a, h = S.a, S.h
    if CAREFUL:
        # 0 * inf is NaN: a column the student leaves out is selected by its logit, before any
        # product. UNIT comes before the sum, which differences of masks would overflow.
        absent = x.s == float("-inf")
        a += tl.sum(e * tl.where(absent, 0.0, s * UNIT - t * UNIT), axis=1)
        if ENTROPY:
            h += tl.sum(e * tl.where(absent, 0.0, s * UNIT), axis=1)
    else:
        a += tl.sum(e * (s - t), axis=1) * UNIT
        if ENTROPY:
            h += tl.sum(e * s, axis=1) * UNIT
    return State(new_s, d_s, a, h, new_t, d_t)


@triton.jit
def move_maxima(S, new_s, new_t, scale, ENTROPY: tl.constexpr):
    """The state made relative to higher maxima."""
    down_s = S.m_s - new_s
    down_t = S.m_t - new_t
    rescale = tl.exp2(down_s * scale)
    d_s = S.d_s * rescale
    # Where nothing is left of the state down_s may be anything, even -inf: 0 * -inf would be NaN.
    empty = d_s == 0.0
    a = rescale * S.a + d_s * tl.where(empty, 0.0, down_s * UNIT - down_t * UNIT)
    h = S.h
    if ENTROPY:
        h = rescale * h + d_s * tl.where(empty, 0.0, down_s * UNIT)
    return State(new_s, d_s, a, h, new_t, S.d_t * tl.exp2(down_t * scale))


@triton.jit
def merge_lanes(S, scale, ENTROPY: tl.constexpr):
    """Merge the states along axis 0."""
    S = move_maxima(S, tl.max(S.m_s, axis=0), tl.max(S.m_t, axis=0), scale, ENTROPY)
    d_s, a, h = tl.sum(S.d_s, axis=0), tl.sum(S.a, axis=0), tl.sum(S.h, axis=0)
    return State(S.m_s, d_s, a, h, S.m_t, tl.sum(S.d_t, axis=0))
