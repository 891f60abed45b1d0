"""Builds a rank's share of a model and fills it from a checkpoint."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dejavu.parallel.groups import TPGroup
from dejavu.profiles.nvtx import nvtx_range
from dejavu.runtime.config import OPTConfig
from dejavu.runtime.opt import OPTModel
from dejavu.runtime.weights import Checkpoint, find_model, fingerprint

OnLoad = Callable[[int, int], None]


@torch.no_grad()
def load_model(
    model: str, tp: TPGroup, dtype: torch.dtype | None, on_load: OnLoad | None
) -> tuple[OPTModel, Any, str]:
    """This rank's share of the network, the tokenizer and the fingerprint. See `Engine.from_pretrained`.

    ``dtype`` None is the checkpoint's on CUDA and fp32 on the CPU.
    """
    directory = find_model(model)
    config = OPTConfig.from_json(directory / "config.json")
    dtype = dtype or (torch.float32 if tp.device.type == "cpu" else config.dtype)
    with torch.device("meta"):
        network = OPTModel(config, tp=tp, dtype=dtype)
    total = sum(p.numel() for p in network.parameters()) * dtype.itemsize
    check_memory(total, tp, directory.name)
    tokenizer = _load_tokenizer(directory)
    done = 0

    def on_read(numel: int) -> None:
        nonlocal done
        done += numel * dtype.itemsize
        if on_load is not None:
            on_load(done, total)

    with nvtx_range("load"):
        checkpoint = Checkpoint(directory, on_read)
        network.to_empty(device=tp.device)
        network.load(checkpoint)
    return network, tokenizer, fingerprint(config, Checkpoint(directory))


def check_memory(nbytes: int, tp: TPGroup, what: str) -> None:
    """Whether this rank's GPU has room for so many bytes of weights.

    Raises:
        ValueError: it has not; the message says what is needed, what is free and what would help.
    """
    if tp.device.type != "cuda":
        return
    free, _ = torch.cuda.mem_get_info(tp.device)
    if nbytes > free:
        needed = -(-nbytes * tp.size // max(free, 1))
        raise ValueError(
            f"{what} needs {nbytes / 2**30:.1f} GiB of weights on each of {tp.size} GPU(s), and "
            f"{torch.cuda.get_device_name(tp.device)} has {free / 2**30:.1f} GiB free: use at least {needed} "
            "GPUs, or a smaller model"
        )


def _load_tokenizer(directory: Path) -> Any:
    from transformers import AutoTokenizer  # here, for it takes seconds to import

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except Exception as e:  # the library raises whatever its many backends raise
        reason = " ".join(str(e).split()) or type(e).__name__
        raise ValueError(f"{directory} has no usable tokenizer: {reason}") from None
    if not tokenizer("a", add_special_tokens=False).input_ids:  # made without any of its files
        raise ValueError(f"{directory} has no usable tokenizer: its vocabulary is empty or not there")
    return tokenizer
