"""The active set: what is computed of a layer. The contract between those who choose and the kernels."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Chosen:
    """Ids in ascending order and how many of them count; entries past the count are undefined.

    For neurons ``ids int32[F_local]`` and ``count int32[1]``, shared by the batch; for heads
    ``ids int32[B, N_local]`` and ``count int32[B]``, one set a sequence. Both are local to the rank.
    """

    ids: Tensor
    count: Tensor

    @classmethod
    def from_mask(cls, mask: Tensor) -> "Chosen":
        """The set of the True entries of ``mask [n]`` (neurons) or ``[B, n]`` (heads)."""
        # a stable sort of "not chosen" puts the chosen first and keeps their order
        ids = torch.sort((~mask).to(torch.uint8), dim=-1, stable=True).indices
        count = mask.sum(-1, dtype=torch.int32)
        return cls(ids=ids.to(torch.int32), count=count.reshape(-1))


@dataclass(frozen=True, slots=True)
class ActiveSet:
    """What one layer computes in one step; None stands for all of it."""

    neurons: Chosen | None = None
    heads: Chosen | None = None
