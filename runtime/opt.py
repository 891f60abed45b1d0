"""The OPT decoder (arXiv 2205.01068), one rank's share of it.

Shape legend: B batch, S query length, T cache length, D hidden, N local heads, H head dim, V vocabulary.
The residual stream ``[B, S, D]`` is the same on every rank.
"""

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dejavu.kernels.qkv import fill_kv_reference
from dejavu.kernels.residual_norm import layer_norm
from dejavu.kernels.sparse_attention import sparse_attention
from dejavu.kernels.sparse_mlp import sparse_mlp
from dejavu.parallel.collectives import all_reduce, reduce_residual_norm
from dejavu.parallel.groups import TPGroup
from dejavu.parallel.layers import (
    ColumnParallelLinear,
    LayerNorm,
    PositionEmbedding,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
    TensorReader,
    VocabParallelEmbedding,
)
from dejavu.predictors.selection import EVERYTHING, Choice, Chosen, Live, Masked, Selector, Tap
from dejavu.profiles.nvtx import nvtx_range
from dejavu.runtime.cache import WINDOW, KVCache, LayerKV, Step
from dejavu.runtime.config import OPTConfig


class Attention(nn.Module):
    """Multi-head self-attention over this rank's heads."""

    def __init__(self, config: OPTConfig, index: int, *, tp: TPGroup) -> None:
        super().__init__()
        D = config.hidden_size
        self.index = index
        self.fill_name = f"layer.{index}/attention/fill"
        self.qkv_proj = QKVParallelLinear(D, config.num_heads, bias=config.enable_bias, tp=tp)
        self.out_proj = RowParallelLinear(D, D, bias=config.enable_bias, tp=tp)

    def forward(
        self, x: Tensor, kv: LayerKV, step: Step, heads: Choice = None, out: Tensor | None = None
    ) -> Tensor:
        """``x [B, S, D]`` to this rank's share of the output ``[B, S, D]``; appends to ``kv``."""
        if isinstance(heads, Chosen) or (heads is None and step.slots is not None and one_query_on_cuda(x)):
            return self._decode(x, kv, step, heads, out)
        y = self.head_outputs(x, kv, step)
        if heads is not None:
            assert isinstance(heads, Masked)
            y = heads.apply(y)
        partial: Tensor = self.out_proj(y.flatten(-2), out=out)
        return partial

    def head_outputs(self, x: Tensor, kv: LayerKV, step: Step) -> Tensor:
        """``x [B, S, D]`` to the output of every head ``[B, S, N, H]``, before out_proj."""
        if kv.filled_to is not None and step.slots is not None:
            self._complete(kv, step.positions[:, 0] - 1)
        q, k, v = self.qkv_proj(x)
        kv.write(k, v, step)
        if step.slots is None:
            k, v = k.transpose(1, 2), v.transpose(1, 2)
        else:
            k, v = kv.keys, kv.values
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2), k, v, attn_mask=step.mask, is_causal=step.slots is None
        )
        return y.transpose(1, 2)

    def decode_bytes(self) -> int:
        """Bytes of weights that a decode step of all heads reads on this rank."""
        return sum(p.nbytes for p in self.parameters())

    def _decode(self, x: Tensor, kv: LayerKV, step: Step, heads: Chosen | None, out: Tensor | None) -> Tensor:
        """A decode step of the chosen heads (None: of all); what they lack of ``kv`` is filled in first."""
        assert step.slots is not None and x.shape[1] == 1, (
            "heads are chosen when decoding, one query at a time"
        )
        qkv, out_proj = self.qkv_proj.weight, self.out_proj.weight
        heads_of = (qkv.data.shape[0], -1)
        mean = None if heads is None else heads.mean
        y = sparse_attention(
            x[:, 0],
            qkv.data,
            qkv.scale,
            self.qkv_proj.bias,
            kv.keys,
            kv.values,
            step.positions[:, 0],
            out_proj.data.unflatten(0, heads_of),
            None if out_proj.scale is None else out_proj.scale.unflatten(0, heads_of),
            None if heads is None else heads.ids,
            None if heads is None else heads.count,
            inputs=kv.inputs,
            filled_to=kv.filled_to,
            layer=self.index,
            mean=None if mean is None else mean.output,
            base=None if mean is None else mean.projected,
            out=None if out is None else out[:, 0],
        )
        return y[:, None]

    def _complete(self, kv: LayerKV, positions: Tensor) -> None:
        """Fills in what any head lacks up to ``positions``."""
        assert kv.inputs is not None and kv.filled_to is not None
        every = Chosen.from_mask(torch.ones_like(kv.filled_to, dtype=torch.bool))
        weight, bias = self.qkv_proj.weight, self.qkv_proj.bias
        with nvtx_range(self.fill_name, "kv"):
            fill_kv_reference(
                None,
                kv.inputs,
                weight.data,
                weight.scale,
                bias,
                kv.keys,
                kv.values,
                kv.filled_to,
                positions,
                every.ids,
                every.count,
                self.index,
            )


class MLP(nn.Module):
    """fc1, ReLU, fc2 over this rank's neurons."""

    def __init__(self, config: OPTConfig, *, tp: TPGroup) -> None:
        super().__init__()
        D, ffn_dim, bias = config.hidden_size, config.ffn_dim, config.enable_bias
        self.fc1 = ColumnParallelLinear(D, ffn_dim, bias=bias, tp=tp)
        self.fc2 = RowParallelLinear(ffn_dim, D, bias=bias, tp=tp)

    def forward(self, x: Tensor, neurons: Choice = None, out: Tensor | None = None) -> Tensor:
        """``x [B, S, D]`` to this rank's share of the output ``[B, S, D]``."""
        fc1, fc2 = self.fc1, self.fc2
        by_kernels = neurons is None and one_query_on_cuda(x) and len(x) == 1
        if by_kernels or isinstance(neurons, Chosen | Live):
            ids, count = (neurons.ids, neurons.count) if isinstance(neurons, Chosen) else (None, None)
            tally, alive = neurons if isinstance(neurons, Live) else (None, None)
            weights = (fc1.weight.data, fc1.weight.scale, fc1.bias, fc2.weight.data, fc2.weight.scale)
            return sparse_mlp(x, *weights, ids, count, out, tally, alive)
        hidden = self.hidden(x)
        if neurons is not None:
            assert isinstance(neurons, Masked)
            hidden = neurons.apply(hidden)
        partial: Tensor = fc2(hidden, out=out)
        return partial

    def hidden(self, x: Tensor) -> Tensor:
        """``x [B, S, D]`` to the activation of every neuron ``[B, S, F]``."""
        return F.relu(self.fc1(x))

    def decode_bytes(self) -> int:
        """Bytes of weights that a decode step of all neurons reads on this rank."""
        return sum(p.nbytes for p in self.parameters())


class DecoderLayer(nn.Module):
    """Attention and MLP, each ended by the block boundary that also prepares the next block's input."""

    def __init__(self, config: OPTConfig, index: int, *, tp: TPGroup) -> None:
        super().__init__()
        self.name = f"layer.{index}"
        self.attention_name, self.mlp_name = f"{self.name}/attention", f"{self.name}/mlp"
        self.index = index
        self.attn_in, self.mlp_in = Tap("attn_in", index), Tap("mlp_in", index)
        self.tp = tp
        self.pre_norm = config.do_layer_norm_before
        self.self_attn = Attention(config, index, tp=tp)
        self.self_attn_layer_norm = _layer_norm(config)
        self.mlp = MLP(config, tp=tp)
        self.final_layer_norm = _layer_norm(config)

    def forward(
        self,
        residual: Tensor,
        x: Tensor,
        kv: LayerKV,
        step: Step,
        next_norm: LayerNorm | None,
        selector: Selector,
    ) -> tuple[Tensor, Tensor]:
        """``residual`` and ``x [B, S, D]``, what attention reads of it, to the same two of the next layer."""
        mlp_norm = self.final_layer_norm if self.pre_norm else self.self_attn_layer_norm
        out = self.tp.buffer(x.shape, x.dtype)
        with nvtx_range(self.attention_name):
            selector.observe(self.attn_in, residual)
            heads = selector.heads(self.index, lambda: self.self_attn.head_outputs(x, kv, step))
            partial = self.self_attn(x, kv, step, heads, out)
            selector.before_collective()
            residual, mlp_x = self.boundary(partial, residual, self.self_attn.out_proj.bias, mlp_norm)
        with nvtx_range(self.mlp_name):
            selector.observe(self.mlp_in, residual)
            neurons = selector.neurons(self.index, lambda: self.mlp.hidden(mlp_x))
            partial = self.mlp(mlp_x, neurons, out)
            selector.before_collective()
            return self.boundary(partial, residual, self.mlp.fc2.bias, next_norm)

    def boundary(
        self, partial: Tensor, residual: Tensor, bias: Tensor | None, norm: LayerNorm | None
    ) -> tuple[Tensor, Tensor]:
        residual, x = reduce_residual_norm(partial, residual, bias, norm, tp=self.tp)
        return (residual if self.pre_norm else x), x  # post-norm: the stream itself is normed

    def load(self, reader: TensorReader, name: str) -> None:
        self.self_attn.qkv_proj.load(reader, f"{name}.self_attn")
        self.self_attn.out_proj.load(reader, f"{name}.self_attn.out_proj")
        self.self_attn_layer_norm.load(reader, f"{name}.self_attn_layer_norm")
        self.mlp.fc1.load(reader, f"{name}.fc1")
        self.mlp.fc2.load(reader, f"{name}.fc2")
        self.final_layer_norm.load(reader, f"{name}.final_layer_norm")


class OPTModel(nn.Module):
    """Embedding, a range of the decoder layers, and the head; one rank's slices of each.

    The first stage of a pipeline is the one whose ``layers`` begin at 0, the last the one whose end at
    ``num_layers``; what a stage does not need it does not hold.

    Raises:
        ValueError: the model cannot be cut into ``tp.shares``.
    """

    def __init__(
        self, config: OPTConfig, *, tp: TPGroup, dtype: torch.dtype, layers: range | None = None
    ) -> None:
        super().__init__()
        config.check_tp(tp.shares)
        self.config = config
        self.tp = tp
        self.dtype = dtype
        self.layer_range = range(config.num_layers) if layers is None else layers
        assert self.layer_range, "a stage has at least one layer"
        self.is_first = self.layer_range.start == 0
        self.is_last = self.layer_range.stop == config.num_layers
        D, E, V = config.hidden_size, config.word_embed_proj_dim, config.vocab_size
        tied = config.tie_word_embeddings

        needs_table = self.is_first or (self.is_last and tied)
        self.embed_tokens = VocabParallelEmbedding(V, E, tp=tp) if needs_table else None
        self.embed_positions = PositionEmbedding(config.max_position_embeddings, D) if self.is_first else None
        self.project_in = ReplicatedLinear(E, D) if self.is_first and E != D else None
        self.layers: Sequence[DecoderLayer] = nn.ModuleList(  # type: ignore[assignment]
            DecoderLayer(config, i, tp=tp) for i in self.layer_range
        )
        self.final_layer_norm = _layer_norm(config) if self.is_last and config.has_final_layer_norm else None
        self.project_out = ReplicatedLinear(D, E) if self.is_last and E != D else None
        self.lm_head = VocabParallelEmbedding(V, E, tp=tp) if self.is_last and not tied else None
        self.to(dtype).requires_grad_(False)

    def embed(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        """Token ids and positions ``[B, S]`` to the residual stream ``[B, S, D]``."""
        assert self.embed_tokens is not None and self.embed_positions is not None
        with nvtx_range("embed"):
            partial, stream = self.embed_tokens(token_ids), self.embed_positions(positions)
            if self.project_in is not None:
                hidden: Tensor = self.project_in(all_reduce(partial, self.tp)) + stream
                return hidden
            return reduce_residual_norm(partial, stream, None, None, tp=self.tp)[0]

    def forward(
        self,
        residual: Tensor,
        cache: KVCache,
        step: Step,
        selector: Selector = EVERYTHING,
        taps: Iterable[tuple[Tap, Tensor]] = (),
    ) -> Tensor:
        """The residual stream ``[B, S, D]`` through this stage's layers; the last stage gives it normed.

        ``cache`` holds this stage's layers only; ``selector`` is asked by their numbers in the whole model,
        and sees the ``taps`` that earlier stages have passed.
        """
        pre_norm = self.config.do_layer_norm_before
        x = layer_norm(residual, self.layers[0].self_attn_layer_norm) if pre_norm else residual
        selector.begin(step.positions, step.alive)
        for tap, stream in taps:
            selector.observe(tap, stream)
        for i, layer in enumerate(self.layers):
            with nvtx_range(layer.name):
                residual, x = layer(residual, x, cache.layer(i), step, self._norm_after(i), selector)
        return x

    def logits(self, x: Tensor) -> Tensor:
        """The last stage's output ``[B, D]`` to logits ``[B, V]`` in fp32, the same on every rank."""
        head = self.lm_head if self.lm_head is not None else self.embed_tokens
        assert head is not None
        with nvtx_range("head"):
            if self.project_out is not None:
                x = self.project_out(x)
            return head.logits(x).float()

    def load(self, reader: TensorReader) -> None:
        """Reads this rank's slices of every tensor, one at a time."""
        for name in ("embed_tokens", "embed_positions", "project_in", "project_out", "final_layer_norm"):
            module = getattr(self, name)
            if module is not None:
                module.load(reader, f"model.decoder.{name}")
        for i, layer in zip(self.layer_range, self.layers, strict=True):
            layer.load(reader, f"model.decoder.layers.{i}")
        if self.lm_head is not None:
            self.lm_head.load(reader, "lm_head")

    def empty_cache(self, batch: int, length: int, *, lazy: bool = False) -> KVCache:
        """A cache for ``batch`` sequences of at most ``length`` tokens in this stage's layers; ``lazy``:
        one that may leave out the keys and values of heads that are not chosen."""
        config = self.config
        shape = (len(self.layers), batch, self.tp.divide(config.num_heads), length, config.head_dim)
        ring = (WINDOW, config.hidden_size) if lazy else None
        return KVCache.empty(shape, self.dtype, self.tp.device, ring)

    def decode_bytes(self) -> int:
        """Bytes of weights that one decode step reads on this rank: all but the tables it only looks up."""
        is_head = self.is_last and self.lm_head is None
        lookups = {id(self.embed_positions)} | (set() if is_head else {id(self.embed_tokens)})
        read = (p for child in self.children() if id(child) not in lookups for p in child.parameters())
        return sum(p.nbytes for p in read)

    def _norm_after(self, i: int) -> LayerNorm | None:
        """The norm between layer ``i``'s MLP and whatever reads its output."""
        if not self.config.do_layer_norm_before:
            return self.layers[i].final_layer_norm
        if i + 1 < len(self.layers):
            return self.layers[i + 1].self_attn_layer_norm
        return self.final_layer_norm


def one_query_on_cuda(x: Tensor) -> bool:
    """Whether ``x [B, S, D]`` is a decode step on a GPU: then all heads go by the kernels too, and of one
    sequence all neurons; for more sequences cuBLAS multiplies as well."""
    return x.is_cuda and x.shape[1] == 1


def _layer_norm(config: OPTConfig) -> LayerNorm:
    return LayerNorm(config.hidden_size, elementwise_affine=config.layer_norm_elementwise_affine)
