"""From what a user asks for (``dense``, ``lossless``, a directory) to what the model is asked."""

from importlib.resources import files
from pathlib import Path

import torch
from torch import Tensor, nn

from dejavu.kernels.tuning import crossover
from dejavu.predictors.files import (
    Entry,
    Key,
    Manifest,
    ModelIdentity,
    OperatingPoint,
    PredictorTensors,
    read_manifest,
)
from dejavu.predictors.networks import HeadContribution, LowRank, NeuronContribution, PackedLowRank
from dejavu.predictors.selection import HeadMean, Kind, Policy, Sharing, Tap, Unit
from dejavu.runtime.config import OPTConfig
from dejavu.runtime.graphs import MAX_BATCH
from dejavu.runtime.opt import OPTModel
from dejavu.runtime.weights import DEMO

DENSE, LOSSLESS = "dense", "lossless"


def load_policy(
    spec: str,
    model: OPTModel,
    fingerprint: str,
    *,
    density: float | None = None,
    sharing: Sharing = "union",
    dense_until: int = 0,
) -> Policy | None:
    """The policy that ``spec`` names; None for ``dense``.

    Args:
        spec: ``dense``; ``lossless``: fc1 in full, then only the rows of fc2 whose neuron is live; a
            directory of calibrated predictors, or ``demo`` for the embedded model's.
        density: the mean MLP density to move to, between the calibrated points (where all MLPs are dense:
            the mean head density); None is the default point.
        sharing, dense_until: see `Policy`.

    Raises:
        ValueError: no such directory, of another model, damaged, not calibrated, or ``density`` outside the
            calibrated points.
    """
    if spec in (DENSE, LOSSLESS):
        if density is not None:
            raise ValueError(f"density={density} belongs to predictors; {spec} has none")
        return None if spec == DENSE else lossless(model, sharing, dense_until)
    directory = find_predictors(spec)
    manifest = read_manifest(directory)
    check_model(manifest, model, fingerprint, directory)
    if manifest.default is None:
        raise ValueError(f"{directory} is not calibrated: run dejavu calibrate on it first")
    point = manifest.points[manifest.default] if density is None else at_density(manifest, density, directory)
    return build_policy(directory, manifest, point, model, sharing=sharing, dense_until=dense_until)


def find_predictors(name: str) -> Path:
    """A directory of predictors: ``demo`` is the embedded model's.

    Raises:
        ValueError: there is none.
    """
    if name == DEMO:
        return Path(str(files("dejavu.launch"))) / "demo" / "predictors"
    if not name or not (directory := Path(name).expanduser()).is_dir():
        raise ValueError(f"sparsity={name!r} is neither dense, lossless, demo nor a directory of predictors")
    return directory


def identity(config: OPTConfig, fingerprint: str) -> ModelIdentity:
    """What predictors and traces know a model by."""
    return ModelIdentity(
        fingerprint=fingerprint,
        hidden_size=config.hidden_size,
        ffn_dim=config.ffn_dim,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
    )


def check_model(manifest: Manifest, model: OPTModel, fingerprint: str, directory: Path) -> None:
    """Whether predictors belong to a model.

    Raises:
        ValueError: they don't.
    """
    for name in ("num_layers", "hidden_size", "ffn_dim", "num_heads"):
        theirs, ours = getattr(manifest.model, name), getattr(model.config, name)
        if theirs != ours:
            raise ValueError(f"{directory} is of another model: {name} is {theirs} there and {ours} here")
    if manifest.model.fingerprint != fingerprint:
        raise ValueError(
            f"{directory} is of another model: its fingerprint is {manifest.model.fingerprint}, "
            f"this model's {fingerprint}"
        )


def build_policy(
    directory: Path,
    manifest: Manifest,
    point: OperatingPoint,
    model: OPTModel,
    *,
    sharing: Sharing,
    dense_until: int = 0,
) -> Policy:
    """The policy of a directory at one operating point; what the point has no threshold for is dense."""
    tensors = PredictorTensors(directory, manifest.model, model.tp)
    wide = torch.promote_types(model.dtype, torch.float32)

    def unit(entry: Entry, key: Key, name: str) -> Unit | None:
        threshold = point.thresholds[key][entry.layer] if key in point.thresholds else None
        if entry.dense or threshold is None:
            return None
        layer = entry.layer
        mean = tensors.head_mean(layer) if entry.kind == "heads" else None
        scorer = tensors.scorer(name, entry, lambda: contribution(model, entry.kind, layer, mean))
        in_one_go = key != "refine" and entry.refine is None
        if isinstance(scorer, LowRank) and in_one_go and model.tp.device.type == "cuda":
            # fewer bits go in 16, nearly as they are; in 8, with one scale a row, they would choose others
            scorer = PackedLowRank(scorer, 8 if entry.bits == 8 else 16).to(model.tp.device)
        else:
            scorer.to(device=model.tp.device, dtype=wide)
        return Unit(
            kind=entry.kind,
            layer=layer,
            tap=None if entry.tap is None else Tap.parse(entry.tap),
            scorer=scorer,
            sees_truth=entry.method == "oracle",
            threshold=threshold,
            mean=None if mean is None else _head_mean(model, layer, mean),
            max_batch=_max_batch(model, entry),
            refine=None if entry.refine is None else unit(entry.refine, "refine", f"{name}.refine"),
        )

    here = (entry for entry in manifest.entries if entry.layer in model.layer_range)
    units = [unit(entry, entry.kind, entry.name) for entry in here]
    return Policy(
        [u for u in units if u is not None],
        model.config.num_layers,
        name=manifest.method,
        sharing=sharing,
        dense_until=dense_until,
    )


def _max_batch(model: OPTModel, entry: Entry) -> int | None:
    """Up to how many sequences a layer's neurons are chosen at all: as long as their union, were they to
    choose independently of each other (they share more), costs less than all. On a GPU; None: always."""
    density = (entry.held_out or {}).get("density")
    if model.tp.device.type != "cuda" or entry.kind != "mlp" or density is None:
        return None
    D, ffn = model.config.hidden_size, model.tp.divide(model.config.ffn_dim)
    most = 0
    for batch in (1 << i for i in range(MAX_BATCH.bit_length())):
        if 1 - (1 - density) ** batch < crossover(ffn, D, model.dtype, batch, model.tp.device):
            most = batch
    return most


def contribution(model: OPTModel, kind: Kind, layer: int, mean: Tensor | None = None) -> nn.Module:
    """What tells how much each neuron or head of a layer adds to the residual stream, from its output."""
    decoder = model.layers[layer - model.layer_range.start]
    wide = torch.promote_types(model.dtype, torch.float32)
    if kind == "mlp":
        return NeuronContribution(decoder.mlp.fc2.weight.value.to(wide).norm(dim=-1))
    mean = None if mean is None else mean.to(model.tp.device, wide)
    return HeadContribution(_out_proj(model, layer).to(wide), mean)


def at_density(manifest: Manifest, density: float, directory: Path) -> OperatingPoint:
    """The point at a density between two calibrated ones; what is dense in one of them is dense.

    Raises:
        ValueError: the density is outside what was calibrated.
    """
    in_use = any(t is not None for p in manifest.points for t in p.thresholds["mlp"])
    kind: Kind = "mlp" if manifest.of("mlp") and in_use else "heads"
    points = sorted(manifest.points, key=lambda p: _density(p, kind))
    low, high = _density(points[0], kind), _density(points[-1], kind)
    if not low <= density <= high:
        raise ValueError(
            f"density={density} is outside the calibrated range of {directory}, {low:.4f} to {high:.4f}"
        )
    upper = next(i for i, p in enumerate(points) if density <= _density(p, kind))
    a, b = points[max(upper - 1, 0)], points[upper]
    width = _density(b, kind) - _density(a, kind)
    t = (density - _density(a, kind)) / width if width else 1.0
    if t == 1:
        return b

    def between(x: float | None, y: float | None) -> float | None:
        return None if x is None or y is None else x + t * (y - x)

    return OperatingPoint(
        thresholds={
            k: [between(x, y) for x, y in zip(a.thresholds[k], b.thresholds[k], strict=True)]
            for k in a.thresholds
        },
        mlp_density=a.mlp_density + t * (b.mlp_density - a.mlp_density),
        head_density=a.head_density + t * (b.head_density - a.head_density),
        ppl_increase=a.ppl_increase + t * (b.ppl_increase - a.ppl_increase),
        kl=a.kl + t * (b.kl - a.kl),
    )


def _density(point: OperatingPoint, kind: Kind) -> float:
    return point.mlp_density if kind == "mlp" else point.head_density


def lossless(model: OPTModel, sharing: Sharing = "union", dense_until: int = 0) -> Policy:
    """The oracle at threshold 0: a neuron that is not live adds nothing, so nothing is lost."""
    units = [
        Unit("mlp", layer, None, contribution(model, "mlp", layer), sees_truth=True)
        for layer in model.layer_range
    ]
    return Policy(units, model.config.num_layers, name=LOSSLESS, sharing=sharing, dense_until=dense_until)


def _out_proj(model: OPTModel, layer: int) -> Tensor:
    weight: Tensor = model.layers[layer - model.layer_range.start].self_attn.out_proj.weight.value
    out_proj: Tensor = weight.unflatten(0, (-1, model.config.head_dim))  # [N, H, D]
    return out_proj


def _head_mean(model: OPTModel, layer: int, mean: Tensor) -> HeadMean:
    out_proj = _out_proj(model, layer)
    mean = mean.to(out_proj)
    return HeadMean(mean.to(model.dtype), torch.einsum("nh,nhd->d", mean, out_proj).to(model.dtype))
