"""Which range each kernel of a CUDA graph belongs to.

Ranges mark host code, and a replay runs none: in a profile of replays they are silent. So where
``DEJAVU_GRAPH_NODES`` names a folder (`dejavu profile` sets it), every capture leaves a ``graph-PID-N.json``:
a list of kernels as ``{"path": [outermost range, ...], "category", "grid", "block"}``, in the order of their
capture. `dejavu.profiles.trace` finds them again in a trace by their grids and blocks.
"""

import ctypes
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import torch

from dejavu.kernels import driver
from dejavu.profiles import nvtx
from dejavu.profiles.records import write_file

FOLDER = "DEJAVU_GRAPH_NODES"
_KERNEL_NODE = 0  # of CUgraphNodeType
_files = count()


class _KernelNode(ctypes.Structure):
    """CUDA_KERNEL_NODE_PARAMS_v2 of the driver's interface."""

    _fields_ = [
        ("function", ctypes.c_void_p),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("parameters", ctypes.c_void_p),
        ("extra", ctypes.c_void_p),
        ("kernel", ctypes.c_void_p),
        ("context", ctypes.c_void_p),
    ]


class CapturedGraph:
    """The graph that a stream's capture has made so far."""

    def __init__(self, stream: int) -> None:
        status, self._graph = ctypes.c_int(), ctypes.c_void_p()
        driver.call(
            "cuStreamGetCaptureInfo_v2", ctypes.c_void_p(stream), ctypes.byref(status), None,
            ctypes.byref(self._graph), None, None,
        )  # fmt: skip

    def nodes(self) -> list[int]:
        """Handles of all nodes, in the order of their capture."""
        n = ctypes.c_size_t()
        driver.call("cuGraphGetNodes", self._graph, None, ctypes.byref(n))
        if not n.value:
            return []  # an array of none is an error
        handles = (ctypes.c_void_p * n.value)()
        driver.call("cuGraphGetNodes", self._graph, handles, ctypes.byref(n))
        return [handle for handle in handles if handle is not None]

    def kernel(self, node: int) -> tuple[list[int], list[int]] | None:
        """Grid and block of a node that is a kernel."""
        kind, parameters = ctypes.c_int(), _KernelNode()
        driver.call("cuGraphNodeGetType", ctypes.c_void_p(node), ctypes.byref(kind))
        if kind.value != _KERNEL_NODE:
            return None
        driver.call("cuGraphKernelNodeGetParams_v2", ctypes.c_void_p(node), ctypes.byref(parameters))
        return list(parameters.grid), list(parameters.block)


class Recorder:
    """Asks the graph for its nodes wherever a range begins or ends: new ones belong to the range before."""

    def __init__(self, graph: CapturedGraph) -> None:
        self.kernels: list[dict[str, Any]] = []
        self._graph, self._seen = graph, set(graph.nodes())
        self._ranges: list[tuple[str, nvtx.Category]] = [("decode", "compute")]

    @contextmanager
    def __call__(self, name: str, category: nvtx.Category) -> Iterator[None]:
        self.claim()
        self._ranges.append((name, category))
        try:
            yield
            self.claim()
        finally:
            self._ranges.pop()

    def claim(self) -> None:
        """What has been captured since the last call belongs to the innermost range."""
        for node in self._graph.nodes():
            if node in self._seen:
                continue
            self._seen.add(node)
            if (launch := self._graph.kernel(node)) is not None:
                path, category = [name for name, _ in self._ranges], self._ranges[-1][1]
                self.kernels.append(
                    {"path": path, "category": category, "grid": launch[0], "block": launch[1]}
                )


@contextmanager
def recorded() -> Iterator[None]:
    """Within a capture on the current stream: notes its kernels, where that is wanted."""
    if not (folder := os.environ.get(FOLDER)):
        yield
        return
    recorder = Recorder(CapturedGraph(torch.cuda.current_stream().cuda_stream))
    with nvtx.listening(recorder):
        yield
    recorder.claim()
    write_file(Path(folder, f"graph-{os.getpid()}-{next(_files)}.json"), json.dumps(recorder.kernels))
