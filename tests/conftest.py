"""Settings that must be made before the first import, and what many tests share."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the kernels are decorated

import pytest
import torch

from drkl_triton import _checks, kernels, tiled

BACKENDS = ["tiled", pytest.param("triton", id="triton-interpreted")]


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch):
    """Every output starts as NaN, so that an element nobody writes shows."""

    def poisoned(shape, dtype, device):
        return torch.full(shape, float("nan"), dtype=dtype, device=device)

    monkeypatch.setattr(kernels.launch, "new_output", poisoned)
    monkeypatch.setattr(tiled, "new_output", poisoned)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(20260401)


def pytest_collection_modifyitems(items):
    gpu = torch.cuda.is_available() and not _checks.INTERPRETING
    for item in items:
        if "gpu" in item.keywords and not gpu:
            item.add_marker(pytest.mark.skip(reason="needs a GPU, and TRITON_INTERPRET=0"))
