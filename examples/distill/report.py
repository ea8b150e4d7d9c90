"""Numbers over seeds, the table, and the figures."""

import math
from dataclasses import dataclass
from statistics import fmean, stdev

import matplotlib

matplotlib.use("Agg")  # files only, also where there is no display
import matplotlib.pyplot as plt  # noqa: E402


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

# Okabe and Ito's palette, distinct with every common colour blindness; markers say it again.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
TEACHER = {"color": "black", "linestyle": "--", "linewidth": 1.2}


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


def full_report(results):
    data, students, seeds = results["data"], results["students"], results["seeds"]
    count = len(seeds)
    noise = (
        f"mean of {count} seeds ± half-width of the 95 % interval (Student t, over the students' "
        "initialisation\nand batch order; one teacher, one split)"
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


# --- figures ---


def styles(objectives):
    """Later lines are thinner, so that one that coincides with an earlier one leaves it visible."""
    return {
        name: {
            "color": COLOURS[i % len(COLOURS)],
            "marker": MARKERS[i % len(MARKERS)],
            "linewidth": max(1.0, 3.0 - 0.5 * i),
        }
        for i, name in enumerate(objectives)
    }


def smooth(values, parts=60):
    """(steps, means) over about `parts` stretches: the noise of single batches hides the trend."""
    width = max(1, len(values) // parts)
    chunks = [values[i : i + width] for i in range(0, len(values) - width + 1, width)]
    return [(i + 0.5) * width for i in range(len(chunks))], [fmean(chunk) for chunk in chunks]


def mean_over_seeds(histories, key):
    return [fmean(values) for values in zip(*(history[key] for history in histories), strict=True)]


def finish(figure, path, handles=None):
    if handles is not None:
        figure.legend(*handles, loc="outside lower center", ncols=8, frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def panel(axes, xlabel, ylabel, title=None):
    axes.set(xlabel=xlabel, ylabel=ylabel)
    if title:
        axes.set_title(title, fontsize="medium")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def plot_training(results, path):
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    step = f"step ({results['settings']['batch'] * results['settings']['context']:,} tokens each)"
    history = results["teacher"]["history"]
    left.plot(*smooth(history["loss"]), color="0.55", label="training batches")
    held_out = history["held_out"]
    left.plot(
        [h["step"] for h in held_out],
        [h["cross_entropy"] for h in held_out],
        "ko-",
        ms=4,
        label="held-out text",
    )
    panel(left, step, "cross-entropy (nats/token)", "teacher")
    left.legend(frameon=False)
    objectives = results["students"]["objectives"]
    for name, style in styles(objectives).items():
        xs, ys = smooth(mean_over_seeds(objectives[name]["history"], "loss"))
        right.plot(xs, ys, label=objectives[name]["label"], markevery=6, ms=5, **style)
    right.set_yscale("log")
    panel(
        right,
        step,
        "own objective (nats/token, log scale)",
        "students (each its own objective: not comparable)",
    )
    right.legend(frameon=False)
    finish(figure, path)


def plot_held_out(results, path):
    keys = (
        "cross_entropy",
        "kl_teacher_student",
        "kl_student_teacher",
        "tail_student_teacher",
        "overconfidence",
        "entropy",
    )
    figure, grid = plt.subplots(2, 3, figsize=(12, 7), layout="constrained", sharex=True)
    objectives = results["students"]["objectives"]
    for metric, axes in zip((BY_KEY[key] for key in keys), grid.flat, strict=True):
        for name, style in styles(objectives).items():
            histories = [history["held_out"] for history in objectives[name]["history"]]
            steps = [point["step"] for point in histories[0]]
            points = [
                summary([p[metric.key] * metric.scale for p in same])
                for same in zip(*histories, strict=True)
            ]
            means = [mean for mean, _ in points]
            axes.plot(steps, means, label=objectives[name]["label"], ms=4, **style)
            if len(histories) > 1:
                low, high = [m - h for m, h in points], [m + h for m, h in points]
                axes.fill_between(steps, low, high, color=style["color"], alpha=0.15, linewidth=0)
        if metric.of_teacher:
            value = results["teacher"]["history"]["held_out"][-1][metric.key] * metric.scale
            axes.axhline(value, label="teacher", **TEACHER)
        panel(axes, "step" if axes in grid[1] else "", metric.axis)
    finish(figure, path, grid[0, 0].get_legend_handles_labels())


def plot_reliability(results, path):
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 5), layout="constrained")
    objectives = results["students"]["objectives"]
    left.plot([0, 100], [0, 100], color="0.6", linewidth=1, label="perfect calibration")
    curves = {
        "teacher": (
            "teacher",
            {**TEACHER, "marker": "*"},
            [results["teacher"]["metrics"]["reliability"]],
        )
    }
    for name, style in styles(objectives).items():
        curves[name] = (
            objectives[name]["label"],
            style,
            [one["reliability"] for one in objectives[name]["per_seed"]],
        )
    for label, style, bins in curves.values():
        count, confidence, accuracy = (
            [sum(values) for values in zip(*(b[key] for b in bins), strict=True)]
            for key in ("count", "confidence", "accuracy")
        )
        filled = [i for i, n in enumerate(count) if n]
        xs = [100 * confidence[i] / count[i] for i in filled]
        left.plot(xs, [100 * accuracy[i] / count[i] for i in filled], label=label, ms=5, **style)
        right.plot(xs, [100 * count[i] / sum(count) for i in filled], ms=5, **style)
    panel(
        left,
        "confidence: probability of the top token (%)",
        "accuracy (%)",
        "below the line: overconfident",
    )
    panel(
        right,
        "confidence: probability of the top token (%)",
        "tokens in the bin (%)",
        f"{len(count)} equal-width bins",
    )
    left.set_aspect("equal")
    finish(figure, path, left.get_legend_handles_labels())


def plot_metrics(results, path):
    figure, grid = plt.subplots(3, 5, figsize=(15, 8), layout="constrained", sharey=True)
    objectives = results["students"]["objectives"]
    labels = [o["label"] for o in objectives.values()]
    for metric, axes in zip(METRICS, grid.flat, strict=True):
        for i, (name, style) in enumerate(styles(objectives).items()):
            mean = objectives[name]["mean"][metric.key] * metric.scale
            interval = objectives[name]["interval95"]
            error = None if interval is None else interval[metric.key] * metric.scale
            axes.errorbar(mean, i, xerr=error, capsize=3, ms=7, **style)
        if metric.of_teacher:
            axes.axvline(results["teacher"]["metrics"][metric.key] * metric.scale, **TEACHER)
        if metric.aim == "0":
            axes.axvline(0, color="0.6", linewidth=1)
        aim = {
            "lower": "lower is better",
            "higher": "higher is better",
            "0": "0 is best",
            "": "no better end",
        }[metric.aim]
        panel(axes, metric.axis, "", aim)
    grid[0, 0].set_yticks(range(len(labels)), labels)
    grid[0, 0].set_ylim(len(labels) - 0.5, -0.5)
    seeds = len(results["seeds"])
    bars = f"bars: 95 % intervals over {seeds} seeds" if seeds > 1 else "one seed: no intervals"
    figure.suptitle(f"Held-out text and samples; dashed: teacher; {bars}", fontsize="medium")
    finish(figure, path)


def plot_diversity(results, path):
    figure, both = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained", sharey=True)
    objectives = results["students"]["objectives"]
    quality = BY_KEY["sample_nll"]
    for key, title, axes in zip(
        ("distinct_2", "self_bleu"),
        ("right: more diverse", "left: more diverse"),
        both,
        strict=True,
    ):
        for name, style in styles(objectives).items():
            o = objectives[name]
            errors = [
                None if o["interval95"] is None else o["interval95"][k] for k in (key, quality.key)
            ]
            axes.errorbar(
                o["mean"][key], o["mean"][quality.key], xerr=errors[0], yerr=errors[1],
                linestyle="", capsize=3, ms=8, label=o["label"], **style,
            )  # fmt: skip
        teacher = results["teacher"]["metrics"]
        axes.plot(teacher[key], teacher[quality.key], "k*", ms=12, label="teacher")
        panel(axes, BY_KEY[key].label, "", f"{title}; down: likelier to the teacher")
    both[0].set_ylabel("−log p(sample) under the teacher (nats/token)")
    finish(figure, path, both[0].get_legend_handles_labels())


def write_figures(results, folder):
    plots = {
        "training.png": plot_training,
        "heldout.png": plot_held_out,
        "reliability.png": plot_reliability,
        "metrics.png": plot_metrics,
        "diversity.png": plot_diversity,
    }
    for name, plot in plots.items():
        plot(results, folder / name)
    return list(plots)
