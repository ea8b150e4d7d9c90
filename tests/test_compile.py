"""Every kernel compiles for real GPUs; on NVIDIA with 16-byte loads at an odd vocabulary size."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("compile_kernels.py")


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_kernels_compile(target, tmp_path):
    env = dict(os.environ, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
    run = subprocess.run(
        [sys.executable, SCRIPT, target], env=env, cwd=tmp_path, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr
    lines = run.stdout.splitlines()
    names = {line.split()[1] for line in lines}
    assert names == {
        "row_sums_kernel",
        "merge_sums_kernel",
        "row_grad_kernel",
        "softmax_sums_kernel",
        "softmax_kernel",
        "softmax_dot_kernel",
        "softmax_grad_kernel",
    }
    walks = [x for x in lines if "ALIGNED=True" in x and "float64" not in x]
    assert len(walks) >= 15
    if target.startswith("sm"):  # on gfx942 the alignment is lost on the way to buffer loads
        assert all(int(x.split()[-1]) > 0 for x in walks), walks
