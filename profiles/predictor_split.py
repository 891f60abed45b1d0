"""Two ways to make a predictor cheap enough to hide: 8-bit weights on every rank, or a first layer that is
split over the ranks, whose partial result rides on an all-reduce that there is anyway.

Shape legend: D hidden, n local neurons, r rank.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dejavu.kernels.predict import launch_down, launch_up
from dejavu.parallel.collectives import reduce_residual_norm
from dejavu.parallel.groups import TPGroup
from dejavu.parallel.routes import reserve
from dejavu.profiles.all_reduce_bench import slowest_rank
from dejavu.profiles.kernel_bench import DTYPES, Local, random_weight
from dejavu.profiles.timing import Call

Row = dict[str, Any]
_DTYPE = torch.bfloat16
# Weights that take turns: together more than the L2 cache.
_COPIES = 8
_WAYS = (("none", "int8"), ("whole", "bf16"), ("whole", "int8"), ("split", "bf16"), ("split", "int8"))


def bench_split(tp: TPGroup, name: str = "opt-175b", rank: int = 1024) -> Iterator[Row]:
    """Microseconds of a block boundary with the predictor of one layer's neurons behind it, of many in a
    graph; the slowest rank's. ``us_over_the_boundary`` is what the predictor adds. Every rank calls it."""
    reserve(tp, _DTYPE, "auto")
    boundary_us = 0.0
    for way, weights in _WAYS:
        calls = _Boundary(tp, Local(name, tp.size), weights, rank).calls(way)
        times = slowest_rank(tp, calls)
        boundary_us = boundary_us or times.p50
        yield {
            "op": "boundary and predictor",
            "shape": name,
            "tp": tp.size,
            "rank": rank,
            "predictor": way,
            "weights": weights,
            "us_p50": times.p50,
            "us_p99": times.p99,
            "us_over_the_boundary": times.p50 - boundary_us,
        }


class _Boundary:
    """A boundary, and predictors that read what it leaves."""

    def __init__(self, tp: TPGroup, local: Local, weights: str, rank: int) -> None:
        (D, self.n, _, _), dtype, device = local.sizes, DTYPES[weights], tp.device
        self.tp, self.rank, self.share = tp, rank, rank // tp.size
        self.downs = [random_weight((rank, D), dtype, device) for _ in range(_COPIES)]
        self.ups = [random_weight((self.n, rank), dtype, device) for _ in range(_COPIES)]
        self.sums = torch.zeros(rank, device=device)
        self.bias = torch.zeros(self.n, device=device)
        self.threshold = torch.full((1,), 0.02 * 0.02 * (D * rank) ** 0.5, device=device)
        self.tally = torch.zeros(2, dtype=torch.int64, device=device)
        self.ids = torch.empty(self.n, dtype=torch.int32, device=device)
        self.count = torch.empty(1, dtype=torch.int32, device=device)
        self.partial = tp.buffer((1, 1, D), _DTYPE).zero_()
        self.residual = torch.randn(1, 1, D, dtype=_DTYPE, device=device)
        self.extra = torch.zeros(1, rank, dtype=_DTYPE, device=device)
        self.norm_bias = torch.randn(D, dtype=_DTYPE, device=device)
        self.norm = nn.LayerNorm(D, device=device, dtype=_DTYPE).requires_grad_(False)

    def calls(self, way: str) -> Sequence[Call]:
        """One for each copy of the weights."""
        run = {"none": self._alone, "whole": self._whole, "split": self._split}[way]
        return [partial(run, i) for i in range(_COPIES)] * 4

    def _alone(self, _: int) -> None:
        self._reduce(None)

    def _whole(self, i: int) -> None:
        self._reduce(None)
        self._finish(launch_down(self.residual[0], *self.downs[i], self.sums), i)

    def _split(self, i: int) -> None:
        """This rank's rows of the first layer, before the boundary; the others' are zero in its payload."""
        mine = slice(self.tp.rank * self.share, (self.tp.rank + 1) * self.share)
        down, scale = self.downs[i]
        hidden = launch_down(
            self.residual[0], down[mine], None if scale is None else scale[mine], self.sums[mine]
        )
        self.extra.zero_()
        self.extra[:, mine] = hidden
        self._reduce(self.extra)
        self._finish(self.extra, i)

    def _reduce(self, extra: Tensor | None) -> None:
        reduce_residual_norm(self.partial, self.residual, self.norm_bias, self.norm, extra, tp=self.tp)

    def _finish(self, hidden: Tensor, i: int) -> None:
        launch_up(hidden, *self.ups[i], self.bias, self.threshold, None, self.ids, self.count, self.tally)
