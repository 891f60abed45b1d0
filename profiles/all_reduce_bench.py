"""What an all-reduce of a decode step takes, by each of its routes, alone and at the block boundary.

Shape legend: B tokens, D hidden.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from dejavu.parallel.collectives import all_reduce, reduce_residual_norm
from dejavu.parallel.groups import TPGroup
from dejavu.parallel.routes import DTYPES, OPS, TABLE, Route, candidates, only, reserve, section, table_key
from dejavu.profiles.records import write_file
from dejavu.profiles.timing import Call, Times, time_calls

Row = dict[str, Any]
DTYPE = torch.bfloat16
# (B, D): a token of OPT-6.7B, 30B, 66B and 175B, and more tokens of the last.
SHAPES = ((1, 4096), (1, 7168), (1, 9216), *((B, 12288) for B in (1, 2, 4, 8, 16, 64)))
_CALLS = 64


def bench_all_reduce(tp: TPGroup, replays: int = 40) -> Iterator[Row]:
    """Microseconds a call, of many in a CUDA graph: the slowest rank's. Every rank calls it.

    Raises:
        ValueError: the group has no symmetric memory.
    """
    reserve(tp, DTYPE, "symm")
    routes = tp.routes[DTYPE]
    stored = routes.table
    for op, call_of in (("sum", _sum), ("boundary", _boundary)):
        for B, D in SHAPES:
            for route in candidates(op, DTYPE):
                routes.table = only(route)
                yield _row(tp, op, route, B, D, [call_of(tp, B, D)] * _CALLS, replays)
    routes.table = stored


def slowest_rank(tp: TPGroup, calls: Sequence[Call], replays: int = 40) -> Times:
    """What the calls take on the rank where they take longest. Every rank calls it."""
    torch.cuda.synchronize(tp.device)
    tp.gather_objects(None)  # begin together
    own = time_calls(calls, replays)
    return Times(*(max(column) for column in zip(*tp.gather_objects((own.p50, own.p99)), strict=True)))


def write_table(rows: list[Row], gpu: str, ranks: int) -> None:
    """Puts the fastest route of each size into the table in the source tree."""
    tables = json.loads(TABLE.read_text())
    tables[table_key(gpu, ranks)] = {
        section(op, dtype): _fastest([row for row in rows if row["op"] == op], candidates(op, dtype))
        for op in OPS
        for dtype in DTYPES
    }
    write_file(TABLE, json.dumps(dict(sorted(tables.items())), indent=1) + "\n")


def _fastest(rows: list[Row], routes: list[Route]) -> dict[str, Route]:
    """By bytes; a size whose route is that of the next larger one needs no entry."""
    best: dict[str, Route] = {}
    for nbytes in sorted({row["bytes"] for row in rows}):
        tried = [row for row in rows if row["bytes"] == nbytes and row["route"] in routes]
        found = min(tried, key=lambda row: float(row["us_p50"]))["route"]
        if best and next(reversed(best.values())) == found:
            best.popitem()
        best[str(nbytes)] = found
    return best


def _row(tp: TPGroup, op: str, route: Route, B: int, D: int, calls: list[Call], replays: int) -> Row:
    times = slowest_rank(tp, calls, replays)
    nbytes = B * D * DTYPE.itemsize
    return {
        "op": op,
        "route": route,
        "tp": tp.size,
        "batch": B,
        "bytes": nbytes,
        "us_p50": times.p50,
        "us_p99": times.p99,
        "gb_per_s": nbytes / times.p50 / 1e3,
    }


def _sum(tp: TPGroup, B: int, D: int) -> Call:
    payload = tp.buffer((B, 1, D), DTYPE).zero_()
    return lambda: all_reduce(payload, tp)


def _boundary(tp: TPGroup, B: int, D: int) -> Call:
    """With what follows it in a decoder layer."""
    partial = tp.buffer((B, 1, D), DTYPE).zero_()
    residual = torch.randn(B, 1, D, dtype=DTYPE, device=tp.device)
    bias = torch.randn(D, dtype=DTYPE, device=tp.device)
    norm = nn.LayerNorm(D, device=tp.device, dtype=DTYPE).requires_grad_(False)
    call: Callable[[], object] = lambda: reduce_residual_norm(partial, residual, bias, norm, tp=tp)  # noqa: E731
    return call
