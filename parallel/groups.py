"""The tensor-parallel group: who the ranks are, what each holds, how they agree."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dejavu.parallel.watchdog import (
    CONTROL_TIMEOUT,
    NCCL_SETTINGS,
    Watchdog,
    nccl_timeout,
    silence_s,
    timeout_s,
)
from dejavu.profiles import nvtx

if TYPE_CHECKING:
    from dejavu.parallel.routes import Routes

T = TypeVar("T")

# Elements of the reserved payload: 64 tokens of OPT-175B and something riding along.
RESERVED = 2**20
_watchdogs: list[Watchdog] = []  # of this process: none, or one


@dataclass(eq=False, slots=True)
class TPGroup:
    """The ranks that share one model. ``TPGroup()`` is one rank, on the CPU: all of it in one process.

    A model is cut into ``shares``, one a rank. A benchmark may cut it into more (0: it does not): its ranks
    then hold a few of the shares, and what they compute is no model's output.
    ``routes``: the dtypes whose all-reduces need not go by NCCL (`dejavu.parallel.routes.reserve`).
    """

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    group: dist.ProcessGroup | None = None
    shares: int = 0
    routes: dict[torch.dtype, "Routes"] = field(default_factory=dict, repr=False)
    _buffers: dict[torch.dtype, Tensor] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.shares = self.shares or self.size

    def divide(self, n: int) -> int:
        """A share of ``n``; the sizes were checked with the user's config, so a remainder is our mistake."""
        assert n % self.shares == 0, f"{n} is not divisible by tp={self.shares}"
        return n // self.shares

    def shard(self, n: int) -> slice:
        """This rank's contiguous share of ``n`` rows; the last ranks get fewer if ``n`` is not divisible."""
        share = -(-n // self.shares)
        return slice(min(self.rank * share, n), min((self.rank + 1) * share, n))

    def buffer(self, shape: torch.Size | tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory for the payload of a collective, uninitialised. One payload lives at a time.

        A decode step's payloads all lie at one address, which never changes: captured graphs and registered
        memory can rely on it. What is longer (a prefill's) gets memory of its own.
        """
        numel = prod(shape)
        if numel > RESERVED:
            return torch.empty(shape, dtype=dtype, device=self.device)
        if dtype not in self._buffers:
            self._buffers[dtype] = torch.empty(RESERVED, dtype=dtype, device=self.device)
        return self._buffers[dtype][:numel].view(shape)

    def set_buffer(self, buffer: Tensor) -> None:
        """``buffer [RESERVED]``, registered memory, is where payloads of its dtype lie from now on."""
        assert buffer.shape == (RESERVED,)
        self._buffers[buffer.dtype] = buffer

    def broadcast_object(self, obj: T) -> T:
        """Rank 0's ``obj``, on every rank. For the host's control messages, not for tensors of the step."""
        if self.size == 1:
            return obj
        box = [obj]
        dist.broadcast_object_list(box, group_src=0, group=self.group, device=torch.device("cpu"))
        return box[0]

    def agree(self, action: Callable[[], T]) -> T:
        """Runs ``action`` on every rank; where it fails on one, every rank raises that rank's ValueError.

        Without it the ranks that succeed would wait in their next collective for one that is gone.
        """
        result, cause = None, None
        try:
            result = action()
        except (ValueError, OSError) as e:
            cause = e
        errors = self.gather_objects(None if cause is None else str(cause))
        for rank, error in enumerate(errors):
            if error is not None:
                same_everywhere = all(other == error for other in errors)
                raise ValueError(error if same_everywhere else f"rank {rank}: {error}") from cause
        return result  # type: ignore[return-value]  # None only where T is

    def gather_objects(self, obj: T) -> list[T]:
        """Every rank's ``obj``, in rank order, on every rank."""
        objects = [obj] * self.size
        if self.size > 1:
            dist.all_gather_object(objects, obj, group=self.group)
        return objects


def pick_device(name: str = "auto") -> torch.device:
    """The device of this rank: ``auto`` is CUDA where there is one, else the CPU.

    Under torchrun the GPU is the one of the local rank.

    Raises:
        ValueError: CUDA is asked for and absent, or a node starts more ranks than it has GPUs.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device={name} is unknown: use auto, cpu or cuda")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and gpus == 0):
        return torch.device("cpu")
    if gpus == 0:
        raise ValueError("device=cuda, but torch sees no CUDA device here; use --device cpu")
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if local_ranks > gpus:
        raise ValueError(
            f"{local_ranks} ranks on this node, but {gpus} GPU(s): start one rank a GPU, or use --device cpu"
        )
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def init_tp(device: torch.device) -> TPGroup:
    """Joins the ranks that torchrun (or its environment variables) describes into one group.

    NCCL carries the tensors on CUDA, gloo those on the CPU and every control message.

    Raises:
        ValueError: the rendezvous cannot be reached, or its port is taken.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        nvtx.mark("rank 0 of 1")
        return TPGroup(device=device)
    if not dist.is_initialized():
        on_cuda = device.type == "cuda"
        timeout_s()  # refuses a wrong one before any rank waits
        for name, value in NCCL_SETTINGS.items():
            os.environ.setdefault(name, value)
        try:
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if on_cuda else "gloo", device_id=device if on_cuda else None
            )
        except (dist.DistNetworkError, dist.DistStoreError) as e:
            where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            taken = "EADDRINUSE" in str(e)
            cause = "its port is in use; choose another MASTER_PORT" if taken else str(e).splitlines()[0]
            raise ValueError(f"cannot join the other ranks at {where}: {cause}") from e
        world = dist.group.WORLD
        assert world is not None
        set_timeouts(world, device)
        _watchdogs.append(Watchdog(dist.get_rank(), dist.get_world_size(), silence_s()))
    nvtx.mark(f"rank {dist.get_rank()} of {dist.get_world_size()}")
    return TPGroup(rank=dist.get_rank(), size=dist.get_world_size(), device=device, group=dist.group.WORLD)


def set_timeouts(group: dist.ProcessGroup, device: torch.device) -> None:
    """How long collectives of a new group may take: on GPUs a little longer than a step, on the CPU until the
    watchdog has found who is gone."""
    group._get_backend(torch.device("cpu"))._set_default_timeout(CONTROL_TIMEOUT)
    if device.type == "cuda":
        group._get_backend(device)._set_default_timeout(nccl_timeout())


def shut_down() -> None:
    """Leaves the group, if one was joined."""
    while _watchdogs:
        _watchdogs.pop().stop()
    if dist.is_initialized():
        dist.destroy_process_group()


def global_rank() -> int:
    """This process's rank, known before any group is: only rank 0 speaks."""
    return int(os.environ.get("RANK", "0"))
