"""Microbenchmarks across vocabulary sizes: time, memory and share of the memory's speed.

python bench/run.py                                      # under ten minutes on two CPU cores
python bench/run.py --device cuda                        # 8,192 tokens, bfloat16
python bench/run.py --op reverse_kl --mode both --vocab 50257 128256 --tokens 512
"""

import argparse
import os
import sys
from dataclasses import dataclass, field
from statistics import median

# PyTorch's threads go on spinning for milliseconds after an operation, on the cores of whatever is
# timed next. Asleep they cost nobody anything; OpenMP reads this once, when it is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

try:
    import providers
    import real_rows
    import tables
    import torch
    from command import DTYPES, add_options, first_line, in_time, in_turn, progress, report, settle
    from tables import MODES, TENSORS_MOVED
    from timing import MB, Clock, Copy, Read, peak_memory
    from truth import UPSTREAM, Case, errors, truth_of
except ModuleNotFoundError as error:
    sys.exit(f"{error}; at the repository's root say: make bench, or: pip install -e '.[bench]'")

VOCABULARIES = (32000, 50257, 65536, 128256, 151936, 201088, 262144)


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--op", nargs="+", choices=providers.OPS, default=["reverse_kl", "drkl"])
    add("--mode", nargs="+", choices=MODES, default=list(MODES), help="default: all three")
    add("--dtype", nargs="+", choices=list(DTYPES), help="default: bfloat16; on a CPU float32, too")
    add("--vocab", nargs="+", type=int, default=list(VOCABULARIES), metavar="V")
    add("--logits", choices=("random", "real"), default="random", help="real: SmolLM2's, V = 49152")
    add("--tokens", type=int, help="rows of logits; default: 8192 on a GPU, 128 on a CPU")
    add("--copy-mb", type=int, help="size of the copy; default: 2048 on a GPU, 256 on a CPU")
    add_options(parser, [provider.name for provider in providers.ALL], repeats=(20, 5))
    options = parser.parse_args(arguments)
    settle(
        parser,
        options,
        {
            "tokens": (8192, 128),
            "repeats": (20, 5),
            "copy_mb": (2048, 256),
            "dtype": (["bfloat16"], ["float32", "bfloat16"]),
        },
    )
    if options.logits == "real":
        options.vocab = [real_rows.VOCAB]
    if min(options.tokens, options.repeats, options.copy_mb, *options.vocab) < 1:
        parser.error("--tokens, --repeats, --copy-mb and --vocab must be positive")
    return options


@dataclass
class Entry:
    """A provider in one case: its function, then what is measured."""

    provider: providers.Provider
    call: object = None
    note: str = ""
    errors: tuple = ()
    peaks: dict = field(default_factory=dict)
    times: dict = field(default_factory=lambda: {mode: [] for mode in MODES})


class Measurement:
    """All providers on one case. ``rows`` may be asked for at any time."""

    def __init__(self, case, entries, modes, clock, copy):
        self.case, self.entries, self.modes = case, entries, modes
        self.clock, self.copy, self.copy_times = clock, copy, []
        self.read = Read(copy) if case.device.type == "cuda" and copy else None
        self.read_times = []

    def _forward(self, entry, upstream):
        """(the student's leaf, a call that computes the result)."""
        case, provider = self.case, entry.provider
        student = case.student.clone() if provider.overwrites else case.student.detach()
        student.requires_grad_()
        extra = (upstream,) if provider.upstream_first else ()
        return student, lambda: entry.call(student, case.teacher, case.labels, *extra)

    def _backward(self, student, out, scale=1.0):
        upstream = self.case.upstream(out, scale)
        return lambda: torch.autograd.grad(out, student, upstream)[0]

    def prepare(self, entry, truth):
        """Compile, check, measure memory; what fails is noted and not timed."""
        try:
            entry.call = entry.provider.ops[self.case.op]()
            scale = UPSTREAM * self.case.tokens
            student, forward = self._forward(entry, scale)
            out = forward()
            grad = self._backward(student, out, scale)()
            entry.errors = errors(self.case, truth, out.detach(), grad)
            del out, grad
            student, forward = self._forward(entry, 1.0)
            backward = lambda out: self._backward(student, out)()  # noqa: E731
            entry.peaks = peak_memory(forward, backward, self.case.device)
        except Exception as error:  # other people's kernels fail in ways of their own
            entry.call, entry.note = None, first_line(error)

    def repeat(self, entry):
        """One timing of each mode."""
        modes, times = self.modes, entry.times
        if set(modes) & {"forward", "backward"}:
            student, forward = self._forward(entry, 1.0)
            ms, out = self.clock.ms(forward)
            times["forward"].append(ms)
            if "backward" in modes:
                times["backward"].append(self.clock.ms(self._backward(student, out))[0])
            del out
        if "both" in modes:
            student, forward = self._forward(entry, 1.0)
            times["both"].append(self.clock.ms(lambda: self._backward(student, forward())())[0])

    def run(self, repeats, step):
        truth = truth_of(self.case)
        for entry in self.entries:
            self.prepare(entry, truth)
            step(entry.provider.name)
        for turn in range(repeats):
            self.copy_times.append(self.clock.ms(self.copy)[0])
            if self.read:
                self.read_times.append(self.clock.ms(self.read)[0])
            for entry in in_turn(self.entries, turn):
                if entry.call:
                    try:
                        self.repeat(entry)
                    except Exception as error:
                        entry.call, entry.note = None, first_line(error)
                step(entry.provider.name)

    def rows(self):
        case = self.case
        size = case.tokens * case.vocab * torch.finfo(case.dtype).bits // 8
        copy = self.copy.bytes / median(self.copy_times) / 1e6 if self.copy_times else None
        for entry in self.entries:
            for mode in self.modes:
                read = self.read.bytes / median(self.read_times) / 1e6 if self.read_times else ""
                row = {
                    "op": case.op,
                    "mode": mode,
                    "dtype": str(case.dtype).removeprefix("torch."),
                    "vocab": case.vocab,
                    "tokens": case.tokens,
                    "logits": case.logits,
                    "provider": entry.provider.name,
                    "version": entry.provider.version,
                    "note": entry.note,
                    "read_gb_per_s": read,
                    "peak_mb": entry.peaks[mode] / MB if entry.peaks else "",
                }
                if entry.errors:
                    result, grad = entry.errors
                    right = result <= 1 and grad <= 1
                    row |= {"check": "ok" if right else "WRONG"}
                    row |= {"result_error": result, "grad_error": grad}
                if entry.times[mode] and not entry.note:
                    row |= tables.timed(entry.times[mode], TENSORS_MOVED[mode] * size, copy)
                if "ms" in row or entry.note:  # else not reached yet
                    yield row


def measure(options, notes, keep):
    """Every case in turn; the rows of each go to ``keep``, those of an interrupted one too."""
    clock, copy = Clock(options.device), Copy(options.device, options.copy_mb)
    cases = [
        (op, dtype, vocab)
        for op in options.op
        for dtype in options.dtype
        for vocab in options.vocab
    ]
    taking_part = {
        op: [
            provider
            for provider in providers.ALL
            if provider.name in options.providers and (op, provider.name) not in notes
        ]
        for op in options.op
    }
    work = sum((options.repeats + 1) * len(taking_part[op]) * vocab for op, _, vocab in cases)
    with progress(work) as bar:
        for op, dtype, vocab in in_time(cases, options):
            if "torch._dynamo" in sys.modules:  # the import alone takes seconds
                torch._dynamo.reset()  # each shape compiled for itself, none over the limit
            case = Case(op, DTYPES[dtype], vocab, options.tokens, options.device, options.logits)
            entries = [Entry(provider) for provider in taking_part[op]]
            measurement = Measurement(case, entries, options.mode, clock, copy)

            def step(name, place=f"{op} {dtype} V={vocab}", units=vocab):
                bar.set_description_str(f"{place} {name}", refresh=False)
                bar.update(units)

            try:
                measurement.run(options.repeats, step)
            finally:
                keep(list(measurement.rows()))
            del case, measurement  # before the next one's tensors


def draw(rows, stem):
    import plots  # takes seconds

    return plots.draw(rows, stem)


def main(arguments=None):
    """The exit status: 1 if this package is wrong or fails somewhere, 130 if interrupted."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    where = tables.environment(options.device, arguments)
    return report(
        options,
        where,
        providers.ALL,
        measure,
        case=tables.CASE,
        columns=tables.COLUMNS,
        render=tables.render,
        legend=tables.LEGEND,
        draw=draw,
    )


if __name__ == "__main__":
    sys.exit(main())
