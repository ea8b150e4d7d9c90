"""From the losses of rows to the number that is returned, and the scalars that the options become.

reduced = sum_i weights_i loss_i / denominator        "mean"
        = sum_i weights_i loss_i                      "sum" (denominator None)
"""

from __future__ import annotations

import torch
from torch import Tensor

from .facts import IGNORED, divided


def weights(codes: Tensor, weight: Tensor | None, shift: bool, dtype: torch.dtype) -> Tensor | None:
    """The caller's weight at the rows that it is for; 0 where they are ignored."""
    if weight is None:
        return None
    if shift:
        weight = torch.cat([weight[..., 1:], torch.zeros_like(weight[..., :1])], dim=-1)
    return torch.where(codes != IGNORED, weight.to(dtype), 0.0)


def denominator(
    codes: Tensor,
    weights: Tensor | None,
    reduction: str,
    num_items: float | Tensor | None,
    dtype: torch.dtype,
) -> Tensor | None:
    """That of the formula above, 0-dim."""
    if reduction != "mean":
        return None
    if num_items is not None:
        return scalar(num_items, dtype, codes.device)
    return (codes != IGNORED if weights is None else weights).sum(dtype=dtype)


def reduce(
    loss: Tensor, weights: Tensor | None, denominator: Tensor | None, reduction: str
) -> Tensor:
    if reduction == "none":
        return loss if weights is None else loss * weights
    return total(loss, weights, denominator)


def total(loss: Tensor, weights: Tensor | None, denominator: Tensor | None) -> Tensor:
    """The mean, or where ``denominator`` is None the sum."""
    result = (loss if weights is None else loss * weights).sum()
    return result if denominator is None else divided(result, denominator)


def of_rows(loss: Tensor, label: Tensor, weight, num_items, reduction: str):
    """(the loss, reduced, its denominator or None) of rows [N] with their labels' codes."""
    if reduction == "none":
        return loss if weight is None else loss * weight, None
    denominator = None
    if reduction == "mean":
        denominator = num_items
        if denominator is None:
            denominator = (label != IGNORED if weight is None else weight).sum(dtype=loss.dtype)
    return total(loss, weight, denominator), denominator


def derivative(
    codes: Tensor, weights: Tensor | None, denominator: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """What ``total`` multiplies each row's loss with, [...]."""
    weights = (codes != IGNORED).to(dtype) if weights is None else weights
    return weights if denominator is None else divided(weights, denominator)


def inverse(temperature: float | Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """1 / temperature, 0-dim."""
    if isinstance(temperature, Tensor):
        return scalar(temperature, dtype, device).reciprocal()
    if torch.compiler.is_compiling():  # 1 / number would be a constant of the graph in PyTorch 2.11
        return torch.ones((), dtype=dtype, device=device) / temperature
    return scalar(1.0 / temperature, dtype, device)


def parameters(values: list, codes: Tensor, shift: bool, dtype: torch.dtype) -> Tensor | None:
    """An objective's parameters [P, 1], or [P, N] where one has a value a token; under ``shift``
    those are at the place of the label, as weights are.
    """
    if not values:
        return None
    table = [scalar(x, dtype, codes.device) for x in values]
    if all(x.dim() == 0 for x in table):
        return torch.stack(table)[:, None] if len(table) > 1 else table[0].view(1, 1)
    if shift:
        table = [
            torch.cat([x[..., 1:], x[..., -1:]], dim=-1) if x.dim() else x for x in table
        ]  # the last row is ignored
    return torch.stack([x.expand(codes.shape).reshape(-1) for x in table])


def scalar(value: float | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A 0-dim tensor on the device. Filling memory there, unlike copying a number to it, waits for
    nothing.
    """
    if isinstance(value, Tensor):
        # towards the CPU a copy that does not wait could be read before it has arrived
        return value.detach().to(device, dtype, non_blocking=device.type != "cpu")
    if torch.compiler.is_compiling():  # a number filled in would be a constant of the graph
        return torch.ones((), dtype=dtype, device=device) * value
    return torch.full((), float(value), dtype=dtype, device=device)
