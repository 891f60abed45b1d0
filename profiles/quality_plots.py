"""Pictures of predictors and of what selection costs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from dejavu.predictors.files import Manifest
from dejavu.predictors.selection import KINDS, Kind
from dejavu.profiles.plots import save_figure

PERCENT = FuncFormatter(lambda x, _: f"{x:g}%")
_NAMES: Mapping[Kind, str] = {"mlp": "MLP neurons", "heads": "heads"}


def predictor_page(manifest: Manifest, path: Path) -> None:
    """Recall, precision and density of every layer at the default point, and quality over density."""
    figure = Figure(figsize=(16, 9), layout="constrained")
    axes = figure.subplots(2, 2)
    figure.suptitle(
        f"Predictors: {manifest.method}, lookahead {manifest.lookahead}, calibrated to {manifest.target}"
    )
    for row, kind in enumerate(KINDS):
        _layers(axes[row][0], manifest, kind)
        _points(axes[row][1], manifest, kind)
    save_figure(figure, path)


def quality_page(rows: Sequence[Mapping[str, Any]], path: Path, *, title: str) -> None:
    """The increase of perplexity over density, MLP and heads, with its 95% interval."""
    figure = Figure(figsize=(16, 8), layout="constrained")
    axes = figure.subplots(1, 2)
    figure.suptitle(f"Quality over density: {title}")
    for ax, kind, key in zip(axes, KINDS, ("density_mlp", "density_heads"), strict=True):
        sparse = [row for row in rows if row[key] < 1]
        for marker, prefix in zip("os^D", sorted({row["prefix"] for row in rows}), strict=False):
            shown = [row for row in sparse if row["prefix"] == prefix]
            y = [100 * row["ppl_increase"] for row in shown]
            low, high = ([_reach(row, end) for row in shown] for end in ("low", "high"))
            x = [100 * row[key] for row in shown]
            label = f"after {prefix} dense token{'s' if prefix > 1 else ''}"
            ax.errorbar(x, y, [low, high], fmt=marker, capsize=3, alpha=0.8, label=label)
            for row, at, height in zip(shown, x, y, strict=True):
                ax.annotate(
                    row["policy"], (at, height), xytext=(6, 4), textcoords="offset points", fontsize=8
                )
        ax.set_xlabel(f"{_NAMES[kind]} computed (mean over tokens and layers)")
        ax.set_ylabel("increase of perplexity over dense")
        ax.set_yscale("symlog", linthresh=0.1)
        ax.yaxis.set_major_formatter(PERCENT)
        if kind == "mlp" and sparse:
            ax.set_xscale("log")
            ax.xaxis.set_minor_formatter(PERCENT)
        ax.xaxis.set_major_formatter(PERCENT)
        ax.margins(x=0.15)
        ax.axhline(0, color="black", linewidth=0.8)
        ax.grid(alpha=0.3, which="both")
        if sparse:
            ax.legend()
        else:
            ax.text(0.5, 0.5, f"no policy skips {kind}", ha="center", transform=ax.transAxes)
    save_figure(figure, path)


def _reach(row: Mapping[str, Any], end: str) -> float:
    """How far the interval reaches from the value, in percent; one window has none."""
    bound = row[f"ppl_increase_{end}"]
    return 0.0 if bound is None else 100 * abs(bound - row["ppl_increase"])


def _layers(ax: Axes, manifest: Manifest, kind: Kind) -> None:
    entries = [entry for entry in manifest.of(kind) if entry.held_out]
    layers = [entry.layer for entry in entries]
    for name, color in (
        ("recall", "tab:blue"),
        ("weighted_recall", "tab:cyan"),
        ("precision", "tab:orange"),
        ("density", "tab:green"),
    ):
        values = [100 * (entry.held_out or {})[name] for entry in entries]
        ax.plot(layers, values, "o-", color=color, label=name.replace("_", " "))
    dense = sorted(set(range(manifest.model.num_layers)) - set(layers))
    title = f"{_NAMES[kind]}, held-out text"
    ax.set_title(title + (f" (dense: layers {', '.join(map(str, dense))})" if dense else ""))
    ax.set_xlabel("layer")
    ax.set_ylabel("%")
    ax.set_ylim(0, 102)
    ax.grid(alpha=0.3)
    if entries:
        ax.legend()


def _points(ax: Axes, manifest: Manifest, kind: Kind) -> None:
    densities = [100 * (p.mlp_density if kind == "mlp" else p.head_density) for p in manifest.points]
    increases = [100 * point.ppl_increase for point in manifest.points]
    ax.plot(densities, increases, "o-", color="tab:purple")
    if manifest.default is not None:
        ax.plot(densities[manifest.default], increases[manifest.default], "o", ms=12, mfc="none", mec="black")
    ax.set_title("the calibrated points (ringed: default)")
    ax.set_xlabel(f"{_NAMES[kind]} computed, %")
    ax.set_ylabel("increase of perplexity, %")
    ax.grid(alpha=0.3)
