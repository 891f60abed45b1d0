"""Spreads what is often chosen evenly over ranks: the same function, its neurons and heads in another order.

Every rank computes what it chooses of its own neurons and heads, and the slowest sets the pace. So those
that are chosen at the same tokens are dealt into different ones of `BLOCKS` equal blocks, which 2, 4, 8 or 16
ranks share. (Equal frequencies alone gain little: of 1.232 times the mean on the slowest of 8 ranks 1.218 is
left, and 1.150 this way; opt-books-65m.) The model is written anew with the rows of fc1 and of the attention
projections and the columns of fc2 and out_proj in that order, and with it its predictors; whatever runs them
knows nothing of it.

Shape legend: B windows at a time, S tokens of a window, T tokens in all, n all neurons or heads of a layer.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import gcd
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dejavu.parallel.collectives import all_gather_last
from dejavu.parallel.groups import TPGroup
from dejavu.predictors.corpus import Corpus
from dejavu.predictors.files import TENSORS, Manifest, read_manifest, save_tensors, write_manifest
from dejavu.predictors.samples import UnitKey
from dejavu.predictors.selection import KINDS, Kind, Policy, Truth, Unit
from dejavu.profiles.quality import whole_pass
from dejavu.profiles.records import existing_folder, write_file
from dejavu.runtime.config import OPTConfig
from dejavu.runtime.engine import Engine
from dejavu.runtime.sparsity import check_model, identity, load_policy
from dejavu.runtime.weights import Checkpoint, fingerprint

OnProgress = Callable[[str, int, int], None]
See = Callable[[UnitKey, Tensor], None]
Bits = npt.NDArray[np.uint8]

# A node has at most 16 GPUs that share a model; layers whose size 16 does not divide get fewer blocks.
BLOCKS = 16
# The numbers of ranks for which the spread is reported.
RANKS = (2, 4, 8)
PREDICTORS = "predictors"
_ORDERS = ("before", "after", "floor")
# Windows that are run together.
_BATCH = 8
_WEIGHTS = (".safetensors", ".bin", ".index.json", ".h5", ".msgpack", ".ot", ".pt", ".pth", ".onnx", ".gguf")
_SPLIT = re.compile(
    r"(?:model\.)?decoder\.layers\.(\d+)\."
    r"(?:(fc1)\.(?:weight|bias)|(fc2)\.weight|self_attn\.(?:([qkv]_proj)\.(?:weight|bias)|(out_proj)\.weight))"
)
# The tensors with which predictors read the stream; all others have a row for each neuron or head.
_SHARED = ("down", "down.codes", "down.scales", "planes")


@dataclass(frozen=True, slots=True)
class Balanced:
    """What `balance` found on text that it did not count on; see `Spread` for the rows."""

    rows: list[dict[str, Any]]
    manifest: Manifest


def balance(
    engine: Engine,
    model_dir: Path,
    predictors: Path,
    out: Path,
    counted: Corpus,
    reported: Corpus,
    *,
    command: str = "",
    on_progress: OnProgress | None = None,
) -> Balanced:
    """Writes ``out``, the model in its new order, and ``out/predictors``.

    Args:
        engine: of ``model_dir``.
        predictors: calibrated ones; their default point is what runs.
        counted: the text whose choices decide the order.
        reported: another text, on which the spread over ranks is measured in the old and the new order.
        command: what to note in the manifest.

    Raises:
        ValueError: ``out`` exists, the disk has too little space, the texts overlap, or the predictors are of
            another model, not calibrated, damaged, or choose at random.
    """
    tp, config = engine.tp, engine.model.config
    manifest, policy = tp.agree(lambda: _check(engine, model_dir, predictors, out, counted, reported))
    chosen = record(engine, policy, counted.windows, on_progress)
    orders = deal_all(config, tp, chosen, on_progress)
    spread = Spread(orders, config)
    _watch(engine, policy, reported.windows, spread.see, "measuring the spread", on_progress)

    def write() -> Manifest | None:
        if tp.rank != 0:
            return None
        partial = _partial(out)
        (partial / PREDICTORS).mkdir(parents=True)
        write_model(model_dir, partial, orders, config, on_progress)
        written = write_predictors(predictors, partial, manifest, orders, config, command)
        partial.rename(out)
        return written

    written = tp.broadcast_object(tp.agree(write))
    assert written is not None
    return Balanced(spread.rows(), written)


def _check(
    engine: Engine, model_dir: Path, predictors: Path, out: Path, counted: Corpus, reported: Corpus
) -> tuple[Manifest, Policy]:
    if out.exists():
        raise ValueError(f"{out} exists already")
    if _partial(out).exists():
        raise ValueError(f"{_partial(out)} is left of a run that was not finished: remove it first")
    if counted.sha256 == reported.sha256 and counted.start < reported.stop and reported.start < counted.stop:
        raise ValueError(
            f"{counted.file}: what is counted (characters {counted.start} to {counted.stop}) and what is "
            f"reported (characters {reported.start} to {reported.stop}) overlap"
        )
    manifest = read_manifest(predictors)
    check_model(manifest, engine.model, engine.fingerprint, predictors)
    policy = load_policy(str(predictors), engine.model, engine.fingerprint, sharing="mask", dense_until=1)
    assert policy is not None
    if any(entry.method == "random" and not entry.dense for entry in manifest.entries):
        raise ValueError(f"{predictors} choose by a hash of the number: there is nothing to balance")
    if not policy.units:
        raise ValueError(f"{predictors} leave every layer dense: there is nothing to balance")
    needed = sum(p.stat().st_size for p in (*Checkpoint(model_dir).files, predictors / TENSORS) if p.exists())
    free = shutil.disk_usage(existing_folder(out)).free
    if free < needed:
        raise ValueError(f"{out} needs {needed / 1e9:.2f} GB, but the disk has {free / 1e9:.2f} GB left")
    return manifest, policy


def _partial(out: Path) -> Path:
    """What ``out`` is called until it is whole."""
    return out.with_name(out.name + ".partial")


class _Onlooker(Policy):
    """A policy for whole texts that shows what it chooses: ``see(key, mask bool[B, S, n])``."""

    def __init__(self, policy: Policy, tp: TPGroup, see: See) -> None:
        units = list(policy.units.values())
        super().__init__(units, policy.num_layers, sharing="mask", dense_until=policy.dense_until)
        self._tp, self._see = tp, see

    def count(self, unit: Unit, mask: Tensor, truth: Truth) -> None:
        self._see((unit.kind, unit.layer), all_gather_last(mask.to(torch.uint8), self._tp).bool())


def _watch(
    engine: Engine, policy: Policy, windows: Tensor, see: See, stage: str, on_progress: OnProgress | None
) -> None:
    onlooker, done = _Onlooker(policy, engine.tp, see), 0
    for batch in windows.split(_BATCH):
        whole_pass(engine, batch[:, :-1].to(engine.tp.device), onlooker)
        done += len(batch)
        if on_progress is not None:
            on_progress(stage, done, len(windows))


def record(
    engine: Engine, policy: Policy, windows: Tensor, on_progress: OnProgress | None = None
) -> dict[UnitKey, Bits]:
    """What each token chooses, ``bool[T, n]`` of each unit as packed bits. Each rank gets the layers that it
    will `deal`: from its own number on, every ``tp.size``-th.

    Args:
        policy: with ``sharing="mask"``.
        windows: ``[windows, S + 1]``.
    """
    tp = engine.tp
    bits: dict[UnitKey, list[Bits]] = {}

    def see(key: UnitKey, mask: Tensor) -> None:
        if key[1] % tp.size == tp.rank:
            bits.setdefault(key, []).append(np.packbits(mask.flatten(0, 1).cpu().numpy(), axis=-1))

    _watch(engine, policy, windows, see, "looking at what is chosen", on_progress)
    return {key: np.concatenate(parts) for key, parts in bits.items()}


def blocks_of(n: int) -> int:
    """How many equal blocks a layer's ``n`` neurons or heads make."""
    return gcd(n, BLOCKS)


def deal(chosen: Tensor) -> Tensor:
    """The new order ``int64[n]``, old numbers by new places, for ``chosen bool[T, n]``.

    The most frequent first, each goes to the block where it meets the fewest that are chosen at the same
    tokens, which evens out the blocks' frequencies too. Blocks are then paired in the same way, pairs again,
    and so on, for the sake of few heads, whose blocks cannot be alike: so 2, 4, 8 and 16 ranks all get equal
    shares. Within a block the old order stays: the frequent ones lie anywhere in it, so that numbers of ranks
    which cut blocks fare well too.
    """
    blocks = blocks_of(chosen.shape[1])
    size, rows = chosen.shape[1] // blocks, chosen.T.contiguous()
    frequency = rows.sum(-1).tolist()
    members: list[list[int]] = [[] for _ in range(blocks)]
    loads = torch.zeros(len(chosen), blocks, dtype=torch.float64)  # of each token
    sums = [0] * blocks
    for i in sorted(range(len(rows)), key=lambda i: -frequency[i]):
        row = rows[i].double()
        met = (row @ loads).tolist()
        open_ = [b for b in range(blocks) if len(members[b]) < size]
        *_, block = min((met[b], sums[b], len(members[b]), b) for b in open_)
        members[block].append(i)
        loads[:, block] += row
        sums[block] += frequency[i]
    groups = [(loads[:, b], sorted(members[b])) for b in range(blocks)]
    while len(groups) > 1:
        groups = _paired(groups)
    return torch.tensor(groups[0][1])


def _paired(groups: list[tuple[Tensor, list[int]]]) -> list[tuple[Tensor, list[int]]]:
    """The largest first, each with the one that it meets least."""
    groups = sorted(groups, key=lambda group: -float(group[0].sum()))
    pairs = []
    while groups:
        load, members = groups.pop(0)
        _, _, partner = min(
            (float(load @ other), float(other.sum()), i) for i, (other, _) in enumerate(groups)
        )
        other, more = groups.pop(partner)
        pairs.append((load + other, [*members, *more]))
    return pairs


def deal_all(
    config: OPTConfig, tp: TPGroup, chosen: Mapping[UnitKey, Bits], on_progress: OnProgress | None = None
) -> dict[UnitKey, Tensor]:
    """`deal` for every layer and kind, the ranks sharing the layers.

    Where nothing is chosen all are equal, and are dealt too. At least one of the rows of fc1 by which a model
    is known changes: else the predictors of the old order would be taken for the new one's.
    """
    orders: dict[UnitKey, Tensor] = {}
    for layer in range(tp.rank, config.num_layers, tp.size):
        for kind in KINDS:
            n = config.ffn_dim if kind == "mlp" else config.num_heads
            bits = chosen.get((kind, layer))
            mask = torch.ones(1, n, dtype=torch.bool)
            if bits is not None:
                mask = torch.from_numpy(np.unpackbits(bits, axis=-1, count=n)).bool()
            orders[kind, layer] = deal(mask)
        if on_progress is not None:
            on_progress("dealing", layer + 1, config.num_layers)
    whole = {key: order for part in tp.gather_objects(orders) for key, order in part.items()}
    first = (0, config.ffn_dim // 2)
    if all(whole["mlp", layer][row] == row for layer in range(config.num_layers) for row in first):
        whole["mlp", 0] = whole["mlp", 0].flip(0)
    return whole


class Spread:
    """How evenly the choices of tokens fall on ranks, in the old order and in the new one, and how their
    number varies from token to token. Layers that are computed in full do not take part."""

    def __init__(self, orders: Mapping[UnitKey, Tensor], config: OPTConfig) -> None:
        self._orders = orders
        self._ranks = [r for r in RANKS if config.num_heads % r == config.ffn_dim % r == 0]
        self._loads: dict[tuple[Kind, int], Tensor] = {}  # sums of largest before, after, at best; of means
        self._chosen: dict[UnitKey, list[Tensor]] = {}

    def see(self, key: UnitKey, mask: Tensor) -> None:
        """Takes ``mask bool[B, S, n]`` into account."""
        total = mask.sum(-1)
        self._chosen.setdefault(key, []).append(total.flatten().cpu())
        dealt = mask[..., self._orders[key].to(mask.device)]
        for ranks in self._ranks:
            largest = [m.unflatten(-1, (ranks, -1)).sum(-1).amax(-1) for m in (mask, dealt)]
            at_best = (total + ranks - 1) // ranks
            sums = torch.stack([x.sum().double() for x in (*largest, at_best, total / ranks)]).cpu()
            place = key[0], ranks
            self._loads[place] = self._loads[place] + sums if place in self._loads else sums

    def rows(self) -> list[dict[str, Any]]:
        """For each kind and number of ranks what the slowest rank has over the mean, ``before`` and ``after``
        (sums over tokens and layers of both), with the ``floor``, for shares are whole numbers; and for each
        kind the 5th and 95th percentile over tokens of the number chosen over its mean, of all layers
        together (``p5``, ``p95``) and of a layer alone (``layer_p5``, ``layer_p95``: the median layer's)."""
        places = sorted(self._loads, key=lambda place: (KINDS.index(place[0]), place[1]))
        return [
            *(self._over_ranks(*place) for place in places),
            *(self._over_tokens(kind) for kind in KINDS if any(k == kind for k, _ in self._chosen)),
        ]

    def _over_ranks(self, kind: Kind, ranks: int) -> dict[str, Any]:
        *largest, mean = self._loads[kind, ranks].tolist()
        shares = {name: value / max(mean, 1e-12) for name, value in zip(_ORDERS, largest, strict=True)}
        return {"kind": kind, "ranks": ranks, **shares}

    def _over_tokens(self, kind: Kind) -> dict[str, Any]:
        layers = [key for key in self._chosen if key[0] == kind]
        chosen = torch.stack([torch.cat(self._chosen[key]) for key in layers]).double().numpy()

        def ends(counts: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
            """Of ``counts [..., T]``: ``[2, ...]``."""
            mean = np.maximum(counts.mean(-1), 1e-12)
            found: npt.NDArray[np.float64] = np.quantile(counts, (0.05, 0.95), axis=-1) / mean
            return found

        p5, p95 = ends(chosen.sum(0)).tolist()
        layer_p5, layer_p95 = np.median(ends(chosen), axis=-1).tolist()
        return {
            "tokens of": kind,
            "density": float(chosen.mean()) / len(self._orders[layers[0]]),
            "layers": len(layers),
            "p5": p5,
            "p95": p95,
            "layer_p5": layer_p5,
            "layer_p95": layer_p95,
        }


def write_model(
    source: Path,
    out: Path,
    orders: Mapping[UnitKey, Tensor],
    config: OPTConfig,
    on_progress: OnProgress | None = None,
) -> None:
    """Writes a model's files into the directory ``out``: weights as safetensors, in as many files as there
    were and in their dtype, in the new order; all else that belongs to it as it is."""
    for path in sorted(source.iterdir()):
        if path.is_file() and not path.name.endswith(_WEIGHTS) and not path.name.startswith("."):
            shutil.copyfile(path, out / path.name)
    checkpoint = Checkpoint(source)
    where: dict[str, str] = {}
    size = 0
    for done, path in enumerate(checkpoint.files):
        name = path.name.removeprefix("pytorch_").removesuffix(path.suffix) + ".safetensors"
        tensors = {
            key: reordered(key, tensor, orders, config.head_dim).clone(memory_format=torch.contiguous_format)
            for key, tensor in checkpoint.contents(path).items()
        }
        save_file(tensors, out / name, metadata={"format": "pt"})
        with (out / name).open("rb+") as file:
            os.fsync(file.fileno())
        shutil.copymode(out / "config.json", out / name)  # the library's own would be the owner's alone
        where |= dict.fromkeys(tensors, name)
        size += sum(tensor.nbytes for tensor in tensors.values())
        if on_progress is not None:
            on_progress("writing the model", done + 1, len(checkpoint.files))
    if set(where.values()) != {"model.safetensors"}:
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(where.items()))}
        write_file(out / "model.safetensors.index.json", json.dumps(index, indent=1) + "\n")


def reordered(name: str, tensor: Tensor, orders: Mapping[UnitKey, Tensor], head_dim: int) -> Tensor:
    """A tensor of a checkpoint with its neurons or heads, if it has any, in their new order."""
    match = _SPLIT.fullmatch(name)
    if match is None:
        return tensor
    layer, fc1, fc2, qkv, _ = match.groups()
    if fc1 or fc2:
        return tensor.index_select(1 if fc2 else 0, orders["mlp", int(layer)])
    channels = orders["heads", int(layer)][:, None] * head_dim + torch.arange(head_dim)
    return tensor.index_select(0 if qkv else 1, channels.flatten())


def write_predictors(
    source: Path,
    model_out: Path,
    manifest: Manifest,
    orders: Mapping[UnitKey, Tensor],
    config: OPTConfig,
    command: str,
) -> Manifest:
    """Writes the predictors of a model in the new order, which is in ``model_out``, beside it."""
    tensors = load_file(source / TENSORS)
    for entry in manifest.entries:
        order = orders[entry.kind, entry.layer]
        for name in [name for name in tensors if name.startswith(f"{entry.name}.")]:
            if name.removeprefix(f"{entry.name}.").removeprefix("refine.") not in _SHARED:
                if len(tensors[name]) != len(order):
                    raise ValueError(
                        f"{source / TENSORS}: {name} has {len(tensors[name])} rows, expected {len(order)}"
                    )
                tensors[name] = tensors[name][order]
    new = fingerprint(config, Checkpoint(model_out))
    old = manifest.model.fingerprint
    if new == old:
        raise ValueError(f"{source}: the rows of fc1 by which the model is known are all alike")
    written = manifest.model_copy(
        update={
            "model": identity(config, new),
            "source_fingerprint": manifest.source_fingerprint or old,
            "commands": [*manifest.commands, *filter(None, [command])],
        }
    )
    save_tensors(model_out / PREDICTORS / TENSORS, tensors)
    write_manifest(model_out / PREDICTORS, written)
    return written
