"""The collectives of a step. Routes other than gloo and NCCL go behind these functions, not beside them.

Shape legend: B batch, S query length, D hidden, V vocabulary.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dejavu.kernels.residual_norm import residual_norm
from dejavu.parallel.groups import TPGroup
from dejavu.profiles.nvtx import nvtx_range

# torch 2.13 renamed it, and warns of the name that torch 2.11 has
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def all_reduce(x: Tensor, tp: TPGroup) -> Tensor:
    """Sums ``x`` over the ranks, in place; returns it."""
    if tp.size > 1:
        with nvtx_range("all_reduce", "collective"):
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
    if extra is None or tp.size == 1:
        all_reduce(partial, tp)
    else:
        payload = all_reduce(torch.cat([partial.flatten(), extra.flatten()]), tp)
        partial = payload[: partial.numel()].view_as(partial)
        extra.copy_(payload[partial.numel() :].view_as(extra))
    return residual_norm(partial, residual, bias, norm)
