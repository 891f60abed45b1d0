"""The MLP block over chosen neurons, in two phases: fc1 and ReLU, then fc2's rows of the neurons that live.

One kernel that keeps both rows of a neuron in flight was measured against it: as fast or slower at nearly all
shapes and densities, and it reads the fc2 rows that ReLU silenced (profiles/results/README.md).

Shape legend: B batch, S query length, D hidden, F local ffn, K chosen neurons.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from dejavu.kernels.device import (
    MAX_TOKENS,
    dot,
    first_weights,
    has_pdl,
    launched_early,
    num_sms,
    row_products,
    row_settings,
    token_block,
    wait_for_predecessor,
)
from dejavu.kernels.predict import launch_compact
from dejavu.kernels.registration import register
from dejavu.kernels.tuning import Settings, settings, variant
from dejavu.kernels.weighted_rows import weighted_rows


def sparse_mlp_reference(
    x: Tensor,
    fc1: Tensor,
    fc1_scale: Tensor | None,
    fc1_bias: Tensor | None,
    fc2: Tensor,
    fc2_scale: Tensor | None,
    ids: Tensor | None,
    count: Tensor | None,
    out: Tensor,
    live_tally: Tensor | None = None,
    alive: Tensor | None = None,
) -> None:
    """See `sparse_mlp`."""
    if ids is None or count is None:
        hidden = F.linear(x, _scaled(fc1, fc1_scale, x), fc1_bias).relu_()
        if alive is not None:
            hidden = hidden.masked_fill(alive[:, None, None] == 0, 0)
        torch.matmul(hidden, _scaled(fc2, fc2_scale, x), out=out)
        if live_tally is not None:
            live_tally[0] += hidden.flatten(0, 1).any(0).sum()
            live_tally[1] += 1 if alive is None else alive.any()
        return
    if ids.dim() == 2:
        _one_set_a_sequence(x, fc1, fc1_scale, fc1_bias, fc2, fc2_scale, ids, count, out)
        return
    chosen = ids[: int(count)].long()
    weight = _scaled(fc1[chosen], None if fc1_scale is None else fc1_scale[chosen], x)
    hidden = F.linear(x, weight, None if fc1_bias is None else fc1_bias[chosen]).relu_()
    live = hidden.flatten(0, 1).any(0).nonzero()[:, 0]
    rows = chosen[live]
    weight = _scaled(fc2[rows], None if fc2_scale is None else fc2_scale[rows], x)
    torch.matmul(hidden[..., live], weight, out=out)


def _one_set_a_sequence(
    x: Tensor,
    fc1: Tensor,
    fc1_scale: Tensor | None,
    fc1_bias: Tensor | None,
    fc2: Tensor,
    fc2_scale: Tensor | None,
    ids: Tensor,
    count: Tensor,
    out: Tensor,
) -> None:
    """All sequences at once, padded to the largest set: a loop over them would launch B times as much."""
    K = int(count.max())
    padding = torch.arange(K, device=ids.device) >= count[:, None]  # [B, K]
    chosen = ids[:, :K].long().masked_fill(padding, 0)
    hidden = x @ _scaled(fc1[chosen], None if fc1_scale is None else fc1_scale[chosen], x).transpose(1, 2)
    if fc1_bias is not None:
        hidden = hidden + fc1_bias[chosen][:, None]
    hidden = hidden.relu_().masked_fill(padding[:, None], 0)
    torch.matmul(hidden, _scaled(fc2[chosen], None if fc2_scale is None else fc2_scale[chosen], x), out=out)


def _scaled(weight: Tensor, scale: Tensor | None, like: Tensor) -> Tensor:
    return weight.to(like.dtype) if scale is None else (weight.to(scale.dtype) * scale).to(like.dtype)


@triton.jit
def _named(ids_ptr, count_ptr, k, F):
    """The row that the entry ``k`` names; negative past the count. In bounds whatever lies there, and past
    the first-level cache: it may be read before it is written, and then again. A scalar: a block of them the
    compiler may load once for the weights and once to compare, with other ids written in between. (Each
    thread reads it for itself, so threads may see different ones, and each is right about its own weights.)
    """
    count = tl.minimum(tl.load(count_ptr, volatile=True), F)
    row = tl.load(ids_ptr + k, mask=k < count, other=-1, volatile=True)
    return tl.where(row < F, row, -1)


@triton.jit
def _weights_ahead(weight_ptr, rows, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The first weights of ``rows [ROWS]``, of those that are not negative."""
    return first_weights(weight_ptr + rows.to(tl.int64) * D, rows >= 0, D, BLOCK_D)


@triton.jit(do_not_specialize=["T", "F"])
def _fc1_kernel(
    x_ptr,
    weight_ptr,
    scale_ptr,
    bias_ptr,
    ids_ptr,
    count_ptr,
    alive_ptr,
    h_ptr,
    live_ptr,
    sizes_ptr,
    T,
    F,
    D: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_IDS: tl.constexpr,
    HAS_ALIVE: tl.constexpr,
    LIVE: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    """``h[t, k] = relu(fc1[ids[k]] . x[t] + bias[ids[k]])`` for k below the count; a program takes every
    so-manieth block of rows, so that a fixed grid serves any count. Also notes, if LIVE, which k are above
    zero for any token, and how many of each block."""
    s = tl.program_id(1)
    x_ptr += s.to(tl.int64) * T * D
    h_ptr += s.to(tl.int64) * T * F
    t = tl.arange(0, TOKENS)
    cols = tl.arange(0, BLOCK_D)
    # Chosen rows are few, one or none a program: the first weights of a row come while the predecessor runs,
    # those of several rows right behind the wait, and the next block's while one is summed. Over all rows
    # that made it slower (OPT-6.7B: 2% of a step).
    AHEAD: tl.constexpr = HAS_IDS and TOKENS == 1
    EARLY: tl.constexpr = AHEAD and ROWS == 1
    if HAS_IDS:
        ids_ptr += s.to(tl.int64) * F
    if EARLY:
        before = _named(ids_ptr, count_ptr + s, tl.program_id(0), F)
        rows = tl.full([ROWS], before, tl.int32)
        early = _weights_ahead(weight_ptr, rows, D, BLOCK_D)
    wait_for_predecessor(PDL)
    count = F
    if HAS_IDS:
        count = tl.load(count_ptr + s)
    if EARLY:
        now = _named(ids_ptr, count_ptr + s, tl.program_id(0), F)
        if now != before:
            rows = tl.full([ROWS], now, tl.int32)
            early = _weights_ahead(weight_ptr, rows, D, BLOCK_D)
    elif AHEAD:
        k = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        rows = tl.load(ids_ptr + k, mask=k < count, other=-1)
        early = _weights_ahead(weight_ptr, rows, D, BLOCK_D)
    for first in range(tl.program_id(0) * ROWS, count, tl.num_programs(0) * ROWS):
        k = first + tl.arange(0, ROWS)
        chosen = k < count
        if not AHEAD:
            rows = tl.load(ids_ptr + k, mask=chosen, other=0) if HAS_IDS else k
        row_ptr = weight_ptr + rows.to(tl.int64) * D
        if HAS_BIAS:
            bias = tl.load(bias_ptr + rows, mask=chosen, other=0.0).to(tl.float32)
        if HAS_SCALE:
            scale = tl.load(scale_ptr + rows, mask=chosen, other=0.0)
        if TOKENS == 1:
            if AHEAD:
                further = k + tl.num_programs(0) * ROWS
                this, rows = early, tl.load(ids_ptr + further, mask=further < count, other=-1)
                early = _weights_ahead(weight_ptr, rows, D, BLOCK_D)
            else:
                this = first_weights(row_ptr, chosen, D, BLOCK_D)
            h = row_products(this, row_ptr, chosen, x_ptr, D, BLOCK_D)[:, None]
        else:
            h = tl.zeros([ROWS, TOKENS], tl.float32)
            for d in tl.range(0, D, BLOCK_D):
                inside = d + cols < D
                w = tl.load(
                    row_ptr[:, None] + (d + cols)[None, :], mask=chosen[:, None] & inside[None, :], other=0.0
                )
                x = tl.load(
                    x_ptr + t[None, :] * D + (d + cols)[:, None],
                    mask=(t < T)[None, :] & inside[:, None],
                    other=0.0,
                )
                h = dot(w, x, h)
        if HAS_SCALE:
            h *= scale[:, None]
        if HAS_BIAS:
            h += bias[:, None]
        h = tl.where(h < 0, 0.0, h)  # not maximum, which would silence a NaN
        if HAS_ALIVE:
            h = tl.where((tl.load(alive_ptr + t, mask=t < T, other=0) != 0)[None, :], h, 0.0)
        tl.store(h_ptr + t[None, :] * F + k[:, None], h, mask=chosen[:, None] & (t < T)[None, :])
        if LIVE:
            live = tl.max((h != 0).to(tl.int32), 1)
            tl.store(live_ptr + k, live.to(tl.int8), mask=chosen)
            tl.store(sizes_ptr + first // ROWS, tl.sum(tl.where(chosen, live, 0), 0))


def _sparse_mlp(
    x: Tensor,
    fc1: Tensor,
    fc1_scale: Tensor | None,
    fc1_bias: Tensor | None,
    fc2: Tensor,
    fc2_scale: Tensor | None,
    ids: Tensor | None,
    count: Tensor | None,
    out: Tensor,
    live_tally: Tensor | None,
    alive: Tensor | None,
) -> None:
    """Launches the two phases."""
    ffn, D = fc1.shape
    B = x.numel() // D
    sets = B if ids is not None and ids.dim() == 2 else 1
    T = B // sets
    if T > MAX_TOKENS:
        weights = (fc1, fc1_scale, fc1_bias, fc2, fc2_scale, ids, count)
        for first in range(0, B, MAX_TOKENS):
            some = slice(first, first + MAX_TOKENS)
            here = None if alive is None else alive[some]
            _sparse_mlp(x.view(B, D)[some], *weights, out.view(B, D)[some], live_tally, here)
        return
    h = torch.empty(B, ffn, dtype=torch.float32, device=x.device)
    default = default_settings(D, fc1.dtype, T)
    chosen = dict(settings(variant("fc1", ids, T), default, ffn, D, fc1.dtype, T, x.device))
    blocks = triton.cdiv(ffn, chosen["ROWS"])
    live = sizes = None
    if live_tally is not None:
        live = torch.empty(1, ffn, dtype=torch.int8, device=x.device)
        sizes = torch.empty(1, blocks, dtype=torch.int32, device=x.device)
    programs = min(num_sms(x.device) * chosen.pop("PROGRAMS"), blocks)
    _fc1_kernel[(programs, sets)](
        x,
        fc1,
        fc1_scale,
        fc1_bias,
        ids,
        count,
        alive,
        h,
        live,
        sizes,
        T,
        ffn,
        D=D,
        HAS_SCALE=fc1_scale is not None,
        HAS_BIAS=fc1_bias is not None,
        HAS_IDS=ids is not None,
        HAS_ALIVE=alive is not None,
        LIVE=live is not None,
        TOKENS=token_block(T),
        **launched_early(has_pdl(x.device)),
        **chosen,
    )
    skip = ids is not None  # of those that were chosen
    if live is not None and sizes is not None:
        ids = torch.empty(ffn, dtype=torch.int32, device=x.device)
        count = torch.empty(1, dtype=torch.int32, device=x.device)
        launch_compact(live, sizes, chosen["ROWS"], ids, count, alive, live_tally)
    in_place = live is not None
    weighted_rows(
        h, fc2, fc2_scale, ids, count, out.view(B, D), in_place=in_place, skip_zeros=skip, name="fc2"
    )


def default_settings(D: int, dtype: torch.dtype, tokens: int) -> Settings:
    """Sound for any shape; PROGRAMS is a number for each multiprocessor."""
    if tokens == 1:
        return row_settings(D, dtype)
    return {"ROWS": 16, "BLOCK_D": 256, "PROGRAMS": 2, "num_warps": 4, "num_stages": 4}


_op = register("sparse_mlp", cuda=_sparse_mlp, cpu=sparse_mlp_reference, mutates={"out", "live_tally"})


def sparse_mlp(
    x: Tensor,
    fc1: Tensor,
    fc1_scale: Tensor | None,
    fc1_bias: Tensor | None,
    fc2: Tensor,
    fc2_scale: Tensor | None,
    ids: Tensor | None = None,
    count: Tensor | None = None,
    out: Tensor | None = None,
    live_tally: Tensor | None = None,
    alive: Tensor | None = None,
) -> Tensor:
    """``relu(x @ fc1[ids].T + fc1_bias[ids]) @ fc2[ids]``: only the chosen rows are read, and of fc2 only
    those whose activation is not zero. Triton kernels on CUDA, `sparse_mlp_reference` on the CPU.

    Args:
        x: ``[B, S, D]``, the block's input.
        fc1: ``[F, D]``, a neuron's input weights in a row.
        fc1_scale, fc2_scale: fp32 ``[F, 1]`` of 8-bit weights (int8, fp8 e4m3), else None.
        fc1_bias: ``[F]``.
        fc2: ``[F, D]``, a neuron's output weights in a row.
        ids: ``int32[F]``; the first ``count`` (``int32[1]``) entries name the neurons of the whole batch. Or
            ``int32[B, F]`` and ``int32[B]``: each sequence has its own. None: all, and all of fc2 is read.
        out: ``[B, S, D]`` to write to.
        live_tally: ``int64[2]``, to which the neurons that are live for any token and 1 are added (for every
            16 tokens); only with ``ids`` None, and then of fc2 only live rows are read.
        alive: ``int64[B]``, with ``S`` 1; where it is 0, no neuron is live.

    Returns:
        ``[B, S, D]``, this rank's share of the block's output, without fc2's bias.
    """
    assert fc1.shape == fc2.shape and x.shape[-1] == fc1.shape[1] and x.dim() == 3
    assert fc1.is_contiguous() and fc2.is_contiguous()
    if ids is not None:
        assert count is not None and ids.dtype == count.dtype == torch.int32 and ids.is_contiguous()
        assert ids.shape == fc1.shape[:1] or (ids.shape == (len(x), len(fc1)) and x.shape[1] == 1)
        assert count.numel() == (1 if ids.dim() == 1 else len(x))
    if out is None:
        out = torch.empty_like(x)
    assert out.shape == x.shape and out.is_contiguous()
    assert live_tally is None or ids is None
    assert alive is None or (alive.shape == x.shape[:1] and x.shape[1] == 1)
    _op(x.contiguous(), fc1, fc1_scale, fc1_bias, fc2, fc2_scale, ids, count, out, live_tally, alive)
    return out
