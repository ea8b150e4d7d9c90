"""Tiles: what pointwise divergences are computed with on the CPU, against plain tensors."""

import pytest
import torch
from losses import LOSSES

from drkl_triton import facts, objectives
from drkl_triton._objective import program
from drkl_triton._tile import Tile

INF = float("inf")
tl = objectives.tl
POINTWISE = [name for name, loss in LOSSES.items() if program(loss.objective().key).phis]


def tiles(free, *tensors):
    return [Tile(x.clone(), free) for x in tensors]


def log_probabilities(dtype):
    rows = torch.randn(2, 3, 50, dtype=dtype, generator=torch.Generator().manual_seed(0)) * 3 - 5
    rows[:, 0, 0] = rows[0, 1, 1] = rows[1, 2, 2] = facts.ABSENT
    return rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", POINTWISE)
def test_pointwise_divergences_are_those_of_tensors(name, dtype):
    objective = LOSSES[name].objective()
    phis = program(objective.key).phis
    parameters = [torch.full((3, 1), float(x), dtype=dtype) for x in objective.parameters]
    logs, free = log_probabilities(dtype), [torch.full((3, 50), torch.nan, dtype=dtype)]
    expected = facts.pointwise(*logs, parameters, phis)
    found = facts.pointwise(*tiles(free, *logs), parameters, phis)
    for x, right in zip(found, expected, strict=True):
        torch.testing.assert_close(x.x, right, equal_nan=True)


EXPRESSIONS = {
    "a nan that is not chosen": lambda x, y, c: tl.where(x > 0, x, y / 0.0 - y / 0.0),
    "a nan that is": lambda x, y, c: tl.where(x > 0, y / 0.0 - y / 0.0, INF),
    "numbers": lambda x, y, c: tl.where(x <= y, 1.0, -INF),
    "conditions": lambda x, y, c: tl.where(~(x < 0) & (y >= c) | (c == 1), x, -0.0),
    "a column's condition": lambda x, y, c: tl.where(c > 1, x, y),
    "a condition as a number": lambda x, y, c: (x != y) * x + (x == y),
    "operators, reflected": lambda x, y, c: (1 - x) / (2 / y) - (c / x) * (c - y) + (c + x) - -y,
    "functions": lambda x, y, c: tl.exp(tl.minimum(x, y)) + tl.log(tl.abs(x)) + tl.maximum(c, y),
    "other functions": lambda x, y, c: tl.ceil(x) + tl.exp2(y) + tl.floor(x) + tl.log2(tl.exp(x)),
    "the same exponential twice": lambda x, y, c: tl.exp(x) * y - tl.exp(x),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", EXPRESSIONS)
def test_expressions_are_those_of_tensors(name, dtype):
    x, y = torch.randn(2, 3, 50, dtype=dtype, generator=torch.Generator().manual_seed(0))
    x[:, 0], y[:, 1] = y[:, 0], 0.0
    c = torch.tensor([[0.5], [1.0], [2.0]], dtype=dtype)
    kept = x.clone(), y.clone()
    a, b = tiles([torch.full_like(x, torch.nan)], x, y)
    with torch._C.DisableTorchFunction():  # as inside of some compiled functions
        found = EXPRESSIONS[name](a, b, c).x
    right = EXPRESSIONS[name](x, y, c)
    torch.testing.assert_close(found, right, equal_nan=True, check_dtype=False)
    assert torch.equal(a.x, kept[0])
    assert torch.equal(b.x, kept[1])


def test_memory_is_used_again():
    free = [torch.empty(3, 50) for _ in range(3)]
    mine = {x.data_ptr() for x in free}
    x = Tile(free.pop(), free)
    x.x.fill_(-1.0)
    for _ in range(5):
        x = x * 0.5 + x
    assert {x.x.data_ptr(), *(b.data_ptr() for b in free)} == mine
