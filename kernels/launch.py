"""What every launcher needs: the device, the interpreter's lock, output memory, alignment."""

import contextlib
import threading

import torch
import triton.language as tl

TL_DTYPE = {torch.float32: tl.float32, torch.float64: tl.float64}

_interpreter_lock = threading.Lock()


@contextlib.contextmanager
def on_device(device):
    """Launch on the tensors' own device, not on the current one; one thread at a time in the
    interpreter.
    """
    if device.type == "cpu":  # the interpreter keeps its grid position in module state
        with _interpreter_lock:
            yield
    elif device.type == "xpu":
        with torch.xpu.device(device):
            yield
    else:  # CUDA, and ROCm under the same name
        with torch.cuda.device(device):
            yield


def new_output(shape, dtype, device):
    """Uninitialised memory for a kernel's output. The tests replace this function to fill it with
    NaN first.
    """
    return torch.empty(shape, dtype=dtype, device=device)


def equally_aligned(*rows):
    """Whether row i of every operand lies equally far from a 16-byte boundary, for all i.

    ``rows`` have ``tensor``, ``inner`` and ``strides``; row i starts at (i // inner) * strides[0] +
    (i % inner) * strides[1].
    """

    def phase(r):
        item = r.tensor.element_size()
        return item, r.tensor.data_ptr() % 16, r.strides[0] * item % 16, r.strides[1] * item % 16

    first, *rest = map(phase, rows)
    if any(other != first for other in rest):
        return False
    return first[2:] == (0, 0) or len({r.inner for r in rows}) == 1
