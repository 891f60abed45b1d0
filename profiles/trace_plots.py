"""A decode step as a picture: streams as lanes, kernels coloured by what they are for."""

import re
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from dejavu.profiles.plots import BLUE, GREEN, GREY, ORANGE, RED, STYLE, save_figure
from dejavu.profiles.trace import Span, Step
from dejavu.profiles.trace_report import lanes

_COLORS = {"attention": BLUE, "mlp": "#7fb3d5", "collective": RED, "predict": GREEN, "select": ORANGE,
           "other": GREY}  # fmt: skip


def timeline_page(step: Step, path: Path, *, title: str, unit: str = "stream") -> None:
    """Above the whole step, below two of its layers."""
    zoom = _two_layers(step)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(16, 7 if zoom else 4), layout="constrained")
        figure.suptitle(title, fontsize=14, fontweight="bold")
        panels = figure.subplots(2 if zoom else 1, 1, squeeze=False)[:, 0]
        _lanes(panels[0], step.spans, step.start, (step.start, step.end), unit)
        panels[0].set_title("one decode step")
        if zoom:
            _lanes(panels[1], step.spans, step.start, zoom, unit)
            panels[1].set_title("two of its layers")
        panels[-1].set_xlabel("microseconds")
        shown = set(map(_kind, step.spans))
        handles = [Patch(color=color, label=name) for name, color in _COLORS.items() if name in shown]
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
        save_figure(figure, path)


def _lanes(axes: Axes, spans: Sequence[Span], origin: float, window: tuple[float, float], unit: str) -> None:
    seen = [s for s in spans if s.end > window[0] and s.start < window[1]]
    order = lanes(seen)
    for place, lane in enumerate(order):
        here = [s for s in seen if s.lane == lane]
        # of nested host ranges the inner ones lie on top
        for span in sorted(here, key=lambda s: len(s.path)):
            axes.broken_barh(
                [(span.start - origin, span.end - span.start)],
                (place - 0.4, 0.8),
                facecolors=_COLORS[_kind(span)],
                edgecolors="white",
                linewidth=0.3,
            )
    names = [lane if isinstance(lane, str) else f"{unit} {i}" for i, lane in enumerate(order)]
    axes.set_yticks(range(len(order)), names)
    axes.set_ylim(len(order) - 0.5, -0.5)
    axes.set_xlim(window[0] - origin, window[1] - origin)
    axes.grid(axis="y", visible=False)


def _kind(span: Span) -> str:
    if span.category in _COLORS:
        return span.category
    for name in reversed(span.path):
        for kind in ("attention", "mlp"):
            if name.endswith(f"/{kind}"):
                return kind
    return "other"


def _two_layers(step: Step) -> tuple[float, float] | None:
    """From the beginning of a layer in the middle to the end of the next."""
    outer = {s.path[0] for s in step.spans if s.path}
    numbers = sorted(int(m[1]) for name in outer if (m := re.fullmatch(r"layer\.(\d+)", name)))
    if len(numbers) < 4:
        return None
    first = numbers[len(numbers) // 2]
    names = {f"layer.{first}", f"layer.{first + 1}"}
    inside = [s for s in step.spans if s.path and s.path[0] in names]
    return min(s.start for s in inside), max(s.end for s in inside)
