"""The sums of one row: fold a tile into them, and merge them. One formula a helper.

A state is some of nine numbers for some set S of columns (k runs over S, x_k = s_k - m_s, z_k = t_k
- m_t are relative to the running maxima):

    m_s = max s_k     d_s = sum 2^{scale x_k}     m_t, d_t likewise of t_k and z_k
    a = sum 2^{scale x_k} (x_k - z_k) UNIT        b = sum 2^{scale z_k} (z_k - x_k) UNIT
    h = sum 2^{scale x_k} x_k UNIT                g = sum 2^{scale z_k} z_k UNIT
    c = sum e^{x_k}

with scale = log2(e) / temperature, so that a, b, h and g are in units of raw logits, times a power
of two that keeps them finite where logits are the lowest finite number (masks are written so):
facts.py divides by it and by the temperature. The empty state is m = FLOOR, everything else 0,
where FLOOR is the lowest finite number of the accumulator: no finite logit is below it and, unlike
-inf, it can be subtracted. It is a legal logit, too: what tells an empty state is d = 0. States of
disjoint sets merge in any order.

A state is kept *per lane*: tiles are [LANES, VEC] and every reduction in the loop runs along VEC,
inside one thread. The lanes are merged once, at the end of the row, so the loop over the vocabulary
holds no barrier.

A tile whose logits are all finite is folded without a select (CAREFUL False): a -inf or a NaN makes
the sums NaN or infinite, which says afterwards that the row must be walked again, with them.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .. import facts

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
# What a, b, h and g are multiplied with: 2^-24, so that 2^22 differences of the largest logits
# still have a sum.
UNIT: tl.constexpr = tl.constexpr(facts.UNIT)


# What is summed, beside m_s and d_s.
TEACHER: tl.constexpr = tl.constexpr(facts.TEACHER)
REVERSE: tl.constexpr = tl.constexpr(facts.REVERSE)
FORWARD: tl.constexpr = tl.constexpr(facts.FORWARD)
ENTROPY: tl.constexpr = tl.constexpr(facts.ENTROPY)
TEACHER_ENTROPY: tl.constexpr = tl.constexpr(facts.TEACHER_ENTROPY)
UNTEMPERED: tl.constexpr = tl.constexpr(facts.UNTEMPERED)
PHI_ALONE: tl.constexpr = tl.constexpr(facts.PHI_ALONE)


class State(NamedTuple):
    """The formulas above; a number each, or one a lane. What is not needed stays as it was. The
    order is that of facts.Sums.
    """

    m_s: tl.tensor
    d_s: tl.tensor
    a: tl.tensor
    h: tl.tensor
    m_t: tl.tensor
    d_t: tl.tensor
    b: tl.tensor
    g: tl.tensor
    c: tl.tensor


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
    return State(floor, zero, zero, zero, floor, zero, zero, zero, zero)


@triton.jit
def add_tile(S, x, scale, CAREFUL: tl.constexpr, NEEDS: tl.constexpr):
    """Fold the columns of the pair of tiles x [LANES, VEC] into the lanes' state. CAREFUL: a column
    is absent where both are -inf.
    """
    new_s = tl.maximum(S.m_s, tl.max(x.s, axis=1))
    new_t = S.m_t
    if TEACHER & NEEDS:
        new_t = tl.maximum(new_t, tl.max(x.t, axis=1))
    S = move_maxima(S, new_s, new_t, scale, NEEDS)
    s = x.s - new_s[:, None]
    e = tl.exp2(s * scale)
    d_s = S.d_s + tl.sum(e, axis=1)
    d_t, a, h, b, g, c = S.d_t, S.a, S.h, S.b, S.g, S.c
    if TEACHER & NEEDS:
        t = x.t - new_t[:, None]
        f = tl.exp2(t * scale)
        d_t += tl.sum(f, axis=1)
    # 0 * inf is NaN: with CAREFUL a column that is left out is selected by its logit, before any
    # product, and UNIT comes before the sum, which differences of masks would overflow.
    if REVERSE & NEEDS:
        if CAREFUL:
            a += tl.sum(e * tl.where(x.s == float("-inf"), 0.0, s * UNIT - t * UNIT), axis=1)
        else:
            a += tl.sum(e * (s - t), axis=1) * UNIT
    if FORWARD & NEEDS:
        if CAREFUL:
            b += tl.sum(f * tl.where(x.t == float("-inf"), 0.0, t * UNIT - s * UNIT), axis=1)
        else:
            b -= tl.sum(f * (s - t), axis=1) * UNIT
    if ENTROPY & NEEDS:
        h += sum_times(e, s, x.s, CAREFUL)
    if TEACHER_ENTROPY & NEEDS:
        g += sum_times(f, t, x.t, CAREFUL)
    if UNTEMPERED & NEEDS:
        c += tl.sum(tl.exp2(s * LOG2E), axis=1)
    return State(new_s, d_s, a, h, new_t, d_t, b, g, c)


@triton.jit
def sum_times(e, s, logit, CAREFUL: tl.constexpr):
    if CAREFUL:
        return tl.sum(e * tl.where(logit == float("-inf"), 0.0, s * UNIT), axis=1)
    else:
        return tl.sum(e * s, axis=1) * UNIT


@triton.jit
def move_maxima(S, new_s, new_t, scale, NEEDS: tl.constexpr):
    """The state made relative to higher maxima."""
    down_s = S.m_s - new_s
    down_t = S.m_t - new_t
    rescale = tl.exp2(down_s * scale)
    d_s = S.d_s * rescale
    d_t, a, h, b, g, c = S.d_t, S.a, S.h, S.b, S.g, S.c
    # Where nothing is left of the state down_s may be anything, even -inf: 0 * -inf would be NaN.
    empty = d_s == 0.0
    if REVERSE & NEEDS:
        a = rescale * a + d_s * tl.where(empty, 0.0, down_s * UNIT - down_t * UNIT)
    if ENTROPY & NEEDS:
        h = rescale * h + d_s * tl.where(empty, 0.0, down_s * UNIT)
    if UNTEMPERED & NEEDS:
        c = c * tl.exp2(down_s * LOG2E)
    if TEACHER & NEEDS:
        rescale = tl.exp2(down_t * scale)
        d_t = d_t * rescale
        empty = d_t == 0.0
    if FORWARD & NEEDS:
        b = rescale * b + d_t * tl.where(empty, 0.0, down_t * UNIT - down_s * UNIT)
    if TEACHER_ENTROPY & NEEDS:
        g = rescale * g + d_t * tl.where(empty, 0.0, down_t * UNIT)
    return State(new_s, d_s, a, h, new_t, d_t, b, g, c)


@triton.jit
def merge_lanes(S, scale, NEEDS: tl.constexpr):
    """Merge the states along axis 0."""
    S = move_maxima(S, tl.max(S.m_s, axis=0), tl.max(S.m_t, axis=0), scale, NEEDS)
    d_s, a, h = tl.sum(S.d_s, axis=0), tl.sum(S.a, axis=0), tl.sum(S.h, axis=0)
    d_t, b, g = tl.sum(S.d_t, axis=0), tl.sum(S.b, axis=0), tl.sum(S.g, axis=0)
    return State(S.m_s, d_s, a, h, S.m_t, d_t, b, g, tl.sum(S.c, axis=0))
