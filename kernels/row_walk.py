"""How a row of V columns is cut so that the loop over it needs no mask and loads 16 bytes at a
time, for every V.

    columns   head | body: 16-byte vectors from a 128-byte boundary on | tail (< VEC columns)
    body      tiles of LANES vectors, without a mask | one last tile, masked by whole vectors
    ends      tail, the vector with the label in it, and head: 10 VEC columns at most, one a lane

128 bytes are a line of an NVIDIA cache: warps that store from elsewhere on write parts of lines.
Where a tile has too few lanes for such a head, in short rows, the boundary is one of 16 bytes.

A mask on single columns would turn a 16-byte load into eight 2-byte ones; a mask on whole vectors
does not. So the label's vector is left out of its tile by a vector mask, and the ends, loaded
column by column, make up for it. The label costs O(1) a row.

ALIGNED promises that all rows walked together lie equally far from a 16-byte boundary. Without it
(student and teacher offset differently, or of different dtypes) the same walk starts at column 0,
the loads are narrower, and a mask on single columns costs nothing: the label's is left out alone.
"""

import os
from typing import NamedTuple

import triton
import triton.language as tl

from .. import facts
from .device import skewed

# Labels that are no column.
NO_LABEL: tl.constexpr = tl.constexpr(facts.NO_LABEL)
IGNORED: tl.constexpr = tl.constexpr(facts.IGNORED)
INVALID: tl.constexpr = tl.constexpr(facts.INVALID)
TEACHER: tl.constexpr = tl.constexpr(facts.TEACHER)
SKEWED: tl.constexpr = tl.constexpr(facts.SKEWED)
# Bytes of the line that a row's body starts at. A GPU's tensors start at such a line; a CPU's start
# at 64 bytes, and in the interpreter the same numbers are to give the same bits wherever they lie.
LINE: tl.constexpr = tl.constexpr(64 if os.environ.get("TRITON_INTERPRET") == "1" else 128)


class Geometry(NamedTuple):
    """What a launch is compiled for."""

    LANES: tl.constexpr
    VEC: tl.constexpr
    ACC: tl.constexpr  # the accumulator's dtype
    ALIGNED: tl.constexpr
    FILTERED: tl.constexpr = tl.constexpr(False)  # columns are left out by the teacher's logit
    NEEDS: tl.constexpr = tl.constexpr(0)  # what is summed, or what the gradient is made of
    PHIS: tl.constexpr = tl.constexpr(())  # the pointwise terms (facts.pointwise)


class View(NamedTuple):
    """What the logits that are loaded are seen through."""

    filter_value: tl.tensor  # with FILTERED: what the teacher's mask was filled with
    mixture: tl.tuple  # with SKEWED: facts.Mixture
    inv_temperature: tl.tensor


class Pair(NamedTuple):
    """What there is one of for either model: pointers, or tiles of logits."""

    s: tl.tensor
    t: tl.tensor


class Place(NamedTuple):
    """Where a row of both models lies, and which share of it is this program's."""

    ptr: Pair  # column 0
    body_ptr: Pair  # the body's first column
    head: tl.tensor  # columns before the body
    body: tl.tensor  # vectors of the body
    V: tl.tensor
    label: tl.tensor
    skip: tl.tensor  # what a mask leaves out of the body for the label (label_place)
    first: tl.tensor  # the share's whole tiles are first ... last - 1
    last: tl.tensor
    mine: tl.tensor  # whether the label is in one of them
    picked: tl.tensor  # the tile that goes before or after the others: the label's, if it is here
    is_end: tl.tensor  # whether the masked rest is in this share
    view: View


@triton.jit
def row_pointer(ptr, row, stride_outer, stride_inner, inner):
    """The address of column 0; leading dimensions come as two strides, row = outer * inner + i."""
    return ptr + (row // inner) * stride_outer + (row % inner) * stride_inner


@triton.jit
def cut_row(row_ptr, V, G: tl.constexpr):
    """(head, body): columns before the boundary that the body starts at, and its whole vectors."""
    head = 0
    if G.ALIGNED:
        # VEC columns are 16 bytes
        BYTES: tl.constexpr = LINE if G.LANES >= 10 * G.VEC else 16
        past = (row_ptr.to(tl.int64) % BYTES).to(tl.int32)
        head = tl.minimum((-past + BYTES) % BYTES // (16 // G.VEC), V)
    return head, (V - head) // G.VEC


@triton.jit
def body_pointer(row_ptr, head, G: tl.constexpr):
    ptr = row_ptr + head
    if G.ALIGNED:
        ptr = tl.multiple_of(ptr, 16)
    return ptr


@triton.jit
def label_place(label, head, body, G: tl.constexpr):
    """(skip, tile): what a mask leaves out of the body so that the label is left out, the number of
    its vector (without ALIGNED, of its column), and the tile that this lies in; -1 and -1 where the
    label lies in head or tail, or is none.
    """
    inside = (label >= head) & (label < head + body * G.VEC)
    skip = label - head
    tile = skip // (G.LANES * G.VEC)
    if G.ALIGNED:
        skip = skip // G.VEC
    return tl.where(inside, skip, -1), tl.where(inside, tile, -1)


@triton.jit
def share_of_row(SPLIT: tl.constexpr):
    """(split, splits): this program's place among those that share a row, along grid axis 1. SPLIT:
    whether there is more than one; how many is not compiled in, or each number of rows in training
    would compile anew.
    """
    return tl.program_id(1), tl.num_programs(1) if SPLIT else 1


@triton.jit
def split_tiles(body, SPLIT: tl.constexpr, G: tl.constexpr):
    """(first, last, is_end): the unmasked tiles of this share of the row, and whether the masked
    rest is in it.
    """
    split, splits = share_of_row(SPLIT)
    tiles = body // G.LANES
    each = tl.cdiv(tiles, splits)
    first = tl.minimum(split * each, tiles)
    return first, tl.minimum(first + each, tiles), split == splits - 1


@triton.jit
def load_view(filter_ptr, mixture, inv_temperature, ACC: tl.constexpr):
    filter_value = inv_temperature
    if filter_ptr is not None:
        filter_value = tl.load(filter_ptr).to(ACC)
    return View(filter_value, mixture, inv_temperature)


@triton.jit
def place(ptr, head, body, V, label, view, SPLIT: tl.constexpr, G: tl.constexpr, ANY: tl.constexpr):
    """The Place of a row at the pair of pointers ``ptr``. Where the label is in none of the share's
    tiles, ``picked`` is the first of them with ANY, and otherwise none.
    """
    body_ptr = Pair(body_pointer(ptr.s, head, G), body_pointer(ptr.t, head, G))
    skip, label_tile = label_place(label, head, body, G)
    first, last, is_end = split_tiles(body, SPLIT, G)
    mine = (label_tile >= first) & (label_tile < last)
    picked = tl.where(mine, label_tile, first if ANY else last)
    return Place(ptr, body_ptr, head, body, V, label, skip, first, last, mine, picked, is_end, view)


@triton.jit
def tile_offsets(tile, VEC: tl.constexpr, G: tl.constexpr):
    """Offsets [LANES, VEC] of a tile from the body's start. A lane has VEC neighbours, which are
    one load. Where they cannot be, it has VEC columns that lie LANES apart: neighbouring threads
    then load neighbours, and a lane still is one thread's.
    """
    lane, k = tl.arange(0, G.LANES)[:, None], tl.arange(0, VEC)[None, :]
    if G.ALIGNED:
        return (tile * G.LANES + lane) * VEC + k
    else:
        return tile * (G.LANES * VEC) + k * G.LANES + lane


@triton.jit
def vectors(tile, body, skip, G: tl.constexpr):
    """Offsets [LANES, VEC] of a tile from the body's start, and the mask of those inside the body
    and not in `skip` (label_place; -1: none). With ALIGNED it is constant along VEC.
    """
    offs = tile_offsets(tile, G.VEC, G)
    if G.ALIGNED:
        vector = tile * G.LANES + tl.arange(0, G.LANES)
        inside = ((vector < body) & (vector != skip))[:, None] & (tl.arange(0, G.VEC) >= 0)[None, :]
    else:
        inside = (offs < body * G.VEC) & (offs != skip)
    return offs, inside


@triton.jit
def end_columns(head, body, skip, V, G: tl.constexpr):
    """Columns and mask [LANES, 1] of what the body's tiles leave over: tail, the vector `skip` (-1:
    none) and head. One column a lane.
    """
    lane = tl.arange(0, G.LANES)[:, None] + tl.arange(0, 1)[None, :]
    in_tail, in_skip = lane < G.VEC, lane < 2 * G.VEC
    tail, skipped = head + body * G.VEC + lane, head + (skip - 1) * G.VEC + lane
    cols = tl.where(in_tail, tail, tl.where(in_skip, skipped, lane - 2 * G.VEC))
    stop = tl.where(in_tail, V, head)
    return cols, tl.where(in_skip & (lane >= G.VEC), (skip >= 0) & G.ALIGNED, cols < stop)


@triton.jit
def load_tile(ptrs, mask, other, G: tl.constexpr):
    """The elements under the mask, in the accumulator's dtype."""
    return tl.load(ptrs, mask=mask, other=other).to(G.ACC)


@triton.jit
def load_vectors(ptr, tile, G: tl.constexpr):
    """A whole tile of the body that starts at ptr, in the accumulator's dtype."""
    if G.ALIGNED and ptr.dtype.element_ty == tl.bfloat16:
        # A bfloat16 is the upper half of a float32. Unpacked from 32-bit words two of them cost two
        # instructions; the compiler's own conversion takes three.
        words_ptr = ptr.to(tl.pointer_type(tl.int32), bitcast=True)
        words = tl.load(words_ptr + tile_offsets(tile, G.VEC // 2, G))
        low = (words << 16).to(tl.float32, bitcast=True)
        high = (words & -65536).to(tl.float32, bitcast=True)
        x = tl.reshape(tl.join(low, high), [G.LANES, G.VEC])
    else:
        x = tl.load(ptr + tile_offsets(tile, G.VEC, G))
    return x.to(G.ACC)


@triton.jit
def seen(x, view, G: tl.constexpr):
    """Both -inf, which is absent, where the teacher's logit is at most ``filter_value``; then the
    teacher skewed.
    """
    if G.FILTERED:
        absent = x.t <= view.filter_value
        x = Pair(tl.where(absent, float("-inf"), x.s), tl.where(absent, float("-inf"), x.t))
    if SKEWED & G.NEEDS:
        x = Pair(x.s, skewed(x.s, x.t, view.mixture, view.inv_temperature))
    return x


@triton.jit
def load_pair(ptr, offs, mask, view, G: tl.constexpr):
    """Both tiles in the accumulator's dtype; a masked column is -inf in both, which is absent."""
    s = load_tile(ptr.s + offs, mask, float("-inf"), G)
    t = s
    if TEACHER & G.NEEDS:
        t = load_tile(ptr.t + offs, mask, float("-inf"), G)
    return seen(Pair(s, t), view, G)


@triton.jit
def load_whole_pair(here, i, G: tl.constexpr):
    """The share's i-th tile but ``picked``: those from there on move up."""
    tile = i + (i >= here.picked).to(tl.int32)
    s = load_vectors(here.body_ptr.s, tile, G)
    t = s
    if TEACHER & G.NEEDS:
        t = load_vectors(here.body_ptr.t, tile, G)
    return seen(Pair(s, t), here.view, G)


@triton.jit
def beside(x, y):
    """[LANES, 2 VEC] of two pairs of tiles [LANES, VEC]; a lane's columns stay in its thread."""
    return Pair(_beside(x.s, y.s), _beside(x.t, y.t))


@triton.jit
def _beside(x, y):
    return tl.reshape(tl.join(x, y), [x.shape[0], 2 * x.shape[1]])
