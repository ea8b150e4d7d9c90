"""Logits of any leading shape as rows of V columns, read in place."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Rows:
    """``tensor`` [..., V] whose row i starts ``(i // inner) * strides[0] + (i % inner) *
    strides[1]`` elements past its data pointer.
    """

    tensor: torch.Tensor
    inner: int
    strides: tuple[int, int]

    @staticmethod
    def like(tensor: torch.Tensor) -> Rows:
        """The rows of ``tensor`` [N, columns], whose columns are dense."""
        N = tensor.shape[0]
        return Rows(tensor, max(1, N), (0, tensor.stride(0) if N > 1 else 0))


def slices_of(rows: Rows, count: int, height: int):
    """(i, j, Rows i ... j - 1), ``height`` or fewer at a time, of ``count``."""
    width = rows.tensor.shape[-1]
    for start in range(0, count, rows.inner):
        stop = min(count, start + rows.inner)
        for i in range(start, stop, height):
            j = min(stop, i + height)
            outer, inner = rows.strides
            place = rows.tensor.storage_offset() + (i // rows.inner) * outer
            place += (i % rows.inner) * inner
            part = rows.tensor.as_strided((j - i, width), (inner, 1), place)
            yield i, j, Rows(part, j - i, (0, inner))


def rows_of(tensor: torch.Tensor) -> Rows:
    """``tensor`` [..., V] as Rows, without a copy where its leading strides reduce to two and its
    last dimension is dense.
    """
    return rows_in_place(tensor) or rows_in_place(tensor.contiguous())


def rows_in_place(tensor: torch.Tensor) -> Rows | None:
    """``tensor`` as Rows if that takes no copy."""
    leading = _merge(tensor.shape[:-1], tensor.stride()[:-1])
    if tensor.numel() == 0:  # contiguous, whatever its strides
        return Rows(tensor, max(1, math.prod(tensor.shape[:-1])), (0, 0))
    if len(leading) > 2 or (tensor.shape[-1] > 1 and tensor.stride(-1) != 1):
        return None
    (_, outer), (inner, stride) = [(1, 0), (1, 0), *leading][-2:]
    return Rows(tensor, max(1, inner), (outer, stride))


def _merge(sizes, strides):
    """[(size, stride)] with dimensions of size 1 dropped and neighbours that walk evenly joined."""
    merged: list[tuple[int, int]] = []
    for size, stride in zip(sizes, strides, strict=True):
        if size == 1:
            continue
        if merged and merged[-1][1] == size * stride:
            merged[-1] = (merged[-1][0] * size, stride)
        else:
            merged.append((size, stride))
    return merged
