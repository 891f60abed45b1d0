"""What is computed of a layer, and who decides it.

A `Selector` is asked at every block of a step. It sees the residual stream at the taps (``attn_in`` and
``mlp_in`` of each layer) before it is asked, and may look at the truth, that is compute what it selects from,
which only the oracle, the lossless policy and the instruments do.

Shape legend: B batch, S query length, D hidden, N local heads, H head dim, n local neurons or heads.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from dejavu.kernels.predict import compact, standardise
from dejavu.parallel.overlap import SideStream
from dejavu.predictors.networks import NeuronContribution, PackedLowRank
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

    @classmethod
    def into(cls, kind: Kind, layer: int) -> "Tap":
        """The tap at the block whose heads or neurons are chosen: none can be later."""
        return cls("attn_in" if kind == "heads" else "mlp_in", layer)

    @property
    def halves(self) -> int:
        """The half layers before it."""
        return 2 * self.layer + (self.point == "mlp_in")

    def shift(self, halves: int) -> "Tap":
        """The tap ``halves`` half layers further on (back, if negative)."""
        at = self.halves + halves
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


class Live(NamedTuple):
    """All of fc1, and of fc2 the rows whose neuron is live for some token: no approximation at all. Their
    number and 1 are added to ``tally int64[2]``; sequences that are not ``alive [B]`` have none."""

    tally: Tensor
    alive: Tensor | None


Choice = Chosen | Masked | Live | None  # None: everything


class Selector:
    """Chooses everything; the base of all that choose less, or look on.

    ``capturable``: a decode step with it is the same launches over the same memory every time.
    With pipeline stages, taps that a later stage reads travel with the hidden state: ``arriving`` are those
    that come to this stage, ``leaving`` those that it gives on.
    """

    capturable = False
    arriving: Sequence[Tap] = ()
    leaving: Sequence[Tap] = ()

    def begin(self, positions: Tensor, alive: Tensor | None) -> None:
        """A pass begins: ``positions [B, S]``; ``alive [B]``, 0 for sequences that choose nothing."""

    def observe(self, tap: Tap, residual: Tensor) -> None:
        """The residual stream ``[B, S, D]`` at ``tap``, the same on every rank."""

    def passed(self) -> list[Tensor]:
        """The residual streams ``[B, S, D]`` at the taps that are ``leaving``, once they have been passed."""
        return []

    def before_collective(self) -> None:
        """A block has been computed; the next that the main stream does is to wait for its peers."""

    def heads(self, layer: int, truth: Truth) -> Choice:
        """The heads of ``layer``; ``truth()`` is the output ``[B, S, N, H]`` of all of them."""
        return None

    def neurons(self, layer: int, truth: Truth) -> Choice:
        """The neurons of ``layer``'s MLP; ``truth()`` is the activation ``[B, S, F]`` of all of them."""
        return None


class _Everything(Selector):
    capturable = True


EVERYTHING = _Everything()


@dataclass(frozen=True, slots=True)
class ActiveSet:
    """What one layer computes in one step; None stands for all of it."""

    neurons: Choice = None
    heads: Choice = None


class Fixed(Selector):
    """Sets that are given: recorded ones, or a test's. One `ActiveSet` a layer."""

    capturable = True

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
    max_batch: int | None = None  # more sequences share so many neurons that all are computed
    predict_name: str = field(init=False)
    select_name: str = field(init=False)
    live_tally: Tensor | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if isinstance(self.scorer, PackedLowRank):
            self.scorer = self.scorer.at(self.threshold)
        if isinstance(self.scorer, NeuronContribution) and self.sees_truth and self.threshold == 0:
            # every neuron that adds anything: no approximation, and nothing need be scored
            self.live_tally = torch.zeros(2, dtype=torch.int64, device=self.scorer.norms.device)
        block = f"layer.{self.layer}/{'attention' if self.kind == 'heads' else 'mlp'}"
        self.predict_name, self.select_name = f"{block}/predict", f"{block}/select"

    @property
    def halves_ahead(self) -> int:
        """Half layers from its tap to where it is needed."""
        return 0 if self.tap is None else Tap.into(self.kind, self.layer).halves - self.tap.halves


Sharing = Literal["union", "each", "mask"]
# When a predictor starts: on a side stream, as soon as its tap exists or with the next collective, under
# which the GPU has room; or on the main stream, at its tap. ``auto``: at their taps, but neurons that are
# predicted a whole layer ahead with the collective (on one GPU: at the end of the block), and then all
# predictors give way to the step.
Overlap = Literal["auto", "tap", "collective", "none"]


class _Found(NamedTuple):
    """A set that the kernels have found, when it is there, and what they read: the memory is not to be used
    again before the main stream has waited for them."""

    chosen: Chosen
    ready: "torch.cuda.Event | None"
    residual: Tensor


class SetBuffers:
    """The sets of some units for a batch in one ``int32`` tensor, so that a step's can be kept and put back.

    Args:
        sizes: of each unit, the numbers of its sets and of the entries that they choose from.
    """

    def __init__(self, sizes: dict[int, tuple[int, int]], device: torch.device) -> None:
        places, end = {}, 0
        for key, (sets, n) in sizes.items():
            places[key] = (end, end + _aligned(sets * n))
            end += _aligned(sets * n) + _aligned(sets)
        self.data = torch.zeros(end, dtype=torch.int32, device=device)
        self._views: dict[int, tuple[Tensor, Tensor]] = {}
        for key, (ids, counts) in places.items():
            sets, n = sizes[key]
            self._views[key] = self.data[ids : ids + sets * n], self.data[counts : counts + sets]

    def of(self, unit: "Unit", *, union: bool) -> tuple[Tensor, Tensor]:
        """``ids`` and ``count`` of a unit, as a `Chosen` has them."""
        ids, count = self._views[id(unit)]
        return (ids if union else ids.view(len(count), -1)), count


def _aligned(n: int) -> int:
    """So that all begin at 16 bytes."""
    return -(-n // 4) * 4


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

    ``sides`` (empty at first: all runs on the main stream) and ``overlap`` say where and when predictors run:
    each kind has a side, and another that is patient.
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
        for found in self._by_tap.values():  # what is needed first runs first
            found.sort(key=lambda unit: (unit.layer, unit.kind == "mlp"))
        self.sides: Mapping[tuple[Kind, bool], SideStream] = {}
        self.overlap: Overlap = "auto"
        self._scores: dict[int, Tensor] = {}
        self._waiting: dict[int, tuple[Unit, Tensor]] = {}  # for a collective to start beside
        self._found: dict[int, _Found] = {}
        self._passed: dict[Tap, Tensor] = {}
        self._buffers: dict[int, SetBuffers] = {}
        self._positions = torch.empty(0)
        self._alive: Tensor | None = None
        self._patient = False
        self._tallies: dict[tuple[Kind, int], Tensor] = {}  # shares chosen, rows; added to in place

    @property
    def capturable(self) -> bool:  # type: ignore[override]
        """Not where sets are found in plain torch, which may ask the host how many there are."""
        return all(self._in_one_go(unit) or self._is_lossless(unit) for unit in self.units.values())

    def begin(self, positions: Tensor, alive: Tensor | None) -> None:
        self._positions, self._alive = positions, alive
        self._patient = any(self._has_time(unit) for unit in self.units.values())
        self._scores.clear()
        self._waiting.clear()
        self._found.clear()
        self._passed.clear()

    @property
    def taps(self) -> list[Tap]:
        """Where its predictors read."""
        return list(self._by_tap)

    def observe(self, tap: Tap, residual: Tensor) -> None:
        if tap in self.leaving:
            self._passed[tap] = residual
        units = [unit for unit in self._by_tap.get(tap, ()) if not self._is_all(unit)]
        if slow := [unit for unit in units if not self._in_one_go(unit)]:
            z = standardise(residual)
            for unit in slow:
                with nvtx_range(unit.predict_name, "predict"):
                    self._scores[id(unit)] = unit.scorer(z)
        for unit in units:
            if self._in_one_go(unit):
                if self._waits(unit):
                    self._waiting[id(unit)] = unit, residual
                else:
                    self._start(unit, residual)

    def passed(self) -> list[Tensor]:
        return [self._passed[tap] for tap in self.leaving]

    def before_collective(self) -> None:
        for unit, residual in self._waiting.values():
            self._start(unit, residual)
        self._waiting.clear()

    def _waits(self, unit: Unit) -> bool:
        """Whether it starts with the next collective."""
        return self.overlap == "collective" or self._has_time(unit)

    def _has_time(self, unit: Unit) -> bool:
        """Whether ``auto`` lets it wait. Neurons' predictors that started beside fc1, which leaves little
        shared memory, kept fc2 out until they had ended (profiles/results/README.md)."""
        return self.overlap == "auto" and unit.kind == "mlp" and unit.halves_ahead > 1

    def _start(self, unit: Unit, residual: Tensor) -> None:
        """Launches a predictor whose tap has been passed."""
        assert isinstance(unit.scorer, PackedLowRank) and residual.shape[1] == 1
        side = self._side(unit)
        out = self.buffers(len(residual)).of(unit, union=self._shared(unit))
        beside = nullcontext() if side is None else side.beside()
        with beside, nvtx_range(unit.predict_name, "predict"):
            unit.scorer.active_set(
                residual[:, 0],
                self._alive,
                union=self._shared(unit),
                beside=side is not None,
                out=out,
            )
        ready = None if side is None else side.mark()
        self._found[id(unit)] = _Found(Chosen(*out, unit.mean), ready, residual)

    def _side(self, unit: Unit) -> SideStream | None:
        return None if self.overlap == "none" else self.sides.get((unit.kind, self._patient))

    def buffers(self, batch: int) -> SetBuffers:
        """Where the sets that the kernels find for ``batch`` sequences lie, at every step."""
        if batch not in self._buffers:
            units = [unit for unit in self.units.values() if self._in_one_go(unit)]
            assert units, "no unit's sets are found by the kernels"
            sizes = {
                id(unit): (1 if self._shared(unit) else batch, unit.scorer.bias.numel())  # type: ignore[operator]
                for unit in units
            }
            self._buffers[batch] = SetBuffers(sizes, units[0].scorer.bias.device)  # type: ignore[arg-type]
        return self._buffers[batch]

    def given(self, batch: int) -> "Fixed":
        """The sets that lie in `buffers`, with nothing predicted."""
        sets = [ActiveSet() for _ in range(self.num_layers)]
        for (kind, layer), unit in self.units.items():
            chosen = Chosen(*self.buffers(batch).of(unit, union=self._shared(unit)), unit.mean)
            sets[layer] = replace(sets[layer], **{"neurons" if kind == "mlp" else "heads": chosen})
        return Fixed(sets)

    def _is_all(self, unit: Unit) -> bool:
        """Whether the batch is so large that choosing does not pay for this unit."""
        batch = len(self._positions)
        return self._shared(unit) and unit.max_batch is not None and batch > unit.max_batch

    def _is_lossless(self, unit: Unit) -> bool:
        return unit.live_tally is not None and self._shared(unit)

    def _shared(self, unit: Unit) -> bool:
        return unit.kind == "mlp" and self.sharing == "union"

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

    def tallies(self) -> list[Tensor]:
        """What a captured step counts in, at every replay."""
        own = [
            unit.scorer.tally if isinstance(unit.scorer, PackedLowRank) else unit.live_tally
            for unit in self.units.values()
        ]
        return [tally for tally in own if tally is not None]

    @torch.inference_mode()
    def density(self, kind: Kind) -> Tensor:
        """The share of this rank's neurons or heads that was chosen since the last call: fp32[1], the mean
        over tokens and layers; 1 in layers without a unit."""
        total = float(self.num_layers)
        for (k, layer), unit in self.units.items():
            if k != kind:
                continue
            if self._in_one_go(unit):
                assert isinstance(unit.scorer, PackedLowRank)
                tally, n = unit.scorer.tally, unit.scorer.bias.numel()
            elif self._is_lossless(unit):
                assert isinstance(unit.scorer, NeuronContribution) and unit.live_tally is not None
                tally, n = unit.live_tally, unit.scorer.norms.numel()
            elif (k, layer) in self._tallies:
                tally, n = self._tallies.pop((k, layer)), 1
                tally[1].clamp_(min=1)  # nobody alive: nothing chosen
            else:
                continue
            chosen, sets = tally.tolist()
            total += chosen / n / sets - 1 if sets else 0
            tally.zero_()
        return torch.tensor([total / self.num_layers])

    def _choose(self, kind: Kind, layer: int, truth: Truth) -> Choice:
        unit = self.units.get((kind, layer))
        if unit is None or self._is_all(unit):
            return None
        if self._in_one_go(unit):
            if id(unit) in self._waiting:  # no collective has come since its tap
                self._start(*self._waiting.pop(id(unit)))
            chosen, ready, _ = self._found.pop(id(unit))
            if ready is not None:
                side = self._side(unit)
                assert side is not None
                side.join(ready)
            return chosen
        if self._is_lossless(unit):
            assert unit.live_tally is not None
            return Live(unit.live_tally, self._alive)
        with nvtx_range(unit.select_name, "select"):
            mask = self._mask(unit, truth)
            if self.sharing == "mask":
                self.count(unit, mask[:, self.dense_until :], lambda: truth()[:, self.dense_until :])
                return Masked(mask | (self._positions < self.dense_until)[..., None], unit.mean)
            mask = mask[:, 0]
            if self._alive is not None:
                mask = mask & self._alive.bool()[:, None]
            if self._shared(unit):
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
        if self._alive is not None:
            rows = self._alive.sum() if mask.dim() > 1 else self._alive.any()
        key = unit.kind, unit.layer
        if key not in self._tallies:
            self._tallies[key] = torch.zeros(2, dtype=torch.float64, device=mask.device)
        tally = self._tallies[key]
        tally[0] += mask.sum() / mask.shape[-1]
        tally[1] += rows
