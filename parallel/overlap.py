"""Work beside the main stream: predictors run while the main stream waits for attention or for its peers."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

# Of the stream on which a step is recorded (one that is not has the usual 0); the lower, the sooner its
# programs get their places.
STEP_PRIORITY = -1


class SideStream:
    """Another stream of a GPU. Forks and joins are events, so a CUDA graph captures them as they are.

    Args:
        patient: what runs here takes the places that a recorded step leaves. Otherwise its small launches
            slip in between the blocks of the large ones, which fill the GPU.
    """

    def __init__(self, device: torch.device, *, patient: bool = False) -> None:
        self._stream = torch.cuda.Stream(device, priority=STEP_PRIORITY + (1 if patient else -1))

    @contextmanager
    def beside(self) -> Iterator[None]:
        """What is launched within waits for all that the current stream has been given, and for no more."""
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            yield

    def mark(self) -> torch.cuda.Event:
        """What has been launched on the side so far, to be joined."""
        event = torch.cuda.Event()
        event.record(self._stream)
        return event

    def join(self, event: torch.cuda.Event) -> None:
        """What the current stream is given from here on waits for ``event``."""
        torch.cuda.current_stream(self._stream.device).wait_event(event)
