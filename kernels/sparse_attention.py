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
import triton
import triton.language as tl
from torch import Tensor

from dejavu.kernels.device import MAX_TOKENS, counters, dot, has_large_shared_memory, num_sms
from dejavu.kernels.tuning import Settings, settings
from dejavu.kernels.weighted_rows import weighted_rows

# Flushes of heads that are never chosen come at different steps, within this many.
SPREAD = 16


def fill_kv_reference(
    x: Tensor | None,
    inputs: Tensor,
    qkv: Tensor,
    qkv_scale: Tensor | None,
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
        qkv: ``[N, 3, H, D]``; ``qkv_scale [N, 3, H, 1]``, ``qkv_bias [N, 3, H]``.
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
        weight = _head(qkv, qkv_scale, head, inputs.dtype)[1:].flatten(0, 1)
        kv = inputs[b_of[here], at % W] @ weight.T
        if qkv_bias is not None:
            kv = kv + qkv_bias[head, 1:].flatten()
        keys[b_of[here], head, at], values[b_of[here], head, at] = kv.chunk(2, dim=-1)
    filled_to[b, n] = torch.maximum(filled_to[b, n], positions[b] + 1)


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
                _head(qkv, qkv_scale, head, x.dtype)[1:].flatten(0, 1),
                None if qkv_bias is None else qkv_bias[head, 1:].flatten(),
            )
            at = torch.arange(B, device=device), head, positions
            keys[at], values[at] = kv.chunk(2, dim=-1)
    else:
        fill_kv_reference(
            x, inputs, qkv, qkv_scale, qkv_bias, keys, values, filled_to, positions, ids, count, layer
        )
    out.zero_()
    n, b = _chosen_mask(ids, count, N).T.nonzero(as_tuple=True)  # [P], by head
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
            out[sequences] += output @ _head(out_proj, out_proj_scale, head, x.dtype)
    if base is not None:
        out += base


def _head(weight: Tensor, scale: Tensor | None, head: int, dtype: torch.dtype) -> Tensor:
    """One head's part of a weight, in ``dtype``."""
    part = weight[head]
    return part.to(dtype) if scale is None else (part.to(scale.dtype) * scale[head]).to(dtype)


def _queries(
    x: Tensor, qkv: Tensor, qkv_scale: Tensor | None, qkv_bias: Tensor | None, sequences: tuple[Tensor, ...]
) -> list[Tensor]:
    """Each chosen head's queries, for the sequences that chose it."""
    return [
        F.linear(
            x[rows],
            _head(qkv, qkv_scale, head, x.dtype)[0],
            None if qkv_bias is None else qkv_bias[head, 0],
        )
        for head, rows in enumerate(sequences)
        if len(rows)
    ]


def _chosen_mask(ids: Tensor, count: Tensor, n: int) -> Tensor:
    """``bool[B, n]`` of ``ids int32[B, n]``, whose entries past the count may hold anything."""
    named = torch.arange(n, device=ids.device) < count[:, None]
    mask = torch.zeros(len(ids), n + 1, dtype=torch.bool, device=ids.device)
    return mask.scatter_(1, torch.where(named, ids, n).long(), True)[:, :n]


@triton.jit
def _is_chosen(ids_ptr, count_ptr, b, real, head, N, HAS_IDS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Whether each sequence of ``b [X]`` has chosen ``head``: ``int32[X]``, 0 where not ``real``."""
    if HAS_IDS:
        i = tl.arange(0, BLOCK_N)
        count = tl.load(count_ptr + b, mask=real, other=0)
        named = i[None, :] < count[:, None]
        ids = tl.load(ids_ptr + b[:, None] * N + i[None, :], mask=named, other=-1)
        chosen = tl.sum(((ids == head) & named).to(tl.int32), 1)
    else:
        chosen = real.to(tl.int32)
    return chosen


@triton.jit
def _products(
    weights,
    inside_rows,
    x_ptrs,
    used,
    start,
    D: tl.constexpr,
    SPAN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """``[ROWS, COLUMNS]``: rows of weights times columns of inputs, over SPAN of the D from ``start`` on."""
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for d in tl.range(0, SPAN, BLOCK_D):
        cols = d + tl.arange(0, BLOCK_D)
        inside = (cols < SPAN) & (start + cols < D)
        cols += start
        w = tl.load(weights + cols[None, :], mask=inside_rows[:, None] & inside[None, :], other=0.0)
        x = tl.load(x_ptrs[None, :] + cols[:, None], mask=used[None, :] & inside[:, None], other=0.0)
        acc = dot(w, x, acc)
    return acc


@triton.jit
def _qkv_block(
    first,
    x_ptr,
    inputs_ptr,
    weight_ptr,
    scale_ptr,
    bias_ptr,
    q_ptr,
    keys_ptr,
    values_ptr,
    filled_to_ptr,
    positions_ptr,
    ids_ptr,
    count_ptr,
    partial_ptr,
    arrived_ptr,
    layer,
    B,
    N,
    T,
    W: tl.constexpr,
    D: tl.constexpr,
    H: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_IDS: tl.constexpr,
    LAZY: tl.constexpr,
    SPREAD: tl.constexpr,
    SEQUENCES: tl.constexpr,
    COLUMNS: tl.constexpr,
    MANY: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Rows of Q, K and V for COLUMNS pairs of a sequence and an age: positions from ``first`` steps ago on.

    What a column holds depends neither on its place nor on the other columns, and the parts of D are added in
    one order: so a key has the same bits whenever it is computed.
    """
    blocks = tl.cdiv(3 * H, ROWS)
    head, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    column = tl.arange(0, COLUMNS)
    b, back = column % SEQUENCES, first + column // SEQUENCES
    real = b < B
    position = tl.load(positions_ptr + b, mask=real, other=0)
    chosen = _is_chosen(ids_ptr, count_ptr, b, real, head, N, HAS_IDS, BLOCK_N)
    missing = _missing(filled_to_ptr, position, chosen, b, real, head, layer, N, W, LAZY, SPREAD)
    asked = (back == 0) & (chosen > 0)
    lacking = back < missing
    used = asked | lacking
    at = position - back
    row = block * ROWS + tl.arange(0, ROWS)
    inside_rows = row < 3 * H
    flat = head * 3 * H + row
    x_ptrs = x_ptr + b * D
    if LAZY:
        x_ptrs = tl.where(back == 0, x_ptrs, inputs_ptr + (b * W + at % W) * D)
    SPAN: tl.constexpr = (D + SPLITS - 1) // SPLITS
    weights = weight_ptr + flat.to(tl.int64)[:, None] * D
    start = tl.program_id(1) * SPAN
    acc = _products(weights, inside_rows, x_ptrs, used, start, D, SPAN, ROWS, COLUMNS, BLOCK_D)
    last = True
    if SPLITS > 1:
        mask = inside_rows[:, None] & used[None, :]
        # every block has room for MANY columns: with FEW it may not lie where another, with MANY, does
        parts = partial_ptr + tl.program_id(0).to(tl.int64) * SPLITS * ROWS * MANY
        part = parts + tl.arange(0, ROWS)[:, None] + column[None, :] * ROWS
        tl.store(part + tl.program_id(1) * ROWS * COLUMNS, acc, mask=mask)
        tl.debug_barrier()  # all of this program's sums are written before it arrives
        meeting = arrived_ptr + tl.program_id(0)
        last = tl.atomic_add(meeting, 1, sem="acq_rel") == SPLITS - 1
        if last:
            acc = tl.zeros_like(acc)
            for i in tl.static_range(SPLITS):
                acc += tl.load(part + i * ROWS * COLUMNS, mask=mask, other=0.0, cache_modifier=".cg")
            tl.store(meeting, 0)
    if last:
        if HAS_SCALE:
            acc *= tl.load(scale_ptr + flat, mask=inside_rows, other=0.0)[:, None]
        if HAS_BIAS:
            acc += tl.load(bias_ptr + flat, mask=inside_rows, other=0.0).to(tl.float32)[:, None]
        kind, h = row // H, row % H
        place = (b * N + head) * H
        tl.store(q_ptr + place[None, :] + h[:, None], acc, mask=(kind == 0)[:, None] & asked[None, :])
        slot = ((b * N + head).to(tl.int64) * T + at) * H
        kv = acc.to(keys_ptr.dtype.element_ty)
        tl.store(keys_ptr + slot[None, :] + h[:, None], kv, mask=(kind == 1)[:, None] & lacking[None, :])
        tl.store(values_ptr + slot[None, :] + h[:, None], kv, mask=(kind == 2)[:, None] & lacking[None, :])


@triton.jit
def _missing(
    filled_to_ptr, position, chosen, b, real, head, layer, N, W, LAZY: tl.constexpr, SPREAD: tl.constexpr
):
    """How many keys of ``head`` are to be computed for each sequence: those of this step, unless the head is
    lazy; then all that it lacks, if it is chosen or overdue."""
    missing = real.to(tl.int64)
    if LAZY:
        filled_to = tl.load(filled_to_ptr + b * N + head, mask=real, other=0)
        missing = tl.maximum(position + 1 - filled_to, 0)
        overdue = missing >= W - (head + layer) % SPREAD
        missing = tl.where(real & (overdue | (chosen > 0)), missing, 0)
    return missing


@triton.jit(do_not_specialize=["layer", "B", "N", "T"])
def _qkv_kernel(
    x_ptr,
    inputs_ptr,
    weight_ptr,
    scale_ptr,
    bias_ptr,
    q_ptr,
    keys_ptr,
    values_ptr,
    filled_to_ptr,
    positions_ptr,
    ids_ptr,
    count_ptr,
    partial_ptr,
    arrived_ptr,
    layer,
    B,
    N,
    T,
    W: tl.constexpr,
    D: tl.constexpr,
    H: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_IDS: tl.constexpr,
    LAZY: tl.constexpr,
    SPREAD: tl.constexpr,
    SEQUENCES: tl.constexpr,
    FEW: tl.constexpr,
    MANY: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A block of one head's rows of Q, K and V over a part of D: for FEW columns, which is enough but for a
    head that has long been left out, or for MANY; see `_qkv_block`. Keeps ``x`` in the ring, too."""
    program = tl.program_id(0) * SPLITS + tl.program_id(1)
    if LAZY:  # nobody reads this step's slot of the ring in this launch
        cols = tl.arange(0, BLOCK_D)
        for copied in range(program, B, tl.num_programs(0) * SPLITS):
            slot = copied * W + tl.load(positions_ptr + copied) % W
            for d in range(0, D, BLOCK_D):
                x = tl.load(x_ptr + copied * D + d + cols, mask=d + cols < D)
                tl.store(inputs_ptr + slot * D + d + cols, x, mask=d + cols < D)
    blocks = tl.cdiv(3 * H, ROWS)
    head, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    b = tl.arange(0, SEQUENCES)
    real = b < B
    position = tl.load(positions_ptr + b, mask=real, other=0)
    chosen = _is_chosen(ids_ptr, count_ptr, b, real, head, N, HAS_IDS, BLOCK_N)
    missing = _missing(filled_to_ptr, position, chosen, b, real, head, layer, N, W, LAZY, SPREAD)
    needed = tl.max(tl.maximum(missing, chosen.to(tl.int64)), 0)
    if (block + 1) * ROWS <= H:
        needed = tl.minimum(needed, tl.max(chosen, 0).to(tl.int64))  # queries are of this step only
    if needed > FEW // SEQUENCES:
        for first in range(0, needed, MANY // SEQUENCES):
            _qkv_block(
                first, x_ptr, inputs_ptr, weight_ptr, scale_ptr, bias_ptr, q_ptr, keys_ptr, values_ptr,
                filled_to_ptr, positions_ptr, ids_ptr, count_ptr, partial_ptr, arrived_ptr, layer, B, N, T, W,
                D, H, HAS_SCALE, HAS_BIAS, HAS_IDS, LAZY, SPREAD, SEQUENCES, MANY, MANY, BLOCK_N, SPLITS,
                ROWS, BLOCK_D,
            )  # fmt: skip
    elif needed > 0:
        _qkv_block(
            0, x_ptr, inputs_ptr, weight_ptr, scale_ptr, bias_ptr, q_ptr, keys_ptr, values_ptr,
            filled_to_ptr, positions_ptr, ids_ptr, count_ptr, partial_ptr, arrived_ptr, layer, B, N, T, W,
            D, H, HAS_SCALE, HAS_BIAS, HAS_IDS, LAZY, SPREAD, SEQUENCES, FEW, MANY, BLOCK_N, SPLITS, ROWS,
            BLOCK_D,
        )  # fmt: skip


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
):
    """One head of one sequence over a share of the positions; the last share to arrive joins them, in order.

    The output of a head that is not chosen is zero. Also notes which keys and values `_qkv_kernel` filled.
    """
    split, head, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    h = tl.arange(0, BLOCK_H)
    inside = h < H
    one = tl.zeros([1], tl.int32) + b
    chosen = tl.max(_is_chosen(ids_ptr, count_ptr, one, one >= 0, head, N, HAS_IDS, BLOCK_N), 0) > 0
    position = tl.load(positions_ptr + b)
    pair = b.to(tl.int64) * N + head
    if split == 0:
        if LAZY:
            filled_to = tl.load(filled_to_ptr + pair)
            overdue = position + 1 - filled_to >= W - (head + layer) % SPREAD
            if chosen | overdue:
                tl.store(filled_to_ptr + pair, tl.maximum(filled_to, position + 1))
        if not chosen:
            tl.store(out_ptr + pair * H + h, tl.zeros([BLOCK_H], tl.float32), mask=inside)
    if chosen:
        span = tl.cdiv(tl.cdiv(position + 1, SPLITS), BLOCK_T) * BLOCK_T
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
        tl.debug_barrier()  # all of this program's numbers are written before it arrives
        if tl.atomic_add(arrived_ptr + pair, 1, sem="acq_rel") == SPLITS - 1:
            each = tl.arange(0, SPLITS)
            records = partial_ptr + (pair * SPLITS + each) * (BLOCK_H + 2)
            peaks = tl.load(records + BLOCK_H, cache_modifier=".cg")
            norms = tl.load(records + BLOCK_H + 1, cache_modifier=".cg")
            share = tl.exp(peaks - tl.max(peaks, 0))
            accs = tl.load(records[:, None] + h[None, :], cache_modifier=".cg")
            y = tl.sum(accs * share[:, None], 0) / tl.sum(norms * share, 0)
            if HAS_MEAN:
                y -= tl.load(mean_ptr + head * H + h, mask=inside, other=0.0).to(tl.float32)
            tl.store(out_ptr + pair * H + h, y, mask=inside)
            tl.store(arrived_ptr + pair, 0)


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
    (B, D), (_, N, T, H), device = x.shape, keys.shape, x.device
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
    q, heads = torch.empty(2, B, N, H, dtype=torch.float32, device=device)
    common = {"HAS_IDS": ids is not None, "LAZY": filled_to is not None, "SPREAD": SPREAD}
    common |= {"H": H, "W": W, "BLOCK_N": triton.next_power_of_2(N)}
    sequences = triton.next_power_of_2(B)
    chosen = settings("qkv", _default_qkv_settings(qkv.dtype, B, device), 3 * N * H, D, qkv.dtype, B, device)
    blocks, splits = N * triton.cdiv(3 * H, chosen["ROWS"]), chosen["SPLITS"]
    few = max(16, sequences)
    many = max(4 * few, triton.next_power_of_2(W)) if B == 1 else 4 * few
    # more passes than one over shared partial sums would race: several sequences have one part of D
    assert splits == 1 or many >= W, "a ring of one sequence is read in one pass"
    partial = torch.empty(
        blocks * splits * chosen["ROWS"] * many if splits > 1 else 0, dtype=torch.float32, device=device
    )
    _qkv_kernel[(blocks, splits)](
        x,
        inputs,
        qkv,
        qkv_scale,
        qkv_bias,
        q,
        keys,
        values,
        filled_to,
        positions,
        ids,
        count,
        partial,
        counters(device),
        layer,
        B,
        N,
        T,
        D=D,
        HAS_SCALE=qkv_scale is not None,
        HAS_BIAS=qkv_bias is not None,
        SEQUENCES=sequences,
        FEW=few,
        MANY=many,
        **common,
        **chosen,
    )
    chosen = settings("attention", _default_attention_settings(B * N, device), N, H, keys.dtype, B, device)
    block_h = triton.next_power_of_2(H)
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
        **common,
        **chosen,
    )
    weighted_rows(
        heads.view(B, N * H),
        out_proj.flatten(0, 1),
        out_proj_scale,
        None,
        None,
        out,
        base,
        skip_zeros=ids is not None,
        name="out_proj",
    )


def _default_qkv_settings(dtype: torch.dtype, batch: int, device: torch.device) -> Settings:
    """Sound for any shape: one sequence's work is cut into parts of D, so that a head that has long been left
    out is caught up with by many programs at once."""
    block = 64 if dtype.itemsize == 4 else 128
    return {
        "ROWS": 64 if dtype.itemsize < 4 else 16,
        "BLOCK_D": block,
        "SPLITS": 8 if batch == 1 else 1,
        "num_warps": 4,
        "num_stages": 4 if dtype.itemsize < 4 and has_large_shared_memory(device) else 2,
    }


def _default_attention_settings(pairs: int, device: torch.device) -> Settings:
    """Sound for any shape: shares enough to occupy every multiprocessor a few times over."""
    splits = triton.next_power_of_2(triton.cdiv(4 * num_sms(device), pairs))
    return {"SPLITS": min(splits, 32), "BLOCK_T": 32, "STAGES": 3, "num_warps": 4}


_op = torch.library.custom_op(
    "dejavu::sparse_attention",
    _sparse_attention,
    mutates_args={"inputs", "keys", "values", "filled_to", "out"},
    device_types="cuda",
)
_op.register_kernel("cpu")(sparse_attention_reference)
_op.register_fake(lambda *arguments: None)


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
        inputs, filled_to, layer: the ring and what is complete, see `fill_kv_reference`; both or neither.
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
