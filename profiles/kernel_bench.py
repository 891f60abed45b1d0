"""The kernels at the local shapes of OPT models: what a call takes, and how near that is to reading alone.

Weights are random, made on the GPU. Every call of a timed graph has its own active set and the next of some
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
from dejavu.runtime.cache import LAZY_BATCH, WINDOW
from dejavu.runtime.config import published_config

Row = dict[str, Any]
DTYPES = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8": torch.float8_e4m3fn,
    "int8": torch.int8,
}
DENSITIES = (1.0, 0.5, 0.25, 0.1, 0.05)
# Each call of a graph has an active set of its own; two copies of the weights suffice where they are large.
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


class MLPCase:
    """Copies of an MLP, and the calls that are timed on them."""

    def __init__(self, local: Local, weights: str, device: torch.device, batch: int = 1) -> None:
        D, self.ffn, _, _ = local.sizes
        dtype = DTYPES[weights]
        self.device, self.row_bytes = device, D * dtype.itemsize
        wide = dtype if dtype.itemsize > 1 else torch.bfloat16
        self.x = torch.randn(batch, 1, D, device=device, dtype=wide)
        self.out = torch.empty_like(self.x)
        pair = ((self.ffn, D), dtype, device)
        copies = min(max(_COPIES, round(2e9 / (2 * self.ffn * self.row_bytes))), _CALLS)
        self.copies = [(*random_weight(*pair), *random_weight(*pair)) for _ in range(copies)]
        # so large that it alone decides who lives
        self.bias = torch.full((self.ffn,), 100.0, device=device, dtype=wide)

    def calls(self, density: float, live: float = 1.0) -> tuple[list[Call], float]:
        """One for each of some random sets, and a call's bytes: the chosen rows of fc1, the live of fc2."""
        alive = torch.rand(self.ffn, device=self.device) < live
        bias = torch.where(alive, self.bias, -self.bias)
        chosen = round(density * self.ffn)
        sets = [random_ids(1, self.ffn, chosen, self.device) for _ in range(_CALLS)]
        mean_alive = sum(int(alive[ids[0, :chosen].long()].sum()) for ids, _ in sets) / _CALLS
        calls: list[Call] = [
            partial(self._ours, i, bias, ids[0], count) for i, (ids, count) in enumerate(sets)
        ]
        return calls, (chosen + mean_alive) * self.row_bytes

    def dense_calls(self) -> list[Call]:
        """Over all neurons, by our kernels."""
        return [partial(self._ours, i, self.bias, None, None) for i in range(4)]

    def library_calls(self) -> list[Call]:
        """Over all neurons, by cuBLAS."""
        return [partial(self._by_library, i) for i in range(4)]

    def _ours(self, i: int, bias: Tensor, ids: Tensor | None, count: Tensor | None) -> None:
        fc1, scale1, fc2, scale2 = self.copies[i % len(self.copies)]
        sparse_mlp(self.x, fc1, scale1, bias, fc2, scale2, ids, count, self.out)

    def _by_library(self, i: int) -> None:
        fc1, _, fc2, _ = self.copies[i % len(self.copies)]
        torch.matmul(F.relu_(F.linear(self.x, fc1, self.bias)), fc2, out=self.out)


def bench_mlp(bench: Bench, local: Local, weights: str, batch: int = 1) -> Iterator[Row]:
    """cuBLAS dense, our dense, then every density with all chosen neurons live and with one in three."""
    case = MLPCase(local, weights, bench.device, batch)
    what: Row = {"op": "mlp", "shape": local.name, "tp": local.tp, "weights": weights, "batch": batch}
    everything = 2 * case.ffn * case.row_bytes
    dense_us = None
    if DTYPES[weights].itemsize > 1:
        row = bench.row(case.library_calls(), everything, **what, engine="cublas", density=1.0)
        dense_us = row["us_p50"]
        yield {**row, "speedup_vs_dense": 1.0}
    yield bench.row(case.dense_calls(), everything, dense_us, **what, engine="dejavu dense", density=1.0)
    for live in (1.0, 1 / 3):
        for density in DENSITIES:
            calls, nbytes = case.calls(density, live)
            yield bench.row(calls, nbytes, dense_us, **what, engine="dejavu", density=density, live=live)


class AttentionCase:
    """Copies of an attention block with the state of a decode that has gone on for a while, and its calls."""

    def __init__(
        self, local: Local, weights: str, device: torch.device, density: float, batch: int = 1
    ) -> None:
        self.D, _, self.N, self.H = local.sizes
        dtype = DTYPES[weights]
        wide = dtype if dtype.itemsize > 1 else torch.bfloat16
        D, N, H, B = self.D, self.N, self.H, batch
        self.weight_bytes, self.kv_bytes = 4 * H * D * dtype.itemsize, 2 * CACHED * H * wide.itemsize
        self.batch, self.lazy = batch, batch <= LAZY_BATCH
        self.chosen = _chosen_heads(density, N)
        self.copies: list[dict[str, Any]] = []
        for _ in range(_COPIES):
            keys, values = torch.empty(2, B, N, CACHED + 128, H, dtype=wide, device=device).normal_()
            self.copies.append(
                {
                    "qkv": random_weight((N, 3, H, D), dtype, device),
                    "out_proj": random_weight((N, H, D), dtype, device),
                    "keys": keys,
                    "values": values,
                    "inputs": torch.randn(B, WINDOW, D, dtype=wide, device=device),
                    "filled_to": torch.full((B, N), CACHED - 2 * WINDOW, device=device),
                }
            )
        self.x = torch.randn(B, D, dtype=wide, device=device)
        self.bias = torch.randn(N, 3, H, dtype=wide, device=device)
        self.out = torch.empty_like(self.x)
        self.positions = torch.arange(CACHED + 128, device=device)[:, None].repeat(1, B)
        steps = _CALLS // _COPIES
        self.sets = [random_ids(B, N, self.chosen, device) for _ in range(_COPIES * (2 * WINDOW + steps))]
        for step in range(
            CACHED - 2 * WINDOW, CACHED if self.lazy else 0
        ):  # until heads lack what they lack in the long run
            for copy in range(_COPIES):
                self._ours(copy, step)
        self.start = [copy["filled_to"].clone() for copy in self.copies]

    def nbytes(self) -> float:
        """What a step of the chosen heads reads: the weights of those that some sequence chose, and each
        sequence's keys and values."""
        union = sum(len(ids[:, : self.chosen].unique()) for ids, _ in self.sets) / len(self.sets)
        return union * self.weight_bytes + self.batch * self.chosen * self.kv_bytes

    def calls(self) -> list[Call]:
        """A step of each copy in turn, position by position; the first puts the states back, in its time."""
        steps = _CALLS // _COPIES
        turns = [(copy, CACHED + step) for step in range(steps) for copy in range(_COPIES)]
        return [self._rewind_and_step, *(partial(self._ours, *turn) for turn in turns[1:])]

    def dense_calls(self) -> list[Call]:
        """Over all heads, by our kernels."""
        return [partial(self._ours, i % _COPIES, CACHED, all_heads=True) for i in range(4)]

    def library_calls(self) -> list[Call]:
        """Over all heads, by cuBLAS and scaled_dot_product_attention."""
        return [partial(self._by_library, i % _COPIES) for i in range(4)]

    def _rewind_and_step(self) -> None:
        for copy, start in zip(self.copies, self.start, strict=True):
            copy["filled_to"].copy_(start)
        self._ours(0, CACHED)

    def _ours(self, copy: int, position: int, *, all_heads: bool = False) -> None:
        c = self.copies[copy]
        (qkv, qkv_scale), (out_proj, out_scale) = c["qkv"], c["out_proj"]
        lazy = self.lazy and not all_heads
        ids, count = self.sets[_COPIES * (position - CACHED + 2 * WINDOW) + copy]
        sparse_attention(
            self.x,
            qkv,
            qkv_scale,
            self.bias,
            c["keys"],
            c["values"],
            self.positions[position],
            out_proj,
            out_scale,
            None if all_heads else ids,
            None if all_heads else count,
            inputs=c["inputs"] if lazy else None,
            filled_to=c["filled_to"] if lazy else None,
            out=self.out,
        )

    def _by_library(self, copy: int) -> None:
        c, B, D, N, H = self.copies[copy], self.batch, self.D, self.N, self.H
        qkv = F.linear(self.x, c["qkv"][0].view(3 * N * H, D), self.bias.flatten()).view(B, N, 3, H)
        q, k, v = qkv.unbind(2)
        c["keys"][:, :, CACHED], c["values"][:, :, CACHED] = k, v
        seen = slice(0, CACHED + 1)
        y = F.scaled_dot_product_attention(q[:, :, None], c["keys"][:, :, seen], c["values"][:, :, seen])
        torch.matmul(y.view(B, N * H), c["out_proj"][0].view(N * H, D), out=self.out)


def _chosen_heads(density: float, N: int) -> int:
    return max(round(density * N), 1)


def bench_attention(bench: Bench, local: Local, weights: str, batch: int = 1) -> Iterator[Row]:
    """QKV, attention over 1920 cached tokens and out_proj: dense by libraries and by our kernels, then chosen
    heads, a random set each step, with all filling of missing keys and values in the timed steps.

    A row's bytes are those of the chosen heads' weights, keys and values. Speed-ups are against the faster of
    the dense ones. More sequences than two compute the keys and values of all heads at every step.
    """
    what: Row = {"op": "attention", "shape": local.name, "tp": local.tp, "weights": weights, "batch": batch,
            "prompt_len": CACHED}  # fmt: skip
    dense_us = 0.0
    N = local.sizes[2]
    for density in {_chosen_heads(density, N): density for density in DENSITIES}.values():  # each number once
        case = AttentionCase(local, weights, bench.device, density, batch)
        if density == DENSITIES[0]:
            everything = case.N * (case.weight_bytes + batch * case.kv_bytes)
            rows = [bench.row(case.dense_calls(), everything, **what, engine="dejavu dense", density=1.0)]
            if DTYPES[weights].itemsize > 1:
                rows.append(bench.row(case.library_calls(), everything, **what, engine="cublas", density=1.0))
            dense_us = min(row["us_p50"] for row in rows)
            yield from ({**row, "speedup_vs_dense": dense_us / row["us_p50"]} for row in rows)
        share = case.chosen / case.N
        yield bench.row(case.calls(), case.nbytes(), dense_us, **what, engine="dejavu", density=share)


class PredictorCase:
    """Copies of the predictor of a layer's neurons, and the calls that are timed on them."""

    def __init__(self, local: Local, weights: str, device: torch.device, rank: int, batch: int = 1) -> None:
        (D, self.n, _, _), dtype = local.sizes, DTYPES[weights]
        self.residual = torch.randn(batch, D, dtype=torch.bfloat16, device=device)
        self.nbytes = rank * (D + self.n) * dtype.itemsize
        copies = max(2, round(200e6 / self.nbytes))
        self.downs = [random_weight((rank, D), dtype, device) for _ in range(copies)]
        self.ups = [random_weight((self.n, rank), dtype, device) for _ in range(copies)]
        self.sums = [(w.float() if s is None else w.float() * s).sum(-1) for w, s in self.downs]
        self.bias = torch.zeros(self.n, device=device)
        self.tally = torch.zeros(2, dtype=torch.int64, device=device)
        # scores are normal: a threshold of 1.28 deviations lets a tenth of them through
        deviation = 0.02 * 0.02 * (D * rank) ** 0.5
        self.threshold = torch.tensor([1.2816 * deviation], device=device)
        self.alive = torch.ones(batch, dtype=torch.int64, device=device)

    def calls(self) -> list[Call]:
        """One for each copy."""
        return [partial(self._ours, i) for i in range(len(self.downs))]

    def library_calls(self) -> list[Call]:
        """The two products alone, by cuBLAS."""
        return [partial(self._by_library, i) for i in range(len(self.downs))]

    def density(self) -> float:
        """What was chosen, on average."""
        chosen, sets = self.tally.tolist()
        return float(chosen / sets / self.n)

    def _ours(self, i: int) -> None:
        weights = (*self.downs[i], self.sums[i], *self.ups[i], self.bias)
        predict(self.residual, *weights, self.threshold, self.alive, self.tally, union=True)

    def _by_library(self, i: int) -> None:
        F.linear(F.linear(self.residual, self.downs[i][0]), self.ups[i][0])


def bench_predictor(bench: Bench, local: Local, weights: str, rank: int, batch: int = 1) -> Iterator[Row]:
    """The predictor of a layer's neurons, with selection; in 16 bits also its two products, by cuBLAS."""
    case = PredictorCase(local, weights, bench.device, rank, batch)
    what: Row = {"op": "predictor", "shape": local.name, "tp": local.tp, "weights": weights, "batch": batch,
            "rank": rank}  # fmt: skip
    if DTYPES[weights] == case.residual.dtype:
        yield bench.row(case.library_calls(), case.nbytes, **what, engine="cublas, no selection")
    row = bench.row(case.calls(), case.nbytes, **what, engine="dejavu")
    yield {**row, "density": case.density()}
