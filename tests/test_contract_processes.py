"""What only a fresh process shows: the interpreter switched off, python -O, no Triton installed."""

import os
import subprocess
import sys
import textwrap
from importlib.util import find_spec

import pytest

PRELUDE = """
import re, torch, drkl_triton
from drkl_triton import backends, drkl, reverse_kl, softmax

s, t, y = torch.randn(3, 5, requires_grad=True), torch.randn(3, 5), torch.tensor([1, -100, 4])

def must_raise(error, *parts, call):
    # no assert here: these lines must bite under python -O too
    try:
        call()
    except error as caught:
        for part in parts:
            if not re.search(part, str(caught)):
                raise SystemExit(f"no {part!r} in: {caught}")
    else:
        raise SystemExit(f"no {error.__name__} for {parts}")

def must_work(backend):
    loss = drkl(s, t, y, backend=backend)
    loss.backward()
    if not (loss > 0 and (s.grad[1] == 0).all() and s.grad[0].abs().max() > 0):
        raise SystemExit(f"wrong: {loss}, {s.grad}")
    s.grad = None
"""

# find_spec and import both answer as if nobody had ever installed it.
HIDE_TRITON = """
import sys
class Hidden:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, *args):
        return None if name.split(".")[0] == "triton" else self.finder.find_spec(name, *args)
sys.meta_path[:] = [Hidden(finder) for finder in sys.meta_path]
import importlib.util
if importlib.util.find_spec("triton") is not None:
    raise SystemExit("not hidden")
"""

GPU_NEEDED = """
for call in (
    lambda: drkl(s, t, y, backend="triton"),
    lambda: reverse_kl(s, t, backend="triton"),
    lambda: softmax(s, backend="triton"),
    lambda: drkl_triton.DRKLLoss(backend="triton")(s, t, y),
):
    parts = 'backend="triton"', "GPU", "got cpu", "TRITON_INTERPRET=1", "tiled"
    must_raise(ValueError, *parts, call=call)
for backend in ("auto", "tiled"):
    must_work(backend)
"""

ERRORS = """
if __debug__:
    raise SystemExit("not under -O")
must_raise(ValueError, "labels", "got 6", call=lambda: drkl(s, t, y + 5))
must_raise(ValueError, "leading shape", call=lambda: drkl(s, t[:2], y))
must_raise(TypeError, "labels", call=lambda: drkl(s, t, y.float()))
must_raise(TypeError, "student_logits", call=lambda: drkl(s.tolist(), t, y))
must_raise(ValueError, "gamma", call=lambda: drkl(s, t, y, gamma=-1))
must_raise(ValueError, "temperature", call=lambda: softmax(s, temperature=0))
must_raise(ValueError, "reduction", call=lambda: reverse_kl(s, t, reduction="avg"))
must_raise(ValueError, "num_items", call=lambda: reverse_kl(s, t, reduction="sum", num_items=3))
must_raise(ValueError, "teacher_logits", "detach", call=lambda: reverse_kl(s, s))
must_raise(ValueError, "shift", call=lambda: reverse_kl(s, t, shift=True))
(grad,) = torch.autograd.grad(drkl(s, t, y), s, create_graph=True)
must_raise(RuntimeError, "second derivatives", call=lambda: grad.sum().backward())
"""


def run(*scripts, optimise=False, **variables):
    clean = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTHONOPTIMIZE")}
    script = textwrap.dedent("".join(scripts))
    result = subprocess.run(
        [sys.executable, *(["-O"] if optimise else []), "-c", script],
        env={**clean, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **variables},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")
def test_triton_on_the_cpu_without_the_interpreter():
    """And every error again without asserts."""
    run(PRELUDE, GPU_NEEDED, ERRORS, optimise=True)
    run(PRELUDE, GPU_NEEDED, TRITON_INTERPRET="0")


@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")
def test_interpreter_in_the_optimised_python():
    run(PRELUDE, 'must_work("triton")', ERRORS, optimise=True, TRITON_INTERPRET="1")


def test_without_triton():
    """Importing, auto and tiled work, whatever the interpreter's variable says."""
    asked_for = """
for call in (
    lambda: drkl(s, t, y, backend="triton"),
    lambda: reverse_kl(s, t, backend="triton"),
    lambda: softmax(s, backend="triton"),
):
    must_raise(ValueError, 'backend="triton"', "not installed", "install it.*tiled", call=call)
for backend in ("auto", "tiled"):
    must_work(backend)
softmax(s).sum().backward()
"""
    run(HIDE_TRITON, PRELUDE, asked_for, TRITON_INTERPRET="1")


def test_import_needs_no_compiler_and_starts_no_device():
    """import drkl_triton decorates no kernel and asks no driver: both may fail, and cost time."""
    run("""
import sys
import torch
before = {name for name in sys.modules if name.startswith("triton")}
import drkl_triton
late = [name for name in sys.modules if name.startswith("drkl_triton.kernels")]
if late or torch.cuda.is_initialized():
    raise SystemExit(f"imported too early: {late}")
if {name for name in sys.modules if name.startswith("triton")} - before:
    raise SystemExit("imported triton")
""")
