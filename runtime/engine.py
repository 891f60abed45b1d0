"""Answers requests: loads a model, prefills a batch of prompts, decodes until every one is finished."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dejavu.kernels.tokens import NO_TOKEN
from dejavu.parallel.groups import TPGroup, init_tp, pick_device
from dejavu.parallel.pipeline import Pipeline, init_pipeline
from dejavu.parallel.routes import reserve
from dejavu.predictors.selection import Overlap, Policy
from dejavu.runtime.config import parse_dtype
from dejavu.runtime.decoding import Decoder, FillKV
from dejavu.runtime.graphs import MAX_BATCH, TokenMail
from dejavu.runtime.loading import OnLoad, load_model
from dejavu.runtime.opt import OPTModel
from dejavu.runtime.request import Request, Result
from dejavu.runtime.sampling import SamplingParams
from dejavu.runtime.sparsity import DENSE, load_policy
from dejavu.runtime.text import TextStream
from dejavu.runtime.weights import find_model

OnText = Callable[[int, str], None]
ShallStop = Callable[[], bool]


@dataclass(frozen=True, slots=True)
class Generation:
    """The answers in the prompts' order, and what they cost.

    Times are the host's, from token to token as a user sees them. ``ttft_ms`` is the prefill up to the first
    token, the mean over batches; ``ms_per_token`` (mean, p50, p99) is a decode step of the whole batch, None
    if there was none. ``tokens_per_s`` counts the new tokens of all sequences over the whole time.
    ``weight_bytes`` is what one rank reads of the weights in a step (predictors included; heads as if each
    sequence were alone and keys and values lazy; the sum over the stages of a pipeline, which work one after
    the other), ``gb_per_s`` that over the mean step. ``density`` is the share of neurons and heads computed,
    the mean over decode steps, layers and ranks; ``drift`` what re-checking found, None if nothing was
    re-checked. ``pp`` stages of ``tp`` ranks each. ``preempted``: some texts ended because they were told.
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
    pp: int
    tp: int
    dtype: str
    device: str
    preempted: bool


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


class Engine(Decoder):
    """Answers requests by decoding; every rank calls the same methods with the same arguments.

    Args:
        tokenizer: the Hugging Face tokenizer that belongs to the model.
        fingerprint: of the model, by which predictors know it.
        name: of the model, for reports.
        model, tp, policy, fill_kv, cuda_graph, overlap, pipeline: see `Decoder`.
    """

    def __init__(
        self,
        model: OPTModel,
        tokenizer: Any,
        tp: TPGroup,
        fingerprint: str,
        policy: Policy | None = None,
        fill_kv: FillKV = "auto",
        name: str = "",
        *,
        cuda_graph: bool = True,
        overlap: Overlap = "auto",
        pipeline: Pipeline | None = None,
    ) -> None:
        super().__init__(
            model, tp, policy, fill_kv, cuda_graph=cuda_graph, overlap=overlap, pipeline=pipeline
        )
        self.tokenizer = tokenizer
        self.fingerprint = fingerprint
        self.name = name
        self.dtype = str(model.dtype).removeprefix("torch.")

    @classmethod
    def from_pretrained(
        cls,
        model: str,
        *,
        tp: TPGroup | None = None,
        pp: int = 1,
        dtype: str = "auto",
        device: str = "auto",
        sparsity: str = DENSE,
        density: float | None = None,
        fill_kv: FillKV = "auto",
        cuda_graph: bool = True,
        overlap: Overlap = "auto",
        all_reduce: str = "auto",
        on_load: OnLoad | None = None,
    ) -> "Engine":
        """Loads this rank's slices of a model.

        Args:
            model: ``demo``, a Hugging Face directory, or a hub id.
            tp: the group to share the model with; by default the ranks that torchrun started.
            pp: pipeline stages, into which those ranks are dealt in order, as many to each: the layers are
                split over the stages, and each stage over its ranks. More than one are launched piece by
                piece on CUDA, without graphs.
            dtype: ``fp16``, ``bf16``, ``fp32``; ``auto`` is the checkpoint's on CUDA and fp32 on the CPU.
            device: ``auto``, ``cpu`` or ``cuda``; goes unused if ``tp`` is given.
            sparsity, density: see `load_policy`.
            fill_kv, cuda_graph, overlap: see `Engine`.
            all_reduce: how sums travel between GPUs: see `reserve`.
            on_load: called with (bytes that have come in, bytes of this rank's share), in ``dtype``.

        Raises:
            ValueError: no such model, a damaged one, or one that these ranks cannot share; likewise of
                predictors.
        """
        wanted = None if dtype == "auto" else parse_dtype(dtype)
        world = init_tp(pick_device(device)) if tp is None else tp
        pipeline, tp = init_pipeline(world, pp)
        network, tokenizer, fingerprint = world.agree(
            partial(load_model, model, tp, wanted, on_load, pipeline.stage, pp)
        )
        world.agree(partial(reserve, tp, network.dtype, all_reduce))
        policy = world.agree(lambda: load_policy(sparsity, network, fingerprint, density=density))
        return cls(
            network,
            tokenizer,
            tp,
            fingerprint,
            policy,
            fill_kv,
            find_model(model).name,
            cuda_graph=cuda_graph,
            overlap=overlap,
            pipeline=pipeline,
        )

    def generate(
        self,
        prompts: Sequence[str],
        params: SamplingParams | Sequence[SamplingParams] = SamplingParams(),  # noqa: B008  (frozen)
        *,
        max_batch: int = 16,
        verify_every: int = 0,
        on_text: OnText | None = None,
        shall_stop: ShallStop = lambda: False,
    ) -> Generation:
        """Continues every prompt.

        Args:
            prompts: any number, of any lengths; run in batches of at most ``max_batch``.
            params: one for each prompt, or one for all; then prompt ``i`` draws with ``seed + i``, so that
                the same prompt twice gives two samples.
            verify_every: every so many steps the dense step is computed too, and `Generation.drift` says how
                far the sparse one was; 0: never.
            on_text: called with (prompt's index, new text) as soon as text is certain.
            shall_stop: asked after every token; answers alike on every rank. If it says so, the texts are
                what they are by then, those of later batches empty.

        Raises:
            ValueError: an empty prompt, one too long for the model's positions, no prompts; logits that are
                no finite numbers.
        """
        requests = self._requests(prompts, params)
        if not 1 <= max_batch <= MAX_BATCH:
            raise ValueError(f"max_batch={max_batch} is not from 1 to {MAX_BATCH}")
        if verify_every < 0 or (verify_every and self.policy is None):
            raise ValueError(
                f"verify_every={verify_every}: expected 0 or more, and a sparse policy to verify"
            )
        ttft: list[float] = []
        steps: list[float] = []
        drift = Drift()
        for start in range(0, len(requests), max_batch):
            batch = requests[start : start + max_batch]
            self._run(batch, ttft, steps, on_text, verify_every, drift, shall_stop)
            if any(request.finish_reason == "preempted" for request in batch):
                break
        for request in requests:
            request.preempt()
        return self._generation(requests, ttft, steps, drift)

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
        shall_stop: ShallStop,
    ) -> None:
        """Prefills and decodes one batch to its last sequence's end, or until it shall stop; appends ms to
        ``ttft`` and ``steps``.

        The host reads a step's tokens while the next step runs. The device ends a sequence by itself at its
        end of text or last token; where a stop string ends it, one step more is computed and not looked at.
        """
        prompts, params = [r.prompt_ids for r in batch], [r.params for r in batch]
        state = self.reserve_for(prompts, params)
        clock = time.perf_counter()
        self._prefill(state, prompts, params)
        mail = TokenMail(state.tokens)
        mail.send()
        times, launched, longest = ttft, 0, max(p.max_new_tokens for p in params)
        for i in range(longest):
            # the first token comes before anything else is launched
            while launched < min(i + (mail.ahead if i else 0), longest - 1):
                if verify_every and launched % verify_every == 0:
                    dense, alive = self.dense_step(state), state.alive.clone()
                    sparse = self.decode_step(state)
                    if self.pipeline.is_last:
                        drift.add(sparse, dense, alive)
                else:
                    self.decode_step(state)
                mail.send()
                launched += 1
            tokens = mail.receive()
            now = time.perf_counter()
            times.append(1e3 * (now - clock))
            clock, times = now, steps  # what the host does with a token is part of the next one's time
            for place, (request, token) in enumerate(zip(batch, tokens, strict=False)):
                if request.finish_reason is not None:
                    continue
                if token == NO_TOKEN:
                    raise ValueError(
                        f"the logits are no finite numbers: damaged weights, or too large for {self.dtype}"
                    )
                text = request.push(token, self.model.config.eos_token_id)
                if on_text is not None and text:
                    on_text(request.index, text)
                if request.finish_reason is not None:
                    state.alive[place] = 0
            if all(request.finish_reason is not None for request in batch):
                return
            if shall_stop():
                for request in batch:
                    text = request.preempt()
                    if on_text is not None and text:
                        on_text(request.index, text)
                return

    def _generation(
        self, requests: Sequence[Request], ttft: list[float], steps: list[float], drift: Drift
    ) -> Generation:
        mean = float(np.mean(steps)) if steps else None
        density = self.density()
        weight_bytes = self.weight_bytes(density)
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
            drift=self.pipeline.gather_objects(drift.report())[-1],
            pp=self.pipeline.stages,
            tp=self.tp.size,
            dtype=self.dtype,
            device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            preempted=any(request.finish_reason == "preempted" for request in requests),
        )
