"""DistiLLM's loss interface, against the dense formula it stands for, written from its definition:
the sum over the tokens whose label is not -100 of the divergence of float32 softmaxes, over their
number; terms of a column where either side is infinite are left out.
"""

import math

import pytest
import torch

from drkl_triton import reference
from drkl_triton.adapters import distillm

B, T, V = 2, 5, 37


def dense_reverse_kl(logits, teacher_logits, batch):
    counts = batch["label"] != -100
    log_q = logits.float().log_softmax(-1)
    log_p = teacher_logits.float().log_softmax(-1)
    terms = log_q.exp() * (log_q - log_p)
    terms = terms.where(logits.isfinite() & teacher_logits.isfinite(), 0.0)
    return (terms.sum(-1) * counts).sum() / counts.sum()


def dense_cross_entropy(logits, teacher_logits, batch):
    counts = batch["label"] != -100
    p, log_q = teacher_logits.float().softmax(-1), logits.float().log_softmax(-1)
    return -((p * log_q).sum(-1) * counts).sum() / counts.sum()


def dense_mixture(logits, teacher_logits, batch, of_q, of_p, lam):
    """of_q KL(q || m) + of_p (KL(p || m) + entropy if of_p is alone), m = lam q + (1 - lam) p."""
    counts = batch["label"] != -100
    q, p = logits.float().softmax(-1), teacher_logits.float().softmax(-1)
    log_m = (lam * q + (1 - lam) * p).log()
    rows = of_q * (q * (q.log() - log_m)).sum(-1)
    rows = rows + of_p * (p * (p.log() * (of_q != 0) - log_m)).sum(-1)
    return (rows * counts).sum() / counts.sum()


def dense_tv(logits, teacher_logits, batch):
    counts = batch["label"] != -100
    rows = 0.5 * (logits.float().softmax(-1) - teacher_logits.float().softmax(-1)).abs().sum(-1)
    return (rows * counts).sum() / counts.sum()


DENSE = {
    "reverse_kl": (dense_reverse_kl, {}),
    "forward_kl": (dense_cross_entropy, {}),
    "symmetric_kl": (
        lambda *a: 0.1 * dense_cross_entropy(*a) + 0.9 * dense_reverse_kl(*a),
        {},
    ),
    "symmetric_kl, lam": (
        lambda *a: 0.7 * dense_cross_entropy(*a) + 0.3 * dense_reverse_kl(*a),
        {"lam": 0.3},
    ),
    "js_distance": (lambda *a: dense_mixture(*a, 0.9, 0.1, 0.9), {}),
    "js_distance, lam": (lambda *a: dense_mixture(*a, 0.4, 0.6, 0.4), {"lam": 0.4}),
    "tv_distance": (dense_tv, {}),
    "skewed_forward_kl": (lambda *a: dense_mixture(*a, 0, 1, 0.9), {}),
    "skewed_reverse_kl": (lambda *a: dense_mixture(*a, 1, 0, 0.1), {}),
    "skewed_reverse_kl, lam": (lambda *a: dense_mixture(*a, 1, 0, 0.4), {"lam": 0.4}),
}


def dense_drkl(logits, teacher_logits, batch, gamma):
    rows = reference.drkl(
        logits.double(), teacher_logits.double(), batch["label"], gamma=gamma, reduction="none"
    )
    return rows.sum() / (batch["label"] != -100).sum()


@pytest.fixture
def batch():
    labels = torch.randint(V, (B, T))
    labels[0, :2] = labels[1, 3:] = -100
    logits = (3 * torch.randn(B, T, V)).requires_grad_()
    return logits, 3 * torch.randn(B, T, V), {"label": labels, "loss_mask": None}


def value_and_gradient(function, logits, *args):
    loss = function(logits, *args)
    return loss.detach(), *torch.autograd.grad(loss, logits)


@pytest.mark.parametrize("name", DENSE)
def test_they_are_the_dense_formulas(name, batch, backend):
    dense, options = DENSE[name]

    def ours(*args):
        return getattr(distillm, name.split(",")[0])(*args, backend=backend, **options)

    expected = value_and_gradient(dense, *batch)
    torch.testing.assert_close(value_and_gradient(ours, *batch), expected, rtol=2e-5, atol=1e-7)


def test_drkl_is_the_reference(batch, backend):
    loss, grad = value_and_gradient(
        lambda *args: distillm.drkl(*args, 0.3, backend=backend), *batch
    )
    expected = value_and_gradient(lambda *args: dense_drkl(*args, 0.3), *batch)
    torch.testing.assert_close(loss.double(), expected[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(grad, expected[1], rtol=2e-5, atol=1e-7)


def test_the_label_is_not_shifted(batch):
    logits, teacher, no_model_batch = batch
    teacher = teacher.clone()
    teacher[no_model_batch["label"] == -100] = float("nan")  # rows that count stand at their label
    assert distillm.reverse_kl(logits, teacher, no_model_batch).isfinite()


@pytest.mark.parametrize("op", ["reverse_kl", "drkl"])
def test_a_batch_without_valid_tokens_gives_zero(op, batch):
    logits, teacher, no_model_batch = batch
    no_model_batch["label"].fill_(-100)
    loss, grad = value_and_gradient(getattr(distillm, op), *batch)
    assert loss == 0 and (grad == 0).all()


def test_infinities_as_the_docstring_says(batch):
    logits, teacher, no_model_batch = batch
    forbidden = teacher.clone()
    forbidden[1, 0, 5] = -math.inf
    both = logits.detach().clone()
    both[1, 0, 5] = -math.inf
    # both, or the student alone: the same number, and a gradient
    for t in (forbidden, teacher):
        both.requires_grad_()
        ours, grad = value_and_gradient(distillm.reverse_kl, both, t, no_model_batch)
        dense, dense_grad = value_and_gradient(dense_reverse_kl, both, t, no_model_batch)
        torch.testing.assert_close(ours, dense)
        assert grad.isfinite().all() and dense_grad[1, 0].isnan().all()
    # the teacher alone: the divergence is infinite; there the term is left out
    assert distillm.reverse_kl(logits, forbidden, no_model_batch) == math.inf
    assert dense_reverse_kl(logits, forbidden, no_model_batch).isfinite()
    assert distillm.reverse_kl(logits, forbidden, no_model_batch, support="teacher").isfinite()
    sure = logits.detach().clone()
    sure[1, 0] = -60.0
    sure[1, 0, 5] = 60.0  # all of the mass where the teacher forbids it
    only = {"label": torch.full((B, T), -100)}
    only["label"][1, 0] = 3
    assert dense_reverse_kl(sure, forbidden, only) < 1e-6
    assert distillm.reverse_kl(sure, forbidden, only) == math.inf


def test_errors_say_what_is_missing(batch):
    logits, teacher, no_model_batch = batch
    with pytest.raises(TypeError, match="mapping.*got Tensor"):
        distillm.reverse_kl(logits, teacher, no_model_batch["label"])
    with pytest.raises(ValueError, match=r'"label".*holds \[.labels.\]'):
        distillm.drkl(logits, teacher, {"labels": no_model_batch["label"]})
    with pytest.raises(TypeError, match=r"Tensor \[B, T\].*got NoneType"):
        distillm.reverse_kl(logits, teacher, {"label": None})
    with pytest.raises(ValueError, match="detach"):
        distillm.drkl(logits, logits, no_model_batch)


@pytest.mark.parametrize("function", [distillm.drkl, distillm.reverse_kl])
def test_labels_are_not_shifted_twice(function):
    logits, batch = torch.randn(1, 3, 5), {"label": torch.tensor([[1, 2, -100]])}
    with pytest.raises(ValueError, match="shifted the labels already"):
        function(logits, logits, batch, shift=True)
