"""Time, memory and share of the copy bandwidth against the vocabulary, one PNG each."""

import matplotlib
import providers

matplotlib.use("Agg")  # files only, also where there is no display
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator  # noqa: E402
from tables import MODES  # noqa: E402

# Okabe and Ito's palette, told apart with every common colour blindness; markers and dashes say it
# again. Plain PyTorch and this package are solid, other projects' kernels dashed, WRONG is dotted.
COLOURS = {
    "dense": "#000000",
    "kl_div": "#CC79A7",
    "compile": "#E69F00",
    "tiled": "#0072B2",
    "triton": "#D55E00",
    "kernels": "#8B3A00",
    "liger": "#009E73",
    "orda": "#56B4E9",
    "speculators": "#777777",
    "fast_llm": "#CC79A7",
    "trl": "#000000",
    "quack": "#E69F00",
}
MARKERS = dict(zip(COLOURS, "os^DvhPX<>*d", strict=True))


def _style(name, wrong):
    """Baselines have hollow markers of three sizes, so that curves on top of one another show."""
    provider, number = providers.BY_NAME[name], list(COLOURS).index(name)
    own = provider.own
    return {
        "color": COLOURS[name],
        "marker": MARKERS[name],
        "markersize": 5 if own else 4 + 2 * (number % 3),
        "markerfacecolor": COLOURS[name] if own else "none",
        "linestyle": ":" if wrong else "--" if provider.foreign else "-",
        "linewidth": 2.2 if own else 1.2,
        "zorder": 3 if own else 2,
    }


FIGURES = {
    "time": ("ms", "time (ms)", "log"),
    "memory": ("peak_mb", "peak memory above inputs (MB)", "log"),
    "bandwidth": ("percent_of_copy", "% of copy bandwidth", "linear"),
}


def draw(rows, stem):
    """Writes <stem>-time.png and so on; returns the paths."""
    rows = [row for row in rows if "ms" in row]
    return [_figure(rows, kind, stem) for kind in FIGURES] if rows else []


def unique(rows, *keys):
    return list(dict.fromkeys(tuple(row[key] for key in keys) for row in rows))


def _figure(rows, kind, stem):
    column, label, scale = FIGURES[kind]
    kinds = unique(rows, "op", "dtype")
    modes = [mode for mode in MODES if any(row["mode"] == mode for row in rows)]
    size = (1.2 + 3.7 * len(modes), 1.6 + 2.7 * len(kinds))
    figure, axes = plt.subplots(
        len(kinds), len(modes), figsize=size, squeeze=False, sharex=True, layout="constrained"
    )
    for (op, dtype), line in zip(kinds, axes, strict=True):
        for mode, ax in zip(modes, line, strict=True):
            here = [r for r in rows if (r["op"], r["dtype"], r["mode"]) == (op, dtype, mode)]
            _panel(ax, here, column, scale)
            ax.set_title(f"{op}, {dtype}: {mode}", fontsize=10)
        line[0].set_ylabel(label)
    for ax in axes[-1]:
        ax.set_xlabel("vocabulary V (thousands)")
    legend(figure, axes)
    one = rows[0]
    place = f"{one['device']}, {one['threads']} threads" if "cpu" in stem.name else one["device"]
    between = ": " if len(modes) > 1 else "\n"  # one column is too narrow for it in one line
    what = f"{label} by vocabulary, {one['tokens']:,} tokens"
    figure.suptitle(f"{place}{between}{what}", fontsize=11)
    path = stem.with_name(f"{stem.name}-{kind}.png")
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _panel(ax, rows, column, scale):
    curves(ax, rows, "vocab", column, _style)
    if scale == "linear":
        ax.set_ylim(bottom=0)
        ax.axhline(100, color="grey", linewidth=0.8, linestyle="--")
    else:
        log_scale(ax)
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))


def curves(ax, rows, axis, column, style_of):
    """``column`` of each provider against ``axis``, the spread of times behind, and the x axis.
    style_of(name, wrong): what ax.plot takes.
    """
    for (name,) in unique(rows, "provider"):
        mine = sorted((r for r in rows if r["provider"] == name), key=lambda r: r[axis])
        mine = [r for r in mine if r.get(column, "") != ""]
        wrong = any(r.get("check") == "WRONG" for r in mine)
        style = style_of(name, wrong)
        x, y = [r[axis] for r in mine], [r[column] for r in mine]
        ax.plot(x, y, label=f"{name} (WRONG)" if wrong else name, **style)
        if column == "ms":
            low, high = [r["ms_q1"] for r in mine], [r["ms_q3"] for r in mine]
            ax.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)
    ax.set_xscale("log")
    ax.set_xticks(sorted({row[axis] for row in rows}))
    ax.xaxis.set_minor_locator(NullLocator())
    shown = (lambda x, _: f"{x / 1000:.3g}") if axis == "vocab" else (lambda x, _: f"{x:,.0f}")
    ax.xaxis.set_major_formatter(FuncFormatter(shown))
    ax.tick_params(axis="x", labelsize=8)
    ax.grid(True, alpha=0.3)


def log_scale(ax):
    """Of y, with labels between the powers of ten where there are few of them."""
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,)))
    ax.yaxis.set_minor_formatter(NullFormatter())


def legend(figure, axes):
    entries = {}
    for ax in axes.flat:
        handles, labels = ax.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    lines = -(-len(entries) // 6)
    figure.legend(
        entries.values(),
        entries,
        loc="outside lower center",
        ncols=-(-len(entries) // lines),
        fontsize=9,
    )
