"""Runs a function on several ranks, each in a process of its own."""

import multiprocessing as mp
import os
import pickle
import tempfile
import traceback
from multiprocessing.connection import Connection, wait
from pathlib import Path

import torch
import torch.distributed as dist

from dejavu.parallel.groups import TPGroup

_HUNG_S = 300


def run_ranks(size, fn, *args, cuda=False):
    """``[fn(tp, *args) on rank r for r in range(size)]``; fails with the first failing rank's traceback.

    CPU ranks are forked (0.1 s); CUDA ranks are spawned, so ``fn`` must live in an importable module.
    """
    if size == 1 and not cuda:
        return [fn(TPGroup(), *args)]
    context = mp.get_context("spawn" if cuda else "fork")
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        pipes, processes = [], []
        for rank in range(size):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_rank, args=(rank, size, store, cuda, sender, fn, args))
            process.start()
            sender.close()
            pipes.append(receiver)
            processes.append(process)
        try:
            return _results(pipes)
        finally:
            for process in processes:
                process.terminate()
                process.join()


def _results(pipes):
    """In rank order; the first that fails ends it, whatever the others wait for."""
    found = {}
    while len(found) < len(pipes):
        rank_of = {pipe: rank for rank, pipe in enumerate(pipes) if rank not in found}
        ready = wait(rank_of, _HUNG_S)
        assert ready, f"ranks {sorted(rank_of.values())} hang"
        for pipe in ready:
            rank = rank_of[pipe]
            try:
                ok, found[rank] = pickle.loads(pipe.recv_bytes())
            except EOFError:
                raise AssertionError(f"rank {rank} died without a word") from None
            assert ok, f"rank {rank}:\n{found[rank]}"
    return [found[rank] for rank in range(len(pipes))]


def _rank(rank, size, store, cuda, sender: Connection, fn, args):
    torch.set_num_threads(1)  # the ranks share the cores, and OpenMP's threads do not survive a fork
    os.environ["LOCAL_RANK"] = str(rank)
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    try:
        if cuda:
            torch.cuda.set_device(device)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=size,
            device_id=device if cuda else None,
        )
        result = fn(TPGroup(rank=rank, size=size, device=device, group=dist.group.WORLD), *args)
        sender.send_bytes(pickle.dumps((True, result)))
        dist.barrier()  # nobody leaves while another still needs them
    except BaseException:
        sender.send_bytes(pickle.dumps((False, traceback.format_exc())))
    finally:
        sender.close()
        os._exit(0)  # no atexit handlers of the forked parent
