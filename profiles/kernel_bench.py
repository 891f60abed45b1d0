"""The kernels at the local shapes of OPT models: what a call takes, and how near that is to reading alone.

Weights are random, made on the GPU. Every call of a timed graph has its own active set and the next of two
copies of the weights, so that the L2 cache helps no more than it would in a model.

Shape legend: B batch, D hidden, N local heads, H head dim, F local ffn, r rank, n entries that are predicted.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dejavu.kernels.predict import predict
from dejavu.kernels.sparse_attention import sparse_attention
from dejavu.kernels.sparse_mlp import sparse_mlp
from dejavu.profiles.timing import Call, time_calls
from dejavu.runtime.cache import WINDOW
from dejavu.runtime.config import published_config

Row = dict[str, Any]
DTYPES = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8": torch.float8_e4m3fn,
    "int8": torch.int8,
}
DENSITIES = (1.0, 0.5, 0.25, 0.1, 0.05)
# Each call of a graph has an active set of its own, each of two copies of the weights several.
_CALLS, _COPIES = 16, 2
CACHED = 1920  # tokens before the one that is decoded


@dataclass(frozen=True, slots=True)
class Local:
    """What one of ``tp`` ranks holds of a layer of a published model."""

    name: str
    tp: int

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """D, F, N, H.

        Raises:
            ValueError: no such model, or one that ``tp`` ranks cannot share.
        """
        config = published_config(self.name)
        config.check_tp(self.tp)
        D = config.hidden_size
        return D, config.ffn_dim // self.tp, config.num_heads // self.tp, config.head_dim


SHAPES = (
    Local("opt-6.7b", 1),
    Local("opt-30b", 1),
    Local("opt-66b", 1),
    Local("opt-175b", 2),
    Local("opt-175b", 8),
)


@dataclass(frozen=True, slots=True)
class Bench:
    """Where and against what is measured: ``bandwidth`` in bytes a second."""

    device: torch.device
    bandwidth: float
    replays: int = 40

    def row(self, calls: Sequence[Call], nbytes: float, dense_us: float | None = None, **what: Any) -> Row:
        """Times ``calls``, each of which has to read ``nbytes``."""
        times = time_calls(calls, self.replays)
        floor = nbytes / self.bandwidth * 1e6
        row = {
            **what,
            "us_p50": times.p50,
            "us_p99": times.p99,
            "floor_us": floor,
            "gb_per_s": nbytes / times.p50 / 1e3,
            "efficiency": floor / times.p50,
        }
        return row if dense_us is None else {**row, "speedup_vs_dense": dense_us / times.p50}


def random_weight(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """A weight and, of an 8-bit one, the scale of each row."""
    if dtype.itemsize > 1:
        return torch.empty(shape, dtype=dtype, device=device).normal_(0, 0.02), None
    scale = torch.full((*shape[:-1], 1), 0.02 / 40, device=device)
    codes = torch.empty(shape, dtype=torch.float16, device=device).normal_(0, 40).clamp_(-127, 127)
    return codes.to(dtype), scale


def random_ids(rows: int, n: int, chosen: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """``chosen`` of ``n`` ids, ascending, for each of ``rows``, and the counts."""
    order = torch.rand(rows, n, device=device).argsort(-1)
    ids = torch.cat([order[:, :chosen].sort(-1).values, order[:, chosen:]], dim=-1)
    return ids.int(), torch.full((rows,), chosen, dtype=torch.int32, device=device)


def bench_mlp(
    bench: Bench,
    local: Local,
    weights: str,
    batch: int = 1,
    densities: Sequence[float] = DENSITIES,
    lives: Sequence[float] = (1.0, 1 / 3),
) -> Iterator[Row]:
    """cuBLAS dense, our dense, then every density with all chosen neurons live and with one in three.

    A row's bytes are those of the chosen rows of fc1 and of the live ones of fc2.
    """
    (D, ffn, _, _), dtype, device = local.sizes, DTYPES[weights], bench.device
    wide = dtype if dtype.itemsize > 1 else torch.bfloat16
    what = {"op": "mlp", "shape": local.name, "tp": local.tp, "weights": weights, "batch": batch}
    x = torch.randn(batch, 1, D, device=device, dtype=wide)
    out = torch.empty_like(x)
    copies = [
        (*random_weight((ffn, D), dtype, device), *random_weight((ffn, D), dtype, device))
        for _ in range(_COPIES)
    ]
    # so large that it alone decides who lives
    bias = torch.full((ffn,), 100.0, device=device, dtype=wide)
    row_bytes = D * dtype.itemsize

    def dense(copy: int) -> Call:
        fc1, _, fc2, _ = copies[copy % _COPIES]
        return lambda: torch.matmul(F.relu_(F.linear(x, fc1, bias)), fc2, out=out)

    def ours(copy: int, bias: Tensor, ids: Tensor | None, count: Tensor | None) -> Call:
        fc1, scale1, fc2, scale2 = copies[copy % _COPIES]
        return lambda: sparse_mlp(x, fc1, scale1, bias, fc2, scale2, ids, count, out)

    dense_us = None
    if dtype.itemsize > 1:
        row = bench.row(
            [dense(i) for i in range(4)], 2 * ffn * row_bytes, **what, engine="cublas", density=1.0
        )
        dense_us = row["us_p50"]
        yield {**row, "speedup_vs_dense": 1.0}
    calls = [ours(i, bias, None, None) for i in range(4)]
    yield bench.row(calls, 2 * ffn * row_bytes, dense_us, **what, engine="dejavu dense", density=1.0)
    for live in lives:
        signs = bias if live == 1 else torch.where(torch.rand(ffn, device=device) < live, bias, -bias)
        for density in densities:
            chosen = round(density * ffn)
            sets = [random_ids(1, ffn, chosen, device) for _ in range(_CALLS)]
            alive = sum(int((signs[ids[0, :chosen].long()] > 0).sum()) for ids, _ in sets) / _CALLS
            calls = [ours(i, signs, ids[0], count) for i, (ids, count) in enumerate(sets)]
            nbytes = (chosen + alive) * row_bytes
            yield bench.row(calls, nbytes, dense_us, **what, engine="dejavu", density=density, live=live)


class _Layers:
    """Copies of an attention block with the state of a decode that has gone on for a while."""

    def __init__(self, local: Local, weights: str, chosen: int, device: torch.device) -> None:
        self.D, _, self.N, self.H = local.sizes
        dtype = DTYPES[weights]
        wide = dtype if dtype.itemsize > 1 else torch.bfloat16
        D, N, H = self.D, self.N, self.H
        self.copies = []
        for _ in range(_COPIES):
            keys, values = torch.empty(2, 1, N, CACHED + 128, H, dtype=wide, device=device).normal_()
            self.copies.append(
                {
                    "qkv": random_weight((N, 3, H, D), dtype, device),
                    "out_proj": random_weight((N, H, D), dtype, device),
                    "keys": keys,
                    "values": values,
                    "inputs": torch.randn(1, WINDOW, D, dtype=wide, device=device),
                    "filled_to": torch.full((1, N), CACHED - 2 * WINDOW, device=device),
                }
            )
        self.x = torch.randn(1, D, dtype=wide, device=device)
        self.bias = torch.randn(N, 3, H, dtype=wide, device=device)
        self.out = torch.empty_like(self.x)
        self.positions = torch.arange(CACHED + 128, device=device)[:, None]
        steps = _CALLS // _COPIES
        self.sets = [random_ids(1, N, chosen, device) for _ in range(_COPIES * (2 * WINDOW + steps))]
        for step in range(CACHED - 2 * WINDOW, CACHED):  # until heads lack what they lack in the long run
            for copy in range(_COPIES):
                self.step(copy, step)
        self.start = [copy["filled_to"].clone() for copy in self.copies]

    def step(self, copy: int, position: int, *, all_heads: bool = False) -> None:
        """One decode step of a copy at a position."""
        c = self.copies[copy]
        ids, count = self.sets[_COPIES * (position - CACHED + 2 * WINDOW) + copy]
        sparse_attention(
            self.x,
            *c["qkv"],
            self.bias,
            c["keys"],
            c["values"],
            self.positions[position],
            *c["out_proj"],
            *((None, None) if all_heads else (ids, count)),
            inputs=None if all_heads else c["inputs"],
            filled_to=None if all_heads else c["filled_to"],
            out=self.out,
        )

    def calls(self) -> list[Call]:
        """A step of each copy in turn, position by position; the first puts the states back, in its time."""
        steps = _CALLS // _COPIES
        turns = [(copy, CACHED + step) for step in range(steps) for copy in range(_COPIES)]
        return [self._rewind_and_step, *(partial(self.step, *turn) for turn in turns[1:])]

    def dense_calls(self) -> list[Call]:
        """The same over all heads, by our kernels."""
        return [partial(self.step, i % _COPIES, CACHED, all_heads=True) for i in range(4)]

    def library_calls(self) -> list[Call]:
        """The same over all heads, by cuBLAS and scaled_dot_product_attention."""
        return [partial(self._by_library, i % _COPIES) for i in range(4)]

    def _rewind_and_step(self) -> None:
        for copy, start in zip(self.copies, self.start, strict=True):
            copy["filled_to"].copy_(start)
        self.step(0, CACHED)

    def _by_library(self, copy: int) -> None:
        c, D, N, H = self.copies[copy], self.D, self.N, self.H
        qkv = F.linear(self.x, c["qkv"][0].view(3 * N * H, D), self.bias.flatten()).view(N, 3, 1, H)
        q, k, v = qkv.unbind(1)
        c["keys"][0, :, CACHED], c["values"][0, :, CACHED] = k[:, 0], v[:, 0]
        seen = slice(0, CACHED + 1)
        y = F.scaled_dot_product_attention(q[None], c["keys"][:, :, seen], c["values"][:, :, seen])
        torch.matmul(y.view(1, N * H), c["out_proj"][0].view(N * H, D), out=self.out)


def bench_attention(bench: Bench, local: Local, weights: str,
                    densities: Sequence[float] = DENSITIES) -> Iterator[Row]:  # fmt: skip
    """QKV, attention over 1920 cached tokens and out_proj: dense by libraries and by our kernels, then chosen
    heads, a random set each step, with all filling of missing keys and values in the timed steps.

    A row's bytes are those of the chosen heads' weights, keys and values.
    """
    (D, _, N, H), device = local.sizes, bench.device
    itemsize = DTYPES[weights].itemsize
    head_bytes = 4 * H * D * itemsize + 2 * CACHED * H * 2
    what = {"op": "attention", "shape": local.name, "tp": local.tp, "weights": weights, "batch": 1,
            "prompt_len": CACHED}  # fmt: skip
    dense_us = None
    for density in densities:
        chosen = max(round(density * N), 1)
        layers = _Layers(local, weights, chosen, device)
        if density == densities[0]:
            ours = bench.row(layers.dense_calls(), N * head_bytes, **what, engine="dejavu dense", density=1.0)
            dense_us = ours["us_p50"]
            if itemsize > 1:
                row = bench.row(layers.library_calls(), N * head_bytes, **what, engine="cublas", density=1.0)
                dense_us = min(dense_us, row["us_p50"])
                yield {**row, "speedup_vs_dense": dense_us / row["us_p50"]}
            yield {**ours, "speedup_vs_dense": dense_us / ours["us_p50"]}
        yield bench.row(
            layers.calls(), chosen * head_bytes, dense_us, **what, engine="dejavu", density=chosen / N
        )


def bench_predictor(bench: Bench, local: Local, weights: str, rank: int, batch: int = 1) -> Iterator[Row]:
    """The predictor of a layer's neurons, with selection; in 16 bits also its two products, by cuBLAS."""
    (D, n, _, _), dtype, device = local.sizes, DTYPES[weights], bench.device
    what = {
        "op": "predictor",
        "shape": local.name,
        "tp": local.tp,
        "weights": weights,
        "batch": batch,
        "rank": rank,
    }
    residual = torch.randn(batch, D, dtype=torch.bfloat16, device=device)
    copies = max(2, round(200e6 / (rank * (D + n) * dtype.itemsize)))
    downs = [random_weight((rank, D), dtype, device) for _ in range(copies)]
    ups = [random_weight((n, rank), dtype, device) for _ in range(copies)]
    sums = [w.float().sum(-1) if s is None else (w.float() * s).sum(-1) for w, s in downs]
    bias, tally = torch.zeros(n, device=device), torch.zeros(2, dtype=torch.int64, device=device)
    # scores are normal: a threshold of 1.28 deviations lets a tenth of them through
    deviation = 0.02 * 0.02 * (D * rank) ** 0.5
    threshold = torch.tensor([1.2816 * deviation], device=device)
    alive = torch.ones(batch, dtype=torch.int64, device=device)
    nbytes = rank * (D + n) * dtype.itemsize

    def ours(i: int) -> Call:
        weights = (*downs[i], sums[i], *ups[i], bias, threshold, alive, tally)
        return lambda: predict(residual, *weights, union=True)

    def two_products(i: int) -> Call:
        return lambda: F.linear(F.linear(residual, downs[i][0]), ups[i][0])

    if dtype == torch.bfloat16:
        yield bench.row(
            [two_products(i) for i in range(copies)], nbytes, **what, engine="cublas, no selection"
        )
    calls = [ours(i) for i in range(copies)]
    row = bench.row(calls, nbytes, **what, engine="dejavu")
    chosen, steps = tally.tolist()
    yield {**row, "density": chosen / steps / n}
