"""Times of GPU work: graphs of calls that the host does not slow down, whole decodes with their memory and
energy, and the bandwidth to compare with."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from statistics import median
from typing import Any

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


@dataclass(frozen=True, slots=True)
class Decoded:
    """One measured run of an engine on one rank.

    ``ttft_ms`` is the median of a few prefills up to the first token; ``steps_ms`` has every decode step
    after it; ``peak_gib`` of memory allocated (None on the CPU); ``joules_per_token`` that this rank's GPU
    drew over the steps, by all tokens of the batch (None where NVML does not tell).
    """

    ttft_ms: float
    steps_ms: tuple[float, ...]
    peak_gib: float | None
    joules_per_token: float | None


class StepClock:
    """What passes between its ticks: CUDA events, read when all is over, or the host's clock on the CPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._ticks: list[Any] = []

    def tick(self) -> None:
        """Ends a step and begins the next; waits for nothing."""
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self._device))
            self._ticks.append(event)
        else:
            self._ticks.append(time.perf_counter())

    def steps_ms(self) -> tuple[float, ...]:
        """Milliseconds between each tick and the next."""
        _synchronize(self._device)
        pairs = zip(self._ticks, self._ticks[1:], strict=False)
        if self._device.type == "cuda":
            return tuple(start.elapsed_time(stop) for start, stop in pairs)
        return tuple(1e3 * (stop - start) for start, stop in pairs)


class EnergyMeter:
    """``joules`` that a GPU draws within the ``with``; None on the CPU and where NVML has no such counter.

    The counter advances some ten times a second: what is measured should take seconds.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.joules: float | None = None

    def __enter__(self) -> "EnergyMeter":
        self._nvml, self._handle = _nvml_handle(self._device)
        _synchronize(self._device)
        self._start = self._read()
        return self

    def __exit__(self, *_: object) -> None:
        _synchronize(self._device)
        stop = self._read()
        if self._start is not None and stop is not None:
            self.joules = (stop - self._start) / 1e3
        if self._nvml is not None:
            self._nvml.nvmlShutdown()

    def _read(self) -> int | None:
        """Millijoules since the driver was loaded."""
        if self._nvml is None:
            return None
        try:
            return int(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle))
        except self._nvml.NVMLError:
            return None


def _nvml_handle(device: torch.device) -> tuple[Any, Any]:
    """NVML, initialised, and its handle of a torch device; (None, None) where one is missing."""
    if device.type != "cuda":
        return None, None
    try:
        nvml = import_module("pynvml")
        nvml.nvmlInit()
    except Exception:  # no package, no library, no rights: all mean that there is no meter
        return None, None
    try:
        # by UUID: NVML's numbers know nothing of CUDA_VISIBLE_DEVICES
        return nvml, nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
    except nvml.NVMLError:
        nvml.nvmlShutdown()
        return None, None


def time_decode(
    prefill: Call, step: Call, *, batch: int, new_tokens: int, device: torch.device, warm_up: int = 3
) -> Decoded:
    """Times an engine: three prefills, then the ``new_tokens - 1`` steps after the last of them.

    Args:
        prefill: starts over from the prompt, up to the first token, which may stay on the device.
        step: gives every sequence its next token, without waiting for the device.
        batch: the sequences that decode together.
        new_tokens: of each sequence; the prefill gives the first.
        warm_up: steps of an untimed run before, so that the timed ones begin where the prompt ends.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    prefill()
    for _ in range(warm_up):
        step()
    ttft_ms = median(_host_ms(prefill, device) for _ in range(3))
    clock = StepClock(device)
    with EnergyMeter(device) as meter:
        clock.tick()
        for _ in range(new_tokens - 1):
            step()
            clock.tick()
    return Decoded(
        ttft_ms,
        clock.steps_ms(),
        torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None,
        None if meter.joules is None else meter.joules / (batch * (new_tokens - 1)),
    )


def _host_ms(call: Call, device: torch.device) -> float:
    _synchronize(device)
    start = time.perf_counter()
    call()
    _synchronize(device)
    return 1e3 * (time.perf_counter() - start)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


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
