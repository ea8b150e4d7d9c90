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

import triton
import triton.language as tl

from .. import formulas

# Labels that are no column.
NO_LABEL: tl.constexpr = tl.constexpr(formulas.NO_LABEL)
IGNORED: tl.constexpr = tl.constexpr(formulas.IGNORED)
INVALID: tl.constexpr = tl.constexpr(formulas.INVALID)
# Bytes of the line that a row's body starts at. A GPU's tensors start at such a line; a CPU's start
# at 64 bytes, and in the interpreter the same numbers are to give the same bits wherever they lie.
LINE: tl.constexpr = tl.constexpr(64 if os.environ.get("TRITON_INTERPRET") == "1" else 128)


@triton.jit
def row_pointer(ptr, row, stride_outer, stride_inner, inner):
    """The address of column 0; leading dimensions come as two strides, row = outer * inner + i."""
    return ptr + (row // inner) * stride_outer + (row % inner) * stride_inner


@triton.jit
def cut_row(row_ptr, V, LANES: tl.constexpr, VEC: tl.constexpr, ALIGNED: tl.constexpr):
    """(head, body): columns before the boundary that the body starts at, and its whole vectors."""
    head = 0
    if ALIGNED:
        # VEC columns are 16 bytes
        BYTES: tl.constexpr = LINE if LANES >= 10 * VEC else 16
        past = (row_ptr.to(tl.int64) % BYTES).to(tl.int32)
        head = tl.minimum((-past + BYTES) % BYTES // (16 // VEC), V)
    return head, (V - head) // VEC


@triton.jit
def body_pointer(row_ptr, head, ALIGNED: tl.constexpr):
    ptr = row_ptr + head
    if ALIGNED:
        ptr = tl.multiple_of(ptr, 16)
    return ptr


@triton.jit
def label_place(label, head, body, LANES: tl.constexpr, VEC: tl.constexpr, ALIGNED: tl.constexpr):
    """(skip, tile): what a mask leaves out of the body so that the label is left out, the number of
    its vector (without ALIGNED, of its column), and the tile that this lies in; -1 and -1 where the
    label lies in head or tail, or is none.
    """
    inside = (label >= head) & (label < head + body * VEC)
    skip = label - head
    tile = skip // (LANES * VEC)
    if ALIGNED:
        skip = skip // VEC
    return tl.where(inside, skip, -1), tl.where(inside, tile, -1)


@triton.jit
def share_of_row(SPLIT: tl.constexpr):
    """(split, splits): this program's place among those that share a row, along grid axis 1. SPLIT:
    whether there is more than one; how many is not compiled in, or each number of rows in training
    would compile anew.
    """
    return tl.program_id(1), tl.num_programs(1) if SPLIT else 1


@triton.jit
def split_tiles(body, split, splits, LANES: tl.constexpr):
    """(first, last, is_end): the unmasked tiles of this share of the row, and whether the masked
    rest is in it.
    """
    tiles = body // LANES
    each = tl.cdiv(tiles, splits)
    first = tl.minimum(split * each, tiles)
    return first, tl.minimum(first + each, tiles), split == splits - 1


@triton.jit
def tile_offsets(tile, LANES: tl.constexpr, VEC: tl.constexpr, ALIGNED: tl.constexpr):
    """Offsets [LANES, VEC] of a tile from the body's start. A lane has VEC neighbours, which are
    one load. Where they cannot be, it has VEC columns that lie LANES apart: neighbouring threads
    then load neighbours, and a lane still is one thread's.
    """
    lane, k = tl.arange(0, LANES)[:, None], tl.arange(0, VEC)[None, :]
    if ALIGNED:
        return (tile * LANES + lane) * VEC + k
    else:
        return tile * (LANES * VEC) + k * LANES + lane


@triton.jit
def vectors(tile, body, skip, LANES: tl.constexpr, VEC: tl.constexpr, ALIGNED: tl.constexpr):
    """Offsets [LANES, VEC] of a tile from the body's start, and the mask of those inside the body
    and not in `skip` (label_place; -1: none). With ALIGNED it is constant along VEC.
    """
    offs = tile_offsets(tile, LANES, VEC, ALIGNED)
    if ALIGNED:
        vector = tile * LANES + tl.arange(0, LANES)
        inside = ((vector < body) & (vector != skip))[:, None] & (tl.arange(0, VEC) >= 0)[None, :]
    else:
        inside = (offs < body * VEC) & (offs != skip)
    return offs, inside


@triton.jit
def end_columns(head, body, skip, V, LANES: tl.constexpr, VEC: tl.constexpr, ALIGNED: tl.constexpr):
    """Columns and mask [LANES, 1] of what the body's tiles leave over: tail, the vector `skip` (-1:
    none) and head. One column a lane.
    """
    lane = tl.arange(0, LANES)[:, None] + tl.arange(0, 1)[None, :]
    in_tail, in_skip = lane < VEC, lane < 2 * VEC
    skipped = head + (skip - 1) * VEC + lane
    cols = tl.where(in_tail, head + body * VEC + lane, tl.where(in_skip, skipped, lane - 2 * VEC))
    stop = tl.where(in_tail, V, head)
    return cols, tl.where(in_skip & (lane >= VEC), (skip >= 0) & ALIGNED, cols < stop)


@triton.jit
def load_tile(ptrs, mask, other, ACC: tl.constexpr):
    """The elements under the mask, in the accumulator's dtype."""
    return tl.load(ptrs, mask=mask, other=other).to(ACC)


@triton.jit
def load_vectors(
    ptr, tile, LANES: tl.constexpr, VEC: tl.constexpr, ACC: tl.constexpr, ALIGNED: tl.constexpr
):
    """A whole tile of the body that starts at ptr, in the accumulator's dtype."""
    if ALIGNED and ptr.dtype.element_ty == tl.bfloat16:
        # A bfloat16 is the upper half of a float32. Unpacked from 32-bit words two of them cost two
        # instructions; the compiler's own conversion takes three.
        words_ptr = ptr.to(tl.pointer_type(tl.int32), bitcast=True)
        words = tl.load(words_ptr + tile_offsets(tile, LANES, VEC // 2, True))
        low = (words << 16).to(tl.float32, bitcast=True)
        high = (words & -65536).to(tl.float32, bitcast=True)
        x = tl.reshape(tl.join(low, high), [LANES, VEC])
    else:
        x = tl.load(ptr + tile_offsets(tile, LANES, VEC, ALIGNED))
    return x.to(ACC)


@triton.jit
def beside(x, y):
    """[LANES, 2 VEC] of two tiles [LANES, VEC]; each lane's columns stay in its thread."""
    return tl.reshape(tl.join(x, y), [x.shape[0], 2 * x.shape[1]])
