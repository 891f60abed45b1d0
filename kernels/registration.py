"""Kernels as torch custom ops: the dispatcher takes the launch on CUDA and the reference on the CPU."""

from collections.abc import Callable

import torch

_LIBRARY = torch.library.Library("dejavu", "DEF")


def register(
    name: str, *, cuda: Callable[..., None], cpu: Callable[..., None], mutates: set[str]
) -> Callable[..., None]:
    """The op ``dejavu::name``, which writes to its arguments ``mutates`` and returns nothing.

    Registered by hand: a first call of `torch.library.custom_op` imports the compiler, for most of a second.
    """
    _LIBRARY.define(name + torch.library.infer_schema(cuda, mutates_args=mutates))
    _LIBRARY.impl(name, cuda, "CUDA")
    _LIBRARY.impl(name, cpu, "CPU")
    torch.library.register_fake(f"dejavu::{name}", lambda *arguments: None, lib=_LIBRARY)
    op: Callable[..., None] = getattr(torch.ops.dejavu, name).default
    return op
