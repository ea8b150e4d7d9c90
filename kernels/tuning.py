"""Tile shape, warps and splits for a launch. Every number says where it comes from.

Nothing here has been measured on a GPU yet: the choices follow from the machine code that Triton
3.7.1 makes (registers, spills, load widths) and from how many programs fill a card.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch

# A lane's vector is one 16-byte load: the widest a thread can issue on the GPUs Triton serves.
VECTOR_BYTES = 16
# One vector a thread: the reductions along a vector then stay inside the thread (see
# online_softmax.py). 8 warps: no spill and 16-byte loads on sm_80 to sm_120 (compiled, not timed).
# AMD allows 16 warps at most.
MAX_WARPS = 8
# Two resident programs of 8 warps a multiprocessor hide latency; 132 is an H100's count, used where
# no device says otherwise.
PROGRAMS_PER_SM = 2
DEFAULT_SMS = 132
# A split below this many tiles spends more on its ends and on the merge than it gains (counted, not
# timed).
MIN_TILES_PER_SPLIT = 4


@dataclass(frozen=True)
class Tile:
    """lanes x vec columns a tile; every row is shared by ``splits`` programs of ``num_warps``
    warps.
    """

    lanes: int
    vec: int
    num_warps: int
    splits: int


def choose(V, *operands, rows, splits=None):
    """The tile for rows of V columns. operands: the logits, as launch.Rows-like; ``splits``
    overrides the choice.
    """
    vec = VECTOR_BYTES // min(r.tensor.element_size() for r in operands)
    return _choose(V, vec, rows, splits, _multiprocessors(operands[0].tensor.device))


@lru_cache(maxsize=1024)
def _choose(V, vec, rows, splits, sms):
    vectors = max(1, V // vec)
    num_warps = MAX_WARPS
    while num_warps > 1 and 32 * num_warps > vectors:
        num_warps //= 2
    lanes = 32 * num_warps
    if splits is None:
        wanted = -(-PROGRAMS_PER_SM * sms // max(1, rows))
        splits = max(1, min(wanted, vectors // lanes // MIN_TILES_PER_SPLIT))
    return Tile(lanes, vec, num_warps, splits)


@lru_cache(maxsize=64)
def _multiprocessors(device):
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    if device.type == "xpu":
        return torch.xpu.get_device_properties(device).max_compute_units
    return DEFAULT_SMS
