"""torchrun for `dejavu`: the same launcher and options, but a failure ends in one line and its own status.

SIGTERM and SIGUSR1 go on to the ranks, however long they take to end. (torchrun dies of SIGUSR1, and after
SIGTERM it forgets how its ranks ended.)
"""

import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

import torch
from torch.distributed import DistNetworkError
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint
from torch.distributed.run import get_args_parser, run

from dejavu.parallel.watchdog import LOST_PEER, NCCL_SETTINGS, SILENT_PEER
from dejavu.runtime.preemption import PREEMPTED, SIGNALS

USER_ERROR = 2
LAUNCHED = "DEJAVU_LAUNCHED"  # in the ranks' environment: their launcher is this one, and says what they note
_OF_TORCHRUN = "SIGINT,SIGHUP,SIGQUIT"


def launch(arguments: list[str]) -> int:
    """Starts ``dejavu COMMAND ...`` on every rank and returns the exit status.

    Args:
        arguments: torchrun's own options, then the command and its options. Without ``--nproc-per-node``:
            two ranks on the CPU, one a GPU and two at most on GPUs.

    Raises:
        ValueError: the place where the nodes meet does not exist, or its port is taken.
    """
    gpus = torch.cuda.device_count()
    parser = get_args_parser()
    parser.prog, parser.usage = "dejavu launch", "%(prog)s [OPTIONS] COMMAND [ARGUMENTS]"
    parser.description = (
        "Runs a command of dejavu on several ranks, as torchrun does and with its options: dejavu launch "
        "--nproc-per-node 2 generate --prompt x. Without --nproc-per-node: two ranks, or one on the only GPU."
    )
    for action in parser._actions:
        if action.dest == "training_script":
            action.metavar, action.help = "COMMAND", "generate, bench, ...: see dejavu --help"
        elif action.dest == "training_script_args":
            action.metavar, action.help, action.required = "ARGUMENTS", "its options", False
    parser.set_defaults(nproc_per_node="1" if gpus == 1 else "2")
    parser.error = _raise  # type: ignore[method-assign]  # argparse would print its whole usage
    args = parser.parse_args(arguments)
    args.module = True
    args.training_script_args = [args.training_script, *args.training_script_args]
    args.training_script = "dejavu.launch.cli"
    if args.nproc_per_node.isdigit():  # torchrun would set 1, and warn
        if int(args.nproc_per_node) == 0:
            raise ValueError("--nproc-per-node 0 starts nothing")
        threads = max(1, len(os.sched_getaffinity(0)) // int(args.nproc_per_node))
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    host, _ = parse_rendezvous_endpoint(args.rdzv_endpoint or args.master_addr, default_port=0)
    try:
        socket.getaddrinfo(host, None)
    except socket.gaierror as e:  # torchrun would try it for a quarter of an hour
        raise ValueError(f"cannot meet the other nodes at {host}: {e.strerror}") from None
    logging.disable(logging.ERROR)  # torchrun's own account of it
    for name, value in ({LAUNCHED: "1"} | NCCL_SETTINGS).items():
        os.environ.setdefault(name, value)
    args.signals_to_handle = _OF_TORCHRUN  # newer versions of torch set the variable from it
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = _OF_TORCHRUN
    told: list[int] = []
    try:
        with _heard(told):
            run(args)
    except ChildFailedError as e:
        return _report(e, told)
    except (DistNetworkError, OSError) as e:
        if "EADDRINUSE" in str(e) or "address already in use" in str(e).lower():
            raise ValueError(
                f"port {args.master_port} is in use; choose another with --master-port"
            ) from None
        raise
    except RendezvousError as e:
        where = args.rdzv_endpoint or f"{args.master_addr}:{args.master_port}"
        raise ValueError(f"cannot meet the other nodes at {where}: {e}") from None
    except SignalException as e:
        return 128 + e.sigval
    return 0


def _raise(message: str) -> NoReturn:
    raise ValueError(message)


@contextmanager
def _heard(told: list[int]) -> Iterator[None]:
    """Signals go on to the ranks; without any yet, they end this process.

    While the main thread waits for other nodes, in C++, it hears none: then a thread does, a second later.
    """
    acted = threading.Event()

    def on_signal(number: int, _: FrameType | None) -> None:
        acted.set()
        if not _pass_on(told, number):
            raise SystemExit(PREEMPTED)

    def listen() -> None:
        while heard := os.read(hears, 1):
            number = heard[0]
            if number in SIGNALS:
                if not acted.wait(1) and not _pass_on(told, number):
                    os._exit(PREEMPTED)
                acted.clear()
            elif number == signal.SIGINT:  # torchrun's own handler acts on it, where the main thread hears it
                time.sleep(1)
                if not _children():
                    os._exit(128 + number)
        os.close(hears)

    hears, says = os.pipe()
    os.set_blocking(says, False)
    for number in SIGNALS:
        signal.signal(number, on_signal)
    signal.set_wakeup_fd(says)
    threading.Thread(target=listen, daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(-1)
        os.close(says)  # ends the thread


def _pass_on(told: list[int], number: int) -> bool:
    """Gives a signal to the ranks; False if there are none."""
    told.append(number)
    ranks = _children()
    for rank in ranks:
        with suppress(OSError):  # it has gone meanwhile
            os.kill(rank, number)
    return bool(ranks)


def _children() -> list[int]:
    """The processes whose parent is this one."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has gone meanwhile
            parent = stat.read_text().rpartition(")")[2].split()[1]
            if int(parent) == os.getpid():
                found.append(int(stat.parent.name))
    return found


def _report(error: ChildFailedError, told: Sequence[int]) -> int:
    """Says who is to blame, and how to exit for it."""
    failures = error.failures
    statuses = {failure.exitcode for failure in failures.values()}
    if USER_ERROR in statuses:
        said = [_note(failure) for failure in failures.values() if failure.exitcode == USER_ERROR]
        for message in dict.fromkeys(filter(None, said)):
            print(f"error: {message}", file=sys.stderr)
        return USER_ERROR
    ends = {PREEMPTED, LOST_PEER, SILENT_PEER, *(-number for number in told)}
    if (told and statuses <= ends) or PREEMPTED in statuses:
        return PREEMPTED  # as they were told
    rank, failure = min(failures.items(), key=lambda item: _order_of_blame(item[1]))
    if failure.exitcode in (LOST_PEER, SILENT_PEER):
        print(f"error: rank {rank} (process {failure.pid}) {_note(failure)}", file=sys.stderr)
        return failure.exitcode
    killed = failure.exitcode < 0
    cause = signal.Signals(-failure.exitcode).name if killed else f"exit status {failure.exitcode}"
    print(f"error: rank {rank} (process {failure.pid}) died: {cause}", file=sys.stderr)
    return 128 - failure.exitcode if killed else failure.exitcode


def _note(failure: ProcessFailure) -> str:
    """What the rank left to say; nothing, if it left nothing."""
    left = failure.error_file_data["message"]
    return str(left["message"]) if isinstance(left, dict) else ""


def _order_of_blame(failure: ProcessFailure) -> tuple[int, int, bool]:
    """A rank that was killed goes first, and what is said of one that hung (which is then killed); next one
    that failed by itself, then those that lost it; those that torchrun itself ended go last."""
    status = failure.exitcode
    first = status < 0 or status == SILENT_PEER
    kind = 3 if status == -signal.SIGTERM else 0 if first else 2 if status == LOST_PEER else 1
    return kind, failure.timestamp, status < 0
