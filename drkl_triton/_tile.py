"""Arithmetic on tiles whose results lie in memory that is used again.

A pointwise divergence is written with operators, each of which makes a tensor. Fresh memory for
every one of them, which the system hands out in zeroed pages, takes longer than the arithmetic. A
:class:`Tile` takes its result's memory from a list and, when nothing refers to it any more, gives
it back. It also avoids what PyTorch's CPU kernels do one element at a time, comparisons into bool
and ``torch.where``: a selection is three operations on bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

LOG2E = 1.4426950408889634
_BITS = {torch.float32: torch.int32, torch.float64: torch.int64}


class Tile:
    """A tensor ``x`` of float32 or float64; ``free`` has more of its shape, or none. Nothing is
    written into a Tile that is there.

    It has the operators of a tensor, and the functions of ``facts.tl`` take it. (Torch's own could
    by ``__torch_function__``, but that is off inside of some compiled functions.)
    """

    __slots__ = ("exponential", "free", "x")

    def __init__(self, x: Tensor, free: list[Tensor]):
        self.x, self.free, self.exponential = x, free, None

    def __del__(self):
        self.free.append(self.x)

    @property
    def dtype(self) -> torch.dtype:
        return self.x.dtype

    @property
    def bits(self) -> Tensor:
        return self.x.view(_BITS[self.x.dtype])

    def memory(self) -> Tensor:
        return self.free.pop() if self.free else torch.empty_like(self.x)


class Mask(Tile):
    """What a comparison gives: all bits set, or none."""

    __slots__ = ()


def _number(x):
    """An argument as torch takes it."""
    if type(x) is Tile:
        return x.x
    return _where(x, x, 1.0, 0.0).x if isinstance(x, Mask) else x


def _bits(tile: Tile, x) -> Tensor:
    """Those of a Tile, a tensor or a number in the tile's dtype; of a condition all or none."""
    if isinstance(x, Tile):
        return x.bits
    x = torch.as_tensor(x, device=tile.x.device)
    bits = _BITS[tile.dtype]
    return -x.to(bits) if x.dtype == torch.bool else x.to(tile.dtype).view(bits)


# Operations: of a Tile that has memory for the result, and the arguments, of which it is one.


def _arithmetic(function):
    def run(tile, *args):
        out = tile.memory()
        function(*[_number(a) for a in args], out=out)
        return Tile(out, tile.free)

    return run


def _comparison(function):
    def run(tile, *args):
        out = Mask(tile.memory(), tile.free)
        function(*[_number(a) for a in args], out=out.bits).neg_()
        return out

    return run


def _logic(function):
    def run(tile, *args):
        out = Mask(tile.memory(), tile.free)
        function(*[_bits(tile, a) for a in args], out=out.bits)
        return out

    return run


def _where(tile, condition, yes, no):
    condition, yes, no = (_bits(tile, x) for x in (condition, yes, no))
    out = Tile(tile.memory(), tile.free)
    out.bits.copy_(yes).bitwise_xor_(no).bitwise_and_(condition).bitwise_xor_(no)
    return out


def _exp(tile, x):
    """As kernels/device.py has it, in half of the time of torch's."""
    if x.exponential is None:
        x.exponential = x * LOG2E
        x.exponential.x.exp2_()
    return x.exponential


def or_tiles(function, run=None):
    """The function of tensors, made one of tiles, too."""
    run = run or _arithmetic(function)

    def call(*args):
        for x in args:
            if isinstance(x, Tile):
                return run(x, *args)
        return function(*args)

    return call


exp, where = or_tiles(torch.exp, _exp), or_tiles(torch.where, _where)

_OPERATORS = {
    _arithmetic: {"add": "add", "sub": "sub", "mul": "mul", "truediv": "div", "neg": "neg"},
    _comparison: {name: name for name in ("eq", "ne", "lt", "le", "gt", "ge")},
    _logic: {
        "and": "bitwise_and",
        "or": "bitwise_or",
        "xor": "bitwise_xor",
        "invert": "bitwise_not",
    },
}


def _operators(name, run):
    def one(self, *other):
        return run(self, self, *other)

    def reflected(self, other):
        return run(self, other, self)

    setattr(Tile, f"__{name}__", one)
    setattr(Tile, f"__r{name}__", reflected)


for _kind, _names in _OPERATORS.items():
    for _name, _function in _names.items():
        _operators(_name, _kind(getattr(torch, _function)))
