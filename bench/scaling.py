"""docs/scaling.md's tables: the time of a loss over more and more ranks, on paper.

python bench/scaling.py          # from bench/results/h100.csv and linear-h100.csv

What a kernel moves and a product multiplies is divided by the ranks, at the speeds that were
measured on one card; what the ranks send is added, at speeds that are assumed.
"""

import csv
from functools import cache
from math import log2
from pathlib import Path
from typing import NamedTuple

RESULTS = Path(__file__).resolve().parent / "results"
ROWS, VOCAB, HIDDEN = 8192, 262_144, 4096
RANKS = 1, 2, 4, 8, 16, 32, 64
MAXIMA, SUMS = 5, 3  # numbers a row that reverse KL and DRKL send


class Network(NamedTuple):
    """``bandwidth``: bytes/s that a card sends, and receives at the same time. ``latency``: seconds
    of a small all-reduce over so many ranks.
    """

    name: str
    bandwidth: float
    latency: object

    def all_reduce(self, nbytes, ranks):
        """A ring's: every card sends 2 (R - 1) / R of the bytes."""
        if ranks == 1:
            return 0.0
        return self.latency(ranks) + 2 * (ranks - 1) / ranks * nbytes / self.bandwidth

    def all_gather(self, nbytes, ranks):
        """nbytes: of the whole."""
        if ranks == 1:
            return 0.0
        return self.latency(ranks) + (ranks - 1) / ranks * nbytes / self.bandwidth


NETWORKS = (
    Network("NVLink", 360e9, lambda ranks: 20e-6),
    Network("InfiniBand", 41e9, lambda ranks: (15 + 10 * log2(ranks)) * 1e-6),
)


def measured(name, **where):
    with (RESULTS / name).open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if all(row[k] == v for k, v in where.items())]
    return rows[0]


@cache
def speeds():
    """(bytes/s forward, backward; seconds that the op adds; flop/s of the linear loss)"""
    case = dict(op="drkl", dtype="bfloat16", vocab=str(VOCAB), tokens=str(ROWS))
    forward, backward = (
        [measured("h100.csv", **case, mode=mode, provider=p) for p in ("kernels", "triton")]
        for mode in ("forward", "backward")
    )
    rates = [float(kernels["gb_per_s"]) * 1e9 for kernels, _ in (forward, backward)]
    more = sum(float(op["ms"]) - float(kernels["ms"]) for kernels, op in (forward, backward))
    linear = dict(op="drkl", dtype="bfloat16", vocab="128256", provider="triton", ignored="0")
    return *rates, more / 1e3, float(measured("linear-h100.csv", **linear)["gflop_per_s"]) * 1e9


def from_logits(network, ranks):
    """(kernels, sent, the same after gathering both models' logits) in seconds."""
    forward, backward, more, _ = speeds()
    tensor = ROWS * VOCAB * 2
    kernels = lambda share: 2 * tensor / share / forward + 3 * tensor / share / backward + more  # noqa: E731
    sent = sum(network.all_reduce(4 * n * ROWS, ranks) for n in (MAXIMA, SUMS))
    gathering = network.all_gather(2 * tensor, ranks) + kernels(1)
    return kernels(ranks), sent, gathering


def from_hidden(network, ranks, slices=8):
    """(products and kernels, sent) in seconds: d hidden in float32, a slice at a time."""
    flops = 8 * ROWS * VOCAB * HIDDEN
    sums = sum(network.all_reduce(4 * n * ROWS / slices, ranks) for n in (MAXIMA, SUMS))
    gradient = network.all_reduce(4 * ROWS * HIDDEN / slices, ranks)
    return flops / speeds()[-1] / ranks, slices * sums, slices * gradient


def table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def ms(seconds):
    return f"{seconds * 1e3:.3g}"


def tables():
    names = [network.name for network in NETWORKS]
    logits = []
    for ranks in RANKS:
        cells = [from_logits(network, ranks) for network in NETWORKS]
        own = [f"{ms(sent)}, {(kernels + sent) / cells[0][0]:.2f} ×" for kernels, sent, _ in cells]
        logits.append([str(ranks), ms(cells[0][0]), *own, *(ms(x[2]) for x in cells)])
    hidden = []
    for ranks in RANKS:
        cells = [from_hidden(network, ranks) for network in NETWORKS]
        sent = [f"{ms(sums)} + {ms(gradient)}" for _, sums, gradient in cells]
        hidden.append([str(ranks), ms(cells[0][0]), *sent])
    of_logits = ["ranks", "kernels", *(f"{n}: sent, whole" for n in names)]
    return (
        table([*of_logits, *(f"gathering, {n}" for n in names)], logits),
        table(["ranks", "products and kernels", *(f"{n}: sums + d hidden" for n in names)], hidden),
    )


if __name__ == "__main__":
    print("\n\n".join(tables()))
