"""How fast the kernels are, on a GPU that does nothing else. TRITON_INTERPRET=0 pytest -m gpu

Each body also runs small on the CPU, where no time is held to anything.
"""

import importlib
import sys
from pathlib import Path
from statistics import median

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "bench"))
timing, providers = (importlib.import_module(name) for name in ("timing", "providers"))

INF = float("inf")


@pytest.fixture
def poisoned_outputs():
    """None here: filling a gradient with NaN first takes half as long as the kernel."""


def sizes(*real, small):
    """Runs a test with (device, N, V)."""
    gpu = pytest.mark.gpu
    on_gpu = [
        pytest.param("cuda:0", *size, marks=gpu, id="x".join(map(str, size))) for size in real
    ]
    small = pytest.param("cpu", *small, id="small")
    return pytest.mark.parametrize("device, N, V", [*on_gpu, small])


def draw(device, N, V):
    s = torch.randn(N, V, device=device, dtype=torch.bfloat16).mul_(3)
    t = torch.randn(N, V, device=device, dtype=torch.bfloat16).add_(s)
    return s, t, torch.randint(V // 2, (N,), device=device)


def milliseconds(s, t, y, repeats=9):
    """(forward, backward) of the two launches alone, medians."""
    clock, call = timing.Clock(s.device), providers.launches("drkl")()
    times = [], []
    for _ in range(repeats + 1):
        x = s.detach().requires_grad_()
        ms, out = clock.ms(lambda: call(x, t, y))  # noqa: B023
        times[0].append(ms)
        times[1].append(clock.ms(lambda: torch.autograd.grad(out, x))[0])  # noqa: B023
    return [median(values[1:]) for values in times]  # the first compiles


def held(device, said):
    """Whether the times mean anything; shows them."""
    print(said)
    return device != "cpu"


@sizes((8192, 128256), (8192, 32000), (8192, 50257), (1400, 128256), (264, 262144), small=(2, 301))
def test_a_floor_on_percent_of_copy(device, N, V):
    s, t, y = draw(device, N, V)
    forward, backward = milliseconds(s, t, y, 9 if device != "cpu" else 1)
    clock, copy = timing.Clock(s.device), timing.Copy(s.device, 2048 if device != "cpu" else 1)
    speed = copy.bytes / median(clock.ms(copy)[0] for _ in range(7))
    forward, backward = (
        100 * tensors * s.nbytes / ms / speed for tensors, ms in ((2, forward), (3, backward))
    )
    floor = 75 if N * V > 10**8 else 60
    said = f"{forward:.0f} and {backward:.0f} % of copy, at least {floor}"
    assert not held(device, said) or min(forward, backward) >= floor, said


def padded(s, t):
    s[:, -48:] = t[:, -48:] = -INF


def late_maxima(s, t):
    s[:, s.shape[1] * 3 // 4] += 60


def far_masks(s, t):
    s[:, s.shape[1] // 2 :: 2] = torch.finfo(s.dtype).min


def holes(s, t):
    s[:, s.shape[1] // 2 :: 2] = -INF


# (forward, backward) of such rows over those of ordinary ones, at most
COSTS = {padded: (1.6, 1.3), late_maxima: (1.1, 1.1), far_masks: (1.1, 1.3), holes: (2.3, 1.3)}


@pytest.mark.parametrize("change", COSTS, ids=lambda change: change.__name__)
@sizes((8192, 50304), (2048, 128256), small=(2, 304))
def test_what_unusual_rows_cost(device, N, V, change):
    """Rows that are walked with care from the start, rows that are read once like any other, and
    rows whose -inf is met late, so that they are read twice.
    """
    s, t, y = draw(device, N, V)
    repeats = 9 if device != "cpu" else 1
    ordinary = milliseconds(s, t, y, repeats)
    change(s, t)
    unusual = milliseconds(s, t, y, repeats)
    ratios = [a / b for a, b in zip(unusual, ordinary, strict=True)]
    said = f"x{ratios[0]:.2f} and x{ratios[1]:.2f}, at most {COSTS[change]}"
    right = all(ratio <= most for ratio, most in zip(ratios, COSTS[change], strict=True))
    assert not held(device, said) or right, said
