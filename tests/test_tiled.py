"""The tiled backend's threads, memory and scratch."""

import subprocess
import sys
import threading

import pytest
import torch
from bounds import excess

import drkl_triton
from drkl_triton import tiled

S, T = torch.randn(64, 5000), torch.randn(64, 5000)
Y = torch.randint(5000, (64,))


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def python(code):
    head = "import threading, time, torch; torch.set_num_threads(2)\n"
    return subprocess.run(
        [sys.executable, "-c", head + code], capture_output=True, text=True, timeout=120
    )


def test_rows_are_shared_by_threads_and_the_number_of_threads_stays(monkeypatch):
    seen, both, tile = set(), threading.Barrier(2), tiled._tile

    def spy(*args):
        me = threading.current_thread().name, torch.get_num_threads()
        if me not in seen:
            seen.add(me)
            both.wait(timeout=30)  # broken where one thread does all the work
        return tile(*args)

    monkeypatch.setattr(tiled, "_tile", spy)
    s = S.clone().requires_grad_()
    drkl_triton.drkl(s, T, Y).backward()
    assert len(seen) == 2 and {threads for _, threads in seen} == {1}
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_modes_reach_the_threads(mode):
    with mode():
        loss, metrics = drkl_triton.drkl(S, T, Y, return_metrics=True, reduction="none")
        y = drkl_triton.softmax(S)
    truth = drkl_triton.reference.drkl(S.double(), T.double(), Y, reduction="none")
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(y, S.softmax(-1))
    assert metrics.student_entropy.isfinite().all()


def test_an_error_in_a_thread_is_the_callers(monkeypatch):
    def broken(*args):
        raise OSError("no such tile")

    monkeypatch.setattr(tiled, "_tile", broken)
    with pytest.raises(OSError, match="no such tile"):
        drkl_triton.drkl(S, T, Y)
    monkeypatch.undo()
    assert drkl_triton.drkl(S, T, Y).isfinite()


def test_a_thread_that_outlives_the_main_program():
    """By then the interpreter starts no threads."""
    code = """
import drkl_triton
s, y = torch.randn(64, 5000), torch.randint(5000, (64,))
def late():
    time.sleep(1)
    print("loss", drkl_triton.drkl(s, s, y).item())
threading.Thread(target=late).start()
"""
    run = python(code)
    assert run.stdout.strip() == "loss 0.0", run.stderr


def test_systems_without_fork_and_huge_pages():
    code = """
import os, mmap
del os.register_at_fork
if hasattr(mmap, "MADV_HUGEPAGE"): del mmap.MADV_HUGEPAGE
import drkl_triton
s = torch.randn(256, 5000).requires_grad_()
drkl_triton.reverse_kl(s, torch.randn(256, 5000)).backward()
print(s.grad.isfinite().all().item())
"""
    run = python(code)
    assert run.stdout.strip() == "True", run.stderr


def test_a_low_finite_teacher_beside_absent_columns(backend):
    """A row that takes care, and a ratio that is finite but not small."""
    s, t = torch.randn(2, 60), torch.randn(2, 60)
    s[:, 10], t[:, 10] = -float("inf"), -float("inf")
    s[:, 37], t[:, 37] = -30.0, -1e20
    for name, labels in (("reverse_kl", None), ("drkl", torch.tensor([3, 9]))):
        assert max(excess(name, s, t, labels, torch.randn(2), backend=backend)) <= 1


@pytest.mark.parametrize("scratch", [1 << 20, 3 * 2 * 7])  # many rows at a time; several spans
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_with_gaps_between_them(dtype, scratch, monkeypatch):
    """Ignored rows, and views whose rows lie unevenly, differently in student and teacher."""
    monkeypatch.setattr(tiled, "SCRATCH", scratch)
    s = torch.randn(5, 9, 50).to(dtype)[:, :-1, :47]
    t = torch.randn(9, 5, 47).to(dtype).transpose(0, 1)[:, 1:]
    y = torch.randint(47, (5, 8))
    y[torch.rand(5, 8) < 0.4] = -100
    for name, labels in (("reverse_kl", None), ("reverse_kl", y), ("drkl", y)):
        assert max(excess(name, s, t, labels, torch.randn(5, 8), backend="tiled")) <= 1
    torch.testing.assert_close(drkl_triton.softmax(s), s.softmax(-1))


def test_work_goes_with_the_rows_not_with_the_gaps():
    rows = drkl_triton._layout.rows_of(torch.empty(100, 4, 8)[:, :3])
    skipped = torch.arange(300) % 2 == 0
    for skip, count in ((None, 300), (skipped, 150)):
        chunks = list(tiled._chunks(300, 50, [rows], skip))
        assert len(chunks) == count // 50
        walked = torch.cat([torch.arange(300)[chunk] for chunk in chunks])
        assert walked.tolist() == [i for i in range(300) if skip is None or i % 2]
