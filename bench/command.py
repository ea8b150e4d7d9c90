"""The benchmark that run.py, linear.py and sparse.py are; a Bench says what each measures."""

import argparse
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

# PyTorch's threads go on spinning for milliseconds after an operation, on the cores of whatever is
# timed next. Asleep they cost nobody anything; OpenMP reads this once, when it is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

try:
    import torch
    from tqdm import tqdm

    import drkl_triton  # noqa: F401
except ModuleNotFoundError as error:
    sys.exit(f"{error}; at the repository's root say: make bench, or: pip install -e '.[bench]'")

import tables
from timing import MB, Clock, Copy, Read, free_memory, peak_memory

START = time.monotonic()
HERE = Path(__file__).resolve().parent
MODES = ("forward", "backward", "both")
DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}


# --- the command line ---


class Bench:
    """What differs: the inputs (a case: its tensors, of which the first ``trained`` get gradients,
    and truth.py's), who takes part, options, columns, panels.
    """

    prefix, defaults, extra = "", {}, {}

    def parse(self, arguments):
        parser = argparse.ArgumentParser(description=self.what)
        add, names = parser.add_argument, [provider.name for provider in self.providers]
        ops = f"of {', '.join(self.ops)}, or all; default: {' '.join(self.default_ops)}"
        add("--op", nargs="+", choices=[*self.ops, "all"], default=self.default_ops, metavar="OP",
            help=ops)  # fmt: skip
        add("--dtype", nargs="+", choices=list(DTYPES), help=self.dtypes)
        self.options(add)
        add("--device", help="cpu, cuda, cuda:1; default: cuda where there is one")
        add("--providers", nargs="+", choices=names, metavar="NAME",
            help=f"of {names}; default: all, on a GPU without tiled")  # fmt: skip
        add("--repeats", type=int, help="times each call is timed; default: {} on a GPU, {} on a "
            "CPU".format(*self.defaults["repeats"]))  # fmt: skip
        add("--threads", type=int, help="CPU threads, the same for all; default: PyTorch's choice")
        add("--out", type=Path, default=HERE / "results", help="folder; default: bench/results")
        add(
            "--name",
            help="of the files, without an ending; default: the device's, of a part and -part",
        )
        add("--seconds", type=float, default=float("inf"), help="begin no case after that")
        add("--no-plots", action="store_true", help="write the CSV only")
        parser.set_defaults(**self.extra)
        options = parser.parse_args(arguments)
        options.part = "-part" if tables.is_part(parser, options) else ""
        settle_device(parser, options)
        gpu = options.device.type == "cuda"
        # on a GPU tiled is what a fallback costs, and takes half of the time
        defaults = {"providers": ([name for name in names if name != "tiled"], names)}
        for name, (on_gpu, on_cpu) in (defaults | self.defaults).items():
            if getattr(options, name) is None:
                setattr(options, name, on_gpu if gpu else on_cpu)
        if "all" in options.op:
            options.op = list(self.ops)
        if options.threads:
            torch.set_num_threads(options.threads)
        self.settle(parser, options)
        return options

    def main(self, arguments=None):
        """Measures, with the CSV kept up to date, then prints the tables and draws. The exit
        status: 1 if this package is wrong or fails somewhere, 130 if interrupted.
        """
        arguments = sys.argv[1:] if arguments is None else arguments
        options = self.parse(arguments)
        where = tables.environment(options.device, arguments, self.script)
        slug = self.prefix + tables.slug(options.device, where["device"]) + options.part
        stem = options.out / (options.name or slug)
        options.out.mkdir(parents=True, exist_ok=True)
        path = stem.with_name(f"{stem.name}.csv")

        taking_part, absent, rows, status = {}, [], [], 0
        for op in options.op:
            taking_part[op] = []
            for provider in self.providers:
                if provider.name not in options.providers:
                    continue
                if note := provider.obstacle(op, options.device):
                    absent.append({"op": op, "provider": provider.name, "note": note, **where})
                else:
                    taking_part[op].append(provider)

        def keep(new):
            rows.extend(row | where for row in new)
            tables.add_ratios(rows, self.tell)
            tables.write_csv(path, rows + absent, self.columns)

        try:
            measure(self, options, taking_part, keep)
        except KeyboardInterrupt:
            status = 130
        parts = tables.render(rows, self), tables.render_absent(absent), self.legend
        print("\n\n".join(part for part in parts if part), end="\n\n")
        print(tables.said(where))
        plots = []
        if rows and not options.no_plots:
            import plots as drawing  # takes seconds

            plots = drawing.draw(self, rows, options, stem)
        for written in [path, *plots] if rows else []:
            print(f"wrote {written}")
        if status:
            print("interrupted: what was measured until then is above and in the files")
            return status
        own = {provider.name for provider in self.providers if provider.own}
        return int(any(row.get("check") != "ok" for row in rows if row["provider"] in own))


def settle_device(parser, options):
    """Makes it the current one, by its number: "cuda" alone cannot be set."""
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type not in ("cpu", "cuda"):
        parser.error(f"--device must be cpu or cuda (ROCm is cuda, too), got {device}")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            parser.error("--device cuda: this PyTorch sees no GPU")
        if device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        torch.cuda.set_device(device)
    options.device = device


# --- measuring ---


def first_line(error):
    text = str(error).strip().splitlines()
    return f"failed: {type(error).__name__}" + (f": {text[0]}" if text else "")


def in_turn(entries, turn):
    """All of them, another one first each turn."""
    first = turn % len(entries)
    return entries[first:] + entries[:first]


@dataclass
class Entry:
    """A provider in one case: its function, then what is measured."""

    provider: object
    call: object = None
    note: str = ""
    errors: tuple = ()
    peaks: dict = field(default_factory=dict)
    times: dict = field(default_factory=lambda: {mode: [] for mode in MODES})


class Measurement:
    """All providers on one case. ``rows`` may be asked for at any time."""

    def __init__(self, case, entries, modes, clock, copy=None):
        self.case, self.entries, self.modes, self.clock = case, entries, modes, clock
        self.speeds = {}  # column: (what to call, times)
        if copy:
            self.speeds["copy_gb_per_s"] = copy, []
            if case.device.type == "cuda":
                self.speeds["read_gb_per_s"] = Read(copy), []

    def forward(self, entry, scale=1.0):
        """(the leaves, a call that computes the result)."""
        case, provider = self.case, entry.provider
        leaves = [x.clone() if provider.overwrites else x.detach() for x in case.leaves]
        if not provider.floor:
            leaves = [x.requires_grad_() for x in leaves]
        extra = (scale,) if provider.upstream_first else ()
        return leaves, lambda: entry.call(*leaves, *case.tensors[case.trained :], *extra)

    def backward(self, entry, leaves, out, scale=1.0):
        if entry.provider.floor:  # its results are the gradients
            return lambda: out
        upstream = self.case.upstream(out, scale)
        return lambda: torch.autograd.grad(out, leaves, upstream)

    def results(self, entry, scale):
        leaves, forward = self.forward(entry, scale)
        out = forward()
        return out.detach(), *self.backward(entry, leaves, out, scale)()

    def prepare(self, entry, truth):
        """Compile, check, measure memory; what fails is noted and not timed."""
        case, provider = self.case, entry.provider
        needed, free = 4 * provider.held * case.tokens * case.vocab, free_memory(case.device)
        if free is not None and needed > free / 2:
            size = tables.digits(needed / 1e9)
            entry.note = f"skipped: about {size} GB, over half of the free memory"
            return
        try:
            entry.call = provider.ops[case.op]()
            if not provider.floor:
                results = self.results(entry, case.scale)
                entry.errors = truth.errors(*results, rounds=provider.rounds_on(case.device))
                del results
            leaves, forward = self.forward(entry)
            entry.peaks = peak_memory(
                forward, lambda out: self.backward(entry, leaves, out)(), case.device
            )
        except Exception as error:  # other people's kernels fail in ways of their own
            entry.call, entry.note = None, first_line(error)

    def repeat(self, entry):
        """One timing of each mode."""
        modes, times = self.modes, entry.times
        if set(modes) & {"forward", "backward"}:
            leaves, forward = self.forward(entry)
            ms, out = self.clock.ms(forward)
            times["forward"].append(ms)
            if "backward" in modes:
                times["backward"].append(self.clock.ms(self.backward(entry, leaves, out))[0])
            del out
        if "both" in modes:
            leaves, forward = self.forward(entry)
            both = lambda: self.backward(entry, leaves, forward())()  # noqa: E731
            times["both"].append(self.clock.ms(both)[0])

    def run(self, repeats, step):
        truth = self.case.truth()
        for entry in self.entries:
            self.prepare(entry, truth)
            step(entry.provider.name)
        del truth
        for turn in range(repeats):
            for call, times in self.speeds.values():
                times.append(self.clock.ms(call)[0])
            for entry in in_turn(self.entries, turn):
                if entry.call:
                    try:
                        self.repeat(entry)
                    except Exception as error:
                        entry.call, entry.note = None, first_line(error)
                step(entry.provider.name)

    def rows(self):
        case = self.case
        speeds = {
            name: call.bytes / median(times) / 1e6
            for name, (call, times) in self.speeds.items()
            if times
        }
        for entry in self.entries:
            for mode in self.modes:
                row = {"dtype": str(case.dtype).removeprefix("torch."), "mode": mode}
                row |= {key: getattr(case, key) for key in case.columns} | speeds
                row |= {"provider": entry.provider.name, "version": entry.provider.version}
                row |= {"note": entry.note}
                row |= {"peak_mb": entry.peaks[mode] / MB} if entry.peaks else {}
                if entry.errors:
                    row |= {"check": "ok" if max(entry.errors) <= 1 else "WRONG"}
                    row |= dict(zip(case.checked, entry.errors, strict=True))
                if entry.times[mode] and not entry.note:
                    row |= tables.quartiles(entry.times[mode])
                    row |= case.rates(mode, row)
                if "ms" in row or entry.note:  # else not reached yet
                    yield row


def in_time(cases, seconds):
    """The cases that can be begun within so many seconds."""
    for case in cases:
        if time.monotonic() - START > seconds:
            print("time is up", flush=True)
            return
        yield case


def measure(bench, options, taking_part, keep):
    """Every case in turn; the rows of each go to ``keep``, those of an interrupted one too."""
    clock = Clock(options.device)
    copy = Copy(options.device, options.copy_mb) if options.copy_mb else None
    cases = bench.cases(options)
    work = sum((options.repeats + 1) * len(taking_part[op]) * N * V for op, _, N, V, *_ in cases)
    bar = tqdm(
        total=work,
        bar_format="{percentage:3.0f}% |{bar:24}| {elapsed} elapsed, {remaining} left  {desc}",
        mininterval=0.3 if sys.stderr.isatty() else 20.0,
        dynamic_ncols=True,
    )
    with bar:
        for op, dtype, tokens, vocab, *more in in_time(cases, options.seconds):
            if not taking_part[op]:
                continue
            if "torch._dynamo" in sys.modules:  # the import alone takes seconds
                torch._dynamo.reset()  # each shape compiled for itself, none over the limit
            case = bench.case(options, op, DTYPES[dtype], tokens, vocab, *more)
            entries = [Entry(provider) for provider in taking_part[op]]
            measurement = Measurement(case, entries, options.mode, clock, copy)

            def step(name, place=f"{op} {dtype} N={tokens} V={vocab}", units=tokens * vocab):
                bar.set_description_str(f"{place} {name}", refresh=False)
                bar.update(units)

            try:
                measurement.run(options.repeats, step)
            finally:
                keep(list(measurement.rows()))
            del case, measurement  # before the next one's tensors
