"""Finds a Hugging Face checkpoint and reads slices of its tensors."""

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import fields
from importlib.resources import files
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dejavu.runtime.config import OPTConfig

DEMO = "demo"
_READABLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_FORMATS = ("model.safetensors", "pytorch_model.bin")


def find_model(name: str) -> Path:
    """The directory of a model: ``demo``, a directory, or a Hugging Face hub id (downloaded once).

    Raises:
        ValueError: there is no such model.
    """
    if name == DEMO:
        return Path(str(files("dejavu.launch"))) / "demo" / "opt-books-8m"
    if name and (directory := Path(name).expanduser()).is_dir():
        return directory
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", name):
        raise ValueError(f"no such model: {name!r} is not a directory, not a hub id and not 'demo'")
    return _download(name)


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        directory = Path(snapshot_download(hub_id, allow_patterns=["*.json", "*.txt", "*.safetensors"]))
        if not any(directory.glob("*.safetensors")):
            snapshot_download(hub_id, allow_patterns=["*.bin"])
    except LocalEntryNotFoundError:
        cause = "the hub cannot be reached, nor is it in the cache"
    except RepositoryNotFoundError:
        cause = "the hub has no public model of that name"
    except (OSError, ValueError) as e:  # the rest of the hub's errors are subclasses of these
        cause = str(e).strip().partition("\n")[0]
    else:
        return directory
    raise ValueError(f"no such model: {hub_id!r} is not a directory, and {cause}")


def fingerprint(config: OPTConfig, checkpoint: "Checkpoint") -> str:
    """A hash of the architecture and of two rows of each layer's fc1: the same model in any dtype or sharding
    that keeps its numbers has the same, another one has not.
    """
    shape = (config.ffn_dim, config.hidden_size)
    sizes = {f.name: getattr(config, f.name) for f in fields(config) if f.name != "dtype"}
    digest = hashlib.sha256(json.dumps(sizes, sort_keys=True).encode())
    for layer in range(config.num_layers):
        for row in (0, config.ffn_dim // 2):
            values = checkpoint.read(f"model.decoder.layers.{layer}.fc1.weight", shape, slice(row, row + 1))
            digest.update(values.float().numpy().tobytes())
    return digest.hexdigest()[:16]


class Checkpoint:
    """The tensors of a model directory: safetensors or ``.bin``, in one file or in shards with an index.

    Files are mapped, not loaded: a slice costs its own bytes and no others.

    Args:
        directory: the model's directory.
        on_read: called with the number of elements of every slice read.

    Raises:
        ValueError: no weights, a missing or damaged file.
    """

    def __init__(self, directory: Path, on_read: Callable[[int], None] | None = None) -> None:
        self.directory = directory
        self._on_read = on_read
        self._files: dict[Path, dict[str, Any]] = {}
        self._where = self._locate()
        # the hub's oldest OPT files have the tensors of the decoder without the prefix "model."
        self._prefix = "" if any(name.startswith("model.") for name in self._where) else "model."

    def read(self, name: str, shape: tuple[int, ...], *index: slice) -> Tensor:
        """The part ``[index]`` of the tensor ``name``, which must have the global ``shape``.

        The result may be a view of the mapped file: copy it, don't keep it.

        Raises:
            ValueError: no such tensor, or one of another shape.
        """
        stored = name.removeprefix(self._prefix)
        if stored not in self._where:
            raise ValueError(f"{self.directory} has no tensor {name}")
        path = self._where[stored]
        tensor = self._open(path)[stored]
        found = tuple(tensor.shape if isinstance(tensor, Tensor) else tensor.get_shape())
        if found != shape:
            raise ValueError(f"{path}: {name} has shape {list(found)}, the config expects {list(shape)}")
        part: Tensor = tensor[index or (slice(None),)]
        if part.dtype not in _READABLE:
            raise ValueError(f"{path}: {name} is {part.dtype}, expected one of 16, 32 or 64-bit floats")
        if self._on_read is not None:
            self._on_read(part.numel())
        return part

    @property
    def files(self) -> list[Path]:
        """The files that hold the tensors."""
        return sorted(set(self._where.values()))

    def contents(self, path: Path) -> dict[str, Tensor]:
        """All tensors of one of the ``files``, by the names that they have there; mapped, as of `read`."""
        stored = self._open(path)
        return {name: stored[name][:] for name, file in self._where.items() if file == path}

    def _locate(self) -> dict[str, Path]:
        """Which file holds each tensor."""
        for name in _FORMATS:
            single, index = self.directory / name, self.directory / f"{name}.index.json"
            if single.is_file():
                return dict.fromkeys(self._open(single), single)
            if index.is_file():
                return self._read_index(index)
        raise ValueError(
            f"{self.directory} has no weights: expected one of {', '.join(_FORMATS)}, or its index"
        )

    def _read_index(self, index: Path) -> dict[str, Path]:
        try:
            weight_map = json.loads(index.read_text())["weight_map"]
            where = {name: self.directory / file for name, file in weight_map.items()}
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as e:
            raise ValueError(f"{index} is damaged: {type(e).__name__}: {e}") from None
        if missing := sorted({path.name for path in where.values() if not path.is_file()}):
            raise ValueError(f"{self.directory} lacks {', '.join(missing)}, which {index.name} names")
        for name, path in where.items():
            if name not in self._open(path):
                raise ValueError(f"{path} has no tensor {name}, though {index.name} says so")
        return where

    def _open(self, path: Path) -> dict[str, Any]:
        """The tensors of a file by name, as objects that read when they are indexed."""
        if path not in self._files:
            path.open("rb").close()  # if it may not be read, this says so better than the libraries
            opener = _open_safetensors if path.suffix == ".safetensors" else _open_bin
            self._files[path] = opener(path)
        return self._files[path]


def _open_safetensors(path: Path) -> dict[str, Any]:
    try:
        file = safe_open(path, framework="pt")
        return {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  (it is not a dict)
    except (SafetensorError, OSError) as e:
        raise ValueError(f"{path} is damaged or no safetensors file: {e}") from None


def _open_bin(path: Path) -> dict[str, Any]:
    try:
        tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except UnpicklingError:
        raise ValueError(f"{path} is damaged or holds more than plain tensors") from None
    except Exception as e:  # torch raises whatever its parts raise: pickle, zip, RuntimeError, OSError
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise ValueError(f"{path} is damaged or no weights-only torch file: {reason}") from None
    if not isinstance(tensors, dict):
        raise ValueError(f"{path} holds a {type(tensors).__name__}, expected a state dict")
    return tensors
