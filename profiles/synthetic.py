"""Models and predictors of published shapes without their weights: random ones, made on the GPU, for timing.

A decode step's time depends on shapes, on how many neurons and heads are chosen, and on how that number moves
from token to token and from rank to rank; not on the values. What a synthetic model says is noise.

Shape legend: T tokens, D hidden, n local neurons or heads, r rank, B batch.
"""

from dataclasses import dataclass, replace
from math import pi, sqrt
from statistics import NormalDist
from typing import Literal

import torch
from torch import Tensor

from dejavu.kernels.predict import standardise
from dejavu.kernels.tuning import crossover
from dejavu.parallel.groups import TPGroup
from dejavu.predictors.networks import LowRank, PackedLowRank
from dejavu.predictors.selection import Kind, Policy, Selector, Tap, Unit
from dejavu.runtime.config import OPTConfig
from dejavu.runtime.loading import check_memory
from dejavu.runtime.opt import OPTModel

_NORMAL = NormalDist()
_STD = 0.02
# Which the scores of heads have no use for more of.
HEAD_RANK = 128

# Measured on opt-books-65m with its predictors, balanced (profiles/results/balance-opt-books-65m): (p95 - p5)
# / mean over tokens, of a token's neurons in all layers and (the median over layers) in one; and the larger
# of two ranks' counts over their mean.
_TOKEN_SPREAD, _LAYER_SPREAD, _RANK_SPREAD = 0.766, 1.006, 1.029


# How far ahead the neurons of a layer are predicted: half a layer, or a whole one.
Lookahead = Literal["half", "one"]


@dataclass(frozen=True, slots=True)
class Profile:
    """The share of neurons and of heads that each layer computes; 1: all, without a predictor."""

    name: str
    mlp: tuple[float, ...]
    heads: tuple[float, ...]


def paper75(num_layers: int) -> Profile:
    """Deja Vu's setting for OPT-175B at 75% sparsity, as its benchmark has it, stretched over the layers.

    5000 of 49152 neurons in 86 of 96 layers; 24 of 96 heads in layers 5 to 33 and 63 to 94, 48 in 34 to 62.
    """
    at = [96 * i // num_layers for i in range(num_layers)]
    # which ten MLPs are dense is no matter for the time: those at both ends
    mlp = [1.0 if i < 5 or i >= 91 else 5000 / 49152 for i in at]
    heads = [1.0 if i < 5 or i == 95 else 0.5 if 34 <= i < 63 else 0.25 for i in at]
    return Profile("paper75", tuple(mlp), tuple(heads))


# Neurons of OPT-66B that are live for any of so many sequences, the mean over layers (Polar Sparsity, NeurIPS
# 2025).
UNION_66B = {1: 0.075, 2: 0.080, 4: 0.116, 8: 0.175, 16: 0.263, 32: 0.374, 64: 0.490}


def union66b(num_layers: int, batch: int) -> Profile:
    """The union over a batch of the exact active sets of OPT-66B in every layer, and `paper75`'s heads."""
    if batch not in UNION_66B:
        raise ValueError(f"union66b knows batches of {', '.join(map(str, UNION_66B))}, not of {batch}")
    return Profile("union66b", (UNION_66B[batch],) * num_layers, paper75(num_layers).heads)


@torch.no_grad()
def synthetic_model(config: OPTConfig, tp: TPGroup, dtype: torch.dtype) -> OPTModel:
    """A rank's share of a random model, all of whose neurons are live.

    Embeddings are loud and blocks are quiet: in every layer the stream is what token and position made of it,
    whatever blocks leave out, so that predictors find what their thresholds were set to. The head is not
    tied (as many bytes are read), or a token would be followed by itself.
    """
    with torch.device("meta"):
        model = OPTModel(replace(config, tie_word_embeddings=False), tp=tp, dtype=dtype)
    check_memory(sum(p.nbytes for p in model.parameters()), tp, "the model")
    model.to_empty(device=tp.device)
    generator = torch.Generator(tp.device).manual_seed(1 + tp.rank)
    for name, parameter in model.named_parameters():
        if "layer_norm" in name:
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)
        elif name.endswith("bias"):
            parameter.zero_()
        else:
            quiet = "fc2" in name or "out_proj" in name
            loud = "embed_tokens" in name
            deviation = 1e-3 * _STD if quiet else 3.0 if loud else _STD
            parameter.normal_(0, deviation, generator=generator)
    shared = torch.Generator(tp.device).manual_seed(0)  # what every rank holds is the same on all
    assert model.embed_positions is not None
    model.embed_positions.weight.data.normal_(0, 1.0, generator=shared)
    set_live_share(model, 1.0)
    return model


def set_live_share(model: OPTModel, live: float) -> None:
    """Sets fc1's biases so that a share ``live`` of the neurons of a synthetic model is above zero."""
    deviation = _STD * sqrt(model.config.hidden_size)  # of fc1's outputs: its input has unit variance
    quantile = _NORMAL.inv_cdf(min(live, 0.9999))
    for layer in model.layers:
        assert layer.mlp.fc1.bias is not None
        layer.mlp.fc1.bias.fill_(quantile * deviation)


class Taps(Selector):
    """Chooses everything, and keeps the stream at every tap: ``[T, B, D]``, a row a step."""

    def __init__(self) -> None:
        self._seen: dict[Tap, list[Tensor]] = {}

    def observe(self, tap: Tap, residual: Tensor) -> None:
        self._seen.setdefault(tap, []).append(residual[:, 0].clone())

    def at(self, tap: Tap) -> Tensor:
        return torch.stack(self._seen[tap])


@torch.inference_mode()
def synthetic_policy(
    model: OPTModel, profile: Profile, taps: Taps, *, rank: int, bits: int, lookahead: Lookahead = "half"
) -> Policy:
    """Random predictors that choose as many as the profile says, neurons half a layer or one ahead.

    A score has a part of its own for every neuron, and parts in common: one that moves with the token, one
    with the token and the layer, one with the token, the layer and the rank. Their sizes give the counts the
    spread measured on a real model. Thresholds are set on the stream of a dense run of the same prompts,
    ``taps``; those of a batch's neurons so that the union has the profile's density.
    """
    units = []
    for layer in model.layer_range:
        if profile.mlp[layer] < 1:
            tap = Tap("mlp_in", layer).shift(-2 if lookahead == "one" and layer else -1)
            units.append(_unit(model, "mlp", tap, layer, profile.mlp[layer], rank, bits))
        if layer and profile.heads[layer] < 1:  # before the first layer's heads there is no tap
            tap, head_rank = Tap("mlp_in", layer - 1), min(rank, HEAD_RANK)
            units.append(_unit(model, "heads", tap, layer, profile.heads[layer], head_rank, bits))
    for unit in units:
        assert unit.tap is not None and isinstance(unit.scorer, PackedLowRank)
        scores: Tensor = unit.scorer(standardise(taps.at(unit.tap)))  # [T, B, n]
        batch = scores.shape[1]
        if unit.kind == "mlp":
            scores = scores.amax(1)  # chosen for any of the batch
        density = (profile.mlp if unit.kind == "mlp" else profile.heads)[unit.layer]
        place = max(round((1 - density) * scores.numel()), 1)
        unit.threshold = float(scores.flatten().kthvalue(place).values)
        if unit.kind == "mlp" and model.tp.device.type == "cuda":
            ffn, D = len(unit.scorer.bias), model.config.hidden_size
            pays = density < crossover(ffn, D, model.dtype, batch, model.tp.device)
            unit.max_batch = None if pays else 0
        unit.scorer.threshold.fill_(unit.threshold)
    return Policy(units, model.config.num_layers, name=profile.name)


def _unit(model: OPTModel, kind: Kind, tap: Tap, layer: int, density: float, rank: int, bits: int) -> Unit:
    config, tp = model.config, model.tp
    D = config.hidden_size
    n = tp.divide(config.ffn_dim if kind == "mlp" else config.num_heads)
    own = torch.Generator(tp.device).manual_seed(1000 * layer + 10 * tp.rank + (kind == "mlp"))
    down = torch.randn(rank, D, generator=own, device=tp.device) / sqrt(D)
    up = torch.randn(n, rank, generator=own, device=tp.device) / sqrt(rank)
    if kind == "mlp":  # heads are few: their counts vary by themselves
        token, layered, ranked = _common_parts(density)
        same = torch.Generator(tp.device).manual_seed(3)
        down[0] = torch.randn(D, generator=same, device=tp.device) / sqrt(D)
        same.manual_seed(4 + layer)
        down[1] = torch.randn(D, generator=same, device=tp.device) / sqrt(D)
        up[:, 0], up[:, 1], up[:, 2] = token, layered, ranked
    scorer = PackedLowRank(LowRank(down, up, torch.zeros(n, device=tp.device)), bits).to(tp.device)
    return Unit(kind, layer, tap, scorer)


def _common_parts(density: float) -> tuple[float, float, float]:
    """The deviations of a score's parts in common (token; token and layer; token, layer and rank) beside a
    part of its own of deviation 1."""
    token, both = (_deviation(density, spread) for spread in (_TOKEN_SPREAD, _LAYER_SPREAD))
    # two ranks' counts with relative deviation s: the larger is 1 + s / sqrt(pi) of the mean
    relative = sqrt(pi) * (_RANK_SPREAD - 1)
    threshold = -_NORMAL.inv_cdf(density)
    return token, sqrt(max(both**2 - token**2, 0.0)), relative * density / _NORMAL.pdf(threshold)


def _deviation(density: float, spread: float) -> float:
    """Of the part in common, if it makes (p95 - p5) / mean of the share chosen ``spread``."""
    low, high = 0.0, 4.0
    for _ in range(40):
        middle = (low + high) / 2
        threshold = -_NORMAL.inv_cdf(density) * sqrt(1 + middle**2)
        p95, p5 = (_NORMAL.cdf(-(threshold - g * middle)) for g in (1.645, -1.645))
        low, high = (middle, high) if (p95 - p5) / density < spread else (low, middle)
    return low
