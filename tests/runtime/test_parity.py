"""Invariant 1: dense output equals Hugging Face's, for every kind of model and number of ranks."""

import pytest
import torch

from models import KINDS, model_of
from parity import hugging_face, ours
from ranks import run_ranks

# how a matrix product is shared out over threads changes its rounding, by up to a tenth of the bound
pytestmark = pytest.mark.usefixtures("one_thread")

TOLERANCE = 1e-4  # max abs logit error in fp32 (DESIGN 3)


@pytest.fixture(scope="module", params=[*KINDS, "demo"])
def reference(request, tmp_path_factory, demo_tokenizer):
    """A model's directory and what Hugging Face makes of it."""
    directory = model_of(request.param, tmp_path_factory.mktemp("model"))
    return directory, hugging_face(directory, demo_tokenizer)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_greedy_text_and_logits_equal_hugging_face(reference, ranks):
    directory, expected = reference
    continuations = run_ranks(ranks, ours, directory)
    for found in continuations:
        assert found.token_ids == expected.token_ids
        torch.testing.assert_close(found.logits, expected.logits, atol=TOLERANCE, rtol=0)
