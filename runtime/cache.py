"""The static key/value cache.

Shape legend: L layers, B batch, S query length, T cache length, N local heads, H head dim.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class KVCache:
    """Keys and values ``[L, B, N, T, H]`` and ``lengths [B]``, how many positions of each sequence they hold.

    Sequences begin at slot 0, whatever their prompts' lengths: slot and position are the same number.
    """

    keys: Tensor
    values: Tensor
    lengths: Tensor

    @classmethod
    def empty(
        cls, shape: tuple[int, int, int, int, int], dtype: torch.dtype, device: torch.device
    ) -> "KVCache":
        """Zeros, not garbage: a masked slot's value is multiplied by 0, which would not silence a NaN."""
        return cls(
            keys=torch.zeros(shape, dtype=dtype, device=device),
            values=torch.zeros(shape, dtype=dtype, device=device),
            lengths=torch.zeros(shape[1], dtype=torch.int64, device=device),
        )

    def layer(self, i: int) -> "LayerKV":
        """The view ``[B, N, T, H]`` of layer ``i``."""
        return LayerKV(self.keys[i], self.values[i])

    def prompt(self, num_queries: int) -> "Step":
        """The first ``num_queries`` positions of every sequence, into an empty cache."""
        positions = torch.arange(num_queries, device=self.lengths.device)
        return Step(positions.expand(len(self.lengths), -1))

    def step(self, num_queries: int) -> "Step":
        """The next ``num_queries`` positions of every sequence, which see all that came before them."""
        device = self.lengths.device
        positions = self.lengths[:, None] + torch.arange(num_queries, device=device)
        slots = torch.arange(self.keys.shape[3], device=device)
        return Step(
            positions,
            sequences=torch.arange(len(positions), device=device)[:, None],
            mask=slots <= positions[:, None, :, None],
        )


@dataclass(frozen=True, slots=True)
class Step:
    """Where the queries of one forward pass stand; made once, read by every layer.

    ``positions [B, S]``; ``sequences [B, 1]``, their numbers; ``mask [B, 1, S, T]``, True where a query sees
    a slot. Without a mask the cache is empty and the queries see each other causally: a shorter prompt's
    padding comes after it, so that nothing of it is ever seen.
    """

    positions: Tensor
    sequences: Tensor | None = None
    mask: Tensor | None = None


@dataclass(frozen=True, slots=True)
class LayerKV:
    """One layer's keys and values, each ``[B, N, T, H]``."""

    keys: Tensor
    values: Tensor

    def write(self, k: Tensor, v: Tensor, step: Step) -> None:
        """Puts ``k`` and ``v [B, S, N, H]`` into the slots of ``step``."""
        if step.mask is None:
            S = k.shape[1]
            self.keys[:, :, :S] = k.transpose(1, 2)
            self.values[:, :, :S] = v.transpose(1, 2)
        else:
            self.keys[step.sequences, :, step.positions] = k
            self.values[step.sequences, :, step.positions] = v
