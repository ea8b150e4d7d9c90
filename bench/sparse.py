"""Losses with K of the teacher's log-probabilities a token, and log_probs_at: time and peak memory.

python bench/sparse.py --op forward_kl --k 20            # some minutes on two CPU cores
python bench/sparse.py --device cuda                     # 8,192 tokens, bfloat16
"""

import sys
from itertools import product
from typing import NamedTuple

import command  # before PyTorch: it says how threads wait
import tables
import torch
import truth
from divergences import LOSSES, drkl, kl
from providers import Provider, compiled, each, package
from torch.nn import functional as F

from drkl_triton import SparseTeacher, divergence, log_probs_at, reference

OBJECTIVES = {name: LOSSES[name].objective for name in ("forward_kl", "reverse_kl", "drkl")}
OPS = ("log_probs_at", *OBJECTIVES)
INF, CLAMP = float("inf"), -10.0  # verl's
APART = "apart"  # another divergence: held against its own definition


class Known(NamedTuple):
    """Of the teacher: ids, log_p [N, K], and the label's, at_label [N]. DRKL has a cell for it."""

    ids: torch.Tensor
    log_p: torch.Tensor
    label: torch.Tensor
    at_label: torch.Tensor

    def given(self, op):
        """(teacher, labels)"""
        at_label, label = (self.at_label, self.label) if op == "drkl" else (None, None)
        return SparseTeacher(*self[:2], label_log_probs=at_label), label


def cells(op, ids, log_p, label, at_label):
    """(ids, log_p) [N, cells] of a Known's fields, but for the rest."""
    if op != "drkl":
        return ids, log_p
    return torch.cat([ids, label[:, None]], -1), torch.cat([log_p, at_label[:, None]], -1)


# --- plain PyTorch: float32 log_softmax, gather, the divergence of the cells ---


def missing(log_x, most=INF):
    """log(1 - sum): no pass over V, and nothing right where the sum is 1 but for 1e-7."""
    return torch.log(-torch.expm1(log_x.logsumexp(-1, keepdim=True).clamp(max=most)))


def summed(log_q, ids):
    """log of the sum of all others, as this package has it."""
    return log_q.scatter(-1, ids, -INF).logsumexp(-1, keepdim=True)


def dense(op, tail):
    """tail: "sum" of the others, or what is "missing" to 1."""

    def function(student, *known):
        ids, log_p = cells(op, *known)
        log_all = F.log_softmax(student, -1, dtype=torch.float32)
        log_q = log_all.gather(-1, ids)
        rest = summed(log_all, ids) if tail == "sum" else missing(log_q)
        log_q = torch.cat([log_q, rest], -1)
        if op == "log_probs_at":
            return log_q
        log_p = torch.cat([log_p, missing(log_p)], -1)
        if op == "drkl":
            return drkl(log_q, log_p, torch.full_like(ids[:, 0], ids.shape[1] - 1)).mean()
        return (kl(log_p, log_q) if op == "forward_kl" else kl(log_q, log_p)).mean()

    return function


def fused(op, tail):
    return compiled(dense(op, tail))


def trl(student, ids, log_p, *label):
    """TRL's for a server's log-probabilities: no log-softmax; the tail's mass is at least 1e-7."""
    logits = student.float()
    log_q = logits.gather(-1, ids) - logits.logsumexp(-1, keepdim=True)
    log_q, log_p = (torch.cat([x, missing(x, -1e-7)], -1) for x in (log_q, log_p))
    return kl(log_p, log_q).mean()


def verl(student, ids, log_p, *label):
    """verl's compute_forward_kl_topk: the K columns' terms alone, of logarithms above -10."""
    log_q = F.log_softmax(student, -1, dtype=torch.float32).gather(-1, ids)
    return kl(log_p.clamp(min=CLAMP), log_q.clamp(min=CLAMP)).mean()


def ours(op, backend):
    def function(student, *known):
        known = Known(*known)
        if op == "log_probs_at":
            log_q, rest = log_probs_at(student, known.ids, backend=backend)
            return torch.cat([log_q, rest[:, None]], -1)
        return divergence(OBJECTIVES[op], student, *known.given(op), backend=backend)

    return function


ALL = (
    Provider("dense", "the tail as a sum", each(dense, *OPS, tail="sum"), held=6),
    Provider("missing", "dense, 1 - sum", each(dense, *OPS, tail="missing"), held=4),
    Provider("compile", "of dense", each(fused, *OPS, tail="sum"), held=4),
    Provider("compile_missing", "of missing", each(fused, *OPS, tail="missing"), held=3),
    package("tiled", "this package, PyTorch in tiles", each(ours, *OPS, backend="tiled")),
    package("triton", "this package, Triton", each(ours, *OPS, backend="triton"), gpu_only=True),
    Provider("trl", "TRL's formula", {"forward_kl": lambda: trl}, held=4),
    Provider("verl", "verl's", {"forward_kl": lambda: verl}, held=4, rounds=(APART,)),
)


class Sparse(truth.Logits):
    """run.py's rows, of whose teacher the K largest are known; for DRKL besides the label's."""

    columns = ("op", "vocab", "tokens", "k")

    def __init__(self, op, dtype, vocab, tokens, k, device):
        super().__init__(op, dtype, vocab, tokens, device)
        student, teacher, label = self.distinct
        log_p = F.log_softmax(teacher.double(), -1)
        at_label = log_p.gather(-1, label[:, None]).float()[:, 0]
        if op == "drkl":
            log_p.scatter_(-1, label[:, None], -INF)
        top = log_p.topk(k, -1)
        self.k, self.known = k, Known(top.indices, top.values.float(), label, at_label)
        self.distinct = student, *self.known
        self.tensors = [self.tensors[0], *(x[self.of_row] for x in self.known)]
        draw = torch.Generator().manual_seed(k)
        self.given = torch.randn(self.rows, k + 1, generator=draw).to(device) * truth.UPSTREAM

    def upstream(self, out, scale):
        if self.op == "log_probs_at":
            return self.given[self.of_row[: len(out)]].to(out.dtype)
        return torch.full_like(out, scale)

    def rates(self, mode, row):
        return {}

    def truth(self):
        return Definition(self)


class Definition(truth.Truth):
    """truth.py's check, with the reference's sparse teacher; of verl's sum with its own formula."""

    def __init__(self, case):
        self.case, scale = case, self._scale(case)
        self.of = {apart: self._limits(apart, scale) for apart in (False, case.op == "forward_kl")}

    def errors(self, *results, rounds=()):
        self.right, self.limits = self.of[APART in rounds]
        return super().errors(*results)

    def _limits(self, apart, scale):
        """As in truth.py: twice plain PyTorch's error, what float32 must cost, the rounding."""
        (out, grad), (out_b, grad_b) = (self._run(x, apart) for x in (torch.float64, torch.float32))
        eps, denormal = truth.rounding(self.case.dtype)
        if self.case.op != "log_probs_at":
            out, out_b = (x[self.case.of_row].mean() for x in (out, out_b))
        least = denormal + torch.finfo(torch.float32).smallest_normal * truth.UPSTREAM
        limit = 2 * (out_b - out).abs() + 32 * truth.EPS * (1 + out.abs())
        of_grad = 2 * (grad_b - grad).abs() + 8 * truth.EPS * scale + 2 * eps * grad.abs() + least
        return (out, grad), (limit, of_grad)

    def _scale(self, case):
        """truth.condition of the gradient's elements."""
        student = case.distinct[0].double()
        log_q, (ids, log_p) = F.log_softmax(student, -1), cells(case.op, *case.known)
        tail = log_q - summed(log_q, ids)
        if case.op == "log_probs_at":
            g = case.given.double().abs()
            at = (tail.exp() * g[:, -1:]).scatter(-1, ids, g[:, :-1])
            return (at + log_q.exp() * g.sum(-1, keepdim=True)) * (1 + log_q.abs())
        # of the whole teacher that has the same gradient: its tail is shaped as the student's
        teacher = (tail + missing(log_p.double())).scatter(-1, ids, log_p.double())
        return truth.condition(case.op, student, teacher, case.known.label)[0] * truth.UPSTREAM

    def _run(self, dtype, apart):
        """(out, gradient); that of float32 is rounded to the dtype of the logits."""
        case, known = self.case, self.case.known
        student = case.distinct[0].to(dtype).detach().requires_grad_()
        log_q, rest = reference.log_probs_at(student, known.ids)
        if apart:
            log_p = known.log_p.to(dtype).clamp(min=CLAMP)
            out = kl(log_p, log_q.clamp(min=CLAMP))
        elif case.op == "log_probs_at":
            out = torch.cat([log_q, rest[:, None]], -1)
        else:
            of = OBJECTIVES[case.op], student, *known.given(case.op)
            out = reference.divergence(*of, reduction="none")
        (grad,) = torch.autograd.grad(out, student, case.upstream(out, truth.UPSTREAM))
        grad = grad.to(case.dtype) if dtype == torch.float32 else grad
        return out.detach().double(), grad.double()


class OfSparseTeachers(command.Bench):
    what, script, prefix = __doc__.splitlines()[0], "bench/sparse.py", "sparse-"
    providers, ops, default_ops = ALL, OPS, list(OPS)
    defaults = {"tokens": (8192, 512), "repeats": (20, 3), "dtype": (["bfloat16"], ["float32"])}
    extra = {
        "vocab": [32000, 50257, 128256, 151936, 262144],
        "k": [1, 20, 64, 128],
        "mode": ["both"],
        "copy_mb": 0,
        "no_plots": True,
    }
    dtypes, tell = "default: bfloat16; on a CPU float32", ("op", "dtype", "mode", "vocab", "k")
    columns = (
        *("op", "mode", "dtype", "vocab", "k", "tokens", "provider", "version"),
        *("check", *Sparse.checked, "ms", "ms_q1", "ms_q3", "runs", "peak_mb"),
        *(*tables.ratios(ALL), "note", *tables.ENVIRONMENT, "date"),
    )
    places, checked = {"V": "vocab", "K": "k"}, Sparse.checked
    beside, rates = ("dense", "missing"), {}
    legend = """\
ms           median, cold caches; quartiles beside it
peak MB      most memory held above the inputs, in 10^6 bytes
×dense       times the time of dense; below 1 is faster. ×missing likewise
check        against float64, on the call that is timed; verl against its own definition"""

    def options(self, add):
        add("--mode", nargs="+", choices=command.MODES, help="default: both")
        add("--vocab", nargs="+", type=int, metavar="V", help="default: five")
        add("--k", nargs="+", type=int, metavar="K", help="default: 1 20 64 128")
        add("--tokens", type=int, help="default: 8192 on a GPU, 512 on a CPU")

    def settle(self, parser, options):
        room = min(options.vocab) - max(options.k) - 1  # less the label
        if min(options.tokens, options.repeats, *options.k, room) < 1:
            parser.error("--tokens, --repeats, --k must be positive, --k below --vocab less 1")

    def cases(self, options):
        return [*product(options.op, options.dtype, [options.tokens], options.vocab, options.k)]

    def case(self, options, op, dtype, tokens, vocab, k):
        return Sparse(op, dtype, vocab, tokens, k, options.device)

    def title(self, row):
        return f"{row['op']}, {row['dtype']}, {row['mode']}, {row['tokens']:,} tokens"


bench = OfSparseTeachers()

if __name__ == "__main__":
    sys.exit(bench.main())
