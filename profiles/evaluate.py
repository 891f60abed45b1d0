"""Policies side by side on one text: quality, densities, and the bytes that they read.

Shares of bytes are of what a token reads of the dense weights in 16 bits, over all layers.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dejavu.predictors.corpus import Corpus
from dejavu.predictors.files import Entry, ModelIdentity, read_manifest
from dejavu.predictors.meter import Account, Metered, dense_bytes, sparse_bytes
from dejavu.predictors.selection import KINDS, Kind, Policy
from dejavu.profiles.quality import Scores, decode, masked
from dejavu.runtime.engine import Engine
from dejavu.runtime.sparsity import DENSE, LOSSLESS, find_predictors, identity, load_policy

OnProgress = Callable[[str, int, int], None]
# The shapes of OPT-175B, and the ranks that the paper's predictors have there.
OPT_175B = ModelIdentity(fingerprint="", hidden_size=12288, ffn_dim=49152, num_layers=96, num_heads=96)
_RANKS_175B: Mapping[Kind, int] = {"mlp": 1024, "heads": 512}
# Windows that the accounts (recall, live rows) are kept on.
_ACCOUNT_WINDOWS = 32


@dataclass(frozen=True, slots=True)
class Asked:
    """A policy to evaluate: what `load_policy` takes. ``density`` None is the default point."""

    sparsity: str
    density: float | None = None


def evaluate(
    engine: Engine,
    corpus: Corpus,
    asked: Sequence[Asked],
    *,
    prefixes: Sequence[int] = (1, 256),
    on_progress: OnProgress | None = None,
) -> list[dict[str, Any]]:
    """A row for every policy and prefix, dense first.

    Args:
        corpus: text that the predictors have not seen.
        asked: the policies; ``dense`` is added if it is not there.
        prefixes: so many tokens of each window are dense, as a prompt is; the rest is decoded and scored.

    Raises:
        ValueError: a policy that can't be loaded, or has seen the text; a prefix as long as the windows.
    """
    window = corpus.windows.shape[1] - 1
    if bad := [prefix for prefix in prefixes if not 0 < prefix < window]:
        raise ValueError(f"a prefix of {bad[0]} leaves nothing of windows of {window} tokens")
    loaded = engine.tp.agree(lambda: [(a, _load(engine, corpus, a)) for a in asked])
    sparse = [(a, policy) for a, policy in loaded if policy is not None]
    rows = []
    for prefix in prefixes:

        def progress(done: int, total: int, prefix: int = prefix) -> None:
            if on_progress is not None:
                on_progress(f"decoding after {prefix}", done, total)

        dense, *scores = decode(
            engine,
            corpus.windows,
            [None, *(policy for _, policy in sparse)],
            prefix=prefix,
            on_progress=progress,
        )
        rows.append(_row(Asked(DENSE), prefix, dense, dense, {"mlp": 1.0, "heads": 1.0}, {}))
        for (a, policy), score in zip(sparse, scores, strict=True):
            densities = {kind: engine.mean_density(policy, kind) for kind in KINDS}
            accounts = _accounts(engine, corpus, a, policy, prefix, score)
            rows.append(_row(a, prefix, score, dense, densities, accounts))
    return rows


def _load(engine: Engine, corpus: Corpus, asked: Asked) -> Policy | None:
    policy = load_policy(
        asked.sparsity, engine.model, engine.fingerprint, density=asked.density, sharing="each"
    )
    if asked.sparsity not in (DENSE, LOSSLESS):
        corpus.check_unused(read_manifest(find_predictors(asked.sparsity)).sources, asked.sparsity)
    return policy


def _row(
    asked: Asked,
    prefix: int,
    scores: Scores,
    dense: Scores,
    densities: Mapping[Kind, float],
    accounts: Mapping[str, float],
) -> dict[str, Any]:
    increase, low, high = scores.increase(dense)
    name = asked.sparsity if asked.density is None else f"{asked.sparsity} at {asked.density:g}"
    return {
        "policy": Path(name).name,
        "prefix": prefix,
        "tokens": scores.loss.numel(),
        "density_mlp": densities["mlp"],
        "density_heads": densities["heads"],
        "ppl": math.exp(float(scores.loss.double().mean())),
        "ppl_increase": increase,
        "ppl_increase_low": low,
        "ppl_increase_high": high,
        "top1": float(scores.top1.mean()),
        "kl": float(scores.kl.mean()),
        "icl": scores.in_context(),
        **accounts,
    }


def _accounts(
    engine: Engine, corpus: Corpus, asked: Asked, policy: Policy, prefix: int, decoded: Scores
) -> dict[str, float]:
    """Shares of bytes, recall and precision; and by how much a masked pass differs from decoding."""
    windows = corpus.windows[:_ACCOUNT_WINDOWS]
    units = list(policy.units.values())
    meter = Metered(
        Policy(units, policy.num_layers, name=policy.name, sharing="mask", dense_until=prefix), engine.model
    )
    (found,) = masked(engine, windows, [meter], prefix=prefix)
    mean = float(decoded.loss[: len(windows)].double().mean())
    accounts = meter.accounts(engine.tp)
    row = {"masked_loss_difference": float(found.loss.double().mean()) / mean - 1}
    if asked.sparsity == LOSSLESS:
        entries: list[Entry] = []
    else:
        entries = [e for e in read_manifest(find_predictors(asked.sparsity)).entries if not e.dense]
    for kind in KINDS:
        layers = {layer: a for (k, layer), a in accounts.items() if k == kind}
        if not layers:
            continue
        kept = {
            name: sum(getattr(a, name) for a in layers.values()) / len(layers)
            for name in ("recall", "weighted_recall", "precision")
        }
        row |= {f"{name}_{kind}": value for name, value in kept.items()}
    model = identity(engine.model.config, engine.fingerprint)
    row["density_fc2"] = _mean(
        (accounts[key].live if (key := ("mlp", layer)) in accounts else 1.0)  # type: ignore[index]
        for layer in range(model.num_layers)
    )
    row |= _shares(entries, accounts, model, model.num_layers, "")
    scaled = [_scaled(e) for e in entries]
    return row | _shares(scaled, accounts, OPT_175B, model.num_layers, "_opt_175b")


def _shares(
    entries: Sequence[Entry],
    accounts: Mapping[tuple[Kind, int], Account],
    model: ModelIdentity,
    layers: int,
    suffix: str,
) -> dict[str, float]:
    """What is read of the MLPs, and of MLPs and attention together, as a share of dense; and by predictors.

    ``model`` gives the sizes, ``layers`` is how many were measured. A lossless policy has accounts and no
    entries: it reads fc1 in full, and the live rows of fc2.
    """
    by_key = {(e.kind, e.layer): e for e in entries}
    read: dict[Kind, list[float]] = {kind: [] for kind in KINDS}
    predictor = []
    for kind in KINDS:
        for layer in range(layers):
            account, entry = accounts.get((kind, layer)), by_key.get((kind, layer))
            if account is None:
                read[kind].append(dense_bytes(kind, model))
            elif entry is None:
                read[kind].append(dense_bytes(kind, model) * (1 + account.live) / 2)
            else:
                read[kind].append(sparse_bytes(entry, account, model))
                if kind == "mlp":
                    chosen = dense_bytes(kind, model) * (account.density + account.live) / 2
                    predictor.append((read[kind][-1] - chosen) / dense_bytes(kind, model))
    mlp, heads = (sum(read[kind]) / layers for kind in KINDS)
    whole = dense_bytes("mlp", model) + dense_bytes("heads", model)
    return {
        f"predictor_share_mlp{suffix}": sum(predictor) / layers,
        f"total_share_mlp{suffix}": mlp / dense_bytes("mlp", model),
        f"total_share{suffix}": (mlp + heads) / whole,
    }


def _scaled(entry: Entry) -> Entry:
    """The entry with OPT-175B's rank in place of this model's."""
    return entry if entry.rank is None else entry.model_copy(update={"rank": _RANKS_175B[entry.kind]})


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)
