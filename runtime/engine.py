"""Answers requests: loads a model, prefills a batch of prompts, decodes until every one is finished."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dejavu.parallel.collectives import all_reduce
from dejavu.parallel.groups import TPGroup, init_tp, pick_device
from dejavu.parallel.overlap import SideStream
from dejavu.parallel.routes import reserve
from dejavu.predictors.selection import EVERYTHING, KINDS, Kind, Overlap, Policy, Selector
from dejavu.profiles.nvtx import nvtx_range
from dejavu.runtime.cache import LAZY_BATCH, KVCache
from dejavu.runtime.config import parse_dtype
from dejavu.runtime.graphs import MAX_BATCH, StepGraph, TokenMail, bucket
from dejavu.runtime.loading import OnLoad, load_model
from dejavu.runtime.opt import OPTModel
from dejavu.runtime.request import Request, Result
from dejavu.runtime.sampling import NO_TOKEN, Sampler, SamplingParams
from dejavu.runtime.sparsity import DENSE, load_policy
from dejavu.runtime.text import TextStream
from dejavu.runtime.weights import find_model

OnText = Callable[[int, str], None]
FillKV = Literal["auto", "lazy", "always"]


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


@dataclass(slots=True)
class DecodeState:
    """All that one decode step reads and writes, on the device.

    ``tokens [B]``, the newest of each sequence; ``alive [B]``, 1 until a sequence is finished; ``left [B]``,
    how many tokens it may still draw; ``last [B]``, the token that ends it (`NO_TOKEN`: none does). With
    ``graph`` a step is its replay.
    """

    tokens: Tensor
    alive: Tensor
    left: Tensor
    last: Tensor
    cache: KVCache
    sampler: Sampler
    graph: StepGraph | None = None


class Engine:
    """One rank's engine; every rank calls the same methods with the same arguments.

    Args:
        model: the rank's share of the network, loaded.
        tokenizer: the Hugging Face tokenizer that belongs to it.
        tp: the group that shares the model.
        fingerprint: of the model, by which predictors know it.
        policy: what decode steps compute; None: everything. Prefill is always dense.
        fill_kv: ``lazy``: keys and values of a head are computed when it is next chosen; ``always``: those
            of all heads at every step; ``auto``: lazy, but for more than two sequences on a GPU.
        cuda_graph: on CUDA, whether a decode step is recorded once and replayed, or launched piece by piece
            (then with all NVTX ranges). Policies that score in plain torch are always launched.
        overlap: on CUDA, when predictors run: see `dejavu.predictors.selection.Overlap`.
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
        overlap: Overlap = "tap",
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.tp = tp
        self.fingerprint = fingerprint
        self.policy = policy
        if fill_kv not in get_args(FillKV):
            raise ValueError(f"fill_kv={fill_kv!r} is unknown: use {', '.join(get_args(FillKV))}")
        self.fill_kv: FillKV = fill_kv
        if overlap not in get_args(Overlap):
            raise ValueError(f"overlap={overlap!r} is unknown: use {', '.join(get_args(Overlap))}")
        self.overlap: Overlap = overlap
        self.name = name
        on_cuda = tp.device.type == "cuda"
        self._graphs = on_cuda and cuda_graph
        self._side = SideStream(tp.device) if on_cuda else None
        # by batch, greedy and policy, which a recorded step keeps in use
        self._states: dict[tuple[int, bool, Selector | None], DecodeState] = {}
        self._pool = torch.cuda.graph_pool_handle() if self._graphs else None
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
        fill_kv: FillKV = "auto",
        cuda_graph: bool = True,
        overlap: Overlap = "tap",
        all_reduce: str = "auto",
        on_load: OnLoad | None = None,
    ) -> "Engine":
        """Loads this rank's slices of a model.

        Args:
            model: ``demo``, a Hugging Face directory, or a hub id.
            tp: the group to share the model with; by default the ranks that torchrun started.
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
        if tp is None:
            tp = init_tp(pick_device(device))
        network, tokenizer, fingerprint = tp.agree(partial(load_model, model, tp, wanted, on_load))
        reserve(tp, network.dtype, all_reduce)
        policy = tp.agree(lambda: load_policy(sparsity, network, fingerprint, density=density))
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
        )

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
            self._run(batch, ttft, steps, on_text, verify_every, drift)
        return self._generation(requests, ttft, steps, drift)

    @torch.inference_mode()
    def prefill(self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]) -> DecodeState:
        """Runs the prompts' token ids through the model and samples the first token of each.

        With CUDA graphs the state is good until the next call, and has places for more sequences (finished
        ones) where their number is no power of 2.
        """
        capacity = max(len(ids) + p.max_new_tokens for ids, p in zip(prompts, params, strict=True))
        state = self.reserve(len(prompts), capacity, greedy=all(p.temperature == 0 for p in params))
        self._prefill(state, prompts, params)
        return state

    @torch.inference_mode()
    def reserve(self, batch: int, capacity: int, *, greedy: bool) -> DecodeState:
        """A state for ``batch`` sequences of at most ``capacity`` tokens; with CUDA graphs one that was used
        before, or the step is recorded now.

        Raises:
            ValueError: the GPU has no memory for it.
        """
        if not self._graphs or not (self.policy or EVERYTHING).capturable:
            return self._new_state(batch, capacity, greedy)
        key = bucket(batch), greedy, self.policy
        state = self._states.get(key)
        if state is None or state.cache.keys.shape[3] < capacity:
            state = self._states.pop(key, None)
            state = None  # its memory is free before the next one's is asked for
            capacity = min(bucket(max(capacity, 128)), self.model.config.max_position_embeddings)
            state = self._room_for(key[0], capacity, greedy)
            state.graph = self.graph(state)
            self._states[key] = state
        return state

    @torch.inference_mode()
    def graph(self, state: DecodeState, selector: Selector | None = None) -> StepGraph:
        """The step of ``state`` with the policy, or with ``selector``, recorded; ends its sequences."""
        state.alive.zero_()  # nothing advances while the step is recorded
        tallies = [] if self.policy is None else self.policy.tallies()
        before = [tally.clone() for tally in tallies]
        graph = StepGraph(partial(self._advance, state, selector), self.tp.device, self._pool)
        for tally, count in zip(tallies, before, strict=True):
            tally.copy_(count)
        return graph

    def _room_for(self, batch: int, capacity: int, greedy: bool) -> DecodeState:
        """A new state; if need be, those of other batches go. All ranks do the same: they record together."""
        for _ in range(2):
            if not self._states:  # torch refuses a pool whose graphs are all gone
                self._pool = torch.cuda.graph_pool_handle()
            try:
                state = self._new_state(batch, capacity, greedy)
            except torch.OutOfMemoryError:
                state = None
            if all(self.tp.gather_objects(state is not None)):
                assert state is not None
                return state
            state = None
            self._states.clear()
            torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info(self.tp.device)[0] / 2**30
        raise ValueError(
            f"a GPU has {free:.1f} GiB left, too little for keys and values of {batch} sequences of "
            f"{capacity} tokens: lower --max-batch or --max-new-tokens, or use more ranks"
        )

    def _new_state(self, batch: int, capacity: int, greedy: bool) -> DecodeState:
        few = self.tp.device.type == "cpu" or batch <= LAZY_BATCH
        lazy = self.fill_kv == "lazy" or (self.fill_kv == "auto" and few)
        lazy = lazy and self.policy is not None and self.policy.chooses("heads")
        tokens, alive, left, last = torch.zeros(4, batch, dtype=torch.int64, device=self.tp.device)
        return DecodeState(
            tokens,
            alive,
            left,
            last,
            cache=self.model.empty_cache(batch, capacity, lazy=lazy),
            sampler=Sampler.empty(batch, capacity, self.tp.device, greedy=greedy),
        )

    def _prefill(
        self, state: DecodeState, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]
    ) -> None:
        device, n = self.tp.device, len(prompts)
        lengths = torch.tensor([len(ids) for ids in prompts])
        padded = torch.zeros(n, int(lengths.max()), dtype=torch.int64)
        for row, ids in zip(padded, prompts, strict=True):
            row[: len(ids)] = torch.tensor(ids)
        token_ids, lengths = padded.to(device), lengths.to(device)
        eos = self.model.config.eos_token_id
        for place in (state.tokens, state.alive, state.left, state.cache.lengths):
            place.zero_()
        state.alive[:n] = 1
        state.left[:n] = torch.tensor([p.max_new_tokens for p in params])
        state.last[:n] = torch.tensor([NO_TOKEN if p.ignore_eos else eos for p in params])
        state.sampler.begin(params)
        with nvtx_range("prefill"):
            cache = state.cache.first(n)
            step = cache.prompt(token_ids.shape[1])
            x = self.model(self.model.embed(token_ids, step.positions), cache, step)
            last = x[torch.arange(n, device=device), lengths - 1]
            cache.begin(lengths)
            logits = self.model.logits(last)
            self._draw(state, F.pad(logits, (0, 0, 0, len(state.tokens) - n)))

    @torch.inference_mode()
    def decode_step(self, state: DecodeState, selector: Selector | None = None) -> Tensor:
        """One more token for every sequence, in place; device tensors only. Returns the logits ``[B, V]``.

        A finished sequence does not advance: what it computes is overwritten by what it computes next. With
        ``selector``, that is asked instead of the policy, in launches one by one.
        """
        with nvtx_range("decode"):
            if state.graph is None or selector is not None:
                return self._advance(state, selector)
            return state.graph.replay()

    def _advance(self, state: DecodeState, selector: Selector | None = None) -> Tensor:
        logits = self._step(state, selector or self.policy or EVERYTHING)
        state.cache.lengths.add_(state.alive)
        self._draw(state, logits)
        return logits

    @torch.inference_mode()
    def dense_step(self, state: DecodeState) -> Tensor:
        """The logits ``[B, V]`` that the next `decode_step` would have if it were dense; changes nothing."""
        with nvtx_range("verify"):
            logits = self._step(state, EVERYTHING)
            state.cache.forget_after_lengths()
        return logits

    def _step(self, state: DecodeState, selector: Selector) -> Tensor:
        if self.policy is not None:
            self.policy.side, self.policy.overlap = self._side, self.overlap
        step = state.cache.step(1, state.alive)
        tokens = state.tokens.clamp(min=0)[:, None]  # the host has not seen a NO_TOKEN yet
        x = self.model(self.model.embed(tokens, step.positions), state.cache, step, selector)
        return self.model.logits(x[:, -1])

    def _draw(self, state: DecodeState, logits: Tensor) -> None:
        """Logits ``[B, V]`` to the next tokens, and which sequences that finishes."""
        with nvtx_range("sample"):
            state.tokens.copy_(state.sampler(logits))
            state.left.sub_(state.alive)
            state.alive.mul_((state.left > 0) & (state.tokens != state.last))

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
        """Prefills and decodes one batch to its last sequence's end; appends ms to ``ttft`` and ``steps``.

        The host reads a step's tokens while the next step runs. The device ends a sequence by itself at its
        end of text or last token; where a stop string ends it, one step more is computed and not looked at.
        """
        params = [r.params for r in batch]
        capacity = max(len(r.prompt_ids) + r.params.max_new_tokens for r in batch)
        state = self.reserve(len(batch), capacity, greedy=all(p.temperature == 0 for p in params))
        clock = time.perf_counter()
        self._prefill(state, [r.prompt_ids for r in batch], params)
        mail = TokenMail(state.tokens)
        mail.send()
        times, launched, longest = ttft, 0, max(p.max_new_tokens for p in params)
        for i in range(longest):
            # the first token comes before anything else is launched
            while launched < min(i + (mail.ahead if i else 0), longest - 1):
                if verify_every and launched % verify_every == 0:
                    dense, alive = self.dense_step(state), state.alive.clone()
                    drift.add(self.decode_step(state), dense, alive)
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
            drift=drift.report(),
            tp=self.tp.size,
            dtype=self.dtype,
            device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        )

    def mean_density(self, policy: Policy, kind: Kind) -> float:
        """What a policy has chosen since it was last asked, the mean over tokens, layers and ranks."""
        local = policy.density(kind).to(self.tp.device)
        return float(all_reduce(local, self.tp)) / self.tp.size

    def density(self) -> dict[str, float]:
        """The share of neurons and heads computed since the last call, the mean over steps, layers, ranks."""
        if self.policy is None:
            return {"mlp": 1.0, "heads": 1.0}
        return {kind: self.mean_density(self.policy, kind) for kind in KINDS}

    def weight_bytes(self, density: dict[str, float]) -> int:
        """Bytes of weights that a decode step reads on this rank, with those of choosing."""
        if self.policy is None:
            return self.model.decode_bytes()
        attention = sum(layer.self_attn.decode_bytes() for layer in self.model.layers)
        mlp = sum(layer.mlp.decode_bytes() for layer in self.model.layers)
        skipped = attention * (1 - density["heads"]) + mlp * (1 - density["mlp"])
        # what sees the truth reads all of fc1; what is live then costs its row of fc2 alone
        truth = sum(
            self.model.layers[layer].mlp.fc1.weight.data.nbytes
            * (1 if unit.live_tally is None else 1 - density["mlp"])
            for (kind, layer), unit in self.policy.units.items()
            if unit.sees_truth and kind == "mlp"
        )
        return int(self.model.decode_bytes() - skipped + self.policy.read_bytes() + truth)
