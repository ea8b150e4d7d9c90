"""Time, time beside the four products, and memory: by tokens and by vocabulary, one PNG each."""

import linear_providers as providers
import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter
from plots import curves, legend, log_scale, unique

# As in plots.py: Okabe and Ito's palette; plain PyTorch and this package are solid, other projects'
# losses dashed, WRONG is dotted; baselines have hollow markers.
LOOKS = {
    "products": ("#777777", "*"),
    "dense": ("#000000", "o"),
    "compile": ("#E69F00", "^"),
    "tiled": ("#0072B2", "D"),
    "triton": ("#D55E00", "v"),
    "recompute": ("#56B4E9", "s"),
    "liger": ("#009E73", "P"),
    "trl": ("#CC79A7", "X"),
}
FIGURES = {
    "time": ("ms", "time of loss and gradients (ms)"),
    "floor": ("x_products", "time / time of the four products"),
    "memory": ("peak_mb", "peak memory above the inputs (MB)"),
}
AXES = {"tokens": "tokens", "vocab": "vocabulary V (thousands)"}


def draw(rows, fixed, stem):
    """Writes <stem>-time.png and so on; returns the paths. ``fixed``: where one axis stays while
    the other is swept.
    """
    timed = [row for row in rows if "ms" in row]
    return [path for kind in FIGURES if (path := _figure(timed, kind, fixed, stem))]


def _sweeps(rows, fixed):
    """{(axis, fixed axis): rows} of those with more than one point, or of the first."""
    found = {}
    for axis, other in (("tokens", "vocab"), ("vocab", "tokens")):
        here = [row for row in rows if row[other] == fixed[other]]
        if len(unique(here, axis)) > 1 or (axis == "vocab" and not found):
            found[axis, other] = here
    return found


def _figure(rows, kind, fixed, stem):
    column, label = FIGURES[kind]
    rows = [row for row in rows if row.get(column, "") != ""]
    if not rows:
        return None
    kinds, sweeps = unique(rows, "op", "dtype"), _sweeps(rows, fixed)
    size = (1.4 + 4.0 * len(sweeps), 1.8 + 2.9 * len(kinds))
    figure, axes = plt.subplots(
        *(len(kinds), len(sweeps)), figsize=size, squeeze=False, sharex="col", layout="constrained"
    )
    for (op, dtype), line in zip(kinds, axes, strict=True):
        for ((axis, other), swept), ax in zip(sweeps.items(), line, strict=True):
            here = [r for r in swept if (r["op"], r["dtype"]) == (op, dtype)]
            _panel(ax, here, axis, column)
            at = f"V = {fixed['vocab']:,}" if other == "vocab" else f"{fixed['tokens']:,} tokens"
            ax.set_title(f"{op}, {dtype}: {at}", fontsize=10)
        line[0].set_ylabel(label)
    for axis, ax in zip((axis for axis, _ in sweeps), axes[-1], strict=True):
        ax.set_xlabel(AXES[axis])
    legend(figure, axes)
    one = rows[0]
    place = one["device"] if one["driver"] else f"{one['device']}, {one['threads']} threads"
    hidden = f"hidden size {one['hidden']:,}"
    if one["teacher_hidden"] != one["hidden"]:
        hidden += f" (teacher {one['teacher_hidden']:,})"
    if one["ignored"]:
        hidden += f", {one['ignored']:.0%} of the tokens ignored"
    figure.suptitle(f"Losses from hidden states: {label}\n{place}, {hidden}", fontsize=11)
    path = stem.with_name(f"{stem.name}-{kind}.png")
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _panel(ax, rows, axis, column):
    curves(ax, rows, axis, column, _style)
    if column == "x_products" and max(r[column] for r in rows) < 10:
        ax.set_ylim(bottom=0)
    else:
        log_scale(ax)
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.10g}"))


def _style(name, wrong):
    provider, (colour, marker) = providers.BY_NAME[name], LOOKS[name]
    own = provider.own
    solid = own and name != "recompute"  # whose memory is often that of the others
    return {
        "color": colour,
        "marker": marker,
        "markersize": 5 if solid else 8,
        "markerfacecolor": colour if solid else "none",
        "linestyle": ":" if wrong else "--" if provider.foreign else "-",
        "linewidth": 2.2 if own else 1.2,
        "zorder": 3 if solid else 2,
    }
