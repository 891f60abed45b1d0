"""NVTX ranges: one helper, domain ``dejavu``, a category per kind, fixed names.

The names, outermost first: ``load``; ``prefill`` and ``decode`` (a step); ``embed``, ``layer.N``,
``layer.N/attention``, ``layer.N/mlp``, ``head``, ``sample`` (compute); ``all_reduce`` and ``all_gather``
(collective), inside whatever called them; between the stages of a pipeline ``receive``, ``send`` and, of the
tokens, ``broadcast`` (collective); in a sparse step ``layer.N/attention/predict`` and
``layer.N/mlp/predict`` (where the tap is passed; packed predictors select there, too), ``.../select``,
``layer.N/attention/fill`` (kv; before all heads are looked at; a sparse step fills inside its attention);
``verify``, a dense step beside it.

Ranges are off until `enable` is called or ``DEJAVU_NVTX=1`` is set. Off, a range costs one comparison.
"""

import os
from contextlib import AbstractContextManager, nullcontext
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
_enabled = os.environ.get("DEJAVU_NVTX") == "1"


def enable(on: bool = True) -> None:
    """Turns the ranges of this process on (or off again)."""
    global _enabled
    _enabled = on


def nvtx_range(name: str, category: Category = "compute") -> AbstractContextManager[Any]:
    """A context manager that marks the enclosed host code with a range in the domain ``dejavu``."""
    return _annotation(name, category) if _enabled else _OFF


@cache  # the names are few, and building their attributes is the costly part
def _annotation(name: str, category: Category) -> AbstractContextManager[Any]:
    import nvtx

    annotation: AbstractContextManager[Any] = nvtx.annotate(
        name, color=_COLORS[category], domain=DOMAIN, category=category
    )
    return annotation
