"""quick_interpreter.py changes no bit of what Triton's interpreter computes."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from drkl_triton import _checks

if not _checks.INTERPRETING:
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

SCRIPT = """
import sys
import torch
from drkl_triton import divergence, log_softmax, objectives as o, teacher_topk

def everything():
    torch.manual_seed(1)
    s, t = torch.randn(4, 700) * 3, torch.randn(4, 700)
    s[1, :300] = -torch.inf
    y = torch.tensor([5, 699, -100, 400])
    mix = o.drkl(0.3) + o.jensen_shannon(0.2) - 0.1 * o.entropy()
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        x, z = s.to(dtype).requires_grad_(), t.to(dtype)
        for teacher in (z, teacher_topk(z, 7, labels=y)):
            options = dict(reduction="none", backend="triton")
            if teacher is z:
                options["temperature"] = 1.5
            loss = divergence(mix, x, teacher, y, **options)
            yield from (loss.detach(), *torch.autograd.grad(loss.sum(), x))
        yield log_softmax(x.detach(), backend="triton")
"""


def test_it_computes_the_same_bits(tmp_path):
    file, names = tmp_path / "slow.pt", {}
    slow = subprocess.run(
        [sys.executable, "-c", SCRIPT + "torch.save(list(everything()), sys.argv[1])", str(file)],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert slow.returncode == 0, slow.stderr
    exec(SCRIPT, names)
    for one, other in zip(names["everything"](), torch.load(file), strict=True):
        assert torch.equal(one.nan_to_num(9e9), other.nan_to_num(9e9))
