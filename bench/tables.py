"""The rows: what a CSV line of run.py holds, the file, and the table on the terminal."""

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

import providers
import torch

ROOT = Path(__file__).resolve().parents[1]
MODES = ("forward", "backward", "both")
# Times the size of one [N, V] tensor of logits. Loss forward reads two, backward reads two and
# writes one; softmax forward reads one and writes one, backward reads two and writes one.
TENSORS_MOVED = {"forward": 2, "backward": 3, "both": 5}
RATIOS = tuple(f"x_{provider.name}" for provider in providers.ALL)
ENVIRONMENT = (
    *("device", "driver", "threads", "wait_policy", "torch", "triton", "python"),
    *("commit", "command"),
)
# The columns that tell one case from another.
CASE = ("op", "dtype", "mode", "vocab")
COLUMNS = (
    *("op", "mode", "dtype", "vocab", "tokens", "logits", "provider", "version"),
    *("check", "result_error", "grad_error", "ms", "ms_q1", "ms_q3", "runs"),
    *("bytes", "gb_per_s", "copy_gb_per_s", "percent_of_copy", "read_gb_per_s", "peak_mb"),
    *RATIOS,
    *("note", *ENVIRONMENT, "date"),
)


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


def environment(device, arguments, script="bench/run.py"):
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


# --- rows ---


def quartiles(times):
    """The columns that say how long a call took, of times in milliseconds."""
    ms = median(times)
    q1, _, q3 = quantiles(times, n=4, method="inclusive") if len(times) > 1 else (ms, ms, ms)
    return {"ms": ms, "ms_q1": q1, "ms_q3": q3, "runs": len(times)}


def timed(times, nbytes, copy_gb_per_s):
    """The columns that follow from the times of a row, in milliseconds."""
    row = quartiles(times)
    row |= {"bytes": nbytes, "gb_per_s": nbytes / row["ms"] / 1e6, "copy_gb_per_s": copy_gb_per_s}
    return row | {"percent_of_copy": 100 * row["gb_per_s"] / copy_gb_per_s}


def add_ratios(rows, case=CASE):
    """x_<provider>: this row's time over that provider's in the same case."""
    groups = {}
    for row in rows:
        if "ms" in row:
            groups.setdefault(tuple(row[key] for key in case), []).append(row)
    for group in groups.values():
        for row in group:
            row |= {f"x_{other['provider']}": row["ms"] / other["ms"] for other in group}


def _table_of(row):
    return row["op"], row["dtype"], row["mode"]


def write_csv(path, rows, columns=COLUMNS):
    """By way of a second file, so that an interruption leaves one of the two whole."""
    partial = path.with_suffix(".csv.part")
    with partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows({key: _short(value) for key, value in row.items()} for row in rows)
    os.replace(partial, path)


def _short(value):
    return f"{value:.5g}" if isinstance(value, float) else value


# --- the table ---


def digits(value):
    """Three of them, without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _cells(row, others):
    if "ms" not in row:
        return [row["provider"], "–", "", "", "", "", *["" for _ in others], row["note"]]
    errors = f"result {row['result_error']:.2g}, gradient {row['grad_error']:.2g} times the limit"
    return [
        row["provider"],
        digits(row["ms"]),
        f"{digits(row['ms_q1'])}–{digits(row['ms_q3'])}",
        digits(row["gb_per_s"]),
        f"{row['percent_of_copy']:.0f}",
        digits(row["peak_mb"]) if row.get("peak_mb", "") != "" else "–",
        *(digits(row[f"x_{o}"]) if f"x_{o}" in row else "" for o in others),
        row["check"] if row["check"] == "ok" else f"{row['check']}: {errors}",
    ]


def render(rows):
    """One aligned table for each op, dtype and mode."""
    tables = {}
    for row in rows:
        if row.get("vocab"):
            tables.setdefault(_table_of(row), []).append(row)
    return "\n\n".join(_render(*key, group) for key, group in tables.items())


def _render(op, dtype, mode, rows):
    others = list(dict.fromkeys(row["provider"] for row in rows if "ms" in row))
    head = ["V", "provider", "ms", "quartiles", "GB/s", "% copy", "peak MB"]
    lines, vocab = [[*head, *(f"×{other}" for other in others), "check"]], None
    for row in rows:
        lines.append([f"{row['vocab']:,}" if row["vocab"] != vocab else "", *_cells(row, others)])
        vocab = row["vocab"]
    title = f"{op}, {dtype}, {mode}, {rows[0]['tokens']:,} tokens"
    counted = f"bytes counted: {TENSORS_MOVED[mode]} × tokens × V × element size"
    return aligned(f"{title}   ({counted})", lines, left={1, len(lines[0]) - 1})


def aligned(title, lines, left):
    """The cells under one another, the columns ``left`` from the left; the first line is the
    head.
    """
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
    reasons = {}
    for row in absent:
        reasons.setdefault(row["note"], {})[row["provider"]] = None
    return "\n".join(f"{note}: {', '.join(names)}" for note, names in reasons.items())


LEGEND = """\
ms           median, cold caches; quartiles beside it
GB/s         the bytes counted over the median; % copy: of a large copy's GB/s, measured in turn
             with the providers
peak MB      most memory held above the inputs while this mode runs, in 10^6 bytes
×dense       times the time of dense; below 1 is faster. The other × columns likewise
check        against float64, on the call that is timed; WRONG when an error is beyond its limit"""
