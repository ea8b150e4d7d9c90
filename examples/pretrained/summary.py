"""The tables: every objective's means, and its differences to reverse KL."""

import csv
import json

import numpy as np
from intervals import LEVEL, METRICS, interval, value
from report import as_json
from student import BASELINE, OBJECTIVES

COLUMNS = (
    *("metric", "objective", "minus", "seeds", "mean", "low", "high", "t_low", "t_high", "apart"),
)


def means(results):
    """{objective: {metric key: Interval}}"""
    return {
        name: {metric.key: interval(runs, metric) for metric in METRICS}
        for name, runs in results["runs"].items()
    }


def differences(results):
    """To reverse KL, by the seeds that both have; {} without it."""
    base = results["runs"].get(BASELINE)
    others = {n: r for n, r in results["runs"].items() if n != BASELINE} if base else {}
    return {
        name: {metric.key: interval(runs, metric, base) for metric in METRICS}
        for name, runs in others.items()
    }


def chosen_lr(results, name):
    rates = results["learning_rates"][name]
    return min(rates, key=rates.get)


def rows(results):
    for minus, found in (("", means(results)), (BASELINE, differences(results))):
        for name, by_metric in found.items():
            for key, i in by_metric.items():
                yield (key, name, minus, i.seeds, i.mean, i.low, i.high, i.t_low, i.t_high,
                       i.apart if minus else "")  # fmt: skip


def spread(results):
    """{tokens: [standard deviation over the seeds of KL(q‖p), of reverse KL and of each other
    objective that was looked at, and of the paired difference of each of these]}; {} with one seed.
    """
    looked = looked_at(results)
    base = looked.pop(BASELINE, {})
    if len(base) < 2:
        return {}
    tokens = [point["tokens"] for point in base[min(base)]]
    base, *others = (
        {
            seed: np.array([point["kl_student_teacher"] for point in run])
            for seed, run in runs.items()
        }
        for runs in (base, *looked.values())
    )
    minus = [{seed: x[seed] - base[seed] for seed in x if seed in base} for x in others]
    columns = (
        np.std(list(x.values()), 0, ddof=1) if len(x) > 1 else np.full(len(tokens), np.nan)
        for x in (base, *others, *minus)
    )
    return dict(zip(tokens, np.stack(list(columns), 1).tolist(), strict=True))


def looked_at(results):
    """{objective: {seed: [what was measured during its training]}} of those it was done for."""
    found = {
        name: {seed: run["history"]["held_out"] for seed, run in runs.items()}
        for name, runs in results["runs"].items()
    }
    return {name: runs for name, runs in found.items() if runs and all(runs.values())}


def number(metric, x, signed=False):
    digits = 2 if metric.scale == 100.0 else 3
    return f"{x * metric.scale:{'+' if signed else ''}.{digits}f}"


def shown(metric, i, signed=False):
    low, high = (number(metric, x, signed) for x in (i.low, i.high))
    return f"{number(metric, i.mean, signed)} [{low}, {high}]" + ("*" if signed and i.apart else "")


def markdown(header, body):
    lines = [header, ["---"] * len(header), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def tables(results):
    """Markdown."""
    runs, settings = results["runs"], results["settings"]
    names = list(runs)
    labels = [OBJECTIVES[name].label for name in names]
    found, minus = means(results), differences(results)
    extra = [("teacher", results["teacher"]), ("start", results["start"])]
    body = [
        [
            m.row,
            *(number(m, value(run, m)) for _, run in extra),
            *(shown(m, found[name][m.key]) for name in names),
        ]
        for m in METRICS
    ]
    rates = ["learning rate", "", "", *(f"{chosen_lr(results, name):g}" for name in names)]
    seeds = ["seeds", "", "", *(str(len(runs[name])) for name in names)]
    parts = [
        f"Mean [{LEVEL} % bootstrap interval over seeds and held-out documents]; "
        f"{settings['tokens']:,} tokens a student, {settings['layers']} layers.",
        "",
        markdown(["held-out text", *(n for n, _ in extra), *labels], [seeds, rates, *body]),
    ]
    if minus:
        body = [[m.row, *(shown(m, minus[name][m.key], True) for name in minus)] for m in METRICS]
        count = len(minus) * len(METRICS)
        others = [OBJECTIVES[name].label for name in minus]
        parts += [
            "",
            f"Differences to {OBJECTIVES[BASELINE].label}, paired by seed and document. * 0 lies "
            "outside of this interval and of Student's t over the seeds (three or more). "
            f"{count} comparisons: by chance alone {count * (1 - LEVEL / 100):.0f} intervals would "
            "leave 0 out.",
            "",
            markdown([f"minus {OBJECTIVES[BASELINE].label}", *others], body),
        ]
    over_training = spread(results)
    if over_training:
        others = [OBJECTIVES[name].label for name in looked_at(results) if name != BASELINE]
        base = OBJECTIVES[BASELINE].label
        body = [[f"{n:,}", *(f"{x:.4f}" for x in row)] for n, row in over_training.items()]
        parts += [
            "",
            "Standard deviation over the seeds of KL(q‖p) on the validation documents, during "
            "training.",
            "",
            markdown(["tokens", base, *others, *(f"{o} minus {base}" for o in others)], body),
        ]
    return "\n".join(parts)


def write(results, folder):
    (folder / "table.md").write_text(tables(results) + "\n", encoding="utf-8")
    about = {k: v for k, v in results.items() if k not in ("runs", "teacher", "start")}
    text = json.dumps(as_json(about), indent=1, ensure_ascii=False)
    (folder / "about.json").write_text(text + "\n", encoding="utf-8")
    with (folder / "intervals.csv").open("w", newline="", encoding="utf-8") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow(COLUMNS)
        for row in rows(results):
            out.writerow([f"{x:.6g}" if isinstance(x, float) else x for x in row])
    return ["table.md", "about.json", "intervals.csv"]
