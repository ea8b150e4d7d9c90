"""Tile shape, warps and splits for a launch. Every number says where it comes from.

Nothing here has been measured on a GPU yet: the choices follow from the machine code that Triton
3.7.1 makes (registers, spills, load widths) and from how many programs fill a card.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch

# A lane's vector is one 16-byte load: the widest a thread can issue on the GPUs Triton serves.
VECTOR_BYTES = 16
# One lane a thread, one vector a lane: the reductions along a vector then stay inside the thread
# (see online_softmax.py). 256 lanes: no spill and 16-byte loads on sm_80 to sm_100 (compiled, not
# timed).
MAX_LANES = 128
# Two resident programs a multiprocessor hide latency; 132 is an H100's count, used where no device
# says otherwise.
PROGRAMS_PER_SM = 2
DEFAULT_DEVICE = (132, 32)
# A split below this many tiles spends more on its ends and on the merge than it gains (counted, not
# timed).
MIN_TILES_PER_SPLIT = 4


@dataclass(frozen=True)
class Tile:
    """lanes x vec columns a tile; ``splits`` programs of ``num_warps`` warps share every row."""

    lanes: int
    vec: int
    num_warps: int
    splits: int


def choose(V, *operands, rows, splits=None):
    """The tile for rows of V columns. operands: the logits, with ``tensor``; ``splits`` overrides
    the choice.
    """
    vec = VECTOR_BYTES // min(r.tensor.element_size() for r in operands)
    return _choose(V, vec, rows, splits, *_device_shape(operands[0].tensor.device))


@lru_cache(maxsize=1024)
def _choose(V, vec, rows, splits, multiprocessors, warp_size):
    vectors = max(1, V // vec)
    lanes = MAX_LANES
    while lanes > warp_size and lanes > vectors:
        lanes //= 2
    if splits is None:
        wanted = -(-PROGRAMS_PER_SM * multiprocessors // max(1, rows))
        splits = max(1, min(wanted, vectors // lanes // MIN_TILES_PER_SPLIT))
    return Tile(lanes, vec, lanes // warp_size, splits)


@lru_cache(maxsize=64)
def _device_shape(device):
    """(multiprocessors, threads a warp) of the device; AMD's data-center GPUs have warps of 64."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return properties.multi_processor_count, getattr(properties, "warp_size", 32)
    if device.type == "xpu":
        return torch.xpu.get_device_properties(device).max_compute_units, 32
    return DEFAULT_DEVICE
