"""The MLP block over chosen neurons.

Shape legend: B batch, D hidden, F local ffn, K chosen neurons.
"""

import torch
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
    """``relu(x @ fc1[ids].T + fc1_bias[ids]) @ fc2[ids]``: only the chosen rows are read.

    Args:
        x: ``[..., D]``, the block's input; all rows share the chosen set.
        fc1: ``[F, D]``, a neuron's input weights in a row.
        fc1_bias: ``[F]``.
        fc2: ``[F, D]``, a neuron's output weights in a row.
        ids: ``int32[F]``; the first ``count`` (``int32[1]``) entries name the chosen neurons.
        out: ``[..., D]`` to write to.

    Returns:
        ``[..., D]``, this rank's share of the block's output, without fc2's bias.
    """
    chosen = ids[: int(count)].long()
    hidden = x @ fc1[chosen].T
    if fc1_bias is not None:
        hidden = hidden + fc1_bias[chosen]
    return torch.matmul(hidden.relu_(), fc2[chosen], out=out)
