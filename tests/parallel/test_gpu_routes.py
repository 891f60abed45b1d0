"""Every way of an all-reduce between two GPUs: right, the same bits on both and in every run, in graphs."""

import pytest
import torch
from all_reduces import SIZES, boundaries, random_parts, sums

from dejavu.parallel.groups import TPGroup
from dejavu.parallel.routes import candidates
from ranks import run_ranks

pytestmark = pytest.mark.multi_gpu
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
PAIR = TPGroup(size=2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_route_sums(dtype):
    first, second = run_ranks(2, sums, dtype, cuda=True)
    assert first.keys() == second.keys() and len(first) == len(SIZES) * len(candidates("sum", dtype))
    for (route, numel), total in first.items():
        wanted = random_parts(PAIR, numel, dtype=dtype, seed=numel).double().sum(0).to(dtype)
        torch.testing.assert_close(total, wanted, msg=lambda m, r=route, n=numel: f"{r} {n}: {m}")
        assert torch.equal(total, second[route, numel]), (route, numel)


@pytest.mark.parametrize(
    "dtype, route", [(dtype, r) for dtype in DTYPES for r in candidates("boundary", dtype)]
)
def test_every_route_in_a_replayed_graph(dtype, route):
    (error, first), (_, second) = run_ranks(2, boundaries, dtype, route, cuda=True)
    # the sum of two is rounded, then the stream; both to this many bits of its largest number
    assert error < {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float32: 1e-5}[dtype]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
