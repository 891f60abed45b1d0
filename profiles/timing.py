"""Times of GPU work: graphs of calls that the host does not slow down, and the bandwidth to compare with."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl

from dejavu.kernels.device import num_sms

Call = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Times:
    """Microseconds a call: the median and the 99th percentile over replays of a graph of calls."""

    p50: float
    p99: float


def time_calls(calls: Sequence[Call], replays: int = 40) -> Times:
    """Captures the calls in one CUDA graph, in a row, and times its replays.

    The calls should read different memory, more than the L2 cache holds in all: then each finds in the cache
    what it would find there in a model.
    """
    warm_up = torch.cuda.Stream()
    warm_up.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm_up):
        calls[0]()
    torch.cuda.current_stream().wait_stream(warm_up)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    for _ in range(3):
        graph.replay()
    ends = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(replays)]
    for start, stop in ends:
        start.record()
        graph.replay()
        stop.record()
    torch.cuda.synchronize()
    each = [1e3 * start.elapsed_time(stop) / len(calls) for start, stop in ends]
    return Times(float(np.percentile(each, 50)), float(np.percentile(each, 99)))


@triton.jit
def _read_kernel(words_ptr, out_ptr, n, BLOCK: tl.constexpr):
    acc = tl.zeros([BLOCK], tl.int32)
    for first in tl.range(tl.program_id(0) * BLOCK, n, tl.num_programs(0) * BLOCK, num_stages=4):
        acc ^= tl.load(words_ptr + first + tl.arange(0, BLOCK))
    tl.store(out_ptr + tl.program_id(0), tl.sum(acc))


def read_bandwidth(device: torch.device) -> float:
    """Bytes a second that this GPU reads, measured on 2 GiB of random words: the best of a few grids."""
    # a multiple of every grid's block: the kernel has no mask
    words = torch.randint(-(2**31), 2**31 - 1, (2**29,), dtype=torch.int32, device=device)
    out = torch.empty(16 * num_sms(device), dtype=torch.int32, device=device)

    def read(grid: int, block: int) -> Call:
        return lambda: _read_kernel[(grid,)](words, out, len(words), BLOCK=block, num_warps=8)

    grids = [(k * num_sms(device), block) for k in (4, 8, 16) for block in (4096, 8192)]
    return max(words.nbytes / time_calls([read(*g)] * 2, 10).p50 * 1e6 for g in grids)
