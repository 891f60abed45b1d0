"""The predictor of one layer's neurons or heads: two layers, a threshold, and the active set it leaves.

``scores = up @ act(down @ z) + bias`` with ``z`` the residual stream standardised over D (zero mean, unit
variance); what scores above the threshold is chosen (section 4.1 of the paper; a threshold instead of top-k).

Shape legend: B batch, D hidden, r rank, n local neurons or heads, S sets.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from dejavu.kernels.device import (
    MAX_TOKENS,
    dot,
    dp4a,
    first_weights,
    half_to_float,
    has_pdl,
    launched_early,
    num_sms,
    runs_beside,
    to_float,
    token_block,
    wait_for_predecessor,
)
from dejavu.kernels.registration import register
from dejavu.kernels.tuning import Settings, settings

_EPS = 1e-5
# Steps into which the largest of some numbers is divided, to multiply them by 8-bit weights as whole numbers
# of 23 bits: converting the weights takes most of the time otherwise, and their own rounding is far coarser.
_STEPS = tl.constexpr(63.0 * 65536)
# Entries of a mask that one program of the compaction places.
_PLACED = 1024
# Programs on each multiprocessor of a predictor that runs beside other work. Fewer leave others more room but
# take too long for a short layer. (OPT-66B on two H200, half a layer ahead: a step takes 8.42, 7.68 and 8.05
# ms with 1, 2, 3 for the neurons, before 8-bit weights came by words.)
_BESIDE = 2


def standardise(residual: Tensor) -> Tensor:
    """A tap as predictors see it: zero mean and unit variance over D, in fp32 at least."""
    x = residual.to(torch.promote_types(residual.dtype, torch.float32))
    return F.layer_norm(x, x.shape[-1:], eps=_EPS)


def predict_reference(
    residual: Tensor,
    down: Tensor,
    down_scale: Tensor | None,
    down_sums: Tensor,
    up: Tensor,
    up_scale: Tensor | None,
    bias: Tensor,
    threshold: Tensor,
    alive: Tensor | None,
    ids: Tensor,
    count: Tensor,
    tally: Tensor,
    relu: bool,
    beside: bool = False,
) -> None:
    """See `predict`."""
    z = standardise(residual)
    down, up = (
        w.to(z.dtype) if s is None else w.to(z.dtype) * s for w, s in ((down, down_scale), (up, up_scale))
    )
    hidden = F.linear(z, down)
    mask = F.linear(F.relu(hidden) if relu else hidden, up, bias.to(z.dtype)) > threshold
    if alive is not None:
        mask = mask & alive.bool()[:, None]
    compact_reference(mask.any(0, keepdim=True) if ids.dim() == 1 else mask, ids, count)
    tally[0] += count.sum()
    if alive is None:
        tally[1] += len(count)
    else:
        tally[1] += alive.any() if ids.dim() == 1 else alive.sum()


def compact_reference(mask: Tensor, ids: Tensor, count: Tensor) -> None:
    """``mask bool[S, n]`` to the ids of its True entries, ascending, and their number; see `compact`."""
    # a stable sort of "not chosen" puts the chosen first and keeps their order
    order = torch.sort((~mask).to(torch.uint8), dim=-1, stable=True).indices
    ids.view(mask.shape).copy_(order)
    count.copy_(mask.sum(-1))


@triton.jit
def _largest(a, b, c, d):
    return tl.maximum(tl.maximum(tl.abs(a), tl.abs(b)), tl.maximum(tl.abs(c), tl.abs(d)))


@triton.jit
def _word(a, b, c, d):
    """The lowest bytes of four whole numbers, in a word."""
    return (a & 255) | (b & 255) << 8 | (c & 255) << 16 | d << 24


@triton.jit
def _whole(x, scale):
    """The whole number next to ``x * scale``, of less than 2 ** 22, in three bytes with a sign each."""
    # Added to such a float this leaves the number in its lowest bits; and with 128 more a byte, no byte takes
    # from the next.
    bits = (x * scale + 12582912.0).to(tl.int32, bitcast=True)
    return (bits - 0x4B400000 + 0x808080) ^ 0x808080


@triton.jit
def _fixed(a, b, c, d, peak):
    """Four neighbours in ``fp32[N]`` each, of which none is beyond ``peak``, as whole numbers of 23 bits,
    ``(256 * (256 * high + middle) + low) * step``: the high, middle and low bytes of the four in a word."""
    scale = tl.where(peak > 0, _STEPS / peak, 0.0)
    a, b, c, d = _whole(a, scale), _whole(b, scale), _whole(c, scale), _whole(d, scale)
    high, middle = _word(a >> 16, b >> 16, c >> 16, d >> 16), _word(a >> 8, b >> 8, c >> 8, d >> 8)
    return high, middle, _word(a, b, c, d), peak / _STEPS


@triton.jit
def _sums_and_peak(a, b, c, d, e, f):
    return a + d, b + e, tl.maximum(c, f)


@triton.jit
def _plus(a, b, c, d, e, f):
    return a + d, b + e, c + f


@triton.jit
def _fixed_products(words, high, middle, low, step):
    """Rows of 8-bit weights, four a word, ``int32[ROWS, N]``, times what `_fixed` made: fp32 ``[ROWS]``."""
    products = dp4a(words, high[None, :]), dp4a(words, middle[None, :]), dp4a(words, low[None, :])
    highs, middles, lows = tl.reduce(products, 1, _plus)  # at once: each sum over a program takes its time
    return (highs.to(tl.float32) * 65536 + middles.to(tl.float32) * 256 + lows.to(tl.float32)) * step


@triton.jit
def _rows_of(weight_ptr, k, N, C: tl.constexpr, BLOCK: tl.constexpr, PAIRS: tl.constexpr = False):
    """The first weights (or words of four) of the rows ``k`` of ``[N, C]``, of those that there are. PAIRS: a
    thread has two words in a row, as it has of a stream that comes by 16 bytes, which else would have to go
    from thread to thread (through 24 barriers, for OPT-175B)."""
    return first_weights(weight_ptr + k.to(tl.int64) * C, k < N, C, BLOCK, PAIRS)


@triton.jit(do_not_specialize=["T", "R"])
def _down_kernel(
    x_ptr,
    weight_ptr,
    scale_ptr,
    sums_ptr,
    hidden_ptr,
    T,
    R,
    eps,
    D: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    RELU: tl.constexpr,
    WORDS: tl.constexpr,
    BF16: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    """``hidden[t, k] = act(down[k] . z[t])``, as ``(down[k] . x[t] - mean * sum(down[k])) / deviation``: so a
    program needs no more than one pass over the stream. WORDS: 8-bit weights come four a word of 32 bits, and
    so does the only token's stream of 64, from which the mean is taken off first. The deviation is that of
    sums of squares: for a mean of 30 deviations it is right to a ten-thousandth."""
    t = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    cols = tl.arange(0, BLOCK_D)
    if WORDS:
        own = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        early = _rows_of(weight_ptr, own, R, D // 4, BLOCK_D // 4, PAIRS=True)
    wait_for_predecessor(PDL)
    if WORDS:
        at = tl.arange(0, BLOCK_D // 4)
        there = at < D // 4
        fours = tl.load(x_ptr + at, mask=there, other=0)
        a, b = half_to_float(fours, BF16), half_to_float(fours >> 16, BF16)
        c, d = half_to_float(fours >> 32, BF16), half_to_float(fours >> 48, BF16)
        seen = a + b + c + d, a * a + b * b + c * c + d * d, _largest(a, b, c, d)
        total, squares, peak = tl.reduce(seen, 0, _sums_and_peak)
        centre = total / D
        taken = tl.where(there, centre, 0.0)
        high, middle, low, step = _fixed(a - taken, b - taken, c - taken, d - taken, peak + tl.abs(centre))
        mean = tl.zeros([TOKENS], tl.float32)
        square = mean + (squares / D - centre * centre)
    for block in tl.range(tl.program_id(0), tl.cdiv(R, ROWS), tl.num_programs(0)):
        k = block * ROWS + tl.arange(0, ROWS)
        inside_rows = k < R
        row_ptr = weight_ptr + k.to(tl.int64)[:, None] * D
        if WORDS:
            words = early  # and the next block's come while this one is summed
            early = _rows_of(weight_ptr, k + tl.num_programs(0) * ROWS, R, D // 4, BLOCK_D // 4, PAIRS=True)
            h = _fixed_products(words, high, middle, low, step)[:, None]
        elif TOKENS == 1:
            acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
            first = tl.zeros([BLOCK_D], tl.float32)
            second = tl.zeros([BLOCK_D], tl.float32)
            for d in tl.static_range(0, D, BLOCK_D):  # unrolled: all of a row's loads are under way at once
                inside = d + cols < D
                mask = inside_rows[:, None] & inside[None, :]
                w = tl.load(row_ptr + (d + cols)[None, :], mask=mask, other=0.0)
                x = tl.load(x_ptr + d + cols, mask=inside, other=0.0).to(tl.float32)
                acc += to_float(w) * x[None, :]
                first += x
                second += x * x
            mean, square = tl.sum(first, 0)[None] / D, tl.sum(second, 0)[None] / D
            h = tl.sum(acc, 1)[:, None]
        else:
            mean = tl.zeros([TOKENS], tl.float32)
            square = tl.zeros([TOKENS], tl.float32)
            h = tl.zeros([ROWS, TOKENS], tl.float32)
            for d in tl.range(0, D, BLOCK_D):
                inside = d + cols < D
                mask = inside_rows[:, None] & inside[None, :]
                w = tl.load(row_ptr + (d + cols)[None, :], mask=mask, other=0.0)
                x = tl.load(
                    x_ptr + t[None, :] * D + (d + cols)[:, None],
                    mask=(t < T)[None, :] & inside[:, None],
                    other=0.0,
                )
                wide = x.to(tl.float32)
                mean += tl.sum(wide, 0) / D
                square += tl.sum(wide * wide, 0) / D
                h = dot(w, x, h)
        if HAS_SCALE:
            h *= tl.load(scale_ptr + k, mask=inside_rows, other=0.0)[:, None]
        variance = tl.maximum(square - mean * mean, 0.0)  # rounding can take it below zero
        if not WORDS:
            sums = tl.load(sums_ptr + k, mask=inside_rows, other=0.0)
            h -= mean[None, :] * sums[:, None]
        h *= tl.rsqrt(variance + eps)[None, :]
        if RELU:
            h = tl.where(h < 0, 0.0, h)
        tl.store(hidden_ptr + t[None, :] * R + k[:, None], h, mask=inside_rows[:, None] & (t < T)[None, :])


@triton.jit(do_not_specialize=["T", "N"])
def _up_kernel(
    hidden_ptr,
    weight_ptr,
    scale_ptr,
    bias_ptr,
    threshold_ptr,
    alive_ptr,
    mask_ptr,
    sizes_ptr,
    T,
    N,
    R: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_ALIVE: tl.constexpr,
    UNION: tl.constexpr,
    WORDS: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PDL: tl.constexpr,
):
    """Whether ``up[k] . hidden[t] + bias[k]`` is above the threshold, for each live token or for any here;
    and for how many k of each block. WORDS: see `_down_kernel`."""
    t = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    cols = tl.arange(0, BLOCK_R)
    live = t < T
    blocks = tl.cdiv(N, ROWS)
    COLUMNS: tl.constexpr = R // 4 if WORDS else R
    BLOCK: tl.constexpr = BLOCK_R // 4 if WORDS else BLOCK_R
    if TOKENS == 1:  # the first weights, while the first layer still runs
        own = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        early = _rows_of(weight_ptr, own, N, COLUMNS, BLOCK)
    wait_for_predecessor(PDL)
    if WORDS:
        at = 4 * tl.arange(0, BLOCK_R // 4)
        four_ptr, there = hidden_ptr + at, at < R
        a, b = tl.load(four_ptr, mask=there, other=0.0), tl.load(four_ptr + 1, mask=there, other=0.0)
        c, d = tl.load(four_ptr + 2, mask=there, other=0.0), tl.load(four_ptr + 3, mask=there, other=0.0)
        high, middle, low, step = _fixed(a, b, c, d, tl.max(_largest(a, b, c, d)))
    threshold = tl.load(threshold_ptr)
    if HAS_ALIVE:
        live = live & (tl.load(alive_ptr + t, mask=live, other=0) != 0)
    for block in tl.range(tl.program_id(0), blocks, tl.num_programs(0)):
        k = block * ROWS + tl.arange(0, ROWS)
        inside_rows = k < N
        row_ptr = weight_ptr + k.to(tl.int64)[:, None] * R
        if WORDS:
            words = early  # and the next block's come while this one is summed
            early = _rows_of(weight_ptr, k + tl.num_programs(0) * ROWS, N, COLUMNS, BLOCK)
            scores = _fixed_products(words, high, middle, low, step)[:, None]
        elif TOKENS == 1:
            h = tl.load(hidden_ptr + cols, mask=cols < R, other=0.0)
            acc = to_float(early) * h[None, :]
            for d in tl.static_range(BLOCK_R, R, BLOCK_R):
                inside = d + cols < R
                mask = inside_rows[:, None] & inside[None, :]
                w = tl.load(row_ptr + (d + cols)[None, :], mask=mask, other=0.0)
                h = tl.load(hidden_ptr + d + cols, mask=inside, other=0.0)
                acc += to_float(w) * h[None, :]
            # the next block's, while this one is summed
            early = _rows_of(weight_ptr, k + tl.num_programs(0) * ROWS, N, COLUMNS, BLOCK)
            scores = tl.sum(acc, 1)[:, None]
        else:
            scores = tl.zeros([ROWS, TOKENS], tl.float32)
            for d in tl.range(0, R, BLOCK_R):
                inside = d + cols < R
                mask = inside_rows[:, None] & inside[None, :]
                w = tl.load(row_ptr + (d + cols)[None, :], mask=mask, other=0.0)
                h = tl.load(
                    hidden_ptr + t[None, :] * R + (d + cols)[:, None],
                    mask=(t < T)[None, :] & inside[:, None],
                    other=0.0,
                )
                scores = dot(w, h, scores)
        if HAS_SCALE:
            scores *= tl.load(scale_ptr + k, mask=inside_rows, other=0.0)[:, None]
        bias = tl.load(bias_ptr + k, mask=inside_rows, other=0.0).to(tl.float32)
        chosen = ((scores + bias[:, None] > threshold) & live[None, :]).to(tl.int8)
        if UNION:
            any_of_them = tl.where(inside_rows, tl.max(chosen, 1), 0)
            tl.store(mask_ptr + tl.program_id(1) * N + k, any_of_them, mask=inside_rows)
            size = tl.sum(any_of_them.to(tl.int32), 0)
            tl.store(sizes_ptr + tl.program_id(1) * blocks + block, size)
        else:
            chosen = tl.where(inside_rows[:, None], chosen, 0)
            mask = inside_rows[:, None] & (t < T)[None, :]
            tl.store(mask_ptr + t[None, :] * N + k[:, None], chosen, mask=mask)
            size = tl.sum(chosen.to(tl.int32), 0)
            tl.store(sizes_ptr + t * blocks + block, size, mask=t < T)


@triton.jit(do_not_specialize=["N", "T"])
def _compact_kernel(
    mask_ptr,
    sizes_ptr,
    alive_ptr,
    ids_ptr,
    count_ptr,
    tally_ptr,
    N,
    T,
    TOKENS: tl.constexpr,
    HAS_ALIVE: tl.constexpr,
    HAS_TALLY: tl.constexpr,
    PLACED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program counts what is chosen before its entries, and puts the ids of its own behind that.

    ``sizes`` has the number of chosen ones in every ROWS entries, which divide PLACED.
    """
    block, s = tl.program_id(0), tl.program_id(1)
    wait_for_predecessor(PDL)
    mask_ptr += s * N
    first = block * PLACED
    i = tl.arange(0, BLOCK)
    k = first + tl.arange(0, PLACED)
    chosen = tl.load(mask_ptr + k, mask=k < N, other=0).to(tl.int32)
    before = tl.sum(tl.load(sizes_ptr + s * tl.cdiv(N, ROWS) + i, mask=i * ROWS < first, other=0), 0)
    place = before + tl.cumsum(chosen, 0) - chosen
    tl.store(ids_ptr + s * N + place, k, mask=chosen != 0)
    if block == tl.num_programs(0) - 1:
        count = before + tl.sum(chosen, 0)
        tl.store(count_ptr + s, count)
        if HAS_TALLY:
            rows = 1
            if HAS_ALIVE:  # of the set's own sequences: one, or all of the batch
                t = tl.arange(0, TOKENS)
                live = tl.load(alive_ptr + s * T + t, mask=t < T, other=0)
                rows = tl.max((live != 0).to(tl.int32), 0)
            tl.atomic_add(tally_ptr, count.to(tl.int64))
            tl.atomic_add(tally_ptr + 1, tl.zeros_like(count).to(tl.int64) + rows)


def _predict(
    residual: Tensor,
    down: Tensor,
    down_scale: Tensor | None,
    down_sums: Tensor,
    up: Tensor,
    up_scale: Tensor | None,
    bias: Tensor,
    threshold: Tensor,
    alive: Tensor | None,
    ids: Tensor,
    count: Tensor,
    tally: Tensor,
    relu: bool,
    beside: bool,
) -> None:
    """Launches the two layers and the compaction."""
    # several tokens are multiplied by tensor cores, which take both sides in 16 bits (8-bit weights fit them)
    narrow = torch.float16 if up.dtype.itemsize == 1 else up.dtype
    hidden_dtype = torch.float32 if len(residual) == 1 else narrow
    hidden = launch_down(residual, down, down_scale, down_sums, hidden_dtype, relu=relu, beside=beside)
    launch_up(hidden, up, up_scale, bias, threshold, alive, ids, count, tally, beside=beside)


def launch_down(
    residual: Tensor,
    down: Tensor,
    down_scale: Tensor | None,
    down_sums: Tensor,
    dtype: torch.dtype = torch.float32,
    *,
    relu: bool = False,
    beside: bool = False,
) -> Tensor:
    """The first layer: ``[B, r]``. See `predict`."""
    (B, D), r, device = residual.shape, len(down), residual.device
    tokens, pdl = token_block(min(B, MAX_TOKENS)), _overlaps(device, beside)
    hidden = torch.empty(B, r, dtype=dtype, device=device)
    stream = residual
    # four numbers of a stream of 16 bits make a word of 64
    words = _by_words(down.dtype, D, B) and residual.dtype.itemsize == 2
    name, default = _name("down", B, beside), _default_down_settings(D, down.dtype, B, beside, words=words)
    # the table has one line for int8 and fp8, of which the latter needs what words have no use for
    chosen = {**default, **settings(name, default, r, D, down.dtype, B, device)}
    if words:
        stream, down, chosen["BLOCK_D"] = residual[0].view(torch.int64), down.view(torch.int32), _block(D)
    programs = _programs(triton.cdiv(r, chosen["ROWS"]), device, beside, chosen)
    kernel = _down_kernel[(programs, triton.cdiv(B, tokens))](
        stream,
        down,
        down_scale,
        down_sums,
        hidden,
        B,
        r,
        _EPS,
        D=D,
        HAS_SCALE=down_scale is not None,
        RELU=relu,
        WORDS=words,
        BF16=residual.dtype == torch.bfloat16,
        TOKENS=tokens,
        **launched_early(pdl),
        **chosen,
    )
    if beside:
        runs_beside(kernel)
    return hidden


def launch_up(
    hidden: Tensor,
    up: Tensor,
    up_scale: Tensor | None,
    bias: Tensor,
    threshold: Tensor,
    alive: Tensor | None,
    ids: Tensor,
    count: Tensor,
    tally: Tensor,
    *,
    beside: bool = False,
) -> None:
    """The second layer, from ``hidden [B, r]``, and the compaction. See `predict`."""
    B, (n, r), device = len(hidden), up.shape, hidden.device
    tokens, union = token_block(min(B, MAX_TOKENS)), ids.dim() == 1
    blocks, pdl = triton.cdiv(B, tokens), _overlaps(device, beside)
    mask = torch.empty(blocks if union else B, n, dtype=torch.int8, device=device)
    words = _by_words(up.dtype, r, B)
    name, default = _name("up", B, beside), _default_up_settings(r, up.dtype, B, beside, words=words)
    chosen = {**default, **settings(name, default, n, r, up.dtype, B, device)}
    if words:
        up, chosen["BLOCK_R"] = up.view(torch.int32), _block(r)
    row_blocks = triton.cdiv(n, chosen["ROWS"])
    sizes = torch.empty(len(mask), row_blocks, dtype=torch.int32, device=device)
    programs = _programs(row_blocks, device, beside, chosen)
    kernel = _up_kernel[(programs, blocks)](
        hidden,
        up,
        up_scale,
        bias,
        threshold,
        alive,
        mask,
        sizes,
        B,
        n,
        R=r,
        HAS_SCALE=up_scale is not None,
        HAS_ALIVE=alive is not None,
        UNION=union,
        WORDS=words,
        TOKENS=tokens,
        **launched_early(pdl),
        **chosen,
    )
    if beside:
        runs_beside(kernel)
    if union and blocks > 1:
        mask = mask.amax(0, keepdim=True)
        sizes, rows = _sizes(mask), _PLACED
    else:
        rows = chosen["ROWS"]
    launch_compact(mask, sizes, rows, ids, count, alive, tally, beside=beside)


def _name(kernel: str, batch: int, beside: bool) -> str:
    """By which the table of settings knows this use."""
    return f"{kernel}_beside" if beside and batch == 1 else kernel


def _programs(blocks: int, device: torch.device, beside: bool, chosen: dict[str, int]) -> int:
    """One a block; beside others at most those for each multiprocessor, which are taken out of ``chosen``."""
    return min(blocks, chosen.pop("PROGRAMS", _BESIDE) * num_sms(device)) if beside else blocks


def _overlaps(device: torch.device, beside: bool) -> bool:
    """Whether a launch begins before its predecessor has ended: not beside other work, for programs that wait
    would hold the places of those that could work."""
    return has_pdl(device) and not beside


def _sizes(mask: Tensor) -> Tensor:
    """How many entries of ``mask int8[S, n]`` are chosen in every _PLACED of them."""
    padded = F.pad(mask, (0, -mask.shape[1] % _PLACED))
    sizes: Tensor = padded.unflatten(1, (-1, _PLACED)).sum(-1, dtype=torch.int32)
    return sizes


def launch_compact(
    mask: Tensor,
    sizes: Tensor,
    rows: int,
    ids: Tensor,
    count: Tensor,
    alive: Tensor | None = None,
    tally: Tensor | None = None,
    *,
    beside: bool = False,
) -> None:
    """The ids of what is chosen in each row of ``mask int8[S, n]``, of which ``sizes [S, n / rows]`` says how
    many there are in every ``rows`` entries (a divisor of 1024). See `predict`.

    ``tally int64[2]`` counts entries and sets; of ``alive [B]``, a set has its share: it counts if any lives.
    """
    (sets, n), pdl = mask.shape, _overlaps(mask.device, beside)
    tokens = 1 if alive is None else len(alive) // sets
    kernel = _compact_kernel[(triton.cdiv(n, _PLACED), sets)](
        mask,
        sizes,
        alive,
        ids,
        count,
        tally,
        n,
        tokens,
        TOKENS=triton.next_power_of_2(tokens),
        HAS_ALIVE=alive is not None,
        HAS_TALLY=tally is not None,
        PLACED=_PLACED,
        ROWS=rows,
        BLOCK=triton.next_power_of_2(sizes.shape[1]),
        **launched_early(pdl),
        num_warps=min(max(triton.next_power_of_2(sizes.shape[1]) // 2048, 4), 16),
    )
    if beside:
        runs_beside(kernel)


def _compact(mask: Tensor, ids: Tensor, count: Tensor) -> None:
    mask = mask.view(torch.int8)
    launch_compact(mask, _sizes(mask), _PLACED, ids, count)


def _default_down_settings(
    D: int, dtype: torch.dtype, batch: int, beside: bool = False, *, words: bool = False
) -> Settings:
    """Sound for any shape: a few rows a program; one of those in fp32, of which there are few (heads)."""
    if batch > 1:
        return {"ROWS": 16, "BLOCK_D": 128, "num_warps": 4, "num_stages": 4}
    most, programs = triton.next_power_of_2(D), _BESIDE
    if words and D > 4096:
        # one a multiprocessor: two would take all registers, and who finds no place at once waits for QKV
        found, programs = {"ROWS": 2, "num_warps": 8}, 1
    elif words:
        found = {"ROWS": 4, "num_warps": 4}
    elif dtype.itemsize == 4:
        found = {"ROWS": 1, "BLOCK_D": min(2048, most), "num_warps": 8}
    else:
        found = {"ROWS": 2, "BLOCK_D": min(1024 if beside else 2048, most), "num_warps": 4}
    return found | {"PROGRAMS": programs} if beside else found


def _default_up_settings(
    r: int, dtype: torch.dtype, batch: int, beside: bool = False, *, words: bool = False
) -> Settings:
    """Sound for any shape: 16 rows a program; 8 beside others, and of 8-bit weights."""
    most = triton.next_power_of_2(r)
    if batch > 1:
        return {"ROWS": 64, "BLOCK_R": min(max(most, 16), 128), "num_warps": 4}
    if words:
        found = {"ROWS": 8, "num_warps": 4}
    else:
        rows, block = (8, 512) if beside else (16, 1024)
        found = {"ROWS": rows, "BLOCK_R": min(most, block), "num_warps": 4}
    return found | {"PROGRAMS": _BESIDE} if beside else found


def _by_words(dtype: torch.dtype, columns: int, batch: int) -> bool:
    """Whether a matrix is read four weights a word, all of a row at once, for one token as whole numbers."""
    return dtype == torch.int8 and batch == 1 and columns % 4 == 0


def _block(columns: int) -> int:
    power: int = triton.next_power_of_2(columns)
    return max(power, 16)


_op = register("predict", cuda=_predict, cpu=predict_reference, mutates={"ids", "count", "tally"})
_compact_op = register("compact", cuda=_compact, cpu=compact_reference, mutates={"ids", "count"})


def predict(
    residual: Tensor,
    down: Tensor,
    down_scale: Tensor | None,
    down_sums: Tensor,
    up: Tensor,
    up_scale: Tensor | None,
    bias: Tensor,
    threshold: Tensor,
    alive: Tensor | None,
    tally: Tensor,
    *,
    union: bool,
    relu: bool = False,
    beside: bool = False,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """The active set that a low-rank predictor finds. Triton kernels on CUDA, `predict_reference` on the CPU.

    Args:
        residual: ``[B, D]``, the stream at the predictor's tap.
        down: ``[r, D]`` and ``up [n, r]``: of 16 or 32 bits, or of 8 with ``down_scale fp32[r, 1]`` and
            ``up_scale fp32[n, 1]``.
        down_sums: fp32 ``[r]``, the sums of ``down * down_scale`` over D, which centre the stream (one that
            comes by words, with the weights, is centred first).
        bias: ``[n]``; ``threshold`` fp32 ``[1]``, on the device, so that it can move under a captured graph.
        alive: ``int64[B]``, 0 for sequences that choose nothing; None: all choose.
        tally: ``int64[2]``, to which the numbers of entries chosen and of sets are added.
        union: one set for the batch, instead of one a sequence.
        relu: between the two layers.
        beside: it runs beside other work, to which it leaves room: slower by itself, sooner for both.
        out: ids and count to write to.

    Returns:
        ``ids int32[n]`` and ``count int32[1]`` of the union, or ``int32[B, n]`` and ``int32[B]``; ids ascend,
        and past the count they are undefined.
    """
    assert down.shape[0] == up.shape[1] and down.shape[1] == residual.shape[1] and residual.dim() == 2
    assert down.is_contiguous() and up.is_contiguous()
    n, B = len(up), len(residual)
    assert bias.shape == (n,) and down_sums.shape == (len(down),) and threshold.numel() == 1
    assert threshold.dtype == down_sums.dtype == torch.float32 and threshold.device == residual.device
    assert alive is None or alive.shape == (B,)
    if out is None:
        ids = torch.empty(n if union else (B, n), dtype=torch.int32, device=residual.device)
        count = torch.empty(1 if union else B, dtype=torch.int32, device=residual.device)
    else:
        ids, count = out
        assert ids.shape == ((n,) if union else (B, n)) and count.shape == (1 if union else B,)
        assert ids.dtype == count.dtype == torch.int32 and ids.is_contiguous()
    arguments = (down, down_scale, down_sums, up, up_scale, bias, threshold, alive, ids, count, tally, relu)
    _op(residual.contiguous(), *arguments, beside)
    return ids, count


def compact(mask: Tensor) -> tuple[Tensor, Tensor]:
    """``mask bool[n]`` or ``[B, n]`` to the ids of its True entries, ascending, ``int32`` of the same shape,
    undefined past their number ``count int32[1]`` or ``[B]``."""
    mask = mask.contiguous()
    ids = torch.empty_like(mask, dtype=torch.int32)
    count = torch.empty(mask.shape[:-1].numel(), dtype=torch.int32, device=mask.device)
    _compact_op(mask.view(-1, mask.shape[-1]), ids.view(-1, mask.shape[-1]), count)
    return ids, count
