"""Launch settings: a small table per GPU and shape that ships with the package, and defaults for all else.

`dejavu bench mlp --tune` (and ``attention``, ``predictor``) renews the entries of the GPU it runs on,
`dejavu bench decode --tune` those of one kernel in whole steps.
"""

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch

Settings = Mapping[str, int]
TABLE = Path(__file__).with_name("tuned.json")
CROSSOVERS = Path(__file__).with_name("crossover.json")

# What is tried instead of the table while tuning: a kernel's name, or the table's key, to settings.
override: dict[str, Settings] = {}
# The keys among them that a launch has asked for.
asked: set[str] = set()


def settings(kernel: str, default: Settings, rows: int, columns: int, dtype: torch.dtype, batch: int,
             device: torch.device) -> Settings:  # fmt: skip
    """The launch settings of ``kernel`` for weights ``[rows, columns]`` and ``batch`` tokens: the table's or,
    for what it does not know, ``default``."""
    if kernel in override:
        return override[kernel]
    key = shape_key(kernel, rows, columns, dtype, batch)
    if key in override:
        asked.add(key)
        return override[key]
    return _table(device_key(device)).get(key, default)


def variant(kernel: str, ids: torch.Tensor | None, tokens: int) -> str:
    """The table's name of a kernel that computes what ``ids`` names; None: all, for which one token has
    settings of its own."""
    return f"{kernel}_all" if ids is None and tokens == 1 else kernel


def shape_key(kernel: str, rows: int, columns: int, dtype: torch.dtype, batch: int = 1) -> str:
    """How the table names a shape: ``fc1 24576x12288 16-bit``; with ``several`` behind it for more tokens
    than one, of which up to 16 share one reading of the weights by the same code."""
    name = f"{kernel} {rows}x{columns} {8 * dtype.itemsize}-bit"
    return name if batch == 1 else f"{name} several"


@cache
def device_key(device: torch.device) -> str:
    """How the table names a GPU."""
    return "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device)


def crossover(ffn: int, D: int, dtype: torch.dtype, batch: int, device: torch.device) -> float:
    """The share of an MLP's neurons from which on computing all of them is as fast, for ``batch`` tokens.

    Measured by `dejavu bench mlp --batch B --tune` at the powers of 2 up to 16, of which the next one counts.
    Where nothing was: never for one token, whose sparse kernels are the dense ones; half for several, which
    cuBLAS reads faster.
    """
    known = _crossovers(device_key(device)).get(shape_key("mlp", ffn, D, dtype, 1), {})
    size = min(1 << (batch - 1).bit_length(), 16)
    return known.get(str(size), 1.0 if batch == 1 else 0.5)


def forget() -> None:
    """The table was written anew."""
    _table.cache_clear()
    _crossovers.cache_clear()


@cache
def _crossovers(device: str) -> dict[str, dict[str, float]]:
    table: dict[str, dict[str, dict[str, float]]] = json.loads(CROSSOVERS.read_text())
    return table.get(device, {})


@cache
def _table(device: str) -> dict[str, Settings]:
    table: dict[str, dict[str, Settings]] = json.loads(TABLE.read_text())
    return table.get(device, {})
