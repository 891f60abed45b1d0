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
    tokenizer = _load_tokenizer(directory)
    total = sum(p.numel() for p in network.parameters()) * dtype.itemsize
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
