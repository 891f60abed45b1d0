"""Generation from outside: batches, ends, limits."""

import time
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.distributed.tensor.debug import CommDebugMode

from dejavu.runtime.engine import Engine
from dejavu.runtime.sampling import SamplingParams
from models import make_model
from ranks import run_ranks

PROMPTS = ["It was a dark night", "Once", "The old man looked at the sea, and the sea", "He said"]


@pytest.fixture(scope="module")
def engine():
    return Engine.from_pretrained("demo", device="cpu")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.9, "top_k": 50, "top_p": 0.9}])
def test_a_text_does_not_depend_on_its_batch(engine, settings):
    params = [SamplingParams(max_new_tokens=10 + 7 * i, seed=i, **settings) for i in range(4)]
    together = engine.generate(PROMPTS, params).results
    in_threes = engine.generate(PROMPTS, params, max_batch=3).results
    alone = [engine.generate([prompt], [p]).results[0] for prompt, p in zip(PROMPTS, params, strict=True)]
    assert together == alone == in_threes
    assert [len(r.token_ids) for r in together] == [10, 17, 24, 31]


def test_one_setting_for_all_draws_differently_for_each(engine):
    texts = [r.text for r in engine.generate(["Once"] * 3, SamplingParams(temperature=1.0)).results]
    assert len(set(texts)) == 3
    assert texts == [r.text for r in engine.generate(["Once"] * 3, SamplingParams(temperature=1.0)).results]


def sampled(tp):
    engine = Engine.from_pretrained("demo", tp=tp)
    params = SamplingParams(max_new_tokens=40, temperature=1.0, top_p=0.95, seed=3)
    return [r.token_ids for r in engine.generate(PROMPTS[:3], params).results]


def test_ranks_draw_the_same_tokens():
    first, second = run_ranks(2, sampled)
    assert first == second and len(first[0]) == 40


def test_a_stop_string_ends_the_text_before_it(engine):
    free = engine.generate(PROMPTS[:1], SamplingParams(max_new_tokens=40)).results[0]
    stop = free.text[20:26]
    pieces = []
    result = engine.generate(
        PROMPTS[:1],
        SamplingParams(max_new_tokens=40, stop=(stop,)),
        on_text=lambda i, text: pieces.append(text),
    ).results[0]
    assert result.finish_reason == "stop"
    assert result.text == "".join(pieces) == free.text[: free.text.index(stop)]
    assert len(result.token_ids) < len(free.token_ids)


def test_end_of_text_ends_one_sequence_and_not_the_other(engine, monkeypatch):
    free = engine.generate(PROMPTS[:2], SamplingParams(max_new_tokens=20)).results
    end = next(t for t in free[0].token_ids if t not in free[1].token_ids)
    monkeypatch.setattr(engine.model, "config", replace(engine.model.config, eos_token_id=end))
    first, second = engine.generate(PROMPTS[:2], SamplingParams(max_new_tokens=20)).results
    assert first.finish_reason == "stop" and first.token_ids[-1] == end
    assert first.token_ids == free[0].token_ids[: len(first.token_ids)]
    assert second == free[1]
    ignoring = engine.generate(PROMPTS[:2], SamplingParams(max_new_tokens=20, ignore_eos=True)).results
    assert [r.token_ids for r in ignoring] == [r.token_ids for r in free]


def test_a_generation_says_what_it_cost(engine):
    generation = engine.generate(PROMPTS[:2], SamplingParams(max_new_tokens=5))
    assert generation.ttft_ms > 0 and generation.tokens_per_s > 0
    assert 0 < generation.ms_per_token["p50"] <= generation.ms_per_token["p99"]
    parameters = {name: p.nbytes for name, p in engine.model.named_parameters()}
    assert generation.weight_bytes == sum(parameters.values()) - parameters["embed_positions.weight.data"]
    assert (generation.tp, generation.dtype, generation.device) == (1, "float32", "cpu")
    assert engine.generate(PROMPTS[:1], SamplingParams(max_new_tokens=1)).ms_per_token is None


def test_times_are_those_that_the_caller_sees(engine):
    start = time.perf_counter()
    params = SamplingParams(max_new_tokens=10)
    generation = engine.generate(PROMPTS[:1], params, on_text=lambda i, text: time.sleep(0.05))
    wall = time.perf_counter() - start
    assert generation.ms_per_token["mean"] > 50  # the callback's own time is in it
    assert generation.tokens_per_s > 10 / wall > 0


@pytest.mark.parametrize(
    "prompts, params, message",
    [
        ([], SamplingParams(), "no prompts"),
        ([""], SamplingParams(), "the prompt is empty"),
        ("Once", SamplingParams(), "is a string"),
        (["word " * 2000], SamplingParams(), r"a prompt of \d+ tokens .* 1024 positions"),
        (["Once"], SamplingParams(max_new_tokens=1024), "max_new_tokens=1024 do not fit"),
        (["Once"], [SamplingParams()] * 2, "1 prompts, but 2 sampling parameters"),
        ([["Once"]], SamplingParams(), "no string but a list"),
        (["\ud800"], SamplingParams(), "not valid Unicode: surrogates not allowed at character 0"),
    ],
)
def test_requests_that_cannot_be_answered(engine, prompts, params, message):
    with pytest.raises(ValueError, match=message):
        engine.generate(prompts, params)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_are_no_text(model_dir, value, temperature):
    engine = Engine.from_pretrained(str(model_dir), device="cpu")
    engine.model.final_layer_norm.bias[3] = value
    with pytest.raises(ValueError, match="no finite numbers: damaged weights, or too large for float32"):
        engine.generate(PROMPTS[:2], SamplingParams(temperature=temperature))


def test_all_positions_can_be_used(engine):
    ids = engine.tokenize("Once", SamplingParams())
    longest = engine.model.config.max_position_embeddings - len(ids)
    result = engine.generate(["Once"], SamplingParams(max_new_tokens=longest, ignore_eos=True)).results[0]
    assert len(result.token_ids) == longest


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_half_precision_runs_on_the_cpu(model_dir, dtype):
    half = Engine.from_pretrained(str(model_dir), dtype=dtype, device="cpu").generate(PROMPTS[:2])
    assert half.dtype == {"fp16": "float16", "bf16": "bfloat16"}[dtype]
    assert all(r.token_ids for r in half.results)


def collectives(tp, directory):
    """How often one decode step calls which collective."""
    engine = Engine.from_pretrained(str(directory), tp=tp)
    params = SamplingParams()
    state = engine.prefill([engine.tokenize("Once", params)], [params])
    with CommDebugMode() as mode:
        engine.decode_step(state)
    counts = Counter()
    for op, n in mode.get_comm_counts().items():
        counts[
            "all-reduce" if "allreduce" in str(op) else "all-gather" if "allgather" in str(op) else op
        ] += n
    return counts


@pytest.mark.parametrize("num_layers", [2, 5])
def test_two_all_reduces_a_layer_one_collective_for_each_end(tmp_path, num_layers):
    directory = make_model(tmp_path, num_hidden_layers=num_layers)
    for counts in run_ranks(2, collectives, directory):
        assert counts == {"all-reduce": 2 * num_layers + 1, "all-gather": 1}
    assert run_ranks(1, collectives, directory) == [{}]


def test_a_step_leaves_its_state_where_it_was(engine):
    params = SamplingParams()
    state = engine.prefill([engine.tokenize(p, params) for p in PROMPTS], [params] * 4)
    tensors = (state.tokens, state.cache.keys, state.cache.lengths, state.sampler.step)
    places = [t.data_ptr() for t in tensors]
    engine.decode_step(state)
    assert places == [t.data_ptr() for t in tensors]
    assert torch.equal(state.sampler.step, torch.tensor([2]))
