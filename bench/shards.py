"""Losses of a vocabulary that is shared over the ranks of a group: time, and bytes that are sent.

python bench/shards.py                       # 1, 2, 4 processes (gloo): 17 minutes, two cores
python bench/shards.py --op js_divergence --vocab 32000

Two ways: "group", each rank with its columns, and "gather", where every rank collects the logits of
all and computes the loss of one process. The cores are divided among the ranks.
"""

import argparse
import sys
import tempfile
import time
from itertools import product
from operator import itemgetter
from pathlib import Path

import command  # before PyTorch: it says how threads wait
import tables
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from divergences import LOSSES

from drkl_triton import divergence, linear_divergence

WAYS = ("group", "gather")
OPS = ("reverse_kl", "drkl", "js_divergence")
COLUMNS = (
    *("op", "source", "vocab", "tokens", "hidden", "ranks", "way", "loss_error", "grad_error"),
    *("sent_bytes_per_token", "ms", "ms_q1", "ms_q3", "runs", "x_one", "x_group"),
    *(*tables.ENVIRONMENT, "date"),
)
LIMIT = 1e-5  # of the loss, and of the gradient's largest element: float32's


class Sent:
    """Bytes of the results of the collectives that are called meanwhile."""

    def __enter__(self):
        self.bytes, self.kept = 0, (dist.all_reduce, dist.all_gather)
        for function in self.kept:
            setattr(dist, function.__name__, self._counted(function))
        return self

    def __exit__(self, *_):
        for function in self.kept:
            setattr(dist, function.__name__, function)

    def _counted(self, function):
        def counted(out, *args, **keywords):
            for x in out if isinstance(out, list) else [out]:
                self.bytes += x.numel() * x.element_size()
            return function(out, *args, **keywords)

        return counted


def gathered(x):
    """[N, V] of all ranks' columns."""
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x)
    return torch.cat(parts, 1)


def step(case, way, tensors, part):
    """(the loss, the gradient of the first tensor: of logits that of the columns ``part``). The
    matrix is frozen.
    """
    of, (student, teacher, matrix, labels) = LOSSES[case["op"]].objective, tensors
    group = dist.group.WORLD if way == "group" else None
    if matrix is not None and way != "gather":
        leaf = student.detach().requires_grad_()
        given = dict(teacher_hidden=teacher, teacher_weight=matrix, group=group)
        loss = linear_divergence(of, leaf, matrix, labels, **given)
        return loss.detach(), torch.autograd.grad(loss, leaf)[0]
    if matrix is not None:
        student, teacher = student @ matrix.T, teacher @ matrix.T
    if way == "gather":
        student, teacher = gathered(student), gathered(teacher)
    leaf = student.detach().requires_grad_()
    loss = divergence(of, leaf, teacher, labels, group=group)
    (grad,) = torch.autograd.grad(loss, leaf)
    grad = grad[:, part] if way == "gather" else grad
    if matrix is not None:
        grad = grad @ matrix
        dist.all_reduce(grad)
    return loss.detach(), grad


def inputs(case, part):
    """Of this rank: (student, teacher, matrix or None, labels), as every rank makes them."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    N, V, H = case["tokens"], case["vocab"], case["hidden"]
    labels = torch.randint(V, (N,), generator=generator)
    if case["source"] == "logits":
        student = 2 * draw(N, V)
        teacher = student + draw(N, V)
        return student[:, part].clone(), teacher[:, part].clone(), None, labels
    student = draw(N, H)
    return student, student + 0.3 * draw(N, H), (2 / H**0.5) * draw(V, H)[part].clone(), labels


def rank_main(rank, world, store, options, cases, results):
    torch.set_num_threads(max(1, options.threads // world))
    store = dist.FileStore(store, world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    for case in cases:
        columns = case["vocab"] // world
        part = slice(rank * columns, (rank + 1) * columns)
        tensors, right = inputs(case, part), torch.load(case["right"])
        for way in WAYS if world > 1 else ("one",):
            with Sent() as sent:
                loss, grad = step(case, way, tensors, part)  # warm, and the ranks have met
            mine = right[1][:, part] if case["source"] == "logits" else right[1]
            errors = [
                ((loss - right[0]) / right[0]).abs(),
                (grad - mine).abs().max() / right[1].abs().max(),
            ]
            times = []
            for _ in range(options.repeats):
                dist.barrier()
                start = time.perf_counter()
                step(case, way, tensors, part)
                times.append((time.perf_counter() - start) * 1e3)
            of_ranks = torch.tensor([*times, *map(float, errors)])
            dist.all_reduce(of_ranks, dist.ReduceOp.MAX)  # the slowest rank's
            *times, loss_error, grad_error = of_ranks.tolist()
            if rank == 0:
                results.put({
                    **{key: case[key] for key in COLUMNS if key in case}, "ranks": world,
                    "way": way, "loss_error": loss_error, "grad_error": grad_error,
                    "sent_bytes_per_token": sent.bytes / case["tokens"] if world > 1 else 0,
                    **tables.quartiles(times),
                })  # fmt: skip
    dist.destroy_process_group()


def measure(options, cases, folder):
    """The rows of all cases."""
    for i, case in enumerate(cases):
        case["right"] = folder / f"{i}.pt"
        torch.save(step(case, "one", inputs(case, slice(None)), slice(None)), case["right"])
    rows, context = [], mp.get_context("spawn")
    for world in [1, *options.ranks]:
        results, store = context.SimpleQueue(), str(folder / f"store-{world}")
        mp.spawn(rank_main, (world, store, options, cases, results), world)
        while not results.empty():
            rows.append(results.get())
    return rows


def add_ratios(rows):
    """To the time of one process, and of the other way."""
    case = itemgetter("op", "source", "vocab")
    ms = {(*case(row), row["ranks"], row["way"]): row["ms"] for row in rows}
    for row in rows:
        row["x_one"] = row["ms"] / ms[(*case(row), 1, "one")]
        if row["ranks"] > 1:
            row["x_group"] = row["ms"] / ms[(*case(row), row["ranks"], "group")]


def main(arguments=None):
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--op", nargs="+", choices=list(LOSSES), default=list(OPS), metavar="OP")
    add("--source", nargs="+", choices=["logits", "hidden"], default=["logits", "hidden"])
    add("--vocab", nargs="+", type=int, default=[32000, 128256], help="multiples of all --ranks")
    add("--tokens", type=int, default=512)
    add("--hidden", type=int, default=512, help="width of the hidden states")
    add("--ranks", nargs="+", type=int, default=[2, 4])
    add("--repeats", type=int, default=5)
    add("--threads", type=int, default=torch.get_num_threads(), help="of all ranks together")
    add("--out", type=Path, default=command.HERE / "results")
    add("--name", default="cpu-shards")
    options = parser.parse_args(arguments)
    for world, vocab in product(options.ranks, options.vocab):
        if world < 2 or vocab % world:
            parser.error(f"--ranks must be 2 or more and divide --vocab, got {world} and {vocab}")
    where = tables.environment(torch.device("cpu"), arguments, "bench/shards.py")
    cases = [
        {"op": op, "source": source, "vocab": vocab, "tokens": options.tokens,
         "hidden": options.hidden}
        for source, vocab, op in product(options.source, options.vocab, options.op)
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(options, cases, Path(folder))
    add_ratios(rows)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{options.name}.csv"
    tables.write_csv(path, [row | where for row in rows], COLUMNS)
    shown = "op", "source", "vocab", "ranks", "way", "ms", "x_one", "x_group"
    for row in [dict(zip(shown, shown, strict=True)), *rows]:
        cells = (tables.short(row.get(key, "")) for key in shown)
        print("  ".join(str(cell).rjust(13) for cell in cells))
    print(f"{tables.said(where)}\nwrote {path}")
    return int(max(max(row["loss_error"], row["grad_error"]) for row in rows) > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
