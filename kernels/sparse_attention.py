"""The attention block over chosen heads in a decode step: projections, attention, output projection.

Shape legend: B batch, D hidden, N local heads, H head dim, T cache length, P pairs of a sequence and a head.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from dejavu.kernels.device import (
    MAX_TOKENS,
    arrives_last,
    counters,
    has_pdl,
    launched_early,
    num_sms,
    wait_for_predecessor,
)
from dejavu.kernels.qkv import (
    chosen_heads,
    chosen_mask,
    count_missing,
    fill_kv_reference,
    is_chosen,
    one_head,
    project_qkv,
)
from dejavu.kernels.registration import register
from dejavu.kernels.tuning import Settings, settings
from dejavu.kernels.weighted_rows import weighted_rows

# Slots of a cache up to which every 16 have a program of their own: what the table has was tuned on 2048, and
# takes a microsecond longer for 256 (H200; 12, 32, 36 and 72 heads).
_SHORT = 512


def sparse_attention_reference(
    x: Tensor,
    inputs: Tensor | None,
    qkv: Tensor,
    qkv_scale: Tensor | None,
    qkv_bias: Tensor | None,
    keys: Tensor,
    values: Tensor,
    filled_to: Tensor | None,
    positions: Tensor,
    out_proj: Tensor,
    out_proj_scale: Tensor | None,
    ids: Tensor | None,
    count: Tensor | None,
    mean: Tensor | None,
    base: Tensor | None,
    out: Tensor,
    layer: int,
) -> None:
    """See `sparse_attention`."""
    (B, N, _, H), device = keys.shape, x.device
    every = torch.arange(N, dtype=torch.int32, device=device).expand(B, -1)
    all_of_them = torch.full((B,), N, dtype=torch.int32, device=device)
    if ids is None or count is None:
        ids, count = every, all_of_them
    if filled_to is None or inputs is None:  # no ring: the keys and values of all heads, at every step
        for head in range(N):
            kv = F.linear(
                x,
                one_head(qkv, qkv_scale, head, x.dtype)[1:].flatten(0, 1),
                None if qkv_bias is None else qkv_bias[head, 1:].flatten(),
            )
            at = torch.arange(B, device=device), head, positions
            keys[at], values[at] = kv.chunk(2, dim=-1)
    else:
        fill_kv_reference(
            x, inputs, qkv, qkv_scale, qkv_bias, keys, values, filled_to, positions, ids, count, layer
        )
    out.zero_()
    n, b = chosen_mask(ids, count, N).T.nonzero(as_tuple=True)  # [P], by head
    per_head = torch.bincount(n, minlength=N).tolist()
    q = torch.cat([x.new_empty(0, H), *_queries(x, qkv, qkv_scale, qkv_bias, b.split(per_head))])
    wide = torch.promote_types(x.dtype, torch.float32)  # 16-bit scores can overflow
    scores = torch.einsum("ph,pth->pt", q.to(wide) / H**0.5, keys[b, n].to(wide))
    hidden = torch.arange(keys.shape[2], device=device) > positions[b, None]
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    heads = torch.einsum("pt,pth->ph", weights, values[b, n].to(wide)).to(x.dtype)
    if mean is not None:
        heads = heads - mean[n]
    for head, (sequences, output) in enumerate(zip(b.split(per_head), heads.split(per_head), strict=True)):
        if len(sequences):  # a sequence comes once a head, so the order is fixed
            out[sequences] += output @ one_head(out_proj, out_proj_scale, head, x.dtype)
    if base is not None:
        out += base


def _queries(
    x: Tensor, qkv: Tensor, qkv_scale: Tensor | None, qkv_bias: Tensor | None, sequences: tuple[Tensor, ...]
) -> list[Tensor]:
    """Each chosen head's queries, for the sequences that chose it."""
    return [
        F.linear(
            x[rows],
            one_head(qkv, qkv_scale, head, x.dtype)[0],
            None if qkv_bias is None else qkv_bias[head, 0],
        )
        for head, rows in enumerate(sequences)
        if len(rows)
    ]


@triton.jit(do_not_specialize=["layer", "N", "T"])
def _decode_attention_kernel(
    q_ptr,
    keys_ptr,
    values_ptr,
    filled_to_ptr,
    positions_ptr,
    ids_ptr,
    count_ptr,
    mean_ptr,
    partial_ptr,
    arrived_ptr,
    out_ptr,
    layer,
    softmax_scale,
    N,
    T,
    W: tl.constexpr,
    H: tl.constexpr,
    HAS_IDS: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    LAZY: tl.constexpr,
    SPREAD: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """One head of one sequence over a share of the positions; the last share to arrive joins them, in order.

    The output of a head that is not chosen is zero. Also notes which keys `project_qkv` has filled.
    """
    split, head, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    h = tl.arange(0, BLOCK_H)
    inside = h < H
    wait_for_predecessor(PDL)
    one = tl.zeros([1], tl.int32) + b
    named = is_chosen(ids_ptr, count_ptr, one, one >= 0, head, N, HAS_IDS, BLOCK_N)
    chosen = tl.max(named, 0) > 0
    position = tl.load(positions_ptr + b)
    pair = b.to(tl.int64) * N + head
    if split == 0:
        if LAZY:
            missing = count_missing(
                filled_to_ptr, position, named, one, one >= 0, head, layer, N, W, LAZY, SPREAD
            )
            if tl.max(missing, 0) > 0:
                tl.store(filled_to_ptr + pair, position + 1)
        if not chosen:
            tl.store(out_ptr + pair * H + h, tl.zeros([BLOCK_H], tl.float32), mask=inside)
    span = tl.cdiv(tl.cdiv(position + 1, SPLITS), BLOCK_T) * BLOCK_T
    used = tl.cdiv(position + 1, span).to(tl.int32)  # shares that are not empty: a short cache has few
    if chosen and split < used:
        start = split * span
        stop = tl.minimum(start + span, position + 1)
        q = tl.load(q_ptr + pair * H + h, mask=inside, other=0.0) * softmax_scale
        peak = tl.full([1], float("-inf"), tl.float32)
        norm = tl.zeros([1], tl.float32)
        acc = tl.zeros([BLOCK_H], tl.float32)
        for first in tl.range(start, stop, BLOCK_T, num_stages=STAGES):
            slot = first + tl.arange(0, BLOCK_T)
            seen = slot < stop
            place = (pair * T + slot)[:, None] * H + h[None, :]
            mask = seen[:, None] & inside[None, :]
            k = tl.load(keys_ptr + place, mask=mask, other=0.0).to(tl.float32)
            v = tl.load(values_ptr + place, mask=mask, other=0.0).to(tl.float32)
            score = tl.where(seen, tl.sum(k * q[None, :], 1), float("-inf"))
            higher = tl.maximum(peak, tl.max(score, 0))
            shrink = tl.exp(peak - higher)
            p = tl.exp(score - higher)
            norm = norm * shrink + tl.sum(p, 0)
            acc = acc * shrink + tl.sum(p[:, None] * v, 0)
            peak = higher
        record = partial_ptr + (pair * SPLITS + split) * (BLOCK_H + 2)
        tl.store(record + h, acc)
        tl.store(record + BLOCK_H + tl.arange(0, 1), peak)
        tl.store(record + BLOCK_H + 1 + tl.arange(0, 1), norm)
        if arrives_last(arrived_ptr + pair, used):
            each = tl.arange(0, SPLITS)
            there = each < used
            records = partial_ptr + (pair * SPLITS + each) * (BLOCK_H + 2)
            peaks = tl.load(records + BLOCK_H, mask=there, other=float("-inf"), cache_modifier=".cg")
            norms = tl.load(records + BLOCK_H + 1, mask=there, other=0.0, cache_modifier=".cg")
            share = tl.exp(peaks - tl.max(peaks, 0))
            accs = tl.load(
                records[:, None] + h[None, :], mask=there[:, None], other=0.0, cache_modifier=".cg"
            )
            y = tl.sum(accs * share[:, None], 0) / tl.sum(norms * share, 0)
            if HAS_MEAN:
                y -= tl.load(mean_ptr + head * H + h, mask=inside, other=0.0).to(tl.float32)
            tl.store(out_ptr + pair * H + h, y, mask=inside)


def _sparse_attention(
    x: Tensor,
    inputs: Tensor | None,
    qkv: Tensor,
    qkv_scale: Tensor | None,
    qkv_bias: Tensor | None,
    keys: Tensor,
    values: Tensor,
    filled_to: Tensor | None,
    positions: Tensor,
    out_proj: Tensor,
    out_proj_scale: Tensor | None,
    ids: Tensor | None,
    count: Tensor | None,
    mean: Tensor | None,
    base: Tensor | None,
    out: Tensor,
    layer: int,
) -> None:
    """Launches projections and filling, attention, output projection."""
    (B, N, T, H), device = keys.shape, x.device
    if B > MAX_TOKENS:
        for first in range(0, B, MAX_TOKENS):
            some = slice(first, first + MAX_TOKENS)
            ring, filled, heads, counts = (
                None if t is None else t[some] for t in (inputs, filled_to, ids, count)
            )
            _sparse_attention(
                x[some],
                ring,
                qkv,
                qkv_scale,
                qkv_bias,
                keys[some],
                values[some],
                filled,
                positions[some],
                out_proj,
                out_proj_scale,
                heads,
                counts,
                mean,
                base,
                out[some],
                layer,
            )
        return
    W = 1 if inputs is None else inputs.shape[1]
    projections = (x, inputs, qkv, qkv_scale, qkv_bias)
    q = project_qkv(*projections, keys, values, filled_to, positions, ids, count, layer)
    heads = torch.empty_like(q)
    chosen = _attention_settings(B, N, T, H, keys.dtype, device)
    block_h = triton.next_power_of_2(H)
    # it begins beside QKV where that leaves places: over all heads a step is longer for it (profiles/results)
    pdl = has_pdl(device) and ids is not None and B == 1
    partial = torch.empty(B * N * chosen["SPLITS"] * (block_h + 2), dtype=torch.float32, device=device)
    _decode_attention_kernel[(chosen["SPLITS"], N, B)](
        q,
        keys,
        values,
        filled_to,
        positions,
        ids,
        count,
        mean,
        partial,
        counters(device),
        heads,
        layer,
        H**-0.5,
        N,
        T,
        HAS_MEAN=mean is not None,
        BLOCK_H=block_h,
        **chosen_heads(ids, filled_to, N, W, H),
        **launched_early(pdl),
        **chosen,
    )
    # one sequence names the rows of its heads; of several, each row is read once for all that chose its head
    named = ids is not None and B == 1
    weighted_rows(
        heads.view(B, N * H),
        out_proj.flatten(0, 1),
        out_proj_scale,
        ids.view(N) if ids is not None and named else None,
        count if named else None,
        out,
        base,
        group=H if named else 1,
        in_place=named,
        skip_zeros=ids is not None and not named,
        name="out_proj",
    )


def _default_attention_settings(pairs: int, device: torch.device) -> Settings:
    """Sound for any shape: shares enough to occupy every multiprocessor a few times over."""
    splits = triton.next_power_of_2(triton.cdiv(4 * num_sms(device), pairs))
    return {"SPLITS": min(splits, 32), "BLOCK_T": 32, "STAGES": 3, "num_warps": 4}


def _attention_settings(B: int, N: int, T: int, H: int, dtype: torch.dtype, device: torch.device) -> Settings:
    """The work is each sequence's own, so the table knows it for one; of a short cache a program of one warp
    takes 16 slots."""
    chosen = _default_attention_settings(B * N, device)
    if B == 1 and T <= _SHORT:
        chosen = {"SPLITS": _SHORT // 16, "BLOCK_T": 16, "STAGES": 1, "num_warps": 1}
    elif B == 1:
        chosen = settings("attention", chosen, N, H, dtype, 1, device)
    used = triton.next_power_of_2(triton.cdiv(T, chosen["BLOCK_T"]))
    return {**chosen, "SPLITS": min(chosen["SPLITS"], used)}


_op = register(
    "sparse_attention",
    cuda=_sparse_attention,
    cpu=sparse_attention_reference,
    mutates={"inputs", "keys", "values", "filled_to", "out"},
)


def sparse_attention(
    x: Tensor,
    qkv: Tensor,
    qkv_scale: Tensor | None,
    qkv_bias: Tensor | None,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    out_proj: Tensor,
    out_proj_scale: Tensor | None,
    ids: Tensor | None = None,
    count: Tensor | None = None,
    *,
    inputs: Tensor | None = None,
    filled_to: Tensor | None = None,
    layer: int = 0,
    mean: Tensor | None = None,
    base: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """A decode step of the attention block over each sequence's chosen heads; the others add nothing.

    Projects the queries of the chosen heads; completes their keys and values up to ``positions`` (those of
    all heads, if there is no ring) and attends over them; projects the outputs. Triton kernels on CUDA,
    `sparse_attention_reference` on the CPU.

    Args:
        x: ``[B, D]``, the block's input.
        qkv: ``[N, 3, H, D]``; ``qkv_bias [N, 3, H]``.
        qkv_scale, out_proj_scale: fp32 ``[N, 3, H, 1]`` and ``[N, H, 1]`` of 8-bit weights, else None.
        keys, values: ``[B, N, T, H]``; written.
        positions: ``int64[B]``, of ``x``; it sees the slots up to there.
        out_proj: ``[N, H, D]``.
        ids: ``int32[B, N]``; the first ``count[b]`` (``int32[B]``) entries name sequence b's heads. None:
            all heads of all sequences.
        inputs, filled_to, layer: the ring and what is complete, see `dejavu.kernels.qkv`; both or neither.
        mean: ``[N, H]``, taken from a chosen head's output.
        base: ``[D]``, added to the sum: with ``mean``, its projection for all heads.
        out: ``[B, D]`` to write to.

    Returns:
        ``[B, D]``, this rank's share of the block's output, without out_proj's bias.
    """
    assert x.dim() == 2 and (inputs is None) == (filled_to is None)
    assert all(t.is_contiguous() for t in (qkv, keys, values, out_proj))
    assert filled_to is None or (filled_to.shape == keys.shape[:2] and filled_to.is_contiguous())
    assert inputs is None or inputs.is_contiguous()
    if ids is not None:
        assert count is not None and ids.dtype == count.dtype == torch.int32 and ids.is_contiguous()
        assert ids.shape == keys.shape[:2] and count.shape == keys.shape[:1]
    if out is None:
        out = torch.empty_like(x)
    assert out.shape == x.shape and out.is_contiguous()
    _op(
        x.contiguous(),
        inputs,
        qkv,
        qkv_scale,
        qkv_bias,
        keys,
        values,
        filled_to,
        positions.contiguous(),
        out_proj,
        out_proj_scale,
        ids,
        count,
        mean,
        base,
        out,
        layer,
    )
    return out
