"""Renews the table of launch settings (`dejavu.kernels.tuning`) for the GPU it runs on.

One kernel of an operation after the other: every candidate is timed inside the whole operation, and the one
with the smallest product of times over the densities stays. Many processes compile the candidates first.
"""

import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch

from dejavu.kernels.tuning import TABLE, Settings, device_key, forget, override, shape_key
from dejavu.profiles.kernel_bench import (
    DTYPES,
    Bench,
    Local,
    Row,
    bench_attention,
    bench_mlp,
    bench_predictor,
)
from dejavu.profiles.records import write_file

# What tuning weighs equally: the densities that decoding has, and all of it.
_DENSITIES = (1.0, 0.25, 0.1)
_WAYS: dict[str, tuple[str, ...]] = {
    "mlp": ("fc1", "fc2"),
    "attention": ("qkv", "attention", "out_proj"),
    "predictor": ("down", "up"),
}
OnProgress = Callable[[int, int], None]


def candidates(kernel: str, columns: int, itemsize: int) -> list[Settings]:
    """Settings worth trying: 16 to 64 numbers a thread and tile, and loads under way that fit the chip."""
    wide = 2 if itemsize == 1 else 1
    tried: Iterable[Settings]
    if kernel == "fc1":
        tried = (
            {"ROWS": rows, "BLOCK_D": block, "PROGRAMS": programs, "num_warps": warps}
            for rows, block, warps, programs in itertools.product(
                (1, 2, 4), (512, 1024, 2048, 4096), (4, 8), (4, 8, 16)
            )
            if rows * block / (32 * warps * wide) in (8, 16, 32) and block < 2 * columns
        )
    elif kernel in ("fc2", "out_proj"):
        tried = (
            {"ROWS": rows, "BLOCK_D": block, "SPLITS": splits, "STAGES": stages, "num_warps": warps}
            for rows, block, warps, stages, splits in itertools.product(
                (8, 16, 32), (128, 256, 512, 1024), (4, 8), (3, 4, 5), (4, 8, 16, 32)
            )
            if rows * block / (32 * warps * wide) in (16, 32) and rows * block * itemsize * stages <= 50_000
            and 96 <= -(-columns // block) * splits <= 1600
        )  # fmt: skip
    elif kernel == "qkv":
        tried = (
            {"ROWS": rows, "BLOCK_D": block, "num_warps": warps}
            for rows, block, warps in itertools.product((1, 2, 4, 8), (512, 1024, 2048), (2, 4, 8))
            if rows * block / (32 * warps * wide) in (8, 16, 32) and block < 2 * columns
        )
    elif kernel == "attention":
        tried = (
            {"SPLITS": splits, "BLOCK_T": block, "STAGES": stages, "num_warps": warps}
            for splits, block, stages, warps in itertools.product(
                (4, 8, 16, 32), (16, 32, 64), (2, 3), (2, 4)
            )
        )
    elif kernel == "down":
        block = 1 << (columns - 1).bit_length()
        tried = (
            {"ROWS": rows, "BLOCK_D": block, "num_warps": warps}
            for rows, warps in itertools.product((1, 2, 4), (2, 4, 8))
            if rows * block / (32 * warps) <= 256
        )
    else:
        tried = (
            {"ROWS": rows, "BLOCK_R": min(block, columns), "num_warps": warps}
            for rows, block, warps in itertools.product((8, 16, 32, 64), (256, 512, 1024), (1, 2, 4, 8))
            if 8 <= rows * min(block, columns) / (32 * warps) <= 128
        )
    return [dict(s) for s in {tuple(sorted(t.items())): t for t in tried}.values()]


def tune(
    bench: Bench, op: str, jobs: Sequence[tuple[Local, str, int]], on_progress: OnProgress
) -> dict[str, Settings]:
    """The best settings of every kernel of ``op``, by the table's keys.

    Args:
        jobs: (shape, weights, rank of the predictor; 0 for the other operations).
    """
    todo = [
        (op, local, weights, rank, kernel, settings)
        for local, weights, rank in jobs
        for kernel in _WAYS[op]
        for settings in candidates(kernel, _columns(kernel, local, rank), DTYPES[weights].itemsize)
    ]
    with ProcessPoolExecutor(min(os.cpu_count() or 1, 14), mp_context=get_context("spawn")) as pool:
        list(pool.map(_compile, todo, chunksize=4))
    best: dict[str, Settings] = {}
    done = 0
    for local, weights, rank in jobs:
        for kernel in _WAYS[op]:
            scored = []
            for settings in candidates(kernel, _columns(kernel, local, rank), DTYPES[weights].itemsize):
                override[kernel] = settings
                scored.append((_score(bench, op, local, weights, rank), len(scored), settings))
                done += 1
                on_progress(done, len(todo))
            override[kernel] = min(scored)[2]  # the next kernel is tuned beside it
            best[_key(kernel, local, weights, rank)] = override[kernel]
        override.clear()
    return best


def write_table(best: dict[str, Settings], device: torch.device) -> None:
    """Puts the entries into the table in the source tree."""
    table = json.loads(TABLE.read_text())
    table[device_key(device)] = dict(sorted({**table.get(device_key(device), {}), **best}.items()))
    rows = (
        f" {json.dumps(gpu)}: {{\n"
        + ",\n".join(f"  {json.dumps(key)}: {json.dumps(s)}" for key, s in entries.items())
        + "\n }"
        for gpu, entries in sorted(table.items())
    )
    write_file(TABLE, "{\n" + ",\n".join(rows) + "\n}\n")
    forget()


def _columns(kernel: str, local: Local, rank: int) -> int:
    D, _, _, H = local.sizes
    return {"attention": H, "up": rank}.get(kernel, D)


def _key(kernel: str, local: Local, weights: str, rank: int) -> str:
    _, ffn, N, H = local.sizes
    rows = {
        "fc1": ffn,
        "fc2": ffn,
        "qkv": 3 * N * H,
        "attention": N,
        "out_proj": N * H,
        "down": rank,
        "up": ffn,
    }
    dtype = torch.bfloat16 if kernel == "attention" else DTYPES[weights]
    return shape_key(kernel, rows[kernel], _columns(kernel, local, rank), dtype, 1)


def _rows(bench: Bench, op: str, local: Local, weights: str, rank: int) -> list[Row]:
    if op == "mlp":
        return list(bench_mlp(bench, local, weights, densities=_DENSITIES, lives=(1.0,)))
    if op == "attention":
        return list(bench_attention(bench, local, weights, densities=(1.0, 0.5, 0.25)))
    return list(bench_predictor(bench, local, weights, rank))


def _score(bench: Bench, op: str, local: Local, weights: str, rank: int) -> float:
    """The mean logarithm of the times; infinite where the settings do not fit the GPU."""
    try:
        rows = _rows(bench, op, local, weights, rank)
    except Exception as e:  # Triton's own errors have no common base
        if "OutOfResources" not in type(e).__name__ and "out of resource" not in str(e):
            raise
        return math.inf
    times = [row["us_p50"] for row in rows if row["engine"] == "dejavu"]
    return sum(map(math.log, times)) / len(times)


def _compile(job: tuple[str, Local, str, int, str, Settings]) -> None:
    """Fills Triton's cache on disk: runs the operation once, with nothing timed."""
    op, local, weights, rank, kernel, settings = job
    override[kernel] = settings
    _score(Bench(torch.device("cuda", 0), 1.0, replays=1), op, local, weights, rank)
    override.clear()
