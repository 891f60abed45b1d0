"""A signal to any rank stops all of them after the same token."""

import os
import signal

import pytest

from dejavu.runtime.engine import Engine
from dejavu.runtime.preemption import Preemption
from dejavu.runtime.sampling import SamplingParams
from ranks import run_ranks

PROMPTS = ["Once", "The old man"]


def stopped_after(tp, tokens, max_batch):
    """The last rank gets a signal after so many tokens; the results, as every rank has them."""
    engine = Engine.from_pretrained("demo", tp=tp)
    preemption, seen = Preemption(tp), []

    def on_text(index, text):
        seen.append(index)
        if len(seen) == tokens and tp.rank == tp.size - 1:
            os.kill(os.getpid(), signal.SIGUSR1)

    params = SamplingParams(max_new_tokens=60, ignore_eos=True)
    output = engine.generate(
        PROMPTS, params, max_batch=max_batch, on_text=on_text, shall_stop=preemption.after_token
    )
    return output.preempted, output.results


@pytest.fixture(scope="module")
def whole():
    params = SamplingParams(max_new_tokens=60, ignore_eos=True)
    return Engine.from_pretrained("demo", device="cpu").generate(PROMPTS, params).results


@pytest.fixture
def handlers():
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("max_batch", [1, 2])
def test_all_ranks_stop_after_the_same_token(whole, handlers, size, max_batch):
    per_rank = run_ranks(size, stopped_after, 20, max_batch)
    assert all(found == per_rank[0] for found in per_rank)
    preempted, results = per_rank[0]
    assert preempted and {r.finish_reason for r in results} == {"preempted"}
    assert 0 < len(results[0].token_ids) < 60
    for result, full in zip(results, whole, strict=True):
        assert result.token_ids == full.token_ids[: len(result.token_ids)]
        assert full.text.startswith(result.text)
    assert (results[1].text == "") == (max_batch == 1)


def test_one_that_is_finished_stays_as_it_is(handlers, whole):
    preempted, results = stopped_after_all()
    assert preempted
    assert [r.finish_reason for r in results] == ["length", "preempted"]
    assert results[0] == whole[0] and len(results[1].token_ids) == 1


def stopped_after_all():
    engine = Engine.from_pretrained("demo", device="cpu")
    preemption = Preemption(engine.tp)
    first_ends = iter(range(10**6))
    params = SamplingParams(max_new_tokens=60, ignore_eos=True)

    def shall_stop():
        if next(first_ends) == 58:  # it is asked after every token but a batch's last
            os.kill(os.getpid(), signal.SIGTERM)
            return False
        return preemption.after_token()

    output = engine.generate(PROMPTS, params, max_batch=1, shall_stop=shall_stop)
    return output.preempted, output.results
