"""The CUDA driver's own interface, for the few things that torch and Triton do not reach."""

import ctypes
from functools import cache
from typing import Any


def call(name: str, *arguments: Any) -> None:
    """Calls a function of the driver, with ctypes' types or plain numbers.

    Raises:
        RuntimeError: it returned an error.
    """
    if status := getattr(_library(), name)(*arguments):
        raise RuntimeError(f"{name} failed with CUDA error {status}")


@cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")
