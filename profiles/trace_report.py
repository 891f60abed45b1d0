"""Where the time of decode steps went: by range and kernel, in collectives and predictors, in nothing."""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from dejavu.profiles.trace import PREDICTION, Process, Span, Step

Row = dict[str, Any]
Intervals = list[tuple[float, float]]
_TOP = 12


def report(process: Process, steps: Sequence[Step]) -> Row:
    """Figures of one rank, in microseconds and shares of a step.

    Predictors: ``hidden`` is what runs while a kernel that is no predictor's does, under a collective, under
    attention (its projections, too) or under something else; ``exposed`` what runs alone. Their time is that
    of the GPU being busy with them: two at once count once.

    Raises:
        ValueError: there is no decode step.
    """
    if not steps:
        raise ValueError(
            f"{process.label} has no decode step to report on: profile a command that decodes, "
            "and keep the graph-*.json files beside the report"
        )
    times = [step.end - step.start for step in steps]
    gpu = bool(process.kernels)
    row: Row = {
        "rank": process.label,
        "device": process.device or "CPU",
        "steps": len(steps),
        "step_us": _times(times),
        "ranges": _ranges(steps),
    }
    collective = [_measure(_union(_of(step, "collective"))) for step in steps]
    row["collective_us"] = float(np.mean(collective))
    if gpu:
        layers = {name for span in steps[0].spans for name in span.path if re.fullmatch(r"layer\.\d+", name)}
        in_layers = sum(1 for span in steps[0].spans if any(name.startswith("layer.") for name in span.path))
        row["kernels_per_step"] = float(np.mean([len(step.spans) for step in steps]))
        row["kernels_per_layer"] = in_layers / len(layers) if layers else None
        row["kernels"] = _kernels(steps)
        row["predictors"] = _predictors(steps)
        row["idle"] = _idle(steps)
    return row


def _times(values: Sequence[float]) -> Row:
    return {
        "mean": float(np.mean(values)),
        "p50": float(np.median(values)),
        "p99": float(np.percentile(values, 99)),
    }


def _ranges(steps: Sequence[Step]) -> list[Row]:
    """Every range, with layers taken together: how often a step has it, what one takes, its share."""
    found: dict[str, list[float]] = defaultdict(list)
    category: dict[str, str] = {}
    for step in steps:
        parts: dict[tuple[str, ...], Intervals] = defaultdict(list)
        for span in step.spans:
            for depth in range(1, len(span.path) + 1):
                parts[span.path[:depth]].append((span.start, span.end))
            if span.path:
                category[_general(span.path[-1])] = span.category
        for path, intervals in parts.items():
            found[_general(path[-1])].append(_measure(_union(intervals)))
    total = sum(step.end - step.start for step in steps)
    rows: list[Row] = [
        {
            "range": name,
            "category": category.get(name, "compute"),
            "per_step": len(values) / len(steps),
            "us_p50": float(np.median(values)),
            "us_p99": float(np.percentile(values, 99)),
            "share": sum(values) / total,
        }
        for name, values in found.items()
    ]
    return sorted(rows, key=lambda row: -row["share"])


def _general(name: str) -> str:
    return re.sub(r"\d+", "*", name)


def _kernels(steps: Sequence[Step]) -> list[Row]:
    """Those that take most."""
    found: dict[str, list[float]] = defaultdict(list)
    for step in steps:
        for span in step.spans:
            found[span.label].append(span.end - span.start)
    total = sum(step.end - step.start for step in steps)
    rows: list[Row] = [
        {
            "kernel": name,
            "per_step": len(values) / len(steps),
            "us_p50": float(np.median(values)),
            "share": sum(values) / total,
        }
        for name, values in found.items()
    ]
    return sorted(rows, key=lambda row: -row["share"])[:_TOP]


def _predictors(steps: Sequence[Step]) -> Row | None:
    """Microseconds a step."""
    sums: dict[str, float] = defaultdict(float)
    for step in steps:
        predict = _union(_of(step, *PREDICTION))
        rest = [span for span in step.spans if span.category not in PREDICTION]
        collective = _union((s.start, s.end) for s in rest if s.category == "collective")
        attention = _union((s.start, s.end) for s in rest if any("/attention" in name for name in s.path))
        anything = _union((s.start, s.end) for s in rest)
        sums["us"] += _measure(predict)
        under = _overlap(predict, collective)
        sums["under_collective"] += _measure(under)
        beside = _overlap(_without(predict, collective), attention)
        sums["under_attention"] += _measure(beside)
        sums["exposed"] += _measure(_without(predict, anything))
    if not sums["us"]:
        return None
    row = {name: value / len(steps) for name, value in sums.items()}
    row["under_other"] = row["us"] - row["under_collective"] - row["under_attention"] - row["exposed"]
    row["hidden_share"] = 1 - row["exposed"] / row["us"]
    return row


def _idle(steps: Sequence[Step]) -> Row:
    """When the GPU does nothing: within steps, and from one to the next."""
    gaps = [
        _without([(step.start, step.end)], _union((s.start, s.end) for s in step.spans)) for step in steps
    ]
    within = [_measure(gap) for gap in gaps]
    longest = max((end - start for gap in gaps for start, end in gap), default=0.0)
    between = [max(b.start - a.end, 0.0) for a, b in pairwise(steps)]
    return {
        "us": float(np.mean(within)),
        "share": sum(within) / sum(step.end - step.start for step in steps),
        "longest_us": longest,
        "between_steps_us": float(np.median(between)) if between else None,
    }


def _of(step: Step, *categories: str) -> Intervals:
    return [(span.start, span.end) for span in step.spans if span.category in categories]


def middle_step(steps: Sequence[Step]) -> Step:
    """A step of median length."""
    return sorted(steps, key=lambda step: step.end - step.start)[len(steps) // 2]


def lanes(spans: Sequence[Span]) -> list[int | str]:
    """The streams, the busiest first."""
    busy: dict[int | str, float] = defaultdict(float)
    for span in spans:
        busy[span.lane] += span.end - span.start
    return sorted(busy, key=lambda lane: -busy[lane])


def _union(intervals: Iterable[tuple[float, float]]) -> Intervals:
    """Sorted and without overlaps."""
    found: Intervals = []
    for start, end in sorted(intervals):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], end)
        else:
            found.append((start, end))
    return found


def _measure(intervals: Intervals) -> float:
    return sum(end - start for start, end in intervals)


def _overlap(a: Intervals, b: Intervals) -> Intervals:
    """Of two unions."""
    found, i, j = [], 0, 0
    while i < len(a) and j < len(b):
        start, end = max(a[i][0], b[j][0]), min(a[i][1], b[j][1])
        if start < end:
            found.append((start, end))
        i, j = (i + 1, j) if a[i][1] < b[j][1] else (i, j + 1)
    return found


def _without(a: Intervals, b: Intervals) -> Intervals:
    """What of the union ``a`` is not in ``b``."""
    found = []
    for start, end in a:
        for low, high in b:
            if high <= start or low >= end:
                continue
            if low > start:
                found.append((start, low))
            start = max(start, high)
        if start < end:
            found.append((start, end))
    return found
