"""What the compiler makes of each kernel, on any machine: no GPU is needed.

python bench/machine_code.py                             # everything; exit status 1 over a limit
python bench/machine_code.py --target sm_90 --kernel row_sums row_grad --vocab 128256
"""

import argparse
import os
import re
import shlex
import subprocess
import sys
import tempfile
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from unittest.mock import patch

try:
    import divergences
    import sass
    import tables
    import torch
    import triton
    from command import DTYPES
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from drkl_triton import _loss, _reduction, kernels, objectives
    from drkl_triton._layout import rows_of
    from drkl_triton.algebra import SUMS, WEIGHTS
    from drkl_triton.facts import METRICS, SKEWED
    from drkl_triton.kernels import tuning
except ModuleNotFoundError as error:
    sys.exit(f"{error}; at the repository's root say: make venv, or: pip install -e '.[bench]'")

HERE = Path(__file__).resolve().parent
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


# --- limits ---

# A spilled register goes through memory: 0 loads and stores of a thread's own memory, everywhere.
MAX_SPILLS = 0
# A barrier a tile makes every warp wait for the slowest one's loads, again and again.
MAX_BARRIERS = 0
# Bits a load or store in a loop moves for each thread. Below 128 the number of requests, not of
# bytes, decides. gfx942: not every kernel and dtype gets there, so nothing is asked yet.
MIN_BITS = {"sm_80": 128, "sm_90": 128, "sm_100": 128, "sm_120": 128, "gfx942": 0}
# Executed instructions an element, forward + backward, of reverse KL and DRKL. While the 10 bytes
# of a 16-bit element move, an H100 could issue 100, a B200 47; but no multiprocessor issues on
# every clock, and conversions and exponentials take longer than a slot. In a short row the ends
# count.
MAX_INSTRUCTIONS = {
    "sm_90": {50257: 32, 128256: 30, 151936: 30},
    "sm_100": {50257: 31, 128256: 29, 151936: 29},
}
# Of the others on sm_90, in bfloat16, at 50,257 and 128,256 columns: what was asked of forward and
# mixed KL, and of the rest what they have, and a twentieth. JSD has 14 in the scan, 26 in the sweep
# and 23 in the gradient: two logarithms and six exponentials; 20 to convert, subtract, scale and
# add the normalisers, twice; and six maxima, for probabilities of 0.
MAX_INSTRUCTIONS_OF = {
    "forward_kl": (36, 36),
    "mixed_kl": (38, 38),
    "js_divergence": (70, 67),
    "skew_kl": (73, 69),
    "skew_reverse_kl": (76, 72),
    "total_variation": (64, 61),
    "alpha_beta": (73, 69),
    "drkl-skewed": (84, 80),
    "cross_entropy": (18, 17),
    "entropy": (21, 19.5),
}
# Two exponentials in the scan and one in the gradient; two more whenever a lane's maxima move up,
# every two vectors (an eighth of an element in 16 bits, a quarter in float32); and the ends, which
# count in a short row. A multiprocessor does 16 a clock, an eighth of its multiplications.
MAX_EXPONENTIALS = 3.4


# --- targets, cards, kernels ---


@dataclass(frozen=True)
class Card:
    """A card of the target. ``units``: multiprocessors (AMD: compute units); ``clock``: GHz, boost;
    ``slots``: warp instructions a unit issues a clock; ``bandwidth``: GB/s, nominal.
    """

    name: str
    units: int
    clock: float
    slots: int
    bandwidth: float


TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
CARDS = {  # from the makers' data sheets
    "sm_80": Card("A100 SXM 80 GB", 108, 1.410, 4, 2039),
    "sm_90": Card("H100 SXM", 132, 1.980, 4, 3350),
    "sm_100": Card("B200", 148, 1.965, 4, 8000),
    "sm_120": Card("RTX 5090", 170, 2.407, 4, 1792),
    # Four SIMDs, and each is busy for four clocks with an instruction for 64 threads.
    "gfx942": Card("MI300X", 304, 2.100, 1, 5300),
}
ROWS = 8192  # of the predicted time
VOCABULARIES = (32000, 50257, 128256, 151936, 262144)

# What works on rows' sums alone (kernels/row_map.py): not in the plain case, which is counted.
ROW_MAPS = ("row_labels", "row_losses", "reduce", "weights")
# (tensors of logits read, tensors written); "log" is the LOG=True form
# Objectives whose kernels differ: those of DRKL are reverse KL's, those of DKD forward KL's.
OBJECTIVES = {
    name: divergences.LOSSES[name].objective for name in ("reverse_kl", *MAX_INSTRUCTIONS_OF)
}
# Those that are least like each other; the others are compiled in the plain case alone.
VARIED = ("reverse_kl", "forward_kl", "mixed_kl", "js_divergence")


def loss_kernels(objective):
    """{name: (tensors of logits read, written)} of the objective's kernels."""
    suffix = "" if objective == "reverse_kl" else f" {objective}"
    objective = OBJECTIVES[objective]
    read = 2 if objective.needs_teacher else 1
    found = {f"row_sums{suffix}": (read, 0)}
    if objective.skew is not None:
        found[f"row_sums skewed{suffix}"] = (read, 0)
    if any(f.is_pointwise for f, _, _ in objective.terms):
        found[f"row_phi{suffix}"] = (read, 0)
    return found | {f"row_grad{suffix}": (read, 1)}


KERNELS = {
    **{name: moved for objective in OBJECTIVES for name, moved in loss_kernels(objective).items()},
    "merge_sums": (0, 0),
    "row_tail": (1, 0),
    "softmax_sums": (1, 0),
    "softmax": (1, 1),
    "softmax log": (1, 1),
    "softmax_dot": (2, 0),
    "softmax_dot log": (1, 0),
    "softmax_grad": (2, 1),
    "softmax_grad log": (2, 1),
    **dict.fromkeys(ROW_MAPS, (0, 0)),
}
# Reads the numbers of columns besides, one for all threads, in loops inside of the one over a row:
# of its loads the widest is that of logits, and its instructions are not counted.
READS_COLUMNS = "row_tail"
LOSSES = {" + ".join(loss_kernels(name)): tuple(loss_kernels(name)) for name in OBJECTIVES}
LOSS = tuple(loss_kernels("reverse_kl"))
LOSS_NAME = " + ".join(LOSS)
SOFTMAX = {name for name in KERNELS if name.startswith("softmax")}


@dataclass(frozen=True)
class Case:
    """What is launched besides the plain case: everything else a launch may compile. At one V."""

    student: torch.dtype
    teacher: torch.dtype
    vocab: int = 50257
    splits: int = 1
    support: bool = False
    offset: int = 0


CASES = {
    "plain": None,  # --vocab and --dtype, one program a row, no entropy
    "float64": Case(torch.float64, torch.float64),
    "mixed": Case(torch.bfloat16, torch.float32, offset=1),  # rows that lie differently
    "support": Case(torch.bfloat16, torch.bfloat16, support=True),  # and the entropy
    "splits": Case(torch.bfloat16, torch.bfloat16, splits=4),  # few rows, and the merge
}


# --- compiling without a GPU ---


class StandIn:
    """As much of a Triton driver as a launch needs that only compiles."""

    def __init__(self, target):
        self.target = target

    def get_current_device(self):
        return str(self.target)  # Triton keeps what it compiled for each device

    def get_current_stream(self, device=None):
        return 0

    def get_current_target(self):
        return self.target

    def get_active_torch_device(self):
        return torch.device("cpu")


class Launched(dict):
    suffix = ""


@contextmanager
def compiling(target, wanted=None):
    """Within it, a launch compiles for the target and runs nothing. Yields {name: (kernel, the
    launch's keyword arguments)}, filled as it goes; instead of the kernel an error, where it does
    not compile. wanted: names; others are not compiled. ``launched.suffix`` is added to the names.
    """
    launched = Launched()
    original = JITFunction.run

    def run(self, *args, grid, warmup=False, **flags):
        name = self.__name__.removesuffix("_kernel") + (" log" if flags.get("LOG") else "")
        name += " skewed" if flags.get("NEEDS", 0) & SKEWED else ""
        name += launched.suffix
        if name in launched or (wanted is not None and name not in wanted):
            return
        try:
            kernel = original(self, *args, grid=grid, warmup=True, **flags)
        except Exception as error:  # the compiler's errors have no common class
            kernel = error
        launched[name] = kernel, flags

    shape = CARDS[target].units, TARGETS[target].warp_size
    with ExitStack() as stack:
        active = "_active" if hasattr(driver, "_active") else "active"  # before Triton 3.5
        stack.enter_context(patch.object(driver, active, StandIn(TARGETS[target])))
        stack.enter_context(patch.object(JITFunction, "run", run))
        stack.enter_context(patch.object(kernels.tuning, "_device_shape", lambda device: shape))
        yield launched


def launch_all(case, launched, wanted, plain):
    """Launch, through the package's launchers, every kernel that is wanted."""
    N = 3  # strides and alignment decide what is compiled, not the number of rows
    V = case.vocab
    student, teacher = (
        torch.empty(N, V + case.offset, dtype=dtype)[:, case.offset :]
        for dtype in (case.student, case.teacher)
    )
    acc = torch.promote_types(torch.promote_types(case.student, case.teacher), torch.float32)
    one, label = torch.ones((), dtype=acc), torch.zeros(N, dtype=torch.int64)
    s, t = rows_of(student), rows_of(teacher)
    split = patch.object(tuning, "choose", partial(tuning.choose, splits=case.splits))
    for name, objective in OBJECTIVES.items():
        if not {*loss_kernels(name), "merge_sums"} & wanted or not (plain or name in VARIED):
            continue
        launched.suffix = "" if name == "reverse_kl" else f" {name}"
        parameters = _reduction.parameters(objective.parameters, label, False, acc)
        loss = _loss.of(kernels, objective, one, V)
        if case.support:
            needs = loss.needs | METRICS  # everything that a scan may sum
            loss = loss._replace(filter_value=-one, needs=needs)
        weights = torch.empty((WEIGHTS, N), dtype=acc)
        with split:
            loss.sum_parts(s, t, label, parameters)
            if case.splits > 1:
                loss.sums(s, t, label, parameters)
            loss.write(s, t, label, parameters, weights)
    launched.suffix = ""
    if "row_tail" in wanted and case.student == case.teacher and not case.support:
        columns = torch.zeros(N, 20, dtype=torch.int32)
        kernels.row_tail(s, columns, label, one, V, splits=case.splits)
    if not plain and wanted & {*ROW_MAPS}:
        launch_row_maps(case, N, one, label)
    if case.student == case.teacher and not case.support and wanted & SOFTMAX:
        flags = dict(splits=case.splits)
        for log in (False, True):
            y, state = kernels.softmax_forward(s, one, N, log=log, **flags)
            kernels.softmax_backward(s, rows_of(y), one, state, log=log, **flags)


# --- reading ---


def launch_row_maps(case, N, one, label):
    """DRKL with labels and weights, in the support case with metrics; JSD for mixed dtypes, and in
    float16 from hidden states for the splits.
    """
    labelled, metrics = case.student == case.teacher, case.support
    objective = objectives.drkl() if labelled else objectives.js_divergence()
    loss = _loss.of(kernels, objective, one, case.vocab)
    rows = dict(program=loss.program, needs=loss.needs | (METRICS if metrics else 0))
    weight = torch.empty(N, dtype=one.dtype) if labelled else None
    parameters = _reduction.parameters(objective.parameters, label, False, one.dtype)
    parts = torch.empty(case.splits, SUMS, N, dtype=one.dtype)
    kernels.row_labels(
        label, weight, (N,), -100, case.vocab, label.device, shift=labelled, strict=labelled
    )
    sums, *_ = kernels.row_losses(
        parts, label, one, parameters, weight, None, metrics=metrics, reduction="mean", **rows
    )
    room = torch.empty(N, dtype=one.dtype) if case.splits > 1 else None
    kernels.row_weights(sums, label, one, parameters, one, weight, one, inv_room=room, **rows)


@dataclass(frozen=True)
class Code:
    program: sass.Program
    registers: int


@cache
def read_nvidia(cubin):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [CUOBJDUMP, "--dump-resource-usage", "--dump-sass", path]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return Code(sass.Program(sass.parse_sass(text)), int(re.search(r"\bREG:(\d+)", text)[1]))


@cache
def read_amd(text):
    registers = int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1])
    return Code(sass.Program(sass.parse_amdgcn(text)), registers)


def read(kernel):
    asm = kernel.asm
    return read_nvidia(asm["cubin"]) if "cubin" in asm else read_amd(asm["amdgcn"])


def measure(name, kernel, flags, target, case, plain):
    """The columns of a kernel's row."""
    code = read(kernel)
    program, (read_tensors, written) = code.program, KERNELS[name]
    loops = sass.vocabulary_loops(program)
    in_loops = [c for loop in loops for c in program.instructions(loop.blocks)]
    row = {
        "registers": code.registers,
        "spills": sum(c.is_spill for c in program.code),
        "shared": kernel.metadata.shared,
        "load_bits": _widths(c.load_bits for c in in_loops),
        "store_bits": _widths(c.store_bits for c in in_loops),
        "barriers": sum(c.is_barrier for c in in_loops),
        "aligned": flags.get("ALIGNED", False),
    }
    if name == READS_COLUMNS:
        row["load_bits"] = row["load_bits"].split("/")[-1]
    if not plain or name == READS_COLUMNS:
        return row
    warp, warps = TARGETS[target].warp_size, kernel.metadata.num_warps
    item = case.student.itemsize
    geometry = sass.Geometry(flags["LANES"], flags["VEC"], warps * warp, warp, read_tensors * item)
    count = sass.executed(program, geometry, sass.full_tiles(case.vocab, item, geometry))
    card = CARDS[target]
    moved = (read_tensors + written) * ROWS * case.vocab * item
    memory_ms = moved / card.bandwidth / 1e6
    issue_ms = count.instructions * warps * ROWS / (card.units * card.slots * card.clock) / 1e6
    return row | {
        "warps": warps,
        "instructions": count.instructions * geometry.threads / case.vocab,
        "exponentials": count.exponentials * geometry.threads / case.vocab,
        "memory_ms": memory_ms,
        "issue_ms": issue_ms,
        "ms": max(memory_ms, issue_ms),
    }


def _widths(bits):
    return "/".join(str(b) for b in sorted(set(bits)) if b)


def together(name, rows):
    """The row of a loss, from its kernels' rows."""
    added = ("instructions", "exponentials", "memory_ms", "issue_ms", "ms")
    return {"kernel": name} | {key: sum(row[key] for row in rows) for key in added}


def broken(row, target):
    """What a row breaks, in words."""
    if "error" in row:
        return [row["error"]]
    found = []

    def at_most(key, limit, words):
        if key in row and row[key] > limit:
            found.append(
                f"{tables.short(row[key])} {words}, {tables.short(row[key] - limit)} over {limit}"
            )

    at_most("spills", MAX_SPILLS, "spilling loads and stores")
    at_most("barriers", MAX_BARRIERS, "barriers in the loop")
    for key, words in (("load_bits", "loads"), ("store_bits", "stores")):
        narrow = [b for b in row.get(key, "").split("/") if b and int(b) < MIN_BITS[target]]
        if narrow and row["aligned"]:
            found.append(f"{'- and '.join(narrow)}-bit {words} in the loop, not {MIN_BITS[target]}")
    if row["kernel"] == LOSS_NAME:
        at_most("exponentials", MAX_EXPONENTIALS, "exponentials an element")
        limit = MAX_INSTRUCTIONS.get(target, {}).get(row["vocab"])
        if limit is not None:
            at_most("instructions", limit, "instructions an element")
    objective = row["kernel"].split()[-1]
    if "instructions" in row and objective in MAX_INSTRUCTIONS_OF and " + " in row["kernel"]:
        short, long = MAX_INSTRUCTIONS_OF[objective]
        if target == "sm_90" and row["dtype"] == "bfloat16" and row["vocab"] >= 50257:
            limit = short if row["vocab"] < 128256 else long
            at_most("instructions", limit, "instructions an element")
    return found


def rows_of_case(target, name, case, wanted):
    """A row for each kernel the case launches, and for the loss."""
    with compiling(target, wanted) as launched:
        launch_all(case, launched, wanted, name == "plain")
    rows = []
    for kernel_name, (kernel, flags) in launched.items():
        row = {"kernel": kernel_name}
        try:
            if isinstance(kernel, Exception):
                raise kernel
            row |= measure(kernel_name, kernel, flags, target, case, name == "plain")
        except Exception as error:
            while error.__cause__:  # the compiler wraps what is wrong in where it is
                error = error.__cause__
            lines = str(error).strip().splitlines() or [""]  # source first, what is wrong last
            row["error"] = f"{type(error).__name__}: {lines[-1]}"
        rows.append(row)
    for loss, parts in LOSSES.items():
        found = [row for row in rows if row["kernel"] in parts and "ms" in row]
        if len(found) == len(parts):
            rows.append(together(loss, found))
    dtypes = dict.fromkeys(
        str(dtype).removeprefix("torch.") for dtype in (case.student, case.teacher)
    )
    where = {"target": target, "case": name, "dtype": "/".join(dtypes), "vocab": case.vocab}
    rows = [where | row for row in rows]
    for row in rows:
        row["limits"] = "; ".join(broken(row, target)) or "ok"
    return rows


# --- writing ---

COLUMNS = (
    *("target", "case", "dtype", "vocab", "kernel", "registers", "spills", "shared", "warps"),
    *("load_bits", "store_bits", "barriers", "instructions", "exponentials"),
    *("card", "memory_ms", "issue_ms", "ms", "limits", "triton", "commit", "command"),
)
SHOWN = {  # column: its head in the table, if it is another
    "vocab": "V", "kernel": "", "registers": "", "spills": "", "shared": "", "load_bits": "loads",
    "store_bits": "stores", "barriers": "", "instructions": "instr/el", "exponentials": "exp/el",
    "ms": "", "bound": "bound by", "limits": "",
}  # fmt: skip
LEGEND = f"""\
registers    a thread's; spills: loads and stores of its own memory; shared: bytes a program
loads        bits a thread moves with one load in the loops over the vocabulary; stores likewise
instr/el     instructions executed for each element, everything outside the loop included
exp/el       exponentials, likewise
ms           predicted, {ROWS:,} rows: bytes over the card's bandwidth, or instructions over its
             issue rate, whichever is more"""


def _cell(row, key):
    if key == "bound":
        return ("memory" if row["memory_ms"] >= row["issue_ms"] else "issue") if "ms" in row else ""
    if key == "limits":
        return "ok" if row[key] == "ok" else "BROKEN"
    value = row.get(key, "")
    if key == "vocab":
        return f"{value:,}"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def render(rows):
    """One aligned table of rows of the same target, case and dtype."""
    first, card = rows[0], CARDS[rows[0]["target"]]
    lines = [
        [SHOWN[key] or key for key in SHOWN],
        *([_cell(row, key) for key in SHOWN] for row in rows),
    ]
    case = "" if first["case"] == "plain" else f", {first['case']}"
    about = f"{card.units} units, {card.slots} a clock at {card.clock} GHz, {card.bandwidth:,} GB/s"
    title = f"{first['target']}, {first['dtype']}{case}   ({card.name}: {about})"
    left = {i for i, key in enumerate(SHOWN) if key in ("kernel", "bound", "limits")}
    return tables.aligned(title, lines, left)


def write_csv(path, rows, arguments):
    said = shlex.join(["python", "bench/machine_code.py", *arguments])
    where = {"triton": triton.__version__, "commit": tables.commit(), "command": said}
    rows = [row | where | {"card": CARDS[row["target"]].name} for row in rows]
    tables.write_csv(path, rows, COLUMNS)


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--target", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    add("--vocab", nargs="+", type=int, default=list(VOCABULARIES), metavar="V")
    add("--dtype", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    names = list(KERNELS)
    add("--kernel", nargs="+", choices=names, default=names, metavar="NAME", help=f"of {names}")
    add("--case", nargs="+", choices=list(CASES), default=list(CASES), help="default: all")
    add("--output", type=Path, help="default: results/machine_code.csv; of a part: none")
    options = parser.parse_args(arguments)
    if options.output is None and not tables.is_part(parser, options):
        options.output = HERE / "results" / "machine_code.csv"
    if min(options.vocab) < 16384:
        parser.error("--vocab must be 16384 or more: shorter rows may have no loop to look at")
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        parser.error("TRITON_INTERPRET is set: nothing would be compiled")
    return options


def main(arguments=None):
    """The exit status: 1 if a limit is broken."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    rows = []
    for target in options.target:
        for name in options.case:
            cases = [CASES[name]]
            if name == "plain":
                dtypes = [DTYPES[dtype] for dtype in options.dtype]
                cases = [Case(d, d, vocab) for d in dtypes for vocab in options.vocab]
            for dtype in dict.fromkeys(case.student for case in cases):
                new = []
                for case in cases:
                    if case.student == dtype:
                        new += rows_of_case(target, name, case, set(options.kernel))
                if new:
                    print(render(new), end="\n\n", flush=True)
                rows += new
    print(LEGEND, end="\n\n")
    said = "a part, not written: --output names a file"
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        write_csv(options.output, rows, arguments)
        said = f"wrote {options.output}"
    print(f"Triton {triton.__version__}; {said}")
    over = [row for row in rows if row["limits"] != "ok"]
    for row in over:
        place = f"{row['kernel']}, {row['target']}, V={row['vocab']:,}, {row['dtype']}"
        print(f"BROKEN {place}, {row['case']}: {row['limits']}")
    return int(bool(over))


if __name__ == "__main__":
    sys.exit(main())
