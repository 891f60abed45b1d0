"""The MLP block over chosen neurons.

Shape legend: B batch, S query length, D hidden, F local ffn, K chosen neurons.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def sparse_mlp_reference(
    x: Tensor,
    fc1: Tensor,
    fc1_bias: Tensor | None,
    fc2: Tensor,
    ids: Tensor,
    count: Tensor,
    out: Tensor | None = None,
) -> Tensor:
    """``relu(x @ fc1[ids].T + fc1_bias[ids]) @ fc2[ids]``: only the chosen rows are read, and of fc2 only
    those whose activation is not zero.

    Args:
        x: ``[B, S, D]``, the block's input.
        fc1: ``[F, D]``, a neuron's input weights in a row.
        fc1_bias: ``[F]``.
        fc2: ``[F, D]``, a neuron's output weights in a row.
        ids: ``int32[F]``; the first ``count`` (``int32[1]``) entries name the neurons of the whole batch. Or
            ``int32[B, F]`` and ``int32[B]``: each sequence has its own.
        out: ``[B, S, D]`` to write to.

    Returns:
        ``[B, S, D]``, this rank's share of the block's output, without fc2's bias.
    """
    if ids.dim() == 2:
        return _one_set_a_sequence(x, fc1, fc1_bias, fc2, ids, count, out)
    chosen = ids[: int(count)].long()
    hidden = F.linear(x, fc1[chosen], None if fc1_bias is None else fc1_bias[chosen]).relu_()
    live = hidden.flatten(0, 1).any(0).nonzero()[:, 0]
    return torch.matmul(hidden[..., live], fc2[chosen[live]], out=out)


def _one_set_a_sequence(
    x: Tensor,
    fc1: Tensor,
    fc1_bias: Tensor | None,
    fc2: Tensor,
    ids: Tensor,
    count: Tensor,
    out: Tensor | None,
) -> Tensor:
    """All sequences at once, padded to the largest set: a loop over them would launch B times as much."""
    K = int(count.max())
    padding = torch.arange(K, device=ids.device) >= count[:, None]  # [B, K]
    chosen = ids[:, :K].long().masked_fill(padding, 0)
    hidden = x @ fc1[chosen].transpose(1, 2)  # [B, S, K]
    if fc1_bias is not None:
        hidden = hidden + fc1_bias[chosen][:, None]
    hidden = hidden.relu_().masked_fill(padding[:, None], 0)
    return torch.matmul(hidden, fc2[chosen], out=out)
