"""Settings that must be made before the first import, and what many tests share."""

import os
import random

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the kernels are decorated
if "PYTEST_XDIST_WORKER" in os.environ:  # a core each, also for what they start
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import quick_interpreter
import torch

from drkl_triton import _checks, kernels, tiled

try:
    from hypothesis import Phase, settings
except ImportError:  # a machine with a GPU and nothing else; test_properties.py is skipped
    settings = None

if _checks.INTERPRETING:
    quick_interpreter.install()

BACKENDS = ["tiled", pytest.param("triton", id="triton-interpreted")]


if settings is not None:
    # Of each property in test_properties.py; `make fuzz` takes the second. In `make test` no time
    # goes into making a failing example small: the same seed makes it again.
    quick = (Phase.explicit, Phase.reuse, Phase.generate)
    settings.register_profile("test", max_examples=15, deadline=None, phases=quick)
    settings.register_profile("fuzz", max_examples=300, deadline=None)
    settings.load_profile("test")


def pytest_configure(config):
    if settings is None:
        return
    if config.getoption("hypothesis_profile", None):
        settings.load_profile(config.getoption("hypothesis_profile"))
    if config.getoption("hypothesis_seed", None) is None:
        config.option.hypothesis_seed = random.SystemRandom().randrange(2**32)


def pytest_report_header(config):
    seed = getattr(config.option, "hypothesis_seed", None)
    return f"properties: --hypothesis-seed={seed}" if seed is not None else None


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch):
    """Every output starts as NaN, so that an element nobody writes shows."""

    def poisoned(shape, dtype, device):
        nothing = float("nan") if dtype.is_floating_point else -99
        return torch.full(shape, nothing, dtype=dtype, device=device)

    monkeypatch.setattr(kernels.launch, "new_output", poisoned)
    monkeypatch.setattr(tiled, "new_output", poisoned)


@pytest.fixture
def wide_tiles(monkeypatch):
    """Eight times the lanes: long rows in an eighth of the interpreter's time."""
    tuning = kernels.tuning
    monkeypatch.setattr(tuning, "MAX_LANES", 8 * tuning.MAX_LANES)
    tuning._choose.cache_clear()
    yield
    tuning._choose.cache_clear()


@pytest.fixture(autouse=True)
def memory_is_given_back(request):
    """Tests share the card with those of other processes."""
    yield
    if "gpu" in request.keywords:
        torch.cuda.empty_cache()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(20260401)


def pytest_collection_modifyitems(items):
    gpu = torch.cuda.is_available() and not _checks.INTERPRETING
    for item in items:
        if "gpu" in item.keywords and not gpu:
            item.add_marker(pytest.mark.skip(reason="needs a GPU, and TRITON_INTERPRET=0"))
