"""The collectives of a step. Which way an all-reduce takes is decided in `dejavu.parallel.routes`.

Shape legend: B batch, S query length, D hidden, V vocabulary.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dejavu.kernels.reduce_residual_norm import fused_reduce_residual_norm
from dejavu.kernels.residual_norm import residual_norm
from dejavu.parallel.groups import TPGroup
from dejavu.profiles.nvtx import nvtx_range

# torch 2.13 renamed it, and warns of the name that torch 2.11 has
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def all_reduce(x: Tensor, tp: TPGroup) -> Tensor:
    """The sum of ``x`` over the ranks. ``x`` is overwritten; the sum lies there or, if ``x`` is a payload of
    `TPGroup.buffer`, possibly in memory of its own."""
    if tp.size == 1:
        return x
    with nvtx_range("all_reduce", "collective"):
        routes = tp.routes.get(x.dtype)
        route = "nccl" if routes is None else routes.of_sum(x)
        if routes is not None and route != "nccl":
            return routes.all_reduce(x, route)
        dist.all_reduce(x, group=tp.group)
        return x


def all_gather_last(x: Tensor, tp: TPGroup) -> Tensor:
    """Joins every rank's ``x [..., n]`` along the last dimension, in rank order: ``[..., size * n]``."""
    if tp.size == 1:
        return x
    gathered = tp.buffer((tp.size * x.shape[0], *x.shape[1:]), x.dtype)
    with nvtx_range("all_gather", "collective"):
        _all_gather(gathered, x.contiguous(), group=tp.group)
    return torch.cat(gathered.chunk(tp.size), dim=-1)


def reduce_residual_norm(
    partial: Tensor,
    residual: Tensor,
    bias: Tensor | None,
    norm: nn.LayerNorm | None,
    extra: Tensor | None = None,
    *,
    tp: TPGroup,
) -> tuple[Tensor, Tensor]:
    """The block boundary: one all-reduce, then the row-parallel bias (once), the residual and the next norm.

    Args:
        partial: ``[B, S, D]``, this rank's share of the block's output; overwritten.
        residual: ``[B, S, D]``, the stream that entered the block, the same on every rank; kept.
        bias: ``[D]`` of the block's row-parallel layer.
        norm: what the next block's input passes through; None leaves it as it is.
        extra: a tensor of ``partial``'s dtype, any shape, that rides on the same collective and is summed
            over the ranks in place (a predictor's split first layer, say).

    Returns:
        ``(sum, norm(sum))`` with ``sum = residual + all_reduce(partial) + bias``, both ``[B, S, D]``.
    """
    if tp.size > 1 and extra is not None:
        payload = all_reduce(_joined(partial, extra, tp), tp)
        partial = payload[: partial.numel()].view_as(partial)
        extra.copy_(payload[partial.numel() :].view_as(extra))
    elif tp.size > 1:
        routes = tp.routes.get(partial.dtype)
        if routes is not None and routes.is_fused(partial):
            with nvtx_range("all_reduce", "collective"):
                return fused_reduce_residual_norm(partial, residual, bias, norm, routes.inboxes)
        partial = all_reduce(partial, tp)
    return residual_norm(partial, residual, bias, norm)


def _joined(partial: Tensor, extra: Tensor, tp: TPGroup) -> Tensor:
    """One payload of both; ``partial`` usually is the beginning of the payload already."""
    n = partial.numel()
    payload = tp.buffer((n + extra.numel(),), partial.dtype)
    if payload.data_ptr() != partial.data_ptr():
        payload[:n].copy_(partial.flatten())
    payload[n:].copy_(extra.flatten())
    return payload
