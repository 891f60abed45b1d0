"""Measurements as pictures, drawn without a display."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

Row = Mapping[str, Any]

BLUE, ORANGE, GREEN, RED, GREY = "#0b62a4", "#d9730d", "#2f8f4e", "#c0392b", "#858585"
POLICIES = {"oracle": BLUE, "two-pass": GREEN, "static": ORANGE, "random": RED}
# Perplexity increases below it, and decreases, are drawn at it, hollow: a logarithm has no zero.
NOTHING_LOST = 1e-4
STYLE: Any = {  # of rcParams, whose type lists every name
    "font.size": 11,
    "axes.titlesize": 12.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "legend.frameon": False,
    "legend.fontsize": 10.5,
    "lines.linewidth": 2,
    "lines.markersize": 5,
}


def study_page(study: Mapping[str, Any], path: Path) -> None:
    """Draws what `dejavu.predictors.study.study` found on one page, a PNG 1600 pixels wide."""
    layers, optional = study["layers"], study["optional"]
    rows = 4 if optional else 3
    with matplotlib.rc_context(STYLE):
        height = 1 + 4.4 * rows
        layout = ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.15, rect=(0, 0, 1, 1 - 0.4 / height))
        figure = Figure(figsize=(16, height), dpi=100, layout=layout)
        grid = figure.add_gridspec(rows, 3)
        axes = [figure.add_subplot(grid[i // 3, i % 3]) for i in range(9)]
        name, conditions = _title(study)
        figure.suptitle(name, fontsize=19, fontweight="bold", x=0.01, ha="left")
        figure.text(0.01, 1 - 0.52 / height, conditions, fontsize=12.5, va="top")
        _live(axes[0], layers)
        _carrying(axes[1], layers, "neurons", BLUE)
        _carrying(axes[2], layers, "heads", ORANGE)
        _overlap(axes[3], layers)
        _union(axes[4], study)
        _cosines(axes[5], layers)
        _costs(axes[6], study["mlp"], "neurons")
        _costs(axes[7], study["heads"], "heads")
        _ratios(axes[8], layers)
        if optional:
            _blocks(figure.add_subplot(grid[3, :]), optional)
        save_figure(figure, path)


def save_figure(figure: Figure, path: Path) -> None:
    """Writes beside ``path`` and renames, so that nobody ever sees half a picture under its name."""
    beside = path.with_name(path.name + ".partial")
    FigureCanvasAgg(figure).print_figure(beside, format="png")
    beside.replace(path)


def _title(study: Mapping[str, Any]) -> tuple[str, str]:
    """What was studied, and under which conditions."""
    model, text = study["model"], study["text"]
    name = model["name"]
    sizes = (
        f"{model['num_layers']} layers, hidden {model['hidden_size']}, {model['ffn_dim']} neurons and "
        f"{model['num_heads']} heads a layer, {model['dtype']}"
    )
    read = f"{text['tokens']:,} tokens of {text['file']} in windows of {text['window']}"
    return f"Contextual sparsity in {name}", f"{sizes}; {read}; dense perplexity {study['dense_ppl']:.2f}"


def _live(axes: Axes, layers: Sequence[Row]) -> None:
    x = [row["layer"] for row in layers]
    low, mean, high = ([row[f"live_{name}"] for row in layers] for name in ("p5", "mean", "p95"))
    axes.fill_between(x, low, high, color=BLUE, alpha=0.18, linewidth=0)
    axes.plot(x, mean, "o-", color=BLUE)
    _layer_axis(axes, layers)
    _share_axis(axes, "share of the layer's neurons", bottom=0)
    _label_ends(axes, [("95% of\ntokens\nbelow", high[-1], BLUE), ("mean", mean[-1], BLUE)])
    average = sum(mean) / len(mean)
    axes.set_title(f"Live neurons (ReLU above 0): {average:.1%} on average")


def _carrying(axes: Axes, layers: Sequence[Row], what: str, color: str) -> None:
    labels = []
    for share, alpha in ((99, 0.45), (95, 0.7), (90, 1.0)):
        values = [row[f"{what}_{share}"] for row in layers]
        axes.plot([row["layer"] for row in layers], values, "o-", color=color, alpha=alpha)
        labels.append((f"{share}%", values[-1], color))
    _layer_axis(axes, layers)
    _share_axis(axes, f"share of the layer's {what}", bottom=0, top=1.03 if what == "heads" else None)
    _label_ends(axes, labels)
    axes.set_title(f"{what.capitalize()} that carry 90, 95, 99% of what all add")


def _overlap(axes: Axes, layers: Sequence[Row]) -> None:
    lines = (
        ("overlap", "next\ntoken", BLUE, "o-"),
        ("overlap_unrelated", "other\ntext", ORANGE, "o-"),
        ("overlap_by_chance", "random\nsets", GREY, "o--"),
    )
    labels = [_by_layer(axes, layers, [row[key] for row in layers], *rest) for key, *rest in lines]
    _layer_axis(axes, layers)
    _share_axis(axes, "shared / in either (Jaccard)", bottom=0)
    _label_ends(axes, labels)
    axes.set_title("Live neurons that two tokens share")


def _union(axes: Axes, study: Mapping[str, Any]) -> None:
    layers = study["layers"]
    batches = [int(batch) for batch in study["union"]]
    for row in layers:
        axes.plot(batches, list(row["union"].values()), color=GREY, alpha=0.45, linewidth=1)
    mean = list(study["union"].values())
    axes.plot(batches, mean, "o-", color=BLUE, linewidth=2.5)
    for batch, share in zip(batches, mean, strict=True):
        text = f"{share:.1%}"
        axes.annotate(text, (batch, share), (-3, 7), textcoords="offset points", ha="right", color=BLUE)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(batches))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(batches[0] / 2, batches[-1] * 1.1)
    axes.set_xlabel("sequences in the batch")
    _share_axis(axes, "share of the neurons live in any", bottom=0)
    axes.set_title("Union over a batch (mean; grey: each layer)")


def _cosines(axes: Axes, layers: Sequence[Row]) -> None:
    lines = (
        ("same", "attention\nto MLP", BLUE, "o-"),
        ("next", "MLP to\nnext MLP", GREEN, "o-"),
        ("two_on", "two\nlayers", ORANGE, "o-"),
    )
    labels = [_by_layer(axes, layers, [row["cosine"][key] for row in layers], *rest) for key, *rest in lines]
    _layer_axis(axes, layers)
    axes.set_ylim(top=1.03)
    axes.set_ylabel("cosine similarity")
    _label_ends(axes, labels)
    axes.set_title("Cosine of the stream with itself, later on")


def _ratios(axes: Axes, layers: Sequence[Row]) -> None:
    lines = (("attention_ratio", "attention", ORANGE, "o-"), ("mlp_ratio", "MLP", BLUE, "o-"))
    labels = [_by_layer(axes, layers, [row[key] for row in layers], *rest) for key, *rest in lines]
    _layer_axis(axes, layers)
    axes.set_yscale("log")
    axes.axhline(1, color=GREY, linewidth=1, zorder=1)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.set_ylabel("|F(x)| / |x|")
    _label_ends(axes, labels)
    axes.set_title("What a block adds beside what enters it")


def _costs(axes: Axes, rows: Sequence[Row], what: str) -> None:
    for policy, color in POLICIES.items():
        points = sorted((row for row in rows if row["policy"] == policy), key=lambda row: row["density"])
        _cost_line(axes, points, policy, color)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(_cost_label))
    axes.yaxis.set_minor_locator(NullLocator())
    if what == "neurons":
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(_share_label))
    axes.set_xlabel(f"share of the {what} computed")
    axes.set_ylabel("perplexity increase")
    axes.legend(loc="best")
    axes.set_title(f"What leaving out {what} costs (bars: 95%)")


def _cost_line(axes: Axes, rows: Sequence[Row], policy: str, color: str) -> None:
    x = [row["density"] for row in rows]
    y = [max(row["ppl_increase"], NOTHING_LOST) for row in rows]
    style = "--" if policy == "two-pass" else "-"
    axes.plot(x, y, style, color=color, label=policy)
    for row, x_i, y_i in zip(rows, x, y, strict=True):
        if row["low"] is not None:
            axes.vlines(x_i, max(row["low"], NOTHING_LOST), max(row["high"], NOTHING_LOST), color=color)
        face = color if row["ppl_increase"] > NOTHING_LOST else "white"
        axes.plot(x_i, y_i, "o", color=color, markerfacecolor=face)


def _blocks(axes: Axes, rows: Sequence[Row]) -> None:
    ways = (
        ("heads", "skip", "attention skipped", ORANGE),
        ("mlp", "skip", "MLP skipped", BLUE),
        ("mlp", "parallel", "MLP beside attention, not after it", GREEN),
    )
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    for i, (kind, policy, label, color) in enumerate(ways):
        chosen = [row for row in rows if (row["kind"], row["policy"]) == (kind, policy)]
        at = [layers.index(row["layer"]) + 0.27 * (i - 1) for row in chosen]
        cost = [max(row["ppl_increase"], NOTHING_LOST) for row in chosen]
        axes.bar(at, cost, width=0.25, color=color, label=label)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(_cost_label))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xticks(range(len(layers)), ["all" if layer is None else str(layer) for layer in layers])
    axes.grid(axis="x", visible=False)
    axes.set_xlabel("layer")
    axes.set_ylabel("perplexity increase")
    axes.legend(loc="upper right", ncols=len(ways))
    axes.set_title("What skipping one whole block costs")


def _by_layer(
    axes: Axes, layers: Sequence[Row], values: Sequence[float | None], label: str, color: str, style: str
) -> tuple[str, float | None, str]:
    """Draws what layers have a value for; returns what `_label_ends` needs."""
    known = [(row["layer"], value) for row, value in zip(layers, values, strict=True) if value is not None]
    axes.plot([x for x, _ in known], [y for _, y in known], style, color=color)
    return label, known[-1][1] if known else None, color


def _layer_axis(axes: Axes, layers: Sequence[Row]) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlim(-0.2, len(layers) - 0.8)
    axes.set_xlabel("layer")


def _share_axis(axes: Axes, label: str, *, bottom: float | None = None, top: float | None = None) -> None:
    axes.set_ylim(bottom, top)
    axes.yaxis.set_major_formatter(FuncFormatter(_share_label))
    axes.set_ylabel(label)


def _share_label(share: float, _: int) -> str:
    return f"{100 * share:.3g}%"


def _cost_label(increase: float, _: int) -> str:
    if increase == NOTHING_LOST:
        return f"≤ {increase:.2%}"
    return f"{increase:,.0%}" if increase >= 1 else f"{100 * increase:.3g}%"


def _label_ends(axes: Axes, labels: Sequence[tuple[str, float | None, str]]) -> None:
    """Names lines at their right ends, ``(label, y, color)`` each, moved apart where they would overlap."""
    to_axes = axes.transData + axes.transAxes.inverted()
    ends = [(float(to_axes.transform((1, y))[1]), text, color) for text, y, color in labels if y is not None]
    ceiling = 1.1
    for place, text, color in sorted(ends, reverse=True):
        half = 0.03 * (1 + text.count("\n"))
        place = min(place, ceiling - half)
        ceiling = place - half
        axes.text(1.015, place, text, transform=axes.transAxes, color=color, va="center", linespacing=1.0)
