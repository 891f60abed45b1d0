"""The attention block over chosen heads.

Shape legend: B batch, D hidden, N local heads, H head dim, T cache length, K chosen heads.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def sparse_attention_reference(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor,
    out_proj: Tensor,
    ids: Tensor,
    count: Tensor,
    out: Tensor | None = None,
) -> Tensor:
    """Decode attention and output projection of each sequence's chosen heads; the others add nothing.

    Args:
        q: ``[B, 1, N, H]``.
        keys, values: ``[B, N, T, H]``, complete for every chosen head.
        mask: ``[B, 1, 1, T]``, True where the query sees a slot.
        out_proj: ``[N, H, D]``.
        ids: ``int32[B, N]``; the first ``count[b]`` (``int32[B]``) entries name sequence b's heads.
        out: ``[B, 1, D]`` to write to.

    Returns:
        ``[B, 1, D]``, this rank's share of the block's output, without out_proj's bias.
    """
    if out is None:
        out = q.new_empty(len(q), 1, out_proj.shape[-1])
    for b, chosen_count in enumerate(count.tolist()):
        chosen = ids[b, :chosen_count].long()
        heads = F.scaled_dot_product_attention(
            q[b, 0, chosen, None], keys[b, chosen], values[b, chosen], attn_mask=mask[b]
        )  # [K, 1, H]
        torch.matmul(heads.reshape(1, -1), out_proj[chosen].flatten(0, 1), out=out[b])
    return out
