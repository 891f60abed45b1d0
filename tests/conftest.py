"""Fixtures and options shared by all tests."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test asks the network

import torch

if not torch.cuda.is_available():  # before anything imports the kernels: Triton decides then
    os.environ["TRITON_INTERPRET"] = "1"

from pathlib import Path

import pytest
from hypothesis import settings
from transformers import AutoTokenizer

from dejavu.profiles.records import device_name, device_slug, write_record
from dejavu.runtime.weights import find_model

settings.register_profile("any machine", deadline=None)  # a slow machine breaks no test
settings.load_profile("any machine")

RESULTS = Path(__file__).parent.parent / "profiles" / "results"


@pytest.fixture(scope="module")
def one_thread():
    """As forked ranks have: sums of more threads may round otherwise, and what is small is faster so."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def demo_tokenizer():
    return AutoTokenizer.from_pretrained(find_model("demo"))


def pytest_addoption(parser):
    parser.addoption(
        "--record-results",
        nargs="?",
        const=str(RESULTS),
        help="write what the tests measured (record_property) to this folder; by default profiles/results",
    )


def pytest_collection_modifyitems(items):
    gpus = torch.cuda.device_count()
    for item in items:
        needed = 2 if item.get_closest_marker("multi_gpu") else 1 if item.get_closest_marker("gpu") else 0
        if gpus < needed:
            item.add_marker(pytest.mark.skip(reason=f"needs {needed} CUDA device(s), {gpus} here"))


def pytest_terminal_summary(terminalreporter, config):
    directory = config.getoption("--record-results")
    if directory is None:
        return
    rows = [
        {"test": report.nodeid.split("::")[-1], "outcome": outcome, **dict(report.user_properties)}
        for outcome in ("passed", "failed", "error", "skipped")
        for report in terminalreporter.stats.get(outcome, [])
        if {"gpu", "multi_gpu"} & set(report.keywords)
    ]
    gpus, command = torch.cuda.device_count(), 'pytest -m "gpu or multi_gpu" --record-results'
    name, device = f"parity-{device_slug(gpus)}", device_name(gpus)
    path = write_record(Path(directory), name, rows, command=command, device=device)
    terminalreporter.write_line(f"recorded in {path}")
