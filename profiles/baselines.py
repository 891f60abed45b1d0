"""What `dejavu bench decode` compares with: Hugging Face's OPT, plain and compiled, and DeepSpeed's AutoTP.

All run the same model shape on synthetic weights, made on the device in the wanted type, greedily and without
stopping. Shape legend: B batch, S prompt length, T cache length.
"""

import os
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

import torch
from torch import Tensor, nn

from dejavu.parallel.groups import TPGroup
from dejavu.profiles.timing import Decoded, time_decode
from dejavu.runtime.config import OPTConfig

_WARM_UP, _WARM_UP_COMPILED = 3, 13  # compiling, recording a graph and ten steps more


def measure_hf(
    config: OPTConfig,
    *,
    batch: int,
    prompt_len: int,
    new_tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    compiled: bool = False,
) -> Decoded:
    """Hugging Face's `OPTForCausalLM` with SDPA on one device.

    Args:
        compiled: a static cache, and the decode step through torch.compile with CUDA graphs, which is what
            transformers recommends; otherwise op by op with a dynamic cache.

    Raises:
        ValueError: nothing to measure, more positions than the model has, or less memory than its weights.
    """
    warm_up = _WARM_UP_COMPILED if compiled else _WARM_UP
    length = _positions(config, batch, prompt_len, new_tokens, warm_up)
    model = meta_model(config, dtype)
    _check_memory(model, "hf-compile" if compiled else "hf", 1, device)
    model = fill(model.to_empty(device=device))
    prompt = random_prompt(config, batch, prompt_len, device)
    run = (CompiledDecode if compiled else Decode)(model, prompt, length)
    try:
        return _measure(run, new_tokens, warm_up)
    finally:
        if compiled:
            torch._dynamo.reset()  # its graphs hold the model's memory


def measure_deepspeed(
    config: OPTConfig, *, batch: int, prompt_len: int, new_tokens: int, dtype: torch.dtype, tp: TPGroup
) -> Decoded:
    """DeepSpeed's automatic tensor parallelism of Hugging Face's model; every rank calls this.

    Raises:
        ValueError: DeepSpeed is not installed, or as of `measure_hf`.
    """
    length = _positions(config, batch, prompt_len, new_tokens, _WARM_UP)
    config.check_tp(tp.size)
    model = meta_model(config, dtype)
    _check_memory(model, "deepspeed", tp.size, tp.device)
    engine = split_by_deepspeed(model, dtype, tp)
    prompt = random_prompt(config, batch, prompt_len, tp.device)
    return _measure(Decode(engine, prompt, length), new_tokens, _WARM_UP)


class Decode:
    """Greedy decoding by Hugging Face's forward, op by op: ``tokens [B, 1]`` are the latest."""

    def __init__(self, model: Any, prompt: Tensor, length: int) -> None:
        self.model, self.prompt, self.length = model, prompt, length
        self.tokens = prompt[:, -1:]
        self._positions = torch.arange(length, device=prompt.device).expand(len(prompt), -1)
        self._cache = self._new_cache()

    def prefill(self) -> None:
        """Starts over: the prompt, and the first token after it."""
        self._cache = self._new_cache()
        self._seen = self.prompt.shape[1]
        self.tokens = self._next(self.prompt, self._positions[:, : self._seen])

    def step(self) -> None:
        """The next token of every sequence."""
        positions = self._positions[:, self._seen : self._seen + 1]
        self._seen += 1
        self.tokens = self._next(self.tokens, positions)

    def _new_cache(self) -> Any:
        from transformers import DynamicCache

        return DynamicCache(config=self.model.config)

    def _next(self, ids: Tensor, positions: Tensor, mask: Tensor | None = None) -> Tensor:
        logits: Tensor = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        return logits[:, -1:].argmax(-1)


class CompiledDecode(Decode):
    """The same with a static cache and a compiled step."""

    def __init__(self, model: Any, prompt: Tensor, length: int) -> None:
        super().__init__(model, prompt, length)
        self._step = torch.compile(self._decode, mode="reduce-overhead")

    def prefill(self) -> None:
        self._cache.reset()  # in place: recorded graphs read it where it lies
        self.tokens = self._next(self.prompt, self._positions[:, : self.prompt.shape[1]])

    def step(self) -> None:
        # the graph's next replay overwrites what it returned
        self.tokens = self._step(self.tokens).clone()

    def _new_cache(self) -> Any:
        from transformers import StaticCache

        return StaticCache(config=self.model.config, max_cache_len=self.length)

    def _decode(self, tokens: Tensor) -> Tensor:
        B = len(tokens)
        position = self._cache.get_seq_length()  # a tensor, which the layers advance
        # ready-made: Hugging Face's own mask would ask the host for the length
        visible = (torch.arange(self.length, device=tokens.device) <= position).expand(B, 1, 1, -1)
        return self._next(tokens, position.expand(B, 1), visible)


def hf_config(config: OPTConfig) -> Any:
    """The same architecture as `transformers.OPTConfig`."""
    import transformers

    return transformers.OPTConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        ffn_dim=config.ffn_dim,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        max_position_embeddings=config.max_position_embeddings,
        word_embed_proj_dim=config.word_embed_proj_dim,
        do_layer_norm_before=config.do_layer_norm_before,
        _remove_final_layer_norm=config.do_layer_norm_before and not config.has_final_layer_norm,
        enable_bias=config.enable_bias,
        layer_norm_elementwise_affine=config.layer_norm_elementwise_affine,
        tie_word_embeddings=config.tie_word_embeddings,
        eos_token_id=config.eos_token_id,
    )


def meta_model(config: OPTConfig, dtype: torch.dtype) -> Any:
    """Hugging Face's model without memory for its weights."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf_config(config), dtype=dtype, attn_implementation="sdpa")
    return model.requires_grad_(False).eval()


@torch.no_grad()
def fill(model: Any) -> Any:
    """Random weights, in place. Every rank draws the same, so that what ranks hold twice is equal."""
    if isinstance(model.lm_head, nn.Linear):  # DeepSpeed's is a shard of its own
        model.tie_weights()
    generator = torch.Generator(device=model.device).manual_seed(0)
    for parameter in model.parameters():
        parameter.normal_(0, 0.02, generator=generator)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm) and module.elementwise_affine:
            module.weight.fill_(1)
    return model


def split_by_deepspeed(model: Any, dtype: torch.dtype, tp: TPGroup) -> Any:
    """DeepSpeed's engine of a model without memory: it is split first, so that each rank makes its own shard.

    Raises:
        ValueError: DeepSpeed is not installed.
    """
    os.environ.setdefault("DS_ACCELERATOR", tp.device.type)
    try:
        import deepspeed
    except ImportError:
        raise ValueError("engine deepspeed needs: pip install 'dejavu[baselines]'") from None
    # its shared-memory all-reduce on the CPU needs DeepSpeed's own launcher: gloo does without
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    with redirect_stdout(StringIO()):  # every rank prints its plan
        engine = deepspeed.init_inference(
            model, dtype=dtype, tensor_parallel={"tp_size": tp.size}, replace_with_kernel_inject=False
        )
    fill(engine.module)
    return engine


def random_prompt(config: OPTConfig, batch: int, length: int, device: torch.device) -> Tensor:
    """``[B, S]`` token ids, the same on every rank."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(config.vocab_size, (batch, length), generator=generator).to(device)


@torch.no_grad()
def _measure(run: Decode, new_tokens: int, warm_up: int) -> Decoded:
    B, device = len(run.prompt), run.prompt.device
    return time_decode(run.prefill, run.step, batch=B, new_tokens=new_tokens, device=device, warm_up=warm_up)


def _positions(config: OPTConfig, batch: int, prompt_len: int, new_tokens: int, warm_up: int) -> int:
    """How many a run needs, its warm-up included."""
    if batch < 1 or prompt_len < 1 or new_tokens < 2:
        raise ValueError(
            f"batch={batch}, prompt_len={prompt_len}, new_tokens={new_tokens}: need 1, 1 and 2 at least"
        )
    length = prompt_len + max(new_tokens - 1, warm_up)  # the last token is never read
    if length > config.max_position_embeddings:
        raise ValueError(
            f"prompt_len={prompt_len} with new_tokens={new_tokens} (and {warm_up} steps of warm-up) takes "
            f"{length} positions; the model has max_position_embeddings={config.max_position_embeddings}"
        )
    return length


def _check_memory(model: Any, engine: str, ranks: int, device: torch.device) -> None:
    if device.type != "cuda":
        return
    needed = sum(parameter.nbytes for parameter in model.parameters()) / ranks
    there = torch.cuda.get_device_properties(device).total_memory
    if needed > there:
        raise ValueError(
            f"engine {engine} needs {needed / 2**30:.0f} GiB a GPU for the weights alone, "
            f"this one has {there / 2**30:.0f} GiB"
        )
