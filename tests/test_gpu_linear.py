"""The losses from hidden states on a GPU. TRITON_INTERPRET=0 pytest -m gpu

Each also runs small on the CPU, in Triton's interpreter.
"""

import importlib
import sys
from pathlib import Path

import bounds
import pytest
import test_linear
import torch

from drkl_triton import linear_drkl, linear_reverse_kl, slices

sys.path.append(str(Path(__file__).resolve().parents[1] / "bench"))
allocations = importlib.import_module("timing").allocations

gpu = pytest.mark.gpu
ops = pytest.mark.parametrize("op", test_linear.OPS)


def sizes(*real, small):
    """Runs a test with (device, N, H, V)."""
    on_gpu = [pytest.param("cuda", *size, marks=gpu, id="x".join(map(str, size))) for size in real]
    small = pytest.param("cpu", *small, id="small")
    return pytest.mark.parametrize("device, N, H, V", [*on_gpu, small])


@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_library_multiplies_16_bits_into_float32(dtype):
    """Else all that is said of slices on CUDA is not what runs."""
    device = torch.device("cuda", 0)
    assert slices.multiplies_into_float32(device, dtype)
    a, b = (torch.randn(64, 4096, device=device).to(dtype) for _ in range(2))
    out = torch.empty(64, 64, device=device)
    slices.multiply(a, b.t(), out)
    exact = a.double() @ b.double().t()
    size = a.double().abs() @ b.double().abs().t()
    assert ((out.double() - exact).abs() <= 32 * 2**-24 * size).all()


CASES = {
    "plain": {},
    "softcap": dict(softcap=6.0, scale=0.7),
    "recompute": dict(recompute=True),
    "teacher_logits": dict(given=True),
}


@ops
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", test_linear.DTYPES[:3], ids=str)
@sizes((61, 512, 32000), (13, 256, 128256), small=(4, 16, 301))
def test_right_against_float64(device, N, H, V, dtype, case, op):
    """Products of 16 bits are summed in float32: a rounded logit would break the bound."""
    options = dict(CASES[case])
    recompute, given = options.pop("recompute", False), options.pop("given", False)
    with torch.device(device):
        student = test_linear.head((N,), H, V, dtype, bias=True, **options)
        teacher = test_linear.head((N,), H // 2, V, dtype, **options)
        if given:
            teacher = bounds.logits_of(*teacher)
        inputs = (op, student, teacher, torch.randint(V, (N,)))
        inputs = (*inputs, torch.randn(N, dtype=torch.float64))
        ours = test_linear.run_ours(*inputs, recompute, "triton", V)
        eps = torch.finfo(dtype).eps
        rounding = eps / 2 if device == "cuda" and dtype != torch.float32 else 0.0
        excess = bounds.linear_excess(*inputs, ours=ours, rounding=rounding)
    assert max(excess) <= 1, excess


@ops
@sizes((512, 256, 50257), small=(6, 16, 301))
def test_ignored_rows_are_as_if_absent(device, N, H, V, op):
    with torch.device(device):
        hidden, weight, *_ = test_linear.head((N,), H, V, torch.bfloat16)
        logits = torch.randn(N, V, dtype=torch.bfloat16) * 3
        labels = torch.randint(V, (N,))
        labels[1::3] = -100
        kept = labels != -100
        hidden[~kept] = float("nan")
        grads = []
        for rows in (slice(None), kept):
            leaves = [x.detach().requires_grad_() for x in (hidden[rows], weight)]
            loss = test_linear.LINEAR[op](
                *leaves,
                labels[rows],
                teacher_logits=logits[rows],
                backend="triton",
                chunk_bytes=1 << 62,
            )
            grads.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    (loss, d_hidden, d_weight), expected = grads
    assert (d_hidden[~kept] == 0).all()
    for ours, alone in zip((loss, d_hidden[kept], d_weight), expected, strict=True):
        torch.testing.assert_close(ours, alone, rtol=2e-2, atol=1e-2 * alone.abs().max().item())


@gpu
@ops
@pytest.mark.parametrize("case", test_linear.HOT)
def test_float16_gradients_neither_overflow_nor_vanish(op, case):
    with torch.device("cuda"):
        test_linear.test_float16_gradients_neither_overflow_nor_vanish(op, case, None)


@gpu
def test_a_float16_gradient_divided_by_many_tokens_does_not_vanish():
    with torch.device("cuda"):
        test_linear.test_a_float16_gradient_divided_by_many_tokens_does_not_vanish(None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("recompute", [False, True], ids=["in-forward", "recompute"])
@sizes((4096, 1024, 128256), (8192, 256, 50257), small=(5, 8, 1001))
def test_peak_memory_is_what_chunk_bytes_says(device, N, H, V, recompute, dtype):
    chunk = (256 << 20) if device == "cuda" else 1 << 16
    with torch.device(device):
        hidden, weight, *_ = test_linear.head((N,), H, V, torch.float32)
        hidden, weight = (x.to(dtype).requires_grad_() for x in (hidden, weight))
        teacher = dict(teacher_hidden=hidden.detach(), teacher_weight=weight.detach())

        def step():
            loss = linear_reverse_kl(
                hidden, weight, **teacher, chunk_bytes=chunk, recompute=recompute, backend="triton"
            )
            return torch.autograd.grad(loss, (hidden, weight))

        step()  # compiles, and the library takes its own memory
        with allocations(torch.device(device)) as count:
            grads = step()
    outputs = sum(g.nbytes for g in grads)
    wide = sum(4 * g.numel() for g in grads)  # what the products are summed in
    assert outputs <= count.peak <= chunk + outputs + wide + 4096 * N + 8e6


@gpu
def test_several_gigabytes_of_logits_in_slices():
    """Rows of different slices and groups: the same as their own loss."""
    N, H, V = 4096, 256, 128256
    with torch.device("cuda"):
        hidden, weight, *_ = test_linear.head((N,), H, V, torch.bfloat16)
        teacher_hidden, labels = torch.randn_like(hidden), torch.randint(V, (N,))
        teacher = dict(teacher_weight=weight)
        loss, metrics = linear_drkl(
            hidden.requires_grad_(), weight, labels, teacher_hidden=teacher_hidden, **teacher,
            reduction="sum", return_metrics=True,
        )  # fmt: skip
        (grad,) = torch.autograd.grad(loss, hidden)
        for rows in (slice(8), slice(N // 2, N // 2 + 8), slice(N - 8, N)):
            x = hidden[rows].detach().requires_grad_()
            alone, apart = linear_drkl(
                x, weight, labels[rows], teacher_hidden=teacher_hidden[rows], **teacher,
                reduction="sum", return_metrics=True,
            )  # fmt: skip
            torch.testing.assert_close(metrics.loss[rows], apart.loss, rtol=1e-5, atol=1e-5)
            (expected,) = torch.autograd.grad(alone, x)
            atol = 1e-2 * expected.abs().max().item()
            torch.testing.assert_close(grad[rows], expected, rtol=2e-2, atol=atol)
