"""What the commands share: options, progress, output of rank 0."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from dejavu.parallel.groups import global_rank
from dejavu.predictors.selection import Overlap
from dejavu.profiles import nvtx
from dejavu.runtime.decoding import FillKV
from dejavu.runtime.engine import Engine

_LOG_EVERY_S = 60.0

Model = Annotated[str, typer.Option(help="demo, a Hugging Face directory, or a hub id.")]
DType = Annotated[str, typer.Option(help="fp16, bf16, fp32; auto: the model's on CUDA, fp32 on the CPU.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
OverlapOption = Annotated[
    str,
    typer.Option(
        help="Predictors run beside other work from their tap or the next collective on, or not: none. "
        "auto: from the tap, but those of neurons a whole layer ahead from the collective."
    ),
]
Stages = Annotated[
    int,
    typer.Option(
        help="Pipeline stages, best as many as nodes: they share out the layers, and the ranks of a stage "
        "share it. More than one run without CUDA graphs."
    ),
]
AllReduce = Annotated[
    str, typer.Option(help="auto (symmetric memory where it is to be had), nccl, or symm (nothing else).")
]
NVTX = Annotated[bool, typer.Option("--nvtx", help="Emit NVTX ranges (also: DEJAVU_NVTX=1).")]


def load_engine(
    model: str,
    dtype: str,
    device: str,
    nvtx_ranges: bool = False,
    *,
    pp: int = 1,
    sparsity: str = "dense",
    density: float | None = None,
    fill_kv: FillKV = "auto",
    all_reduce: str = "auto",
    cuda_graph: bool = True,
    overlap: Overlap = "auto",
) -> Engine:
    """The engine, with a bar while it loads."""
    if nvtx_ranges:
        nvtx.enable()
    with bar("loading", DownloadColumn(), TransferSpeedColumn()) as on_load:
        return Engine.from_pretrained(
            model,
            pp=pp,
            dtype=dtype,
            device=device,
            sparsity=sparsity,
            density=density,
            fill_kv=fill_kv,
            all_reduce=all_reduce,
            cuda_graph=cuda_graph,
            overlap=overlap,
            on_load=on_load,
        )


@contextmanager
def bar(what: str, *columns: ProgressColumn) -> Iterator[Callable[..., None]]:
    """Takes ``(done, total)`` or ``(stage, done, total)``: a bar on a terminal, in a log a line a minute, on
    rank 0's standard error."""
    console = stderr()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        *(columns or (MofNCompleteColumn(), TimeRemainingColumn())),
    )
    silent = console.quiet or not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=silent) as progress:
        task, said = progress.add_task(what, total=None), time.monotonic()

        def on_progress(*state: str | int) -> None:
            nonlocal said
            *stage, done, total = state
            name = str(stage[0]) if stage else what
            progress.update(task, description=name, completed=float(done), total=float(total))
            if silent and total and time.monotonic() - said > _LOG_EVERY_S:
                said = time.monotonic()
                console.print(f"{name}: {float(done) / float(total):.0%}")

        yield on_progress


def stderr() -> Console:
    """Standard error of rank 0; the other ranks are silent."""
    return Console(stderr=True, highlight=False, quiet=global_rank() != 0)


def print_line(line: str) -> None:
    """A line of standard output, out at once."""
    print(line, flush=True)
