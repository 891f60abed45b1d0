"""A directory of predictors: ``manifest.json`` and ``predictors.safetensors``.

The manifest says what model the predictors are of, which tap each reads, how they were made, on which texts,
and the thresholds of every calibrated point. Tensors are in the model's own order of neurons and heads,
whatever number of ranks made them, and each rank reads its own rows.
"""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dejavu.parallel.groups import TPGroup
from dejavu.predictors.networks import (
    LowRank,
    Random,
    Rows,
    SimHash,
    Static,
    dequantise,
    quantise,
    scales_a_row,
)
from dejavu.predictors.selection import KINDS, Kind, Tap
from dejavu.profiles.records import write_file

MANIFEST, TENSORS = "manifest.json", "predictors.safetensors"
Method = Literal["predicted", "svd", "sign", "lsh", "quantized", "static", "random", "oracle"]


Key = Literal["mlp", "heads", "refine"]
Bits = Literal[2, 3, 4, 8, 16]


class Strict(BaseModel):
    """What a file of ours holds: no field more, no number that is not finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelIdentity(Strict):
    """Whose predictors they are. ``fingerprint`` is a hash of the architecture and of sampled fc1 rows."""

    fingerprint: str
    hidden_size: int
    ffn_dim: int
    num_layers: int = Field(ge=1)
    num_heads: int

    def size(self, kind: Kind) -> int:
        """How many neurons or heads a layer has."""
        return self.ffn_dim if kind == "mlp" else self.num_heads


class Entry(Strict):
    """How the neurons or heads of one layer are chosen; ``dense``: they are not, all are computed."""

    kind: Kind
    layer: int = Field(ge=0)
    dense: bool = False
    method: Method = "predicted"
    tap: str | None = Field(default=None, pattern=r"^(attn_in|mlp_in)\[\d+\]$")
    rank: int | None = Field(default=None, ge=1)
    bits: Bits = 16
    relu: bool = False
    seed: int = 0
    refine: "Entry | None" = None
    held_out: dict[str, float] | None = None  # at the default point: recall, precision, density, ...

    @property
    def name(self) -> str:
        return f"{self.kind}.{self.layer}"

    def read_bytes(self, model: ModelIdentity) -> float:
        """What one token reads of the predictor (with one rank; with more, each reads the first layer)."""
        D, n = model.hidden_size, model.size(self.kind)
        if self.dense or self.method in ("static", "random", "oracle"):
            return 0.0
        if self.method in ("predicted", "svd"):
            assert self.rank is not None
            return _matrix_bytes(self.rank, D, self.bits) + _matrix_bytes(n, self.rank, self.bits) + 2 * n
        if self.method == "lsh":
            assert self.rank is not None
            return 2 * self.rank * D + n * self.rank / 8 + 4 * n
        bits = 1 if self.method == "sign" else self.bits
        return _matrix_bytes(n, D, bits) + 2 * n


def _matrix_bytes(rows: int, columns: int, bits: int) -> float:
    scale = {16: 0, 8: 4}.get(bits, 2)
    return rows * (columns * bits / 8 + scale * scales_a_row(columns, bits))


class OperatingPoint(Strict):
    """One calibrated setting: a threshold for each layer and kind (None: dense), and what it measured.

    ``refine`` are the thresholds of the second stages. Densities are means over tokens and layers.
    """

    thresholds: dict[Key, list[float | None]]
    mlp_density: float = Field(ge=0, le=1)
    head_density: float = Field(ge=0, le=1)
    ppl_increase: float
    kl: float


class Source(Strict):
    """A text that was used: ``file``, the hash of all of it, and which characters of it."""

    use: Literal["train", "calibrate"]
    file: str
    sha256: str
    start: int
    stop: int
    tokens: int


class Manifest(Strict):
    """All of ``manifest.json``."""

    format: Literal[1] = 1
    model: ModelIdentity
    source_fingerprint: str | None = None  # of the model that this one was converted from
    method: Method
    lookahead: str
    entries: list[Entry]
    sources: list[Source] = []
    commands: list[str] = []
    target: str | None = None  # what the default point was calibrated to
    default: int | None = None
    points: list[OperatingPoint] = []  # the least dense first

    def of(self, kind: Kind) -> list[Entry]:
        """The entries of a kind, by layer; empty if it is left dense as a whole."""
        return sorted((e for e in self.entries if e.kind == kind), key=lambda e: e.layer)


def read_manifest(directory: Path) -> Manifest:
    """Reads and checks ``manifest.json``.

    Raises:
        ValueError: missing, damaged, of another format, or without one of the layers.
    """
    path = directory / MANIFEST
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{directory} is no directory of predictors: it has no {MANIFEST}") from None
    except ValidationError as e:
        raise damage(path, e) from None
    _check(manifest, path)
    return manifest


def damage(path: Path, error: ValidationError) -> ValueError:
    """What is wrong with a file, in one line: the first thing that is."""
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"])) or "the file"
    return ValueError(f"{path} is damaged: {where}: {first['msg']}")


def _check(manifest: Manifest, path: Path) -> None:
    layers = list(range(manifest.model.num_layers))
    for kind in KINDS:
        found = [entry.layer for entry in manifest.of(kind)]
        if found and found != layers:
            odd = sorted(set(layers) ^ set(found)) or found
            raise ValueError(
                f"{path}: {kind} of layer {odd[0]} is missing, double or too much; expected 0 to {layers[-1]}"
            )
    if not manifest.entries:
        raise ValueError(f"{path} has no predictors")
    for entry in manifest.entries:
        for stage in filter(None, (entry, entry.refine)):
            if stage.dense:
                continue
            if stage.tap is None and stage.method not in ("static", "random", "oracle"):
                raise ValueError(f"{path}: {entry.name} has no tap to read")
            if stage.rank is None and stage.method in ("predicted", "svd", "lsh"):
                raise ValueError(f"{path}: {entry.name} has no rank")
            if stage.tap is not None:
                check_tap(stage.kind, stage.layer, Tap.parse(stage.tap), path)
    for point in manifest.points:
        for key, thresholds in point.thresholds.items():
            if len(thresholds) != len(layers):
                raise ValueError(f"{path}: {len(thresholds)} thresholds for {key}, expected {len(layers)}")
    if manifest.default is not None and not 0 <= manifest.default < len(manifest.points):
        raise ValueError(f"{path}: default point {manifest.default} of {len(manifest.points)}")


def check_tap(kind: Kind, layer: int, tap: Tap, path: Path) -> None:
    """A tap must be passed before the layer's block is asked.

    Raises:
        ValueError: it is not.
    """
    last = Tap.into(kind, layer)
    if (tap.layer, tap.point) > (last.layer, last.point):
        raise ValueError(f"{path}: {kind} of layer {layer} are predicted from {tap}, which comes later")


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Writes ``manifest.json`` beside itself and renames."""
    text = json.dumps(manifest.model_dump(mode="json", exclude_defaults=False), indent=1)
    write_file(directory / MANIFEST, text + "\n")


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes a safetensors file beside ``path`` and renames."""
    beside = path.with_name(path.name + ".partial")
    beside.touch()
    mode = beside.stat().st_mode  # the user's own: the library's files would be for their owner alone
    save_file({name: tensor.contiguous().cpu() for name, tensor in sorted(tensors.items())}, beside)
    beside.chmod(mode)
    with beside.open("rb+") as file:
        os.fsync(file.fileno())
    beside.replace(path)


def pack(name: str, matrix: Tensor, bits: int) -> dict[str, Tensor]:
    """A matrix as it is stored: fp16, or codes (one a byte; kernels may pack them) and scales."""
    if bits == 16:
        if not matrix.half().isfinite().all():
            raise ValueError(f"{name}: a weight of {float(matrix.abs().max()):.3g} does not fit 16 bits")
        return {name: matrix.half()}
    codes, scales = quantise(matrix, bits)
    return {f"{name}.codes": codes, f"{name}.scales": scales}


class PredictorTensors:
    """The tensors of a directory; a rank reads its own rows of what is split.

    Raises:
        ValueError: the file is missing or damaged, a tensor is missing or of another shape, or not finite.
    """

    def __init__(self, directory: Path, model: ModelIdentity, tp: TPGroup) -> None:
        self.path = directory / TENSORS
        self.model, self.tp = model, tp
        try:
            self.path.open("rb").close()
            self._file = safe_open(self.path, framework="pt")
            self._names = set(self._file.keys())
        except FileNotFoundError:
            raise ValueError(f"{directory} has no {TENSORS}") from None
        except (SafetensorError, OSError) as e:
            raise ValueError(f"{self.path} is damaged or no safetensors file: {e}") from None

    def scorer(self, name: str, entry: Entry, truth: Callable[[], nn.Module]) -> nn.Module:
        """The module of an entry with this rank's rows; the oracle's is the ``truth``."""
        n, D = self.model.size(entry.kind), self.model.hidden_size
        match entry.method:
            case "predicted" | "svd":
                r = entry.rank or 0
                scorer: nn.Module = LowRank(
                    self.matrix(f"{name}.down", (r, D), entry.bits, split=False),
                    self.matrix(f"{name}.up", (n, r), entry.bits),
                    self.tensor(f"{name}.bias", (n,)),
                    relu=entry.relu,
                )
            case "quantized" | "sign":
                weight = self.matrix(f"{name}.weight", (n, D), entry.bits)
                scorer = Rows(weight, self.tensor(f"{name}.bias", (n,)), signs=entry.method == "sign")
            case "lsh":
                M = entry.rank or 0
                scorer = SimHash(
                    self.tensor(f"{name}.planes", (M, D), split=False),
                    self.tensor(f"{name}.codes", (n, M)),
                    self.tensor(f"{name}.norms", (n,)),
                    self.tensor(f"{name}.bias", (n,)),
                )
            case "static":
                scorer = Static(self.tensor(f"{name}.scores", (n,)))
            case "random":
                rows = self.tp.shard(n)
                salt = 2 * entry.layer + (entry.kind == "heads")
                scorer = Random(torch.arange(rows.start, rows.stop), layer=salt, seed=entry.seed)
            case "oracle":
                scorer = truth()
        return scorer

    def head_mean(self, layer: int) -> Tensor | None:
        """What stands in for heads left out: ``[N_local, H]``, or None where nothing does."""
        name, N = f"heads.{layer}.mean", self.model.num_heads
        if name not in self._names:
            return None
        return self.tensor(name, (N, self.model.hidden_size // N))

    def matrix(self, name: str, shape: tuple[int, int], bits: int, *, split: bool = True) -> Tensor:
        """A matrix as `pack` stored it, in fp32; this rank's rows of it if ``split``."""
        if bits == 16:
            return self.tensor(name, shape, split=split)
        codes = self.tensor(f"{name}.codes", shape, split=split)
        scales = (shape[0], scales_a_row(shape[1], bits))
        return dequantise(codes, self.tensor(f"{name}.scales", scales, split=split))

    def tensor(self, name: str, shape: tuple[int, ...], *, split: bool = True) -> Tensor:
        """A tensor of the global ``shape``, in fp32; this rank's rows of it if ``split``."""
        if name not in self._names:
            raise ValueError(f"{self.path} has no tensor {name}, which its manifest needs")
        part = self._file.get_slice(name)
        if tuple(part.get_shape()) != shape:
            raise ValueError(
                f"{self.path}: {name} has shape {part.get_shape()}, the manifest expects {list(shape)}"
            )
        try:
            tensor: Tensor = part[self.tp.shard(shape[0]) if split else slice(None)]
        except SafetensorError as e:
            raise ValueError(f"{self.path} is damaged: {name}: {e}") from None
        tensor = tensor.float()
        if not tensor.isfinite().all():
            raise ValueError(f"{self.path}: {name} holds numbers that are not finite")
        return tensor
