"""Renews the table of launch settings (`dejavu.kernels.tuning`) for the GPU it runs on.

One kernel of an operation after the other: every candidate is timed inside the whole operation, which of one
token comes behind a norm, as in a model: fc1 and QKV begin while that runs. The one with the smallest product
of times over the densities stays. Many processes compile the candidates first.

Or (`tune_steps`) inside whole steps, where a sum over ranks comes before and predictors run beside.
"""

import json
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import groupby
from multiprocessing import get_context

import torch
from triton.runtime.errors import OutOfResources

from dejavu.kernels.residual_norm import residual_norm
from dejavu.kernels.tuning import (
    CROSSOVERS,
    TABLE,
    Settings,
    asked,
    device_key,
    forget,
    override,
    shape_key,
)
from dejavu.profiles.kernel_bench import DTYPES, AttentionCase, Bench, Local, MLPCase, PredictorCase, Row
from dejavu.profiles.records import write_file
from dejavu.profiles.timing import Call, time_calls

_WAYS: dict[str, tuple[str, ...]] = {
    "mlp": ("fc1", "fc1_all", "fc2", "fc2_all"),
    "attention": ("qkv", "qkv_all", "attention", "out_proj", "out_proj_all"),
    "predictor": ("down", "up"),
}
_FC1, _SUMS = ("ROWS", "BLOCK_D", "num_warps"), ("ROWS", "BLOCK_D", "num_warps", "STAGES")
_QKV, _TOKENS = ("ROWS", "BLOCK_D", "num_warps", "num_stages"), ("BLOCK_T", "STAGES", "num_warps")
_SUMS_16 = (
    (8, 512, 4, 3), (8, 512, 4, 5), (16, 512, 4, 3), (16, 256, 4, 3), (32, 128, 4, 5), (64, 64, 4, 3),
    (64, 64, 4, 4),
)  # fmt: skip
_SUMS_8 = ((16, 256, 4, 3), (16, 256, 4, 5), (32, 128, 4, 4), (32, 256, 4, 3), (16, 512, 4, 4))
_FC1_16 = ((2, 1024, 4), (4, 1024, 4), (1, 2048, 4), (2, 2048, 4), (1, 4096, 4), (1, 8192, 4), (1, 16384, 4))
_FC1_8 = ((2, 1024, 4), (4, 1024, 4), (2, 2048, 4), (4, 2048, 4), (2, 2048, 8), (4, 2048, 8))
_QKV_16 = (
    (64, 128, 4, 4),
    (64, 128, 4, 3),
    (64, 64, 4, 5),
    (64, 256, 4, 3),
    (32, 128, 2, 4),
    (32, 256, 4, 5),
    (64, 64, 4, 6),
)
# Of several tokens: tensor cores, so 16 rows and more.
_SEVERAL_FC1 = ((16, 128, 4), (16, 256, 4), (32, 128, 4), (32, 256, 4), (64, 128, 4), (64, 64, 4))
_SEVERAL_SUMS = (
    (32, 128, 4, 3),
    (16, 128, 4, 4),
    (32, 128, 4, 4),
    (32, 256, 4, 4),
    (64, 128, 4, 3),
    (64, 128, 4, 4),
    (64, 64, 4, 4),
)
# Beside others small programs do better, and which is best they alone can say.
_DOWN_BESIDE = ((2, 1024, 4), (2, 512, 2), (1, 2048, 4), (4, 512, 2), (2, 2048, 4))
_UP_BESIDE = ((8, 512, 4), (16, 256, 4), (4, 1024, 4), (8, 256, 2))
# 8-bit ones are read all of a row at once.
_DOWN_8, _UP_8 = ((1, 8), (2, 8), (4, 8), (2, 16)), ((4, 4), (8, 4), (16, 4), (8, 8))
_UP = ((8, 1024), (16, 1024), (32, 256), (32, 512), (16, 512), (64, 256))
# By kernel and bytes of a weight (2: or more): names, values of all but the last, the last, its values.
_TRIED: dict[tuple[str, int], tuple[tuple[str, ...], tuple[tuple[int, ...], ...], str, tuple[int, ...]]] = {
    ("fc1", 2): (_FC1, _FC1_16, "PROGRAMS", (5, 8, 16)),
    ("fc1", 1): (_FC1, _FC1_8, "PROGRAMS", (4, 16)),
    ("fc2", 2): (_SUMS, _SUMS_16, "SPLITS", (2, 4, 8, 11, 16, 22, 33)),  # also divisors of 132 SMs and 264
    ("fc2", 1): (_SUMS, _SUMS_8, "SPLITS", (4, 8, 16)),
    ("out_proj", 2): (_SUMS, _SUMS_16, "SPLITS", (1, 2, 4, 8, 11, 16)),
    ("out_proj", 1): (_SUMS, _SUMS_8, "SPLITS", (4, 8, 16)),
    ("qkv", 2): (_QKV, _QKV_16, "SPLITS", (1, 4, 8, 16)),
    ("attention", 2): (_TOKENS, ((16, 2, 2), (32, 2, 4), (64, 2, 4)), "SPLITS", (8, 16, 32)),
    ("down", 2): (("ROWS", "BLOCK_D"), ((1, 2048), (2, 1024), (2, 2048), (4, 2048)), "num_warps", (4, 8)),
    ("up", 2): (("ROWS", "BLOCK_R"), _UP, "num_warps", (4, 8)),
    ("down", 1): (("ROWS",), ((1,), (2,), (4,)), "num_warps", (4, 8, 16)),
    ("up", 1): (("ROWS",), ((4,), (8,), (16,)), "num_warps", (4, 8)),
    ("down_beside", 2): (("ROWS", "BLOCK_D", "num_warps"), _DOWN_BESIDE, "PROGRAMS", (1, 2)),
    ("up_beside", 2): (("ROWS", "BLOCK_R", "num_warps"), _UP_BESIDE, "PROGRAMS", (1, 2)),
    ("down_beside", 1): (("ROWS", "num_warps"), _DOWN_8, "PROGRAMS", (1, 2)),
    ("up_beside", 1): (("ROWS", "num_warps"), _UP_8, "PROGRAMS", (1, 2)),
}  # fmt: skip
# The same for several tokens, of any width.
_SEVERAL: dict[str, tuple[tuple[str, ...], tuple[tuple[int, ...], ...], str, tuple[int, ...]]] = {
    "fc1": ((*_FC1, "num_stages"), tuple((*t, 4) for t in _SEVERAL_FC1), "PROGRAMS", (1, 2, 4)),
    "fc2": (_SUMS, _SEVERAL_SUMS, "SPLITS", (4, 8, 16)),
    "out_proj": (_SUMS, _SEVERAL_SUMS, "SPLITS", (4, 8, 16)),
    "qkv": (_QKV, ((32, 128, 4, 4), (32, 256, 4, 3), (64, 128, 4, 4), (64, 64, 4, 5)), "SPLITS", (1,)),
    "down": (
        ("ROWS", "BLOCK_D", "num_stages"), ((16, 128, 4), (16, 256, 3), (16, 256, 4)), "num_warps", (2, 4)
    ),
    "up": (("ROWS", "BLOCK_R"), ((16, 256), (32, 128), (32, 256), (64, 128)), "num_warps", (4, 8)),
}  # fmt: skip
# Kernels that compute all rows for one token are tried with what those of chosen rows are.
_ALIKE = {"fc1_all": "fc1", "fc2_all": "fc2", "qkv_all": "fc1", "out_proj_all": "out_proj"}
# What a sparse step of one sequence is made of; the predictors of neurons run beside the rest.
STEP_KERNELS = ("qkv", "attention", "out_proj", "fc1", "fc2", "down_beside", "up_beside")
# By how much steps must be shorter for other settings to be taken: repeated means differ by a tenth of it.
_PAYS = 0.002
OnProgress = Callable[[int, int], None]


def candidates(kernel: str, columns: int, itemsize: int, batch: int = 1) -> list[Settings]:
    """Settings worth trying: those that came near the best in a wider search (profiles/results/README.md); of
    8-bit predictors, in whole steps."""
    kernel = _ALIKE.get(kernel, kernel)
    wide = _TRIED[kernel, 1 if itemsize == 1 and (kernel, 1) in _TRIED else 2]
    names, tried, last, values = wide if batch == 1 else _SEVERAL[kernel]
    found = (dict(zip((*names, last), (*t, v), strict=True)) for t in tried for v in values)
    kept = (s for s in found if s.get("BLOCK_D", 0) < 2 * columns)
    most = 1 << (columns - 1).bit_length()
    return [{**s, "BLOCK_R": min(s["BLOCK_R"], most)} if "BLOCK_R" in s else s for s in kept]


def tune(
    bench: Bench, op: str, jobs: Sequence[tuple[Local, str, int]], batch: int, on_progress: OnProgress
) -> dict[str, Settings]:
    """The best settings of every kernel of ``op``, by the table's keys.

    Args:
        jobs: (shape, weights, rank of the predictor; 0 for the other operations).
        batch: one token, or as many as stand for several.
    """
    kernels = [kernel for kernel in _WAYS[op] if batch == 1 or kernel in _SEVERAL]
    todo = [
        (op, *job, batch, kernel, settings)
        for job in jobs
        for kernel in kernels
        for settings in _of_job(kernel, job, batch)
    ]
    with ProcessPoolExecutor(min(os.cpu_count() or 1, 14), mp_context=get_context("spawn")) as pool:
        list(pool.map(_compile, todo, chunksize=2))
    best: dict[str, Settings] = {}
    done = 0
    for job in jobs:
        of_all, of_chosen = _graphs(op, *job, batch, bench.device)
        if batch == 1 and op != "predictor":
            norm = _norm(job[0].sizes[0], bench.device)
            of_all, of_chosen = (
                [[c for call in g for c in (call, norm)] for g in gs] for gs in (of_all, of_chosen)
            )
        for kernel in kernels:
            graphs = _of_kernel(kernel, batch, of_all, of_chosen)
            scored: list[tuple[float, int, Settings]] = []
            for settings in _of_job(kernel, job, batch):
                override[kernel] = settings
                scored.append((_score(graphs, bench.replays), len(scored), settings))
                done += 1
                on_progress(done, len(todo))
            override[kernel] = min(scored)[2]  # the next kernel is tuned beside it
            best[_key(kernel, *job, batch)] = override[kernel]
        override.clear()
    return best


def tune_steps(
    step_ms: Callable[[], float],
    kernels: Sequence[str],
    local: Local,
    weights: str,
    predictor: tuple[str, int],
    on_trial: Callable[[str, Settings | None, float], None],
) -> dict[str, Settings]:
    """The settings that make whole steps shorter than those in use, by the table's keys.

    Args:
        step_ms: times some steps with what `override` has, the same number on every rank.
        kernels: of `STEP_KERNELS`, one after the other; each is tuned beside what was found for those before.
        predictor: weights and rank of the neurons' predictors.
        on_trial: called with a kernel, what was tried (None: what is in use) and the time.

    Raises:
        ValueError: the steps take no settings of a kernel.
    """
    best: dict[str, Settings] = {}
    try:
        for kernel in dict.fromkeys(kernels):
            job = (local, *(predictor if kernel.endswith("_beside") else (weights, 0)))
            key = _key(kernel, *job, 1)
            in_use = step_ms()
            on_trial(kernel, None, in_use)
            scored: list[tuple[float, int, Settings]] = []
            asked.discard(key)
            for settings in _of_job(kernel, job, 1):
                override[key] = settings
                try:
                    ms = step_ms()
                except OutOfResources:
                    ms = math.inf
                if key not in asked:
                    raise ValueError(
                        f"--tune {kernel}: these steps take none of its settings (attention over a short "
                        "cache has its own; predictors on the main stream run beside nothing)"
                    )
                scored.append((ms, len(scored), settings))
                on_trial(kernel, settings, ms)
            ms, _, settings = min(scored)
            del override[key]
            if ms < (1 - _PAYS) * in_use:
                override[key] = best[key] = settings
    finally:
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


def write_crossovers(rows: Sequence[Row], batch: int, device: torch.device) -> None:
    """Puts the density at which each shape of ``bench_mlp``'s rows crosses to dense into its table."""
    table = json.loads(CROSSOVERS.read_text())
    of_device = table.setdefault(device_key(device), {})
    for (name, tp, weights), of in groupby(rows, key=lambda row: (row["shape"], row["tp"], row["weights"])):
        D, ffn, _, _ = Local(name, tp).sizes
        entry = of_device.setdefault(shape_key("mlp", ffn, D, DTYPES[weights]), {})
        entry[str(batch)] = round(crossing(list(of)), 3)
    write_file(CROSSOVERS, json.dumps(table, indent=1, sort_keys=True) + "\n")
    forget()


def crossing(rows: Sequence[Row]) -> float:
    """The density up to which the sparse MLP, all of it live, is no slower than the faster dense one."""
    dense = min(row["us_p50"] for row in rows if row["engine"] != "dejavu")
    ours = (row for row in rows if row["engine"] == "dejavu" and row["live"] == 1)
    sparse = sorted((row["density"], row["us_p50"]) for row in ours)
    below = 0.0, 0.0
    for density, us in sparse:
        if us > dense:
            share = (dense - below[1]) / (us - below[1])
            return float(below[0] + share * (density - below[0]))
        below = density, us
    return 1.0


def _columns(kernel: str, local: Local, rank: int) -> int:
    D, _, _, H = local.sizes
    return {"attention": H, "up": rank}.get(kernel.removesuffix("_beside"), D)


def _key(kernel: str, local: Local, weights: str, rank: int, batch: int) -> str:
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
    of = rows[kernel.removesuffix("_all").removesuffix("_beside")]
    return shape_key(kernel, of, _columns(kernel, local, rank), dtype, batch)


def _of_job(kernel: str, job: tuple[Local, str, int], batch: int) -> list[Settings]:
    local, weights, rank = job
    return candidates(kernel, _columns(kernel, local, rank), DTYPES[weights].itemsize, batch)


def _graphs(
    op: str, local: Local, weights: str, rank: int, batch: int, device: torch.device
) -> tuple[list[list[Call]], list[list[Call]]]:
    """Rows of calls over all rows, and at the densities that decoding has."""
    if op == "mlp":
        mlp = MLPCase(local, weights, device, batch)
        of_all = mlp.dense_calls() if batch == 1 else mlp.calls(1.0)[0]
        return [of_all], [mlp.calls(density)[0] for density in (0.25, 0.1)]
    if op == "attention":
        cases = [AttentionCase(local, weights, device, density, batch) for density in (0.5, 0.25)]
        return [cases[0].dense_calls()], [case.calls() for case in cases]
    return [], [PredictorCase(local, weights, device, rank, batch).calls()]


def _norm(D: int, device: torch.device) -> Call:
    """What comes between two calls of an operation."""
    x, norm = torch.randn(2, 1, 1, D, device=device, dtype=torch.bfloat16), torch.nn.LayerNorm(D)
    return partial(residual_norm, x[0], x[1], None, norm.to(device, torch.bfloat16))


def _of_kernel(
    kernel: str, batch: int, of_all: list[list[Call]], of_chosen: list[list[Call]]
) -> list[list[Call]]:
    """What tuning weighs equally: the calls in which the kernel runs."""
    if kernel in _ALIKE:
        return of_all
    return of_chosen if batch == 1 and f"{kernel}_all" in _ALIKE else [*of_chosen, *of_all]


def _score(graphs: Sequence[Sequence[Call]], replays: int) -> float:
    """The mean logarithm of the times; infinite where the settings do not fit the GPU."""
    try:
        times = [time_calls(calls, replays).p50 for calls in graphs]
    except OutOfResources:
        return math.inf
    return sum(map(math.log, times)) / len(times)


def _compile(job: tuple[str, Local, str, int, int, str, Settings]) -> None:
    """Fills Triton's cache on disk: runs the operation once, with nothing timed."""
    op, local, weights, rank, batch, kernel, settings = job
    override[kernel] = settings
    device = torch.device("cuda", torch.cuda.current_device())
    with suppress(OutOfResources):
        if op == "mlp":
            mlp = MLPCase(local, weights, device, batch)
            calls = mlp.dense_calls() if kernel in _ALIKE else mlp.calls(0.1)[0]
        elif op == "attention":
            block = AttentionCase(local, weights, device, 0.5, batch)
            calls = block.dense_calls() if kernel in _ALIKE else block.calls()
        else:
            calls = PredictorCase(local, weights, device, rank, batch).calls()
        calls[0]()
    override.clear()
