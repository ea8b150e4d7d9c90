"""Means over seeds and held-out documents, and paired differences with bootstrap intervals.

A run is a dictionary: ``documents`` {name: {metric: mean over its tokens}} and ``prompts``
[{metric: number}], of one objective and seed. Documents have the same number of tokens, so that
the mean over documents is that over tokens.
"""

from dataclasses import dataclass

import numpy as np
from report import Metric, t_quantile

DRAWS = 2000
LEVEL = 95


OF_DOCUMENTS = (
    Metric("cross_entropy", "cross-entropy", "nats", "lower"),
    Metric("kl_teacher_student", "KL(p‖q)", "nats", "lower"),
    Metric("kl_student_teacher", "KL(q‖p)", "nats", "lower"),
    Metric("tail_student_teacher", "tail KL(q̂‖p̂)", "nats", "lower"),
    Metric("agreement", "top-1 agreement", "%", "higher", 100.0),
    Metric("overconfidence", "confidence − accuracy", "% points", "0", 100.0),
    Metric("calibration_error", "ECE", "% points", "lower", 100.0),
    Metric("entropy", "entropy", "nats"),
    Metric("label_probability", "probability of the label", "%", "higher", 100.0),
)
OF_PROMPTS = (
    Metric("distinct_1", "Distinct-1", ""),
    Metric("distinct_2", "Distinct-2", ""),
    Metric("self_bleu", "self-BLEU", ""),
    Metric("repetition", "repeated 4-grams", "%", "", 100.0),
    Metric("fidelity", "log p(sample), teacher", "nats/token", "higher"),
)
METRICS = (*OF_DOCUMENTS, *OF_PROMPTS)
BY_KEY = {metric.key: metric for metric in METRICS}


def table(run, metric):
    """[units, columns] of a run, and what makes one number of a mean over units: of the documents,
    or of the prompts.
    """
    if metric in OF_PROMPTS:
        return np.array([[row[metric.key]] for row in run["prompts"]])
    rows = [run["documents"][name] for name in sorted(run["documents"])]
    if metric.key == "calibration_error":
        bins = [row["reliability"] for row in rows]
        return np.array([[b["count"], b["confidence"], b["accuracy"]] for b in bins]).reshape(
            len(rows), -1
        )
    return np.array([[row[metric.key]] for row in rows])


def number(means, metric):
    """Of means over units [..., columns]."""
    if metric.key != "calibration_error":
        return means[..., 0]
    count, confidence, accuracy = np.moveaxis(means.reshape(*means.shape[:-1], 3, -1), -2, 0)
    return np.abs(confidence - accuracy).sum(-1) / count.sum(-1)


def value(run, metric):
    return float(number(table(run, metric).mean(0), metric))


@dataclass(frozen=True)
class Interval:
    mean: float
    low: float
    high: float
    seeds: int
    # Student's t over the seeds alone, None with fewer than three
    t_low: float | None = None
    t_high: float | None = None

    @property
    def apart(self):
        """Whether 0 lies outside: of both intervals, where there are two. With fewer than three
        seeds nothing is said of the seeds, and so of chance.
        """
        if self.t_low is None:
            return False
        return (self.low > 0 and self.t_low > 0) or (self.high < 0 and self.t_high < 0)


def interval(runs, metric, baseline=None, draws=DRAWS):
    """Of runs {seed: run}, the mean; with a baseline, likewise, of the differences to it over the
    seeds that both have. In each draw seeds and documents (or prompts) are taken anew with
    replacement, the same ones on both sides.
    """
    seeds = sorted(runs if baseline is None else runs.keys() & baseline.keys())
    data = np.stack([table(runs[seed], metric) for seed in seeds])  # [seeds, units, columns]
    other = None if baseline is None else np.stack([table(baseline[s], metric) for s in seeds])

    def of(seed_weights, unit_weights):
        """Weights [draws, seeds], [draws, units], that sum to 1."""
        out = 0.0
        for sign, x in ((1, data), (-1, other)):
            if x is not None:
                means = np.einsum("du,suc->dsc", unit_weights, x)
                out = out + sign * (number(means, metric) * seed_weights).sum(1)
        return out

    count, units = data.shape[:2]
    even = np.full((1, count), 1 / count), np.full((1, units), 1 / units)
    draw = np.random.default_rng(0)
    weights = (draw.multinomial(n, np.full(n, 1 / n), draws) / n for n in (count, units))
    low, high = np.percentile(of(*weights), [(100 - LEVEL) / 2, (100 + LEVEL) / 2])
    mean = float(of(*even)[0])
    if count < 3:
        return Interval(mean, float(low), float(high), count)
    each = number(data.mean(1), metric) - (0 if other is None else number(other.mean(1), metric))
    half = t_quantile(count - 1) * each.std(ddof=1) / count**0.5
    return Interval(mean, float(low), float(high), count, mean - half, mean + half)
