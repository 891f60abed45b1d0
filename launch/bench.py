"""`dejavu bench`: the kernels against the bandwidth of the GPU they run on."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer

from dejavu.kernels.device import MAX_TOKENS
from dejavu.launch.bench_all_reduce import all_reduce
from dejavu.launch.bench_decode import decode
from dejavu.launch.options import bar, stderr
from dejavu.profiles.kernel_bench import (
    DTYPES,
    SHAPES,
    Bench,
    Local,
    Row,
    bench_attention,
    bench_mlp,
    bench_predictor,
)
from dejavu.profiles.kernel_plots import kernel_page
from dejavu.profiles.records import device_slug, write_record
from dejavu.profiles.timing import read_bandwidth
from dejavu.profiles.tune import tune, write_crossovers, write_table

app = typer.Typer(no_args_is_help=True, help="Measure kernels, sums over ranks and whole decode steps.")
app.command("all-reduce")(all_reduce)
app.command("decode")(decode)

Shape = Annotated[
    list[str] | None, typer.Option(help="opt-6.7b to opt-175b; :N for one of N ranks. Several times.")
]
Weights = Annotated[list[str] | None, typer.Option(help="fp16, bf16, fp8, int8. Several times.")]
Out = Annotated[Path, typer.Option(help="Folder for the JSON, the Markdown and the picture.")]
Tune = Annotated[
    bool,
    typer.Option(
        "--tune", help="First renew the table of launch settings for these shapes; mlp: crossovers, too."
    ),
]
Batch = Annotated[int, typer.Option(min=1, help="Tokens that share a step.")]


@app.command()
def mlp(shape: Shape = None, weights: Weights = None, batch: Batch = 1, tune_first: Tune = False,
        out: Out = Path("results")) -> None:  # fmt: skip
    """The sparse MLP at densities from 1 to 0.05, beside dense cuBLAS."""
    bench, jobs = _begin("mlp", shape, weights or ["bf16", "fp8"], [0], tune_first, batch)
    rows = (row for local, dtype, _ in jobs for row in bench_mlp(bench, local, dtype, batch))
    found = _finish("mlp", bench, rows, out, batch=batch)
    if tune_first:
        write_crossovers(found, batch, bench.device)


@app.command()
def attention(shape: Shape = None, weights: Weights = None, batch: Batch = 1, tune_first: Tune = False,
              out: Out = Path("results")) -> None:  # fmt: skip
    """The attention block over chosen heads after 1920 tokens, filling of keys and values included."""
    bench, jobs = _begin("attention", shape, weights or ["bf16"], [0], tune_first, batch)
    rows = (row for local, dtype, _ in jobs for row in bench_attention(bench, local, dtype, batch))
    _finish("attention", bench, rows, out, batch=batch)


@app.command()
def predictor(shape: Shape = None, weights: Weights = None, rank: Annotated[
    list[int] | None, typer.Option(min=1, help="Of the predictor. Several times.")] = None, batch: Batch = 1,
    tune_first: Tune = False, out: Out = Path("results")) -> None:  # fmt: skip
    """The predictor of an MLP with its selection, beside its two products alone."""
    bench, jobs = _begin(
        "predictor", shape, weights or ["bf16", "int8"], rank or [256, 512, 1024], tune_first, batch
    )
    rows = (row for job in jobs for row in bench_predictor(bench, *job, batch))
    _finish("predictor", bench, rows, out, batch=batch)


def _begin(
    op: str, shapes: list[str] | None, weights: list[str], ranks: list[int], tune_first: bool, batch: int = 1
) -> tuple[Bench, list[tuple[Local, str, int]]]:
    """Checks what was asked, measures the bandwidth, tunes."""
    locals_ = [_local(text) for text in shapes] if shapes else list(SHAPES)
    if unknown := [w for w in weights if w not in DTYPES]:
        raise ValueError(f"weights={unknown[0]!r} is unknown: use {', '.join(DTYPES)}")
    if tune_first and batch > MAX_TOKENS:
        raise ValueError(f"--tune is for one token, or for up to {MAX_TOKENS} that share a launch")
    if not torch.cuda.is_available():
        raise ValueError("dejavu bench measures a GPU, and torch sees no CUDA device here")
    device = torch.device("cuda", torch.cuda.current_device())
    jobs = [(local, dtype, rank) for local in locals_ for dtype in weights for rank in ranks]
    bench = Bench(device, read_bandwidth(device))
    stderr().print(f"{torch.cuda.get_device_name(device)} reads {bench.bandwidth / 1e12:.2f} TB/s")
    if tune_first:
        with bar("tuning") as on_progress:
            best = tune(Bench(device, bench.bandwidth, replays=8), op, jobs, batch, on_progress)
        write_table(best, device)
    return bench, jobs


def _local(text: str) -> Local:
    name, _, tp = text.partition(":")
    if tp and not tp.isdigit():
        raise ValueError(f"shape={text!r}: expected NAME or NAME:RANKS")
    local = Local(name, int(tp or 1))
    local.sizes  # noqa: B018  (checks the name and the ranks)
    return local


def _finish(op: str, bench: Bench, rows: Iterator[Row], out: Path, *, batch: int) -> list[Row]:
    """Runs what is measured, row by row, and writes the record and the picture."""
    found = []
    for row in rows:
        found.append(row)
        stderr().print(_line(row))
    name = f"kernels-{op}-{device_slug()}{f'-batch{batch}' if batch > 1 else ''}"
    path = write_record(out, name, found, synthetic_weights=True, read_tb_per_s=bench.bandwidth / 1e12)
    kernel_page(found, path.with_suffix(".png"), title=f"{op} on {torch.cuda.get_device_name(bench.device)}")
    print(path)
    return found


def _line(row: Row) -> str:
    what = " ".join(str(row[k]) for k in ("op", "shape", "tp", "weights", "engine"))
    extra = " ".join(f"{k} {row[k]:.3g}" for k in ("rank", "density", "live") if k in row)
    return f"{what} {extra}: {row['us_p50']:.1f} us ({row['efficiency']:.2f} of reading at full speed)"
