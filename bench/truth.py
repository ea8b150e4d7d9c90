"""The inputs, and what is right for them: float64, and limits that come from the data.

The tokens are R distinct rows, again and again. So the float64 truth of R rows is that of the whole
call, and a provider is checked on the very call that is timed. An error is held against twice what
plain PyTorch makes of the same inputs, and what float32 must cost (``condition``).
"""

import real_rows
import tables
import torch
from divergences import LOSSES

from drkl_triton import reference

ROWS = 8
# Each row's upstream gradient in the check: far from 1, so that a kernel that leaves it out shows,
# and large enough for float16 gradients, which are about 1 / V times it.
UPSTREAM = 300.0
EPS = torch.finfo(torch.float32).eps


def run(op, student, teacher, labels, upstream=1.0):
    """(losses [R], their gradients [R, V]) of the reference, in the dtype of the logits."""
    student = student.detach().requires_grad_()
    objective = LOSSES[op].objective
    labels = labels if objective.labels else None  # else directly, as the other providers do
    loss = reference.divergence(objective, student, teacher, labels, reduction="none")
    (grad,) = torch.autograd.grad(loss, student, torch.full_like(loss, upstream))
    return loss.detach(), grad


def condition(op, student, teacher, labels):
    """(of the gradient's elements, of the loss's terms), [R, V]: the absolute values of what they
    are sums of, and for the gradient what an exponential makes of its argument's rounding.

    Every gradient here is made of q_k and p_k times logarithms of them; if there must be labels, of
    those of the rest, renormalised, and of q_y (1 - q_y) at the label.
    """
    log_q, log_p = reference.log_softmax(student), reference.log_softmax(teacher)
    mass = torch.zeros_like(log_q)
    for log_x in (log_q, log_p):
        x = log_x.exp()
        if LOSSES[op].objective.labels:
            at_label = x.gather(-1, labels[:, None])
            rest = 1 - at_label
            x = (x / rest).scatter(-1, labels[:, None], at_label * rest)
        mass = torch.maximum(mass, x)
    logs = 1 + log_q.abs() + log_p.abs()
    # the slope of total variation jumps where q = p
    tie = (log_q - log_p).abs() < 1e-5 * logs
    terms = LOSSES[op].size * mass * logs
    return terms * (1 + log_q.abs() + tie / EPS), terms


def ratio(ours, truth, limit):
    """The largest error in multiples of its limit; 1 or less is right."""
    worst = ((ours.double() - truth).abs() / limit).max().item()
    return worst if worst == worst else float("inf")


def rounding(dtype):
    """(of a number, of the smallest ones)."""
    info = torch.finfo(dtype)
    return info.eps, info.smallest_normal * info.eps


class Logits:
    """One op on one shape: student, teacher [N, V] and labels [N]. logits: "random", or "real" for
    those of real_rows.py.
    """

    trained = 1
    columns = ("op", "vocab", "tokens", "logits")
    checked = {"result_error": "result", "grad_error": "gradient"}

    def __init__(self, op, dtype, vocab, tokens, device, logits="random"):
        self.op, self.dtype, self.vocab, self.tokens, self.device = op, dtype, vocab, tokens, device
        self.logits, self.rows = logits, min(ROWS, tokens)
        if logits == "real":
            student, teacher, labels = (x[: self.rows] for x in real_rows.load())
        else:
            student, teacher, labels = self._random(torch.Generator().manual_seed(vocab))
        self.distinct = student.to(device, dtype), teacher.to(device, dtype), labels.to(device)
        self.of_row = torch.arange(tokens, device=device) % self.rows
        self.tensors = [x[self.of_row] for x in self.distinct]
        self.leaves = self.tensors[:1]
        self.scale = UPSTREAM * tokens  # of the mean

    def _random(self, generator):
        student = torch.randn(self.rows, self.vocab, generator=generator) * 3
        teacher = student + torch.randn(self.rows, self.vocab, generator=generator)
        labels = torch.randint(self.vocab, (self.rows,), generator=generator)
        labels[::2] = teacher[::2].argmax(-1)  # likely labels and unlikely ones
        return student, teacher, labels

    def upstream(self, out, scale):
        """The gradient given to backward. Softmax takes the teacher's logits for one."""
        return self.tensors[1] if self.op == "softmax" else torch.full_like(out, scale)

    def rates(self, mode, row):
        size = self.tokens * self.vocab * self.dtype.itemsize
        return tables.bandwidth(row["ms"], moved(self.op, mode) * size, row["copy_gb_per_s"])

    def truth(self):
        return Truth(self)


def moved(op, mode):
    """Times the size of one [N, V] tensor: a loss reads the logits forward, and again backward,
    where it writes one. softmax reads one and writes one forward, backward it reads two.
    """
    forward = LOSSES[op].read if op in LOSSES else 2
    return {"forward": forward, "backward": forward + 1, "both": 2 * forward + 1}[mode]


class Truth:
    """Results and limits of the distinct rows."""

    def __init__(self, case):
        self.case = case
        (out, grad), (out_b, grad_b) = self._run(torch.float64), self._run(torch.float32)
        student, teacher, labels = case.distinct
        eps, denormal = rounding(case.dtype)
        if case.op == "softmax":
            g = teacher.double().abs()
            kappa_out = 8 * EPS * out * (1 + out.log().abs()) + 2 * eps * out + denormal
            kappa = out * (1 + out.log().abs()) * (g + (out * g).sum(-1, keepdim=True))
        else:
            out, out_b = (x[case.of_row].mean() for x in (out, out_b))
            kappa_out = 16 * EPS * (1 + LOSSES[case.op].size) * (1 + out.abs())
            kappa, _ = condition(case.op, student.double(), teacher.double(), labels)
            kappa = kappa * UPSTREAM
        own = 8 * EPS * kappa + 2 * eps * grad.abs() + denormal
        own = own + torch.finfo(torch.float32).smallest_normal * UPSTREAM
        self.right = out, grad
        self.limits = 2 * (out_b - out).abs() + kappa_out, 2 * (grad_b - grad).abs() + own

    def _run(self, dtype):
        """In float32, or as plain PyTorch has it: a softmax in the dtype of the logits, a gradient
        rounded to it.
        """
        student, teacher, labels = self.case.distinct
        plain = self.case.dtype if dtype == torch.float32 else dtype
        if self.case.op != "softmax":
            loss, grad = run(self.case.op, student.to(dtype), teacher.to(dtype), labels, UPSTREAM)
            return loss.double(), grad.to(plain).double()
        student = student.to(plain).requires_grad_()
        out = reference.softmax(student)
        (grad,) = torch.autograd.grad(out, student, teacher.to(plain))
        return out.detach().double(), grad.double()

    def errors(self, *results, rounds=()):
        """(result, gradient): the largest errors in multiples of their limits, of the first rows
        and the last ones.
        """
        case, worst = self.case, []
        for ours, right, limit in zip(results, self.right, self.limits, strict=True):
            if ours.dim():
                ends = [slice(0, case.rows), slice(case.tokens - case.rows, case.tokens)]
                rows = torch.cat([case.of_row[s] for s in ends])
                ours = torch.cat([ours[s] for s in ends])
                right, limit = right[rows], limit[rows]
            worst.append(ratio(ours, right, limit))
        return tuple(worst)
