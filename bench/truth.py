"""The inputs, and what is right for them: float64, and limits that come from the data.

The logits are R distinct rows repeated to N. So the float64 truth of R rows is that of the whole
call, and a provider is checked on the very call that is timed, its last rows too.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import real_rows
import torch
from providers import GAMMA

from drkl_triton import reference

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
import bounds  # noqa: E402  the project's one definition of how far off is too far

ROWS = 8
# Each row's upstream gradient in the check: far from 1, so that a kernel that leaves it out shows,
# and large enough for float16 gradients, which are about 1 / V times it.
UPSTREAM = 300.0


class Case:
    """One op on one shape: student, teacher [N, V] and labels [N]. logits: "random", or "real" for
    those of real_rows.py.
    """

    def __init__(self, op, dtype, vocab, tokens, device, logits="random"):
        self.op, self.dtype, self.vocab, self.tokens, self.device = op, dtype, vocab, tokens, device
        self.logits, self.rows = logits, min(ROWS, tokens)
        if logits == "real":
            student, teacher, labels = (x[: self.rows] for x in real_rows.load())
        else:
            student, teacher, labels = self._random(torch.Generator().manual_seed(vocab))
        self.distinct = student.to(device, dtype), teacher.to(device, dtype), labels.to(device)
        self.of_row = torch.arange(tokens, device=device) % self.rows
        self.student, self.teacher, self.labels = (x[self.of_row] for x in self.distinct)

    def _random(self, generator):
        student = torch.randn(self.rows, self.vocab, generator=generator) * 3
        teacher = student + torch.randn(self.rows, self.vocab, generator=generator)
        labels = torch.randint(self.vocab, (self.rows,), generator=generator)
        labels[::2] = teacher[::2].argmax(-1)  # likely labels and unlikely ones
        return student, teacher, labels

    def upstream(self, out, scale):
        """The gradient given to backward. Softmax takes the teacher's logits for one."""
        return self.teacher if self.op == "softmax" else torch.full_like(out, scale)


@dataclass
class Truth:
    """Results of the distinct rows in float64, and how far from them is allowed, elementwise."""

    out: torch.Tensor
    grad: torch.Tensor
    out_limit: torch.Tensor
    grad_limit: torch.Tensor


def truth_of(case):
    return _softmax(case) if case.op == "softmax" else _divergence(case)


def _eps(dtype):
    return torch.finfo(torch.float32).eps, torch.finfo(dtype).eps


def _denormal(dtype):
    return torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps


def _divergence(case):
    """As in tests/bounds.py: twice plain PyTorch's own error, and what float32 must cost."""
    student, teacher, labels = case.distinct
    # RKL without labels: the direct formula, as the other providers compute it
    inputs = (student, teacher, labels if case.op == "drkl" else None)
    upstream = torch.full((case.rows,), UPSTREAM, device=case.device)
    options = {"gamma": GAMMA} if case.op == "drkl" else {}
    (loss, grad), (loss_b, grad_b) = bounds.truth_and_baseline(
        case.op, *inputs, upstream, **options
    )
    kappa, flushed = bounds.condition(case.op, *inputs, upstream, **options)
    eps, out_eps = _eps(case.dtype)
    weights = 2 if case.op == "reverse_kl" else 1 + GAMMA
    loss, loss_b = (x[case.of_row].mean() for x in (loss, loss_b))  # the mean of all N rows
    return Truth(
        out=loss,
        grad=grad,
        out_limit=2 * (loss_b - loss).abs() + 16 * eps * weights * (1 + loss.abs()),
        grad_limit=2 * (grad_b - grad).abs()
        + 8 * eps * kappa
        + 2 * out_eps * grad.abs()
        + _denormal(case.dtype)
        + torch.finfo(torch.float32).smallest_normal * (1 + flushed),
    )


def _softmax(case):
    student, upstream, _ = case.distinct

    def run(dtype):
        x = student.to(dtype).requires_grad_()
        y = reference.softmax(x)
        (grad,) = torch.autograd.grad(y, x, upstream.to(dtype))
        return y.detach().double(), grad.double()

    (y, grad), (y_b, grad_b) = run(torch.float64), run(case.dtype)
    g, eps, out_eps = upstream.double().abs(), *_eps(case.dtype)
    kappa = y * (1 + y.log().abs())
    spread = g + (y * g).sum(-1, keepdim=True)

    def limit(truth, baseline, kappa):
        own = 8 * eps * kappa + 2 * out_eps * truth.abs() + _denormal(case.dtype)
        return 2 * (baseline - truth).abs() + own

    return Truth(y, grad, limit(y, y_b, kappa), limit(grad, grad_b, kappa * spread))


def errors(case, truth, out, grad):
    """(result, gradient): the largest error in multiples of its limit; 1 or less is right."""
    first, last = slice(0, case.rows), slice(case.tokens - case.rows, case.tokens)
    worst = []
    for ours, right, limit in (
        (out, truth.out, truth.out_limit),
        (grad, truth.grad, truth.grad_limit),
    ):
        if ours.dim() == 0:
            worst.append(bounds.ratio(ours, right, limit))
            continue
        pairs = ((ours[s], right[case.of_row[s]], limit[case.of_row[s]]) for s in (first, last))
        worst.append(max(bounds.ratio(*pair) for pair in pairs))
    return tuple(worst)
