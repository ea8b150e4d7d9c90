"""The lines of the contract that only a GPU can show. TRITON_INTERPRET=0 pytest -m gpu"""

import pytest
import torch

from drkl_triton import drkl, linear_reverse_kl, log_softmax, reverse_kl, softmax

pytestmark = pytest.mark.gpu
V = 5003


def data(*shape, dtype=torch.float32, V=V):
    s, t = (3 * torch.randn(*shape, V, device="cuda", dtype=dtype) for _ in range(2))
    return s, t, torch.randint(V, shape, device="cuda")


@pytest.mark.parametrize("backend", ["triton", "tiled"])
def test_label_outside_is_nan_in_its_row(backend):
    """Looking at it would stall the device. Never a read outside the tensor."""
    s, t, y = data(5)
    clean = drkl(s, t, y, reduction="none", backend=backend)
    y[1], y[3] = V, -(2**40)
    s.requires_grad_()
    loss, metrics = drkl(s, t, y, reduction="none", return_metrics=True, backend=backend)
    loss.sum().backward()
    bad = torch.tensor([False, True, False, True, False], device="cuda")
    assert torch.equal(loss.isnan(), bad) and torch.equal(loss[~bad], clean[~bad])
    assert s.grad[bad].isnan().all() and s.grad[~bad].isfinite().all()
    assert metrics.target_kl[bad].isnan().all()
    loss, metrics = reverse_kl(s, t, y, reduction="none", return_metrics=True, backend=backend)
    assert loss.isfinite().all() and torch.equal(metrics.target_kl.isnan(), bad)


def step(s, t, y, backend, **options):
    """Forward and backward of everything; what it returns is new memory."""
    loss, metrics = drkl(s, t, y, backend=backend, return_metrics=True, shift=True, **options)
    other = reverse_kl(s, t, backend=backend) + softmax(s, backend=backend).square().sum()
    other = other + log_softmax(s, backend=backend)[..., 0].sum()
    return loss.detach(), torch.autograd.grad(loss + other, s)[0], metrics.target_kl


@pytest.mark.parametrize("backend", ["triton", "tiled"])
def test_nothing_waits_for_the_device(backend):
    s, t, y = data(2, 8)
    s.requires_grad_()
    y[0, 3] = -100
    on_device = dict(
        weight=torch.rand(2, 8, device="cuda"),
        gamma=torch.tensor(0.4, device="cuda"),
        temperature=torch.tensor(1.5, device="cuda"),
        num_items=torch.tensor(13.0, device="cuda"),
    )
    for options in (on_device, dict(gamma=0.4, temperature=1.5, num_items=13)):
        step(s, t, y, backend, **options)  # compiles the kernels
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(s, t, y, backend, **options)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("columns", [V, 200_003])  # one program a row; several, then merged
def test_cuda_graph(columns):
    """Captured once, replayed on other logits, labels and gamma."""
    s, t, y = data(2, 8, dtype=torch.bfloat16, V=columns)
    s.requires_grad_()
    gamma = torch.tensor(0.4, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step(s, t, y, "triton", gamma=gamma)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(s, t, y, "triton", gamma=gamma)
    with torch.no_grad():
        for x, new in zip((s, t, y), data(2, 8, dtype=torch.bfloat16, V=columns), strict=True):
            x.copy_(new)
        gamma.fill_(1.25)
    graph.replay()
    for one, other in zip(captured, step(s, t, y, "triton", gamma=gamma), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("options", [{}, {"recompute": True}, {"reduction": "none"}], ids=str)
def test_cuda_graph_of_a_linear_loss(options):
    """All rows count, which needs no look at the labels; captured once, replayed on others."""

    def draw():
        hidden, teacher_hidden = (torch.randn(24, 64, device="cuda").bfloat16() for _ in range(2))
        weight, teacher_weight = (torch.randn(V, 64, device="cuda").bfloat16() for _ in range(2))
        return hidden, weight, teacher_hidden, teacher_weight

    tensors = draw()
    for x in tensors[:2]:
        x.requires_grad_()
    upstream = torch.rand(24 if options.get("reduction") else (), device="cuda")

    def step():
        loss = linear_reverse_kl(
            *tensors[:2],
            teacher_hidden=tensors[2],
            teacher_weight=tensors[3],
            chunk_bytes=16 * V * 8,
            **options,
        )
        return loss.detach(), *torch.autograd.grad(loss, tensors[:2], upstream)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for x, new in zip(tensors, draw(), strict=True):
            x.copy_(new)
    graph.replay()
    for one, other in zip(captured, step(), strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=1e-5)


def test_auto_is_triton():
    s, t, y = data(3)
    assert torch.equal(drkl(s, t, y), drkl(s, t, y, backend="triton"))


def test_device_errors_name_both_devices():
    s, t, y = data(3)
    with pytest.raises(ValueError, match=r"labels.*cuda:0.*got cpu.*move"):
        drkl(s, t, y.cpu())
    with pytest.raises(ValueError, match=r"teacher_logits.*cuda:0.*got cpu.*move"):
        drkl(s, t.cpu(), y)


def test_0_dim_options_may_live_on_the_cpu():
    s, t, y = data(3)
    scalar = torch.tensor(0.7)
    out = drkl(s, t, y, gamma=scalar, temperature=scalar, num_items=scalar)
    torch.testing.assert_close(out, drkl(s, t, y, gamma=0.7, temperature=0.7, num_items=0.7))


def test_same_bits_again():
    """Few rows of a large vocabulary: split over programs and merged."""
    s, t = (torch.randn(2, 200_003, device="cuda", requires_grad=i == 0) for i in range(2))
    y = torch.tensor([5, 200_002], device="cuda")
    runs = []
    for _ in range(3):
        loss = drkl(s, t, y)
        runs.append((loss, torch.autograd.grad(loss, s)[0]))
    assert all(torch.equal(a, b) for run in runs for a, b in zip(run, runs[0], strict=True))
