"""NVTX ranges: one helper, domain ``dejavu``, a category per kind, fixed names.

The names, outermost first: ``load``; ``prefill`` and ``decode`` (a step); ``embed``, ``layer.N``,
``layer.N/attention``, ``layer.N/mlp``, ``head``, ``sample`` (compute); ``all_reduce`` and ``all_gather``
(collective), inside whatever called them; between the stages of a pipeline ``receive``, ``send`` and, of the
tokens, ``broadcast`` (collective); in a sparse step ``layer.N/attention/predict`` and
``layer.N/mlp/predict`` (where the tap is passed; packed predictors select there, too), ``.../select``,
``layer.N/attention/fill`` (kv; before all heads are looked at; a sparse step fills inside its attention);
``verify``, a dense step beside it.

Each rank leaves a mark ``rank R of N``.

Ranges are off until `enable` is called or ``DEJAVU_NVTX=1`` is set. Off, a range costs one comparison. With
``DEJAVU_TORCH_PROFILE`` they go to torch's profiler instead, as ``dejavu:CATEGORY:NAME``.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any, Literal

Category = Literal["compute", "collective", "predict", "select", "kv"]

DOMAIN = "dejavu"
_COLORS = {
    "compute": "blue",
    "collective": "red",
    "predict": "green",
    "select": "yellow",
    "kv": "purple",
}
_OFF: AbstractContextManager[Any] = nullcontext()
# Where torch's profiler writes its traces, if it is the one that looks on (`dejavu profile --with torch`).
TORCH_TRACES = "DEJAVU_TORCH_PROFILE"
_enabled = os.environ.get("DEJAVU_NVTX") == "1" or TORCH_TRACES in os.environ
Listener = Callable[[str, Category], AbstractContextManager[Any]]
_listener: Listener | None = None


def enable(on: bool = True) -> None:
    """Turns the ranges of this process on (or off again)."""
    global _enabled
    _enabled = on


def is_on() -> bool:
    """Whether ranges are emitted."""
    return _enabled


def nvtx_range(name: str, category: Category = "compute") -> AbstractContextManager[Any]:
    """A context manager that marks the enclosed host code with a range in the domain ``dejavu``."""
    if not _enabled:
        return _OFF
    return _annotation(name, category) if _listener is None else _heard(_listener, name, category)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """``listener(name, category)`` wraps every range of the enclosed code, too, if ranges are on."""
    global _listener
    _listener = listener
    try:
        yield
    finally:
        _listener = None


@contextmanager
def _heard(listener: Listener, name: str, category: Category) -> Iterator[None]:
    with _annotation(name, category), listener(name, category):
        yield


def mark(text: str) -> None:
    """A point in time in the domain ``dejavu``."""
    if _enabled and TORCH_TRACES not in os.environ:
        import nvtx

        nvtx.mark(text, domain=DOMAIN)


def _annotation(name: str, category: Category) -> AbstractContextManager[Any]:
    if TORCH_TRACES in os.environ:
        import torch

        return torch.profiler.record_function(f"{DOMAIN}:{category}:{name}")
    return _nvtx_annotation(name, category)


@cache  # the names are few, and building their attributes is the costly part
def _nvtx_annotation(name: str, category: Category) -> AbstractContextManager[Any]:
    import nvtx

    annotation: AbstractContextManager[Any] = nvtx.annotate(
        name, color=_COLORS[category], domain=DOMAIN, category=category
    )
    return annotation
