"""What a profiler saw of a run, as decode steps: reports of Nsight Systems and traces of torch's profiler.

A kernel belongs to the innermost of our ranges in which it was launched. A CUDA graph's kernels are launched
by none: theirs were noted when it was captured (`dejavu.profiles.graph_nodes`), and are found again by grid
and block: those that share both are met in a replay in the order of their capture. Times are in microseconds.
"""

import gzip
import json
import re
import sqlite3
import zlib
from bisect import bisect_right
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dejavu.profiles.nvtx import DOMAIN

STEP = "decode"
_PUSH_POP, _CATEGORY, _MARK, _DOMAIN = 59, 33, 34, 75  # NVTX_EVENTS.eventType of Nsight Systems


@dataclass(frozen=True, slots=True)
class Range:
    """One of our ranges on the host."""

    name: str
    category: str
    start: float
    end: float
    thread: int


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel on the GPU; ``launch`` is the call that started it, which a graph's kernels share."""

    name: str
    start: float
    end: float
    stream: int
    shape: tuple[int, ...]  # grid and block
    launch: int
    launched: float | None
    thread: int


@dataclass(slots=True)
class Process:
    """A rank as the profiler saw it."""

    pid: int
    label: str = ""
    device: str = ""
    ranges: list[Range] = field(default_factory=list)
    kernels: list[Kernel] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Span:
    """A kernel or, on a CPU, a range; ``path`` is the ranges around it inside the step, outermost first, and
    ``lane`` the stream or thread it ran on. A graph's replay runs on streams that the driver picks anew, so
    there the lane is a name for those that were captured."""

    label: str
    path: tuple[str, ...]
    category: str
    start: float
    end: float
    lane: int | str


@dataclass(frozen=True, slots=True)
class Step:
    """One decode step; ``graph``: which of the recorded graphs was replayed, None if it was launched."""

    start: float
    end: float
    spans: tuple[Span, ...]
    graph: int | None = None


Node = dict[str, Any]
PREDICTION = ("predict", "select")  # categories
_DAMAGED = (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, zlib.error, sqlite3.Error)


def read(path: Path) -> list[Process]:
    """The ranks of a report: ``.sqlite`` of Nsight Systems, ``.json`` or ``.json.gz`` of torch, or a
    folder of ``rank-R.json``.

    Raises:
        ValueError: it is none of these, or damaged.
    """
    files = sorted(path.glob("rank-*.json*")) if path.is_dir() else [path]
    try:
        nsys = path.suffix == ".sqlite"
        found = _read_nsys(path) if nsys else [_read_torch(file) for file in files]
    except _DAMAGED as e:
        raise ValueError(f"cannot read {path}: {type(e).__name__}: {e}") from e
    found = [process for process in found if process.ranges or process.kernels]
    if not found:
        raise ValueError(f"{path} has no ranges of ours and no kernels: was the command a dejavu one?")
    return sorted(found, key=lambda process: (process.label, process.pid))


def read_graphs(folder: Path) -> list[list[Node]]:
    """What `dejavu.profiles.graph_nodes` has left in a folder.

    Raises:
        ValueError: a file is damaged.
    """
    graphs: list[list[Node]] = []
    for path in sorted(folder.glob("graph-*.json")):
        try:
            graphs.append(json.loads(path.read_text()))
        except _DAMAGED as e:
            raise ValueError(f"cannot read {path}: {type(e).__name__}: {e}") from e
    return graphs


def _read_torch(path: Path) -> Process:
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        trace = json.load(file)
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    rank = trace.get("distributedInfo", {}).get("rank")
    devices = trace.get("deviceProperties") or [{}]
    process = Process(0, "rank 0" if rank is None else f"rank {rank}", devices[0].get("name", ""))
    if match := re.search(r"rank-(\d+)", path.name):
        process.label = f"rank {match[1]}"
    calls = {}
    for event in events:
        category = event.get("cat")
        if category == "user_annotation" and event["name"].startswith(f"{DOMAIN}:"):
            _, kind, name = event["name"].split(":", 2)
            process.pid = event["pid"]
            end = event["ts"] + event["dur"]
            process.ranges.append(Range(name, kind, event["ts"], end, event["tid"]))
        elif category in ("cuda_runtime", "cuda_driver") and "correlation" in event["args"]:
            calls[event["args"]["correlation"]] = event["ts"], event["tid"]
    for event in events:
        if event.get("cat") == "kernel":
            a = event["args"]
            launched, thread = calls.get(a["correlation"], (None, 0))
            process.kernels.append(
                Kernel(
                    event["name"],
                    event["ts"],
                    event["ts"] + event["dur"],
                    a["stream"],
                    (*a["grid"], *a["block"]),
                    a["correlation"],
                    launched,
                    thread,
                )
            )
    return process


def _read_nsys(path: Path) -> list[Process]:
    found: dict[int, Process] = defaultdict(lambda: Process(0))
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as db:
        db.row_factory = sqlite3.Row
        tables = {name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if "NVTX_EVENTS" in tables:
            _read_nvtx(db, found)
        if "CUPTI_ACTIVITY_KIND_KERNEL" in tables:
            _read_kernels(db, found, tables)
    for pid, process in found.items():
        process.pid = pid
        process.label = process.label or f"process {pid}"
    return list(found.values())


def _pid(global_id: int) -> int:
    """Nsight Systems puts host, process and thread into one number."""
    return (global_id >> 24) & 0xFFFFFF


def _read_nvtx(db: sqlite3.Connection, found: dict[int, Process]) -> None:
    rows = db.execute(
        "SELECT start, end, eventType, category, globalTid, domainId, coalesce(text, value) AS text "
        "FROM NVTX_EVENTS LEFT JOIN StringIds ON textId = id"
    ).fetchall()
    ours = {(_pid(r["globalTid"]), r["domainId"]) for r in rows
            if r["eventType"] == _DOMAIN and r["text"] == DOMAIN}  # fmt: skip
    rows = [r for r in rows if (_pid(r["globalTid"]), r["domainId"]) in ours]
    categories = {
        (_pid(r["globalTid"]), r["category"]): r["text"] for r in rows if r["eventType"] == _CATEGORY
    }
    for r in rows:
        pid = _pid(r["globalTid"])
        if r["eventType"] == _MARK:
            found[pid].label = r["text"].partition(" of ")[0]
        elif r["eventType"] == _PUSH_POP and r["end"] is not None:
            kind = categories.get((pid, r["category"]), "compute")
            found[pid].ranges.append(Range(r["text"], kind, r["start"] / 1e3, r["end"] / 1e3, r["globalTid"]))


def _read_kernels(db: sqlite3.Connection, found: dict[int, Process], tables: set[str]) -> None:
    calls = {}
    if "CUPTI_ACTIVITY_KIND_RUNTIME" in tables:
        for r in db.execute("SELECT start, globalTid, correlationId FROM CUPTI_ACTIVITY_KIND_RUNTIME"):
            calls[_pid(r["globalTid"]), r["correlationId"]] = r["start"] / 1e3, r["globalTid"]
    gpu = db.execute("SELECT name FROM TARGET_INFO_GPU").fetchone() if "TARGET_INFO_GPU" in tables else None
    shape = "gridX, gridY, gridZ, blockX, blockY, blockZ"
    for r in db.execute(
        f"SELECT start, end, streamId, correlationId, globalPid, value, {shape} "
        "FROM CUPTI_ACTIVITY_KIND_KERNEL JOIN StringIds ON shortName = id"
    ):
        pid, launch = _pid(r["globalPid"]), r["correlationId"]
        launched, thread = calls.get((pid, launch), (None, 0))
        found[pid].device = gpu["name"] if gpu else ""
        found[pid].kernels.append(
            Kernel(r["value"], r["start"] / 1e3, r["end"] / 1e3, r["streamId"],
                   tuple(r[name] for name in shape.split(", ")), launch, launched, thread)
        )  # fmt: skip


def steps(process: Process, graphs: Sequence[list[Node]]) -> list[Step]:
    """The decode steps of a rank: replays, steps launched kernel by kernel or, without kernels, ranges.

    Of several kinds (a benchmark's policies, batches of several sizes) those of the most frequent one.
    """
    found = _all_steps(process, graphs)
    kinds = Counter(step.graph for step in found)
    return [step for step in found if step.graph == kinds.most_common(1)[0][0]]


def _all_steps(process: Process, graphs: Sequence[list[Node]]) -> list[Step]:
    if not process.kernels:
        return _host_steps(process)
    by_launch: dict[int, list[Kernel]] = defaultdict(list)
    for kernel in sorted(process.kernels, key=lambda kernel: kernel.start):
        by_launch[kernel.launch].append(kernel)
    shapes = [Counter(map(_shape, graph)) for graph in graphs]
    found = [_replay(group, graphs, shapes) for group in by_launch.values() if len(group) > 1]
    single = [group[0] for group in by_launch.values() if len(group) == 1]
    ranges = _Nested(process.ranges)
    launched: dict[Range, list[Span]] = defaultdict(list)
    for kernel in single:
        if kernel.launched is None:
            continue
        chain = ranges.around(kernel.launched, kernel.thread)
        if (step := next((r for r in chain if r.name == STEP), None)) is not None:
            path = [r.name for r in chain[chain.index(step) + 1 :]]
            launched[step].append(_span(kernel, path, chain[-1].category, kernel.stream))
    found += [_step(_in_turn(spans)) for spans in launched.values()]
    return sorted((step for step in found if step is not None), key=lambda step: step.start)


def _replay(
    kernels: Sequence[Kernel], graphs: Sequence[list[Node]], shapes: list[Counter[Any]]
) -> Step | None:
    """A replay's kernels, with the ranges of the graph that has as many of the same ``shapes``; None: no step
    of ours."""
    own = Counter(kernel.shape for kernel in kernels)
    if own not in shapes:
        return None
    number = shapes.index(own)
    waiting: dict[tuple[int, ...], deque[Node]] = defaultdict(deque)
    for node in graphs[number]:
        waiting[_shape(node)].append(node)
    spans = []
    for kernel in kernels:
        node = waiting[kernel.shape].popleft()
        path, category = node["path"][1:], node["category"]
        lane = "main"
        if category in PREDICTION:
            lane = "for heads" if "/attention/" in path[-1] else "for neurons"
        spans.append(_span(kernel, path, category, lane))
    return _step(_in_turn(spans), number)


def _shape(node: Node) -> tuple[int, ...]:
    return (*node["grid"], *node["block"])


def _span(kernel: Kernel, path: Sequence[str], category: str, lane: int | str) -> Span:
    if category in PREDICTION:
        path = path[-1:]  # launched in one block for another, beside it
    return Span(kernel.name, tuple(path), category, kernel.start, kernel.end, lane)


def _in_turn(spans: Sequence[Span]) -> list[Span]:
    """Kernels of a stream follow each other: one that began while its predecessor ran waited for it.

    ``spans`` are in the order in which they began."""
    free: dict[int | str, float] = defaultdict(float)
    found = []
    for span in spans:
        start = min(max(span.start, free[span.lane]), span.end)
        free[span.lane] = max(free[span.lane], span.end)
        found.append(replace(span, start=start))
    return found


def _step(spans: Sequence[Span], graph: int | None = None) -> Step:
    return Step(min(s.start for s in spans), max(s.end for s in spans), tuple(spans), graph)


def _host_steps(process: Process) -> list[Step]:
    ranges = _Nested(process.ranges)
    inside: dict[Range, list[Span]] = defaultdict(list)
    for r in process.ranges:
        chain = ranges.around(r.start, r.thread)
        if r not in chain:
            continue  # too short for the clock
        chain = chain[: chain.index(r) + 1]
        if (step := next((c for c in chain if c.name == STEP), None)) is not None and step is not r:
            path = tuple(c.name for c in chain[chain.index(step) + 1 :])
            inside[step].append(Span(r.name, path, r.category, r.start, r.end, r.thread))
    found = [Step(step.start, step.end, tuple(spans)) for step, spans in inside.items()]
    return sorted(found, key=lambda step: step.start)


class _Nested:
    """Ranges by thread, to be asked which of them lie around a point in time."""

    def __init__(self, ranges: Iterable[Range]) -> None:
        self._chains: dict[int, list[tuple[float, list[Range]]]] = defaultdict(list)
        stacks: dict[int, list[Range]] = defaultdict(list)
        for r in sorted(ranges, key=lambda r: (r.start, -r.end)):
            stack = stacks[r.thread]
            while stack and stack[-1].end <= r.start:
                stack.pop()
            stack.append(r)
            self._chains[r.thread].append((r.start, list(stack)))

    def around(self, time: float, thread: int) -> list[Range]:
        """From the outermost to the innermost."""
        chains = self._chains.get(thread, [])
        place = bisect_right(chains, time, key=lambda chain: chain[0])
        if place == 0:
            return []
        return [r for r in chains[place - 1][1] if r.end > time]
