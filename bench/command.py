"""What the benchmarks' command lines have in common."""

import sys
import time
from pathlib import Path

import tables
import torch
from tqdm import tqdm

START = time.monotonic()
HERE = Path(__file__).resolve().parent
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def add_options(parser, names, repeats):
    """Where, who, how often and whereto. ``repeats``: the default (on a GPU, on a CPU)."""
    add = parser.add_argument
    add("--device", help="cpu, cuda, cuda:1; default: cuda where there is one")
    text = f"of {names}; default: all, on a GPU without tiled"
    add("--providers", nargs="+", choices=names, metavar="NAME", help=text)
    text = f"times each call is timed; default: {repeats[0]} on a GPU, {repeats[1]} on a CPU"
    add("--repeats", type=int, help=text)
    add("--threads", type=int, help="CPU threads, the same for all; default: PyTorch's choice")
    add("--out", type=Path, default=HERE / "results", help="folder; default: bench/results")
    add(
        "--name", help="of the files, without an ending; default: the device's, of a part and -part"
    )
    add("--seconds", type=float, default=float("inf"), help="begin no case after that")
    add("--no-plots", action="store_true", help="write the CSV only")
    parser.set_defaults(names=names)


def current(device):
    """The device by its number, made the current one: "cuda" alone cannot be set."""
    device = torch.device(device)
    if device.type == "cuda":
        if device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        torch.cuda.set_device(device)
    return device


def settle(parser, options, defaults):
    """Fills in what depends on the device; ``defaults``: name -> (on a GPU, on a CPU)."""
    options.part = "-part" if tables.is_part(parser, options) else ""
    gpu = torch.cuda.is_available()
    options.device = torch.device(options.device or ("cuda" if gpu else "cpu"))
    if options.device.type not in ("cpu", "cuda"):
        parser.error(f"--device must be cpu or cuda (ROCm is cuda, too), got {options.device}")
    if options.device.type == "cuda" and not gpu:
        parser.error("--device cuda: this PyTorch sees no GPU")
    options.device = current(options.device)
    gpu = options.device.type == "cuda"
    names = options.names  # on a GPU tiled is what a fallback costs, and takes half of the time
    defaults |= {"providers": ([name for name in names if name != "tiled"], names)}
    for name, (on_gpu, on_cpu) in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, on_gpu if gpu else on_cpu)
    if options.threads:
        torch.set_num_threads(options.threads)


def in_time(cases, options):
    """The cases that can be begun within --seconds."""
    for case in cases:
        if time.monotonic() - START > options.seconds:
            print("time is up", flush=True)
            return
        yield case


def progress(total):
    return tqdm(
        total=total,
        bar_format="{percentage:3.0f}% |{bar:24}| {elapsed} elapsed, {remaining} left  {desc}",
        mininterval=0.3 if sys.stderr.isatty() else 20.0,
        dynamic_ncols=True,
    )


def first_line(error):
    text = str(error).strip().splitlines()
    return f"failed: {type(error).__name__}" + (f": {text[0]}" if text else "")


def in_turn(entries, turn):
    """All of them, another one first each turn."""
    first = turn % len(entries)
    return entries[first:] + entries[:first]


def report(
    options, where, providers, measure, *, case, columns, render, legend, draw, prefix=""
):  # fmt: skip
    """Measures, with the CSV kept up to date, then prints the tables and draws. Returns the exit
    status: 1 if this package is wrong or fails somewhere, 130 if interrupted.

    measure(options, notes, keep): hands rows to ``keep``; ``notes`` say who cannot take part, and
    why. case: the columns that tell one case from another. draw(rows, stem): the paths written.
    """
    options.out.mkdir(parents=True, exist_ok=True)
    name = options.name or prefix + tables.slug(options.device, where["device"]) + options.part
    path = options.out / f"{name}.csv"

    notes = {
        (op, provider.name): obstacle
        for op in options.op
        for provider in providers
        if provider.name in options.providers
        and (obstacle := provider.obstacle(op, options.device))
    }
    rows = []
    absent = [{"op": op, "provider": p, "note": n, **where} for (op, p), n in notes.items()]

    def keep(new):
        rows.extend(row | where for row in new)
        tables.add_ratios(rows, case)
        tables.write_csv(path, rows + absent, columns)

    interrupted = False
    try:
        measure(options, notes, keep)
    except KeyboardInterrupt:
        interrupted = True
    parts = (render(rows), tables.render_absent(absent), legend)
    print("\n\n".join(part for part in parts if part), end="\n\n")
    print(", ".join(f"{key} {where[key]}" for key in tables.ENVIRONMENT if where[key] != ""))
    plots = draw(rows, options.out / name) if rows and not options.no_plots else []
    for written in [path, *plots] if rows else []:
        print(f"wrote {written}")
    if interrupted:
        print("interrupted: what was measured until then is above and in the files")
        return 130
    own = {provider.name for provider in providers if provider.own}
    return int(any(row.get("check") != "ok" for row in rows if row["provider"] in own))
