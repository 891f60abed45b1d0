"""The attention block over chosen heads, and the keys and values that the others left out.

A head that is not chosen at a position has no key and value there. They are computed when the head is next
chosen, from the block's inputs, of which a ring keeps the last W; before the ring can overflow they are
computed in any case. So a chosen head attends over just the keys and values that computing all heads at every
step would have given.

Shape legend: B batch, D hidden, N local heads, H head dim, T cache length, W ring length, P pairs of a
sequence and a head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# Flushes of heads that are never chosen come at different steps, within this many.
SPREAD = 16


def fill_kv_reference(
    x: Tensor | None,
    inputs: Tensor,
    qkv: Tensor,
    qkv_bias: Tensor | None,
    keys: Tensor,
    values: Tensor,
    filled_to: Tensor,
    positions: Tensor,
    ids: Tensor,
    count: Tensor,
    layer: int,
) -> None:
    """Keeps ``x`` in the ring; completes the keys and values of the chosen heads up to ``positions``, and of
    those that lack ``W - (head + layer) % SPREAD`` of them.

    Args:
        x: ``[B, D]``, the block's input; None: the ring holds all that is needed.
        inputs: ``[B, W, D]``, the ring, at ``position % W``; written.
        qkv: ``[N, 3, H, D]``; ``qkv_bias [N, 3, H]``.
        keys, values: ``[B, N, T, H]``; written.
        filled_to: ``int64[B, N]``, up to where keys and values are complete; advanced.
        positions: ``int64[B]``, of ``x``.
        ids: ``int32[B, N]``; the first ``count[b]`` (``int32[B]``) entries name sequence b's heads.
        layer: spreads the flushes over the steps.
    """
    (B, N), W = filled_to.shape, inputs.shape[1]
    device = inputs.device
    if x is not None:
        inputs[torch.arange(B, device=device), positions % W] = x
    heads = torch.arange(N, device=device)
    overdue = positions[:, None] + 1 - filled_to >= W - (heads + layer) % SPREAD  # the ring holds W
    n, b = (overdue | _chosen_mask(ids, count, N)).T.nonzero(as_tuple=True)  # [P], by head
    missing = (positions[b] + 1 - filled_to[b, n]).clamp(min=0)
    pair = torch.repeat_interleave(missing)  # one entry a key, naming its pair
    nth = torch.arange(len(pair), device=device) - (missing.cumsum(0) - missing)[pair]
    slots, n_of, b_of = filled_to[b, n][pair] + nth, n[pair], b[pair]
    first = 0
    for head, rows in enumerate(torch.bincount(n_of, minlength=N).tolist()):
        if rows == 0:
            continue
        here = slice(first, first + rows)
        first += rows
        at = slots[here]
        kv = inputs[b_of[here], at % W] @ qkv[head, 1:].flatten(0, 1).T
        if qkv_bias is not None:
            kv = kv + qkv_bias[head, 1:].flatten()
        keys[b_of[here], head, at], values[b_of[here], head, at] = kv.chunk(2, dim=-1)
    filled_to[b, n] = torch.maximum(filled_to[b, n], positions[b] + 1)


def sparse_attention_reference(
    x: Tensor,
    qkv: Tensor,
    qkv_bias: Tensor | None,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    out_proj: Tensor,
    ids: Tensor,
    count: Tensor,
    mean: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Queries, decode attention and output projection of each sequence's chosen heads; others add nothing.

    Args:
        x: ``[B, D]``, the block's input.
        qkv: ``[N, 3, H, D]``; ``qkv_bias [N, 3, H]``.
        keys, values: ``[B, N, T, H]``, complete for every chosen head up to ``positions``.
        positions: ``int64[B]``, of ``x``; it sees the slots up to there.
        out_proj: ``[N, H, D]``.
        ids: ``int32[B, N]``; the first ``count[b]`` (``int32[B]``) entries name sequence b's heads.
        mean: ``[N, H]``, taken from a chosen head's output: the caller adds its projection for all heads.
        out: ``[B, D]`` to write to.

    Returns:
        ``[B, D]``, this rank's share of the block's output, without out_proj's bias.
    """
    N, H = qkv.shape[0], qkv.shape[2]
    if out is None:
        out = torch.empty_like(x)
    out.zero_()
    n, b = _chosen_mask(ids, count, N).T.nonzero(as_tuple=True)  # [P], by head
    per_head = torch.bincount(n, minlength=N).tolist()
    q = torch.cat([x.new_empty(0, H), *_queries(x, qkv, qkv_bias, b.split(per_head))])
    wide = torch.promote_types(x.dtype, torch.float32)  # 16-bit scores can overflow
    scores = torch.einsum("ph,pth->pt", q.to(wide) / H**0.5, keys[b, n].to(wide))
    hidden = torch.arange(keys.shape[2], device=x.device) > positions[b, None]
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    heads = torch.einsum("pt,pth->ph", weights, values[b, n].to(wide)).to(x.dtype)
    if mean is not None:
        heads = heads - mean[n]
    for head, (sequences, output) in enumerate(zip(b.split(per_head), heads.split(per_head), strict=True)):
        if len(sequences):
            out[sequences] += output @ out_proj[head]  # a sequence comes once a head, so the order is fixed
    return out


def _queries(x: Tensor, qkv: Tensor, qkv_bias: Tensor | None, sequences: tuple[Tensor, ...]) -> list[Tensor]:
    """Each chosen head's queries, for the sequences that chose it."""
    biases = [None] * len(qkv) if qkv_bias is None else list(qkv_bias[:, 0])
    return [
        F.linear(x[rows], weight, bias)
        for rows, weight, bias in zip(sequences, qkv[:, 0], biases, strict=True)
        if len(rows)
    ]


def _chosen_mask(ids: Tensor, count: Tensor, n: int) -> Tensor:
    """``bool[B, n]`` of ``ids int32[B, n]``, whose entries past the count may hold anything."""
    named = torch.arange(n, device=ids.device) < count[:, None]
    mask = torch.zeros(len(ids), n + 1, dtype=torch.bool, device=ids.device)
    return mask.scatter_(1, torch.where(named, ids, n).long(), True)[:, :n]
