"""Records of measurements: ``profiles/results/NAME.json`` and the Markdown table drawn from it."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby
from pathlib import Path
from typing import Any

import torch


def write_record(
    directory: Path, name: str, rows: Sequence[Mapping[str, Any]], *, command: str = "", **conditions: Any
) -> Path:
    """Writes ``name.json`` and ``name.md`` with the rows and all that they depend on.

    Args:
        directory: where to; ``profiles/results`` for what is committed.
        rows: one measurement each; the table's columns are the keys of all rows.
        command: what a reader types to get the same; by default what this process was asked.
        conditions: dtype, shape, tp, batch and whatever else holds for every row.

    Returns:
        The JSON file's path.
    """
    record = {
        "name": name,
        "command": command or command_line(),
        "commit": _commit(),
        "date": datetime.now(UTC).date().isoformat(),
        "device": device_name(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        **conditions,
        "rows": list(rows),
    }
    directory.mkdir(parents=True, exist_ok=True)
    write_file(directory / f"{name}.md", _markdown(record))
    path = directory / f"{name}.json"
    write_file(path, json.dumps(record, indent=1) + "\n")
    return path


def write_file(path: Path, text: str) -> None:
    """Writes beside ``path`` and renames, so that nobody ever sees half a file under its name."""
    beside = path.with_name(path.name + ".partial")
    with beside.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def existing_folder(path: Path) -> Path:
    """``path`` or the nearest folder above it that is there: whose disk and rights ``path`` will have."""
    return next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())


def command_line() -> str:
    """What was typed, or does the same on as many ranks, without the folders of this machine."""
    ranks, here = _ranks(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    nodes = ["--nnodes", str(ranks // here)] if ranks > here else []
    launch = ["launch", *nodes, "--nproc-per-node", str(here)] if ranks > 1 else []
    return " ".join(["dejavu", *launch, *map(_without_folders, sys.argv[1:])])


def _without_folders(argument: str) -> str:
    """Hub ids and parts (1/2) have slashes too, but are no paths."""
    option, equals, value = argument.rpartition("=")
    path = Path(value.partition("@")[0])
    is_path = path.is_absolute() or value.startswith(("~", ".")) or path.exists()
    return option + equals + (value.rstrip("/").rpartition("/")[2] if is_path else value)


def device_name(gpus: int | None = None) -> str:
    """The hardware in words: ``2 x NVIDIA H200``, ``CPU``. One GPU a rank of this command, or ``gpus``."""
    return f"{gpus or _ranks()} x {torch.cuda.get_device_name(0)}" if torch.cuda.is_available() else "CPU"


def device_slug(gpus: int | None = None) -> str:
    """The hardware as part of a file's name: ``1xh100`` for one ``NVIDIA H100 80GB HBM3``."""
    if not torch.cuda.is_available():
        return "cpu"
    model = torch.cuda.get_device_name(0).removeprefix("NVIDIA ").split()[0]
    return f"{gpus or _ranks()}x{model.lower()}"


def _ranks() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _markdown(record: Mapping[str, Any]) -> str:
    """The conditions, and a table for each run of rows that begin with the same key."""
    plain = {k: v for k, v in record.items() if k not in ("name", "command", "rows")}
    conditions = ", ".join(f"{k} {v}" for k, v in plain.items() if not isinstance(v, Mapping))
    lines = [f"# {record['name']}", "", f"`{record['command']}`", "", conditions]
    for _, group in groupby(record["rows"], key=lambda row: next(iter(row), None)):
        rows = list(group)
        columns = list(dict.fromkeys(key for row in rows for key in row))
        lines += [
            "",
            f"| {' | '.join(columns)} |",
            f"|{' --- |' * len(columns)}",
            *(f"| {' | '.join(_cell(row.get(column)) for column in columns)} |" for row in rows),
        ]
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str:
    """The commit measured: from git, or from DEJAVU_COMMIT where the code was copied without its history."""
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        git = subprocess.run(describe, cwd=Path(__file__).parent, capture_output=True, text=True)
    except FileNotFoundError:
        git = None
    return (git and git.stdout.strip()) or os.environ.get("DEJAVU_COMMIT", "unknown")
