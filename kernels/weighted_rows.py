"""Sums of a matrix's rows, weighted: the second half of an MLP, and the output projection.

Rows of weight zero add nothing and are not read: neurons that ReLU silenced, heads that were not chosen.

Shape legend: B batch, D hidden, F rows of the matrix, S sets, T tokens of a set.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dejavu.kernels.device import (
    arrives_last,
    counters,
    dot,
    has_pdl,
    let_successor_begin,
    to_float,
    token_block,
)
from dejavu.kernels.tuning import Settings, settings, variant


def weighted_rows_reference(
    h: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    ids: Tensor | None,
    count: Tensor | None,
    out: Tensor,
    base: Tensor | None = None,
) -> None:
    """``out = h[:, :count] @ (weight * scale)[ids[:count]] + base``; see `weighted_rows`."""
    for s, tokens in enumerate(h.split(len(h) if ids is None or ids.dim() == 1 else 1)):
        rows = torch.arange(len(weight), device=h.device)
        if ids is not None and count is not None:
            rows = ids.view(-1, len(weight))[s, : int(count[s])].long()
        used = tokens[:, : len(rows)]
        live = used.any(0)
        chosen = weight[rows[live]].to(h.dtype)
        if scale is not None:
            chosen = chosen * scale[rows[live]].to(h.dtype)
        total = used[:, live] @ chosen
        place = out[s * len(tokens) : (s + 1) * len(tokens)]
        place.copy_(total if base is None else total + base)


@triton.jit
def _weights_of(h_ptr, t, place, real, T, F):
    """``h[t, place]`` of all tokens, where the place is real."""
    return tl.load(h_ptr + t[:, None] * F + place[None, :], mask=(t < T)[:, None] & real[None, :], other=0.0)


@triton.jit(do_not_specialize=["T", "F"])
def _weighted_rows_kernel(
    h_ptr,
    weight_ptr,
    scale_ptr,
    ids_ptr,
    count_ptr,
    base_ptr,
    partial_ptr,
    arrived_ptr,
    out_ptr,
    T,
    F,
    D: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_IDS: tl.constexpr,
    HAS_BASE: tl.constexpr,
    SKIP_ZEROS: tl.constexpr,
    GROUP: tl.constexpr,
    IN_PLACE: tl.constexpr,
    TOKENS: tl.constexpr,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program sums every SPLITS-th block of rows over its columns; the last to arrive adds the splits."""
    column, split, s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    cols = column * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = cols < D
    t = tl.arange(0, TOKENS)
    h_ptr += s.to(tl.int64) * T * F
    # Ids and weights h are loaded a step ahead: Triton's pipeliner divides the stages among loads that depend
    # on each other, and so leaves all of them to the rows. The first ids do not wait for the count, either.
    AHEAD: tl.constexpr = not (HAS_IDS and IN_PLACE)  # where h lies is known before the ids are
    k = split * ROWS + tl.arange(0, ROWS)
    count = F
    if HAS_IDS:
        count = tl.load(count_ptr + s) * GROUP
        ids_ptr += s.to(tl.int64) * (F // GROUP)
        named = tl.load(ids_ptr + k // GROUP, mask=k < F, other=0)
    if AHEAD:
        further_h = _weights_of(h_ptr, t, k, k < F, T, F)
    acc = tl.zeros([ROWS if TOKENS == 1 else TOKENS, BLOCK_D], tl.float32)
    for first in tl.range(split * ROWS, count, SPLITS * ROWS, num_stages=STAGES):
        k = first + tl.arange(0, ROWS)
        chosen = k < count
        further = k + SPLITS * ROWS
        rows = k
        if HAS_IDS:
            rows = named * GROUP + k % GROUP
            named = tl.load(ids_ptr + further // GROUP, mask=further < count, other=0)
        if AHEAD:
            h = tl.where(chosen[None, :], further_h, 0.0)
            further_h = _weights_of(h_ptr, t, further, further < count, T, F)
        else:
            h = _weights_of(h_ptr, t, rows, chosen, T, F)
        live = chosen
        if SKIP_ZEROS:
            live = tl.max((h != 0).to(tl.int32), 0) > 0
        w = tl.load(
            weight_ptr + rows.to(tl.int64)[:, None] * D + cols[None, :],
            mask=live[:, None] & inside[None, :],
            other=0.0,
        )
        if HAS_SCALE:
            h *= tl.load(scale_ptr + rows, mask=chosen, other=0.0)[None, :]
        if TOKENS == 1:
            acc += to_float(w) * tl.trans(h)
        else:
            if w.dtype == tl.float16 or w.dtype == tl.bfloat16:
                h = h.to(w.dtype)
            acc = dot(h, w, acc)
    let_successor_begin(PDL)  # all programs have their places, and the rows are read
    if TOKENS == 1:
        acc = tl.sum(acc, 0)[None, :]

    mask = (t < T)[:, None] & inside[None, :]
    at = (s * T + t)[:, None] * D + cols[None, :]
    last = True
    if SPLITS > 1:
        stride = tl.num_programs(2) * T * D  # between two splits
        tl.store(partial_ptr + split * stride + at, acc, mask=mask)
        last = arrives_last(arrived_ptr + s * tl.num_programs(0) + column, SPLITS)
        if last:
            acc = tl.zeros_like(acc)
            for i in tl.static_range(SPLITS):
                acc += tl.load(partial_ptr + i * stride + at, mask=mask, other=0.0, cache_modifier=".cg")
    if last:
        if HAS_BASE:
            acc += tl.load(base_ptr + cols, mask=inside, other=0.0).to(tl.float32)[None, :]
        tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=mask)


def weighted_rows(
    h: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    ids: Tensor | None,
    count: Tensor | None,
    out: Tensor,
    base: Tensor | None = None,
    *,
    group: int = 1,
    in_place: bool = False,
    skip_zeros: bool = True,
    name: str = "rows",
) -> None:
    """``out = h[:, :count] @ (weight * scale)[ids[:count]] + base``, the same bits at every run.

    Args:
        h: ``[B, F]``, contiguous; entry ``k`` belongs to the row ``ids[k]``.
        weight: ``[F, D]`` of 16 or 32 bits, or of 8 with ``scale fp32[F, 1]``.
        ids: ``int32[F / group]`` and ``count int32[1]`` for all tokens, ``int32[B, F]`` and ``int32[B]`` for
            one set each; None: all rows.
        out: ``[B, D]``, contiguous; written.
        base: ``[D]``, added to every token's sum.
        group: each id names so many rows in a row.
        in_place: the weights lie in the rows' order: ``h[:, ids[k]]`` belongs to the row ``ids[k]``.
        skip_zeros: rows that no token gives a weight are not read.
        name: by which the table of settings knows this use; see `variant`.
    """
    (B, F), D = h.shape, weight.shape[1]
    sets = B if ids is not None and ids.dim() == 2 else 1
    T = B // sets
    default = default_settings(weight.dtype, T)
    chosen = settings(variant(name, ids, T), default, F, D, weight.dtype, T, h.device)
    columns = triton.cdiv(D, chosen["BLOCK_D"])
    splits = chosen["SPLITS"]
    assert columns * sets <= len(counters(h.device)), "a counter for every block of columns of every set"
    partial = torch.empty(splits * B * D if splits > 1 else 0, dtype=torch.float32, device=h.device)
    _weighted_rows_kernel[(columns, splits, sets)](
        h,
        weight,
        scale,
        ids,
        count,
        base,
        partial,
        counters(h.device),
        out,
        T,
        F,
        D=D,
        HAS_SCALE=scale is not None,
        HAS_IDS=ids is not None,
        HAS_BASE=base is not None,
        SKIP_ZEROS=skip_zeros,
        GROUP=group,
        IN_PLACE=in_place,
        TOKENS=token_block(T),
        PDL=has_pdl(h.device),
        **chosen,
    )


def default_settings(dtype: torch.dtype, tokens: int) -> Settings:
    """Sound for any shape: 4 KB and more of loads under way in each of some hundred programs."""
    if tokens > 1:
        return {"ROWS": 32, "BLOCK_D": 128, "SPLITS": 8, "STAGES": 3, "num_warps": 4}
    if dtype.itemsize == 1:
        return {"ROWS": 16, "BLOCK_D": 256, "SPLITS": 8, "STAGES": 3, "num_warps": 4}
    return {"ROWS": 8, "BLOCK_D": 512, "SPLITS": 8, "STAGES": 5 if dtype.itemsize == 2 else 3, "num_warps": 4}
