"""torchrun for `dejavu`: the same launcher and options, but a failure ends in one line and its own status."""

import logging
import os
import signal
import sys
from typing import NoReturn

import torch
from torch.distributed import DistNetworkError
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.run import get_args_parser, run

USER_ERROR = 2


def launch(arguments: list[str]) -> int:
    """Starts ``dejavu COMMAND ...`` on every rank and returns the exit status.

    Args:
        arguments: torchrun's own options, then the command and its options. Without ``--nproc-per-node``:
            two ranks on the CPU, one a GPU and two at most on GPUs.

    Raises:
        ValueError: the rendezvous port is taken.
    """
    gpus = torch.cuda.device_count()
    parser = get_args_parser()
    parser.prog = "dejavu launch"
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
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        run(args)
    except ChildFailedError as e:
        return _report(e)
    except (DistNetworkError, OSError) as e:
        if "EADDRINUSE" in str(e) or "address already in use" in str(e).lower():
            raise ValueError(
                f"port {args.master_port} is in use; choose another with --master-port"
            ) from None
        raise
    except SignalException as e:
        return 128 + e.sigval
    return 0


def _raise(message: str) -> NoReturn:
    raise ValueError(message)


def _report(error: ChildFailedError) -> int:
    failures = error.failures
    if any(failure.exitcode == USER_ERROR for failure in failures.values()):
        return USER_ERROR  # the ranks have said what it was
    rank, failure = min(failures.items(), key=lambda item: _order_of_blame(item[1]))
    killed = failure.exitcode < 0
    cause = signal.Signals(-failure.exitcode).name if killed else f"exit status {failure.exitcode}"
    print(f"error: rank {rank} (process {failure.pid}) died: {cause}", file=sys.stderr)
    return 128 - failure.exitcode if killed else failure.exitcode


def _order_of_blame(failure: ProcessFailure) -> tuple[int, int]:
    """A rank that was killed goes first: the others then fail of the lost connection, perhaps seen earlier.
    Those that torchrun itself ended go last."""
    kind = 2 if failure.exitcode == -signal.SIGTERM else 0 if failure.exitcode < 0 else 1
    return kind, failure.timestamp
