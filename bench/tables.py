"""The rows of a benchmark: where they were made, the CSV, and the table on the terminal."""

import csv
import os
import platform
import re
import shlex
import subprocess
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from statistics import median, quantiles

import torch

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = (
    *("device", "driver", "threads", "wait_policy", "torch", "triton", "python"),
    *("commit", "command"),
)


def ratios(providers):
    """Columns: see add_ratios."""
    return [f"x_{provider.name}" for provider in providers]


# --- where it ran ---


def _said_by(*command):
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=ROOT)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _cpu_name():
    try:
        found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def commit():
    """COMMIT in the environment, where git cannot say it."""
    if os.environ.get("COMMIT"):
        return os.environ["COMMIT"]
    commit = _said_by("git", "rev-parse", "--short=12", "HEAD") or "unknown"
    if commit != "unknown" and _said_by("git", "status", "--porcelain", "--", ":!bench/results"):
        commit += "-dirty"
    return commit


def environment(device, arguments, script):
    """The columns that say where, with what and how the numbers were made."""
    gpu, driver = device.type == "cuda", ""
    if gpu:
        driver = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
        query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        driver = " ".join([*_said_by(*query).splitlines()[:1], driver])
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = ""
    return {
        "device": torch.cuda.get_device_name(device) if gpu else _cpu_name(),
        "driver": driver,
        "threads": torch.get_num_threads(),
        "wait_policy": os.environ.get("OMP_WAIT_POLICY", ""),
        "torch": torch.__version__,
        "triton": triton,
        "python": platform.python_version(),
        "commit": commit(),
        "command": shlex.join(["python", script, *arguments]),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%MZ"),
    }


def slug(device, name):
    """nvidia-h100-80gb-hbm3; cpu-amd-epyc"""
    name = f"cpu {name}" if device.type == "cpu" else name
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


# --- the files ---

WHERETO = ("device", "threads", "jobs", "out", "output", "name", "no_plots")


def is_part(parser, options):
    """Whether the command line leaves out, or takes otherwise, some of what is measured by default.
    Then the file of the whole must not be written over.
    """
    given = {key: value for key, value in vars(options).items() if key not in WHERETO}
    return any(value != parser.get_default(key) for key, value in given.items())


def said(where):
    return ", ".join(f"{key} {where[key]}" for key in ENVIRONMENT if where[key] != "")


# --- rows ---


def quartiles(times):
    """The columns that say how long a call took, of times in milliseconds."""
    ms = median(times)
    q1, _, q3 = quantiles(times, n=4, method="inclusive") if len(times) > 1 else (ms, ms, ms)
    return {"ms": ms, "ms_q1": q1, "ms_q3": q3, "runs": len(times)}


def bandwidth(ms, nbytes, copy_gb_per_s):
    speed = nbytes / ms / 1e6
    row = {"bytes": nbytes, "gb_per_s": speed, "copy_gb_per_s": copy_gb_per_s}
    return row | {"percent_of_copy": 100 * speed / copy_gb_per_s}


def add_ratios(rows, tell):
    """x_<provider>: this row's time over that provider's in the same case."""
    groups = {}
    for row in rows:
        if "ms" in row:
            groups.setdefault(tuple(row[key] for key in tell), []).append(row)
    for group in groups.values():
        for row in group:
            row |= {f"x_{other['provider']}": row["ms"] / other["ms"] for other in group}


def write_csv(path, rows, columns):
    """By way of a second file, so that an interruption leaves one of the two whole."""
    partial = path.with_suffix(".csv.part")
    with partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="", extrasaction="ignore")
        writer.writeheader()
        writer.writerows({key: short(value) for key, value in row.items()} for row in rows)
    os.replace(partial, path)


def short(value):
    return f"{value:.5g}" if isinstance(value, float) else value


# --- the table ---


def digits(value):
    """Three of them, without an exponent; a dash for nothing."""
    if value == "":
        return "–"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def render(rows, bench):
    """One aligned table for each title that the rows have."""
    groups = {}
    for row in rows:
        groups.setdefault(bench.title(row), []).append(row)
    return "\n\n".join(_render(title, groups[title], bench) for title in groups)


def _render(title, rows, bench):
    rows = sorted(rows, key=lambda row: (row["tokens"] * row["vocab"], row["tokens"]))
    timed = dict.fromkeys(row["provider"] for row in rows if "ms" in row)
    beside = [name for name in bench.beside or timed if name in timed]
    head = [*bench.places, "provider", "ms", "quartiles", *bench.rates, "peak MB"]
    lines, before = [[*head, *(f"×{name}" for name in beside), "check"]], None
    for row in rows:
        place = [f"{row[key]:,}" for key in bench.places.values()]
        lines.append([*(place if place != before else [""] * len(place)), row["provider"]])
        lines[-1] += _cells(row, bench, beside)
        before = place
    return aligned(title, lines, left={len(bench.places), len(lines[0]) - 1})


def _cells(row, bench, beside):
    peak = digits(row.get("peak_mb", ""))
    if "ms" not in row:
        return ["–", "", *("" for _ in bench.rates), peak, *("" for _ in beside), row["note"]]
    check = row.get("check", "")
    if check == "WRONG":
        errors = (f"{name} {row[key]:.2g}" for key, name in bench.checked.items())
        check += f": {', '.join(errors)} times the limit"
    return [
        digits(row["ms"]),
        f"{digits(row['ms_q1'])}–{digits(row['ms_q3'])}",
        *(digits(row[key]) for key in bench.rates.values()),
        peak,
        *(digits(row[f"x_{name}"]) if f"x_{name}" in row else "" for name in beside),
        check,
    ]


def aligned(title, lines, left):
    """The cells under one another, the columns ``left`` from the left; the first line is the
    head.
    """
    lines = [[str(cell) for cell in line] for line in lines]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "  ".join(
            cell.ljust(w) if i in left else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    return "\n".join([title, text[0], "─" * max(map(len, text)), *text[1:]])


def render_absent(absent):
    """One line for each reason not to take part."""
    ops, reasons = {}, {}
    for row in absent:
        reason = row["provider"], row["note"].removesuffix(row["op"])
        ops.setdefault(reason, []).append(row["op"])
    for (name, note), missing in ops.items():
        note += ", ".join(missing) if note.endswith(" ") else ""
        reasons.setdefault(note, {})[name] = None
    return "\n".join(f"{note}: {', '.join(names)}" for note, names in reasons.items())
