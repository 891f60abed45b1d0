"""Thresholds for predictors: how many neurons and heads each layer gets, and where it is not worth it.

Every layer and kind is tried alone at a ladder of thresholds, which gives its cost (the divergence of the
model's output from dense) and its price (bytes, or density) at each rung. Costs of layers nearly add up, so
the rungs that together cost least for a price are those that a Lagrange multiplier picks one by one. Along
the multiplier lies a path from sparse to dense; where on it to stop is found by measuring the whole.

Shape legend: n windows, S tokens of a window.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from torch import Tensor

from dejavu.predictors.corpus import Corpus
from dejavu.predictors.files import Key, Manifest, OperatingPoint, read_manifest, write_manifest
from dejavu.predictors.meter import Account, Metered, dense_bytes, sparse_bytes
from dejavu.predictors.samples import Samples, ScoreKeeper, UnitKey
from dejavu.predictors.selection import EVERYTHING, KINDS, Kind, Policy, Unit
from dejavu.profiles.quality import masked, whole_pass
from dejavu.runtime.engine import Engine
from dejavu.runtime.sparsity import build_policy, check_model, identity

OnProgress = Callable[[str, int, int], None]

# The rungs of the ladder, as densities.
_RUNGS: Mapping[Kind, tuple[float, ...]] = {
    "mlp": (0, 0.003, 0.006, 0.01, 0.02, 0.03, 0.04, 0.055, 0.075, 0.1, 0.13, 0.17, 0.22, 0.3, 0.4, 0.6, 1),
    "heads": (0.125, 0.25, 0.375, 0.5, 0.6, 0.7, 0.78, 0.85, 0.9, 0.95, 1),
}
# Second stages are tried at thresholds that keep these shares of the contribution.
_REFINE_RECALLS = (0.97, 0.99, 0.997)
_RECALLS = (0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998)
# Tokens whose scores are sampled, at most this many numbers in all.
_SAMPLES = 2**28
# Points beside the default, as multiples of its divergence from dense.
_BESIDE = (0.1, 0.25, 0.5, 2.0, 4.0, 8.0)
_PROBES = 12


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """What to calibrate to: one of a quality budget, a recall, or mean densities.

    Raises:
        ValueError: none or several, or one out of reason.
    """

    max_ppl_increase: float | None = None
    recall: float | None = None
    mlp_density: float | None = None
    head_density: float | None = None

    def __post_init__(self) -> None:
        by_density = self.mlp_density is not None or self.head_density is not None
        if sum((self.max_ppl_increase is not None, self.recall is not None, by_density)) != 1:
            raise ValueError(
                "calibrate to one of --max-ppl-increase, --recall, and --mlp-density with --head-density"
            )
        if self.max_ppl_increase is not None and not 0 < self.max_ppl_increase <= 1:
            raise ValueError(f"max_ppl_increase={self.max_ppl_increase} is not in (0, 1]")
        for name in ("recall", "mlp_density", "head_density"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"{name}={value} is not in (0, 1]")

    def __str__(self) -> str:
        named = {name: getattr(self, name) for name in self.__slots__}
        return ", ".join(f"{name} {value:g}" for name, value in named.items() if value is not None)


@dataclass(frozen=True, slots=True)
class Rung:
    """A layer's setting: thresholds of its one or two stages (None: dense), what it costs, what it takes."""

    thresholds: tuple[float, float | None] | None
    kl: float
    price: float
    density: float


def calibrate(
    engine: Engine,
    corpus: Corpus,
    directory: Path,
    target: Target,
    *,
    search_tokens: int = 8192,
    command: str = "",
    on_progress: OnProgress | None = None,
) -> Manifest:
    """Finds the thresholds, measures the points, and writes them into the directory's manifest.

    Args:
        corpus: text that the predictors were not trained on.
        search_tokens: how many tokens of it each rung is tried on; points are measured on all of it.
        command: what to note in the manifest.

    Raises:
        ValueError: predictors of another model or trained on this text; a target out of reach.
    """
    if search_tokens < 1:
        raise ValueError(f"search_tokens={search_tokens} is less than 1")
    manifest = engine.tp.agree(lambda: _read(engine, corpus, directory, target))
    policy = engine.tp.agree(lambda: _everything(engine, directory, manifest))
    search = Calibration(engine, corpus.windows, manifest, policy, search_tokens, on_progress)
    points, default = search.points(target)
    held_out = search.held_out(points[default])
    entries = [
        entry.model_copy(update={"held_out": held_out.get((entry.kind, entry.layer))})
        for entry in manifest.entries
    ]
    others = [source for source in manifest.sources if source.use != "calibrate"]
    manifest = manifest.model_copy(
        update={
            "entries": entries,
            "sources": [*others, corpus.source("calibrate")],
            "commands": [*manifest.commands, *filter(None, [command])],
            "target": str(target),
            "points": points,
            "default": default,
        }
    )
    engine.tp.agree(lambda: write_manifest(directory, manifest) if engine.tp.rank == 0 else None)
    return manifest


def _read(engine: Engine, corpus: Corpus, directory: Path, target: Target) -> Manifest:
    manifest = read_manifest(directory)
    check_model(manifest, engine.model, engine.fingerprint, directory)
    corpus.check_unused([s for s in manifest.sources if s.use == "train"], str(directory))
    wanted: dict[Kind, float | None] = {"mlp": target.mlp_density, "heads": target.head_density}
    for kind, density in wanted.items():
        if density is not None and all(entry.dense for entry in manifest.of(kind)):
            raise ValueError(f"{directory} has no predictors of {kind} that a density could be given to")
    return manifest


def _everything(engine: Engine, directory: Path, manifest: Manifest) -> Policy:
    """The policy with all its units, whatever their thresholds."""
    zeros: list[float | None] = [0.0] * manifest.model.num_layers
    point = OperatingPoint(
        thresholds={"mlp": zeros, "heads": zeros, "refine": zeros},
        mlp_density=1,
        head_density=1,
        ppl_increase=0,
        kl=0,
    )
    return build_policy(directory, manifest, point, engine.model, sharing="mask", dense_until=1)


class Calibration:
    """The ladders of all layers, and measurements of whole settings."""

    def __init__(
        self,
        engine: Engine,
        windows: Tensor,
        manifest: Manifest,
        policy: Policy,
        search_tokens: int,
        on_progress: OnProgress | None,
    ) -> None:
        self.engine, self.windows, self.policy = engine, windows, policy
        self.model = identity(engine.model.config, engine.fingerprint)
        self.entries = {(e.kind, e.layer): e for e in manifest.entries if not e.dense}
        self.on_progress = on_progress
        window = windows.shape[1] - 1
        self.search = windows[: max(1, min(len(windows), search_tokens // window))]
        self.samples = self._sample()

    def points(self, target: Target) -> tuple[list[OperatingPoint], int]:
        """The calibrated points, the least dense first, and which of them is the target's."""
        if target.recall is not None:
            recalls = sorted({*_RECALLS, target.recall})
            measured = [self.measure(self._at_recall(recall)) for recall in recalls]
            return measured, recalls.index(target.recall)
        if target.max_ppl_increase is not None:
            budget = target.max_ppl_increase
            path = _path(self._ladders(by_bytes=True))
            position, _ = self._stop(path, lambda point: point.ppl_increase <= budget, KINDS)
            positions = {kind: (path, position) for kind in KINDS}
        else:
            ladders = self._ladders(by_bytes=False)
            wanted: dict[Kind, float | None] = {
                "mlp": target.mlp_density,
                "heads": target.head_density,
            }
            positions = {}
            for kind, density in wanted.items():
                if density is None:  # not asked for: dense
                    continue
                path = _path({key: rungs for key, rungs in ladders.items() if key[0] == kind})
                position, reached = self._stop(path, _denser(kind, density), (kind,))
                got = reached.mlp_density if kind == "mlp" else reached.head_density
                if not density * 0.9 <= got <= density * 1.1:
                    most = "least" if got > density else "most"
                    raise ValueError(
                        f"a mean density of {density:g} of {kind} is out of reach: {got:.4f} is {most}"
                    )
                positions[kind] = (path, position)
        default = self.measure(self._setting(positions))
        beside = [self.measure(self._setting(_moved(positions, factor))) for factor in _BESIDE]
        points = sorted([default, *beside], key=lambda p: (p.mlp_density, p.head_density))
        return points, points.index(default)

    def measure(self, thresholds: Mapping[UnitKey, tuple[float, float | None]]) -> OperatingPoint:
        """A setting on all of the text; a layer without thresholds is dense."""
        policy = Policy(self._units(thresholds), self.model.num_layers, sharing="mask", dense_until=1)
        scores, dense = masked(self.engine, self.windows, [policy, EVERYTHING])
        L = self.model.num_layers
        values: dict[Key, list[float | None]] = {
            kind: [_first(thresholds.get((kind, layer))) for layer in range(L)] for kind in KINDS
        }
        values["refine"] = [_second(thresholds.get(("mlp", layer))) for layer in range(L)]
        return OperatingPoint(
            thresholds=values,
            mlp_density=self.engine.mean_density(policy, "mlp"),
            head_density=self.engine.mean_density(policy, "heads"),
            ppl_increase=scores.increase(dense)[0],
            kl=float(scores.kl.mean()),
        )

    def held_out(self, point: OperatingPoint) -> dict[UnitKey, dict[str, float]]:
        """Recall, precision and density of every sparse layer at a point."""
        thresholds = {
            (kind, layer): (value, point.thresholds["refine"][layer] if kind == "mlp" else None)
            for kind in KINDS
            for layer, value in enumerate(point.thresholds[kind])
            if value is not None
        }
        meter = Metered(self.policy, self.engine.model, self._units(thresholds))
        masked(self.engine, self.windows, [meter])
        return {
            key: {name: getattr(account, name) for name in Account.__slots__}
            for key, account in meter.accounts(self.engine.tp).items()
        }

    def _units(self, thresholds: Mapping[UnitKey, tuple[float, float | None]]) -> list[Unit]:
        units = []
        for key, (first, second) in thresholds.items():
            unit = self.policy.units[key]
            refine = unit.refine
            if refine is not None:
                assert second is not None
                refine = replace(refine, threshold=second)
            units.append(replace(unit, threshold=first, refine=refine))
        return units

    def _sample(self) -> dict[UnitKey, "Samples"]:
        """Scores and truths of some tokens of the dense run, of every layer."""
        keeper = ScoreKeeper(self.policy, self.engine)
        per_token = sum(self.model.size(kind) * 4 for kind, _ in self.policy.units)
        tokens = max(64, _SAMPLES // max(per_token, 1))
        n = max(1, min(len(self.search), tokens // self.search.shape[1]))
        for window in self.search[:n].split(8):
            whole_pass(self.engine, window[:, :-1].to(self.engine.tp.device), keeper)
        return keeper.samples()

    def _ladders(self, *, by_bytes: bool) -> dict[UnitKey, list[Rung]]:
        """Every layer alone at every rung, and dense."""
        tried = [(key, thresholds) for key in self.entries for thresholds in self._rungs(key)]
        meters = [
            Metered(self.policy, self.engine.model, self._units({key: thresholds}))
            for key, thresholds in tried
        ]
        total = len(self.search)

        def progress(done: int, _: int) -> None:
            if self.on_progress is not None:
                self.on_progress("trying every layer alone", done, total)

        scores = masked(self.engine, self.search, meters, on_progress=progress)
        ladders: dict[UnitKey, list[Rung]] = {}
        for (key, thresholds), meter, score in zip(tried, meters, scores, strict=True):
            account = meter.accounts(self.engine.tp)[key]
            price = account.density
            if by_bytes:
                price = sparse_bytes(self.entries[key], account, self.model)
            rung = Rung(thresholds, float(score.kl.mean()), price, account.density)
            ladders.setdefault(key, []).append(rung)
        for key, rungs in ladders.items():
            if by_bytes:  # where the predictor costs more than it saves
                rungs.append(Rung(None, 0.0, dense_bytes(key[0], self.model), 1.0))
        return ladders

    def _rungs(self, key: UnitKey) -> list[tuple[float, float | None]]:
        samples, entry = self.samples[key], self.entries[key]
        firsts = samples.at_densities(_RUNGS[entry.kind])
        if entry.refine is None:
            return [(first, None) for first in dict.fromkeys(firsts)]
        seconds = [samples.at_recall(recall, refined=True) for recall in _REFINE_RECALLS]
        return [(first, second) for first in dict.fromkeys(firsts) for second in seconds]

    def _at_recall(self, recall: float) -> dict[UnitKey, tuple[float, float | None]]:
        return {
            key: (
                self.samples[key].at_recall(recall),
                None if entry.refine is None else self.samples[key].at_recall(recall, refined=True),
            )
            for key, entry in self.entries.items()
        }

    def _stop(
        self,
        path: Sequence[Mapping[UnitKey, Rung]],
        dense_enough: Callable[[OperatingPoint], bool],
        kinds: Sequence[Kind],
    ) -> tuple[float, OperatingPoint]:
        """The least dense position on the path that is dense enough, by bisection; and what it measured."""
        low, high = 0.0, float(len(path) - 1)
        reached = None
        for probe in range(_PROBES):
            if self.on_progress is not None:
                self.on_progress("measuring the whole", probe, _PROBES)
            middle = (low + high) / 2
            point = self.measure(self._setting({kind: (path, middle) for kind in kinds}))
            if dense_enough(point):
                high, reached = middle, point
            else:
                low = middle
        if reached is None:
            reached = self.measure(self._setting({kind: (path, high) for kind in kinds}))
        return high, reached

    def _setting(
        self, positions: Mapping[Kind, tuple[Sequence[Mapping[UnitKey, Rung]], float]]
    ) -> dict[UnitKey, tuple[float, float | None]]:
        """The thresholds at a position between two of the path's settings; dense in one is dense."""
        setting = {}
        for kind, (path, position) in positions.items():
            index = min(int(position), len(path) - 1)
            a, b = path[index], path[min(index + 1, len(path) - 1)]
            for key in a:
                x, y = a[key].thresholds, b[key].thresholds
                if key[0] != kind or x is None or y is None:
                    continue
                t = position - index
                second = None if x[1] is None or y[1] is None else x[1] + t * (y[1] - x[1])
                setting[key] = (x[0] + t * (y[0] - x[0]), second)
        return setting


def _path(ladders: Mapping[UnitKey, list[Rung]]) -> list[dict[UnitKey, Rung]]:
    """What each multiplier picks, from the least dense setting to all dense."""
    slopes = sorted(
        {
            (a.kl - b.kl) / (b.price - a.price)
            for rungs in ladders.values()
            for a in rungs
            for b in rungs
            if b.price > a.price and a.kl > b.kl
        },
        reverse=True,
    )
    path: list[dict[UnitKey, Rung]] = []
    # between neighbouring slopes nothing changes: one multiplier for each gap
    gaps = [(a * b) ** 0.5 for a, b in pairwise(slopes)]
    for multiplier in [slopes[0] * 2, *gaps, slopes[-1] / 2] if slopes else [0.0]:
        picked = {
            key: min(rungs, key=lambda r: (r.kl + multiplier * r.price, -r.density))
            for key, rungs in ladders.items()
        }
        if not path or picked != path[-1]:
            path.append(picked)
    everything_dense = {key: rungs[-1] for key, rungs in ladders.items()}
    if path[-1] != everything_dense:
        path.append(everything_dense)
    return path


def _moved(
    positions: Mapping[Kind, tuple[Sequence[Mapping[UnitKey, Rung]], float]], factor: float
) -> dict[Kind, tuple[Sequence[Mapping[UnitKey, Rung]], float]]:
    """The positions where the path's expected divergence is ``factor`` times what it is here."""

    def expected(path: Sequence[Mapping[UnitKey, Rung]], kind: Kind, position: int) -> float:
        return sum(rung.kl for key, rung in path[position].items() if key[0] == kind)

    moved = {}
    for kind, (path, position) in positions.items():
        here = expected(path, kind, min(round(position), len(path) - 1))
        if here == 0:  # dense stays dense
            moved[kind] = (path, position)
            continue
        nearest = min(
            range(len(path) - 1), key=lambda i: abs(expected(path, kind, i) - factor * here), default=0
        )
        moved[kind] = (path, float(nearest))
    return moved


def _denser(kind: Kind, density: float) -> Callable[[OperatingPoint], bool]:
    """Whether a point is at least so dense (within a hundredth)."""
    return lambda p: (p.mlp_density if kind == "mlp" else p.head_density) >= density * 0.99


def _first(thresholds: tuple[float, float | None] | None) -> float | None:
    return None if thresholds is None else thresholds[0]


def _second(thresholds: tuple[float, float | None] | None) -> float | None:
    return None if thresholds is None else thresholds[1]
