"""Renews the table of launch settings (`dejavu.kernels.tuning`) for the GPU it runs on.

One kernel of an operation after the other: every candidate is timed inside the whole operation, and the one
with the smallest product of times over the densities stays. Many processes compile the candidates first.
"""

import json
import math
import os
from collections.abc import Callable, Sequence
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
_FC1, _ROWS = ("ROWS", "BLOCK_D", "num_warps"), ("ROWS", "BLOCK_D", "num_warps", "STAGES")
_QKV = ("ROWS", "BLOCK_D", "num_warps", "num_stages")
_SUMS = (
    (8, 512, 4, 3),
    (8, 512, 4, 5),
    (16, 512, 4, 3),
    (16, 256, 4, 3),
    (16, 256, 4, 5),
    (32, 256, 4, 3),
    (32, 128, 4, 5),
)
_SUMS_8 = (
    (8, 256, 4, 5),
    (16, 256, 4, 3),
    (16, 256, 4, 5),
    (32, 256, 4, 3),
    (32, 128, 4, 4),
    (8, 512, 4, 5),
    (16, 512, 4, 4),
    (32, 512, 8, 3),
)
# By kernel and bytes of a weight (1 or more): names, values of all but the last, the last and its values.
_TRIED: dict[tuple[str, int], tuple[tuple[str, ...], tuple[tuple[int, ...], ...], str, tuple[int, ...]]] = {
    ("fc1", 2): (_FC1, ((1, 1024, 4), (2, 1024, 4), (4, 1024, 4), (1, 2048, 4), (2, 2048, 4), (1, 4096, 4), (2, 2048, 8)), "PROGRAMS", (8, 16)),
    ("fc1", 1): (_FC1, ((2, 1024, 4), (4, 1024, 4), (2, 2048, 4), (4, 2048, 4), (2, 2048, 8), (4, 2048, 8), (2, 4096, 8)), "PROGRAMS", (4, 8, 16)),
    ("fc2", 2): (_ROWS, _SUMS, "SPLITS", (8, 16, 32)),
    ("fc2", 1): (_ROWS, _SUMS_8, "SPLITS", (4, 8, 16)),
    ("out_proj", 2): (_ROWS, _SUMS, "SPLITS", (4, 8, 16)),
    ("out_proj", 1): (_ROWS, _SUMS_8, "SPLITS", (4, 8, 16)),
    ("qkv", 2): (_QKV, ((64, 128, 4, 4), (64, 128, 4, 3), (64, 64, 4, 5), (64, 256, 4, 3), (32, 128, 2, 4)), "SPLITS", (4, 8, 16)),
    ("attention", 2): (("BLOCK_T", "STAGES", "num_warps"), ((16, 2, 2), (32, 2, 4), (64, 2, 4), (32, 3, 4)), "SPLITS", (8, 16, 32)),
    ("down", 2): (("ROWS", "BLOCK_D"), ((1, 2048), (2, 1024), (2, 2048), (4, 2048), (1, 4096)), "num_warps", (4, 8)),
    ("up", 2): (("ROWS", "BLOCK_R"), ((8, 1024), (16, 1024), (32, 256), (32, 512), (16, 512), (64, 256)), "num_warps", (4, 8)),
}  # fmt: skip
OnProgress = Callable[[int, int], None]


def candidates(kernel: str, columns: int, itemsize: int) -> list[Settings]:
    """Settings worth trying: those that came near the best in a wider search on one H100 (git has its script's
    findings in profiles/results/README.md)."""
    names, tried, last, values = _TRIED[kernel, 1 if itemsize == 1 and (kernel, 1) in _TRIED else 2]
    found = (dict(zip((*names, last), (*t, v), strict=True)) for t in tried for v in values)
    kept = (s for s in found if s.get("BLOCK_D", 0) < 2 * columns)
    return [{**s, "BLOCK_R": min(s["BLOCK_R"], columns)} if "BLOCK_R" in s else s for s in kept]


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
