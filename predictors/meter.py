"""What a policy chose, against what it should have chosen, and the bytes that it costs.

Shape legend: B batch, S query length, n local neurons or heads, F ffn, D hidden.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dejavu.parallel.collectives import all_gather_last, all_reduce
from dejavu.parallel.groups import TPGroup
from dejavu.predictors.files import Entry, ModelIdentity
from dejavu.predictors.selection import Kind, Policy, Truth, Unit
from dejavu.runtime.opt import OPTModel
from dejavu.runtime.sparsity import contribution

# A weight's bytes in the accounts: 16 bits.
_BYTES = 2


@dataclass(frozen=True, slots=True)
class Account:
    """Of one layer and kind, shares over tokens. ``density``: chosen; ``live``: chosen and not zero;
    ``candidates``: let through by the first of two stages; ``recall`` and ``precision`` against the live
    neurons (heads: against as many heads as were chosen, those that contribute most); ``weighted_recall``:
    the share of the contribution that was chosen."""

    density: float
    live: float
    candidates: float
    recall: float
    weighted_recall: float
    precision: float


class Metered(Policy):
    """A policy that keeps account, at the price of computing the truth. For ``sharing="mask"``."""

    def __init__(self, policy: Policy, model: OPTModel, units: Iterable[Unit] | None = None) -> None:
        super().__init__(
            list(policy.units.values()) if units is None else list(units),
            policy.num_layers,
            name=policy.name,
            sharing=policy.sharing,
            dense_until=policy.dense_until,
        )
        self.truths = {key: _truth(model, unit) for key, unit in self.units.items()}
        self._tp = model.tp
        self._sums: dict[tuple[Kind, int], Tensor] = {}
        self._candidates: dict[tuple[Kind, int], Tensor] = {}

    def accounts(self, tp: TPGroup) -> dict[tuple[Kind, int], Account]:
        """Of every unit, over all ranks, since the last call."""
        result = {}
        for key, sums in self._sums.items():
            total = all_reduce(torch.cat([sums, self._candidates.get(key, sums[:1])]), tp).tolist()
            entries, chosen, live, hit, weight, kept, candidates = (max(x, 1e-12) for x in total)
            result[key] = Account(
                density=chosen / entries,
                live=hit / entries if key[0] == "mlp" else chosen / entries,
                candidates=candidates / entries,
                recall=hit / live,
                weighted_recall=kept / weight,
                precision=hit / chosen,
            )
        self._sums.clear()
        self._candidates.clear()
        return result

    def count_candidates(self, unit: Unit, mask: Tensor) -> None:
        key = unit.kind, unit.layer
        count = mask[:, self.dense_until :].sum().double().reshape(1)
        self._candidates[key] = self._candidates.get(key, 0) + count

    def count(self, unit: Unit, mask: Tensor, truth: Truth) -> None:
        super().count(unit, mask, truth)
        key = unit.kind, unit.layer
        value = self.truths[key](truth())
        if unit.kind == "mlp":
            wanted = value > 0
        else:  # as many as were chosen, over all ranks
            value, chosen = (all_gather_last(x, self._tp) for x in (value, mask.to(value.dtype)))
            mask = chosen > 0
            rank = value.argsort(-1, descending=True).argsort(-1)
            wanted = rank < mask.sum(-1, keepdim=True)
        sums = (
            torch.ones_like(mask, dtype=torch.float32).sum(),
            mask.sum(),
            wanted.sum(),
            (wanted & mask).sum(),
            value.sum(),
            (value * mask).sum(),
        )
        self._sums[key] = self._sums.get(key, 0) + torch.stack([s.double() for s in sums])


def _truth(model: OPTModel, unit: Unit) -> nn.Module:
    mean = None if unit.mean is None else unit.mean.output
    return contribution(model, unit.kind, unit.layer, mean)


def dense_bytes(kind: Kind, model: ModelIdentity) -> float:
    """What a token reads of a dense layer's MLP or attention weights, in 16 bits."""
    D = model.hidden_size
    return _BYTES * (2 * model.ffn_dim * D if kind == "mlp" else 4 * D * D)


def sparse_bytes(entry: Entry, account: Account, model: ModelIdentity) -> float:
    """What a token reads of a sparse layer's weights: the predictor, what it chose, of fc2 only live rows."""
    predictor = entry.read_bytes(model)
    if entry.refine is not None:
        predictor += entry.refine.read_bytes(model) * account.candidates
    if entry.kind == "heads":
        return predictor + dense_bytes("heads", model) * account.density
    return predictor + dense_bytes("mlp", model) * (account.density + account.live) / 2
