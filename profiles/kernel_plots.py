"""Pictures of what kernels take, beside the time that reading their bytes takes."""

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from dejavu.profiles.plots import BLUE, GREEN, GREY, ORANGE, RED, STYLE, Row, save_figure

_COLORS = {"bf16": BLUE, "fp16": BLUE, "fp8": ORANGE, "int8": GREEN}


def kernel_page(rows: Sequence[Row], path: Path, *, title: str) -> None:
    """A panel for each shape: microseconds over density (a predictor's: over rank), with the ideal line."""
    panels = [(key, list(of)) for key, of in groupby(rows, key=lambda row: (row["shape"], row["tp"]))]
    columns = min(len(panels), 3)
    lines = -(-len(panels) // columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.4 * columns, 4.6 * lines + 0.6), layout="constrained")
        figure.suptitle(title, fontsize=15, fontweight="bold")
        for i, ((shape, tp), of) in enumerate(panels):
            axes = figure.add_subplot(lines, columns, i + 1)
            batch = of[0]["batch"]
            of_ranks = f", one of {tp} ranks" if tp > 1 else ""
            axes.set_title(shape + of_ranks + (f", {batch} sequences" if batch > 1 else ""))
            _panel(axes, of, "rank" if "rank" in of[0] else "density")
        save_figure(figure, path)


def _panel(axes: Axes, rows: Sequence[Row], over: str) -> None:
    ours = [row for row in rows if row["engine"] == "dejavu"]
    for (weights, live), of in groupby(ours, key=lambda row: (row["weights"], row.get("live"))):
        line = sorted(of, key=lambda row: float(row[over]))
        x = [row[over] for row in line]
        part = live is not None and live < 1
        label = weights + (", one in three live" if part else "")
        axes.plot(
            x, [row["us_p50"] for row in line], "o:" if part else "o-", color=_COLORS[weights], label=label
        )
        if not part:
            ideal = [row["floor_us"] for row in line]
            axes.plot(x, ideal, "--", color=_COLORS[weights], alpha=0.6, label=f"{weights}: reading alone")
    for engine, color in (("cublas", RED), ("cublas, no selection", RED), ("dejavu dense", GREY)):
        _others(axes, [row for row in rows if row["engine"] == engine], over, color, engine)
    axes.set_xscale("log")
    axes.set_yscale("log")
    ticks = sorted({float(row[over]) for row in ours})
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}" if over == "rank" else f"{x:.2g}"))
    axes.tick_params(axis="x", labelsize=9)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.yaxis.set_minor_formatter(FuncFormatter(lambda y, _: f"{y:g}" if f"{y:g}"[0] in "25" else ""))
    axes.set_xlabel({"rank": "rank of the predictor", "density": "density"}[over])
    axes.set_ylabel("microseconds")
    axes.legend(loc="best", fontsize=8.5)


def _others(axes: Axes, rows: Sequence[Row], over: str, color: str, label: str) -> None:
    """What is compared with: a line over ranks, a level over densities."""
    if over == "rank" and rows:
        axes.plot(
            [row[over] for row in rows], [row["us_p50"] for row in rows], "s-", color=color, label=label
        )
        return
    for weights, of in groupby(rows, key=lambda row: row["weights"]):
        axes.axhline(next(of)["us_p50"], color=color, linewidth=1.2, label=f"{label}, {weights}")
