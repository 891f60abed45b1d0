"""Activations for training: what predictors will see at the taps, and what the blocks then did.

A directory of traces holds, for every layer, ``.npy`` files that are mapped and never loaded whole:

- ``attn_in.npy``, ``mlp_in.npy``: ``fp16[T, D]``, the taps, standardised;
- ``neurons.START-STOP.npy``: ``uint8[T, n]``, the activations of a rank's neurons, their logarithms;
- ``heads.START-STOP.npy``: ``fp16[T, n, H]``, the outputs of a rank's heads;

and ``traces.json``, which says of which model and text. While it is being written the directory is called
``NAME.partial``; started again, it goes on where it was.

Shape legend: B windows at a time, S tokens of a window, T tokens in all, D hidden, N heads, H head dim.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from dejavu.kernels.predict import standardise
from dejavu.parallel.groups import TPGroup
from dejavu.predictors.corpus import Corpus
from dejavu.predictors.files import ModelIdentity, Source, Strict, damage
from dejavu.predictors.selection import EVERYTHING, Choice, Selector, Tap, Truth
from dejavu.profiles.records import existing_folder, write_file
from dejavu.runtime.config import OPTConfig
from dejavu.runtime.engine import Engine
from dejavu.runtime.sparsity import identity

OnProgress = Callable[[int, int], None]
TRACES, PROGRESS = "traces.json", "progress.json"
# Windows that are run together: part of the recipe, for the rounding of a pass may depend on it.
_BATCH = 8
# Windows between two notes of how far it has come.
_NOTE_EVERY = 64
# Activations are stored as round(STEPS * log2(a)) + MIDDLE in a byte: within 4.5%, from 2**-16 to 2**16.
_STEPS, _MIDDLE = 8, 128


class TracesInfo(Strict):
    """All of ``traces.json``; ``ranks`` wrote a slice of the neurons and heads each."""

    format: Literal[1] = 1
    model: ModelIdentity
    source: Source
    sparsity: str  # whose hidden states these are: dense, or the predictors that ran
    dtype: str
    windows: int
    window: int
    ranks: int
    command: str = ""  # what was typed

    @property
    def tokens(self) -> int:
        """T: a window's first position is left out, for it belongs to the prompt."""
        return self.windows * (self.window - 1)


def encode(activations: Tensor) -> Tensor:
    """Activations (0 or more) as bytes; 0 is exactly 0."""
    codes = (activations.float().log2() * _STEPS).round() + _MIDDLE
    codes = torch.where(activations > 0, codes.clamp(1, 255), 0.0)
    return torch.where(activations.isnan(), 255.0, codes).to(torch.uint8)


def decode_table(device: torch.device) -> Tensor:
    """``fp32[256]``: what each byte stands for."""
    table = torch.exp2((torch.arange(256, device=device, dtype=torch.float32) - _MIDDLE) / _STEPS)
    table[0] = 0
    return table


def trace_bytes(config: OPTConfig, tokens: int) -> int:
    """The size of the traces of so many tokens."""
    D = config.hidden_size
    return tokens * config.num_layers * (2 * 2 * D + config.ffn_dim + 2 * D)


def collect(
    engine: Engine,
    corpus: Corpus,
    out: Path,
    *,
    sparsity: str = "dense",
    command: str = "",
    on_progress: OnProgress | None = None,
) -> TracesInfo:
    """Writes the traces of a text; every rank its own neurons and heads, rank 0 the taps.

    With a policy in the engine (``sharing="mask"``), the hidden states are those of its sparse run, and the
    activations those that all neurons and heads would have had on them.

    Args:
        corpus: whose windows are run.
        out: the directory to make. ``out`` with ``.partial`` appended is gone on with, if it is there.
        sparsity: what to call the policy in ``traces.json``.
        command: what to note there as the way to make it.

    Raises:
        ValueError: ``out`` exists, the disk has too little space, or ``.partial`` was begun otherwise.
    """
    tp, model = engine.tp, engine.model
    windows, window = corpus.windows.shape[0], corpus.windows.shape[1] - 1
    info = TracesInfo(
        model=identity(model.config, engine.fingerprint),
        source=corpus.source("train"),
        sparsity=sparsity,
        dtype=engine.dtype,
        windows=windows,
        window=window,
        ranks=tp.size,
        command=command,
    )
    partial = out.with_name(out.name + ".partial")
    done = tp.agree(lambda: _begin(info, model.config, out, partial, tp))
    writer = tp.agree(lambda: TraceWriter(engine.policy or EVERYTHING, partial, info, model.config, tp, done))
    for first in range(done, windows, _BATCH):
        batch = corpus.windows[first : first + _BATCH, :-1].to(tp.device)
        _run(engine, batch, writer)
        last = min(first + _BATCH, windows)
        if last % _NOTE_EVERY == 0:
            tp.agree(writer.flush)
            tp.agree(lambda last=last: _note(partial, last) if tp.rank == 0 else None)  # type: ignore[misc]
        if on_progress is not None:
            on_progress(last, windows)
    tp.agree(writer.flush)
    tp.agree(lambda: _finish(out, partial) if tp.rank == 0 else None)
    return info


@torch.inference_mode()
def _run(engine: Engine, token_ids: Tensor, writer: "TraceWriter") -> None:
    cache = engine.model.empty_cache(*token_ids.shape)
    step = cache.prompt(token_ids.shape[1])
    engine.model(engine.model.embed(token_ids, step.positions), cache, step, writer)
    writer.advance()


def _begin(info: TracesInfo, config: OPTConfig, out: Path, partial: Path, tp: TPGroup) -> int:
    """Makes or checks the directory; how many windows it holds already."""
    if out.exists():
        raise ValueError(f"{out} exists already")
    if (partial / TRACES).is_file():
        if read_info(partial).model_copy(update={"command": info.command}) != info:
            raise ValueError(
                f"{partial} was begun with another model, text, ranks or options: remove it first"
            )
        progress = partial / PROGRESS
        return int(json.loads(progress.read_text())["windows"]) if progress.is_file() else 0
    if tp.rank == 0:
        needed = trace_bytes(config, info.tokens)
        free = shutil.disk_usage(existing_folder(out)).free
        if free < needed:
            raise ValueError(f"{out} needs {needed / 1e9:.2f} GB, but the disk has {free / 1e9:.2f} GB left")
        partial.mkdir(parents=True, exist_ok=True)
        write_file(partial / TRACES, info.model_dump_json(indent=1) + "\n")
    return 0


def _note(partial: Path, windows: int) -> None:
    """So many windows are on the disk, on every rank's."""
    write_file(partial / PROGRESS, json.dumps({"windows": windows}))


def _finish(out: Path, partial: Path) -> None:
    (partial / PROGRESS).unlink(missing_ok=True)
    partial.rename(out)


class TraceWriter(Selector):
    """Lets another selector choose, and writes down the taps and the truth, from window ``done`` on."""

    def __init__(
        self, inner: Selector, directory: Path, info: TracesInfo, config: OPTConfig, tp: TPGroup, done: int
    ) -> None:
        self.inner = inner
        self._first = done * (info.window - 1)
        T, D, H = info.tokens, config.hidden_size, config.head_dim
        self._files: dict[str, np.memmap[Any, Any]] = {}
        for layer in range(config.num_layers):
            folder = directory / f"layer.{layer:03d}"
            folder.mkdir(exist_ok=True)
            if tp.rank == 0:
                for point in ("attn_in", "mlp_in"):
                    self._files[f"{point}[{layer}]"] = _create(folder / f"{point}.npy", (T, D), np.float16)
            rows, heads = tp.shard(config.ffn_dim), tp.shard(config.num_heads)
            self._files[f"neurons[{layer}]"] = _create(
                folder / f"neurons.{rows.start}-{rows.stop}.npy", (T, rows.stop - rows.start), np.uint8
            )
            self._files[f"heads[{layer}]"] = _create(
                folder / f"heads.{heads.start}-{heads.stop}.npy",
                (T, heads.stop - heads.start, H),
                np.float16,
            )

    def begin(self, positions: Tensor, alive: Tensor | None) -> None:
        self._rows = (positions.shape[1] - 1) * len(positions)
        self.inner.begin(positions, alive)

    def observe(self, tap: Tap, residual: Tensor) -> None:
        if str(tap) in self._files:
            self._write(str(tap), standardise(residual))
        self.inner.observe(tap, residual)

    def heads(self, layer: int, truth: Truth) -> Choice:
        self._write(f"heads[{layer}]", truth())
        return self.inner.heads(layer, truth)

    def neurons(self, layer: int, truth: Truth) -> Choice:
        self._write(f"neurons[{layer}]", encode(truth()))
        return self.inner.neurons(layer, truth)

    def advance(self) -> None:
        """The pass is written."""
        self._first += self._rows

    def flush(self) -> None:
        """Everything written is on the disk."""
        for file in self._files.values():
            file.flush()

    def _write(self, name: str, x: Tensor) -> None:
        """``x [B, S, ...]``, of which the first position is left out."""
        file = self._files[name]
        rows = x[:, 1:].flatten(0, 1)
        file[self._first : self._first + self._rows] = rows.to(_TORCH[file.dtype.name]).cpu().numpy()


_TORCH = {"float16": torch.float16, "uint8": torch.uint8}


def _create(path: Path, shape: tuple[int, ...], dtype: Any) -> "np.memmap[Any, Any]":
    """Maps a new ``.npy`` file (or the one that is there) whose space is really taken: a full disk is an
    error here, and not a signal later."""
    if not path.exists():
        beside = path.with_name(path.name + ".new")
        np.lib.format.open_memmap(beside, mode="w+", dtype=dtype, shape=shape)
        try:
            with beside.open("rb+") as file:
                os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
        except OSError as e:
            raise ValueError(f"cannot write {path}: {e.strerror}") from None
        beside.replace(path)
    return np.lib.format.open_memmap(path, mode="r+")


def read_info(directory: Path) -> TracesInfo:
    """Reads ``traces.json``.

    Raises:
        ValueError: missing or damaged.
    """
    path = directory / TRACES
    try:
        return TracesInfo.model_validate_json(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        partial = directory.with_name(directory.name + ".partial")
        unfinished = f" ({partial.name} is not finished: collect again)" if partial.exists() else ""
        raise ValueError(f"{directory} is no directory of traces: it has no {TRACES}{unfinished}") from None
    except ValidationError as e:
        raise damage(path, e) from None


class Traces:
    """A finished directory of traces; whatever ranks wrote it, neurons and heads are in the model's order.

    Raises:
        ValueError: not there, or damaged.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.info = read_info(directory)

    def tap(self, tap: Tap) -> Tensor:
        """``fp16[T, D]``, standardised, mapped."""
        return self._open(f"layer.{tap.layer:03d}/{tap.point}.npy", (self.info.model.hidden_size,))

    def neurons(self, layer: int) -> list[Tensor]:
        """``uint8[T, n]``, mapped, whose columns in a row are the layer's neurons; see `decode_table`."""
        return self._slices(layer, "neurons", self.info.model.ffn_dim, ())

    def heads(self, layer: int) -> list[Tensor]:
        """``fp16[T, n, H]``, mapped, whose second dimensions in a row are the layer's heads."""
        model = self.info.model
        return self._slices(layer, "heads", model.num_heads, (model.hidden_size // model.num_heads,))

    def _slices(self, layer: int, name: str, total: int, shape: tuple[int, ...]) -> list[Tensor]:
        tp = self.info.ranks
        shards = [TPGroup(rank=rank, size=tp).shard(total) for rank in range(tp)]
        return [
            self._open(f"layer.{layer:03d}/{name}.{s.start}-{s.stop}.npy", (s.stop - s.start, *shape))
            for s in shards
        ]

    def _open(self, name: str, shape: tuple[int, ...]) -> Tensor:
        path = self.directory / name
        try:
            array = np.load(path, mmap_mode="c")  # copy on write: torch has no read-only tensors
        except FileNotFoundError:
            raise ValueError(f"{self.directory} lacks {name}") from None
        except (ValueError, OSError, EOFError) as e:
            raise ValueError(f"{path} is damaged: {e}") from None
        if array.shape != (self.info.tokens, *shape):
            expected = [self.info.tokens, *shape]
            raise ValueError(f"{path} has shape {list(array.shape)}, expected {expected}")
        return torch.from_numpy(array)
