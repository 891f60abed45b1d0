"""What is emitted, seen by a real NVTX injection library; and that nothing is when it is off."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dejavu.profiles import nvtx

GENERATE = [
    "-m",
    "dejavu.launch.cli",
    "generate",
    "--prompt",
    "Once",
    "--max-new-tokens",
    "4",
    "--device",
    "cpu",
]
STEPS, LAYERS = 3, 8  # three decode steps after the prefill, in the demo's eight layers


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    compiler = shutil.which("gcc") or shutil.which("cc")
    assert compiler, "this test needs a C compiler"
    out = tmp_path_factory.mktemp("nvtx") / "libnvtx_capture.so"
    source = Path(__file__).with_name("nvtx_capture.c")
    subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-o", out, source, "-lpthread"], check=True)
    return out


def capture(library, tmp_path, command, **environment):
    """The events of every process of ``command``, by process id."""
    run = subprocess.run(
        [sys.executable, *command],
        env={
            **os.environ,
            "NVTX_INJECTION64_PATH": str(library),
            "NVTX_CAPTURE_FILE": str(tmp_path / "%p.jsonl"),
            **environment,
        },
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    files = sorted(tmp_path.glob("*.jsonl"), key=lambda p: int(p.stem))
    events = [[json.loads(line) for line in path.read_text().splitlines()] for path in files]
    return [of_one for of_one in events if any(e["domain"] == nvtx.DOMAIN for e in of_one)]


def ranges(events):
    """(depth, category, name) of every range of our domain, in order; checks that each one ends."""
    ours = [e for e in events if e["domain"] == nvtx.DOMAIN]
    categories = {e["cat"]: e["name"] for e in ours if e["ev"] == "category"}
    pushed = [e for e in ours if e["ev"] == "push"]
    assert len(pushed) == sum(e["ev"] == "pop" for e in ours)
    return [(e["depth"], categories[e["cat"]], e["msg"]) for e in pushed]


def expected_step(name, tp):
    """The ranges of one step."""
    all_reduce = [("collective", "all_reduce")] if tp > 1 else []
    blocks = []
    for i in range(LAYERS):
        blocks += [(1, "compute", f"layer.{i}")]
        for block in ("attention", "mlp"):
            blocks += [(2, "compute", f"layer.{i}/{block}"), *((3, *c) for c in all_reduce)]
    return [
        (0, "compute", name),
        (1, "compute", "embed"),
        *((2, *c) for c in all_reduce),
        *blocks,
        (1, "compute", "head"),
        *([(2, "collective", "all_gather")] if tp > 1 else []),
        (1, "compute", "sample"),
    ]


def expected_run(tp):
    return [(0, "compute", "load"), *expected_step("prefill", tp), *STEPS * expected_step("decode", tp)]


def test_one_rank_emits_every_range_by_its_name(library, tmp_path):
    (events,) = capture(library, tmp_path, [*GENERATE, "--nvtx"])
    assert ranges(events) == expected_run(tp=1)


def test_two_ranks_emit_their_collectives(library, tmp_path):
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    found = capture(library, tmp_path, [*launch, *GENERATE], DEJAVU_NVTX="1")
    assert [ranges(events) for events in found] == [expected_run(tp=2)] * 2


def test_off_emits_nothing(library, tmp_path):
    assert capture(library, tmp_path, GENERATE) == []


def test_off_does_no_more_than_hand_out_one_object(monkeypatch):
    monkeypatch.setattr(nvtx, "_enabled", False)
    monkeypatch.setattr(nvtx, "_annotation", None)  # would fail if called
    assert nvtx.nvtx_range("layer.0") is nvtx.nvtx_range("all_reduce", "collective")
    with nvtx.nvtx_range("decode"):
        pass


def test_a_range_is_made_once(monkeypatch):
    monkeypatch.setattr(nvtx, "_enabled", True)
    assert nvtx.nvtx_range("layer.0") is nvtx.nvtx_range("layer.0")
    assert nvtx.nvtx_range("layer.0") is not nvtx.nvtx_range("layer.1")
