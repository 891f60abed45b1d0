"""Stages of a pipeline: the layers are shared out over nodes, and what passes between them.

The ranks form a mesh ``[pp, tp]`` in row-major order. torchrun numbers the ranks of a node consecutively, so
with as many stages as nodes the all-reduces stay inside a node and only the hidden state leaves it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from dejavu.parallel.groups import TPGroup, set_timeouts
from dejavu.profiles.nvtx import nvtx_range

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Pipeline:
    """A rank's place among the stages. ``Pipeline(tp)`` is one stage, the whole model.

    ``world``: all ranks of all stages, for the host's control messages. ``peers``: the ranks that hold the
    same share of each stage, in the order of the stages.
    """

    world: TPGroup
    peers: TPGroup = field(default_factory=TPGroup)

    @property
    def stage(self) -> int:
        return self.peers.rank

    @property
    def stages(self) -> int:
        return self.peers.size

    @property
    def is_first(self) -> bool:
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        return self.stage == self.stages - 1

    def send(self, tensors: Sequence[Tensor]) -> None:
        """Gives tensors of one shape and dtype to the next stage, in one message."""
        message = torch.stack(list(tensors))
        with nvtx_range("send", "collective"):
            dist.send(message, group=self.peers.group, group_dst=self.stage + 1)

    def receive(self, count: int, shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
        """What the stage before sent: ``count`` tensors of ``shape``."""
        message = torch.empty(count, *shape, dtype=dtype, device=self.world.device)
        with nvtx_range("receive", "collective"):
            dist.recv(message, group=self.peers.group, group_src=self.stage - 1)
        return list(message)

    def broadcast_from_last(self, x: Tensor) -> None:
        """The last stage's ``x``, on every stage, in place."""
        if self.stages > 1:
            with nvtx_range("broadcast", "collective"):
                dist.broadcast(x, group=self.peers.group, group_src=self.stages - 1)

    def gather_objects(self, obj: T) -> list[T]:
        """Every stage's ``obj``, in order. For the host, not for tensors of the step."""
        return self.peers.gather_objects(obj)


def init_pipeline(world: TPGroup, stages: int) -> tuple[Pipeline, TPGroup]:
    """Deals the ranks of ``world``, all that there are, into stages: this rank's place, and the group that
    shares its stage.

    Raises:
        ValueError: so many ranks cannot be dealt into so many stages.
    """
    if stages < 1 or world.size % stages:
        fits = ", ".join(str(n) for n in range(1, world.size + 1) if world.size % n == 0)
        raise ValueError(
            f"pp={stages}: {world.size} rank(s) cannot be dealt into {stages} stages; {fits} would work"
        )
    if stages == 1:
        return Pipeline(world), world
    assert world.size == dist.get_world_size(), "the mesh is of all ranks"
    device = world.device
    # named, or the mesh would split the communicator of the GPUs alone: control messages go by gloo
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    mesh = init_device_mesh(
        device.type,
        (stages, world.size // stages),
        mesh_dim_names=("pp", "tp"),
        backend_override={"pp": backend, "tp": backend},
    )
    for axis in ("pp", "tp"):
        set_timeouts(mesh.get_group(axis), device)
    peers, tp = (
        TPGroup(mesh.get_local_rank(axis), size, device, mesh.get_group(axis))
        for axis, size in zip(("pp", "tp"), mesh.shape, strict=True)
    )
    return Pipeline(world, peers), tp
