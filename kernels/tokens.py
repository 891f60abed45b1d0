"""The two ends of a decode step: token ids to rows of the embedding, logits to the next token.

In plain torch they are some thirty launches of a microsecond and a half each, 1% of a step of OPT-6.7B.

Shape legend: B batch, V vocabulary, D embedding size, R rows of a rank's share of the table.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from dejavu.kernels.registration import register

# What is drawn from logits without a finite maximum.
NO_TOKEN = -1


def embed_rows_reference(token_ids: Tensor, table: Tensor, first: int, out: Tensor) -> None:
    """See `embed_rows`."""
    here = (token_ids >= first) & (token_ids < first + len(table))
    rows = F.embedding(torch.where(here, token_ids - first, 0), table)
    torch.where(here[:, None], rows, rows.new_zeros(()), out=out)


@triton.jit(do_not_specialize=["first", "R"])
def _embed_rows_kernel(ids_ptr, table_ptr, out_ptr, first, R, D: tl.constexpr, BLOCK_D: tl.constexpr):
    t, cols = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    row = tl.load(ids_ptr + t) - first
    mask = (cols < D) & (row >= 0) & (row < R)
    values = tl.load(table_ptr + row * D + cols, mask=mask, other=0.0)
    tl.store(out_ptr + t * D + cols, values, mask=cols < D)


def _embed_rows(token_ids: Tensor, table: Tensor, first: int, out: Tensor) -> None:
    R, D = table.shape
    block = min(1024, triton.next_power_of_2(D))
    grid = (len(token_ids), triton.cdiv(D, block))
    _embed_rows_kernel[grid](token_ids, table, out, first, R, D=D, BLOCK_D=block)


def likeliest_reference(logits: Tensor, tokens: Tensor) -> None:
    """See `likeliest`."""
    top, found = logits.max(-1)
    tokens.copy_(found.where(top.isfinite(), NO_TOKEN))


@triton.jit(do_not_specialize=["V"])
def _likeliest_kernel(logits_ptr, tokens_ptr, V, NO_TOKEN: tl.constexpr, BLOCK: tl.constexpr):
    """A program a row: every lane keeps the first of its largest."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    token = lane
    is_number = lane >= 0
    for first in range(0, V, BLOCK):
        x = tl.load(logits_ptr + row * V + first + lane, mask=first + lane < V, other=float("-inf"))
        is_number = is_number & (x == x)
        larger = x > top
        top = tl.where(larger, x, top)
        token = tl.where(larger, first + lane, token)
    best = tl.max(top, 0)
    found = tl.min(tl.where(top == best, token, V), 0)
    valid = (tl.min(is_number.to(tl.int32), 0) == 1) & (tl.abs(best) < float("inf"))
    tl.store(tokens_ptr + row, tl.where(valid, found, NO_TOKEN).to(tl.int64))


def _likeliest(logits: Tensor, tokens: Tensor) -> None:
    B, V = logits.shape
    _likeliest_kernel[(B,)](logits, tokens, V, NO_TOKEN=NO_TOKEN, BLOCK=8192, num_warps=16)


def count_down_reference(tokens: Tensor, last: Tensor, left: Tensor, alive: Tensor) -> None:
    """See `count_down`."""
    left.sub_(alive)
    alive.mul_((left > 0) & (tokens != last))


@triton.jit(do_not_specialize=["B"])
def _count_down_kernel(tokens_ptr, last_ptr, left_ptr, alive_ptr, B, BLOCK: tl.constexpr):
    b = tl.arange(0, BLOCK)
    inside = b < B
    alive = tl.load(alive_ptr + b, mask=inside, other=0)
    left = tl.load(left_ptr + b, mask=inside, other=0) - alive
    goes_on = tl.load(tokens_ptr + b, mask=inside, other=0) != tl.load(last_ptr + b, mask=inside, other=0)
    tl.store(left_ptr + b, left, mask=inside)
    tl.store(alive_ptr + b, tl.where((left > 0) & goes_on, alive, 0), mask=inside)


def _count_down(tokens: Tensor, last: Tensor, left: Tensor, alive: Tensor) -> None:
    B = len(tokens)
    _count_down_kernel[(1,)](tokens, last, left, alive, B, BLOCK=triton.next_power_of_2(B))


_embed_rows_op = register("embed_rows", cuda=_embed_rows, cpu=embed_rows_reference, mutates={"out"})
_likeliest_op = register("likeliest", cuda=_likeliest, cpu=likeliest_reference, mutates={"tokens"})
_count_down_op = register("count_down", cuda=_count_down, cpu=count_down_reference, mutates={"left", "alive"})


def embed_rows(token_ids: Tensor, table: Tensor, first: int, out: Tensor) -> Tensor:
    """Rows of a table that begins with token ``first``; zeros for tokens that it does not have.

    Args:
        token_ids: ``int64 [...]``.
        table: ``[R, D]``.
        out: ``[..., D]``, contiguous; written.
    """
    assert table.is_contiguous() and out.is_contiguous() and out.dtype == table.dtype
    _embed_rows_op(token_ids.flatten(), table, first, out.view(-1, table.shape[1]))
    return out


def likeliest(logits: Tensor) -> Tensor:
    """``logits fp32[B, V]`` to the first of each row's largest, ``int64[B]``; `NO_TOKEN` where that is not
    finite, or something is not a number."""
    assert logits.dtype == torch.float32
    tokens = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    _likeliest_op(logits.contiguous(), tokens)
    return tokens


def count_down(tokens: Tensor, last: Tensor, left: Tensor, alive: Tensor) -> None:
    """Who goes on after ``tokens``: all that are ``alive`` have one less ``left``, and go on if that leaves
    some and the token is not their ``last``. All ``int64[B]``, contiguous; the latter two are written."""
    assert all(x.dtype == torch.int64 and x.is_contiguous() for x in (tokens, last, left, alive))
    _count_down_op(tokens, last, left, alive)
