"""The figures: PNG files, with the same colour and marker for an objective in all of them."""

from statistics import fmean

import matplotlib
from report import BY_KEY, METRICS, summary

matplotlib.use("Agg")  # files only, also where there is no display
import matplotlib.pyplot as plt  # noqa: E402

# Okabe and Ito's palette, distinct with every common colour blindness; markers say it again.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
FEWEST = 20  # tokens in a bin, below which its accuracy is noise and is not drawn
TEACHER = {"color": "black", "linestyle": "--", "linewidth": 1.2}


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
    if axes.get_xscale() == "linear":
        axes.locator_params(axis="x", nbins=4)
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
    teacher = results["teacher"]["metrics"]["reliability"]
    curves = [("teacher", {**TEACHER, "marker": "*"}, [teacher])]
    for name, style in styles(objectives).items():
        seeds = [one["reliability"] for one in objectives[name]["per_seed"]]
        curves.append((objectives[name]["label"], style, seeds))
    for label, style, bins in curves:
        count, confidence, accuracy = (
            [sum(values) for values in zip(*(b[key] for b in bins), strict=True)]
            for key in ("count", "confidence", "accuracy")
        )
        shown = [i for i, n in enumerate(count) if n >= FEWEST]
        xs = [100 * confidence[i] / count[i] for i in shown]
        left.plot(xs, [100 * accuracy[i] / count[i] for i in shown], label=label, ms=5, **style)
        right.plot(xs, [100 * count[i] / sum(count) for i in shown], ms=5, **style)
    confidence = "confidence: probability of the top token (%)"
    panel(left, confidence, "accuracy (%)", "below the line: overconfident")
    panel(
        right,
        confidence,
        "tokens in the bin (%)",
        f"{len(count)} equal-width bins, shown from {FEWEST} tokens",
    )
    left.set_aspect("equal")
    right.set(xlim=(-5, 105), ylim=(0, None))
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
            axes.errorbar(mean, i, xerr=error, elinewidth=1.5, capsize=3, ms=7, **style)
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
                linestyle="", elinewidth=1.5, capsize=3, ms=8, label=o["label"], **style,
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
