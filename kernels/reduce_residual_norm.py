"""The block boundary in one kernel: all-reduce, row-parallel bias, residual and LayerNorm, over peer memory.

A rank writes its 16-bit partial sums into the inbox of every other, two to a word of 64 bits with the number
of the call (the epoch) as the other half. Words of 64 bits arrive whole, so who waits for the epoch has the
data: no flags, no fences, one way over the link. (NCCL's LL protocol, for a fixed place.) There is no plain
reference: without ranks there is nothing to do; `all_reduce` and `residual_norm` do the same in two steps.

A token is shared by some programs, for one multiprocessor takes a microsecond for every 3000 elements that it
sends, receives and stores: some send a part of the row each and wait for nothing, others receive all of it,
which the norm needs, and store a part each. Programs start in their order, a token's senders first: so no
more of them need to run at once than do; and what is launched behind them begins when all have their places.

Why nothing is overwritten before it was read: epochs alternate between two halves of the inbox. A rank that
sends epoch n + 2 has finished its kernel of n + 1, so has received n + 1 from every peer, which they sent in
a kernel that waited until theirs of epoch n, which read the same half, was complete. The epochs are counted
on the device, by each program of a slot (token) for itself, and a slot has one place whatever the shape:
graphs can be replayed and mixed with other calls, as long as every rank makes the same calls in the same
order, on one stream.

Shape legend: T tokens, D hidden, R ranks.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from dejavu.kernels.device import (
    half_to_float,
    has_pdl,
    launched_early,
    let_successor_begin,
    wait_for_predecessor,
)

# Tokens of a call, and 64-bit words (pairs of elements) that a token may have.
SLOTS, SLOT_WORDS = 64, 8192
# Programs that share a token: at most so many send, and as many receive; and at most so many send in all.
MOST_PARTS, _SENDERS = 8, 32
TYPES = (torch.float16, torch.bfloat16)
_ROW = 2048


@dataclass(frozen=True, slots=True)
class Inboxes:
    """Where ranks write to each other. Every inbox is zeroed before anyone writes, epochs with it.

    Args:
        addresses: ``int64[R]`` on the device, of each rank's inbox as this rank sees it.
        epochs: ``int32[SLOTS, 2, MOST_PARTS]``, calls so far; in this rank's own memory.
    """

    addresses: Tensor
    epochs: Tensor
    rank: int

    @staticmethod
    def zero_epochs(device: torch.device | None = None) -> Tensor:
        """No call so far."""
        return torch.zeros(SLOTS, 2, MOST_PARTS, dtype=torch.int32, device=device)

    @staticmethod
    def nbytes(ranks: int) -> int:
        """Of one rank's inbox."""
        return 2 * ranks * SLOTS * SLOT_WORDS * 8

    def takes(self, dtype: torch.dtype, tokens: int, D: int) -> bool:
        """Whether a call of this shape fits."""
        return dtype in TYPES and tokens <= SLOTS and D % 2 == 0 and D <= 2 * SLOT_WORDS


@triton.jit
def _pair(low, high, BF16: tl.constexpr):
    """Two fp32 numbers to a pair of 16-bit ones."""
    TYPE: tl.constexpr = tl.bfloat16 if BF16 else tl.float16
    first = low.to(TYPE).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return first | (high.to(TYPE).to(tl.int16, bitcast=True).to(tl.int32) << 16)


@triton.jit
def _send(
    part,
    t,
    epoch,
    partial_ptr,
    addresses_ptr,
    PAIRS: tl.constexpr,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    SLOTS: tl.constexpr,
    SLOT_WORDS: tl.constexpr,
    SHARE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A share of a row into the inboxes of the others."""
    cols = part * SHARE + tl.arange(0, BLOCK)
    inside = (cols < (part + 1) * SHARE) & (cols < PAIRS)
    mine = tl.load(partial_ptr + t * PAIRS + cols, mask=inside, other=0)
    words = (epoch.to(tl.int64) << 32) | (mine.to(tl.int64) & 0xFFFFFFFF)
    place = ((epoch & 1) * RANKS + RANK) * (SLOTS * SLOT_WORDS) + t * SLOT_WORDS
    for peer in tl.static_range(RANKS):
        if peer != RANK:
            inbox = tl.multiple_of(tl.load(addresses_ptr + peer).to(tl.pointer_type(tl.int64)), 16)
            tl.store(inbox + place + cols, words, mask=inside)


@triton.jit
def _reduce_residual_norm_kernel(
    partial_ptr,
    addresses_ptr,
    epochs_ptr,
    residual_ptr,
    bias_ptr,
    weight_ptr,
    shift_ptr,
    eps,
    total_ptr,
    normed_ptr,
    PAIRS: tl.constexpr,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    SLOTS: tl.constexpr,
    SLOT_WORDS: tl.constexpr,
    MOST_PARTS: tl.constexpr,
    PARTS: tl.constexpr,
    SHARE: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    AFFINE: tl.constexpr,
    NORM: tl.constexpr,
    BF16: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_SHARE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Of each token PARTS programs send a SHARE of the row each; PARTS more receive all of it and store a
    SHARE. All tensors are seen as pairs of numbers, ``int32``."""
    part, receives = tl.program_id(0) % PARTS, tl.program_id(0) // PARTS % 2
    t = tl.program_id(0).to(tl.int64) // (2 * PARTS)
    row = t * PAIRS
    cols = tl.arange(0, BLOCK)
    inside = cols < PAIRS
    own = inside & (cols // SHARE == part)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + cols, mask=inside & (receives == 1), other=0)
    if AFFINE:
        weight = tl.load(weight_ptr + cols, mask=own & (receives == 1), other=0)
        shift = tl.load(shift_ptr + cols, mask=own & (receives == 1), other=0)
    wait_for_predecessor(PDL, LET=False)
    epochs_ptr += (t * 2 + receives) * MOST_PARTS
    epoch = tl.load(epochs_ptr + part) + 1
    if receives == 0:
        _send(part, t, epoch, partial_ptr, addresses_ptr, PAIRS, RANK, RANKS, SLOTS, SLOT_WORDS, SHARE,
              BLOCK_SHARE)  # fmt: skip
    else:
        tag = epoch.to(tl.int64) << 32
        mine = tl.load(partial_ptr + row + cols, mask=inside, other=0)
        if HAS_RESIDUAL:
            residual = tl.load(residual_ptr + row + cols, mask=inside, other=0)
        inbox = tl.load(addresses_ptr + RANK).to(tl.pointer_type(tl.int64))
        inbox = tl.multiple_of(inbox, 16) + (epoch & 1) * (RANKS * SLOTS * SLOT_WORDS) + t * SLOT_WORDS
        # Not before: predictors that start with the collective are to find their places first. (A step of the
        # eighth of OPT-175B on two H200: 6.24 ms instead of 6.31.)
        let_successor_begin(PDL)
        low = tl.zeros([BLOCK], tl.float32)
        high = tl.zeros([BLOCK], tl.float32)
        for peer in tl.static_range(RANKS):  # in the order of the ranks: the same bits on each of them
            if peer == RANK:
                low += half_to_float(mine, BF16)
                high += half_to_float(mine >> 16, BF16)
            else:
                source = inbox + peer * SLOTS * SLOT_WORDS + cols
                got = tl.load(source, mask=inside, other=tag, volatile=True)
                while tl.sum(((got >> 32).to(tl.int32) != epoch).to(tl.int32), 0) > 0:
                    got = tl.load(source, mask=inside, other=tag, volatile=True)
                theirs = got.to(tl.int32)
                low += half_to_float(theirs, BF16)
                high += half_to_float(theirs >> 16, BF16)
        if HAS_BIAS:
            low += half_to_float(bias, BF16)
            high += half_to_float(bias >> 16, BF16)
        if HAS_RESIDUAL:
            low += half_to_float(residual, BF16)
            high += half_to_float(residual >> 16, BF16)
        total = _pair(low, high, BF16)
        tl.store(total_ptr + row + cols, total, mask=own)
        if NORM:
            low = half_to_float(total, BF16)  # the norm is of the stream as it is stored
            high = half_to_float(total >> 16, BF16)
            mean = tl.sum(low + high, 0) / (2 * PAIRS)
            low = tl.where(inside, low - mean, 0.0)
            high = tl.where(inside, high - mean, 0.0)
            scale = tl.rsqrt(tl.sum(low * low + high * high, 0) / (2 * PAIRS) + eps)
            low *= scale
            high *= scale
            if AFFINE:
                low = low * half_to_float(weight, BF16) + half_to_float(shift, BF16)
                high = high * half_to_float(weight >> 16, BF16) + half_to_float(shift >> 16, BF16)
            tl.store(normed_ptr + row + cols, _pair(low, high, BF16), mask=own)
    tl.debug_barrier()  # every thread has read the epoch
    each = tl.arange(0, MOST_PARTS)  # with fewer parts than there are counts a program keeps some of them
    tl.store(epochs_ptr + each, tl.zeros_like(each) + epoch, mask=each % PARTS == part)


def _pairs(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.view(torch.int32)


def _reduce_residual_norm(
    partial: Tensor,
    inboxes: Inboxes,
    residual: Tensor | None,
    bias: Tensor | None,
    weight: Tensor | None,
    shift: Tensor | None,
    eps: float,
    total: Tensor,
    normed: Tensor | None,
) -> None:
    T, D = partial.shape
    assert inboxes.takes(partial.dtype, T, D) and partial.is_contiguous()
    assert all(x is None or x.dtype == partial.dtype for x in (residual, bias, weight, shift, total, normed))
    block, pdl = triton.next_power_of_2(D // 2), has_pdl(partial.device)
    parts = min(MOST_PARTS, max(1, _SENDERS // T))
    share = 4 * triton.cdiv(D // 2, 4 * parts)  # whole vectors
    _reduce_residual_norm_kernel[(T * 2 * parts,)](
        _pairs(partial),
        inboxes.addresses,
        inboxes.epochs,
        _pairs(residual),
        _pairs(bias),
        _pairs(weight),
        _pairs(shift),
        eps,
        _pairs(total),
        _pairs(normed),
        PAIRS=D // 2,
        RANK=inboxes.rank,
        RANKS=len(inboxes.addresses),
        SLOTS=SLOTS,
        SLOT_WORDS=SLOT_WORDS,
        MOST_PARTS=MOST_PARTS,
        PARTS=parts,
        SHARE=share,
        HAS_RESIDUAL=residual is not None,
        HAS_BIAS=bias is not None,
        AFFINE=weight is not None,
        NORM=normed is not None,
        BF16=partial.dtype == torch.bfloat16,
        BLOCK=block,
        BLOCK_SHARE=triton.next_power_of_2(share),
        **launched_early(pdl),
        num_warps=min(max(block // 256, 1), 16),
    )


def fused_reduce_residual_norm(
    partial: Tensor,
    residual: Tensor,
    bias: Tensor | None,
    norm: torch.nn.LayerNorm | None,
    inboxes: Inboxes,
) -> tuple[Tensor, Tensor]:
    """``(total, norm(total))`` with ``total = residual + (sum over ranks of partial + bias)``, ``[..., D]``.

    Summed in fp32 and rounded once. See `residual_norm`, and `Inboxes.takes` for what fits.
    """
    D = partial.shape[-1]
    total = torch.empty_like(residual, memory_format=torch.contiguous_format)
    normed = None if norm is None else torch.empty_like(total)
    weight, shift, eps = (None, None, 0.0) if norm is None else (norm.weight, norm.bias, norm.eps)
    flat = (partial.contiguous().view(-1, D), inboxes, residual.contiguous().view(-1, D))
    _reduce_residual_norm(*flat, bias, weight, shift, eps, total, normed)
    return total, total if normed is None else normed


def push_all_reduce(payload: Tensor, numel: int, inboxes: Inboxes) -> Tensor:
    """The sum over ranks of ``payload[:numel]``, a new tensor, by the same kernel.

    ``payload`` is of one dimension and reaches at least to the next multiple of `row_length`; what lies past
    ``numel`` is sent along and not looked at.
    """
    row = row_length(numel)
    rows = -(-numel // row)
    total = torch.empty(rows, row, dtype=payload.dtype, device=payload.device)
    partial = payload[: rows * row].view(rows, row)
    _reduce_residual_norm(partial, inboxes, None, None, None, None, 0.0, total, None)
    return total.view(-1)[:numel]


def row_length(numel: int) -> int:
    """How `push_all_reduce` cuts a payload: 2048 elements a program, or more so that the slots suffice."""
    row = _ROW
    while numel > SLOTS * row:
        row *= 2
    return row
