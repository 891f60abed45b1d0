"""The static key/value cache.

Shape legend: L layers, B batch, S query length, T cache length, N local heads, H head dim, D hidden, W ring.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

# Attention inputs kept for heads that were not chosen: the longest that keys and values are put off.
WINDOW = 64
# More sequences than these, on a GPU, would catch up with their heads in many passes over the weights.
LAZY_BATCH = 2


@dataclass(frozen=True, slots=True)
class KVCache:
    """Keys and values ``[L, B, N, T, H]`` and ``lengths [B]``, how many positions of each sequence they hold.

    Sequences begin at slot 0, whatever their prompts' lengths: slot and position are the same number.
    A lazy cache also has ``inputs [L, B, W, D]``, a ring of what each attention block was given last, and
    ``filled_to int64[L, B, N]``: from there on a head's keys and values are yet to be computed.
    """

    keys: Tensor
    values: Tensor
    lengths: Tensor
    inputs: Tensor | None = None
    filled_to: Tensor | None = None

    @classmethod
    def empty(
        cls,
        shape: tuple[int, int, int, int, int],
        dtype: torch.dtype,
        device: torch.device,
        lazy: tuple[int, int] | None = None,
    ) -> "KVCache":
        """Zeros, not garbage: a masked slot's value is multiplied by 0, which would not silence a NaN.

        ``lazy`` is (W, D) of the ring, if keys and values may be left out and filled in later.
        """
        L, B, N = shape[:3]
        return cls(
            keys=torch.zeros(shape, dtype=dtype, device=device),
            values=torch.zeros(shape, dtype=dtype, device=device),
            lengths=torch.zeros(B, dtype=torch.int64, device=device),
            inputs=None if lazy is None else torch.zeros(L, B, *lazy, dtype=dtype, device=device),
            filled_to=None if lazy is None else torch.zeros(L, B, N, dtype=torch.int64, device=device),
        )

    def first(self, n: int) -> "KVCache":
        """The view of the first ``n`` sequences."""
        lazy = (None if t is None else t[:, :n] for t in (self.inputs, self.filled_to))
        return KVCache(self.keys[:, :n], self.values[:, :n], self.lengths[:n], *lazy)

    def layer(self, i: int) -> "LayerKV":
        """The view ``[B, N, T, H]`` of layer ``i``."""
        if self.inputs is None or self.filled_to is None:
            return LayerKV(self.keys[i], self.values[i])
        return LayerKV(self.keys[i], self.values[i], self.inputs[i], self.filled_to[i])

    def prompt(self, num_queries: int) -> "Step":
        """The first ``num_queries`` positions of every sequence, into an empty cache."""
        positions = torch.arange(num_queries, device=self.lengths.device)
        return Step(positions.expand(len(self.lengths), -1))

    def begin(self, lengths: Tensor) -> None:
        """The prompts are in: sequence b has ``lengths[b]`` positions, complete for every head."""
        self.lengths.copy_(lengths)
        self.forget_after_lengths(filled=True)

    def forget_after_lengths(self, *, filled: bool = False) -> None:
        """What lies past ``lengths`` no longer counts as filled (and, if ``filled``, all before it does)."""
        if self.filled_to is not None:
            lengths = self.lengths[None, :, None].expand_as(self.filled_to)
            self.filled_to.copy_(lengths if filled else torch.minimum(self.filled_to, lengths))

    def step(self, num_queries: int, alive: Tensor | None = None) -> "Step":
        """The next ``num_queries`` positions of every sequence, which see all that came before them."""
        positions = self.lengths[:, None]
        if num_queries > 1:
            positions = positions + torch.arange(num_queries, device=self.lengths.device)
        return Step(positions, slots=self.keys.shape[3], alive=alive)


@dataclass(frozen=True)
class Step:
    """Where the queries of one forward pass stand; made once, read by every layer.

    ``positions [B, S]``, of one query a view of the cache's lengths, to be read before they advance;
    ``slots`` of the cache, whose earlier ones the queries see; ``alive [B]``, 0 for finished sequences.
    Without slots the cache is empty and the queries see each other causally: a shorter prompt's padding comes
    after it, so that nothing of it is ever seen.
    """

    positions: Tensor
    slots: int | None = None
    alive: Tensor | None = None

    @cached_property
    def sequences(self) -> Tensor:
        """Their numbers ``[B, 1]``."""
        return torch.arange(len(self.positions), device=self.positions.device)[:, None]

    @cached_property
    def mask(self) -> Tensor | None:
        """``[B, 1, S, T]``, True where a query sees a slot. The kernels do without."""
        if self.slots is None:
            return None
        slots = torch.arange(self.slots, device=self.positions.device)
        return slots <= self.positions[:, None, :, None]


@dataclass(frozen=True, slots=True)
class LayerKV:
    """One layer's keys and values, each ``[B, N, T, H]``; of a lazy cache ``inputs [B, W, D]`` and
    ``filled_to [B, N]`` too."""

    keys: Tensor
    values: Tensor
    inputs: Tensor | None = None
    filled_to: Tensor | None = None

    def write(self, k: Tensor, v: Tensor, step: Step) -> None:
        """Puts ``k`` and ``v [B, S, N, H]`` into the slots of ``step``."""
        if step.slots is None:
            S = k.shape[1]
            self.keys[:, :, :S] = k.transpose(1, 2)
            self.values[:, :, :S] = v.transpose(1, 2)
            return
        self.keys[step.sequences, :, step.positions] = k
        self.values[step.sequences, :, step.positions] = v
        if self.filled_to is not None:
            self.filled_to.copy_((step.positions[:, -1:] + 1).expand_as(self.filled_to))
