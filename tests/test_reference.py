"""The reference is the truth the rest is held against, so it is held against the definitions
themselves.
"""

import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

from drkl_triton import reference

INF = float("inf")


def pair(rows=5, V=7, scale=3.0):
    s = (scale * torch.randn(rows, V, dtype=torch.float64)).requires_grad_()
    return s, scale * torch.randn(rows, V, dtype=torch.float64), torch.randint(V, (rows,))


def test_reverse_kl_is_its_definition_with_and_without_labels():
    s, t, y = pair()
    log_q, log_p = s.log_softmax(-1), t.log_softmax(-1)
    direct = (log_q.exp() * (log_q - log_p)).sum(-1)
    torch.testing.assert_close(
        direct, F.kl_div(log_p, log_q, log_target=True, reduction="none").sum(-1)
    )
    for labels in (None, y):
        torch.testing.assert_close(reference.reverse_kl(s, t, labels, reduction="none"), direct)


def test_exact_identity_of_target_and_non_target_part():
    s, t, y = pair(rows=50)
    target, nontarget, u = reference.split(s, t, y)
    q_y = s.softmax(-1).gather(-1, y[:, None])[:, 0]
    torch.testing.assert_close(torch.sigmoid(u), q_y)
    # both parts by their definitions, from renormalised probabilities
    p_y = t.softmax(-1).gather(-1, y[:, None])[:, 0]
    others = F.one_hot(y, s.shape[-1]) == 0
    q_hat = s.softmax(-1)[others].view(50, -1) / (1 - q_y)[:, None]
    p_hat = t.softmax(-1)[others].view(50, -1) / (1 - p_y)[:, None]
    torch.testing.assert_close(nontarget, (q_hat * (q_hat / p_hat).log()).sum(-1))
    torch.testing.assert_close(
        target, q_y * (q_y / p_y).log() + (1 - q_y) * ((1 - q_y) / (1 - p_y)).log()
    )
    rkl = reference.reverse_kl(s, t, reduction="none")
    torch.testing.assert_close(target + (1 - q_y) * nontarget, rkl)
    drkl = reference.drkl(s, t, y, gamma=0.3, reduction="none")
    torch.testing.assert_close(target + 0.3 * nontarget, drkl)


def test_non_target_part_pulls_the_target_logit_up_in_rkl_and_leaves_it_alone_in_drkl():
    s, t, y = pair(rows=200)
    _, n, u = reference.split(s, t, y)
    rest = torch.sigmoid(-u)
    (grad,) = torch.autograd.grad((rest * n).sum(), s, retain_graph=True)
    at_label = grad.gather(-1, y[:, None])[:, 0]
    assert (at_label < 0).all()
    torch.testing.assert_close(at_label, -torch.sigmoid(u) * rest * n)
    (grad,) = torch.autograd.grad(n.sum(), s)
    assert (grad.gather(-1, y[:, None]) == 0).all()


def test_rkl_is_overconfident_where_drkl_is_at_rest():
    """q_y = p_y, tails differ: RKL still raises the target logit, DRKL does not move it."""
    t = torch.tensor([[1.0, 0.5, -0.5, 2.0]], dtype=torch.float64)
    s = torch.tensor([[1.0, -0.5, 0.5, 2.0]], dtype=torch.float64, requires_grad=True)
    y = torch.tensor([0])
    (rkl,) = torch.autograd.grad(reference.reverse_kl(s, t, y), s)
    (drkl,) = torch.autograd.grad(reference.drkl(s, t, y), s)
    assert rkl[0, 0] < -1e-3
    assert abs(drkl[0, 0]) < 1e-16


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_closed_form_gradients(temperature):
    s, t, y = pair(rows=20)
    gamma = 0.7
    rows = torch.arange(20)
    log_q, log_p = (s / temperature).log_softmax(-1).detach(), (t / temperature).log_softmax(-1)
    _, n, u = reference.split(s.detach(), t, y, temperature)
    _, _, v = reference.split(t, t, y, temperature)
    q_y = torch.sigmoid(u)
    c = q_y * (1 - q_y) * (u - v)

    rkl = reference.reverse_kl(s, t, temperature=temperature, reduction="none")
    (grad,) = torch.autograd.grad(rkl.sum(), s)
    expected = log_q.exp() * (log_q - log_p - rkl.detach()[:, None]) / temperature
    torch.testing.assert_close(grad, expected)

    loss = reference.drkl(s, t, y, gamma=gamma, temperature=temperature, reduction="sum")
    (grad,) = torch.autograd.grad(loss, s)
    log_q_hat = log_q - (1 - q_y).log()[:, None]
    log_p_hat = log_p - (1 - torch.sigmoid(v)).log()[:, None]
    expected = log_q_hat.exp() * (gamma * (log_q_hat - log_p_hat - n[:, None]) - c[:, None])
    expected[rows, y] = c
    torch.testing.assert_close(grad, expected / temperature)


@pytest.mark.parametrize("function", ["reverse_kl", "drkl"])
def test_gradcheck_twice(function):
    s, t, y = pair(rows=3, V=5, scale=1.0)
    loss = lambda x: getattr(reference, function)(x, t, y, temperature=1.7, reduction="none")  # noqa: E731
    assert gradcheck(loss, s)
    assert gradgradcheck(loss, s)


@pytest.mark.parametrize("u", [70.0, -70.0])
def test_gradient_keeps_its_digits_where_the_student_is_sure(u):
    """torch.sigmoid's own derivative is 0 from u = 37 on; q_y (1 - q_y) there is 1e-31."""
    s = torch.tensor([[u, 0.0]], dtype=torch.float64, requires_grad=True)
    t = torch.tensor([[1.5, 0.0]], dtype=torch.float64)
    expected = math.exp(-abs(u)) / (1 + math.exp(-abs(u))) ** 2 * (u - 1.5)
    for function in (reference.drkl, reference.reverse_kl):
        (grad,) = torch.autograd.grad(function(s, t, torch.tensor([0])), s)
        torch.testing.assert_close(
            grad, torch.tensor([[expected, -expected]], dtype=torch.float64), rtol=1e-13, atol=0
        )


def test_heights_do_not_matter():
    s, t, y = pair()
    for function in (reference.reverse_kl, reference.drkl):
        torch.testing.assert_close(
            function(s + 1024.0, t - 1024.0, y, reduction="none"),
            function(s, t, y, reduction="none"),
        )


@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_softmax_is_torchs(name):
    s, _, _ = pair()
    torch.testing.assert_close(
        getattr(reference, name)(s, temperature=1.3), getattr(torch, name)(s / 1.3, -1)
    )
