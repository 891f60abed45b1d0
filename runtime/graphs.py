"""The decode step as a CUDA graph, and tokens that come to the host while the next step runs."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dejavu.parallel.overlap import STEP_PRIORITY
from dejavu.parallel.watchdog import PeerLostError, step_timeout_s
from dejavu.profiles import graph_nodes

# The most sequences that decode together; a batch is filled up to the next power of 2.
MAX_BATCH = 64


class StepGraph:
    """One step, recorded once and replayed; all that it reads and writes stays where it is.

    Args:
        step: launches the step on the current stream and returns its logits. It is run twice before it is
            recorded, so that kernels are compiled and libraries set up.
        pool: memory that graphs of which no two run at once may share.
    """

    def __init__(self, step: Callable[[], Tensor], device: torch.device, pool: Any) -> None:
        stream = torch.cuda.Stream(device, priority=STEP_PRIORITY)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            step()
            step()
        torch.cuda.current_stream(device).wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        # thread_local: NCCL's own thread asks for events meanwhile, which must not end the recording
        captured = torch.cuda.graph(self._graph, pool=pool, stream=stream, capture_error_mode="thread_local")
        with captured, graph_nodes.recorded():
            self.logits = step()

    def replay(self) -> Tensor:
        """Runs the step; its logits, good until the next replay of a graph."""
        self._graph.replay()
        return self.logits


class TokenMail:
    """Tokens on their way to the host: sent behind the step that draws them, received a step later.

    Args:
        tokens: ``[B]``, where every step leaves its tokens.
    """

    def __init__(self, tokens: Tensor) -> None:
        self._tokens = tokens
        on_cuda = tokens.is_cuda
        self._slots = [torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=on_cuda) for _ in range(2)]
        self._arrived = [torch.cuda.Event() for _ in range(2)] if on_cuda else []
        self._timeout_s = step_timeout_s()
        self._sent = self._received = 0
        # steps that may be under way while the host reads; a CPU computes a step when it is launched
        self.ahead = int(on_cuda)

    def send(self) -> None:
        """Behind what the current stream was given last."""
        assert self._sent - self._received < 2, "a slot is read before it is written again"
        slot = self._sent % 2
        self._slots[slot].copy_(self._tokens, non_blocking=True)
        if self._arrived:
            self._arrived[slot].record()
        self._sent += 1

    def receive(self) -> list[int]:
        """The oldest tokens not received yet.

        Polls, because Python sees no signal while it waits inside CUDA.

        Raises:
            PeerLostError: they don't come. A step takes milliseconds; one that takes so long will never end.
        """
        slot = self._received % 2
        if self._arrived:
            deadline = time.monotonic() + self._timeout_s
            while not self._arrived[slot].query():
                if time.monotonic() > deadline:
                    raise PeerLostError(f"a step has not ended after {self._timeout_s:.0f} s: a rank hangs")
                time.sleep(2e-5)
        self._received += 1
        return self._slots[slot].tolist()


def bucket(n: int) -> int:
    """The power of 2 from ``n`` on."""
    return 1 << (n - 1).bit_length()
