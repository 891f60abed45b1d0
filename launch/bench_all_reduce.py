"""`dejavu bench all-reduce`."""

from pathlib import Path
from typing import Annotated

import torch
import typer

from dejavu.launch.options import stderr
from dejavu.parallel.groups import init_tp, pick_device
from dejavu.profiles.all_reduce_bench import bench_all_reduce, write_table
from dejavu.profiles.predictor_split import bench_split
from dejavu.profiles.records import device_slug, write_record


def all_reduce(
    tune: Annotated[
        bool, typer.Option("--tune", help="Then renew the table of routes for this hardware.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Folder for the JSON and the Markdown.")] = Path("results"),
) -> None:
    """The all-reduce of a decode step by every route, alone and with residual and LayerNorm behind it; and
    what a predictor adds to it, whole on each rank or with its first layer split over them.

    On several ranks: dejavu launch --nproc-per-node 2 bench all-reduce
    """
    if not torch.cuda.is_available():
        raise ValueError("dejavu bench all-reduce measures GPUs, and torch sees no CUDA device here")
    tp = init_tp(pick_device("cuda"))
    if tp.size < 2:
        raise ValueError(
            "dejavu bench all-reduce needs 2 ranks or more: dejavu launch --nproc-per-node 2 bench all-reduce"
        )
    rows = []
    for row in bench_all_reduce(tp):
        rows.append(row)
        what = f"{row['op']} of {row['bytes'] / 1024:.0f} KiB, {row['route']}"
        stderr().print(
            f"{what}: {row['us_p50']:.1f} us (p99 {row['us_p99']:.1f}), {row['gb_per_s']:.1f} GB/s"
        )
    for row in bench_split(tp):
        rows.append(row)
        stderr().print(
            f"{row['op']} ({row['predictor']}, {row['weights']}): {row['us_p50']:.1f} us, "
            f"{row['us_over_the_boundary']:.1f} over the boundary"
        )
    if tp.rank == 0:
        if tune:
            write_table(
                [row for row in rows if "route" in row], torch.cuda.get_device_name(tp.device), tp.size
            )
        name = f"allreduce-{device_slug()}"
        print(write_record(out, name, rows, dtype="bfloat16", tp=tp.size, synthetic_weights=True))
