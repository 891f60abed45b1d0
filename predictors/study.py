"""Is there contextual sparsity in this model? How few neurons and heads matter to a token, what stays from
token to token and from layer to layer, and what leaving out the others costs.

All of it is measured in whole passes over windows of text, without the token that begins each window.

Shape legend: L layers, B windows at a time, S tokens of a window, n neurons or heads of a layer, of all ranks
where not said to be local.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dejavu.parallel.collectives import all_gather_last, all_reduce
from dejavu.predictors.corpus import Corpus
from dejavu.predictors.networks import NeuronContribution, Random, Static
from dejavu.predictors.selection import (
    EVERYTHING,
    KINDS,
    Choice,
    HeadMean,
    Kind,
    Masked,
    Policy,
    Selector,
    Tap,
    Truth,
    Unit,
)
from dejavu.profiles.quality import OnProgress, Scores, masked
from dejavu.runtime.engine import Engine
from dejavu.runtime.opt import OPTModel
from dejavu.runtime.sparsity import contribution

DENSITIES: dict[Kind, tuple[float, ...]] = {
    "mlp": (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5),
    "heads": (0.5, 0.75, 0.875),
}
POLICIES = ("oracle", "two-pass", "static", "random")
SHARES = (90, 95, 99)  # percent of the contribution
BATCHES = (1, 2, 4, 8, 16, 32)  # each twice the one before
# Contributions from which thresholds are chosen: so many numbers of all layers together.
_SAMPLE = 2**24
# Memory for the sets that the first of two passes leaves to the second.
_RECORD_BYTES = 2**30
# Numbers that are sorted at a time.
_SORTED = 2**24


def study(
    engine: Engine, corpus: Corpus, *, optional: bool = False, on_progress: OnProgress | None = None
) -> dict[str, Any]:
    """Measures a model on a text; the same on every rank, plain JSON.

    ``layers`` has what `Observer.layers` measures; ``union`` is the share of neurons that some sequence of a
    batch needs, the mean over layers; ``mlp`` and ``heads`` have a row a policy and density (see `trials`)
    with ``ppl_increase`` against ``dense_ppl``, its 95% interval ``low`` to ``high``, and the density used.

    Args:
        corpus: thresholds and static sets are chosen on the very text that they are then judged on.
        optional: also what skipping each block costs, and running each MLP beside its attention block instead
            of after it.
        on_progress: called with (done, of how much), in passes of windows.

    Raises:
        ValueError: the windows are too short, or longer than the model's positions.
    """
    config, windows = engine.model.config, corpus.windows
    _check(windows, config.max_position_embeddings)
    most = 2 + len(POLICIES) * sum(map(len, DENSITIES.values())) + optional * (3 * config.num_layers + 1)
    seen = observe(engine, windows, _part(on_progress, 0, 1, most * len(windows)))
    tried = {kind: trials(engine, seen, kind, DENSITIES[kind]) for kind in KINDS}
    extra = optional_trials(engine) if optional else []
    flat = [*tried["mlp"], *tried["heads"], *extra]
    total = (2 + len(flat)) * len(windows)
    dense, scores = judge(engine, windows, flat, _part(on_progress, len(windows), 1 + len(flat), total))
    rows = iter([_row(engine, *pair, dense) for pair in zip(flat, scores, strict=True)])
    layers = seen.layers()
    return {
        "model": {
            "name": engine.name,
            "fingerprint": engine.fingerprint,
            **{k: getattr(config, k) for k in ("num_layers", "hidden_size", "ffn_dim", "num_heads")},
            "dtype": engine.dtype,
        },
        "text": {
            "file": corpus.file,
            "sha256": corpus.sha256,
            "tokens": corpus.tokens,
            "window": windows.shape[1] - 1,
        },
        "layers": layers,
        "union": {
            batch: sum(row["union"][batch] for row in layers) / len(layers) for batch in layers[0]["union"]
        },
        "dense_ppl": _perplexity(dense),
        **{kind: [next(rows) for _ in tried[kind]] for kind in KINDS},
        "optional": list(rows),
    }


def _check(windows: Tensor, positions: int) -> None:
    length = windows.shape[1] - 1
    if not 3 <= length <= positions:
        raise ValueError(f"windows of {length} tokens: expected 3 to the model's {positions} positions")


def _part(on_progress: OnProgress | None, before: int, weight: int, total: int) -> OnProgress | None:
    """Progress of a stage, whose windows weigh ``weight`` each, as progress of the whole."""
    return on_progress and (lambda done, _: on_progress(before + weight * done, total))


def _size(model: OPTModel, kind: Kind) -> int:
    return model.config.ffn_dim if kind == "mlp" else model.config.num_heads


class Means:
    """Running means of figures that have a name and a layer; NaN is no figure."""

    def __init__(self) -> None:
        self._sums: dict[tuple[str, int], Tensor] = {}

    def add(self, name: str, layer: int, figures: Tensor) -> None:
        """``figures`` of any shape, one a token or pair of tokens."""
        figures = figures.double()
        pair = torch.stack([figures.nansum(), (~figures.isnan()).sum().double()])
        self._sums[name, layer] = self._sums.get((name, layer), 0) + pair

    def get(self, name: str, layer: int) -> float | None:
        """The mean; None if there were no figures."""
        total, count = self._sums.get((name, layer), torch.zeros(2)).tolist()
        return total / count if count else None


class Contributions:
    """What each of a layer's ``n`` neurons or heads adds to the residual stream: the mean, and a sample.

    The sample takes every so-many-th number, of at most ``room``; ``expected`` tokens are to come.
    """

    def __init__(self, n: int, expected: int, room: int) -> None:
        self.n = n
        self.tokens = 0
        self.total: Tensor | float = 0.0
        self.sample: list[Tensor] = []
        self.stride = max(1, -(-n * expected // room))
        while math.gcd(self.stride, n) > 1:  # or some neurons would never be in the sample
            self.stride += 1

    def add(self, contributions: Tensor) -> None:
        """``[B, S, n]``."""
        flat = contributions.reshape(-1, self.n)
        self.tokens += len(flat)
        self.total = self.total + flat.sum(0).double()
        self.sample.append(flat.reshape(-1)[:: self.stride].float().clone())

    def mean(self) -> Tensor:
        """fp32 ``[n]``."""
        return (torch.as_tensor(self.total) / self.tokens).float()


class Observer(Selector):
    """Looks on in dense passes: figures of every layer, and what thresholds are chosen from.

    Args:
        tokens: how many are to come.
    """

    def __init__(self, model: OPTModel, tokens: int) -> None:
        config, tp = model.config, model.tp
        self.model = model
        self.means = Means()
        self.live: list[list[Tensor]] = [[] for _ in model.layers]
        room = _SAMPLE // config.num_layers
        self.contributions: dict[Kind, list[Contributions]] = {
            kind: [Contributions(_size(model, kind), tokens, room) for _ in model.layers] for kind in KINDS
        }
        self._head_scorers = [contribution(model, "heads", i) for i in model.layer_range]
        self._neuron_scorers = []
        for i in model.layer_range:
            (norms,) = contribution(model, "mlp", i).parameters()
            everyones = all_gather_last(norms[None, None], tp).flatten()
            self._neuron_scorers.append(NeuronContribution(everyones))
        self._attn_in = self._mlp_in = self._mlp_in_before = torch.empty(0)

    def observe(self, tap: Tap, residual: Tensor) -> None:
        x, layer = residual[:, 1:].float(), tap.layer
        if tap.point == "attn_in":
            self._attn_in = x
            return
        before, two_before = self._mlp_in, self._mlp_in_before
        self._mlp_in, self._mlp_in_before = x, before
        self.means.add("same", layer, torch.cosine_similarity(self._attn_in, x, dim=-1))
        if layer >= 1:
            self.means.add("next", layer - 1, torch.cosine_similarity(before, x, dim=-1))
        if layer >= 2:
            self.means.add("two_on", layer - 2, torch.cosine_similarity(two_before, x, dim=-1))

    def heads(self, layer: int, truth: Truth) -> Choice:
        y, block = truth(), self.model.layers[layer].self_attn
        self._block("heads", layer, block.out_proj(y.flatten(-2)), block.out_proj.bias, self._attn_in)
        scores = all_gather_last(self._head_scorers[layer](y), self.model.tp)[:, 1:]
        self._contributions("heads", layer, scores)
        return None

    def neurons(self, layer: int, truth: Truth) -> Choice:
        y, block = truth(), self.model.layers[layer].mlp
        self._block("mlp", layer, block.fc2(y), block.fc2.bias, self._mlp_in)
        y = all_gather_last(y, self.model.tp)[:, 1:]
        self._contributions("mlp", layer, self._neuron_scorers[layer](y))
        self._live(layer, y > 0)
        return None

    def _block(self, kind: Kind, layer: int, partial: Tensor, bias: Tensor | None, x: Tensor) -> None:
        """How large a block's output is beside the stream ``x`` that entered it, ``|F(x)| / |x|``."""
        out = all_reduce(partial, self.model.tp)[:, 1:].float()
        out = out if bias is None else out + bias
        before = x.norm(dim=-1)
        self.means.add(f"{kind}_ratio", layer, out.norm(dim=-1) / before)
        self.means.add(f"{kind}_before", layer, before)
        self.means.add(f"{kind}_after", layer, (x + out).norm(dim=-1))

    def _contributions(self, kind: Kind, layer: int, scores: Tensor) -> None:
        self.contributions[kind][layer].add(scores)
        for part in scores.split(max(1, _SORTED // scores[0].numel())):
            for share, figures in zip(SHARES, carrying(part, SHARES), strict=True):
                self.means.add(f"{kind}_{share}", layer, figures)

    def _live(self, layer: int, live: Tensor) -> None:
        """``bool[B, S, n]``: the exact active sets."""
        self.live[layer].append(live.sum(-1).flatten().cpu())
        overlap, by_chance = jaccard(live[:, 1:], live[:, :-1])
        self.means.add("overlap", layer, overlap)
        self.means.add("overlap_by_chance", layer, by_chance)
        if len(live) > 1:
            self.means.add("overlap_unrelated", layer, jaccard(live, live.roll(1, 0))[0])
        for batch in BATCHES:
            if not len(live):
                return
            self.means.add(f"union_{batch}", layer, live.float().mean(-1))
            pairs = len(live) // 2
            live = live[:pairs] | live[pairs : 2 * pairs]

    def layers(self) -> list[dict[str, Any]]:
        """One row a layer; shares are fractions, of neurons or heads.

        ``live_mean``, ``live_p5``, ``live_p95``: of the ReLU's outputs, over tokens. ``neurons_90``: the
        fewest that make up 90% of what all add up to, the mean over tokens. ``overlap``: of the live sets of
        neighbouring tokens, Jaccard's index; ``overlap_unrelated``: of the same position in another window;
        ``overlap_by_chance``: of random sets as large as the neighbours'. ``union``: what some sequence of a
        batch needs. ``cosine``: of the stream at ``mlp_in`` with the same layer's ``attn_in``, the next
        ``mlp_in``, the one after. ``attention_ratio``, ``mlp_ratio``: ``|F(x)| / |x|`` of the blocks.
        """
        return [self._layer(layer) for layer in range(len(self.live))]

    def _layer(self, layer: int) -> dict[str, Any]:
        get = self.means.get
        live = torch.cat(self.live[layer]).double() / self.model.config.ffn_dim
        low, high = live.sort().values[[round(q * (len(live) - 1)) for q in (0.05, 0.95)]].tolist()
        union = {str(b): get(f"union_{b}", layer) for b in BATCHES}
        return {
            "layer": layer,
            "live_mean": float(live.mean()),
            "live_p5": low,
            "live_p95": high,
            **{f"neurons_{share}": get(f"mlp_{share}", layer) for share in SHARES},
            **{f"heads_{share}": get(f"heads_{share}", layer) for share in SHARES},
            **{k: get(k, layer) for k in ("overlap", "overlap_unrelated", "overlap_by_chance")},
            "union": {batch: share for batch, share in union.items() if share is not None},
            "cosine": {k: get(k, layer) for k in ("same", "next", "two_on")},
            "attention_ratio": get("heads_ratio", layer),
            "mlp_ratio": get("mlp_ratio", layer),
        }

    def scale(self, kind: Kind) -> list[float]:
        """Of each layer: what contributions count beside, the geometric mean of the stream's norms before and
        after the block. The first alone overrates a layer that outgrows its input, the second underrates it;
        each was far worse than both on one of two models tried."""
        norms = [
            [self.means.get(f"{kind}_{place}", layer) for place in ("before", "after")]
            for layer in range(len(self.live))
        ]
        return [math.sqrt((before or 1.0) * (after or 1.0)) for before, after in norms]

    def mean(self, kind: Kind) -> list[Tensor]:
        """Of each layer: fp32 ``[n]``, the mean contributions."""
        return [c.mean() for c in self.contributions[kind]]

    def sample(self, kind: Kind) -> list[Tensor]:
        """Of each layer: some of the contributions."""
        return [torch.cat(c.sample) for c in self.contributions[kind]]


@torch.inference_mode()
def observe(engine: Engine, windows: Tensor, on_progress: OnProgress | None = None) -> Observer:
    """Dense passes over ``windows [n, S + 1]``, in random order: those of a batch have nothing to do with
    each other, as a server's requests."""
    model = engine.model
    seen = Observer(model, windows.shape[0] * (windows.shape[1] - 2))
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))
    for done in range(0, len(windows), BATCHES[-1]):
        token_ids = windows[order[done : done + BATCHES[-1]], :-1].to(engine.tp.device)
        cache = model.empty_cache(*token_ids.shape)
        step = cache.prompt(token_ids.shape[1])
        model(model.embed(token_ids, step.positions), cache, step, seen)
        if on_progress is not None:
            on_progress(done + len(token_ids), len(windows))
    return seen


def carrying(contributions: Tensor, percents: Sequence[int]) -> list[Tensor]:
    """The smallest share of the neurons or heads that makes up so many percent of what all add up to.

    ``contributions [..., n]``, none negative, to one ``[...]`` a percentage; 0 where nothing adds anything.
    """
    most = int((contributions > 0).sum(-1).max())
    running = contributions.topk(max(most, 1), dim=-1).values.cumsum(-1)
    total = running[..., -1:]
    return [
        ((running < total * (percent / 100)).sum(-1) + (total[..., 0] > 0)) / contributions.shape[-1]
        for percent in percents
    ]


def jaccard(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Of sets ``bool[..., n]``: the share of their union that both have, and what it would be for random sets
    of their sizes. NaN where both are empty."""
    together, shared = a.sum(-1) + b.sum(-1), (a & b).sum(-1)
    expected = a.sum(-1) * b.sum(-1) / a.shape[-1]
    return shared / (together - shared), expected / (together - expected)


class Trial(NamedTuple):
    """A selection to judge, and what its row says of it; ``first`` looks on in a dense pass before."""

    row: dict[str, Any]
    selector: Selector
    first: Selector | None = None


class Recorder(Selector):
    """The first of two passes: notes how many thresholds each contribution is above, ``uint8[B, S, n]`` of
    the local neurons or heads; the second pass reads it with `Recorded`.

    Args:
        thresholds: ``[L, number]``, ascending.
    """

    def __init__(self, scorers: Sequence[nn.Module], kind: Kind, thresholds: Tensor) -> None:
        self.kind = kind
        self.scorers = scorers
        self.thresholds = thresholds
        self.levels: dict[int, Tensor] = {}

    def heads(self, layer: int, truth: Truth) -> Choice:
        return self._note("heads", layer, truth)

    def neurons(self, layer: int, truth: Truth) -> Choice:
        return self._note("mlp", layer, truth)

    def _note(self, kind: Kind, layer: int, truth: Truth) -> Choice:
        if kind == self.kind:
            levels = torch.bucketize(self.scorers[layer](truth()), self.thresholds[layer])
            self.levels[layer] = levels.to(torch.uint8)
        return None


class Recorded(nn.Module):
    """Scores from the pass before: above ``k`` where the contribution was above threshold k."""

    def __init__(self, recorder: Recorder, layer: int) -> None:
        super().__init__()
        self.recorder = recorder
        self.layer = layer

    def forward(self, positions: Tensor) -> Tensor:
        """``positions [B, S]`` to scores ``[B, S, n]``."""
        return self.recorder.levels[self.layer]


class Without(Selector):
    """Skips one block: nothing of it is left but its output bias."""

    def __init__(self, kind: Kind, layer: int, device: torch.device) -> None:
        self.kind = kind
        self.layer = layer
        self.nothing = Masked(torch.zeros(1, 1, 1, dtype=torch.bool, device=device))

    def heads(self, layer: int, truth: Truth) -> Choice:
        return self.nothing if (self.kind, self.layer) == ("heads", layer) else None

    def neurons(self, layer: int, truth: Truth) -> Choice:
        return self.nothing if (self.kind, self.layer) == ("mlp", layer) else None


class InParallel(Selector):
    """The MLP of some layers reads what their attention block reads."""

    def __init__(self, model: OPTModel, layers: Iterable[int]) -> None:
        self.model = model
        self.layers = frozenset(layers)
        self._attn_in = torch.empty(0)

    def observe(self, tap: Tap, residual: Tensor) -> None:
        if tap.point == "attn_in":
            self._attn_in = residual

    def neurons(self, layer: int, truth: Truth) -> Choice:
        if layer not in self.layers:
            return None
        decoder, x = self.model.layers[layer], self._attn_in
        hidden = decoder.mlp.hidden(decoder.final_layer_norm(x) if decoder.pre_norm else x)
        # nothing is chosen, and these activations stand in for all of them
        return Masked(torch.zeros_like(hidden, dtype=torch.bool), HeadMean(hidden, hidden))


def trials(engine: Engine, seen: Observer, kind: Kind, densities: Sequence[float]) -> list[Trial]:
    """Ways to select neurons or heads, each at each density (the mean over tokens and layers).

    ``oracle``: contributions above a threshold, judged in the sparse run itself; ``two-pass``: the same,
    but judged in a dense run before; ``static``: the same ones for every token, by their mean contribution;
    ``random``. Oracle and static have one threshold for all layers, of contributions beside
    `Observer.scale`. Where it is 0 all that adds anything is chosen: of several such densities the oracles
    are tried at the smallest.
    """
    model, tp = engine.model, engine.tp
    every = range(model.config.num_layers)
    truth = [contribution(model, kind, layer) for layer in every]
    local = tp.shard(_size(model, kind))
    ids = torch.arange(local.start, local.stop, device=tp.device)
    averages = seen.mean(kind)
    static = [Static(mean[local].clone()) for mean in averages]
    chance = [Random(ids, layer=layer, seed=0) for layer in every]
    scale, sample = seen.scale(kind), seen.sample(kind)

    oracle = _once_exact({density: thresholds_for(sample, scale, density) for density in sorted(densities)})
    # ascending, as densities descend
    noted = torch.tensor(list(oracle.values()), device=tp.device).flip(0).T.contiguous()
    recorder = Recorder(truth, kind, noted)
    recorded = [Recorded(recorder, layer) for layer in every]
    places = reversed(range(len(oracle)))

    def trial(
        policy: str, density: float, scorers: Sequence[nn.Module], thresholds: Sequence[float]
    ) -> Trial:
        units = [
            Unit(kind, layer, None, scorer, sees_truth=policy == "oracle", threshold=threshold)
            for layer, scorer, threshold in zip(every, scorers, thresholds, strict=True)
        ]
        selector = Policy(units, len(every), name=policy, sharing="mask", dense_until=1)
        row = {"kind": kind, "policy": policy, "density_asked": density}
        return Trial(row, selector, recorder if policy == "two-pass" else None)

    return [
        *(trial("oracle", d, truth, t) for d, t in oracle.items()),
        *(trial("two-pass", d, recorded, [k] * len(every)) for d, k in zip(oracle, places, strict=True)),
        *(trial("static", d, static, thresholds_for(averages, scale, d)) for d in sorted(densities)),
        *(trial("random", d, chance, [1 - d] * len(every)) for d in sorted(densities)),
    ]


def thresholds_for(contributions: Sequence[Tensor], scale: Sequence[float], density: float) -> list[float]:
    """A threshold for each layer's contributions, above which so large a share of all layers' together lies;
    the same number for all layers, of contributions divided by their layer's ``scale``."""
    beside = torch.cat([c.flatten() / s for c, s in zip(contributions, scale, strict=True)])
    left_out = len(beside) - round(density * len(beside))
    if not left_out:
        return [-1.0] * len(scale)
    below = float(beside.kthvalue(left_out).values)
    above = float(beside.kthvalue(min(left_out + 1, len(beside))).values)
    cut = below and (below + above) / 2  # between the two, so that rounding decides nothing
    return [cut * s for s in scale]


def _once_exact(thresholds: dict[float, list[float]]) -> dict[float, list[float]]:
    """Of the densities whose thresholds are 0, all of which choose the same, only the smallest."""
    exact = [density for density, t in thresholds.items() if not any(t)]
    return {density: t for density, t in thresholds.items() if density not in exact[1:]}


def optional_trials(engine: Engine) -> list[Trial]:
    """Each block skipped, each MLP beside its attention block instead of after it, and all of them so."""
    model = engine.model
    every = range(model.config.num_layers)
    skipped = [
        Trial({"kind": kind, "policy": "skip", "layer": layer}, Without(kind, layer, model.tp.device))
        for kind in KINDS
        for layer in every
    ]
    beside = [Trial({"kind": "mlp", "policy": "parallel", "layer": i}, InParallel(model, [i])) for i in every]
    together = Trial({"kind": "mlp", "policy": "parallel", "layer": None}, InParallel(model, every))
    return [*skipped, *beside, together]


def judge(
    engine: Engine, windows: Tensor, tried: Sequence[Trial], on_progress: OnProgress | None = None
) -> tuple[Scores, list[Scores]]:
    """The scores on ``windows [n, S + 1]`` of dense, and of each trial."""
    config = engine.model.config
    firsts = list(dict.fromkeys(trial.first for trial in tried if trial.first is not None))
    selectors = [EVERYTHING, *firsts, *(trial.selector for trial in tried)]
    noted = config.num_layers * (windows.shape[1] - 1) * config.ffn_dim // engine.tp.size
    parts = []
    done = 0
    for part in windows.split(max(1, _RECORD_BYTES // noted)):
        parts.append(masked(engine, part, selectors, on_progress=_shifted(on_progress, done, len(windows))))
        done += len(part)
    dense, *scores = [_joined(column) for column in zip(*parts, strict=True)]
    return dense, scores[len(firsts) :]


def _shifted(on_progress: OnProgress | None, before: int, total: int) -> OnProgress | None:
    return on_progress and (lambda done, _: on_progress(before + done, total))


def _joined(parts: Sequence[Scores]) -> Scores:
    loss, kl, top1 = (torch.cat([getattr(p, name) for p in parts]) for name in ("loss", "kl", "top1"))
    return Scores(loss, kl, top1, parts[0].prefix)


def _perplexity(scores: Scores) -> float:
    return math.exp(float(scores.loss.double().mean()))


def _row(engine: Engine, trial: Trial, scores: Scores, dense: Scores) -> dict[str, Any]:
    row = dict(trial.row)
    if isinstance(trial.selector, Policy):
        row["density"] = engine.mean_density(trial.selector, row["kind"])
    increase, low, high = scores.increase(dense)
    return {
        **row,
        "ppl": _perplexity(scores),
        "ppl_increase": increase,
        "low": low,
        "high": high,
        "kl": float(scores.kl.double().mean()),
        "top1": float(scores.top1.mean()),
    }
