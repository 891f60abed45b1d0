"""A stream of requests: JSON lines in, JSON lines out, batched as they come.

A request is ``{"prompt": "..."}``, with any field of `SamplingParams` and an ``id`` of the caller's choice
beside it. Its answer is ``{"id", "text", "token_ids", "finish_reason"}``, or ``{"id", "error"}``. The answers
come in the order of the requests.
"""

import json
import queue
import threading
from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from typing import Any

from dejavu.runtime.engine import Engine, ShallStop
from dejavu.runtime.preemption import Preemption
from dejavu.runtime.sampling import SamplingParams

_SETTINGS = {field.name for field in fields(SamplingParams)}
# How soon a signal is noticed while there is nothing to do, on whatever rank it came.
_IDLE_S = 1.0
# How long a batch that has begun waits for one more request: enough for a pipe, too short to be felt.
_GATHER_S = 0.01


def answer_stream(
    engine: Engine,
    lines: Iterable[bytes],
    write: Callable[[str], None],
    *,
    defaults: SamplingParams,
    max_batch: int,
    preemption: Preemption,
) -> bool:
    """Answers every request of ``lines`` until they end. Rank 0 alone reads; every rank writes.

    Told to stop, it ends the answers it is at, leaves the requests behind them, and returns True.
    """
    world = engine.pipeline.world
    incoming = _Incoming(lines) if world.rank == 0 else None
    while not preemption.agreed():
        batch = world.broadcast_object(incoming.take(max_batch) if incoming is not None else None)
        if batch is None:
            return False
        for answer in _answer(engine, batch, defaults, preemption.after_token):
            write(json.dumps(answer))
    return True


def _answer(
    engine: Engine, lines: list[bytes], defaults: SamplingParams, shall_stop: ShallStop
) -> list[dict[str, Any]]:
    """The answers to one batch. A request that cannot be answered says why and does not harm the others."""
    answers: list[dict[str, Any]] = []
    accepted: list[tuple[dict[str, Any], str, SamplingParams]] = []
    for line in lines:
        answer: dict[str, Any] = {}
        answers.append(answer)
        try:
            request = _parse_json(line)
            if not isinstance(request, dict):
                raise ValueError("the request is not a JSON object")
            if "id" in request:
                answer["id"] = request.pop("id")
            prompt, params = _parse(request, defaults)
            engine.tokenize(prompt, params)
        except (ValueError, RecursionError) as e:  # the latter: JSON nested too deep
            answer["error"] = str(e)
        else:
            accepted.append((answer, prompt, params))
    if accepted:
        generation = engine.generate(
            [prompt for _, prompt, _ in accepted],
            [params for _, _, params in accepted],
            max_batch=len(accepted),
            shall_stop=shall_stop,
        )
        for (answer, _, _), result in zip(accepted, generation.results, strict=True):
            answer.update(text=result.text, token_ids=result.token_ids, finish_reason=result.finish_reason)
    return answers


def _parse_json(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError as e:
        raise ValueError(f"the line is not JSON: {e}") from None


def _parse(request: dict[str, Any], defaults: SamplingParams) -> tuple[str, SamplingParams]:
    if unknown := sorted(set(request) - _SETTINGS - {"prompt"}):
        raise ValueError(f"unknown fields: {', '.join(unknown)}")
    settings = {name: value for name, value in request.items() if name != "prompt"}
    if isinstance(stop := settings.get("stop"), str | list):
        settings["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
    return request.get("prompt", ""), replace(defaults, **settings)


class _Incoming:
    """Lines, read by a thread of their own, so that a batch can be what has come so far."""

    def __init__(self, lines: Iterable[bytes]) -> None:
        self._queue: queue.Queue[bytes | None] = queue.Queue(maxsize=1024)
        threading.Thread(target=self._read, args=(lines,), daemon=True).start()

    def _read(self, lines: Iterable[bytes]) -> None:
        try:
            for line in lines:
                if line.strip():
                    self._queue.put(line)
        finally:
            self._queue.put(None)

    def take(self, max_batch: int) -> list[bytes] | None:
        """The next lines, at least one unless none comes for a while; None when there will be no more."""
        batch: list[bytes] = []
        while len(batch) < max_batch:
            try:
                line = self._queue.get(timeout=_GATHER_S if batch else _IDLE_S)
            except queue.Empty:
                break
            if line is None:
                if not batch:
                    return None
                self._queue.put(None)  # the end is for the next call
                break
            batch.append(line)
        return batch
