"""Builds a rank's share of a model and fills it from a checkpoint."""

from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dejavu.parallel.groups import TPGroup
from dejavu.profiles.nvtx import nvtx_range
from dejavu.runtime.config import OPTConfig
from dejavu.runtime.opt import OPTModel
from dejavu.runtime.weights import Checkpoint, find_model, fingerprint

OnLoad = Callable[[int, int], None]


@torch.no_grad()
def load_model(
    model: str,
    tp: TPGroup,
    dtype: torch.dtype | None,
    on_load: OnLoad | None,
    stage: int = 0,
    stages: int = 1,
) -> tuple[OPTModel, Any, str]:
    """This rank's share of the network, the tokenizer and the fingerprint. See `Engine.from_pretrained`.

    ``dtype`` None is the checkpoint's on CUDA and fp32 on the CPU. ``stage`` of ``stages`` of a pipeline.
    """
    directory = find_model(model)
    config = OPTConfig.from_json(directory / "config.json")
    dtype = dtype or (torch.float32 if tp.device.type == "cpu" else config.dtype)
    layers = split_layers(config, stages, tp)[stage]
    with torch.device("meta"):
        network = OPTModel(config, tp=tp, dtype=dtype, layers=layers)
    total = _numel(network) * dtype.itemsize
    check_memory(total, tp, directory.name, stages)
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


def split_layers(config: OPTConfig, stages: int, tp: TPGroup) -> list[range]:
    """The layers of each stage of a pipeline, so that the largest stage holds as few bytes as can be.

    The first stage also holds the embedding and the last one the head (tied or not: a table each).

    Raises:
        ValueError: there are more stages than layers.
    """
    L = config.num_layers
    if stages > L:
        raise ValueError(f"pp={stages}: the model's {L} layers cannot be split into {stages} stages")
    if stages == 1:
        return [range(L)]
    with torch.device("meta"):
        ends = [
            OPTModel(config, tp=tp, dtype=config.dtype, layers=layers)
            for layers in (range(1), range(L - 1, L))
        ]
    layer = _numel(ends[0].layers[0])
    counts, sizes = [1] * stages, [layer] * stages
    sizes[0], sizes[-1] = map(_numel, ends)
    for _ in range(L - stages):  # all layers weigh the same: each goes where there is least
        lightest = sizes.index(min(sizes))
        counts[lightest] += 1
        sizes[lightest] += layer
    stops = list(accumulate(counts))
    return [range(stop - count, stop) for stop, count in zip(stops, counts, strict=True)]


def _numel(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def check_memory(nbytes: int, tp: TPGroup, what: str, stages: int = 1) -> None:
    """Whether this rank's GPU has room for so many bytes of weights; of a pipeline, this stage's share.

    Raises:
        ValueError: it has not; the message says what is needed, what is free and what would help.
    """
    if tp.device.type != "cuda":
        return
    free, _ = torch.cuda.mem_get_info(tp.device)
    if nbytes > free:
        gpus = tp.size * stages
        needed = -(-nbytes * gpus // max(free, 1))
        raise ValueError(
            f"{what} needs {nbytes / 2**30:.1f} GiB of weights on each of {gpus} GPU(s), and "
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
