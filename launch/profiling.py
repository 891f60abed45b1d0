"""`dejavu profile`: runs a command under a profiler, and says where the time of its decode steps went."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity

from dejavu.launch.options import stderr
from dejavu.parallel.groups import global_rank
from dejavu.profiles import graph_nodes, nvtx
from dejavu.profiles.records import write_record
from dejavu.profiles.trace import read, read_graphs, steps
from dejavu.profiles.trace_plots import timeline_page
from dejavu.profiles.trace_report import Row, middle_step, report
from dejavu.runtime.preemption import PREEMPTED, SIGNALS

PROFILERS = ("nsys", "torch")


def profile_command(
    command: Annotated[list[str] | None, typer.Argument(help="What to run; after --.")] = None,
    profiler: Annotated[str, typer.Option("--with", help=f"{' or '.join(PROFILERS)}.")] = PROFILERS[0],
    report_of: Annotated[
        Path | None,
        typer.Option("--report", help="Run nothing; read a .nsys-rep, a .sqlite or torch's traces."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the report and what it is made from.")] = Path(
        "profile"
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, last.")] = False,
) -> None:
    """Where the time goes: dejavu profile -- dejavu launch --nproc-per-node 2 generate --prompt Once

    Around a launcher it sees all ranks at once; started by a launcher, on each rank, that rank alone, and
    writes to a folder named by its number.
    """
    if profiler not in PROFILERS:
        raise ValueError(f"with={profiler!r} is unknown: use {', '.join(PROFILERS)}")
    if bool(command) == (report_of is not None):
        raise ValueError("give a command to run, after --, or a --report to read")
    out /= _own_folder()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise ValueError(f"cannot write to {out}: {e.strerror}") from None
    if command:
        run = _run_nsys if profiler == "nsys" else _run_torch
        report_of = run(command, out)
    assert report_of is not None
    rows = _report(report_of, out)
    _show(rows)
    stderr().print(f"written: {out}/report.json, report.md and timeline.png")
    if as_json:
        print(json.dumps({"ranks": rows}))


@contextmanager
def torch_traced() -> Iterator[None]:
    """Looks on with torch's profiler, if `dejavu profile --with torch` started this rank."""
    folder = os.environ.get(nvtx.TORCH_TRACES)
    if folder is None or sys.argv[1:2] in (["launch"], ["profile"]):
        yield
        return
    on_gpu = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
    with torch.profiler.profile(activities=[ProfilerActivity.CPU, *on_gpu]) as profiler:
        yield
    profiler.export_chrome_trace(str(Path(folder, f"rank-{global_rank()}.json")))


def _run_nsys(command: list[str], out: Path) -> Path:
    """Nsight Systems with what a report needs: our ranges (and NCCL's), the system's calls, kernels one by
    one, those of graphs too; no samples of the host's code, which cost time."""
    if shutil.which("nsys") is None:
        raise ValueError("nsys is not on the path: install Nsight Systems, or use --with torch")
    _clean(out)
    made = out / "profile"
    traces = ["nvtx", "osrt", *(["cuda"] if torch.cuda.is_available() else [])]
    options = [f"--trace={','.join(traces)}", "--sample=none", "--cpuctxsw=none", "--force-overwrite=true"]
    if torch.cuda.is_available():
        options.append("--cuda-graph-trace=node")
    _run(
        ["nsys", "profile", *options, f"--output={made}", *command],
        {"DEJAVU_NVTX": "1", graph_nodes.FOLDER: str(out.absolute())},
    )
    return made.with_suffix(".nsys-rep")


def _run_torch(command: list[str], out: Path) -> Path:
    _clean(out)
    folder = str(out.absolute())
    # without its lines about starting and stopping
    _run(command, {nvtx.TORCH_TRACES: folder, graph_nodes.FOLDER: folder, "KINETO_LOG_LEVEL": "3"})
    return out


def _run(command: list[str], environment: dict[str, str]) -> None:
    try:
        child = subprocess.Popen(command, env={**os.environ, **environment})
    except OSError as e:
        raise ValueError(f"cannot run {command[0]}: {e.strerror}") from None
    before = {number: signal.signal(number, lambda n, _: child.send_signal(n)) for number in SIGNALS}
    status = child.wait()
    for number, handler in before.items():
        signal.signal(number, handler)
    if status not in (0, PREEMPTED):  # what was told to stop has decoded until then
        raise typer.Exit(status if status > 0 else 128 - status)  # it has said why


def _clean(out: Path) -> None:
    """An earlier run's ranks and graphs are not this one's."""
    for path in (*out.glob("graph-*.json"), *out.glob("rank-*.json")):
        path.unlink()


def _own_folder() -> str:
    """Where one of several that run at once writes: a rank of torchrun, a task of a Slurm step."""
    task = os.environ.get("SLURM_PROCID", "") if "SLURM_STEP_ID" in os.environ else ""
    return os.environ.get("RANK", task)


def _report(path: Path, out: Path) -> list[Row]:
    """The figures of every rank, also as a file, and the picture of the first."""
    if not path.exists():
        raise ValueError(f"there is no report {path}")
    folder = path if path.is_dir() else path.parent
    if path.suffix == ".nsys-rep":
        path = _export(path, out)
    processes, graphs = read(path), read_graphs(folder)
    found = [(process, steps(process, graphs)) for process in processes]
    with_steps = [pair for pair in found if pair[1]]
    found = with_steps or found  # if none has any, `report` says so
    rows = [report(process, its_steps) for process, its_steps in found]
    process, its_steps = found[0]
    hardware = f"{len(found)} x {process.device}" if process.device else "CPU"
    write_record(out, "report", _flat(rows), device=hardware)
    title = f"{process.label} of {len(found)} on {process.device or 'the CPU'}"
    lanes = "stream" if process.kernels else "thread"
    timeline_page(middle_step(its_steps), out / "timeline.png", title=title, unit=lanes)
    return rows


def _flat(rows: list[Row]) -> list[Row]:
    """As a record has them: what each rank took, then the first one's ranges and kernels."""
    ranks = [
        {
            "rank": row["rank"],
            "steps": row["steps"],
            **{f"step_us_{name}": us for name, us in row["step_us"].items()},
            "collective_us": row["collective_us"],
            **{f"predictors_{name}": value for name, value in (row.get("predictors") or {}).items()},
            **{f"idle_{name}": value for name, value in row.get("idle", {}).items()},
        }
        for row in rows
    ]
    return [*ranks, *rows[0]["ranges"], *rows[0].get("kernels", [])]


def _export(path: Path, out: Path) -> Path:
    if shutil.which("nsys") is None:
        raise ValueError(
            f"nsys, which reads {path.name}, is not on the path: give its .sqlite export instead"
        )
    made = out / path.with_suffix(".sqlite").name
    command = ["nsys", "export", "--type=sqlite", "--force-overwrite=true", f"--output={made}", str(path)]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        raise ValueError(f"nsys export of {path.name} failed: {(run.stderr or run.stdout).strip()[-300:]}")
    return made


def _show(rows: list[Row]) -> None:
    console = Console(width=max(Console().width, 110))
    first = rows[0]
    table = Table(title=f"{first['rank']}: ranges of {first['steps']} decode steps")
    for name in ("range", "kind", "a step", "median us", "p99 us", "share"):
        table.add_column(name, justify="left" if name in ("range", "kind") else "right")
    for r in first["ranges"]:
        table.add_row(r["range"], r["category"], f"{r['per_step']:g}", f"{r['us_p50']:.1f}",
                      f"{r['us_p99']:.1f}", f"{100 * r['share']:.1f}%")  # fmt: skip
    console.print(table)
    if "kernels" in first:
        per_layer = first["kernels_per_layer"]
        title = f"kernels: {first['kernels_per_step']:.0f} a step" + (
            f", {per_layer:.1f} a layer" if per_layer else ""
        )
        table = Table(title=title)
        for name in ("kernel", "a step", "median us", "share"):
            table.add_column(name, justify="left" if name == "kernel" else "right")
        for k in first["kernels"]:
            table.add_row(
                k["kernel"][:60], f"{k['per_step']:g}", f"{k['us_p50']:.1f}", f"{100 * k['share']:.1f}%"
            )
        console.print(table)
    console.print(_ranks_table(rows))


def _ranks_table(rows: list[Row]) -> Table:
    """What ranks differ in; microseconds a step."""
    columns: dict[str, Any] = {
        "rank": lambda r: r["rank"],
        "step": lambda r: f"{r['step_us']['p50']:.0f}",
        "p99": lambda r: f"{r['step_us']['p99']:.0f}",
        "collectives": lambda r: f"{r['collective_us']:.1f}",
    }
    if any(r.get("predictors") for r in rows):
        for title, key in (
            ("predictors", "us"),
            ("under a collective", "under_collective"),
            ("under attention", "under_attention"),
            ("under others", "under_other"),
            ("alone", "exposed"),
        ):
            columns[title] = lambda r, key=key: f"{r['predictors'][key]:.1f}"
        columns["hidden"] = lambda r: f"{100 * r['predictors']['hidden_share']:.0f}%"
    if "idle" in rows[0]:
        columns["GPU idle"] = lambda r: f"{r['idle']['us']:.1f} ({100 * r['idle']['share']:.1f}%)"
    table = Table(title="microseconds a step")
    for name in columns:
        table.add_column(name, justify="left" if name == "rank" else "right")
    for r in rows:
        table.add_row(*(cell(r) for cell in columns.values()))
    return table
