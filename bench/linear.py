"""The losses from hidden states: time and peak memory beside the four matrix products alone.

python bench/linear.py                                   # under ten minutes on two CPU cores
python bench/linear.py --device cuda                     # 8,192 tokens, hidden size 4,096, bfloat16
python bench/linear.py --op drkl --tokens 512 --vocab 50257 128256 --hidden 512
"""

import argparse
import os
import sys
from dataclasses import dataclass, field

# As in run.py, which says why.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

try:
    import linear_providers as providers
    import tables
    import torch
    from command import DTYPES, add_options, first_line, in_time, in_turn, progress, report, settle
    from linear_truth import UPSTREAM, Case, Truth
    from tables import digits
    from timing import MB, Clock, allocations, free_memory
except ModuleNotFoundError as error:
    sys.exit(
        f"{error}; at the repository's root say: make bench-linear, or: pip install -e '.[bench]'"
    )

# The columns that tell one case from another.
CASE = ("op", "dtype", "hidden", "teacher_hidden", "ignored", "tokens", "vocab")
RATIOS = tuple(f"x_{provider.name}" for provider in providers.ALL)
ERRORS = ("loss_error", "hidden_error", "weight_error")
COLUMNS = (
    *(*CASE, "provider", "version", "check", *ERRORS),
    *("ms", "ms_q1", "ms_q3", "runs", "flops", "gflop_per_s", "peak_mb"),
    *(*RATIOS, "note", *tables.ENVIRONMENT, "date"),
)
BESIDE = ("products", "dense")  # whose ratios the table shows; the CSV has all


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--op", nargs="+", choices=providers.OPS, default=list(providers.OPS))
    add("--dtype", nargs="+", choices=list(DTYPES), help="default: bfloat16; on a CPU float32")
    first = "the others are taken at the first number of %s"
    add("--tokens", nargs="+", type=int, metavar="N", help=first % "--vocab")
    add("--vocab", nargs="+", type=int, metavar="V", help=first % "--tokens")
    add("--hidden", type=int, metavar="H", help="default: 4096 on a GPU, 256 on a CPU")
    add("--teacher-hidden", type=int, metavar="H", help="the teacher's; default: the student's")
    add("--ignored", type=float, default=0.0, help="share of tokens without a loss; default: 0")
    add_options(parser, [provider.name for provider in providers.ALL], repeats=(10, 3))
    options = parser.parse_args(arguments)
    settle(
        parser,
        options,
        {
            "tokens": ([8192, 2048, 4096, 16384], [1024, 512, 2048]),
            "vocab": ([128256, 32000, 65536, 262144], [65536, 32000, 151936]),
            "hidden": (4096, 256),
            "repeats": (10, 3),
            "dtype": (["bfloat16"], ["float32"]),
        },
    )
    options.teacher_hidden = options.teacher_hidden or options.hidden
    sizes = (options.hidden, options.teacher_hidden, *options.tokens, *options.vocab)
    if min(options.repeats, *sizes) < 1:
        parser.error("--repeats, --hidden, --tokens and --vocab must be positive")
    if not 0 <= options.ignored <= 0.99 or min(options.tokens) * (1 - options.ignored) < 1:
        parser.error(f"--ignored must leave a token: at most 0.99, got {options.ignored}")
    return options


def shapes(options):
    """(tokens, vocabulary): every vocabulary at the first number of tokens, every number of tokens
    at the first vocabulary. What both have first, then the smallest logits.
    """
    tokens, vocab = options.tokens, options.vocab
    first = tokens[0], vocab[0]
    others = {(tokens[0], V) for V in vocab} | {(N, vocab[0]) for N in tokens}
    return [first, *sorted(others - {first}, key=lambda shape: (shape[0] * shape[1], shape))]


@dataclass
class Entry:
    """A provider in one case: its function, then what is measured."""

    provider: providers.Provider
    call: object = None
    note: str = ""
    errors: tuple = ()
    peak: int | None = None
    times: list = field(default_factory=list)


class Measurement:
    """All providers on one case. ``rows`` may be asked for at any time."""

    def __init__(self, case, entries, clock):
        self.case, self.entries, self.clock = case, entries, clock

    def _step(self, entry, upstream=1.0):
        """One call: (loss, d student_hidden, d student_weight); the products have no loss."""
        hidden, weight, *others = (x.detach() for x in self.case.tensors)
        if entry.provider.floor:
            return (None, *entry.call(hidden, weight, *others))
        hidden.requires_grad_()
        weight.requires_grad_()
        loss = entry.call(hidden, weight, *others)
        grads = torch.autograd.grad(loss, (hidden, weight), torch.full_like(loss, upstream))
        return (loss.detach(), *grads)

    def _too_large(self, provider):
        """A note, if what it needs is more than half of the memory that is free."""
        case, free = self.case, free_memory(self.case.device)
        needed = 4 * provider.held * case.tokens * case.vocab
        if free is None or needed <= free / 2:
            return ""
        return f"skipped: about {digits(needed / 1e9)} GB, over half of the free memory"

    def prepare(self, entry, truth):
        """Compile, check, measure memory; what fails is noted and not timed."""
        provider = entry.provider
        entry.note = self._too_large(provider)
        if entry.note:
            return
        try:
            entry.call = provider.ops[self.case.op]()
            results = self._step(entry, UPSTREAM)
            if not provider.floor:
                entry.errors = truth.errors(*results, provider.rounds_on(self.case.device))
            del results
            with allocations(self.case.device) as count:
                self._step(entry)
            entry.peak = count.peak
        except Exception as error:  # other people's losses fail in ways of their own
            entry.call, entry.note = None, first_line(error)

    def run(self, repeats, step):
        truth = Truth(self.case)
        for entry in self.entries:
            self.prepare(entry, truth)
            step(entry.provider.name)
        del truth
        for turn in range(repeats):
            for entry in in_turn(self.entries, turn):
                if entry.call:
                    try:
                        entry.times.append(self.clock.ms(lambda e=entry: self._step(e))[0])
                    except Exception as error:
                        entry.call, entry.note = None, first_line(error)
                step(entry.provider.name)

    def rows(self):
        case = self.case
        for entry in self.entries:
            row = {key: getattr(case, key) for key in CASE}
            row |= {
                "dtype": str(case.dtype).removeprefix("torch."),
                "provider": entry.provider.name,
                "version": entry.provider.version,
                "note": entry.note,
                "peak_mb": "" if entry.peak is None else entry.peak / MB,
            }
            if entry.errors:
                row |= {"check": "ok" if max(entry.errors) <= 1 else "WRONG"}
                row |= dict(zip(ERRORS, entry.errors, strict=True))
            if entry.times and not entry.note:
                row |= tables.quartiles(entry.times) | {"flops": case.flops}
                row |= {"gflop_per_s": case.flops / row["ms"] / 1e6}
            if "ms" in row or entry.note:  # else not reached yet
                yield row


def measure(options, notes, keep):
    """Every case in turn; the rows of each go to ``keep``, those of an interrupted one too."""
    clock = Clock(options.device)
    cases = [
        (op, dtype, *shape)
        for shape in shapes(options)
        for op in options.op
        for dtype in options.dtype
    ]
    taking_part = {
        op: [p for p in providers.ALL if p.name in options.providers and (op, p.name) not in notes]
        for op in options.op
    }
    work = sum((options.repeats + 1) * len(taking_part[op]) * N * V for op, _, N, V in cases)
    with progress(work) as bar:
        for op, dtype, tokens, vocab in in_time(cases, options):
            if "torch._dynamo" in sys.modules:  # the import alone takes seconds
                torch._dynamo.reset()  # each shape compiled for itself, none over the limit
            sizes = (tokens, vocab, options.hidden, options.teacher_hidden, options.ignored)
            case = Case(op, DTYPES[dtype], *sizes, options.device)
            entries = [Entry(provider) for provider in taking_part[op]]
            measurement = Measurement(case, entries, clock)

            def step(name, place=f"{op} {dtype} N={tokens} V={vocab}", units=tokens * vocab):
                bar.set_description_str(f"{place} {name}", refresh=False)
                bar.update(units)

            try:
                measurement.run(options.repeats, step)
            finally:
                keep(list(measurement.rows()))
            del case, measurement  # before the next one's tensors


# --- the table ---


def render(rows):
    """One aligned table for each op and dtype."""
    groups = {}
    for row in rows:
        groups.setdefault((row["op"], row["dtype"]), []).append(row)
    return "\n\n".join(_render(*key, group) for key, group in groups.items())


def _render(op, dtype, rows):
    one = rows[0]
    beside = [name for name in BESIDE if any(r["provider"] == name and "ms" in r for r in rows)]
    head = ["tokens", "V", "provider", "ms", "quartiles", "GFLOP/s", "peak MB"]
    lines, shape = [[*head, *(f"×{name}" for name in beside), "check"]], None
    for row in sorted(rows, key=lambda row: (row["tokens"] * row["vocab"], row["tokens"])):
        here = (f"{row['tokens']:,}", f"{row['vocab']:,}")
        lines.append([*(here if here != shape else ("", "")), *_cells(row, beside)])
        shape = here
    ignored = f", {one['ignored']:.0%} of the tokens ignored" if one["ignored"] else ""
    sizes = f"hidden size {one['hidden']:,}, the teacher's {one['teacher_hidden']:,}"
    title = f"{op}, {dtype}, loss and both gradients, {sizes}{ignored}"
    return tables.aligned(title, lines, left={2, len(lines[0]) - 1})


def _cells(row, beside):
    peak = digits(row["peak_mb"]) if row["peak_mb"] != "" else "–"
    if "ms" not in row:
        return [row["provider"], "–", "", "", peak, *("" for _ in beside), row["note"]]
    check = row.get("check", "")
    if check == "WRONG":
        loss, hidden, weight = (f"{row[key]:.2g}" for key in ERRORS)
        check += f": loss {loss}, d hidden {hidden}, d weight {weight} times the limit"
    return [
        row["provider"],
        digits(row["ms"]),
        f"{digits(row['ms_q1'])}–{digits(row['ms_q3'])}",
        digits(row["gflop_per_s"]),
        peak,
        *(digits(row[f"x_{name}"]) if f"x_{name}" in row else "" for name in beside),
        check,
    ]


LEGEND = """\
ms           median of loss, d hidden and d weight in one call, cold caches; quartiles beside it
GFLOP/s      the four products' operations over the median: 2 × tokens × V × (3 H + the teacher's H)
peak MB      most memory held above the inputs, in 10^6 bytes; the two gradients are part of it
×products    times the time of the four products alone, summed in float32
×dense       times the time of dense; below 1 is faster
check        against float64, on the call that is timed; WRONG when an error is beyond its limit"""


def main(arguments=None):
    """The exit status: 1 if this package is wrong or fails somewhere, 130 if interrupted."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    where = tables.environment(options.device, arguments, "bench/linear.py")
    fixed = {"tokens": options.tokens[0], "vocab": options.vocab[0]}

    def draw(rows, stem):
        import linear_plots

        return linear_plots.draw(rows, fixed, stem)

    return report(
        options,
        where,
        providers.ALL,
        measure,
        case=CASE,
        columns=COLUMNS,
        render=render,
        legend=LEGEND,
        draw=draw,
        prefix="linear-",
    )


if __name__ == "__main__":
    sys.exit(main())
