"""A pretend CUDA: the GPU branches of Python code run on the CPU, with the tiled backend's
functions in the place of the kernels' launchers.

    TRITON_INTERPRET=0 python tests/pretend_cuda.py bench/run.py --device cuda ...

Inside ``pretend()`` every tensor says it is on cuda:0 and is made on the CPU, and torch.cuda
answers as an H100 would. ``set_device`` refuses what the real one refuses.
"""

import contextlib
import functools
import runpy
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode

from drkl_triton import _checks, kernels, slices, tiled

CARD = torch.device("cuda", 0)
PROPERTIES = SimpleNamespace(
    name="Pretend H100", multi_processor_count=132, warp_size=32, L2_cache_size=1 << 20,
    major=9, minor=0, total_memory=80 * 10**9,
)  # fmt: skip
STATS = {"requested_bytes.all.peak": 0, "requested_bytes.all.current": 0}


def _on_cpu(x):
    if isinstance(x, torch.device) and x.type == "cuda":
        return torch.device("cpu")
    return "cpu" if isinstance(x, str) and x.startswith("cuda") else x


class _Mode(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.Tensor.device.__get__:
            return CARD
        if function is torch.Tensor.is_cuda.__get__:
            return True
        if function is torch.device:
            return function(*args, **kwargs)
        args = tuple(map(_on_cpu, args))
        kwargs = {key: _on_cpu(value) for key, value in kwargs.items()}
        return function(*args, **kwargs)


def wide(multiply):
    """torch.mm or torch.addmm that takes 16-bit matrices and sums in ``out_dtype``."""

    @functools.wraps(multiply)  # inductor registers it by its name
    def call(*args, out_dtype=None, **kwargs):
        if out_dtype is not None:
            args = tuple(x.to(out_dtype) for x in args)
        return multiply(*args, **kwargs)

    return call


class Event:
    def __init__(self, **_):
        pass

    def record(self, stream=None):
        self.time = time.perf_counter()

    def elapsed_time(self, other):
        return (other.time - self.time) * 1e3


class Device(contextlib.nullcontext):
    pass


def set_device(device):
    torch.cuda._utils._get_device_index(device)  # ValueError for "cuda" without a number


class Generator(torch.Generator):
    def __new__(cls, device=None):
        return super().__new__(cls)


def nothing(*_, **__):
    pass


@contextlib.contextmanager
def pretend():
    cuda = dict(
        is_available=lambda: True, device_count=lambda: 1, current_device=lambda: 0,
        set_device=set_device, synchronize=nothing, empty_cache=nothing, _sleep=nothing,
        Event=Event, device=Device,
        mem_get_info=lambda *_: (76 * 10**9, 80 * 10**9), memory_reserved=lambda *_: 0,
        memory_allocated=lambda *_: 0, max_memory_allocated=lambda *_: 0,
        reset_peak_memory_stats=nothing, memory_stats=lambda *_: STATS,
        get_device_properties=lambda *_: PROPERTIES, get_device_name=lambda *_: PROPERTIES.name,
    )  # fmt: skip
    with contextlib.ExitStack() as stack:
        for name, stand_in in cuda.items():
            stack.enter_context(patch.object(torch.cuda, name, stand_in))
        for name in kernels.__all__:
            stack.enter_context(patch.object(kernels, name, getattr(tiled, name)))
        # inside of PyTorch's own functions a tensor says that it is on the CPU
        stack.enter_context(patch.object(_checks, "_TRITON_DEVICES", ("cuda", "cpu")))
        for name in ("mm", "addmm"):
            stack.enter_context(patch.object(torch, name, wide(getattr(torch, name))))
        slices.multiplies_into_float32.cache_clear()
        stack.callback(slices.multiplies_into_float32.cache_clear)
        stack.enter_context(patch.object(torch, "Generator", Generator))
        stack.enter_context(_Mode())
        yield


if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    with pretend():
        runpy.run_path(sys.argv[0], run_name="__main__")
