"""The projections of chosen heads or of all, and the keys and values that the others left out.

A head that is not chosen at a position has no key and value there. They are computed when the head is next
chosen, from the block's inputs, of which a ring keeps the last W; before the ring can overflow they are
computed in any case. So a chosen head attends over just the keys and values that computing all heads at every
step would have given.

Shape legend: B batch, D hidden, N local heads, H head dim, T cache length, W ring length.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dejavu.kernels.device import (
    arrives_last,
    counters,
    dot,
    first_weights,
    has_large_shared_memory,
    has_pdl,
    launched_early,
    num_sms,
    row_products,
    row_settings,
    wait_for_predecessor,
)
from dejavu.kernels.tuning import Settings, settings

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
    n, b = (overdue | chosen_mask(ids, count, N)).T.nonzero(as_tuple=True)  # [P], by head
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
        weight = one_head(qkv, qkv_scale, head, inputs.dtype)[1:].flatten(0, 1)
        kv = inputs[b_of[here], at % W] @ weight.T
        if qkv_bias is not None:
            kv = kv + qkv_bias[head, 1:].flatten()
        keys[b_of[here], head, at], values[b_of[here], head, at] = kv.chunk(2, dim=-1)
    filled_to[b, n] = torch.maximum(filled_to[b, n], positions[b] + 1)


def one_head(weight: Tensor, scale: Tensor | None, head: int, dtype: torch.dtype) -> Tensor:
    """One head's part of a weight, in ``dtype``."""
    part = weight[head]
    return part.to(dtype) if scale is None else (part.to(scale.dtype) * scale[head]).to(dtype)


def chosen_mask(ids: Tensor, count: Tensor, n: int) -> Tensor:
    """``bool[B, n]`` of ``ids int32[B, n]``, whose entries past the count may hold anything."""
    named = torch.arange(n, device=ids.device) < count[:, None]
    mask = torch.zeros(len(ids), n + 1, dtype=torch.bool, device=ids.device)
    return mask.scatter_(1, torch.where(named, ids, n).long(), True)[:, :n]


@triton.jit
def is_chosen(ids_ptr, count_ptr, b, real, head, N, HAS_IDS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Whether each sequence of ``b [X]`` has chosen ``head``: ``int32[X]``, 0 where not ``real``."""
    if HAS_IDS:
        i = tl.arange(0, BLOCK_N)
        count = tl.load(count_ptr + b, mask=real, other=0)
        there = real[:, None] & (i < N)[None, :]  # without waiting for the count
        ids = tl.load(ids_ptr + b[:, None] * N + i[None, :], mask=there, other=-1)
        named = i[None, :] < count[:, None]
        chosen = tl.sum(((ids == head) & named).to(tl.int32), 1)
    else:
        chosen = real.to(tl.int32)
    return chosen


@triton.jit
def count_missing(
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
def _of_columns(x, COLUMNS: tl.constexpr):
    """What each sequence has, ``[SEQUENCES]``, for every column of a block, in which they alternate."""
    AGES: tl.constexpr = COLUMNS // x.shape[0]
    return tl.reshape(tl.broadcast_to(x[None, :], [AGES, x.shape[0]]), [COLUMNS])


@triton.jit
def _qkv_block(
    first,
    position,
    chosen,
    missing,
    x_ptr,
    inputs_ptr,
    weight_ptr,
    scale_ptr,
    bias_ptr,
    q_ptr,
    keys_ptr,
    values_ptr,
    partial_ptr,
    arrived_ptr,
    N,
    T,
    W: tl.constexpr,
    D: tl.constexpr,
    H: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    LAZY: tl.constexpr,
    SEQUENCES: tl.constexpr,
    COLUMNS: tl.constexpr,
    MANY: tl.constexpr,
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
    position = _of_columns(position, COLUMNS)
    chosen = _of_columns(chosen, COLUMNS)
    missing = _of_columns(missing, COLUMNS)
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
        last = arrives_last(arrived_ptr + tl.program_id(0), SPLITS)
        if last:
            acc = tl.zeros_like(acc)
            for i in tl.static_range(SPLITS):
                acc += tl.load(part + i * ROWS * COLUMNS, mask=mask, other=0.0, cache_modifier=".cg")
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
    PDL: tl.constexpr,
):
    """A block of one head's rows of Q, K and V over a part of D: for FEW columns, which is enough but for a
    head that has long been left out, or for MANY; see `_qkv_block`. Keeps ``x`` in the ring, too."""
    wait_for_predecessor(PDL)
    blocks = tl.cdiv(3 * H, ROWS)
    head, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    b = tl.arange(0, SEQUENCES)
    real = b < B
    position = tl.load(positions_ptr + b, mask=real, other=0)
    chosen = is_chosen(ids_ptr, count_ptr, b, real, head, N, HAS_IDS, BLOCK_N)
    missing = count_missing(filled_to_ptr, position, chosen, b, real, head, layer, N, W, LAZY, SPREAD)
    program = tl.program_id(0) * SPLITS + tl.program_id(1)
    if LAZY:  # nobody reads this step's slot of the ring in this launch; all of it by one took it 10 us
        PIECES: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
        for piece in range(program, B * PIECES, tl.num_programs(0) * SPLITS):
            copied, cols = piece // PIECES, piece % PIECES * BLOCK_D + tl.arange(0, BLOCK_D)
            slot = copied * W + tl.load(positions_ptr + copied) % W
            x = tl.load(x_ptr + copied * D + cols, mask=cols < D)
            tl.store(inputs_ptr + slot * D + cols, x, mask=cols < D)
    needed = tl.max(tl.maximum(missing, chosen.to(tl.int64)), 0)
    if (block + 1) * ROWS <= H:
        needed = tl.minimum(needed, tl.max(chosen, 0).to(tl.int64))  # queries are of this step only
    # many columns fill shared memory with inputs: a part of D at a time that leaves it to FEW's weights
    AT_A_TIME: tl.constexpr = min(BLOCK_D, 128)
    if needed > FEW // SEQUENCES:
        for first in range(0, needed, MANY // SEQUENCES):
            _qkv_block(
                first, position, chosen, missing, x_ptr, inputs_ptr, weight_ptr, scale_ptr, bias_ptr, q_ptr,
                keys_ptr, values_ptr, partial_ptr, arrived_ptr, N, T, W, D, H, HAS_SCALE, HAS_BIAS, LAZY,
                SEQUENCES, MANY, MANY, SPLITS, ROWS, AT_A_TIME,
            )  # fmt: skip
    elif needed > 0:
        _qkv_block(
            0, position, chosen, missing, x_ptr, inputs_ptr, weight_ptr, scale_ptr, bias_ptr, q_ptr, keys_ptr,
            values_ptr, partial_ptr, arrived_ptr, N, T, W, D, H, HAS_SCALE, HAS_BIAS, LAZY, SEQUENCES, FEW,
            MANY, SPLITS, ROWS, BLOCK_D,
        )  # fmt: skip


@triton.jit(do_not_specialize=["N", "T"])
def _qkv_all_kernel(
    x_ptr,
    weight_ptr,
    scale_ptr,
    bias_ptr,
    q_ptr,
    keys_ptr,
    values_ptr,
    positions_ptr,
    N,
    T,
    D: tl.constexpr,
    H: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    """All heads' rows of Q, K and V for one sequence, a grid-stride loop over blocks of ROWS."""
    wait_for_predecessor(PDL)
    position = tl.load(positions_ptr)
    for first in range(tl.program_id(0) * ROWS, 3 * N * H, tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS)
        inside = row < 3 * N * H
        row_ptr = weight_ptr + row.to(tl.int64) * D
        y = row_products(first_weights(row_ptr, inside, D, BLOCK_D), row_ptr, inside, x_ptr, D, BLOCK_D)
        if HAS_SCALE:
            y *= tl.load(scale_ptr + row, mask=inside, other=0.0)
        if HAS_BIAS:
            y += tl.load(bias_ptr + row, mask=inside, other=0.0).to(tl.float32)
        head, kind, h = row // (3 * H), row // H % 3, row % H
        tl.store(q_ptr + head * H + h, y, mask=inside & (kind == 0))
        slot = (head.to(tl.int64) * T + position) * H + h
        kv = y.to(keys_ptr.dtype.element_ty)
        tl.store(keys_ptr + slot, kv, mask=inside & (kind == 1))
        tl.store(values_ptr + slot, kv, mask=inside & (kind == 2))


def project_qkv(
    x: Tensor,
    inputs: Tensor | None,
    qkv: Tensor,
    qkv_scale: Tensor | None,
    qkv_bias: Tensor | None,
    keys: Tensor,
    values: Tensor,
    filled_to: Tensor | None,
    positions: Tensor,
    ids: Tensor | None,
    count: Tensor | None,
    layer: int,
) -> Tensor:
    """One launch: the queries ``fp32[B, N, H]`` of the chosen heads (the others' are undefined), their
    missing keys and values, and the ring. What is filled is noted in ``filled_to`` by the next launch, when
    nobody reads it any more. The arguments are those of `dejavu.kernels.sparse_attention.sparse_attention`.
    """
    (B, D), (_, N, T, H), device = x.shape, keys.shape, x.device
    W = 1 if inputs is None else inputs.shape[1]
    q = torch.empty(B, N, H, dtype=torch.float32, device=device)
    if B == 1 and ids is None and inputs is None:
        _project_all(x, qkv, qkv_scale, qkv_bias, q, keys, values, positions)
        return q
    sequences = triton.next_power_of_2(B)
    chosen = settings("qkv", default_settings(qkv.dtype, B, device), 3 * N * H, D, qkv.dtype, B, device)
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
        **chosen_heads(ids, filled_to, N, W, H),
        SEQUENCES=sequences,
        FEW=few,
        MANY=many,
        **launched_early(has_pdl(device)),
        **chosen,
    )
    return q


def _project_all(
    x: Tensor,
    qkv: Tensor,
    qkv_scale: Tensor | None,
    qkv_bias: Tensor | None,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
) -> None:
    """One sequence's queries ``q [1, N, H]``, keys and values: neither columns nor parts are needed."""
    (N, _, H, D), device = qkv.shape, x.device
    rows = 3 * N * H
    chosen = dict(settings("qkv_all", row_settings(D, qkv.dtype), rows, D, qkv.dtype, 1, device))
    programs = min(num_sms(device) * chosen.pop("PROGRAMS"), triton.cdiv(rows, chosen["ROWS"]))
    _qkv_all_kernel[(programs,)](
        x,
        qkv,
        qkv_scale,
        qkv_bias,
        q,
        keys,
        values,
        positions,
        N,
        keys.shape[2],
        D=D,
        H=H,
        HAS_SCALE=qkv_scale is not None,
        HAS_BIAS=qkv_bias is not None,
        **launched_early(has_pdl(device)),
        **chosen,
    )


def chosen_heads(
    ids: Tensor | None, filled_to: Tensor | None, N: int, W: int, H: int
) -> dict[str, int | bool]:
    """The constants by which the kernels of a block tell which heads they compute."""
    which = {"HAS_IDS": ids is not None, "LAZY": filled_to is not None, "SPREAD": SPREAD}
    return which | {"H": H, "W": W, "BLOCK_N": triton.next_power_of_2(N)}


def default_settings(dtype: torch.dtype, batch: int, device: torch.device) -> Settings:
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
