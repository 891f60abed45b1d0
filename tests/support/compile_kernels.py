"""Compiles every kernel for Hopper, which needs no GPU: run by a test, in a process without the interpreter.

Launches are caught and compiled with the types of their arguments instead of being run.
"""

import os
import re
import sys

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from dejavu.kernels.predict import _predict
from dejavu.kernels.reduce_residual_norm import Inboxes, _reduce_residual_norm
from dejavu.kernels.residual_norm import _residual_norm
from dejavu.kernels.sparse_attention import _sparse_attention
from dejavu.kernels.sparse_mlp import _sparse_mlp
from dejavu.kernels.tokens import _count_down, _embed_rows, _likeliest
from dejavu.kernels.tuning import override

HOPPER = GPUTarget("cuda", 90, 32)
TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int8: "*i8",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
OPTIONS = ("num_warps", "num_stages", "launch_pdl")
# Kernels that read weights before they wait, and by how many loads at most.
EARLY_LOADS = {
    "_up_kernel": 1,
    "_residual_norm_kernel": 6,
    "_reduce_residual_norm_kernel": 12,
}
compiled = {}


def compile_launch(kernel, *args, grid, warmup, **kwargs):
    options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
    values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = TYPES[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
    source = ASTSource(kernel, signature, constants, attributes)
    found = triton.compile(source, target=HOPPER, options=options)
    if options.get("launch_pdl"):
        name, loads, ids = kernel.__name__, EARLY_LOADS.get(kernel.__name__, 0), 0
        if name == "_fc1_kernel" and values["HAS_IDS"] and values["ROWS"] == values["TOKENS"] == 1:
            loads, ids = 1, 2
        if name == "_up_kernel" and values["weight_ptr"].dtype == torch.float32:
            loads = 4
        if values.get("WORDS"):  # of a program's first rows
            loads = 2
        check_wait(name, found.asm["ptx"], loads, ids)
    if values.get("PDL"):
        check_successor(kernel.__name__, found.asm["ptx"])
    compiled[kernel.__name__, str(signature)] = len(found.asm["cubin"])


def check_wait(name, ptx, loads, ids):
    """Before a kernel that begins early waits, it writes nothing, and reads only weights, by so many loads,
    and ``ids`` volatile numbers: if any, an id and the count, each once, and again behind the wait."""
    before, wait, after = ptx.partition("griddepcontrol.wait")
    assert wait and not re.search(r"\b(st\.global|atom\.|red\.)", before), name
    assert len(re.findall(r"\bld\.global|\bcp\.async", before)) <= loads, name
    assert before.count("ld.volatile.global") == ids <= after.count("ld.volatile.global"), name


def check_successor(name, ptx):
    """A kernel lets its successor begin: a boundary behind its wait and before it polls its peers' words."""
    before, let, after = ptx.partition("griddepcontrol.launch_dependents")
    assert let, name
    if name == "_reduce_residual_norm_kernel":
        assert "griddepcontrol.wait" in before and "ld.volatile.global" not in before, name
        assert "ld.volatile.global" in after, name


def weight(*shape, dtype):
    scale = torch.ones(*shape[:-1], 1) if dtype.itemsize == 1 else None
    return torch.zeros(shape, dtype=dtype), scale


def every_launch(dtype, wide, B, D=256, F=128, N=2, H=64, T=40, W=64):
    """The launches of a layer, sparse and dense."""
    x, out = (torch.zeros(B, D, dtype=wide) for _ in range(2))
    ids, count = torch.arange(F, dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    for chosen in ((ids, count), (None, None)):
        fc1, fc2 = (weight(F, D, dtype=dtype) for _ in range(2))
        _sparse_mlp(x[:, None], *fc1, torch.empty(F, dtype=wide), *fc2, *chosen, out[:, None], None, None)
        tally, alive = torch.zeros(2, dtype=torch.int64), torch.ones(B, dtype=torch.int64)
        if chosen[0] is not None and B == 1:
            override["fc1"] = {"ROWS": 1, "BLOCK_D": D, "PROGRAMS": 8, "num_warps": 4}
            _sparse_mlp(x[:, None], *fc1, torch.empty(F, dtype=wide), *fc2, *chosen, out[:, None], None, None)
            del override["fc1"]
        if chosen[0] is None:
            _sparse_mlp(
                x[:, None], *fc1, torch.empty(F, dtype=wide), *fc2, *chosen, out[:, None], tally, alive
            )
    qkv, out_proj = weight(N, 3, H, D, dtype=dtype), weight(N, H, D, dtype=dtype)
    keys, values = torch.zeros(2, B, N, T, H, dtype=wide)
    # one head lacks all its keys, which takes the wide products, the other but a few
    positions, filled_to = torch.full((B,), T - 1), torch.tensor([0, T - 3]).repeat(B, 1)
    heads = torch.arange(N, dtype=torch.int32).repeat(B, 1), torch.full((B,), N, dtype=torch.int32)
    mean, base = torch.zeros(N, H, dtype=wide), torch.zeros(D, dtype=wide)
    bias, ring = torch.zeros(N, 3, H, dtype=wide), torch.zeros(B, W, D, dtype=wide)
    for lazy, chosen in ((True, heads), (False, heads), (False, (None, None))):
        state = (keys, values, filled_to if lazy else None, positions)
        means = (None, None) if chosen[0] is None else (mean, base)
        _sparse_attention(x, ring if lazy else None, *qkv, bias, *state, *out_proj, *chosen, *means, out, 3)
    _residual_norm(x, x, base, base, base, 1e-5, out, torch.empty_like(out))
    _residual_norm(None, x, None, base, base, 1e-5, None, out)
    tokens = torch.zeros(4, B, dtype=torch.int64)
    _embed_rows(tokens[0], ring[0], 3, out)
    _likeliest(torch.zeros(B, 9000), tokens[0])
    _count_down(*tokens)


def every_predictor(dtype, wide, B, D=256, F=128):
    """The launches of a predictor."""
    down, up = weight(64, D, dtype=dtype), weight(F, 64, dtype=dtype)
    places = (torch.empty(F, dtype=torch.int32), torch.empty(1, dtype=torch.int32))
    tally, threshold = torch.zeros(2, dtype=torch.int64), torch.zeros(1)
    x, alive = torch.zeros(B, D, dtype=wide), torch.ones(B, dtype=torch.int64)
    _predict(x, *down, torch.zeros(64), *up, torch.zeros(F), threshold, alive, *places, tally, True, False)


def every_collective(dtype, D, ranks=2, T=3):
    """The launches that wait for peers: compiled, but not run."""
    inboxes = Inboxes(torch.zeros(ranks, dtype=torch.int64), Inboxes.zero_epochs(), 1)
    x, d = torch.zeros(T, D, dtype=dtype), torch.zeros(D, dtype=dtype)
    _reduce_residual_norm(x, inboxes, x, d, d, d, 1e-5, x, x)
    _reduce_residual_norm(x, inboxes, x, None, None, None, 1e-5, x, x)
    _reduce_residual_norm(x, inboxes, None, None, None, None, 0.0, x, None)


if __name__ == "__main__":
    JITFunction.run = compile_launch
    for name, module in sys.modules.items():
        if name.startswith("dejavu.kernels.") and hasattr(module, "has_pdl"):
            module.has_pdl = lambda _: True
    for dtype in (torch.float16, torch.bfloat16):
        every_collective(dtype, D=12288)
        every_collective(dtype, D=250, ranks=4)
    for dtype, wide in (
        (torch.float32, torch.float32),
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.bfloat16),
        (torch.int8, torch.float16),
        (torch.float8_e4m3fn, torch.bfloat16),
    ):
        for B in (1, 3):
            every_launch(dtype, wide, B)
            every_predictor(dtype, wide, B)
            every_predictor(torch.float32, wide, B)
    print(len(compiled), "variants of", len({name for name, _ in compiled}), "kernels")
