"""Captured decode steps on GPUs: the tokens of step by step, the right end, predictors beside the rest."""

from dataclasses import replace

import pytest
import torch
from texts import engine_of, on_a_rank, texts
from torch.profiler import ProfilerActivity, profile

from dejavu.parallel.groups import TPGroup
from dejavu.predictors.selection import Policy
from dejavu.runtime.sampling import SamplingParams
from parity import PROMPTS
from ranks import run_ranks

pytestmark = pytest.mark.gpu
PREDICTORS = ("_down_kernel", "_up_kernel", "_compact_kernel")


@pytest.mark.parametrize("sparsity", ["dense", "lossless", "demo"])
@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS], ids=["1", "3"])
@pytest.mark.parametrize("settings", [{}, {"temperature": 0.8, "top_k": 40}], ids=["greedy", "drawn"])
def test_replay_is_eager(sparsity, prompts, settings):
    """Token for token, 300 of them, twice over the same graph."""
    params = {"max_new_tokens": 300, "ignore_eos": True, **settings}
    expected, eager = texts(engine_of(sparsity, cuda_graph=False), prompts, **params)
    captured = engine_of(sparsity)
    for _ in range(2):
        found, generation = texts(captured, prompts, **params)
        assert found == expected
        assert generation.density == pytest.approx(eager.density)


@pytest.mark.parametrize("overlap", ["auto", "tap", "collective", "none"])
def test_when_predictors_run_changes_nothing(overlap):
    params = {"max_new_tokens": 200, "ignore_eos": True}
    expected, _ = texts(engine_of("demo", cuda_graph=False, overlap="none"), **params)
    for cuda_graph in (True, False):
        assert texts(engine_of("demo", overlap=overlap, cuda_graph=cuda_graph), **params)[0] == expected


def test_neurons_predicted_a_layer_ahead_are_the_same_in_a_graph():
    """They start at the end of a block, behind the step, and heads at their taps."""
    params = {"max_new_tokens": 200, "ignore_eos": True}

    def ahead(**options):
        engine = engine_of("demo", **options)
        units = engine.policy.units.values()
        early = [replace(u, tap=u.tap.shift(-1)) if u.kind == "mlp" and u.layer else u for u in units]
        engine.policy = Policy(early, engine.policy.num_layers)
        return engine

    expected, eager = texts(ahead(cuda_graph=False, overlap="none"), **params)
    found, generation = texts(ahead(), **params)
    assert found == expected and generation.density == pytest.approx(eager.density)
    assert 0 < eager.density["mlp"] < 1 and 0 < eager.density["heads"] < 1


def test_requests_end_where_they_end_step_by_step():
    """End of text, stop strings, lengths of their own; batches of several sizes over the same engine."""
    captured, eager = engine_of("demo"), engine_of("demo", cuda_graph=False)
    (long,), _ = texts(eager, PROMPTS[:1], max_new_tokens=60, ignore_eos=True)
    word = eager.tokenizer.decode(long[20:22])
    for engine in (captured, eager):
        engine.model.config = replace(engine.model.config, eos_token_id=long[9])
    for n in (1, 3, 2, 1):
        params = [
            SamplingParams(max_new_tokens=60 - 7 * i, stop=(word,), ignore_eos=i != 1) for i in range(n)
        ]
        found, expected = (
            [(r.token_ids, r.text, r.finish_reason) for r in e.generate(list(PROMPTS[:n]), params).results]
            for e in (captured, eager)
        )
        assert found == expected
    assert captured.generate(list(PROMPTS[:1]), SamplingParams()).results[0].finish_reason == "stop"


@pytest.mark.parametrize(("sparsity", "tokens"), [("lossless", 200), ("demo", 50)])
def test_captured_text_is_the_cpus(sparsity, tokens):
    """In fp32: predictors are packed on a GPU, so theirs may part from the CPU's later on."""
    params = {"max_new_tokens": tokens, "ignore_eos": True}
    for prompt in PROMPTS:
        expected, _ = texts(engine_of(sparsity, TPGroup()), [prompt], **params)
        assert texts(engine_of(sparsity, dtype="fp32"), [prompt], **params)[0] == expected


def test_the_host_waits_for_nothing_in_a_step():
    engine = engine_of("demo")
    params = SamplingParams(max_new_tokens=20, ignore_eos=True)
    state = engine.prefill([engine.tokenize(PROMPTS[0], params)], [params])
    torch.cuda.set_sync_debug_mode("error")
    try:
        engine.decode_step(state)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert state.cache.lengths.tolist() == [len(engine.tokenize(PROMPTS[0], params)) + 1]


@pytest.mark.parametrize("cuda_graph", [True, False], ids=["graph", "eager"])
def test_predictors_run_beside_the_main_stream(cuda_graph, record_property):
    """In a profiler's trace: replayed, while a kernel of the main stream runs; launched one by one, at least
    on streams of their own (whether at the same time is up to the host)."""
    engine = engine_of("demo", cuda_graph=cuda_graph)
    params = SamplingParams(max_new_tokens=40, ignore_eos=True)
    state = engine.prefill([engine.tokenize(PROMPTS[0], params)], [params])
    for _ in range(3):
        engine.decode_step(state)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(5):
            engine.decode_step(state)
        torch.cuda.synchronize()
    kernels = [e for e in profiler.events() if e.device_type.name == "CUDA" and "Mem" not in e.name]
    # not QKV and fc1, which are there early, whatever runs before them
    never_early = ("_weighted_rows_kernel", "_decode_attention_kernel")
    spans = [(e.time_range.start, e.time_range.end) for e in kernels if e.name in never_early]
    predictors = [e.time_range for e in kernels if e.name in PREDICTORS]
    assert len(predictors) == 5 * 3 * len(engine.policy.units)
    beside = [any(start < p.end and p.start < end for start, end in spans) for p in predictors]
    record_property("share_beside_the_main_stream", sum(beside) / len(beside))
    if cuda_graph:
        assert any(beside)
    else:
        theirs, others = (
            {e.device_resource_id for e in kernels if (e.name in PREDICTORS) == own} for own in (True, False)
        )
        assert theirs and theirs.isdisjoint(others)


CASES = [(sparsity, route) for route in ("nccl", "auto") for sparsity in ("dense", "lossless", "demo")]


@pytest.fixture(scope="module")
def on_two_gpus():
    """Of each rank, the texts of all cases, captured and eager; all in one start of two processes."""
    options = [
        {"sparsity": sparsity, "all_reduce": route, "cuda_graph": graph}
        for sparsity, route in CASES
        for graph in (True, False)
    ]
    return run_ranks(2, on_a_rank, options, cuda=True)


@pytest.mark.multi_gpu
@pytest.mark.parametrize("case", range(len(CASES)), ids=["-".join(case) for case in CASES])
def test_two_gpus_replay_what_they_launch(on_two_gpus, case):
    first, second = on_two_gpus
    captured, eager = 2 * case, 2 * case + 1
    assert first[captured] == second[captured] == first[eager] == second[eager]
