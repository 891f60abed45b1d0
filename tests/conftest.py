"""Fixtures and options shared by all tests."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test asks the network

import pytest
import torch
from transformers import AutoTokenizer

from dejavu.runtime.weights import find_model


@pytest.fixture(scope="session")
def demo_tokenizer():
    return AutoTokenizer.from_pretrained(find_model("demo"))


def pytest_collection_modifyitems(items):
    gpus = torch.cuda.device_count()
    for item in items:
        needed = 2 if item.get_closest_marker("multi_gpu") else 1 if item.get_closest_marker("gpu") else 0
        if gpus < needed:
            item.add_marker(pytest.mark.skip(reason=f"needs {needed} CUDA device(s), {gpus} here"))
