"""Means and intervals over the seeds, and the tables."""

import math
import platform
from dataclasses import dataclass
from importlib import metadata
from statistics import fmean, stdev

import drkl_triton


@dataclass(frozen=True)
class Metric:
    key: str
    label: str
    unit: str
    aim: str = ""  # "lower", "higher", "0", or "" where neither end is better in itself
    scale: float = 1.0
    of_teacher: bool = True  # says something about the teacher, too

    @property
    def axis(self):
        return f"{self.label} ({self.unit})" if self.unit else self.label

    @property
    def row(self):
        aim = {"lower": " ↓", "higher": " ↑", "0": " →0", "": ""}[self.aim]
        return self.axis + aim


METRICS = (
    Metric("cross_entropy", "cross-entropy", "nats", "lower"),
    Metric("kl_teacher_student", "KL(teacher‖student)", "nats", "lower", of_teacher=False),
    Metric("kl_student_teacher", "KL(student‖teacher)", "nats", "lower", of_teacher=False),
    Metric("tail_student_teacher", "tail KL(s‖t), N", "nats", "lower", of_teacher=False),
    Metric("tail_teacher_student", "tail KL(t‖s)", "nats", "lower", of_teacher=False),
    Metric("agreement", "top-1 agreement", "%", "higher", 100.0, of_teacher=False),
    Metric("accuracy", "top-1 accuracy", "%", "higher", 100.0),
    Metric("label_probability", "probability of label", "%", "higher", 100.0),
    Metric("label_gap", "label: student − teacher", "% points", "0", 100.0, of_teacher=False),
    Metric("overconfidence", "confidence − accuracy", "% points", "0", 100.0),
    Metric("calibration_error", "calibration error", "% points", "lower", 100.0),
    Metric("entropy", "entropy", "nats"),
    Metric("distinct_2", "Distinct-2 of samples", ""),
    Metric("self_bleu", "self-BLEU of samples", ""),
    Metric("sample_nll", "samples: −log p(teacher)", "nats/token"),
)
BY_KEY = {metric.key: metric for metric in METRICS}


# --- numbers over seeds ---


def t_quantile(freedom):
    """0.975 quantile of Student's t: a table, then Cornish and Fisher's expansion (to 0.003)."""
    exact = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
    if freedom <= len(exact):
        return exact[freedom - 1]
    z = 1.959964
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    return z + first / freedom + second / freedom**2


def summary(values):
    """(mean, half-width of the 95 % interval); the half-width is None for a single value."""
    if len(values) < 2:
        return values[0], None
    return fmean(values), t_quantile(len(values) - 1) * stdev(values) / math.sqrt(len(values))


def summarise(per_seed):
    """[{metric: number}] -> {"mean": {...}, "interval95": {...} or None}"""
    both = {metric.key: summary([one[metric.key] for one in per_seed]) for metric in METRICS}
    return {
        "mean": {key: mean for key, (mean, _) in both.items()},
        "interval95": {key: half for key, (_, half) in both.items()} if len(per_seed) > 1 else None,
    }


def paired_differences(objectives, baseline):
    """{objective: summary of its metrics − the baseline's}, seed by seed: what a seed does to
    both cancels."""
    base = objectives[baseline]["per_seed"]
    return {
        name: summarise(
            [
                {m.key: a[m.key] - b[m.key] for m in METRICS}
                for a, b in zip(o["per_seed"], base, strict=True)
            ]
        )
        for name, o in objectives.items()
        if name != baseline
    }


# --- tables ---


def cell(metric, summarised, signed=False):
    mean = summarised["mean"].get(metric.key)
    if mean is None:
        return "–"
    digits = 2 if metric.scale == 100.0 else 3
    text = f"{mean * metric.scale:{'+' if signed else ''}.{digits}f}"
    interval = summarised["interval95"]
    return text if interval is None else f"{text} ±{interval[metric.key] * metric.scale:.{digits}f}"


def align(rows):
    """First column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        first, *rest = (
            text.ljust(w) if i == 0 else text.rjust(w)
            for i, (text, w) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join([first, *rest]).rstrip())
    rule = "─" * max(map(len, lines))
    return "\n".join([lines[0], rule, *lines[1:]])


def main_table(results):
    objectives = results["students"]["objectives"]
    teacher = {
        "mean": {m.key: results["teacher"]["metrics"][m.key] for m in METRICS if m.of_teacher},
        "interval95": None,
    }
    rows = [["held-out text", "teacher", *(o["label"] for o in objectives.values())]]
    for metric in METRICS:
        students = (cell(metric, o) for o in objectives.values())
        rows.append([metric.row, cell(metric, teacher), *students])
    return align(rows)


def difference_table(results):
    baseline, differences = results["paired"]["baseline"], results["paired"]["differences"]
    objectives = results["students"]["objectives"]
    label = objectives[baseline]["label"]
    rows = [
        [f"minus {label}, paired by seed", *(objectives[name]["label"] for name in differences)]
    ]
    for metric in METRICS:
        rows.append([metric.axis, *(cell(metric, d, signed=True) for d in differences.values())])
    return align(rows)


def memory_lines(results):
    memory = results["memory"]
    if memory["logits"]["loss"] is None:
        return f"memory: not measured, {results['machine']['device']} does not count it"
    label = results["students"]["objectives"][memory["objective"]]["label"]
    lines = [
        f"Peak memory of one batch with {label} (measured; V = {results['data']['vocab']:,}, "
        f"{memory['tokens']:,} tokens):"
    ]
    for part, what in (("loss", "loss and gradient"), ("step", "whole step, models included")):
        logits, hidden = memory["logits"][part] / 1e6, memory["hidden"][part] / 1e6
        lines.append(
            f"  {what}: {logits:.1f} MB with logits, {hidden:.1f} MB from hidden states "
            f"({logits - hidden:.1f} MB saved)"
        )
    return "\n".join(lines)


def full_report(results):
    data, students, seeds = results["data"], results["students"], results["seeds"]
    count = len(seeds)
    noise = (
        f"mean of {count} seeds ± half-width of the 95 % interval (Student t, over the students' "
        "initialisation,\npretraining and batch order; one teacher, one split)"
        if count > 1
        else "one seed, so no intervals: small differences may be chance (--seeds 3 gives them)"
    )
    parts = [
        f"Teacher {results['teacher']['parameters']:,} parameters, students "
        f"{students['parameters']:,}. Evaluated on {data['evaluated_tokens']:,} tokens of "
        f"{data['held_out_files']} held-out files.",
        f"Shown: {noise}.",
        "",
        main_table(results),
    ]
    if "paired" in results:
        parts += ["", difference_table(results)]
    if "memory" in results:
        parts += ["", memory_lines(results)]
    return "\n".join(parts)


def sample_text(results, prompts):
    """What the models made of the first two prompts, two samples each (of the first seed)."""
    speakers = [("teacher", results["teacher"]["metrics"])]
    speakers += [(o["label"], o["per_seed"][0]) for o in results["students"]["objectives"].values()]
    lines = []
    for i, prompt in enumerate(prompts):
        lines += [f"{'=' * 30} prompt {i + 1}", prompt]
        for label, measured in speakers:
            for j, text in enumerate(measured["text"][i]):
                lines += [f"{'-' * 30} {label}, sample {j + 1}", text]
    return "\n".join(lines)


# --- what goes into a file of results ---


def versions():
    found = {"python": platform.python_version(), "drkl_triton": drkl_triton.__version__}
    for name in ("torch", "triton", "numpy", "tokenizers", "transformers", "matplotlib", "tqdm"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def as_json(value):
    """Six significant digits; null for what JSON has no number for."""
    if isinstance(value, dict):
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
