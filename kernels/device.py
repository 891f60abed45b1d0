"""What the kernels share: conversions and products of mixed types on the device, counters."""

import ctypes
import os
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from dejavu.kernels import driver
from dejavu.kernels.tuning import Settings

# Triton's interpreter takes bf16 for the integers that it is stored in, in products and conversions of int8.
_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
# Programs that meet at one counter; the largest shapes need a few hundred counters.
_COUNTERS = 2**16
# Tokens that share a reading of the weights in one launch; more take several.
MAX_TOKENS = 16
_PREFERRED_SHARED_MEMORY_CARVEOUT = 9  # of CUfunction_attribute; in percent


@triton.jit
def to_float(w):
    """Weights to fp32. 8-bit ones by way of a 16-bit type that holds them exactly: those conversions come in
    packed pairs, where the direct ones run at a quarter of the rate."""
    if w.dtype == tl.int8 and not _INTERPRETED:
        w = w.to(tl.bfloat16)
    elif w.dtype == tl.float8e4nv:
        w = w.to(tl.float16)
    return w.to(tl.float32)


@triton.jit
def half_to_float(words, BF16: tl.constexpr):
    """The 16-bit numbers in the lowest bits of words, in fp32."""
    if BF16:
        return (words.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return (words & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def dot(a, b, acc):
    """``acc + a @ b`` in fp32. An 8-bit side takes the other's 16-bit type, which holds it exactly; what has
    fp32 on one side is multiplied as three tf32 products, on both sides without rounding."""
    if a.dtype.primitive_bitwidth == 8 and b.dtype.primitive_bitwidth == 16:
        a = to_float(a).to(b.dtype)
    elif b.dtype.primitive_bitwidth == 8 and a.dtype.primitive_bitwidth == 16:
        b = to_float(b).to(a.dtype)
    if a.dtype == b.dtype and a.dtype != tl.float32 and not (_INTERPRETED and a.dtype == tl.bfloat16):
        acc = tl.dot(a, b, acc)
    elif a.dtype == b.dtype:
        acc = tl.dot(to_float(a), to_float(b), acc, input_precision="ieee")
    else:
        acc = tl.dot(to_float(a), to_float(b), acc, input_precision="tf32x3")
    return acc


@triton.jit
def dp4a(a, b):
    """Products of words of four signed bytes, each the sum of four: exact, in ``int32``."""
    if _INTERPRETED:
        total = a * 0 + b * 0
        for i in tl.static_range(4):
            total += ((a << (24 - 8 * i)) >> 24) * ((b << (24 - 8 * i)) >> 24)
    else:
        total = tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, 0;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1
        )
    return total


@triton.jit
def first_weights(row_ptr, chosen, D: tl.constexpr, BLOCK_D: tl.constexpr, PAIRS: tl.constexpr = False):
    """The first weights of rows, ``[ROWS, BLOCK_D]``, of those that are chosen; for `row_products`. PAIRS: a
    thread has two in a row, and not 16 bytes."""
    cols = tl.arange(0, BLOCK_D)
    if PAIRS:
        cols = tl.max_contiguous(cols, 2)
    return tl.load(row_ptr[:, None] + cols[None, :], mask=chosen[:, None] & (cols < D)[None, :], other=0.0)


@triton.jit
def row_products(early, row_ptr, chosen, x_ptr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of weights ``[ROWS, D]``, those that are chosen, times one token's ``x [D]``: fp32 ``[ROWS]``.
    ``early`` are their `first_weights`: loaded while ``x`` is not there yet, or another block is summed."""
    cols = tl.arange(0, BLOCK_D)
    x = tl.load(x_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)
    acc = to_float(early) * x[None, :]
    for d in tl.static_range(BLOCK_D, D, BLOCK_D):  # unrolled: all of a row's loads are under way at once
        inside = d + cols < D
        w = tl.load(row_ptr[:, None] + (d + cols)[None, :], mask=chosen[:, None] & inside[None, :], other=0.0)
        x = tl.load(x_ptr + d + cols, mask=inside, other=0.0).to(tl.float32)
        acc += to_float(w) * x[None, :]
    return tl.sum(acc, 1)


@triton.jit
def let_successor_begin(PDL: tl.constexpr):
    """Lets the next kernel on the stream begin, if that is launched early, as far as it is up to this program
    (as its end does)."""
    if PDL:
        gdc_launch_dependents()


@triton.jit
def wait_for_predecessor(PDL: tl.constexpr, LET: tl.constexpr = True):
    """With programmatic dependent launch a kernel starts while its predecessor on the stream still runs, once
    every program of that has let it; and here it waits until that is complete, and so is what else it depends
    on (a predictor on another stream). Before, a program may read weights and write nothing: what others have
    written it may not see even if they have ended, so ids are read again. (On H200 QKV read what a copy right
    before it had not yet written.) LET: this one lets its own successor."""
    if LET:
        let_successor_begin(PDL)
    if PDL:
        gdc_wait()


@triton.jit
def arrives_last(counter_ptr, programs):
    """Whether this is the last of so many programs to come here: it sees all that the others have written
    before, and reads it past the first-level cache (``.cg``). The counter is zero again when it has come."""
    tl.debug_barrier()  # all threads of this program have written
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel") == programs - 1
    if last:
        tl.store(counter_ptr, 0)
    return last


@cache
def has_pdl(device: torch.device) -> bool:
    """Whether programmatic dependent launch is to be had: from compute capability 9 on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def launched_early(pdl: bool) -> dict[str, bool]:
    """Lets a kernel that has `wait_for_predecessor` begin while its predecessor on the stream runs."""
    return {"PDL": pdl, "launch_pdl": pdl}


_beside: set[int] = set()


def runs_beside(kernel: Any) -> None:
    """Lets the next launches of a compiled kernel share multiprocessors with kernels that need shared memory.

    A multiprocessor divides one memory into first-level cache and shared memory, anew only when it is empty:
    a kernel that asks for little shared memory would keep those that need much out until it has ended. (QKV
    of OPT-66B on two H100 began 16 us late beside a predictor, with 8 sequences 40 us.)
    """
    function = getattr(kernel, "function", None)  # None in Triton's interpreter
    if function is None or function in _beside:
        return
    driver.call("cuFuncSetAttribute", ctypes.c_void_p(function), _PREFERRED_SHARED_MEMORY_CARVEOUT, 100)
    _beside.add(function)


@cache
def counters(device: torch.device) -> Tensor:
    """Zeros ``int32[...]`` for `arrives_last`.

    One array a device: the kernels that count run on one stream, and what they do behind their wait, as
    counting, they do one after the other. (Predictors, which run beside them, count nothing.)
    """
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    assert not capturing, "a graph is captured after a step outside of it: its zeros would be the graph's own"
    return torch.zeros(_COUNTERS, dtype=torch.int32, device=device)


@cache
def num_sms(device: torch.device) -> int:
    """Streaming multiprocessors; 2 stand for the CPU, on which Triton's interpreter runs."""
    if device.type == "cpu":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


def row_settings(D: int, dtype: torch.dtype) -> Settings:
    """For a kernel of `row_products`, sound for any shape; PROGRAMS is a number for each multiprocessor."""
    block = min(1024, triton.next_power_of_2(D))
    return {"ROWS": 2 if dtype.itemsize > 1 else 4, "BLOCK_D": block, "PROGRAMS": 16, "num_warps": 4}


@cache
def has_large_shared_memory(device: torch.device) -> bool:
    """Whether a program may take 160 KB and more: on the GPUs for data centres, not on their smaller kin."""
    if device.type == "cpu":
        return True
    properties = triton.runtime.driver.active.utils.get_device_properties(device.index)
    return bool(properties["max_shared_mem"] >= 160 * 1024)


def token_block(batch: int) -> int:
    """The tokens a program works on: one, or a power of 2 that tensor cores take."""
    return 1 if batch == 1 else max(16, triton.next_power_of_2(batch))
