"""Decoding: the state of a batch, its prefill, and the step that gives every sequence one more token.

Shape legend: B batch, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from dejavu.kernels.tokens import NO_TOKEN, count_down
from dejavu.parallel.collectives import all_reduce
from dejavu.parallel.groups import TPGroup
from dejavu.parallel.overlap import SideStream
from dejavu.parallel.pipeline import Pipeline
from dejavu.predictors.selection import EVERYTHING, KINDS, Kind, Overlap, Policy, Selector, Tap
from dejavu.profiles.nvtx import nvtx_range
from dejavu.runtime.cache import LAZY_BATCH, KVCache, Step
from dejavu.runtime.graphs import StepGraph, bucket
from dejavu.runtime.opt import OPTModel
from dejavu.runtime.sampling import Sampler, SamplingParams

FillKV = Literal["auto", "lazy", "always"]


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


class Decoder:
    """One rank's share of decoding; every rank calls the same methods with the same arguments.

    Args:
        model: the rank's share of the network, loaded.
        tp: the group that shares the model.
        policy: what decode steps compute; None: everything. Prefill is always dense.
        fill_kv: ``lazy``: keys and values of a head are computed when it is next chosen; ``always``: those
            of all heads at every step; ``auto``: lazy, but for more than two sequences on a GPU.
        cuda_graph: on CUDA, whether a decode step is recorded once and replayed, or launched piece by piece
            (then with all NVTX ranges). Policies that score in plain torch are always launched, and so are
            the stages of a pipeline.
        overlap: on CUDA, when predictors run: see `dejavu.predictors.selection.Overlap`.
        pipeline: the stages, of which ``model`` and ``policy`` are this rank's; None: there is one.
    """

    def __init__(
        self,
        model: OPTModel,
        tp: TPGroup,
        policy: Policy | None = None,
        fill_kv: FillKV = "auto",
        *,
        cuda_graph: bool = True,
        overlap: Overlap = "auto",
        pipeline: Pipeline | None = None,
    ) -> None:
        for name, given, known in (
            ("fill_kv", fill_kv, get_args(FillKV)),
            ("overlap", overlap, get_args(Overlap)),
        ):
            if given not in known:
                raise ValueError(f"{name}={given!r} is unknown: use {', '.join(known)}")
        self.model = model
        self.tp = tp
        self.policy = policy
        self.pipeline = pipeline or Pipeline(tp)
        if policy is not None and self.pipeline.stages > 1:
            self._relay_taps(policy)
        self.fill_kv: FillKV = fill_kv
        self.overlap: Overlap = overlap
        on_cuda = tp.device.type == "cuda"
        self._graphs = on_cuda and cuda_graph and self.pipeline.stages == 1
        sides = product(KINDS, (False, True)) if on_cuda else ()
        self._sides = {(kind, patient): SideStream(tp.device, patient=patient) for kind, patient in sides}
        # by batch, greedy and policy, which a recorded step keeps in use
        self._states: dict[tuple[int, bool, Selector | None], DecodeState] = {}
        self._pool = torch.cuda.graph_pool_handle() if self._graphs else None

    @torch.inference_mode()
    def prefill(self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]) -> DecodeState:
        """Runs the prompts' token ids through the model and samples the first token of each.

        With CUDA graphs the state is good until the next call, and has places for more sequences (finished
        ones) where their number is no power of 2.
        """
        state = self.reserve_for(prompts, params)
        self._prefill(state, prompts, params)
        return state

    def reserve_for(self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]) -> DecodeState:
        """A state that takes these prompts and all that may come after them. See `reserve`."""
        capacity = max(len(ids) + p.max_new_tokens for ids, p in zip(prompts, params, strict=True))
        return self.reserve(len(prompts), capacity, greedy=all(p.temperature == 0 for p in params))

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
        if (state := self._states.get(key)) is not None and state.cache.keys.shape[3] >= capacity:
            return state
        del state
        self._states.pop(key, None)  # its memory is free before the next one's is asked for
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
            x = self._through(token_ids, cache, step, EVERYTHING)
            last = x[torch.arange(n, device=device), lengths - 1]
            cache.begin(lengths)
            logits = self._logits(last)
            self._draw(state, F.pad(logits, (0, 0, 0, len(state.tokens) - n)))

    @torch.inference_mode()
    def decode_step(self, state: DecodeState, selector: Selector | None = None) -> Tensor:
        """One more token for every sequence, in place; device tensors only. Returns the logits ``[B, V]``
        (before the last stage of a pipeline ``[B, 0]``).

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
            self.policy.sides, self.policy.overlap = self._sides, self.overlap
        step = state.cache.step(1, state.alive)
        tokens = state.tokens.clamp(min=0)[:, None]  # the host has not seen a NO_TOKEN yet
        return self._logits(self._through(tokens, state.cache, step, selector)[:, -1])

    def _through(self, token_ids: Tensor, cache: KVCache, step: Step, selector: Selector) -> Tensor:
        """``token_ids [B, S]`` through the stages up to this one: the residual stream ``[B, S, D]``."""
        taps: list[Tensor] = []
        if self.pipeline.is_first:
            residual = self.model.embed(token_ids, step.positions)
        else:
            shape = (*token_ids.shape, self.model.config.hidden_size)
            count = 1 + len(selector.arriving)
            residual, *taps = self.pipeline.receive(count, shape, self.model.dtype)
        x: Tensor = self.model(residual, cache, step, selector, zip(selector.arriving, taps, strict=True))
        if not self.pipeline.is_last:
            self.pipeline.send([x, *selector.passed()])
        return x

    def _logits(self, x: Tensor) -> Tensor:
        """``x [B, D]`` to logits ``[B, V]`` on the last stage, ``[B, 0]`` before it."""
        return self.model.logits(x) if self.pipeline.is_last else x.new_empty(len(x), 0)

    def _relay_taps(self, policy: Policy) -> None:
        """Which taps travel between stages: those that predictors of later stages read."""
        of_stages = self.pipeline.gather_objects((self.model.layer_range.start, policy.taps))

        def into(stage: int) -> tuple[Tap, ...]:
            if stage >= len(of_stages):
                return ()
            start = of_stages[stage][0]
            read = {tap for _, taps in of_stages[stage:] for tap in taps if tap.layer < start}
            return tuple(sorted(read, key=lambda tap: tap.halves))

        policy.arriving, policy.leaving = into(self.pipeline.stage), into(self.pipeline.stage + 1)

    def _draw(self, state: DecodeState, logits: Tensor) -> None:
        """Logits ``[B, V]`` to the next tokens, and which sequences that finishes."""
        with nvtx_range("sample"):
            if self.pipeline.is_last:
                state.tokens.copy_(state.sampler(logits))
            self.pipeline.broadcast_from_last(state.tokens)
            count_down(state.tokens, state.last, state.left, state.alive)

    def mean_density(self, policy: Policy, kind: Kind) -> float:
        """What a policy has chosen since it was last asked, the mean over tokens, layers and ranks."""
        local = policy.density(kind).to(self.tp.device)
        mean = float(all_reduce(local, self.tp)) / self.tp.size
        # of the layers of other stages, each stage's policy says 1
        return sum(self.pipeline.gather_objects(mean)) - (self.pipeline.stages - 1)

    def density(self) -> dict[str, float]:
        """The share of neurons and heads computed since the last call, the mean over steps, layers, ranks."""
        if self.policy is None:
            return {"mlp": 1.0, "heads": 1.0}
        return {kind: self.mean_density(self.policy, kind) for kind in KINDS}

    def weight_bytes(self, density: dict[str, float]) -> int:
        """Bytes of weights that a decode step reads on a rank, with those of choosing; of a pipeline, on one
        rank of each stage, which read one after the other."""
        return sum(self.pipeline.gather_objects(self._own_weight_bytes(density)))

    def _own_weight_bytes(self, density: dict[str, float]) -> int:
        if self.policy is None:
            return self.model.decode_bytes()
        attention = sum(layer.self_attn.decode_bytes() for layer in self.model.layers)
        mlp = sum(layer.mlp.decode_bytes() for layer in self.model.layers)
        skipped = attention * (1 - density["heads"]) + mlp * (1 - density["mlp"])
        # what sees the truth reads all of fc1; what is live then costs its row of fc2 alone
        truth = sum(
            self.model.layers[layer - self.model.layer_range.start].mlp.fc1.weight.data.nbytes
            * (1 if unit.live_tally is None else 1 - density["mlp"])
            for (kind, layer), unit in self.policy.units.items()
            if unit.sees_truth and kind == "mlp"
        )
        return int(self.model.decode_bytes() - skipped + self.policy.read_bytes() + truth)
