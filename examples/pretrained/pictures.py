"""The figures: differences with intervals, the plane of fidelity and diversity, and the pull."""

import numpy as np
from figures import COLOURS, MARKERS, finish, panel, plt
from intervals import BY_KEY, METRICS, interval, value
from report import t_quantile
from student import BASELINE, OBJECTIVES
from summary import differences, looked_at


def style(name):
    i = list(OBJECTIVES).index(name)
    return {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}


def plot_differences(results):
    """In each panel the grey band is what the seeds of reverse KL differ among themselves, the
    dotted line the difference that makes 0 of a metric whose best value that is.
    """
    runs, found = results["runs"], differences(results)
    if not found:
        return None
    labels = [OBJECTIVES[name].label for name in found]
    height = 1.2 + 0.28 * len(labels)
    size = (15, 3 * height)
    figure, grid = plt.subplots(3, 5, figsize=size, layout="constrained", sharey=True)
    for axes in grid.flat[len(METRICS) :]:
        axes.axis("off")
    for metric, axes in zip(METRICS, grid.flat, strict=False):
        base = [value(run, metric) * metric.scale for run in runs[BASELINE].values()]
        spread = max(base) - min(base)
        axes.axvspan(-spread, spread, color="0.9")
        axes.axvline(0, color="0.5", linewidth=1)
        reach = spread
        for i, (name, by_metric) in enumerate(found.items()):
            at = by_metric[metric.key]
            mean, low, high = (x * metric.scale for x in (at.mean, at.low, at.high))
            errors = [[max(0, mean - low)], [max(0, high - mean)]]
            few = {} if at.seeds > 2 else {"markerfacecolor": "white"}
            axes.errorbar(
                mean, i, xerr=errors, elinewidth=1.5, capsize=3, ms=6, **style(name), **few
            )
            reach = max(reach, abs(low), abs(high))
        if metric.aim == "0":
            axes.axvline(-np.mean(base), color="0.5", linestyle=":")
            reach = max(reach, abs(np.mean(base)))
        reach = reach or 1.0
        axes.set_xlim(-1.1 * reach, 1.1 * reach)
        aim = {"lower": "left is better", "higher": "right is better", "": "no better end"}
        panel(axes, f"Δ {metric.axis}", "", aim.get(metric.aim, "the dotted line is best"))
    grid[0, 0].set_yticks(range(len(labels)), labels)
    grid[0, 0].set_ylim(len(labels) - 0.5, -0.5)
    figure.suptitle(
        f"Difference to {OBJECTIVES[BASELINE].label}, 95 % bootstrap intervals; hollow: two seeds "
        f"or fewer; grey: the range of {OBJECTIVES[BASELINE].label}'s own seeds",
        fontsize="medium",
    )
    return figure


def plot_plane(results):
    figure, both = plt.subplots(1, 2, figsize=(11, 5), layout="constrained", sharey=True)
    fidelity = BY_KEY["fidelity"]
    for key, axes in zip(("distinct_2", "self_bleu"), both, strict=True):
        for name, runs in results["runs"].items():
            x, y = interval(runs, BY_KEY[key]), interval(runs, fidelity)
            axes.errorbar(
                x.mean, y.mean, xerr=[[x.mean - x.low], [x.high - x.mean]],
                yerr=[[y.mean - y.low], [y.high - y.mean]], linestyle="", elinewidth=1,
                alpha=0.9, ms=8, label=OBJECTIVES[name].label, **style(name),
            )  # fmt: skip
        teacher = results["teacher"]
        axes.plot(
            value(teacher, BY_KEY[key]), value(teacher, fidelity), "k*", ms=13, label="teacher"
        )
        towards = "right: more diverse" if key == "distinct_2" else "left: more diverse"
        panel(axes, BY_KEY[key].label, "", f"{towards}; up: likelier to the teacher")
    both[0].set_ylabel("teacher's log p of a sampled token (nats)")
    handles = both[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=5, frameon=False)
    return figure


def plot_pull(results):
    """Lines with a band of Student's 95 % interval over the seeds."""
    looked = looked_at(results)
    if not looked:
        return None
    figure, panels = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
    what = {
        "pull": "q_y (1 − q_y) N where q_y ≥ p_y (nats)",
        "tail_student_teacher": "tail KL(q̂‖p̂) = N (nats)",
        "kl_student_teacher": "KL(q‖p) (nats)",
    }
    titles = "pull of reverse KL's tail on the target", "the tail", "the whole"
    for (key, label), title, axes in zip(what.items(), titles, panels, strict=True):
        for name, runs in looked.items():
            points = list(runs.values())
            tokens = [point["tokens"] for point in points[0]]
            values = np.array([[point[key] for point in of_run] for of_run in points])
            mean, kind = values.mean(0), style(name)
            axes.plot(tokens, mean, ms=4, label=OBJECTIVES[name].label, **kind)
            if len(values) > 1:
                half = t_quantile(len(values) - 1) * values.std(0, ddof=1) / len(values) ** 0.5
                axes.fill_between(tokens, mean - half, mean + half, color=kind["color"], alpha=0.15)
        axes.set_ylim(0, None)
        panel(axes, "tokens trained on", label, title)
    handles = panels[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=4, frameon=False)
    return figure


def write(results, folder):
    plots = {
        "differences.png": plot_differences,
        "plane.png": plot_plane,
        "pull.png": plot_pull,
    }
    written = []
    for name, plot in plots.items():
        figure = plot(results)
        if figure is not None:
            finish(figure, folder / name)
            written.append(name)
    return written
