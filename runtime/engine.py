"""Answers requests: loads a model, prefills a batch of prompts, decodes until every one is finished."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from dejavu.parallel.collectives import all_reduce
from dejavu.parallel.groups import TPGroup, init_tp, pick_device
from dejavu.predictors.selection import EVERYTHING, KINDS, Kind, Policy, Selector
from dejavu.profiles.nvtx import nvtx_range
from dejavu.runtime.cache import KVCache
from dejavu.runtime.config import parse_dtype
from dejavu.runtime.loading import OnLoad, load_model
from dejavu.runtime.opt import OPTModel
from dejavu.runtime.request import Request, Result
from dejavu.runtime.sampling import NO_TOKEN, Sampler, SamplingParams
from dejavu.runtime.sparsity import DENSE, load_policy
from dejavu.runtime.text import TextStream
from dejavu.runtime.weights import find_model

OnText = Callable[[int, str], None]
FillKV = Literal["lazy", "always"]


@dataclass(frozen=True, slots=True)
class Generation:
    """The answers in the prompts' order, and what they cost.

    Times are the host's, from token to token as a user sees them. ``ttft_ms`` is the prefill up to the first
    token, the mean over batches; ``ms_per_token`` (mean, p50, p99) is a decode step of the whole batch, None
    if there was none. ``tokens_per_s`` counts the new tokens of all sequences over the whole time.
    ``weight_bytes`` is what one rank reads of the weights in a step (predictors included; heads as if each
    sequence were alone and keys and values lazy), ``gb_per_s`` that over the mean step. ``density`` is the
    share of neurons and heads computed, the mean over decode steps, layers and ranks; ``drift`` what
    re-checking found, None if nothing was re-checked.
    """

    results: list[Result]
    ttft_ms: float
    ms_per_token: dict[str, float] | None
    tokens_per_s: float
    weight_bytes: int
    gb_per_s: float | None
    density: dict[str, float]
    policy: str
    drift: dict[str, float] | None
    tp: int
    dtype: str
    device: str


@dataclass(slots=True)
class Drift:
    """How far sparse steps were from the dense step of the same token and cache."""

    checks: int = 0
    tokens: Tensor | float = 0.0
    kl: Tensor | float = 0.0
    agree: Tensor | float = 0.0

    def add(self, sparse: Tensor, dense: Tensor, alive: Tensor) -> None:
        """Logits ``[B, V]`` of both, ``alive [B]``."""
        p, q = dense.log_softmax(-1), sparse.log_softmax(-1)
        self.checks += 1
        self.tokens = self.tokens + alive.sum()
        self.kl = self.kl + ((p.exp() * (p - q)).sum(-1) * alive).sum()
        self.agree = self.agree + ((sparse.argmax(-1) == dense.argmax(-1)) * alive).sum()

    def report(self) -> dict[str, float] | None:
        """The mean over the tokens checked: KL(dense || sparse) in nats, share of equal top tokens."""
        if not self.checks:
            return None
        tokens = max(float(self.tokens), 1.0)
        return {
            "checks": self.checks,
            "kl": float(self.kl) / tokens,
            "top1_agreement": float(self.agree) / tokens,
        }


@dataclass(frozen=True, slots=True)
class DecodeState:
    """All that one decode step reads and writes, on the device: ``tokens [B]``, the newest of each sequence,
    and ``alive [B]``, 1 until a sequence is finished."""

    tokens: Tensor
    alive: Tensor
    cache: KVCache
    sampler: Sampler


class Engine:
    """One rank's engine; every rank calls the same methods with the same arguments.

    Args:
        model: the rank's share of the network, loaded.
        tokenizer: the Hugging Face tokenizer that belongs to it.
        tp: the group that shares the model.
        fingerprint: of the model, by which predictors know it.
        policy: what decode steps compute; None: everything. Prefill is always dense.
        fill_kv: ``lazy``: keys and values of a head are computed when it is next chosen; ``always``: those
            of all heads at every step.
    """

    def __init__(
        self,
        model: OPTModel,
        tokenizer: Any,
        tp: TPGroup,
        fingerprint: str,
        policy: Policy | None = None,
        fill_kv: FillKV = "lazy",
        name: str = "",
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.tp = tp
        self.fingerprint = fingerprint
        self.policy = policy
        if fill_kv not in get_args(FillKV):
            raise ValueError(f"fill_kv={fill_kv!r} is unknown: use {' or '.join(get_args(FillKV))}")
        self.fill_kv: FillKV = fill_kv
        self.name = name
        self.dtype = str(model.dtype).removeprefix("torch.")

    @classmethod
    def from_pretrained(
        cls,
        model: str,
        *,
        tp: TPGroup | None = None,
        dtype: str = "auto",
        device: str = "auto",
        sparsity: str = DENSE,
        density: float | None = None,
        fill_kv: FillKV = "lazy",
        on_load: OnLoad | None = None,
    ) -> "Engine":
        """Loads this rank's slices of a model.

        Args:
            model: ``demo``, a Hugging Face directory, or a hub id.
            tp: the group to share the model with; by default the ranks that torchrun started.
            dtype: ``fp16``, ``bf16``, ``fp32``; ``auto`` is the checkpoint's on CUDA and fp32 on the CPU.
            device: ``auto``, ``cpu`` or ``cuda``; goes unused if ``tp`` is given.
            sparsity, density: see `load_policy`.
            fill_kv: see `Engine`.
            on_load: called with (bytes that have come in, bytes of this rank's share), in ``dtype``.

        Raises:
            ValueError: no such model, a damaged one, or one that these ranks cannot share; likewise of
                predictors.
        """
        wanted = None if dtype == "auto" else parse_dtype(dtype)
        if tp is None:
            tp = init_tp(pick_device(device))
        network, tokenizer, fingerprint = tp.agree(partial(load_model, model, tp, wanted, on_load))
        policy = tp.agree(lambda: load_policy(sparsity, network, fingerprint, density=density))
        return cls(network, tokenizer, tp, fingerprint, policy, fill_kv, find_model(model).name)

    def generate(
        self,
        prompts: Sequence[str],
        params: SamplingParams | Sequence[SamplingParams] = SamplingParams(),  # noqa: B008  (frozen)
        *,
        max_batch: int = 16,
        verify_every: int = 0,
        on_text: OnText | None = None,
    ) -> Generation:
        """Continues every prompt.

        Args:
            prompts: any number, of any lengths; run in batches of at most ``max_batch``.
            params: one for each prompt, or one for all; then prompt ``i`` draws with ``seed + i``, so that
                the same prompt twice gives two samples.
            verify_every: every so many steps the dense step is computed too, and `Generation.drift` says how
                far the sparse one was; 0: never.
            on_text: called with (prompt's index, new text) as soon as text is certain.

        Raises:
            ValueError: an empty prompt, one too long for the model's positions, no prompts; logits that are
                no finite numbers.
        """
        requests = self._requests(prompts, params)
        if max_batch < 1:
            raise ValueError(f"max_batch={max_batch} is less than 1")
        if verify_every < 0 or (verify_every and self.policy is None):
            raise ValueError(
                f"verify_every={verify_every}: expected 0 or more, and a sparse policy to verify"
            )
        ttft: list[float] = []
        steps: list[float] = []
        drift = Drift()
        for start in range(0, len(requests), max_batch):
            batch = requests[start : start + max_batch]
            self._run(batch, ttft, steps, on_text, verify_every, drift)
        return self._generation(requests, ttft, steps, drift)

    @torch.inference_mode()
    def prefill(self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]) -> DecodeState:
        """Runs the prompts' token ids through the model and samples the first token of each."""
        device = self.tp.device
        lengths = torch.tensor([len(ids) for ids in prompts])
        capacity = max(len(ids) + p.max_new_tokens for ids, p in zip(prompts, params, strict=True))
        padded = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.int64)
        for row, ids in zip(padded, prompts, strict=True):
            row[: len(ids)] = torch.tensor(ids)
        token_ids, lengths = padded.to(device), lengths.to(device)
        lazy = self.fill_kv == "lazy" and self.policy is not None and self.policy.chooses("heads")
        cache = self.model.empty_cache(len(prompts), capacity, lazy=lazy)
        sampler = Sampler.create(params, device)
        with nvtx_range("prefill"):
            step = cache.prompt(token_ids.shape[1])
            x = self.model(self.model.embed(token_ids, step.positions), cache, step)
            last = x[torch.arange(len(prompts), device=device), lengths - 1]
            cache.begin(lengths)
            tokens = self._draw(self.model.logits(last), sampler)
        return DecodeState(tokens=tokens, alive=torch.ones_like(tokens), cache=cache, sampler=sampler)

    @torch.inference_mode()
    def decode_step(self, state: DecodeState) -> Tensor:
        """One more token for every sequence, in place; device tensors only. Returns the logits ``[B, V]``.

        A finished sequence does not advance: what it computes is overwritten by what it computes next.
        """
        with nvtx_range("decode"):
            logits = self._step(state, self.policy or EVERYTHING)
            state.cache.lengths.add_(state.alive)
            state.tokens.copy_(self._draw(logits, state.sampler))
        return logits

    @torch.inference_mode()
    def dense_step(self, state: DecodeState) -> Tensor:
        """The logits ``[B, V]`` that the next `decode_step` would have if it were dense; changes nothing."""
        with nvtx_range("verify"):
            logits = self._step(state, EVERYTHING)
            state.cache.forget_after_lengths()
        return logits

    def _step(self, state: DecodeState, selector: Selector) -> Tensor:
        step = state.cache.step(1, state.alive)
        x = self.model(self.model.embed(state.tokens[:, None], step.positions), state.cache, step, selector)
        return self.model.logits(x[:, -1])

    def _draw(self, logits: Tensor, sampler: Sampler) -> Tensor:
        """Logits ``[B, V]`` to the next tokens ``[B]``."""
        with nvtx_range("sample"):
            return sampler(logits)

    def _requests(
        self, prompts: Sequence[str], params: SamplingParams | Sequence[SamplingParams]
    ) -> list[Request]:
        if isinstance(prompts, str):
            raise ValueError("prompts is a string, expected a list of strings")
        if not prompts:
            raise ValueError("there are no prompts")
        if isinstance(params, SamplingParams):
            params = [replace(params, seed=(params.seed + i) % 2**63) for i in range(len(prompts))]
        if len(params) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts, but {len(params)} sampling parameters")
        return [
            Request(i, prompt, self.tokenize(prompt, p), p, TextStream(self.tokenizer, p.stop))
            for i, (prompt, p) in enumerate(zip(prompts, params, strict=True))
        ]

    def tokenize(self, prompt: str, params: SamplingParams) -> list[int]:
        """The token ids of a prompt that fits the model together with the tokens to come.

        Raises:
            ValueError: it is empty or does not fit.
        """
        if not isinstance(prompt, str):
            raise ValueError(f"the prompt is no string but a {type(prompt).__name__}")
        try:
            prompt.encode()
        except UnicodeEncodeError as e:
            raise ValueError(f"the prompt is not valid Unicode: {e.reason} at character {e.start}") from None
        ids: list[int] = self.tokenizer(prompt, verbose=False).input_ids if prompt else []
        if not ids:
            raise ValueError("the prompt is empty")
        config = self.model.config
        if len(ids) + params.max_new_tokens > config.max_position_embeddings:
            raise ValueError(
                f"a prompt of {len(ids)} tokens and max_new_tokens={params.max_new_tokens} do not fit the "
                f"model's {config.max_position_embeddings} positions"
            )
        if max(ids) >= config.vocab_size:
            raise ValueError(
                f"the tokenizer gives token {max(ids)}, but the model's vocab_size is {config.vocab_size}"
            )
        return ids

    @torch.inference_mode()
    def _run(
        self,
        batch: Sequence[Request],
        ttft: list[float],
        steps: list[float],
        on_text: OnText | None,
        verify_every: int,
        drift: Drift,
    ) -> None:
        """Prefills and decodes one batch to its last sequence's end; appends ms to ``ttft`` and ``steps``."""
        clock = time.perf_counter()
        state = self.prefill([r.prompt_ids for r in batch], [r.params for r in batch])
        times = ttft
        while True:
            tokens = state.tokens.tolist()  # the one wait of a step
            if NO_TOKEN in tokens:
                raise ValueError(
                    f"the logits are no finite numbers: damaged weights, or too large for {self.dtype}"
                )
            now = time.perf_counter()
            times.append(1e3 * (now - clock))
            clock, times = now, steps  # what the host does with a token is part of the next one's time
            for i, (request, token) in enumerate(zip(batch, tokens, strict=True)):
                if request.finish_reason is None:
                    text = request.push(token, self.model.config.eos_token_id)
                    if on_text is not None and text:
                        on_text(request.index, text)
                    if request.finish_reason is not None:
                        state.alive[i] = 0
            if all(request.finish_reason is not None for request in batch):
                return
            if verify_every and len(steps) % verify_every == 0:
                dense = self.dense_step(state)
                drift.add(self.decode_step(state), dense, state.alive)
            else:
                self.decode_step(state)

    def _generation(
        self, requests: Sequence[Request], ttft: list[float], steps: list[float], drift: Drift
    ) -> Generation:
        mean = float(np.mean(steps)) if steps else None
        density = self._density()
        weight_bytes = self._weight_bytes(density)
        device = self.tp.device
        return Generation(
            results=[request.result() for request in requests],
            ttft_ms=float(np.mean(ttft)),
            ms_per_token=None
            if mean is None
            else {
                "mean": mean,
                "p50": float(np.percentile(steps, 50)),
                "p99": float(np.percentile(steps, 99)),
            },
            tokens_per_s=1e3 * sum(len(r.token_ids) for r in requests) / (sum(ttft) + sum(steps)),
            weight_bytes=weight_bytes,
            gb_per_s=None if mean is None else weight_bytes / mean / 1e6,
            density=density,
            policy=DENSE if self.policy is None else self.policy.name,
            drift=drift.report(),
            tp=self.tp.size,
            dtype=self.dtype,
            device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        )

    def mean_density(self, policy: Policy, kind: Kind) -> float:
        """What a policy has chosen since it was last asked, the mean over tokens, layers and ranks."""
        local = policy.density(kind).to(self.tp.device)
        return float(all_reduce(local, self.tp)) / self.tp.size

    def _density(self) -> dict[str, float]:
        if self.policy is None:
            return {"mlp": 1.0, "heads": 1.0}
        return {kind: self.mean_density(self.policy, kind) for kind in KINDS}

    def _weight_bytes(self, density: dict[str, float]) -> int:
        """Bytes of weights that a decode step reads on this rank, with those of choosing."""
        if self.policy is None:
            return self.model.decode_bytes()
        attention = sum(layer.self_attn.decode_bytes() for layer in self.model.layers)
        mlp = sum(layer.mlp.decode_bytes() for layer in self.model.layers)
        skipped = attention * (1 - density["heads"]) + mlp * (1 - density["mlp"])
        truth = sum(
            self.model.layers[layer].mlp.fc1.weight.data.nbytes
            for (kind, layer), unit in self.policy.units.items()
            if unit.sees_truth and kind == "mlp"
        )
        return int(self.model.decode_bytes() - skipped + self.policy.read_bytes() + truth)
