"""Which way an all-reduce takes: NCCL, torch's symmetric memory in one or two shots, or our own kernel.

The way of each size comes from a table that ships with the package, ``all_reduce.json``, by GPU and ranks;
`dejavu bench all-reduce --tune` renews it. Rank 0 decides for all.

`reserve` makes what `TPGroup.buffer` hands out symmetric memory: allocated and exchanged there, once,
before any graph is captured. All symmetric operations of a group run on one stream, that of its steps.

Why a payload may be written anew as soon as a sum is through: both of torch's operations begin and end with
a barrier, block by block. A block of this rank ends after the blocks of the same number on the other ranks
have read what they sum, so the kernel ends after all reading of this payload, and on the stream the next
payload is written after the kernel. In one shot the sum goes elsewhere; in two each rank writes its share
into all payloads, each element read by nobody but its writer, and the closing barrier comes after that.
(Our own kernel copies the payload out; its file says why that is safe.)
"""

import json
import os
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from dejavu.kernels.reduce_residual_norm import TYPES, Inboxes, push_all_reduce
from dejavu.parallel.groups import RESERVED, TPGroup

Choice = Literal["auto", "nccl", "symm"]
Route = Literal["nccl", "one_shot", "two_shot", "push", "fused"]
# A table has a part for each op, "sum" (an all-reduce) or "boundary" (with bias, residual and norm behind
# it), and dtype: torch's operations on symmetric memory know no fp16, our kernels no fp32.
Table = Mapping[str, Mapping[str, Route]]

TABLE = Path(__file__).with_name("all_reduce.json")
TORCH_TYPES = (torch.bfloat16, torch.float32)
DTYPES = (*TORCH_TYPES, torch.float16)
OPS = ("sum", "boundary")
# For hardware that no table knows: latency decides up to here, bandwidth above.
_SMALL = 64 * 1024


@dataclass(slots=True)
class Routes:
    """The reserved payload of one dtype and the ways over it. Kept while the group lives, for graphs hold its
    addresses; ``enabled``: whether its ways are taken."""

    payload: Tensor
    group_name: str
    inboxes: Inboxes
    table: Table
    enabled: bool = True

    def of_sum(self, x: Tensor) -> Route:
        """The way of an all-reduce of ``x``; NCCL's if ``x`` is not the payload."""
        is_payload = x.data_ptr() == self.payload.data_ptr() and x.is_contiguous()
        if not self.enabled or not is_payload or x.numel() > len(self.payload):
            return "nccl"
        return choose(self.table, "sum", x.nbytes, x.dtype)

    def is_fused(self, x: Tensor) -> bool:
        """Whether the boundary behind partial sums ``x [..., D]`` goes by one kernel."""
        D = x.shape[-1]
        fits = self.inboxes.takes(x.dtype, x.numel() // D, D)
        return self.enabled and fits and choose(self.table, "boundary", x.nbytes, x.dtype) == "fused"

    def all_reduce(self, x: Tensor, route: Route) -> Tensor:
        """The sum over ranks of the payload ``x``, which may lie elsewhere."""
        if route == "push":
            return push_all_reduce(self.payload, x.numel(), self.inboxes).view(x.shape)
        # they want 16 bytes; what lies behind the payload is summed along and not looked at
        whole = 16 // x.itemsize
        padded = self.payload[: -(-x.numel() // whole) * whole]
        if route == "two_shot":
            torch.ops.symm_mem.two_shot_all_reduce_(padded, "sum", self.group_name)
            return x
        out = torch.empty_like(padded)
        torch.ops.symm_mem.one_shot_all_reduce_out(padded, "sum", self.group_name, out)
        return out[: x.numel()].view(x.shape)


def choose(table: Table, op: str, nbytes: int, dtype: torch.dtype) -> Route:
    """The table's route for ``op`` and size: of the first entry that reaches it, else of the last."""
    entries = table[section(op, dtype)]
    sizes = sorted(map(int, entries))
    return entries[str(next((size for size in sizes if size >= nbytes), sizes[-1]))]


def section(op: str, dtype: torch.dtype) -> str:
    """Which part of a table speaks of ``op``: ``sum bfloat16``."""
    return f"{op} {str(dtype).removeprefix('torch.')}"


def only(route: Route) -> Table:
    """A table that knows one route, for trying it; what it is not made for goes by NCCL."""
    sums: Route = "nccl" if route == "fused" else route
    each: dict[str, Route] = {"sum": sums, "boundary": route}
    return {section(op, dtype): {"0": chosen} for op, chosen in each.items() for dtype in DTYPES}


def candidates(op: str, dtype: torch.dtype) -> list[Route]:
    """The ways that ``op`` has in this dtype."""
    torchs: list[Route] = ["one_shot", "two_shot"] if dtype in TORCH_TYPES else []
    ours: list[Route] = [] if dtype not in TYPES else ["push", "fused"] if op == "boundary" else ["push"]
    return ["nccl", *torchs, *ours]


def table_key(gpu: str, ranks: int) -> str:
    """How the table names hardware: ``NVIDIA H100 80GB HBM3 x2``."""
    return f"{gpu} x{ranks}"


def load_table(key: str) -> Table:
    """The stored routes for this hardware, else cautious ones."""
    tables: dict[str, Table] = json.loads(TABLE.read_text())
    return tables.get(key) or {section(op, dtype): _cautious(op, dtype) for op in OPS for dtype in DTYPES}


def _cautious(op: str, dtype: torch.dtype) -> dict[str, Route]:
    """Few words go by what is quickest to start, many by what sends each once."""
    ways = candidates(op, dtype)
    small = next(way for way in ("fused", "push", "one_shot") if way in ways)
    large: Route = "two_shot" if "two_shot" in ways else "nccl"
    return {str(_SMALL): small, str(RESERVED * 4): large}


def reserve(tp: TPGroup, dtype: torch.dtype, choice: str = "auto") -> None:
    """Decides how all-reduces of ``dtype`` go from now on; every rank calls it, outside of graphs.

    Args:
        choice: ``auto``: symmetric memory where it is to be had, else a line on rank 0's standard error and
            NCCL; ``symm``: not without it; ``nccl``. On the CPU, gloo is what there is (``auto``).

    Raises:
        ValueError: an unknown choice, or one that cannot be had here.
    """
    choice = tp.broadcast_object(choice)
    if choice not in get_args(Choice):
        raise ValueError(f"all_reduce={choice!r} is unknown: use {', '.join(get_args(Choice))}")
    if tp.device.type != "cuda":
        if choice != "auto":
            raise ValueError(f"all_reduce={choice} needs CUDA devices: on the CPU gloo sums, use auto")
        return
    if dtype in tp.routes:
        tp.routes[dtype].enabled = choice != "nccl"
    elif tp.size > 1 and choice != "nccl":
        try:
            _exchange(tp, dtype)
        except ValueError as e:
            if choice == "symm":
                raise ValueError(f"all_reduce=symm: no symmetric memory here: {e}") from e
            if tp.rank == 0:
                line = f"warning: no symmetric memory, all-reduces go by NCCL: {e}"
                print(" ".join(line.split()), file=sys.stderr, flush=True)


def _exchange(tp: TPGroup, dtype: torch.dtype) -> None:
    """Makes the payload symmetric memory. The ranks agree after each step: none waits for one that failed."""
    assert not torch.cuda.is_current_stream_capturing()
    os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"
    places = tp.gather_objects((socket.gethostname(), tp.device.index))
    tp.agree(partial(_check, places, tp))
    payload_bytes = RESERVED * dtype.itemsize
    memory = tp.agree(partial(_allocate, payload_bytes + Inboxes.nbytes(tp.size), tp))
    memory.zero_()
    torch.cuda.synchronize(tp.device)
    group = tp.group
    assert group is not None
    # a collective, and the last moment before anyone writes into another's memory: all have zeroed theirs
    addresses = tp.agree(partial(_rendezvous, memory, group))
    inboxes = Inboxes(
        addresses=torch.tensor(addresses, dtype=torch.int64, device=tp.device) + payload_bytes,
        epochs=Inboxes.zero_epochs(tp.device),
        rank=tp.rank,
    )
    payload = memory[:payload_bytes].view(dtype)
    table = tp.broadcast_object(load_table(table_key(torch.cuda.get_device_name(tp.device), tp.size)))
    tp.set_buffer(payload)
    tp.routes[dtype] = Routes(payload, group.group_name, inboxes, table)


def _check(places: list[tuple[str, int]], tp: TPGroup) -> None:
    hosts = {host for host, _ in places}
    if len(hosts) > 1:
        raise ValueError(f"the ranks are on {len(hosts)} hosts")
    if len(set(places)) < len(places):
        raise ValueError("each rank sees but its own GPU, or two share one")
    for _, index in places:
        if index != tp.device.index and not torch.cuda.can_device_access_peer(tp.device.index, index):
            raise ValueError(f"GPU {tp.device.index} cannot read the memory of GPU {index}")


def _allocate(nbytes: int, tp: TPGroup) -> Tensor:
    try:
        from torch._C._distributed_c10d import _SymmetricMemory

        # not from the pool that symm_mem.empty takes it from: there a tensor need not begin a block, and the
        # operations count from the block's beginning
        return _SymmetricMemory.empty_strided_p2p((nbytes,), (1,), torch.uint8, tp.device)
    except (ImportError, AttributeError, RuntimeError) as e:
        raise ValueError(_first_line(e)) from e


def _rendezvous(memory: Tensor, group: dist.ProcessGroup) -> list[int]:
    try:
        import torch.distributed._symmetric_memory as symm_mem

        return list(symm_mem.rendezvous(memory, group).buffer_ptrs)
    except (ImportError, RuntimeError) as e:
        raise ValueError(_first_line(e)) from e


def _first_line(e: BaseException) -> str:
    return (str(e).splitlines() or [type(e).__name__])[0]
