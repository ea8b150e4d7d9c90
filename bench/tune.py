"""Times tile choices for the kernels on a GPU and proposes the numbers of kernels/tuning.py.

python bench/tune.py                                # within 150 seconds
python bench/tune.py --seconds 900 --kernel row_sums row_grad softmax softmax_backward
TRITON_INTERPRET=1 python bench/tune.py --device cpu   # a few tiny settings: only whether it works
"""

import argparse
import dataclasses
import math
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import geometric_mean, median

START = time.monotonic()

try:
    import tables
    import torch
    from command import DTYPES, first_line, in_turn, settle_device
    from providers import Launches
    from timing import Clock, Copy
    from truth import UPSTREAM, Logits

    from drkl_triton import _checks, algebra, kernels
    from drkl_triton._layout import rows_of
    from drkl_triton.kernels import tuning
except ModuleNotFoundError as error:
    sys.exit(f"{error}; at the repository's root say: make venv, or: pip install -e .")

HERE = Path(__file__).resolve().parent
# Most important first: when time runs out, the far ends of all of these are what is missing.
VOCABULARIES = (128256, 32000, 262144, 50257)
ROWS = (8192, 1, 132, 1024, 8)
LANES = (128, 256, 64, 512)
KERNELS = {"row_sums": 2, "row_grad": 3, "softmax": 2, "softmax_backward": 3}  # tensors moved
# Splits are tried where rows x splits comes to this many programs a multiprocessor, or, in rows too
# short for that, the three largest.
PROGRAMS_PER_SM = (0.5, 16)
COLUMNS = (
    *("row", "kernel", "dtype", "vocab", "tokens", "lanes", "warps", "splits", "chosen", "check"),
    *("ms", "ms_q1", "ms_q3", "runs", "bytes", "gb_per_s", "copy_gb_per_s", "percent_of_copy"),
    *("note", *tables.ENVIRONMENT, "date"),
)
# Other numbers of kernels/tuning.py that are tried on what was timed.
CANDIDATES = {
    "MAX_LANES": LANES,
    "SCAN_PROGRAMS_PER_SM": (2, 4, 8, 16),
    "GRADIENT_PROGRAMS_PER_SM": (4, 8, 16, 32),
    "START_TILES": (1.0, 3.0, 8.0),
    "GRADIENT_TILES": ((2, 4), (4, 8), (4, 16), (8, 32)),
}
# The part of the time that compiling ahead may take.
COMPILING = 0.4
NOT_REACHED = "not reached"
NOT_A_GPU = """\
These are times of Triton's interpreter on a CPU. They show that the sweep works and nothing else:
no number below says anything about a GPU or belongs into kernels/tuning.py."""


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--seconds", type=float, default=150, help="end after that; default: 150")
    add("--device", help="default: cuda; cpu needs TRITON_INTERPRET=1")
    add("--kernel", nargs="+", choices=KERNELS, default=["row_sums", "row_grad"])
    add("--vocab", nargs="+", type=int, metavar="V", help=f"default: {VOCABULARIES}")
    add("--tokens", nargs="+", type=int, metavar="N", help=f"default: {ROWS}")
    add("--dtype", nargs="+", choices=DTYPES, default=["bfloat16", "float32"])
    add("--lanes", nargs="+", type=int, help=f"default: {LANES}")
    add("--splits", nargs="+", type=int, help="default: powers of two that fill the card")
    add("--repeats", type=int, default=9, help="times each setting is timed; default: 9")
    add("--jobs", type=int, help="processes that compile first; default: half the cores, 8 at most")
    add("--copy-mb", type=int, help="size of the copy; default: 2048 on a GPU, 16 on a CPU")
    add("--out", type=Path, help="CSV; default: bench/results/tune-<device>.csv")
    add("--compile-part", help=argparse.SUPPRESS)  # k/n: one of the compiling processes
    options = parser.parse_args(arguments)
    options.part = "-part" if tables.is_part(parser, options) else ""
    options.device = options.device or "cuda"
    settle_device(parser, options)
    gpu = options.device.type == "cuda"
    if gpu == _checks.INTERPRETING:
        parser.error("a GPU needs TRITON_INTERPRET=0, and --device cpu TRITON_INTERPRET=1")
    for name, on_gpu, on_cpu in (
        ("vocab", VOCABULARIES, (6000,)),
        ("tokens", ROWS, (4, 1)),
        ("lanes", LANES, (128, 64)),
        ("jobs", min(8, (os.cpu_count() or 2) // 2), 0),
        ("copy_mb", 2048, 16),
    ):
        if getattr(options, name) is None:
            setattr(options, name, on_gpu if gpu else on_cpu)
    return options


# --- settings ---


@dataclass(frozen=True)
class Problem:
    kernel: str
    dtype: str
    vocab: int
    tokens: int

    @property
    def bytes(self):
        size = torch.finfo(DTYPES[self.dtype]).bits // 8
        return KERNELS[self.kernel] * self.tokens * self.vocab * size

    def __str__(self):
        return f"{self.kernel}, {self.dtype}, V={self.vocab:,}, {self.tokens:,} rows"


def problems(options):
    """Most important first."""
    order = {}
    for k, kernel in enumerate(options.kernel):
        for d, dtype in enumerate(options.dtype):
            for v, vocab in enumerate(options.vocab):
                for n, tokens in enumerate(options.tokens):
                    # row_sums and row_grad are equally important, softmax comes after all of them
                    rank = (kernel.startswith("softmax"), 3 * d + v + n, v, n, k)
                    order[rank] = Problem(kernel, dtype, vocab, tokens)
    return [order[rank] for rank in sorted(order)]


def vectors_of(problem):
    """(whole vectors in a row, columns of one)."""
    vec = tuning.VECTOR_BYTES * 8 // torch.finfo(DTYPES[problem.dtype]).bits
    return problem.vocab // vec, vec


def present_tile(problem, device):
    """What kernels/tuning.py chooses now."""
    row = rows_of(torch.empty((1, problem.vocab), dtype=DTYPES[problem.dtype], device=device))
    rules = {"row_sums": tuning.scan_splits, "row_grad": tuning.gradient_splits}
    rule = rules.get(problem.kernel, tuning.softmax_splits)
    return tuning.choose(problem.vocab, row, rows=problem.tokens, rule=rule)


def tiles_for(problem, options):
    """What is tried: the present choice, then all lanes with splits that are powers of two."""
    units, warp = tuning._device_shape(options.device)
    default = present_tile(problem, options.device)
    vectors, _ = vectors_of(problem)
    tried = [default]
    for lanes in options.lanes:
        if lanes < warp:
            continue
        low, high = (bound * units / problem.tokens for bound in PROGRAMS_PER_SM)
        high = min(high, vectors // lanes)
        splits = [2**i for i in range(16) if min(low, high / 8) < 2**i <= high]
        if options.splits:
            splits = [count for count in options.splits if count <= max(1, vectors // lanes)]
        elif options.device.type == "cpu":
            splits = [1, 2]
        for count in splits or [1]:
            tile = dataclasses.replace(default, lanes=lanes, num_warps=lanes // warp, splits=count)
            if tile not in tried:
                tried.append(tile)
    return tried


class Launch:
    """A kernel's launcher on one problem, to be called with any tile."""

    def __init__(self, problem, device, compile_only=False):
        case = Logits("drkl", DTYPES[problem.dtype], problem.vocab, problem.tokens, device)
        self.launches = Launches("drkl", *case.tensors)
        self.one = torch.ones((), device=device)
        self.problem, self.default = problem, present_tile(problem, device)
        if compile_only:
            self.weights = torch.zeros((algebra.WEIGHTS, problem.tokens), device=device)
            self.state = self.weights[:2]
        elif problem.kernel == "row_grad":
            upstream = torch.full((problem.tokens,), UPSTREAM, device=device)
            sums = self.with_tile(self.default, self._row_sums)
            self.weights = self.launches.weights(sums, upstream)
        elif problem.kernel == "softmax_backward":
            self.state = self.with_tile(self.default, self._softmax)[1]

    @staticmethod
    def with_tile(tile, call):
        choose = tuning.choose
        tuning.choose = lambda *_, **__: tile
        try:
            return call()
        finally:
            tuning.choose = choose

    def _row_sums(self):
        return self.launches.sums()

    def _row_grad(self):
        return self.launches.write(self.weights)

    def _softmax(self):
        return kernels.softmax_forward(self.launches.rows[0], self.one, self.problem.tokens)

    def _softmax_backward(self):
        return kernels.softmax_backward(*self.launches.rows[:2], self.one, self.state)

    def __call__(self, tile):
        return self.with_tile(tile, getattr(self, f"_{self.problem.kernel}"))

    def result(self, tile):
        """What must not depend on the tile, of the first and the last rows."""
        out = self(tile)
        if self.problem.kernel == "row_sums":
            return self.launches.losses(out, "none")
        out = out[0] if isinstance(out, tuple) else out
        return torch.cat([out[:8], out[-8:]]).float()

    def same(self, result, expected):
        """Two units of the output's dtype apart at most, or of float32 in what cancels."""
        rtol = 1e-5 if expected.dim() == 1 else 2 * torch.finfo(DTYPES[self.problem.dtype]).eps
        atol = 1e-5 * expected.abs().max().item()
        return torch.allclose(result, expected, rtol=max(rtol, 1e-5), atol=atol)


# --- the sweep ---


@dataclass
class Entry:
    tile: object
    check: str = ""
    note: str = ""
    times: list = field(default_factory=list)


class Sweep:
    def __init__(self, options):
        self.options, self.rows = options, []
        self.clock = Clock(options.device)
        self.copy = Copy(options.device, options.copy_mb)

    def late(self):
        return time.monotonic() - START > self.options.seconds - 5

    def problem(self, problem):
        """Times all tiles of a problem in turn. True when there is time for another problem."""
        launch = Launch(problem, self.options.device)
        entries = [Entry(t) for t in tiles_for(problem, self.options)]
        expected, copies = launch.result(launch.default), []
        for entry in entries:
            if self.late():
                entry.note = NOT_REACHED
                continue
            try:  # compiles it, where nobody has
                entry.check = "ok" if launch.same(launch.result(entry.tile), expected) else "WRONG"
            except Exception as error:  # a tile may need more than the card has
                entry.note = first_line(error)
        for turn in range(self.options.repeats):
            if turn >= 3 and self.late():
                break
            copies.append(self.clock.ms(self.copy)[0])
            for entry in in_turn(entries, turn):
                if not entry.note:
                    entry.times.append(self.clock.ms(lambda e=entry: launch(e.tile))[0])
        copy = self.copy.bytes / median(copies) / 1e6
        for entry in entries:
            self.rows.append(self.row(problem, entry, copy, entry.tile == launch.default))
        return not self.late()

    def row(self, problem, entry, copy, chosen):
        tile = entry.tile
        row = {"row": len(self.rows) + 1, **dataclasses.asdict(problem)}
        row |= {"lanes": tile.lanes, "warps": tile.num_warps, "splits": tile.splits}
        row |= {"chosen": "yes" if chosen else "", "check": entry.check, "note": entry.note}
        if not entry.times:
            return row
        row |= tables.quartiles(entry.times)
        return row | tables.bandwidth(row["ms"], problem.bytes, copy)


# --- compiling ahead ---


def compile_part(part, options):
    """Launches a share of all settings on a row or two: their code is then in Triton's cache."""
    k, n = map(int, part.split("/"))
    seen = set()
    for problem in problems(options):
        few, launch = dataclasses.replace(problem, tokens=min(problem.tokens, 2)), None
        for tile in tiles_for(problem, options):
            # what Triton compiles anew for, as far as it depends on the problem
            key = (problem.kernel, problem.dtype, problem.vocab % 16 == 0, few.tokens, tile)
            if key in seen:
                continue
            seen.add(key)
            if len(seen) % n != k:
                continue
            if time.monotonic() - START > COMPILING * options.seconds:
                return
            try:
                launch = launch or Launch(few, options.device, compile_only=True)
                launch(tile)
            except Exception as error:
                print(f"{problem}, {tile}: {type(error).__name__}: {error}", file=sys.stderr)


def compile_ahead(arguments, options):
    """In processes beside each other, because compiling takes longer than timing. What they do not
    reach is compiled when its turn comes.
    """
    here = [sys.executable, str(Path(__file__).resolve()), *arguments, "--compile-part"]
    jobs = [subprocess.Popen([*here, f"{k}/{options.jobs}"]) for k in range(options.jobs)]
    try:
        for job in jobs:
            left = (COMPILING + 0.1) * options.seconds - (time.monotonic() - START)
            job.wait(max(1, left))
    except subprocess.TimeoutExpired:
        print("compiling ahead took too long: ended")
    finally:
        for job in jobs:
            job.kill()
            job.wait()


# --- the proposal ---


def measured(rows):
    """{problem: {lanes: {splits: row}}} of what was timed and right."""
    found = {}
    for row in rows:
        if row.get("check") == "ok" and "ms" in row:
            lanes = found.setdefault(_problem(row), {}).setdefault(row["lanes"], {})
            lanes.setdefault(row["splits"], row)
    return found


def _problem(row):
    return Problem(row["kernel"], row["dtype"], row["vocab"], row["tokens"])


def best(tiles):
    return min((row for splits in tiles.values() for row in splits.values()), key=_ms)


def _ms(row):
    return row["ms"]


def under(numbers, problem, tiles, units):
    """The row that the numbers would choose, or the nearest in splits; None where no row has these
    lanes. Says what kernels/tuning.py does.
    """
    lanes, scan, gradient, start, share = (numbers[name] for name in CANDIDATES)
    if lanes not in tiles:
        return None
    of = vectors_of(problem)[0] // lanes, problem.tokens, units
    if problem.kernel == "row_grad":
        splits = tuning.gradient_splits(*of, gradient, share)
    else:
        splits = tuning.scan_splits(*of, scan if problem.kernel == "row_sums" else gradient, start)
    return min(tiles[lanes].items(), key=lambda item: abs(math.log2(item[0] / splits)))[1]


def slowdown(numbers, found, units):
    """Geometric mean over the problems of the time under these numbers over the best time."""
    chosen = [(under(numbers, problem, tiles, units), tiles) for problem, tiles in found.items()]
    if any(row is None for row, _ in chosen):
        return math.inf
    return geometric_mean(row["ms"] / best(tiles)["ms"] for row, tiles in chosen)


def propose(found, units):
    """The numbers with the least slowdown; the present ones unless others are 1 % better."""
    present = {name: getattr(tuning, name, None) for name in CANDIDATES}
    combinations = [{}]
    for name, values in CANDIDATES.items():
        values = dict.fromkeys(v for v in (present[name], *values) if v is not None)
        combinations = [c | {name: v} for c in combinations for v in values]
    numbers = min(combinations, key=lambda c: slowdown(c, found, units))
    if None not in present.values():
        if slowdown(present, found, units) <= 1.01 * slowdown(numbers, found, units):
            numbers = present
    return numbers, present


def reason(name, numbers, found, units):
    """Where the next best value of this number loses, with the rows that say so."""
    others = [numbers | {name: v} for v in CANDIDATES[name] if v != numbers[name]]
    other = min(others, key=lambda c: slowdown(c, found, units))
    loss = slowdown(other, found, units)
    if math.isinf(loss):
        return "nothing else was timed throughout"
    pairs = [(under(numbers, p, t, units), under(other, p, t, units), p) for p, t in found.items()]
    ours, theirs, problem = max(pairs, key=lambda pair: pair[1]["ms"] / pair[0]["ms"])
    if ours is theirs:
        return f"{other[name]} comes to the same in everything timed"
    return (
        f"{loss:.3f} with {other[name]}; {problem}: row {ours['row']} {ours['ms']:.4g} ms, "
        f"row {theirs['row']} {theirs['ms']:.4g} ms"
    )


def report(rows, units, path):
    """The text of the proposal."""
    found = measured(rows)
    if not found:
        return "nothing was timed"
    head = ("problem", "lanes", "warps", "splits", "ms", "% copy", "row", "now", "now's row")
    table = [head]
    for problem, tiles in found.items():
        row = best(tiles)
        timed = [r for splits in tiles.values() for r in splits.values()]
        now = next((r for r in timed if r["chosen"]), None)
        cells = (row["lanes"], row["warps"], row["splits"], f"{row['ms']:.4g}")
        then = (f"x{now['ms'] / row['ms']:.3f}", now["row"]) if now else ("", "")
        table.append((problem, *cells, f"{row['percent_of_copy']:.0f}", row["row"], *then))
    title = f"The best tile of each problem. Row numbers are those of {path.name}."
    lines = [tables.aligned(title, table, left={0})]
    cut = {_problem(row) for row in rows if row["note"] == NOT_REACHED}
    found = {problem: tiles for problem, tiles in found.items() if problem not in cut} or found
    numbers, present = propose(found, units)
    now = slowdown(present, found, units)
    lines += [
        "",
        f"Proposed for kernels/tuning.py: {slowdown(numbers, found, units):.3f} times the best "
        f"tiles' time,",
        f"geometric mean of {len(found)} problems. The present numbers: {now:.3f}",
        "",
    ]
    for name, value in numbers.items():
        changed = "" if value == present[name] else f", now {present[name]}"
        lines.append(f"{name} = {value}  # {reason(name, numbers, found, units)}{changed}")
    return "\n".join(lines)


# --- the command ---


def main(arguments=None):
    """The exit status: 1 if a tile came out wrong or nothing was timed."""
    global START  # a second call has all of its time, too
    START = time.monotonic()
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    if options.compile_part:
        return compile_part(options.compile_part, options)
    where = tables.environment(options.device, arguments, "bench/tune.py")
    if options.device.type == "cpu":
        where["device"] = f"Triton's interpreter on a CPU: {where['device']}"
    name = f"tune-{tables.slug(options.device, where['device'])}{options.part}.csv"
    path = options.out or HERE / "results" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if options.jobs:
        compile_ahead(arguments, options)
        print(f"compiled ahead in {time.monotonic() - START:.0f} s", flush=True)

    todo, sweep, done = problems(options), Sweep(options), 0
    for problem in todo:
        try:
            goes_on = sweep.problem(problem)
        except torch.OutOfMemoryError:
            print(f"{problem}: not enough memory", flush=True)
            goes_on = not sweep.late()
        else:
            done += 1
            tables.write_csv(path, [row | where for row in sweep.rows], COLUMNS)
            print(f"{time.monotonic() - START:5.0f} s  {problem}", flush=True)
        if not goes_on:
            break
    print(f"{done} of {len(todo)} problems, {len(sweep.rows)} settings")
    if options.device.type == "cpu":
        print(f"\n{NOT_A_GPU}")
    print(f"\n{report(sweep.rows, tuning._device_shape(options.device)[0], path)}\n")
    print(tables.said(where))
    timed = [row for row in sweep.rows if "ms" in row]
    return int(not timed or any(row["check"] != "ok" for row in timed))


if __name__ == "__main__":
    sys.exit(main())
