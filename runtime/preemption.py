"""A generation that is told to stop: by SIGTERM, or by SIGUSR1, Slurm's warning (``--signal=USR1@120``).

Some ranks get the signal, at any time. All of them stop after the same token, for every rank must take part
in every step.
"""

import signal
from typing import Any

import torch
import torch.distributed as dist

from dejavu.parallel.groups import TPGroup

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# The exit status of what was told to stop and would go on, or begin again, if it were started again.
PREEMPTED = 75
# Tokens from one agreement to the next: it costs the host a small message, while the GPU computes a step.
_EVERY = 8


class Preemption:
    """From when it is made, the signals no longer end this process: they are noted."""

    def __init__(self, tp: TPGroup) -> None:
        self._tp = tp
        self._noted = False
        self._tokens = 0
        for number in SIGNALS:
            signal.signal(number, self._note)

    def _note(self, *_: Any) -> None:
        self._noted = True

    def after_token(self) -> bool:
        """Whether to stop; the same answer on every rank, which all ask after every token."""
        self._tokens += 1
        return (self._tp.size == 1 or self._tokens % _EVERY == 1) and self.agreed()

    def agreed(self) -> bool:
        """Whether any rank got a signal; every rank asks."""
        if self._tp.size == 1:
            return self._noted
        flag = torch.tensor(int(self._noted))
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._tp.group)
        return bool(flag)
