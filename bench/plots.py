"""Each figure of a benchmark, with a line of panels for each op and dtype, one PNG each."""

import matplotlib

matplotlib.use("Agg")  # files only, also where there is no display
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator  # noqa: E402

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
    "trl": "#7F3C8D",
    "quack": "#E69F00",
    "products": "#777777",
    "recompute": "#56B4E9",
}
MARKERS = dict(zip(COLOURS, "os^DvhPX<>*d*s", strict=True))
AXES = {"tokens": "tokens", "vocab": "vocabulary V (thousands)"}


def draw(bench, rows, options, stem):
    """Writes <stem>-time.png and so on; returns the paths."""
    timed = [row for row in rows if "ms" in row]
    return [path for kind in bench.figures if (path := _figure(bench, timed, options, kind, stem))]


def unique(rows, *keys):
    return list(dict.fromkeys(tuple(row[key] for key in keys) for row in rows))


def _figure(bench, rows, options, kind, stem):
    column, label = bench.figures[kind]
    rows = [row for row in rows if row.get(column, "") != ""]
    if not rows:
        return None
    ops = unique(rows, "op")
    panels = [
        (dtype, *panel)
        for (dtype,) in unique(rows, "dtype")
        for panel in bench.panels(rows, options)
    ]
    size = (1.4 + 3.8 * len(panels), 1.8 + 2.8 * len(ops))
    figure, axes = plt.subplots(
        len(ops), len(panels), figsize=size, squeeze=False, sharex="col", layout="constrained"
    )
    for (op,), line in zip(ops, axes, strict=True):
        for (dtype, title, axis, here), ax in zip(panels, line, strict=True):
            here = [row for row in here if (row["op"], row["dtype"]) == (op, dtype)]
            ax.set_title(f"{op}, {dtype}: {title}", fontsize=10)
            if here:
                _panel(bench, ax, here, axis, column)
        line[0].set_ylabel(label)
    for (_, _, axis, _), ax in zip(panels, axes[-1], strict=True):
        ax.set_xlabel(AXES[axis])
    _legend(figure, axes)
    one = rows[0]
    place = one["device"] if one["driver"] else f"{one['device']}, {one['threads']} threads"
    figure.suptitle(f"{label}\n{place}, {bench.subject(one)}", fontsize=11)
    path = stem.with_name(f"{stem.name}-{kind}.png")
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _panel(bench, ax, rows, axis, column):
    """``column`` of each provider against ``axis``, the spread of times behind."""
    for (name,) in unique(rows, "provider"):
        mine = sorted((r for r in rows if r["provider"] == name), key=lambda r: r[axis])
        wrong = any(r.get("check") == "WRONG" for r in mine)
        style = _style(bench, name, wrong)
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
    if column == "percent_of_copy":
        ax.axhline(100, color="grey", linewidth=0.8, linestyle="--")
    if column == "percent_of_copy" or column == "x_products" and max(r[column] for r in rows) < 10:
        ax.set_ylim(bottom=0)
    else:
        ax.set_yscale("log")
        low, high = ax.get_ylim()  # labels between the powers of ten where there are few of them
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,)))
        ax.yaxis.set_minor_formatter(NullFormatter())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.10g}"))


def _style(bench, name, wrong):
    """Baselines have hollow markers of three sizes, so that curves on top of one another show."""
    provider = next(p for p in bench.providers if p.name == name)
    solid = provider.own and name != "recompute"  # whose memory is often that of the others
    return {
        "color": COLOURS[name],
        "marker": MARKERS[name],
        "markersize": 5 if solid else 4 + 2 * (list(COLOURS).index(name) % 3),
        "markerfacecolor": COLOURS[name] if solid else "none",
        "linestyle": ":" if wrong else "--" if provider.foreign else "-",
        "linewidth": 2.2 if provider.own else 1.2,
        "zorder": 3 if solid else 2,
    }


def _legend(figure, axes):
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
