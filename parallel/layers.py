"""Layers that know how to shard themselves over a `TPGroup` and how to load their own slices.

Weights lie as the kernels read them, in one copy: a head's or a neuron's numbers are one contiguous stretch.
Every layer is built from its global sizes; what a rank holds has ``local`` in its name.

Shape legend: B batch, S query length, D hidden, N local heads, H head dim, V vocabulary.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dejavu.kernels.tokens import embed_rows
from dejavu.parallel.collectives import all_gather_last
from dejavu.parallel.groups import TPGroup


class TensorReader(Protocol):
    """Reads slices of a checkpoint's tensors."""

    def read(self, name: str, shape: tuple[int, ...], *index: slice) -> Tensor:
        """The part ``[index]`` of the tensor ``name``, which must have the global ``shape``."""


class Weight(nn.Module):
    """A (data, scale) pair; ``scale`` broadcasts over ``data`` and is None for 16- and 32-bit weights."""

    scale: Tensor | None

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.data = nn.Parameter(torch.empty(shape), requires_grad=False)
        self.register_parameter("scale", None)

    @property
    def value(self) -> Tensor:
        """The numbers that the pair stands for."""
        return self.data if self.scale is None else self.data.to(self.scale.dtype) * self.scale

    def load(self, reader: TensorReader, name: str) -> None:
        """Reads a weight that every rank holds whole, in the checkpoint's own layout."""
        self.data.copy_(reader.read(name, tuple(self.data.shape)))


class LayerNorm(nn.LayerNorm):
    """LayerNorm, replicated on every rank."""

    def load(self, reader: TensorReader, name: str) -> None:
        """Reads the gain and the bias, where the norm has them."""
        if self.elementwise_affine:
            shape = tuple(self.weight.shape)
            self.weight.copy_(reader.read(f"{name}.weight", shape))
            self.bias.copy_(reader.read(f"{name}.bias", shape))


class PositionEmbedding(nn.Module):
    """OPT's learned positions, replicated. Row ``p + 2`` is position ``p``: the first two rows are unused."""

    OFFSET = 2

    def __init__(self, max_positions: int, dim: int) -> None:
        super().__init__()
        self.weight = Weight(max_positions + self.OFFSET, dim)

    def forward(self, positions: Tensor) -> Tensor:
        """``positions [B, S]`` to ``[B, S, D]``."""
        return F.embedding(positions, self.weight.value[self.OFFSET :])

    def load(self, reader: TensorReader, name: str) -> None:
        """Reads the whole table."""
        self.weight.load(reader, f"{name}.weight")


class ReplicatedLinear(nn.Module):
    """A linear layer without bias that every rank computes in full (opt-350m's projections)."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = Weight(out_features, in_features)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``."""
        return F.linear(x, self.weight.value)

    def load(self, reader: TensorReader, name: str) -> None:
        """Reads the whole matrix."""
        self.weight.load(reader, f"{name}.weight")


class ColumnParallelLinear(nn.Module):
    """Splits the output features: weight ``[out_local, in]``, one contiguous row a neuron."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool, tp: TPGroup) -> None:
        super().__init__()
        self.shape = (out_features, in_features)
        self.rows = tp.shard(out_features)
        self.weight = Weight(tp.divide(out_features), in_features)
        self.bias = _bias(tp.divide(out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., in]``, the same on every rank, to this rank's ``[..., out_local]``."""
        return F.linear(x, self.weight.value, self.bias)

    def load(self, reader: TensorReader, name: str) -> None:
        """Reads this rank's rows."""
        self.weight.data.copy_(reader.read(f"{name}.weight", self.shape, self.rows))
        if self.bias is not None:
            self.bias.copy_(reader.read(f"{name}.bias", self.shape[:1], self.rows))


class RowParallelLinear(nn.Module):
    """Splits the input features: weight ``[in_local, out]``, one contiguous row a neuron or head channel.

    `forward` gives a partial sum. Whoever reduces it adds ``bias`` once: see `reduce_residual_norm`.
    """

    def __init__(self, in_features: int, out_features: int, *, bias: bool, tp: TPGroup) -> None:
        super().__init__()
        self.shape = (out_features, in_features)
        self.columns = tp.shard(in_features)
        self.weight = Weight(tp.divide(in_features), out_features)
        self.bias = _bias(out_features) if bias else None

    def forward(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """This rank's ``x [..., in_local]`` to its share ``[..., out]`` of the sum, in ``out`` if given."""
        return torch.matmul(x, self.weight.value, out=out)

    def load(self, reader: TensorReader, name: str) -> None:
        """Reads this rank's columns, and the whole bias."""
        columns = reader.read(f"{name}.weight", self.shape, slice(None), self.columns)
        # to the device first: it transposes many times faster than the host
        self.weight.data.copy_(columns.to(self.weight.data.device).T)
        if self.bias is not None:
            self.bias.copy_(reader.read(f"{name}.bias", self.shape[:1]))


class QKVParallelLinear(nn.Module):
    """The attention projections, split by heads: weight ``[N, 3, H, D]``, a head's Q, K and V together."""

    def __init__(self, hidden_size: int, num_heads: int, *, bias: bool, tp: TPGroup) -> None:
        super().__init__()
        self.rows = tp.shard(hidden_size)
        local = (tp.divide(num_heads), 3, hidden_size // num_heads)
        self.weight = Weight(*local, hidden_size)
        self.bias = _bias(*local) if bias else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``x [B, S, D]`` to this rank's queries, keys and values, each ``[B, S, N, H]``."""
        weight = self.weight.value
        bias = None if self.bias is None else self.bias.flatten()
        q, k, v = F.linear(x, weight.flatten(0, 2), bias).unflatten(-1, weight.shape[:3]).unbind(-2)
        return q, k, v

    def load(self, reader: TensorReader, name: str) -> None:
        """Reads this rank's heads of ``{name}.q_proj``, ``k_proj`` and ``v_proj``."""
        num_local_heads, _, head_dim, D = self.weight.data.shape
        for i, part in enumerate(("q_proj", "k_proj", "v_proj")):
            rows = reader.read(f"{name}.{part}.weight", (D, D), self.rows)
            self.weight.data[:, i].copy_(rows.view(num_local_heads, head_dim, D))
            if self.bias is not None:
                bias = reader.read(f"{name}.{part}.bias", (D,), self.rows)
                self.bias[:, i].copy_(bias.view(num_local_heads, head_dim))


class VocabParallelEmbedding(nn.Module):
    """A table split by tokens, read both ways: rows for token ids, and logits (the head, tied or not).

    A vocabulary that the ranks do not divide is padded with rows of zeros, whose logits are cut off.
    """

    def __init__(self, vocab_size: int, dim: int, *, tp: TPGroup) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.tp = tp
        self.rows = tp.shard(vocab_size)
        self.weight = Weight(-(-vocab_size // tp.shares), dim)

    def forward(self, token_ids: Tensor) -> Tensor:
        """``token_ids [B, S]`` to ``[B, S, dim]``: the rows that this rank holds, zeros for those of others;
        summed over the ranks, the embedding. A payload, good until the next."""
        table = self.weight.value
        payload = self.tp.buffer((*token_ids.shape, table.shape[1]), table.dtype)
        return embed_rows(token_ids, table, self.rows.start, payload)

    def logits(self, x: Tensor) -> Tensor:
        """``x [..., dim]`` to all tokens' logits ``[..., V]``, the same on every rank; one all-gather."""
        return all_gather_last(F.linear(x, self.weight.value), self.tp)[..., : self.vocab_size]

    def load(self, reader: TensorReader, name: str) -> None:
        """Reads this rank's rows."""
        shape = (self.vocab_size, self.weight.data.shape[1])
        count = self.rows.stop - self.rows.start
        self.weight.data[:count].copy_(reader.read(f"{name}.weight", shape, self.rows))
        self.weight.data[count:].zero_()


def _bias(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape), requires_grad=False)
