"""A rank that is gone, or that hangs, ends the job: its peers notice, say so in one line, and leave.

- A rank that dies closes its connections: gloo's next collective fails at once (`lost_peer` knows the error).
- A rank that is stopped, or whose node or network is gone, closes nothing. Every rank gives a sign of life a
  second, in the store where the ranks met; after `SILENCE_S` without one the others leave (`Watchdog`).
- A rank that lives and does not go on, or a GPU: a decode step ends within `step_timeout_s`, or the host
  gives up (`dejavu.runtime.graphs.TokenMail`); NCCL watches its collectives outside graphs, a little longer
  (`nccl_timeout`, `NCCL_SETTINGS`).

A rank may wait for another as long as that one lives: loading and training take what they take.
"""

import atexit
import json
import os
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

# How a rank exits that lost another: LOST_PEER if its launcher may know better why, SILENT_PEER if not.
LOST_PEER, SILENT_PEER = 76, 77
SILENCE_S = 15.0
_BEAT_S = 1.0
_NONE, _LEFT = "? 0 0", "left"  # where a sign is: host, process, count
# Longer than any rank waits for another that lives. It is the watchdog that ends what hangs.
CONTROL_TIMEOUT = timedelta(days=7)

# NCCL does not see a peer that is gone. Set unless the user has set them.
NCCL_SETTINGS = {
    # a collective that took longer than the timeout ends its process, without tidying up, which could hang
    # (torchrun itself sets 1: with tidying up)
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "3",
    # ... without a dump; but after an error, which a peer's end also is, it still waits four times this, in
    # milliseconds: longer than `SILENCE_S`, after which the watchdog has said who is gone
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
    "TORCH_NCCL_PROPAGATE_ERROR": "0",
    "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC": "5000",
    # stages of a pipeline send and receive one after the other, as they should: no warning of it
    "TORCH_NCCL_SHOW_EAGER_INIT_P2P_SERIALIZATION_WARNING": "false",
    # no multicast: it is not to be had on every machine
    "NCCL_NVLS_ENABLE": "0",
}


class PeerLostError(RuntimeError):
    """Another rank is gone or hangs: nobody's mistake, and there is no going on."""


def timeout_s() -> float:
    """How long a decode step or an NCCL collective may take: ``DEJAVU_TIMEOUT`` seconds, 120 by default."""
    text = os.environ.get("DEJAVU_TIMEOUT", "120")
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 1 <= seconds < 1e6:
        raise ValueError(f"DEJAVU_TIMEOUT={text}: expected seconds, 1 or more")
    return seconds


def silence_s() -> float:
    """How long a rank may give no sign of life: no longer than a step may take, but some signs."""
    return max(5 * _BEAT_S, min(SILENCE_S, timeout_s()))


def step_timeout_s() -> float:
    """How long the host waits for a decode step: until after a sign of life must have come, for the watchdog
    can say whose did not."""
    return max(timeout_s(), silence_s() + 5 * _BEAT_S)


def nccl_timeout() -> timedelta:
    """How long NCCL waits for a collective: longer than the host, which gives up in one line."""
    return timedelta(seconds=step_timeout_s() + 10)


def lost_peer(error: RuntimeError) -> str | None:
    """What an error of a collective says of a lost peer, in one line; None if it says nothing of it."""
    text = str(error).strip()
    if not isinstance(error, PeerLostError | dist.DistError) and "/gloo/" not in text:
        return None
    return text.splitlines()[0].rpartition("] ")[2] if "/gloo/" in text else text.splitlines()[0]


def explain(message: str) -> None:
    """Says why this rank leaves.

    Under a launcher the words go to the file in which it looks for them; it decides whose are shown.
    """
    if not note_error(message):
        print(f"error: rank {os.environ.get('RANK', '0')}: {message}", file=sys.stderr, flush=True)


def note_error(message: str) -> bool:
    """Leaves the words where a launcher looks for them; False if there is none."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        note = {"message": {"message": message, "extraInfo": {"timestamp": int(time.time())}}}
        with open(path, "w") as file:
            json.dump(note, file)
    return bool(path)


class Watchdog:
    """Gives signs of life and waits for those of the others; ends the process when one is silent.

    Args:
        silence_s: how long a rank may give none.
    """

    def __init__(self, rank: int, size: int, silence_s: float) -> None:
        # a connection of its own: the group's is taken while the main thread waits in it
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self._store = TCPStore(address, port, is_master=False)
        self._keys = [f"dejavu/alive/{r}" for r in range(size)]
        self._rank = rank
        self._silence_s = silence_s
        self._stopped = threading.Event()
        self._heard = [(_NONE, time.monotonic())] * size  # the last sign of each rank, and when it came
        self._sign = f"{socket.gethostname()} {os.getpid()}"
        # two threads, for a store whose machine is gone answers the first one never
        self._beats = threading.Thread(target=self._beat, daemon=True)
        self._beats.start()
        threading.Thread(target=self._watch, daemon=True).start()
        atexit.register(self.stop)  # where nobody says that this rank leaves: a user's own script

    def stop(self) -> None:
        """This rank leaves, as it should."""
        if self._stopped.is_set():
            return
        self._stopped.set()
        self._beats.join(2 * _BEAT_S)
        with suppress(RuntimeError):  # the store left before
            self._store.set(self._keys[self._rank], _LEFT)

    def _beat(self) -> None:
        count = 0
        while not self._stopped.wait(_BEAT_S):
            count += 1
            try:
                self._store.set(self._keys[self._rank], f"{self._sign} {count}")
                signs = [
                    self._store.get(key).decode() if self._store.check([key]) else _NONE for key in self._keys
                ]
            except RuntimeError:
                return  # the store is gone: so `_watch` will say
            now = time.monotonic()
            for rank, sign in enumerate(signs):
                if sign == _LEFT or sign != self._heard[rank][0]:
                    self._heard[rank] = sign, now

    def _watch(self) -> None:
        now = time.monotonic()
        while not self._stopped.wait(_BEAT_S):
            before, now = now, time.monotonic()
            if now - before > 3 * _BEAT_S:  # this rank itself was stopped, perhaps all of the job
                self._heard = [(sign, now) for sign, _ in self._heard]
            heard = self._heard[self._rank][1]  # when the store last answered
            if now - heard > self._silence_s:
                self._end(f"the node of rank 0 ({os.environ['MASTER_ADDR']})", [])
            # by what was known then: with the store gone nobody is heard of, and nobody is to blame for it
            silent = [rank for rank, (_, when) in enumerate(self._heard) if heard - when > self._silence_s]
            if silent:
                self._end(f"rank {', '.join(map(str, silent))}", silent)

    def _end(self, who: str, silent: list[int]) -> None:
        if self._stopped.is_set():
            return
        explain(f"lost another rank: {who} has given no sign of life for {self._silence_s:.0f} s")
        for rank in silent:  # one that is stopped hears no SIGTERM, and its launcher would wait for it
            host, process, _ = self._heard[rank][0].split()
            if host == socket.gethostname():
                with suppress(ProcessLookupError):
                    os.kill(int(process), signal.SIGKILL)
        os._exit(SILENT_PEER)
