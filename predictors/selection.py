"""What is computed of a layer, and who decides it.

A `Selector` is asked at every block of a step. It sees the residual stream at the taps (``attn_in`` and
``mlp_in`` of each layer) before it is asked, and may look at the truth, that is compute what it selects from,
which only the oracle, the lossless policy and the instruments do.

Shape legend: B batch, S query length, D hidden, N local heads, H head dim, n local neurons or heads.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from dejavu.kernels.predict import compact, standardise
from dejavu.predictors.networks import PackedLowRank
from dejavu.profiles.nvtx import nvtx_range

Kind = Literal["mlp", "heads"]
Point = Literal["attn_in", "mlp_in"]
Truth = Callable[[], Tensor]
KINDS: tuple[Kind, ...] = get_args(Kind)


class Tap(NamedTuple):
    """A point where a predictor reads the residual stream: ``attn_in[l]`` enters layer l's attention block,
    ``mlp_in[l]`` its MLP block."""

    point: Point
    layer: int

    def __str__(self) -> str:
        return f"{self.point}[{self.layer}]"

    @classmethod
    def parse(cls, text: str) -> "Tap":
        """The tap that ``str`` wrote.

        Raises:
            ValueError: it is none.
        """
        match = re.fullmatch(r"(attn_in|mlp_in)\[(\d+)\]", str(text))
        if match is None:
            raise ValueError(f"{text!r} is no tap: expected attn_in[LAYER] or mlp_in[LAYER]")
        return cls(match[1], int(match[2]))  # type: ignore[arg-type]  # the pattern has seen to it

    def shift(self, halves: int) -> "Tap":
        """The tap ``halves`` half layers further on (back, if negative)."""
        at = 2 * self.layer + (self.point == "mlp_in") + halves
        return Tap("mlp_in" if at % 2 else "attn_in", at // 2)


class HeadMean(NamedTuple):
    """What stands in for heads that are not chosen, instead of nothing: their mean outputs ``[N, H]``, and
    the sum over this rank's heads of the means' share of the block's output ``[D]``."""

    output: Tensor
    projected: Tensor


@dataclass(frozen=True, slots=True)
class Chosen:
    """The active set: what the kernels compute of a layer in a decode step.

    Ids in ascending order and how many of them count; entries past the count are undefined. Neurons shared by
    the batch have ``ids int32[F_local]`` and ``count int32[1]``; one set a sequence, as heads always have, is
    ``ids int32[B, n]`` and ``count int32[B]``. Ids are local to the rank.
    """

    ids: Tensor
    count: Tensor
    mean: HeadMean | None = None

    @classmethod
    def from_mask(cls, mask: Tensor, mean: HeadMean | None = None) -> "Chosen":
        """The set of the True entries of ``mask [n]`` or ``[B, n]``."""
        return cls(*compact(mask), mean)


@dataclass(frozen=True, slots=True)
class Masked:
    """A set for every token of a pass over whole texts, ``mask [B, S, n]``: all is computed, and what is not
    chosen is then taken out. The same numbers as token by token; no faster than dense."""

    mask: Tensor
    mean: HeadMean | None = None

    def apply(self, x: Tensor) -> Tensor:
        """``x [B, S, F]`` (neurons) or ``[B, S, N, H]`` (heads), with what is not chosen taken out."""
        mask = self.mask if x.dim() == 3 else self.mask[..., None]
        return torch.where(mask, x, 0.0 if self.mean is None else self.mean.output.to(x.dtype))


Choice = Chosen | Masked | None  # None: everything


class Selector:
    """Chooses everything; the base of all that choose less, or look on."""

    def begin(self, positions: Tensor, alive: Tensor | None) -> None:
        """A pass begins: ``positions [B, S]``; ``alive [B]``, 0 for sequences that choose nothing."""

    def observe(self, tap: Tap, residual: Tensor) -> None:
        """The residual stream ``[B, S, D]`` at ``tap``, the same on every rank."""

    def heads(self, layer: int, truth: Truth) -> Choice:
        """The heads of ``layer``; ``truth()`` is the output ``[B, S, N, H]`` of all of them."""
        return None

    def neurons(self, layer: int, truth: Truth) -> Choice:
        """The neurons of ``layer``'s MLP; ``truth()`` is the activation ``[B, S, F]`` of all of them."""
        return None


EVERYTHING = Selector()


@dataclass(frozen=True, slots=True)
class ActiveSet:
    """What one layer computes in one step; None stands for all of it."""

    neurons: Choice = None
    heads: Choice = None


class Fixed(Selector):
    """Sets that are given: recorded ones, or a test's. One `ActiveSet` a layer."""

    def __init__(self, active: Sequence[ActiveSet]) -> None:
        self.active = active

    def heads(self, layer: int, truth: Truth) -> Choice:
        return self.active[layer].heads

    def neurons(self, layer: int, truth: Truth) -> Choice:
        return self.active[layer].neurons


@dataclass(eq=False, slots=True)
class Unit:
    """What chooses the heads or the neurons of one layer: those whose score is above a threshold.

    A unit with a tap scores ``standardise(residual)`` there; one without scores the truth if ``sees_truth``,
    else the positions alone. A threshold, not a number of ids: how many are chosen varies with the token, and
    no rank needs to know of another.
    """

    kind: Kind
    layer: int
    tap: Tap | None
    scorer: nn.Module
    sees_truth: bool = False
    threshold: float = 0.0
    mean: HeadMean | None = None
    refine: "Unit | None" = None  # chooses again among the chosen
    predict_name: str = field(init=False)
    select_name: str = field(init=False)

    def __post_init__(self) -> None:
        if isinstance(self.scorer, PackedLowRank):
            self.scorer = self.scorer.at(self.threshold)
        block = f"layer.{self.layer}/{'attention' if self.kind == 'heads' else 'mlp'}"
        self.predict_name, self.select_name = f"{block}/predict", f"{block}/select"


Sharing = Literal["union", "each", "mask"]


class Policy(Selector):
    """Chooses by scores and thresholds; layers without a unit are computed in full.

    Args:
        units: at most one for each kind and layer.
        num_layers: of the whole model.
        name: for reports.
        sharing: when decoding, whether the neurons of a batch are the ``union`` over its live sequences or
            ``each`` sequence has its own (the semantics of batch 1); ``mask``: a set for every token of a
            pass over whole texts.
        dense_until: with ``mask``, positions before it are computed in full, as those of a prompt.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        num_layers: int,
        *,
        name: str = "policy",
        sharing: Sharing = "union",
        dense_until: int = 0,
    ) -> None:
        self.name = name
        self.sharing: Sharing = sharing
        self.dense_until = dense_until
        self.num_layers = num_layers
        self.units = {(unit.kind, unit.layer): unit for unit in units}
        assert len(self.units) == len(units), "one unit a kind and layer"
        self._by_tap: dict[Tap, list[Unit]] = {}
        for unit in [*units, *(u.refine for u in units if u.refine is not None)]:
            if unit.tap is not None:
                self._by_tap.setdefault(unit.tap, []).append(unit)
        self._scores: dict[int, Tensor] = {}
        self._sets: dict[int, Chosen] = {}  # those that the kernels have found already
        self._positions = torch.empty(0)
        self._alive: Tensor | None = None
        self._chosen: dict[tuple[Kind, int], tuple[Tensor | float, Tensor | int]] = {}  # shares, rows

    def begin(self, positions: Tensor, alive: Tensor | None) -> None:
        self._positions, self._alive = positions, alive
        self._scores.clear()
        self._sets.clear()

    def observe(self, tap: Tap, residual: Tensor) -> None:
        units = self._by_tap.get(tap, ())
        z = None if all(map(self._in_one_go, units)) else standardise(residual)
        for unit in units:
            with nvtx_range(unit.predict_name, "predict"):
                if self._in_one_go(unit):
                    assert isinstance(unit.scorer, PackedLowRank) and residual.shape[1] == 1
                    union = unit.kind == "mlp" and self.sharing == "union"
                    found = unit.scorer.active_set(residual[:, 0], self._alive, union=union)
                    self._sets[id(unit)] = Chosen(*found, unit.mean)
                else:
                    self._scores[id(unit)] = unit.scorer(z)

    def _in_one_go(self, unit: Unit) -> bool:
        """Whether the kernels find a unit's set at its tap, without scores that anyone sees."""
        return self.sharing != "mask" and unit.refine is None and isinstance(unit.scorer, PackedLowRank)

    def heads(self, layer: int, truth: Truth) -> Choice:
        return self._choose("heads", layer, truth)

    def neurons(self, layer: int, truth: Truth) -> Choice:
        return self._choose("mlp", layer, truth)

    def chooses(self, kind: Kind) -> bool:
        """Whether some layer's neurons or heads are chosen."""
        return any(k == kind for k, _ in self.units)

    def read_bytes(self) -> int:
        """Bytes that scoring reads on this rank in a step, as the scorers lie in memory."""
        units = [*self.units.values(), *(u.refine for u in self.units.values() if u.refine is not None)]
        read = (unit.scorer for unit in units if not unit.sees_truth)
        return sum(t.nbytes for scorer in read for t in (*scorer.parameters(), *scorer.buffers()))

    def density(self, kind: Kind) -> Tensor:
        """The share of this rank's neurons or heads that was chosen since the last call: fp32[1], the mean
        over tokens and layers; 1 in layers without a unit."""
        for key, unit in self.units.items():
            if key[0] == kind and self._in_one_go(unit):
                assert isinstance(unit.scorer, PackedLowRank)
                chosen, sets = unit.scorer.tally.tolist()
                self._chosen[key] = (chosen / unit.scorer.bias.numel(), sets)
                unit.scorer.tally.zero_()
        shares = [
            torch.as_tensor(t) / torch.as_tensor(n).clamp(min=1)
            for (k, _), (t, n) in self._chosen.items()
            if k == kind
        ]
        self._chosen = {key: value for key, value in self._chosen.items() if key[0] != kind}
        return (sum(shares, torch.tensor(float(self.num_layers - len(shares)))) / self.num_layers).reshape(1)

    def _choose(self, kind: Kind, layer: int, truth: Truth) -> Choice:
        unit = self.units.get((kind, layer))
        if unit is None:
            return None
        if id(unit) in self._sets:
            return self._sets.pop(id(unit))
        with nvtx_range(unit.select_name, "select"):
            mask = self._mask(unit, truth)
            if self.sharing == "mask":
                self.count(unit, mask[:, self.dense_until :], lambda: truth()[:, self.dense_until :])
                return Masked(mask | (self._positions < self.dense_until)[..., None], unit.mean)
            mask = mask[:, 0]
            if self._alive is not None:
                mask = mask & self._alive.bool()[:, None]
            if kind == "mlp" and self.sharing == "union":
                mask = mask.any(0)
            self.count(unit, mask, truth)
            return Chosen.from_mask(mask, unit.mean)

    def scores(self, unit: Unit, truth: Truth) -> Tensor:
        """The scores ``[B, S, n]`` of a unit whose tap has been passed."""
        if unit.tap is None:
            found: Tensor = unit.scorer(truth() if unit.sees_truth else self._positions)
            return found
        assert id(unit) in self._scores, f"{unit.kind} of layer {unit.layer} was asked before {unit.tap}"
        return self._scores.pop(id(unit))

    def _mask(self, unit: Unit, truth: Truth) -> Tensor:
        mask = self.scores(unit, truth) > unit.threshold
        if unit.refine is None:
            return mask
        self.count_candidates(unit, mask)
        return mask & self._mask(unit.refine, truth)

    def count_candidates(self, unit: Unit, mask: Tensor) -> None:
        """What the first of two stages let through."""

    def count(self, unit: Unit, mask: Tensor, truth: Truth) -> None:
        """Keeps account of what was chosen; what an instrument overrides to learn more."""
        rows: Tensor | int = mask[..., 0].numel()
        if mask.dim() > 1 and self._alive is not None:
            rows = self._alive.sum()
        total, n = self._chosen.get((unit.kind, unit.layer), (0, 0))
        chosen = mask.sum() / mask.shape[-1]
        self._chosen[unit.kind, unit.layer] = total + chosen, n + rows
