"""The inputs of the losses from hidden states, and what is right for them.

As in truth.py, and the truth of d weight sums each distinct row as often as it counts. Their number
is a prime, with which no slice's length has a factor in common: a slice left out, or taken twice,
changes how often a row counts.
"""

import torch
from divergences import LOSSES
from linear_providers import IGNORED
from truth import EPS, UPSTREAM, condition, ratio, rounding, run

ROWS = 61
PART = 4096  # rows of a matrix that are converted to float64 at a time


class Hidden:
    """One op on one shape. The logits are about 3 N(0, 1) for the student, and that + N(0, 1) for
    the teacher; half of the labels are the teacher's favourite. ``ignored``: a share of the tokens.
    """

    trained = 2
    scale = UPSTREAM
    columns = ("op", "hidden", "teacher_hidden", "ignored", "tokens", "vocab")
    checked = {"loss_error": "loss", "hidden_error": "d hidden", "weight_error": "d weight"}

    def __init__(self, op, dtype, tokens, vocab, hidden, teacher_hidden, ignored, device):
        self.op, self.dtype, self.tokens, self.vocab = op, dtype, tokens, vocab
        self.hidden, self.teacher_hidden, self.ignored = hidden, teacher_hidden, ignored
        self.device = device
        generator = torch.Generator(self.device).manual_seed(self.vocab)
        N, V, H, teacher_H = self.tokens, self.vocab, self.hidden, self.teacher_hidden
        rows, both = min(ROWS, N), min(H, teacher_H)

        def normal(*shape, scale=1.0):
            return torch.randn(shape, generator=generator, device=self.device).mul_(scale)

        student, teacher = normal(rows, H), normal(rows, teacher_H)
        teacher[:, :both] = student[:, :both]
        student_weight = normal(V, H, scale=3 * H**-0.5)
        teacher_weight = normal(V, teacher_H, scale=teacher_H**-0.5)
        teacher_weight[:, :both] += student_weight[:, :both]
        self.student_weight = student_weight.to(self.dtype)
        self.teacher_weight = teacher_weight.to(self.dtype)
        self.distinct = student.to(self.dtype), teacher.to(self.dtype)
        del student_weight, teacher_weight

        favourite = product(self.distinct[1], self.teacher_weight, torch.float32).argmax(-1)
        self.distinct_labels = torch.randint(V, (rows,), generator=generator, device=self.device)
        self.distinct_labels[::2] = favourite[::2]
        self.of_row = torch.arange(N, device=self.device) % rows
        left_out = torch.randperm(N, generator=generator, device=self.device)
        self.labels = self.distinct_labels[self.of_row]
        self.labels[left_out[: round(self.ignored * N)]] = IGNORED
        student, teacher = (x[self.of_row] for x in self.distinct)
        self.tensors = (student, self.student_weight, teacher, self.teacher_weight, self.labels)
        self.leaves = self.tensors[:2]

    def upstream(self, out, scale):
        return torch.full_like(out, scale)

    def rates(self, mode, row):
        """Of the four products: both models' logits, d hidden, d weight."""
        counted = self.tokens - round(self.ignored * self.tokens)
        flops = 2 * counted * self.vocab * (3 * self.hidden + self.teacher_hidden)
        return {"flops": flops, "gflop_per_s": flops / row["ms"] / 1e6}

    def truth(self):
        return Truth(self)


def product(hidden, weight, dtype, absolute=False):
    """hidden @ weight.T, of absolute values if asked, in ``dtype``, without a copy of the whole
    matrix.
    """

    def operand(x):
        return x.to(dtype).abs() if absolute else x.to(dtype)

    hidden = operand(hidden)
    return torch.cat([hidden @ operand(part).t() for part in weight.split(PART)], dim=1)


class Truth:
    """To the limits of truth.py is added

    what float32 costs in the products before and after the loss;
    for who rounds the logits' gradient to 16 bits: the rounding of each of its elements;
    for who rounds the logits: four times what plain PyTorch loses by it in that row, at most.
    """

    def __init__(self, case):
        self.case = case
        (student, teacher), labels = case.distinct, case.distinct_labels
        heads = (student, case.student_weight), (teacher, case.teacher_weight)
        self.counts = torch.zeros(len(labels), device=case.device, dtype=torch.float64)
        self.counts.index_add_(0, case.of_row, (case.labels != IGNORED).double())
        total = self.counts.sum()
        self.upstream = UPSTREAM / total

        def of_logits(dtype, wide):
            return run(case.op, *(product(*head, dtype).to(wide) for head in heads), labels)

        def mean(x):
            return (x.double() * self.counts).sum() / total

        loss, self.g = of_logits(torch.float64, torch.float64)
        loss_b, self.g_b = of_logits(torch.float32, torch.float32)
        # by how many eps a row's logits may be off: the terms that they are sums of
        delta = sum(
            product(*head, torch.float64, absolute=True).amax(-1, keepdim=True) for head in heads
        )
        logits = (product(*head, torch.float64) for head in heads)
        kappa, terms = condition(case.op, *logits, labels)
        self.own = 8 * EPS * (kappa * (1 + delta) + self.g.abs())

        self.loss = mean(loss)
        self.loss_limit = 2 * (mean(loss_b) - self.loss).abs()
        self.loss_limit += 16 * EPS * (1 + LOSSES[case.op].size) * (1 + self.loss.abs())
        self.loss_limit += 8 * EPS * mean((terms * delta).sum(-1))
        if case.dtype.itemsize == 2:  # what plain PyTorch makes of 16-bit logits
            loss_16, g = of_logits(case.dtype, torch.float32)
            self.g_16 = (g * self.upstream).to(case.dtype).double() / self.upstream
            self.loss_rounding = 4 * mean((loss_16 - loss).abs())

    def errors(self, loss, hidden, weight, rounds=()):
        """(loss, d hidden, d weight): the largest errors in multiples of their limits. ``hidden``
        and ``weight`` are the gradients under UPSTREAM.
        """
        case, (h, _) = self.case, self.case.distinct
        (eps, denormal), limit = rounding(case.dtype), self.loss_limit
        rounds = rounds if case.dtype.itemsize == 2 else ()
        if "logits" in rounds:
            limit = limit + self.loss_rounding
        times, sums, worst = self.counts[:, None], [0.0] * 4, [ratio(loss, self.loss, limit), 0, 0]
        for c in range(0, case.vocab, PART):  # some columns of the logits at a time
            columns = slice(c, c + PART)
            g, plain, own = self.g[:, columns], self.g_b[:, columns], self.own[:, columns]
            if "gradient" in rounds:  # under the upstream gradient, a small one may be a denormal
                own = own + eps * g.abs() + denormal / self.upstream
            # what plain PyTorch loses by rounding logits
            lost = self.g_16[:, columns] - g if "logits" in rounds else torch.zeros_like(g)
            w = case.student_weight[columns]
            operands = (g, w.double(), h.double()), (plain, w.float(), h.float())
            operands += (own, w.double().abs(), h.double().abs()), (lost, w.double(), h.double())
            sums = [total + x @ w for total, (x, w, _) in zip(sums, operands, strict=True)]
            of_weight = ((x * times.to(x.dtype)).t() @ h for x, _, h in operands)
            worst[2] = max(worst[2], self._compare(weight[columns], *of_weight))
        kept = (case.labels != IGNORED)[:, None]
        for i in range(0, case.tokens, PART):
            rows = slice(i, i + PART)
            of_hidden = (x[case.of_row[rows]] * kept[rows] for x in sums)
            worst[1] = max(worst[1], self._compare(hidden[rows], *of_hidden))
        return tuple(worst)

    def _compare(self, ours, right, plain, own, lost):
        """``ours`` has the upstream gradient in it, the others do not yet."""
        eps, denormal = rounding(self.case.dtype)
        right, own = right * self.upstream, own * self.upstream
        plain = (plain.double() * self.upstream).to(self.case.dtype).double()
        own = own + 4 * self.upstream * lost.abs().amax(-1, keepdim=True)
        own = own + 2 * (plain - right).abs() + 2 * eps * right.abs()
        return ratio(ours, right, own + denormal)
