"""How much a selection costs: loss, agreement with dense, and in-context learning, teacher forced.

`decode` runs the real path, token by token with the cache, each sequence with its own sets (the semantics of
batch 1). `masked` gives the same numbers in one pass over whole windows, for searching: what is not chosen is
computed and taken out again.

Shape legend: n windows, B windows at a time, S tokens of a window, V vocabulary.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dejavu.predictors.selection import EVERYTHING, Policy, Selector
from dejavu.runtime.decoding import Decoder
from dejavu.runtime.engine import Engine
from dejavu.runtime.sampling import SamplingParams

OnProgress = Callable[[int, int], None]
# Memory for the logits of the windows that are run together.
_LOGITS_BYTES = {"cpu": 2**29, "cuda": 2**34}


@dataclass(frozen=True, slots=True)
class Scores:
    """Of every predicted token: ``loss`` in nats, ``kl`` from dense, ``top1``, 1 where the likeliest token is
    dense's; fp32 ``[n, S - prefix]`` on the CPU. Columns are positions from ``prefix`` on."""

    loss: Tensor
    kl: Tensor
    top1: Tensor
    prefix: int

    def increase(self, dense: "Scores") -> tuple[float, float | None, float | None]:
        """The relative increase of perplexity and its 95% interval, from paired differences of windows; one
        window has no interval."""
        difference = (self.loss - dense.loss).double().mean(1)
        mean = float(difference.mean())
        n = len(difference)
        if n == 1:
            return math.expm1(mean), None, None
        half = 1.96 * float(difference.std()) / math.sqrt(n)
        return math.expm1(mean), math.expm1(mean - half), math.expm1(mean + half)

    def in_context(self) -> float | None:
        """Loss at token 50 minus that at token 500, the mean over windows; None if they are too short."""
        early, late = 49 - self.prefix, 499 - self.prefix
        if early < 0 or late >= self.loss.shape[1]:
            return None
        return float((self.loss[:, early] - self.loss[:, late]).mean())


def masked(
    engine: Engine,
    windows: Tensor,
    selectors: Sequence[Selector],
    *,
    prefix: int = 1,
    on_progress: OnProgress | None = None,
) -> list[Scores]:
    """Each selector's scores on ``windows [n, S + 1]``, in whole passes; a dense pass comes first each time.

    Policies must have ``sharing="mask"`` and ``dense_until=prefix`` to agree with `decode`.
    """
    parts: list[list[Scores]] = [[] for _ in selectors]
    for batch in _batches(engine, windows, on_progress):
        dense = whole_pass(engine, batch[:, :-1], EVERYTHING)[:, prefix:]
        for part, selector in zip(parts, selectors, strict=True):
            logits = dense
            if selector is not EVERYTHING:
                logits = whole_pass(engine, batch[:, :-1], selector)[:, prefix:]
            part.append(_score(logits, dense, batch[:, 1 + prefix :], prefix))
    return [_join(part) for part in parts]


def decode(
    engine: Engine,
    windows: Tensor,
    policies: Sequence[Policy | None],
    *,
    prefix: int = 1,
    on_progress: OnProgress | None = None,
) -> list[Scores]:
    """Each policy's scores on ``windows [n, S + 1]``, decoding token by token after ``prefix`` dense ones.

    Policies must have ``sharing="each"``. None is dense decoding.
    """
    parts: list[list[Scores]] = [[] for _ in policies]
    # a decoder for each, which launches step by step: a recorded step would keep its keys and values for ever
    decoders = [
        Decoder(engine.model, engine.tp, policy, engine.fill_kv, cuda_graph=False) for policy in policies
    ]
    for batch in _batches(engine, windows, on_progress):
        dense = whole_pass(engine, batch[:, :-1], EVERYTHING)[:, prefix:]
        for part, decoder in zip(parts, decoders, strict=True):
            part.append(_decode(decoder, batch, dense, prefix))
    return [_join(part) for part in parts]


@torch.inference_mode()
def whole_pass(engine: Engine, token_ids: Tensor, selector: Selector) -> Tensor:
    """``token_ids [B, S]`` to the logits after every one of them ``[B, S, V]``."""
    model = engine.model
    cache = model.empty_cache(*token_ids.shape)
    step = cache.prompt(token_ids.shape[1])
    return model.logits(model(model.embed(token_ids, step.positions), cache, step, selector))


@torch.inference_mode()
def _decode(decoder: Decoder, batch: Tensor, dense: Tensor, prefix: int) -> Scores:
    length = batch.shape[1] - 1
    params = SamplingParams(max_new_tokens=length - prefix + 1, ignore_eos=True)
    state = decoder.prefill(batch[:, :prefix].tolist(), [params] * len(batch))
    steps = []
    for i in range(prefix, length):
        state.tokens.copy_(batch[:, i])
        logits = decoder.decode_step(state)
        steps.append(_score(logits[:, None], dense[:, i - prefix, None], batch[:, i + 1, None], prefix))
    return _join(steps, dim=1)


def _score(logits: Tensor, dense: Tensor, targets: Tensor, prefix: int) -> Scores:
    """``logits`` and ``dense [B, S, V]``, ``targets [B, S]``."""
    rows = [
        (
            -p.gather(-1, target[..., None])[..., 0],
            (q.exp() * (q - p)).sum(-1),
            (p.argmax(-1) == q.argmax(-1)).float(),
        )
        for p, q, target in (
            (x.log_softmax(-1), y.log_softmax(-1), target)
            for x, y, target in zip(logits.split(8), dense.split(8), targets.split(8), strict=True)
        )
    ]
    loss, kl, top1 = (torch.cat(column).float().cpu() for column in zip(*rows, strict=True))
    return Scores(loss, kl, top1, prefix)


def _join(parts: Sequence[Scores], dim: int = 0) -> Scores:
    """Windows after windows (``dim`` 0) or positions after positions (1)."""
    return Scores(
        loss=torch.cat([part.loss for part in parts], dim),
        kl=torch.cat([part.kl for part in parts], dim),
        top1=torch.cat([part.top1 for part in parts], dim),
        prefix=parts[0].prefix,
    )


def _batches(engine: Engine, windows: Tensor, on_progress: OnProgress | None) -> Iterator[Tensor]:
    """Windows on the device, as many at a time as there is memory for."""
    config, device = engine.model.config, engine.tp.device
    per_window = 4 * config.vocab_size * (windows.shape[1] - 1)
    size = max(1, min(_LOGITS_BYTES[device.type] // per_window, 128))
    for done in range(0, len(windows), size):
        yield windows[done : done + size].to(device)
        if on_progress is not None:
            on_progress(min(done + size, len(windows)), len(windows))
