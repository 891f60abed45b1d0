"""`dejavu profile` on a CPU generation of two ranks, with real profilers."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

DEJAVU = [sys.executable, "-m", "dejavu.launch.cli"]
GENERATE = ["generate", "--prompt", "Once", "--max-new-tokens", "6", "--device", "cpu"]
STEPS, LAYERS = 5, 8
DATA = Path(__file__).parent.parent / "profiles" / "data"
has_nsys = pytest.mark.skipif(shutil.which("nsys") is None, reason="nsys is not installed")


def profile(*arguments, **environment):
    return subprocess.run(
        [*DEJAVU, "profile", *map(str, arguments)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("profiler", [pytest.param("nsys", marks=has_nsys), "torch"])
def test_the_ranges_of_two_ranks_by_name_and_count(profiler, tmp_path):
    launch = [*DEJAVU, "launch", "--nproc-per-node", "2", *GENERATE]
    run = profile("--with", profiler, "--out", tmp_path, "--json", "--", *launch)
    assert run.returncode == 0, run.stderr
    ranks = json.loads(run.stdout.splitlines()[-1])["ranks"]
    assert [rank["rank"] for rank in ranks] == ["rank 0", "rank 1"]
    for rank in ranks:
        assert rank["steps"] == STEPS and rank["device"] == "CPU"
        assert {row["range"]: (row["per_step"], row["category"]) for row in rank["ranges"]} == {
            "embed": (1, "compute"),
            "layer.*": (LAYERS, "compute"),
            "layer.*/attention": (LAYERS, "compute"),
            "layer.*/mlp": (LAYERS, "compute"),
            "all_reduce": (2 * LAYERS + 1, "collective"),
            "all_gather": (1, "collective"),
            "head": (1, "compute"),
            "sample": (1, "compute"),
        }
        assert 0 < rank["collective_us"] < rank["step_us"]["mean"]
    assert "layer.*/attention" in run.stdout
    assert (tmp_path / "timeline.png").exists()
    record = json.loads((tmp_path / "report.json").read_text())
    assert [row["rank"] for row in record["rows"] if "rank" in row] == ["rank 0", "rank 1"]
    made = tmp_path / "profile.nsys-rep" if profiler == "nsys" else tmp_path
    again = profile("--report", made, "--out", tmp_path / "again", "--json")
    assert json.loads(again.stdout.splitlines()[-1])["ranks"] == ranks


def test_a_report_made_elsewhere(tmp_path):
    run = profile("--report", DATA, "--out", tmp_path, "--json")
    assert run.returncode == 0, run.stderr
    assert "hidden" in run.stdout and "_qkv_kernel" in run.stdout
    first, second = json.loads(run.stdout.splitlines()[-1])["ranks"]
    assert first["predictors"]["hidden_share"] > 0.9 < second["predictors"]["hidden_share"]


def test_a_rank_that_is_profiled_by_itself_has_a_folder(tmp_path):
    environment = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    run = profile("--with", "torch", "--out", tmp_path, "--", *DEJAVU, *GENERATE, **environment)
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "0" / "report.json").exists() and (tmp_path / "0" / "timeline.png").exists()


def test_a_command_that_is_told_to_stop_is_reported_until_then(tmp_path):
    generate = ["generate", "--prompt", "Once", "--max-new-tokens", "1000", "--ignore-eos", "--device", "cpu"]
    run = subprocess.Popen(
        [*DEJAVU, "profile", "--with", "torch", "--out", tmp_path, "--", *DEJAVU, *generate],
        stdout=subprocess.PIPE,
        text=True,
    )
    said = ""
    while "a" not in said:  # its text has begun
        said += os.read(run.stdout.fileno(), 100).decode()
    run.send_signal(signal.SIGTERM)
    assert run.wait() == 0
    run.stdout.close()
    ranks = [row for row in json.loads((tmp_path / "report.json").read_text())["rows"] if "rank" in row]
    assert 0 < ranks[0]["steps"] < 999


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ((), "give a command to run, after --, or a --report to read"),
        (("--with", "perf", "--", "true"), "with='perf' is unknown: use nsys, torch"),
        (("--out", f"{__file__}/x", "--", "true"), f"cannot write to {__file__}/x: Not a directory"),
        (("--report", "nothing.sqlite"), "there is no report nothing.sqlite"),
        (
            ("--with", "torch", "--", "no-such-command"),
            "cannot run no-such-command: No such file or directory",
        ),
        (
            ("--with", "torch", "--", "true"),
            "no ranges of ours and no kernels: was the command a dejavu one?",
        ),
    ],
)
def test_mistakes_are_one_line(arguments, line, tmp_path):
    run = profile("--out", tmp_path, *arguments)
    assert run.returncode == 2 and run.stderr.startswith("error: ") and run.stderr.count("\n") == 1
    assert line in run.stderr


def test_without_nsys_the_line_says_what_to_do(tmp_path):
    run = profile("--out", tmp_path, "--", "true", PATH="/nowhere")
    assert run.returncode == 2
    assert run.stderr == "error: nsys is not on the path: install Nsight Systems, or use --with torch\n"


def test_a_command_that_fails_gives_its_status(tmp_path):
    run = profile("--with", "torch", "--out", tmp_path, "--", *DEJAVU, "generate", "--device", "gpu")
    assert run.returncode == 2 and run.stderr.splitlines()[-1].startswith("error: ")
