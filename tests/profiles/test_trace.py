"""Traces made on two H100 (the embedded model, sparse, captured), and small ones made up here."""

import json
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dejavu.profiles import graph_nodes, nvtx, trace_report
from dejavu.profiles.graph_nodes import Recorder
from dejavu.profiles.trace import Kernel, Process, Range, read, read_graphs, steps
from dejavu.profiles.trace_plots import timeline_page
from dejavu.profiles.trace_report import middle_step, report

DATA = Path(__file__).parent / "data"
STEPS, LAYERS = 11, 8


@pytest.fixture(scope="module")
def recorded():
    return read(DATA), read_graphs(DATA)


def test_a_replays_kernels_know_their_ranges(recorded):
    processes, graphs = recorded
    assert [process.label for process in processes] == ["rank 0", "rank 1"]
    for process in processes:
        found = steps(process, graphs)
        assert len(found) == STEPS
        for step in found:
            assert len(step.spans) == len(graphs[0])
            # names were not looked at to find the ranges
            for span in step.spans:
                if "_fc1_kernel" in span.label:
                    assert span.path[-1].endswith("/mlp")
                elif "_qkv_kernel" in span.label or "_decode_attention" in span.label:
                    assert span.path[-1].endswith("/attention")
                elif any(name in span.label for name in ("_down_kernel", "_up_kernel", "_compact_kernel")):
                    assert span.category == "predict" and span.path[0].endswith("/predict")
                elif "_reduce_residual_norm" in span.label or "nccl" in span.label:
                    assert span.category == "collective"


def test_a_report_of_replays(recorded):
    processes, graphs = recorded
    found = report(processes[1], steps(processes[1], graphs))
    per_step = {row["range"]: row["per_step"] for row in found["ranges"]}
    assert per_step == {
        "embed": 1,
        "layer.*": LAYERS,
        "layer.*/attention": LAYERS,
        "layer.*/attention/predict": 3,
        "layer.*/mlp": LAYERS,
        "layer.*/mlp/predict": LAYERS,
        "all_reduce": 2 * LAYERS + 1,
        "all_gather": 1,
        "head": 1,
        "sample": 1,
    }
    assert found["device"] == "NVIDIA H100 80GB HBM3" and found["steps"] == STEPS
    assert found["kernels_per_layer"] == pytest.approx(11.125)  # 7, and 3 for each predictor
    predictors = found["predictors"]
    parts = ("under_collective", "under_attention", "under_other", "exposed")
    assert predictors["us"] == pytest.approx(sum(predictors[part] for part in parts))
    assert predictors["under_attention"] > predictors["exposed"] > 0
    assert predictors["hidden_share"] == pytest.approx(1 - predictors["exposed"] / predictors["us"])
    assert 0 < found["idle"]["share"] < 0.2
    assert sum(row["per_step"] for row in found["kernels"]) <= found["kernels_per_step"] == 124


def test_nsight_systems_tables_give_the_same_report(recorded, tmp_path):
    """The torch trace, written as `nsys export --type sqlite` lays out its tables."""
    (process, _), graphs = recorded
    tid = (1 << 48) | (77 << 24) | 5  # host, process, thread
    strings = {name: i for i, name in enumerate(sorted({k.name for k in process.kernels}))}
    with closing(sqlite3.connect(tmp_path / "r.sqlite")) as db:
        db.executescript(
            """
            CREATE TABLE StringIds (id INTEGER, value TEXT);
            CREATE TABLE NVTX_EVENTS (start, end, eventType, category, text, globalTid, textId, domainId);
            CREATE TABLE CUPTI_ACTIVITY_KIND_RUNTIME (start, end, globalTid, correlationId);
            CREATE TABLE TARGET_INFO_GPU (name);
            CREATE TABLE CUPTI_ACTIVITY_KIND_KERNEL (start, end, streamId, correlationId, globalPid,
                shortName, gridX, gridY, gridZ, blockX, blockY, blockZ);
            """
        )
        db.execute("INSERT INTO TARGET_INFO_GPU VALUES (?)", [process.device])
        db.executemany("INSERT INTO StringIds VALUES (?, ?)", [(i, name) for name, i in strings.items()])
        events = [
            (0, None, 75, None, "dejavu", tid, None, 1),
            (1, None, 34, None, "rank 0 of 2", tid, None, 1),
        ]
        db.executemany("INSERT INTO NVTX_EVENTS VALUES (?, ?, ?, ?, ?, ?, ?, ?)", events)
        calls = {k.launch: (1e3 * k.launched, 1e3 * k.launched, tid, k.launch) for k in process.kernels}
        db.executemany("INSERT INTO CUPTI_ACTIVITY_KIND_RUNTIME VALUES (?, ?, ?, ?)", calls.values())
        db.executemany(
            f"INSERT INTO CUPTI_ACTIVITY_KIND_KERNEL VALUES ({', '.join('?' * 12)})",
            [
                (1e3 * k.start, 1e3 * k.end, k.stream, k.launch, tid - 5, strings[k.name], *k.shape)
                for k in process.kernels
            ],
        )
        db.commit()
    (found,) = read(tmp_path / "r.sqlite")
    assert (found.pid, found.label, found.device) == (77, "rank 0", process.device)
    expected = report(process, steps(process, graphs))
    got = report(found, steps(found, graphs))
    assert got.keys() == expected.keys()
    assert got["predictors"] == pytest.approx(expected["predictors"], rel=1e-3)
    assert [r["range"] for r in got["ranges"]] == [r["range"] for r in expected["ranges"]]
    assert got["step_us"] == pytest.approx(expected["step_us"], rel=1e-3)


def test_without_what_was_noted_at_capture_there_is_no_step(recorded, tmp_path):
    shutil.copy(DATA / "rank-0.json.gz", tmp_path)
    (process,) = read(tmp_path)
    with pytest.raises(ValueError, match=r"rank 0 has no decode step.*graph-\*.json"):
        report(process, steps(process, read_graphs(tmp_path)))


def test_the_lanes_of_a_replay_are_the_streams_that_were_captured(recorded):
    processes, graphs = recorded
    for step in steps(processes[0], graphs):
        assert {(span.lane, span.category in ("predict", "select")) for span in step.spans} == {
            ("main", False),
            ("for heads", True),
            ("for neurons", True),
        }


def test_the_picture(recorded, tmp_path):
    processes, graphs = recorded
    timeline_page(middle_step(steps(processes[0], graphs)), tmp_path / "t.png", title="a step")
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")


def kernel(name, start, end, launch, stream=7, shape=(1, 1, 1, 32, 1, 1)):
    return Kernel(name, start, end, stream, shape, launch, float(launch), 1)


RANGES = [
    Range("decode", "compute", 0, 100, 1),
    Range("layer.0", "compute", 10, 60, 1),
    Range("layer.0/attention", "compute", 10, 40, 1),
    Range("layer.0/mlp/predict", "predict", 12, 20, 1),
    Range("all_reduce", "collective", 30, 40, 1),
    Range("layer.0/mlp", "compute", 40, 60, 1),
    Range("sample", "compute", 90, 95, 1),
]


def test_kernels_launched_one_by_one_belong_to_the_range_around_their_launch():
    kernels = [
        kernel("attend", 200, 250, launch=11),
        kernel("choose", 210, 260, launch=13, stream=8),
        kernel("sum", 255, 275, launch=35),
        kernel("multiply", 270, 300, launch=41),  # begins early, and waits
        kernel("draw", 310, 315, launch=91),
        kernel("of no step", 400, 500, launch=150),
    ]
    (step,) = steps(Process(1, "rank 0", "GPU", RANGES, kernels), [])
    assert (step.start, step.end) == (200, 315)
    assert [span.path for span in step.spans] == [
        ("layer.0", "layer.0/attention"),
        ("layer.0/mlp/predict",),  # no part of the attention it was launched in
        ("layer.0", "layer.0/attention", "all_reduce"),
        ("layer.0", "layer.0/mlp"),
        ("sample",),
    ]
    row = report(Process(1, "rank 0", "GPU", RANGES, kernels), [step])
    assert row["predictors"] == {
        "us": 50,
        "under_attention": 40,
        "under_collective": 5,
        "exposed": 5,
        "under_other": 0,
        "hidden_share": 0.9,
    }
    assert [(span.start, span.end) for span in step.spans[2:4]] == [(255, 275), (275, 300)]
    assert row["idle"]["us"] == row["idle"]["longest_us"] == 10
    assert row["collective_us"] == 20


def test_on_a_cpu_the_ranges_are_what_there_is():
    (step,) = steps(Process(1, "rank 0", "", RANGES), [])
    row = report(Process(1, "rank 0", "", RANGES), [step])
    found = {r["range"]: (r["per_step"], r["us_p50"]) for r in row["ranges"]}
    assert found["layer.*"] == (1, 50) and found["all_reduce"] == (1, 10) and "decode" not in found
    assert row["step_us"]["p50"] == 100 and "predictors" not in row


def test_the_most_frequent_kind_of_step_is_reported():
    def node(grid):
        return {
            "path": ["decode", "layer.0"],
            "category": "compute",
            "grid": [grid, 1, 1],
            "block": [32, 1, 1],
        }

    graphs = [[node(1), node(1)], [node(1), node(2)]]
    kernels = []
    for launch, second in enumerate((1, 2, 2)):
        start = 100.0 * launch
        kernels += [
            kernel("a", start, start + 10, launch),
            kernel("b", start + 10, start + 20, launch, shape=(second, 1, 1, 32, 1, 1)),
        ]
    found = steps(Process(1, "rank 0", "GPU", [], kernels), graphs)
    assert [step.start for step in found] == [100, 200]


@pytest.mark.parametrize(
    "text", ["", "[]", '{"traceEvents": 3}', '{"traceEvents": []}', '{"traceEvents": ["x"]}']
)
def test_what_is_no_trace_is_named(tmp_path, text):
    (tmp_path / "graph-1-0.json").write_text("{")
    with pytest.raises(ValueError, match=r"graph-1-0\.json"):
        read_graphs(tmp_path)
    path = tmp_path / "rank-0.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=str(path)):
        read(path)


def test_a_truncated_trace_is_named(tmp_path):
    path = tmp_path / "rank-0.json.gz"
    path.write_bytes((DATA / "rank-0.json.gz").read_bytes()[:5000])
    with pytest.raises(ValueError, match=str(path)):
        read(path)


interval = st.tuples(st.integers(0, 50), st.integers(1, 10)).map(lambda x: (x[0], x[0] + x[1]))


@given(st.lists(interval), st.lists(interval))
def test_intervals(a, b):
    def points(intervals):
        return {x for start, end in intervals for x in range(start, end)}

    joined, other = trace_report._union(a), trace_report._union(b)
    assert points(joined) == points(a) and trace_report._measure(joined) == len(points(a))
    assert points(trace_report._overlap(joined, other)) == points(a) & points(b)
    assert points(trace_report._without(joined, other)) == points(a) - points(b)


class FakeGraph:
    def __init__(self):
        self.launched = []

    def launch(self, grid):
        self.launched.append(grid)

    def nodes(self):
        return list(range(len(self.launched)))

    def kernel(self, node):
        grid = self.launched[node]
        return None if grid is None else ([grid, 1, 1], [32, 1, 1])


def test_what_is_captured_belongs_to_the_innermost_range(monkeypatch):
    monkeypatch.setattr(nvtx, "_enabled", True)
    graph = FakeGraph()
    graph.launch(99)  # captured before anyone looked
    recorder = Recorder(graph)
    with nvtx.listening(recorder):
        graph.launch(1)
        with nvtx.nvtx_range("layer.0"):
            graph.launch(2)
            with nvtx.nvtx_range("all_reduce", "collective"):
                graph.launch(3)
                graph.launch(None)  # a copy
            graph.launch(4)
        graph.launch(5)
    recorder.claim()
    assert [(k["grid"][0], k["path"], k["category"]) for k in recorder.kernels] == [
        (1, ["decode"], "compute"),
        (2, ["decode", "layer.0"], "compute"),
        (3, ["decode", "layer.0", "all_reduce"], "collective"),
        (4, ["decode", "layer.0"], "compute"),
        (5, ["decode"], "compute"),
    ]


def test_a_capture_leaves_a_file_where_that_is_wanted(monkeypatch, tmp_path):
    monkeypatch.setattr(graph_nodes, "CapturedGraph", lambda stream: FakeGraph())
    monkeypatch.setattr(graph_nodes.torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    with graph_nodes.recorded():
        pass
    monkeypatch.setenv(graph_nodes.FOLDER, str(tmp_path))
    with graph_nodes.recorded():
        pass
    (path,) = tmp_path.glob("graph-*.json")
    assert json.loads(path.read_text()) == []
