"""The losses from hidden states: right against float64 logits, whatever the option, and small."""

import sys
from pathlib import Path

import bounds
import pytest
import torch

from drkl_triton import drkl, linear_drkl, linear_reverse_kl, reverse_kl

sys.path.append(str(Path(__file__).resolve().parents[1] / "bench"))

OPS = ["reverse_kl", "drkl"]
LOGITS = {"reverse_kl": reverse_kl, "drkl": drkl}
LINEAR = {"reverse_kl": linear_reverse_kl, "drkl": linear_drkl}


def head(leading, H, V, dtype=torch.float64, bias=False, scale=1.0, softcap=None):
    """(hidden, weight, bias, scale, softcap) whose logits have a spread of about 3 nats."""
    hidden = torch.randn(*leading, H, dtype=torch.float64).to(dtype)
    weight = (3 * torch.randn(V, H, dtype=torch.float64) / H**0.5).to(dtype)
    return hidden, weight, torch.randn(V).to(dtype) if bias else None, scale, softcap


# --- right, element by element ---

# (tokens, H, teacher's H, V): several slices each; one column a tile's worth; GPT-2's and Qwen's
# vocabularies; the widest hidden states
SIZES = [(7, 64, 96, 37), (5, 1024, 64, 4097), (3, 64, 128, 50257), (3, 256, 1024, 151936)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"H{size[1]}-{size[2]}-V{size[3]}")
@pytest.mark.parametrize("recompute", [False, True], ids=["in-forward", "recompute"])
def test_loss_and_gradients_are_right(op, dtype, size, recompute, backend):
    N, H, teacher_H, V = size
    if V > 5000 and (backend == "triton" or dtype not in DTYPES[:2] or recompute):
        pytest.skip("the longest rows: once in the tiled backend, in the usual dtypes")
    student = head((N,), H, V, dtype, bias=True)
    teacher = head((N,), teacher_H, V, dtype, bias=True)
    labels = torch.randint(V, (N,))
    upstream = torch.randn(N, dtype=torch.float64)
    ours = run_ours(op, student, teacher, labels, upstream, recompute, backend, V)
    excess = bounds.linear_excess(op, student, teacher, labels, upstream, ours=ours)
    assert max(excess) <= 1, excess


def run_ours(op, student, teacher, labels, upstream, recompute, backend, V, **options):
    """Per-row losses and gradients in slices of two rows. Where the gradients are made in forward,
    the loss is the weighted sum of the rows.
    """
    options = {"chunk_bytes": 2 * 2 * 8 * (V + 64), "backend": backend, **options}
    call = bounds.linear_ours(op, **options)
    if recompute:
        return bounds.run_linear(call, student, teacher, labels, upstream, reduction="none")

    def weighted(student, teacher, labels):
        more = {"weight": upstream, "reduction": "sum", "return_metrics": True}
        return call(student, teacher, labels, **more)

    leaves = [None if x is None else x.detach().requires_grad_() for x in student[:3]]
    loss, metrics = weighted((*leaves, *student[3:]), teacher, labels)
    factor = torch.tensor(1.7, dtype=loss.dtype)  # an upstream gradient, taken out again below
    grads = torch.autograd.grad(loss, [x for x in leaves if x is not None], factor)
    return metrics.loss, [g / 1.7 if g.dtype.itemsize >= 4 else g.double() / 1.7 for g in grads]
