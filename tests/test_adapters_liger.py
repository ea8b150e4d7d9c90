"""The interface of Liger-Kernel's JSD losses, against the dense formulas that it documents."""

import pytest
import torch
from torch.nn import functional as F

from drkl_triton.adapters import liger

N, H, K, V = 9, 6, 5, 37


@pytest.fixture
def inputs():
    hidden, weight = torch.randn(N, H), torch.randn(V, H)
    teacher, matrix = torch.randn(N, K), torch.randn(V, K)
    labels = torch.randint(V, (N,))
    labels[2:4] = -100
    return [
        x.double().requires_grad_(k < 2) for k, x in enumerate((hidden, weight, teacher, matrix))
    ] + [labels]


def jsd(student, teacher, beta):
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    if beta in (0, 1):
        one, other = (log_p, log_q) if beta == 0 else (log_q, log_p)
        return (one.exp() * (one - other)).sum(-1)
    log_m = (beta * log_p.exp() + (1 - beta) * log_q.exp()).log()
    of_p, of_q = ((x.exp() * (x - log_m)).sum(-1) for x in (log_p, log_q))
    return beta * of_p + (1 - beta) * of_q


def dense(inputs, beta, hard, soft, temperature):
    hidden, weight, teacher, matrix, labels = inputs
    counts = labels != -100
    s, t = hidden @ weight.T, teacher @ matrix.T
    rows = jsd(s / temperature, t / temperature, beta)
    soft_loss = (rows * counts).sum() / counts.sum()
    hard_loss = F.cross_entropy(s, labels)
    return hard * hard_loss + soft * soft_loss, soft_loss, hard_loss


@pytest.mark.parametrize("beta", [0, 0.1, 0.5, 1])
@pytest.mark.parametrize("hard, soft", [(0.5, 0.5), (0.0, 1.0), (0.3, 0.9), (1.0, 0.0)])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_fused_linear_jsd_loss(beta, hard, soft, temperature, inputs, backend):
    expected = dense(inputs, beta, hard, soft, temperature)
    grads = torch.autograd.grad(expected[0], inputs[:2])
    module = liger.LigerFusedLinearJSDLoss(
        hard, soft, beta, temperature=temperature, return_soft_hard_loss=True, backend=backend
    )
    found = module(*inputs)
    for k, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        if k != 1 or soft:
            torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)
    ours = torch.autograd.grad(found[0], inputs[:2])
    torch.testing.assert_close(ours, grads, rtol=1e-10, atol=1e-12)
    module = liger.LigerFusedLinearJSDLoss(hard, soft, beta, temperature=temperature)
    torch.testing.assert_close(module(*inputs), expected[0], rtol=1e-11, atol=1e-13)


def test_fused_linear_jsd_and_jsd_of_log_probabilities(inputs, backend):
    hidden, weight, teacher, matrix, labels = inputs
    expected = dense(inputs, 0.2, 0.0, 1.0, 1.5)[0]
    ours = liger.LigerFusedLinearJSD(0.2, temperature=1.5, backend=backend)(*inputs)
    torch.testing.assert_close(ours, expected)
    log_p = (teacher @ matrix.T).log_softmax(-1)
    grads = []
    for normalised in (True, False):
        s = hidden @ weight.T
        log_q = s.log_softmax(-1) if normalised else s
        loss = liger.LigerJSD(0.2, backend=backend)(log_q, log_p, labels)
        torch.testing.assert_close(loss, dense(inputs, 0.2, 0.0, 1.0, 1.0)[0])
        grads.append(torch.autograd.grad(loss, hidden)[0])
    torch.testing.assert_close(*grads)
