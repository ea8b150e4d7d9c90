"""Losses with a teacher of K log-probabilities a token: time and memory, forward and backward,
beside the dense formulas that need the student's log-softmax.

python bench/sparse.py                                   # some minutes on two CPU cores
python bench/sparse.py --device cuda --tokens 8192 --dtype bfloat16
"""

import argparse
import sys
from itertools import product
from pathlib import Path
from statistics import median

import tables
import torch
import torch._dynamo
from timing import Clock, peak_memory
from torch.nn.functional import log_softmax

from drkl_triton import SparseTeacher, divergence, log_probs_at, objectives, reference

HERE = Path(__file__).parent
COLUMNS = (
    *("op", "dtype", "vocab", "tokens", "k", "provider", "check", "forward_ms", "backward_ms"),
    *("ms", "ms_q1", "ms_q3", "runs", "peak_mb", "x_dense", "note", *tables.ENVIRONMENT, "date"),
)
OBJECTIVES = {
    "forward_kl": objectives.forward_kl(),
    "reverse_kl": objectives.reverse_kl(),
    "drkl": objectives.drkl(0.5),
}
OPS = ("log_probs_at", *OBJECTIVES)
WORST = 2e-3  # of loss and gradient, relative to the largest, in 16 bits


def cells(student, ids):
    """log q [N, K] and of the rest [N, 1], with the log-softmax written out. The rest is what is
    missing to 1: cheaper than a sum, and wrong where the K columns hold all but 1e-7.
    """
    log_q = log_softmax(student, -1, dtype=torch.float32).gather(-1, ids)
    return log_q, torch.log(-torch.expm1(log_q.logsumexp(-1, keepdim=True)))


def kl(log_x, log_y):
    return (log_x.exp() * (log_x - log_y)).sum(-1)


def dense(op, student, ids, log_p, label):
    at_ids, rest = cells(student, ids)
    if op == "log_probs_at":
        return at_ids.sum(-1) + rest[:, 0]
    log_q = torch.cat([at_ids, rest], -1)
    log_p = torch.cat([log_p, torch.log(-torch.expm1(log_p.logsumexp(-1, keepdim=True)))], -1)
    if op == "forward_kl":
        return kl(log_p, log_q)
    if op == "reverse_kl":
        return kl(log_q, log_p)
    whole = kl(log_q, log_p)
    q, p = (x.gather(-1, label[:, None])[:, 0] for x in (log_q, log_p))
    q_rest, p_rest = torch.log1p(-q.exp()), torch.log1p(-p.exp())
    target = q.exp() * (q - p) + q_rest.exp() * (q_rest - p_rest)
    return target + 0.5 * (whole - target) / q_rest.exp()


def trl(op, student, ids, log_p, label):
    """TRL's server distillation: no log-softmax, and a tail that is clamped from below."""
    z = student.float()
    log_q = z.gather(-1, ids) - z.logsumexp(-1, keepdim=True)

    def with_tail(x):
        whole = x.logsumexp(-1, keepdim=True).clamp(max=-1e-7)
        return torch.cat([x, torch.log(-torch.expm1(whole))], -1)

    return kl(with_tail(log_p), with_tail(log_q))


def verl(op, student, ids, log_p, label):
    """verl's: the K columns' terms alone, both sides clamped at -10."""
    log_q = log_softmax(student.float(), -1).gather(-1, ids).clamp(min=-10)
    return kl(log_p.clamp(min=-10), log_q)


def ours(op, student, ids, log_p, label):
    if op == "log_probs_at":
        at_ids, rest = log_probs_at(student, ids)
        return at_ids.sum(-1) + rest
    labels = ids.gather(-1, label[:, None])[:, 0]
    return divergence(OBJECTIVES[op], student, SparseTeacher(ids, log_p), labels, reduction="none")


def by_definition(op, student, ids, log_p, label):
    if op == "log_probs_at":
        at_ids, rest = reference.log_probs_at(student, ids)
        return at_ids.sum(-1) + rest
    labels = ids.gather(-1, label[:, None])[:, 0]
    teacher = SparseTeacher(ids, log_p)
    return reference.divergence(OBJECTIVES[op], student, teacher, labels, reduction="none")


def compiled(op, *tensors):
    return _compiled(op, *tensors)


_compiled = torch.compile(dense, dynamic=False)
# (function, whether it is the same divergence: TRL's and verl's are others, see above)
PROVIDERS = {
    "dense": (dense, OPS),
    "compile": (compiled, OPS),
    "ours": (ours, OPS),
    "trl": (trl, ("forward_kl",)),
    "verl": (verl, ("forward_kl",)),
}


def inputs(V, N, K, dtype, device):
    draw = torch.Generator(device).manual_seed(V + K)
    student, teacher = (
        3 * torch.randn(N, V, generator=draw, device=device, dtype=torch.float32) for _ in range(2)
    )
    top = (teacher + student).topk(K, -1)
    log_p = top.values - (teacher + student).logsumexp(-1, keepdim=True)
    label = torch.randint(K, (N,), generator=draw, device=device)
    return student.to(dtype).requires_grad_(), top.indices, log_p, label


def check(function, op, tensors):
    """Against the definition in float64, on eight rows: "ok", or what is wrong."""
    student, *others = (x[:8] for x in tensors)
    student = student.detach()

    def both(f, x):
        x = x.requires_grad_()
        loss = f(op, x, *others)
        return loss.detach().double(), torch.autograd.grad(loss.sum(), x)[0].double()

    found, truth = both(function, student.clone()), both(by_definition, student.double())
    for name, x, y in zip(("loss", "gradient"), found, truth, strict=True):
        error = ((x - y).abs().max() / y.abs().max()).item()
        if not error < WORST * (5 if student.dtype == torch.bfloat16 else 1):
            return f"WRONG: {name} off by {error:.2g}"
    return "ok"


def measure(op, dtype, V, K, options, names):
    tensors = inputs(V, options.tokens, K, getattr(torch, dtype), options.device)
    student, upstream = tensors[0], torch.ones(options.tokens, device=options.device)
    torch._dynamo.reset()  # after some shapes compiled code would stay behind
    clock, times, rows = Clock(options.device), {}, {}
    for name in names:
        function, _ = PROVIDERS[name]
        same = name not in ("trl", "verl")
        rows[name] = {"check": check(function, op, tensors) if same else "another divergence"}

    def forward(name):
        return PROVIDERS[name][0](op, *tensors)

    def backward(loss):
        return torch.autograd.grad(loss, student, upstream.to(loss.dtype))[0]

    for turn in range(options.repeats + 1):  # the first one warms up
        for name in names:
            first, loss = clock.ms(lambda: forward(name))  # noqa: B023
            second, _ = clock.ms(lambda: backward(loss))  # noqa: B023
            if turn:
                times.setdefault(name, []).append((first, second))
    for name in names:
        both = [sum(x) for x in times[name]]
        first, second = (median(x) for x in zip(*times[name], strict=True))
        peak = peak_memory(lambda: forward(name), backward, options.device)["both"]  # noqa: B023
        rows[name] |= {
            "op": op, "dtype": dtype, "vocab": V, "tokens": options.tokens, "k": K,
            "provider": name, "forward_ms": first, "backward_ms": second, "peak_mb": peak / 1e6,
            **tables.quartiles(both),
        }  # fmt: skip
    for row in rows.values():
        row["x_dense"] = row["ms"] / rows["dense"]["ms"]
    return list(rows.values())


def main(arguments=None):
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--op", nargs="+", choices=OPS, default=list(OPS))
    add("--k", nargs="+", type=int, default=[1, 20, 64, 128])
    add("--vocab", nargs="+", type=int, default=[32000, 128256, 262144])
    add("--tokens", type=int, default=512)
    add("--dtype", nargs="+", choices=["float32", "bfloat16"], default=["float32"])
    add("--device", type=torch.device, default=torch.device("cpu"))
    add("--providers", nargs="+", choices=list(PROVIDERS), default=list(PROVIDERS))
    add("--repeats", type=int, default=5)
    add("--out", type=Path, default=HERE / "results", help="folder; default: bench/results")
    add("--name", default="sparse", help="of the file, without .csv; default: sparse")
    options = parser.parse_args(arguments)
    if min(options.repeats, options.tokens, *options.k, *options.vocab) < 1:
        parser.error("--repeats, --tokens, --k and --vocab must be positive")
    providers = ["dense", *(name for name in options.providers if name != "dense")]
    where = tables.environment(options.device, arguments, "bench/sparse.py")
    options.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for op, dtype, V, K in product(options.op, options.dtype, options.vocab, options.k):
        names = [name for name in providers if op in PROVIDERS[name][1]]
        for row in measure(op, dtype, V, K, options, names):
            rows.append(row | where)
            text = "{op} {dtype} V={vocab:,} K={k} {provider}: {forward_ms:.1f} + {backward_ms:.1f}"
            text += " ms, {peak_mb:.0f} MB, {x_dense:.2f} of dense, {check}"
            print(text.format(**row), flush=True)
        tables.write_csv(options.out / f"{options.name}.csv", rows, COLUMNS)
    return int(any(row["check"].startswith("WRONG") and row["provider"] == "ours" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
