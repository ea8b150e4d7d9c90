"""Time, memory and bandwidth of one call: cold caches, the device's own clock, the allocator's own
count.
"""

import os
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler prints two lines at each use

import torch  # noqa: E402

from drkl_triton.slices import free_cuda_memory  # noqa: E402

MB = 10**6


def last_level_cache(device):
    """Bytes, or 32 MB where nothing says."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max((int(s.read_text().rstrip("K\n")) << 10 for s in sizes), default=32 * MB)


def free_memory(device):
    """Bytes that can still be allocated, or None where nothing says."""
    if device.type == "cuda":
        return free_cuda_memory(device)
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    kilobytes = [int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return kilobytes[0] << 10 if kilobytes else None


class Clock:
    """Times calls with cold caches. On a GPU: on the current device."""

    def __init__(self, device):
        self.gpu = device.type == "cuda"
        size = max((512 if self.gpu else 64) * MB, 2 * last_level_cache(device))
        self._evict = torch.ones(size // 8, dtype=torch.int64, device=device)

    def ms(self, call):
        """(milliseconds, result). On a GPU between two events on the stream: the launches are
        queued behind a pause, so that time is the GPU's and not Python's, unless the call itself
        waits for the GPU. There the cache is emptied by reading: what was written would be on its
        way to memory while the call runs.
        """
        if not self.gpu:
            self._evict.add_(1)  # reads and writes more than the last-level cache holds
            start = time.perf_counter()
            result = call()
            return (time.perf_counter() - start) * 1e3, result
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        torch.cuda.synchronize()
        self._evict.amax()
        torch.cuda._sleep(6_000_000)  # cycles: about 3 ms
        events[0].record()
        result = call()
        events[1].record()
        torch.cuda.synchronize()
        return events[0].elapsed_time(events[1]), result


class Copy:
    """A contiguous copy between two buffers: what the memory can do, measured like all the rest."""

    def __init__(self, device, megabytes):
        self._source = torch.ones(megabytes * MB, dtype=torch.uint8, device=device)
        self._target = torch.zeros_like(self._source)
        self.bytes = 2 * self._source.numel()

    def __call__(self):
        self._target.copy_(self._source)


class Read(Copy):
    """The largest element of one of them: what the memory can do where nothing is written."""

    def __init__(self, copy):
        self._source, self.bytes = copy._source.view(torch.int64), copy._source.numel()

    def __call__(self):
        self._source.amax()


def _requested(device, what):
    return torch.cuda.memory_stats(device).get(f"requested_bytes.all.{what}", 0)


@contextmanager
def allocations(device):
    """Yields an object whose ``peak`` and ``live`` are, at the end, the bytes of torch tensors that
    were allocated inside the block at most, and that are left of them.

    CUDA: the bytes asked of the caching allocator, which rounds up to blocks of its own. CPU: every
    allocation and release that torch's CPU allocator reports to the profiler, summed up; that
    covers all tensors, those of compiled code included, and leaves out what a library takes with
    malloc.
    """
    count = SimpleNamespace(peak=0, live=0)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = _requested(device, "current")
        yield count
        torch.cuda.synchronize(device)
        count.peak = _requested(device, "peak") - before
        count.live = _requested(device, "current") - before
        return
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        yield count
    events = [e for e in profile.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        count.live += event.nbytes()
        count.peak = max(count.peak, count.live)


def peak_memory(forward, backward, device):
    """Bytes above the inputs at most, by mode. What forward keeps counts in backward too."""
    with allocations(device) as first:
        out = forward()
    with allocations(device) as second:
        grad = backward(out)
    del out, grad
    peaks = {"forward": first.peak, "backward": first.live + second.peak}
    return peaks | {"both": max(peaks.values())}
