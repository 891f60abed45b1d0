"""`dejavu bench decode`: whole decode steps at published shapes, with their floors and what prediction costs.

Shape legend: B batch, T cache length, N local heads, H head dim, L layers.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from dejavu.kernels.tuning import Settings
from dejavu.parallel.collectives import all_reduce
from dejavu.parallel.groups import TPGroup
from dejavu.parallel.routes import reserve
from dejavu.predictors.networks import PackedLowRank
from dejavu.predictors.selection import KINDS, Kind, Overlap, Policy, Unit
from dejavu.profiles.kernel_bench import DTYPES, Local
from dejavu.profiles.synthetic import Lookahead, Taps, paper75, set_live_share, synthetic_policy, union66b
from dejavu.profiles.timing import Decoded, StepClock, time_calls, time_decode
from dejavu.profiles.tune import tune_steps
from dejavu.runtime.cache import LAZY_BATCH
from dejavu.runtime.config import OPTConfig
from dejavu.runtime.decoding import Decoder, FillKV
from dejavu.runtime.opt import OPTModel
from dejavu.runtime.sampling import SamplingParams
from dejavu.runtime.sparsity import lossless

Row = dict[str, Any]
PROFILES = ("paper75", "union66b")
POLICIES = ("dense", "lossless", "sparse")
# The live share of a ReLU model's neurons, for `lossless`.
_LIVE = 0.04


@dataclass(frozen=True, slots=True)
class Run:
    """What is measured: ``bandwidth`` of reading in bytes a second, the rest as of `dejavu bench decode`."""

    shape: str
    config: OPTConfig
    tp: TPGroup
    dtype: torch.dtype
    bandwidth: float
    batch: int
    prompt_len: int
    new_tokens: int

    def row(self, decoded: Decoded, nbytes: float, **what: Any) -> Row:
        """A row of the record; ``nbytes`` is what a rank has to read in a step."""
        ms = float(np.mean(decoded.steps_ms))
        floor = 1e3 * nbytes / self.bandwidth
        return {
            "op": "decode",
            "shape": self.shape,
            "tp": self.tp.shares,
            "gpus": self.tp.size,
            "weights": str(self.dtype).removeprefix("torch."),
            "batch": self.batch,
            "prompt_len": self.prompt_len,
            "new_tokens": self.new_tokens,
            **what,
            "ttft_ms": decoded.ttft_ms,
            "ms_mean": ms,
            "ms_p50": float(np.percentile(decoded.steps_ms, 50)),
            "ms_p99": float(np.percentile(decoded.steps_ms, 99)),
            "tokens_per_s": 1e3 * self.batch / ms,
            "gb_per_s": nbytes / ms / 1e6,
            "floor_ms": floor,
            "over_floor": ms / floor,
            "peak_gib": decoded.peak_gib,
            "joules_per_token": self._joules(decoded.joules_per_token),
        }

    def dense_bytes(self) -> float:
        """What a rank reads in a dense step."""
        with torch.device("meta"):
            model = OPTModel(self.config, tp=self.tp, dtype=self.dtype)
        return model.decode_bytes() + self.kv_bytes()

    def kv_bytes(self) -> float:
        """A rank's keys and values of all heads, at the middle of the run."""
        config = self.config
        length = self.prompt_len + self.new_tokens / 2
        heads = self.tp.divide(config.num_heads)
        per_token = 2 * config.num_layers * heads * config.head_dim * self.dtype.itemsize
        return per_token * self.batch * length

    def _joules(self, joules: float | None) -> float | None:
        """Those of all GPUs."""
        total = torch.tensor([float("nan") if joules is None else joules], device=self.tp.device)
        found = float(all_reduce(total, self.tp))
        return None if np.isnan(found) else found


@dataclass(frozen=True, slots=True)
class Parts:
    """What of the product is switched on in a sparse step."""

    mlp: bool = True
    heads: bool = True
    fill_kv: FillKV = "auto"  # "always": keys and values are projected for all heads, read for the chosen
    overlap: Overlap = "auto"
    bits: int = 8
    symm: bool = True


# The waterfall: each line has what those above it have.
_STEPS: tuple[tuple[str, Parts], ...] = (
    ("+ MLP sparsity", Parts(heads=False, overlap="none", bits=16, symm=False)),
    ("+ skipped K/V reads", Parts(fill_kv="always", overlap="none", bits=16, symm=False)),
    ("+ skipped projections", Parts(overlap="none", bits=16, symm=False)),
    ("+ lookahead on the side stream", Parts(bits=16, symm=False)),
    ("+ 8-bit predictors", Parts(symm=False)),
    ("+ symmetric memory", Parts()),
)
_WITHOUT: tuple[tuple[str, Parts], ...] = (
    ("all but MLP sparsity", Parts(mlp=False)),
    ("all but skipped K/V reads and projections", Parts(heads=False)),
    ("all but skipped projections", Parts(fill_kv="always")),
    ("all but lookahead (predictors on the main stream)", Parts(overlap="none")),
    ("all, predictors start at the collective", Parts(overlap="collective")),
    ("all but 8-bit predictors", Parts(bits=16)),
    ("all but symmetric memory", Parts(symm=False)),
)


class Bench:
    """A synthetic model, and our engine on it under the policies that are asked for."""

    def __init__(
        self,
        run: Run,
        model: OPTModel,
        profile: str,
        *,
        rank: int,
        bits: int,
        lookahead: Lookahead,
        overlap: Overlap,
        symm: str,
    ) -> None:
        self.run, self.model, self.rank, self.lookahead, self.symm = run, model, rank, lookahead, symm
        self.parts = Parts(bits=bits, overlap=overlap)
        layers = run.config.num_layers
        self.profile = paper75(layers) if profile == "paper75" else union66b(layers, run.batch)
        self._policies: dict[int, Policy] = {}
        self._widths = {bits}

    def rows(self, policies: Sequence[str], waterfall: bool) -> Iterator[Row]:
        """What is asked for, one after the other."""
        if waterfall:
            self._widths |= {8, 16}
        if "dense" in policies:
            yield self.dense()
        if "sparse" in policies:
            yield self.sparse()
        if waterfall:
            yield from self.waterfall()
        if "lossless" in policies:
            yield self.lossless()

    def tune(
        self, kernels: Sequence[str], on_trial: Callable[[str, Settings | None, float], None]
    ) -> dict[str, Settings]:
        """Better launch settings for sparse steps: see `tune_steps`. Every rank calls it."""
        weights = {dtype: name for name, dtype in DTYPES.items()}
        predictor = ("int8" if self.parts.bits == 8 else "fp16", self.rank)
        local = Local(self.run.shape, self.run.tp.shares)
        return tune_steps(self._step_ms, kernels, local, weights[self.run.dtype], predictor, on_trial)

    def _step_ms(self) -> float:
        """The mean of some sparse steps; the slowest rank's."""
        alive = self.run.new_tokens - 1  # the first is the prefill's
        decoding = _Decoding(self.run, self._engine(self._policy(self.parts), self.parts))
        decoding.prefill()
        warm = min(4, alive // 2)
        for _ in range(warm):
            decoding.step()
        ms = _mean_ms([_timed(self.run, decoding.step) for _ in range(min(60, alive - warm))])
        return max(self.run.tp.gather_objects(ms))

    def dense(self) -> Row:
        """Our dense engine."""
        return self._measure("dense", self._engine(None, self.parts))

    def lossless(self) -> Row:
        """fc1 in full and live rows of fc2, in a model of which 4% are live for a token."""
        set_live_share(self.model, _LIVE)
        row = self._measure("lossless", self._engine(lossless(self.model), self.parts))
        set_live_share(self.model, 1.0)
        return row

    def sparse(self) -> Row:
        """Predicted sets, and what predicting them costs."""
        engine = self._engine(self._policy(self.parts), self.parts)
        row = self._measure("sparse", engine)
        what = {"predictor_rank": self.rank, "predictor_bits": self.parts.bits, "lookahead": self.lookahead}
        return {**row, **_prediction(self.run, engine), **what}

    def waterfall(self) -> Iterator[Row]:
        """The gains one after the other, from dense on NCCL; then each part alone switched off."""
        base, run = None, replace(self.run, new_tokens=min(self.run.new_tokens, 64))
        self._engine(None, Parts())
        has_symm, is_lazy = self._route() == "symm", run.batch <= LAZY_BATCH
        for name, parts in (("dense", None), *_STEPS, *_WITHOUT):
            if ("symmetric" in name and not has_symm) or (
                name.endswith("skipped projections") and not is_lazy
            ):
                continue  # there is no such thing here
            policy = None if parts is None else self._policy(parts)
            row = self._measure(name, self._engine(policy, parts or Parts(symm=False)), run)
            base = base or row["ms_mean"]
            yield {**row, "op": "waterfall", "over_first_line": base / row["ms_mean"]}

    def _route(self) -> str:
        """How sums travel at the moment."""
        if self.run.tp.size == 1:
            return "none"
        routes = self.run.tp.routes.get(self.run.dtype)
        return "symm" if routes is not None and routes.enabled else "nccl"

    def _engine(self, policy: Policy | None, parts: Parts) -> Decoder:
        reserve(self.run.tp, self.run.dtype, self.symm if parts.symm else "nccl")
        return Decoder(self.model, self.run.tp, policy, parts.fill_kv, overlap=parts.overlap)

    def _policy(self, parts: Parts) -> Policy:
        """The units that ``parts`` has; thresholds are set once for each width of the weights."""
        if missing := self._widths - self._policies.keys():
            taps = _dense_taps(self.run, self.model)
            for bits in missing:
                self._policies[bits] = synthetic_policy(
                    self.model, self.profile, taps, rank=self.rank, bits=bits, lookahead=self.lookahead
                )
        whole = self._policies[parts.bits]
        kinds: dict[Kind, bool] = {"mlp": parts.mlp, "heads": parts.heads}
        units = [unit for (kind, _), unit in whole.units.items() if kinds[kind]]
        return Policy(units, whole.num_layers, name=whole.name)

    def _measure(self, policy: str, engine: Decoder, run: Run | None = None) -> Row:
        run = run or self.run
        decoding = _Decoding(run, engine)
        engine.density()  # is counted from here on
        decoded = time_decode(
            decoding.prefill,
            decoding.step,
            batch=run.batch,
            new_tokens=run.new_tokens,
            device=run.tp.device,
        )
        density = engine.density()
        row = run.row(decoded, step_bytes(run, engine, density), engine="dejavu", policy=policy)
        row["all_reduce"] = self._route()
        return {**row, **{f"density_{kind}": density[kind] for kind in KINDS}}


class _Decoding:
    """The same random prompts, decoded from the beginning as often as is wanted."""

    def __init__(self, run: Run, engine: Decoder) -> None:
        self._engine = engine
        self._params = [SamplingParams(max_new_tokens=run.new_tokens, ignore_eos=True)] * run.batch
        generator = torch.Generator().manual_seed(0)
        size = (run.batch, run.prompt_len)
        self._prompts = torch.randint(4, run.config.vocab_size, size, generator=generator).tolist()
        self.state = engine.reserve(run.batch, run.prompt_len + run.new_tokens, greedy=True)

    def prefill(self) -> None:
        """Begins over, up to the first token."""
        self.state = self._engine.prefill(self._prompts, self._params)

    def step(self) -> None:
        """The next token of every sequence."""
        self._engine.decode_step(self.state)


def _dense_taps(run: Run, model: OPTModel) -> Taps:
    """What predictors would read in a dense run of the same prompts."""
    engine = Decoder(model, run.tp, cuda_graph=False)
    decoding, taps = _Decoding(run, engine), Taps()
    decoding.prefill()
    for _ in range(min(run.new_tokens - 1, 64)):
        engine.decode_step(decoding.state, taps)
    return taps


def step_bytes(run: Run, engine: Decoder, density: dict[str, float]) -> float:
    """What a rank has to read in a step: weights, predictors, and the keys and values of chosen heads."""
    return engine.weight_bytes(density) + run.kv_bytes() * density["heads"]


def _prediction(run: Run, engine: Decoder) -> Row:
    """Exposed: the step with predictors, less the same step with the sets that they found given. Hidden: the
    share of what all predictors take alone, one after the other, that is not exposed."""
    policy, n = engine.policy, min(run.new_tokens - 1, 64)
    assert policy is not None
    decoding = _Decoding(run, engine)
    batch = len(decoding.state.tokens)
    buffers = policy.buffers(batch)
    decoding.prefill()
    recorded = []
    with torch.inference_mode():
        with_predictors = []
        for _ in range(n):
            with_predictors.append(_timed(run, decoding.step))
            recorded.append(buffers.data.clone())
        given = engine.graph(decoding.state, policy.given(batch))
        given.replay()  # a first replay takes longer
        decoding.prefill()
        with_sets = []
        for sets in recorded:
            buffers.data.copy_(sets)
            with_sets.append(_timed(run, given.replay))
        exposed = _mean_ms(with_predictors) - _mean_ms(with_sets)
        alone = _alone_ms(run, policy, batch)
    return {
        "exposed_predictor_ms": exposed,
        "exposed_share": exposed / _mean_ms(with_predictors),
        "predictors_alone_ms": alone,
        "hidden_share": 1 - exposed / alone,
    }


def _timed(run: Run, step: Any) -> StepClock:
    clock = StepClock(run.tp.device)
    clock.tick()
    step()
    clock.tick()
    return clock


def _mean_ms(clocks: list[StepClock]) -> float:
    return float(np.mean([clock.steps_ms()[0] for clock in clocks]))


def _alone_ms(run: Run, policy: Policy, batch: int) -> float:
    """All predictors of a step, one after the other in a graph."""
    residual = torch.randn(batch, run.config.hidden_size, device=run.tp.device).to(run.dtype)
    buffers = policy.buffers(batch)

    def call(unit: Unit) -> None:
        assert isinstance(unit.scorer, PackedLowRank)
        union = unit.kind == "mlp"
        unit.scorer.active_set(residual, None, union=union, out=buffers.of(unit, union=union))

    units = list(policy.units.values())
    ms = len(units) * time_calls([partial(call, unit) for unit in units], 10).p50 / 1e3
    for kind in KINDS:
        policy.density(kind)
    return ms
