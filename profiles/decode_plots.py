"""A picture of the waterfall: what a token takes with each part of the product, and with all but one."""

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dejavu.profiles.plots import BLUE, GREY, ORANGE, STYLE, Row, save_figure


def waterfall_page(rows: Sequence[Row], path: Path, *, title: str) -> None:
    """A panel for each run of `dejavu bench decode --waterfall`: milliseconds a token, the floor in each."""

    def run(row: Row) -> tuple[str, int, int, int]:
        return row["shape"], row["tp"], row["batch"], row["prompt_len"]

    panels = [(key, list(of)) for key, of in groupby(rows, key=run)]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 5.6 * len(panels) + 0.6), layout="constrained")
        figure.suptitle(title, fontsize=15, fontweight="bold")
        for i, ((shape, tp, batch, prompt), of) in enumerate(panels):
            axes = figure.add_subplot(len(panels), 1, i + 1)
            where = shape + (f", one of {tp} ranks" if tp > 1 else "")
            axes.set_title(f"{where}, batch {batch}, after {prompt} tokens")
            _bars(axes, of)
        save_figure(figure, path)


def _bars(axes: Axes, rows: Sequence[Row]) -> None:
    """The first line dense, then one part more in each, then all but one."""
    names = [str(row["policy"]) for row in rows]
    gained = [name == "dense" or name.startswith("+") for name in names]
    colors = [
        GREY if name == "dense" else BLUE if gain else ORANGE
        for name, gain in zip(names, gained, strict=True)
    ]
    places = range(len(rows))
    axes.barh(places, [row["ms_mean"] for row in rows], color=colors, height=0.7)
    axes.barh(places, [row["floor_ms"] for row in rows], color="black", alpha=0.25, height=0.7)
    for place, row in zip(places, rows, strict=True):
        axes.annotate(
            f" {row['ms_mean']:.2f} ms, {row['over_first_line']:.2f}x",
            (row["ms_mean"], place),
            va="center",
            fontsize=9,
        )
    axes.set_yticks(places, names, fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.2 * max(row["ms_mean"] for row in rows))
    axes.set_xlabel("milliseconds a token (dark: reading alone)")
