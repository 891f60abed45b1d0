"""Scores and truths of some tokens of a dense run: what thresholds are taken from.

Shape legend: m sampled tokens, u neurons or heads of a layer (of all ranks).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dejavu.parallel.collectives import all_gather_last
from dejavu.predictors.meter import Metered
from dejavu.predictors.selection import Choice, Kind, Policy, Truth
from dejavu.runtime.engine import Engine

UnitKey = tuple[Kind, int]


@dataclass(frozen=True, slots=True)
class Samples:
    """Of one layer and kind: ``scores``, ``refined`` scores and ``contributions``, each ``[m, u]``."""

    scores: Tensor
    refined: Tensor | None
    contributions: Tensor

    def at_densities(self, densities: Sequence[float]) -> list[float]:
        """The thresholds above which lie these shares of the scores; above that of 1 all that may come."""
        falling = self.scores.flatten().sort(descending=True).values
        nothing = float(falling[0] + 0.001 * (falling[0] - falling[-1]))
        counts = [int(density * len(falling)) for density in densities]
        return [_below(falling, count - 1) if count else nothing for count in counts]

    def at_recall(self, recall: float, *, refined: bool = False) -> float:
        """The threshold above which lies this share of the live neurons (heads: of the contribution)."""
        scores = self.refined if refined else self.scores
        assert scores is not None
        order = scores.flatten().sort(descending=True)
        some_are_zero = bool((self.contributions == 0).any())  # neurons; heads never are
        worth = (self.contributions > 0 if some_are_zero else self.contributions).double()
        carried = worth.flatten()[order.indices].cumsum(0)
        last = int((carried < carried[-1] * recall).sum())
        return _below(order.values, min(last, len(order.values) - 1))


def _below(falling: Tensor, i: int) -> float:
    """A threshold that lets entry ``i`` and its equals through: half way to the next smaller one, for a score
    at the threshold would fall on either side by rounding; below the smallest, well below it."""
    value = falling[i]
    smaller = int((falling >= value).sum())
    if smaller == len(falling):
        return float(value - 2 * (falling[0] - value) - 1)
    return float((value + falling[smaller]) / 2)


class ScoreKeeper(Policy):
    """Looks on a dense pass and keeps the scores of all units, with the truth."""

    def __init__(self, policy: Policy, engine: Engine) -> None:
        super().__init__(list(policy.units.values()), policy.num_layers, sharing="mask", dense_until=1)
        self._engine = engine
        self._kept: dict[UnitKey, list[tuple[Tensor, ...]]] = {}
        self._meter = Metered(policy, engine.model)

    def heads(self, layer: int, truth: Truth) -> Choice:
        return self._look("heads", layer, truth)

    def neurons(self, layer: int, truth: Truth) -> Choice:
        return self._look("mlp", layer, truth)

    def samples(self) -> dict[UnitKey, Samples]:
        """What was seen."""
        result = {}
        for key, parts in self._kept.items():
            scores, refined, contributions = (torch.cat(column) for column in zip(*parts, strict=True))
            has_refined = self.units[key].refine is not None
            result[key] = Samples(scores, refined if has_refined else None, contributions)
        return result

    def _look(self, kind: Kind, layer: int, truth: Truth) -> Choice:
        unit = self.units.get((kind, layer))
        if unit is None:
            return None
        scores = self.scores(unit, truth)
        refined = scores if unit.refine is None else self.scores(unit.refine, truth)
        columns = (scores, refined, self._meter.truths[kind, layer](truth()))
        tp = self._engine.tp
        kept = tuple(all_gather_last(c.float(), tp)[:, self.dense_until :].flatten(0, 1) for c in columns)
        self._kept.setdefault((kind, layer), []).append(kept)
        return None
