"""Makes predictors from traces: one for each layer and kind, each by itself, shared out over the ranks.

A finished predictor is a file in ``NAME.partial``; started again, training goes on with what is missing.

Shape legend: T tokens, D hidden, F ffn, N heads, H head dim, n neurons or heads, r rank.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, get_args

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dejavu.parallel.groups import TPGroup
from dejavu.predictors.collect import Traces
from dejavu.predictors.files import (
    TENSORS,
    Bits,
    Entry,
    Manifest,
    Method,
    ModelIdentity,
    PredictorTensors,
    pack,
    read_manifest,
    save_tensors,
    write_manifest,
)
from dejavu.predictors.fitting import (
    Descent,
    as_log_odds,
    head_contributions,
    head_loss,
    neuron_contributions,
    neuron_loss,
    random_network,
    regress,
    rescale,
)
from dejavu.predictors.networks import LowRank, fold_norm, low_rank_of
from dejavu.predictors.selection import KINDS, Kind, Tap
from dejavu.profiles.records import write_file
from dejavu.runtime.config import OPTConfig
from dejavu.runtime.sparsity import identity
from dejavu.runtime.weights import Checkpoint, fingerprint

OnProgress = Callable[[int, int], None]
Lookahead = Literal["none", "half", "one", "two"]
_HALVES: Mapping[Lookahead, int] = {"none": 0, "half": 1, "one": 2, "two": 4}
_OF_FC1 = ("svd", "sign", "lsh", "quantized")
_PLAN = "plan.json"
# Traces of a layer up to this size are held on the device; larger ones stay mapped.
_RESIDENT_BYTES = 2**33


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """What to make.

    ``method``: ``predicted`` is trained; ``svd``, ``sign``, ``lsh`` and ``quantized`` are made of fc1 and
    leave heads dense (``svd`` with traces is the best for what the tap shows, in closed form); ``static``,
    ``random`` and ``oracle`` are what to compare with. ``lookahead``: how many layers before its block a
    predictor reads the stream. ``rank`` of the MLP's and ``head_rank`` of the heads' predictors, ``ranks``
    the exceptions by name (``mlp.0``); for ``lsh`` the number of planes. ``bits`` of every matrix;
    ``refine_bits``: a second stage scores what the first one chose by fc1 rows of so few bits. ``labels``: by
    ``contribution`` to the residual or by the ``paper``'s rule (live neurons; the norm of a head's own
    output). ``weighting``: a live neuron counts ``contribution ** weighting`` times in the loss.

    Raises:
        ValueError: a value out of its range.
    """

    method: Method = "predicted"
    kinds: tuple[Kind, ...] = ("mlp", "heads")
    lookahead: Lookahead = "half"
    rank: int = 256
    head_rank: int = 64
    ranks: Mapping[str, int] = field(default_factory=dict)
    bits: Bits = 16
    refine_bits: Bits | None = None
    labels: Literal["contribution", "paper"] = "contribution"
    weighting: float = 1.0
    epochs: float = 8.0
    batch: int = 2048
    lr: float = 2e-3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.lookahead not in _HALVES:
            raise ValueError(f"lookahead={self.lookahead!r} is unknown: use {', '.join(_HALVES)}")
        if self.method not in get_args(Method):
            raise ValueError(f"method={self.method!r} is unknown: use {', '.join(get_args(Method))}")
        if not self.kinds or not set(self.kinds) <= set(KINDS) or len(set(self.kinds)) < len(self.kinds):
            raise ValueError(f"kinds={self.kinds}: expected one or both of {' and '.join(KINDS)}")
        no_scores = self.method in ("static", "random", "oracle")
        if self.refine_bits is not None and (no_scores or "mlp" not in self.kinds):
            raise ValueError(f"refine_bits={self.refine_bits} is for predictors of the MLP that read a tap")
        if self.bits != 16 and (no_scores or self.method in ("sign", "lsh")):
            raise ValueError(f"bits={self.bits}: {self.method} has no weights to store in fewer bits")
        if self.kinds == ("heads",) and self.method in _OF_FC1:
            raise ValueError(f"method={self.method} is made of fc1 and cannot choose heads")
        if self.labels not in ("contribution", "paper"):
            raise ValueError(f"labels={self.labels!r} is unknown: use contribution or paper")
        for name, allowed in (("bits", (2, 3, 4, 8, 16)), ("refine_bits", (None, 2, 3, 4, 8))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)} is not one of {allowed}")
        for name in ("rank", "head_rank", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is less than 1")
        for name, rank in self.ranks.items():
            if rank < 1:
                raise ValueError(f"rank {rank} of {name} is less than 1")
        if not 0 < self.epochs <= 1000 or not 0 < self.lr < 1 or not 0 <= self.weighting <= 4:
            raise ValueError(
                f"epochs={self.epochs}, lr={self.lr}, weighting={self.weighting}: "
                "expected epochs up to 1000, lr below 1, weighting of 0 to 4"
            )

    def entry(self, kind: Kind, layer: int) -> Entry:
        """How the manifest describes the predictor of one layer and kind."""
        tap = Tap.into(kind, layer).shift(-_HALVES[self.lookahead])
        if kind == "heads" and (self.method in _OF_FC1 or (tap.layer < 0 and layer == 0)):
            return Entry(kind=kind, layer=layer, dense=True, method=self.method)
        if self.method in ("static", "random", "oracle"):
            return Entry(kind=kind, layer=layer, method=self.method, seed=self.seed)
        refine = None
        if self.refine_bits is not None and kind == "mlp":
            own = Tap("mlp_in", layer)
            refine = Entry(kind=kind, layer=layer, method="quantized", tap=str(own), bits=self.refine_bits)
        rank = self.ranks.get(f"{kind}.{layer}", self.rank if kind == "mlp" else self.head_rank)
        return Entry(
            kind=kind,
            layer=layer,
            method=self.method,
            tap=str(max(tap, Tap("attn_in", 0), key=lambda t: (t.layer, t.point))),
            rank=rank if self.method in ("predicted", "svd", "lsh") else None,
            bits=16 if self.method == "sign" else self.bits,
            relu=kind == "heads",
            seed=self.seed,
            refine=refine,
        )


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """What predictors of one layer are made from, whole and in fp32: fc1 as a function of the standardised
    stream (``fc1 [F, D]``, ``bias [F]``), ``fc2_norms [F]``, ``out_proj [N, H, D]``."""

    fc1: Tensor
    bias: Tensor
    fc2_norms: Tensor
    out_proj: Tensor

    @classmethod
    def read(
        cls, checkpoint: Checkpoint, config: OPTConfig, layer: int, device: torch.device
    ) -> "LayerWeights":
        """Reads them from a checkpoint."""
        D, ffn_dim = config.hidden_size, config.ffn_dim
        prefix = f"model.decoder.layers.{layer}"
        norm = f"{prefix}.{'final' if config.do_layer_norm_before else 'self_attn'}_layer_norm"
        affine = config.layer_norm_elementwise_affine

        def read(name: str, *shape: int) -> Tensor:
            return checkpoint.read(name, shape).to(device, torch.float32, copy=True)

        fc1, bias = fold_norm(
            read(f"{prefix}.fc1.weight", ffn_dim, D),
            read(f"{prefix}.fc1.bias", ffn_dim) if config.enable_bias else None,
            read(f"{norm}.weight", D) if affine else None,
            read(f"{norm}.bias", D) if affine else None,
            pre_norm=config.do_layer_norm_before,
        )
        out_proj = read(f"{prefix}.self_attn.out_proj.weight", D, D)
        return cls(
            fc1=fc1,
            bias=bias,
            fc2_norms=read(f"{prefix}.fc2.weight", D, ffn_dim).norm(dim=0),
            out_proj=out_proj.T.reshape(config.num_heads, config.head_dim, D),
        )


def train(
    model_dir: Path,
    traces_dir: Path | None,
    out: Path,
    config: TrainConfig,
    *,
    tp: TPGroup,
    start: Path | None = None,
    command: str = "",
    on_progress: OnProgress | None = None,
) -> Manifest:
    """Makes a directory of predictors, one for each layer and kind.

    Args:
        model_dir: the model, in Hugging Face's format.
        traces_dir: what `collect` wrote; None for methods that need none.
        out: the directory to make. ``out`` with ``.partial`` appended is gone on with, if it is there.
        start: predictors to go on training, of the same shapes.
        command: what to note in the manifest as the way to make it.

    Raises:
        ValueError: traces or ``start`` of another model or tap, numbers that are not finite, no traces where
            they are needed, ``out`` exists, or ``.partial`` was begun otherwise.
    """
    recipe = tp.agree(lambda: Recipe.read(model_dir, traces_dir, config, start, tp.device))
    partial = out.with_name(out.name + ".partial")
    tp.agree(lambda: recipe.begin(out, partial, tp))

    def work() -> None:
        for entry in recipe.todo[tp.rank :: tp.size]:
            path = partial / f"{entry.name}.safetensors"
            if not path.is_file():
                save_tensors(path, recipe.make(entry))
            if on_progress is not None:
                on_progress(len(list(partial.glob("*.safetensors"))), len(recipe.todo))

    tp.agree(work)
    manifest = recipe.manifest(command)
    tp.agree(lambda: _finish(recipe, manifest, out, partial) if tp.rank == 0 else None)
    return manifest


def _finish(recipe: "Recipe", manifest: Manifest, out: Path, partial: Path) -> None:
    """Joins the predictors into one file and gives the directory its name."""
    parts = [partial / f"{entry.name}.safetensors" for entry in recipe.todo]
    save_tensors(partial / TENSORS, {k: v for part in parts for k, v in load_file(part).items()})
    write_manifest(partial, manifest)
    for path in (*parts, partial / _PLAN):
        path.unlink()
    partial.rename(out)


@dataclass(frozen=True, slots=True)
class Recipe:
    """What is made, of which model, from which traces."""

    config: TrainConfig
    model: ModelIdentity
    architecture: OPTConfig
    checkpoint: Checkpoint
    traces: Traces | None
    start: PredictorTensors | None
    start_manifest: Manifest | None
    device: torch.device

    @classmethod
    def read(
        cls,
        model_dir: Path,
        traces_dir: Path | None,
        config: TrainConfig,
        start: Path | None,
        device: torch.device,
    ) -> "Recipe":
        """Checks that all of it belongs together. Raises: see `train`."""
        architecture = OPTConfig.from_json(model_dir / "config.json")
        checkpoint = Checkpoint(model_dir)
        model = identity(architecture, fingerprint(architecture, checkpoint))
        traces = None if traces_dir is None else Traces(traces_dir)
        if traces is not None and traces.info.model != model:
            raise ValueError(f"{traces_dir} are traces of another model than {model_dir}")
        if traces is None and config.method in ("predicted", "static"):
            raise ValueError(f"method {config.method} needs --traces")
        if traces is not None and config.method in ("sign", "lsh", "quantized"):
            raise ValueError(f"method {config.method} makes nothing of traces: leave --traces out")
        start_manifest = None if start is None else read_manifest(start)
        start_tensors = None
        if start is not None and start_manifest is not None:
            if start_manifest.model != model:
                raise ValueError(f"{start} is of another model than {model_dir}")
            start_tensors = PredictorTensors(start, model, TPGroup())
        recipe = cls(config, model, architecture, checkpoint, traces, start_tensors, start_manifest, device)
        if unknown := set(config.ranks) - {entry.name for entry in recipe.entries if entry.rank is not None}:
            raise ValueError(
                f"there is no predictor {min(unknown)} that has a rank: they are called KIND.LAYER, as mlp.0"
            )
        recipe._check_start()
        if start is not None and config.method != "predicted":
            raise ValueError(f"method {config.method} is not trained and starts from nothing")
        return recipe

    @property
    def entries(self) -> list[Entry]:
        """All of the manifest's."""
        layers = range(self.model.num_layers)
        return [self.config.entry(kind, layer) for kind in self.config.kinds for layer in layers]

    @property
    def todo(self) -> list[Entry]:
        """Those that have tensors."""
        return [entry for entry in self.entries if not entry.dense]

    def begin(self, out: Path, partial: Path, tp: TPGroup) -> None:
        """Makes or checks the directory."""
        if out.exists():
            raise ValueError(f"{out} exists already")
        plan = json.dumps(
            {
                "config": asdict(self.config),
                "model": self.model.model_dump(),
                "traces": None if self.traces is None else self.traces.info.model_dump(),
                "start": None if self.start_manifest is None else self.start_manifest.model_dump(),
            }
        )
        path = partial / _PLAN
        if path.is_file():
            if path.read_text() != plan:
                raise ValueError(f"{partial} was begun with other options or traces: remove it first")
        elif tp.rank == 0:
            if partial.exists():
                shutil.rmtree(partial)  # it was killed before it had a plan
            partial.mkdir(parents=True)
            write_file(path, plan)

    def manifest(self, command: str) -> Manifest:
        """Not calibrated yet."""
        earlier = [] if self.start_manifest is None else self.start_manifest.commands
        collected = "" if self.traces is None else self.traces.info.command
        sources = [] if self.start_manifest is None else self.start_manifest.sources
        if self.traces is not None and self.traces.info.source not in sources:
            sources = [*sources, self.traces.info.source]
        return Manifest(
            model=self.model,
            method=self.config.method,
            lookahead=self.config.lookahead,
            entries=self.entries,
            sources=sources,
            commands=[*earlier, *filter(None, [collected, command])],
        )

    def make(self, entry: Entry) -> dict[str, Tensor]:
        """The tensors of one predictor."""
        weights = LayerWeights.read(self.checkpoint, self.architecture, entry.layer, self.device)
        tensors: dict[str, Tensor] = {}
        if entry.kind == "heads" and self.traces is not None:
            tensors["mean"] = self._head_outputs(entry.layer).float().mean(0)
        mean = tensors.get("mean")
        match entry.method:
            case "predicted":
                network = self._trained(entry, weights, mean)
                tensors |= _packed(network, entry.bits)
            case "svd":
                assert entry.rank is not None
                if self.traces is None:
                    network = LowRank(*low_rank_of(weights.fc1, entry.rank), weights.bias)
                else:
                    network = self._regressed(entry, weights, self._tap(entry))
                tensors |= _packed(network, entry.bits)
            case "quantized":
                tensors |= pack("weight", weights.fc1, entry.bits) | {"bias": weights.bias}
            case "sign":
                scale = weights.fc1.abs().mean(-1, keepdim=True)
                tensors |= {"weight": weights.fc1.sign() * scale, "bias": weights.bias}
            case "lsh":
                tensors |= self._hashed(entry, weights)
            case "static":
                tensors["scores"] = self._mean_contributions(entry, weights, mean)
        if entry.refine is not None:
            tensors |= pack("refine.weight", weights.fc1, entry.refine.bits)
            tensors["refine.bias"] = weights.bias.clone()
        return {f"{entry.name}.{name}": tensor for name, tensor in tensors.items()}

    def _trained(self, entry: Entry, weights: LayerWeights, mean: Tensor | None) -> LowRank:
        """Gradient descent on the traces, from ``start`` or (neurons) the regression of pre-activations."""
        config, z = self.config, self._tap(entry)
        seed = config.seed * 1000 + entry.layer
        descent = Descent(epochs=config.epochs, batch=config.batch, lr=config.lr, bits=entry.bits, seed=seed)
        start = None if self.start is None else self.start.scorer(entry.name, entry, _no_truth)
        assert start is None or isinstance(start, LowRank)
        if entry.kind == "mlp":
            network = start or as_log_odds(self._regressed(entry, weights, z))
            loss = neuron_loss(
                self._codes(entry.layer),
                weights.fc2_norms,
                skip=0.001 if config.labels == "contribution" else 0.0,
                weighting=config.weighting,
            )
            descent.run(network.to(self.device), z, loss)
            return network
        target = self._head_contributions(entry.layer, weights, mean).log()
        centre, spread = target.mean(), target.std().clamp(min=1e-6)
        network = random_network(
            self.model.hidden_size, entry.rank or 0, self.model.num_heads, relu=entry.relu, seed=seed
        )
        if start is not None:
            network = start
            rescale(network, 1 / spread, -centre / spread)
        descent.run(network.to(self.device), z, head_loss((target - centre) / spread))
        rescale(network, spread, centre)
        return network

    def _regressed(self, entry: Entry, weights: LayerWeights, z: Tensor) -> LowRank:
        assert self.traces is not None and entry.rank is not None
        own = self._read_tap(Tap("mlp_in", entry.layer))
        return regress(z, own, weights.fc1, weights.bias, entry.rank)

    def _mean_contributions(self, entry: Entry, weights: LayerWeights, mean: Tensor | None) -> Tensor:
        if entry.kind == "mlp":
            return neuron_contributions(self._codes(entry.layer), weights.fc2_norms)
        return self._head_contributions(entry.layer, weights, mean).mean(0)

    def _head_contributions(self, layer: int, weights: LayerWeights, mean: Tensor | None) -> Tensor:
        """``fp32[T, N]``, more than 0; by the paper's rule the norms of the heads' own outputs."""
        outputs = self._head_outputs(layer)
        if self.config.labels == "paper":
            norms: Tensor = outputs.float().norm(dim=-1)
            return norms.clamp(min=1e-6)
        return head_contributions(outputs, weights.out_proj, mean)

    def _hashed(self, entry: Entry, weights: LayerWeights) -> dict[str, Tensor]:
        assert entry.rank is not None
        generator = torch.Generator().manual_seed(entry.seed * 1000 + entry.layer)
        planes = torch.randn(entry.rank, weights.fc1.shape[1], generator=generator)
        codes = torch.where(weights.fc1 @ planes.to(self.device).T > 0, 1, -1).to(torch.int8)
        return {"planes": planes, "codes": codes, "norms": weights.fc1.norm(dim=-1), "bias": weights.bias}

    def _check_start(self) -> None:
        if self.start_manifest is None:
            return
        theirs = {entry.name: entry for entry in self.start_manifest.entries}
        for entry in self.entries:
            if entry.name not in theirs:
                raise ValueError(f"the predictors to start from have no {entry.name}")
            there, here = (e.model_dump(exclude={"held_out"}) for e in (theirs[entry.name], entry))
            if differ := [f"{k} {there[k]} there, {here[k]} here" for k in here if there[k] != here[k]]:
                what = "; ".join(differ)
                raise ValueError(f"the predictors to start from have another {entry.name}: {what}")

    def _tap(self, entry: Entry) -> Tensor:
        """What the entry's predictor reads, ``fp16[T, D]``."""
        assert entry.tap is not None
        return self._read_tap(Tap.parse(entry.tap))

    def _read_tap(self, tap: Tap) -> Tensor:
        assert self.traces is not None
        z = self.traces.tap(tap)
        if not all(part.isfinite().all() for part in z.split(65536)):
            raise ValueError(f"{self.traces.directory}: {tap} holds numbers that are not finite")
        return z.to(self.device) if z.nbytes <= _RESIDENT_BYTES else z

    def _codes(self, layer: int) -> list[Tensor]:
        """The activations of a layer's neurons as bytes, in slices of columns."""
        assert self.traces is not None
        codes = self.traces.neurons(layer)
        resident = sum(c.nbytes for c in codes) <= _RESIDENT_BYTES
        return [c.to(self.device) for c in codes] if resident else codes

    def _head_outputs(self, layer: int) -> Tensor:
        """``fp16[T, N, H]``."""
        assert self.traces is not None
        outputs = torch.cat([h.to(self.device) for h in self.traces.heads(layer)], dim=1)
        if not outputs.isfinite().all():
            raise ValueError(f"{self.traces.directory}: head outputs of layer {layer} are not finite")
        return outputs


def _packed(network: LowRank, bits: Bits) -> dict[str, Tensor]:
    down, up, bias = network.down.data, network.up.data, network.bias.data
    return {**pack("down", down, bits), **pack("up", up, bits), "bias": bias}


def _no_truth() -> nn.Module:
    raise AssertionError("a trained predictor needs no truth")
