import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dejavu.runtime.sampling import Sampler, SamplingParams, sample


def sampler_of(params):
    steps = max(p.max_new_tokens for p in params)
    greedy = all(p.temperature == 0 for p in params)
    sampler = Sampler.empty(len(params), steps, torch.device("cpu"), greedy=greedy)
    sampler.begin(params)
    return sampler


def draw(logits, n=20_000, **params):
    """The frequencies of ``n`` draws from one row of logits."""
    sampler = sampler_of([SamplingParams(max_new_tokens=1, **{"temperature": 1.0, **params})])
    uniform = torch.rand(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tokens = sample(
        logits.expand(n, -1),
        *(t.expand(n) for t in (sampler.temperature, sampler.top_k, sampler.top_p)),
        uniform,
    )
    return torch.bincount(tokens, minlength=logits.shape[-1]) / n


LOGITS = torch.tensor([0.4, 0.1, 0.3, 0.2]).log()


def test_draws_follow_the_probabilities():
    torch.testing.assert_close(draw(LOGITS), torch.tensor([0.4, 0.1, 0.3, 0.2]), atol=0.015, rtol=0)


def test_temperature_sharpens():
    squared = torch.tensor([0.16, 0.01, 0.09, 0.04]) / 0.3
    torch.testing.assert_close(draw(LOGITS, temperature=0.5), squared, atol=0.015, rtol=0)


def test_top_k_keeps_the_k_likeliest():
    torch.testing.assert_close(draw(LOGITS, top_k=2), torch.tensor([4 / 7, 0, 3 / 7, 0]), atol=0.015, rtol=0)


@pytest.mark.parametrize(
    "top_p, kept", [(0.3, [0]), (0.5, [0, 2]), (0.69, [0, 2]), (0.75, [0, 2, 3]), (1.0, 4)]
)
def test_top_p_keeps_the_smallest_set_that_reaches_p(top_p, kept):
    found = draw(LOGITS, top_p=top_p).nonzero().flatten().tolist()
    assert found == (kept if isinstance(kept, list) else list(range(kept)))


def test_top_p_is_of_what_top_k_left():
    assert draw(LOGITS, top_k=2, top_p=0.55).nonzero().flatten().tolist() == [0]


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    vocab=st.integers(1, 300),
    top_k=st.integers(0, 400),
    top_p=st.floats(1e-20, 1),
    uniform=st.sampled_from([0.0, 0.25, 0.5, 1 - 2**-53]),
    temperature=st.floats(1e-40, 1e6),
)
def test_any_draw_is_a_token_that_was_left_in(seed, vocab, top_k, top_p, uniform, temperature):
    torch.manual_seed(seed)
    logits = 5 * torch.randn(1, vocab)
    one = torch.ones(1)
    token = sample(
        logits,
        temperature * one,
        torch.tensor([top_k]),
        top_p * one,
        torch.tensor([uniform], dtype=torch.float64),
    )
    logits = (logits.double() - logits.max()) / max(temperature, 1e-6)
    rank = (logits > logits[0, token]).sum()
    assert 0 <= token < vocab
    assert top_k == 0 or rank < top_k
    probs = logits.double().softmax(-1)
    kept = torch.where(logits >= logits.topk(min(top_k or vocab, vocab)).values[0, -1], probs, 0.0)
    mass_before = kept[logits > logits[0, token]].sum() / kept.sum()
    assert mass_before < top_p + 1e-5


def test_greedy_rows_of_a_mixed_batch_stay_greedy():
    params = [SamplingParams(), SamplingParams(temperature=1.0), SamplingParams(temperature=0.0, top_k=3)]
    sampler = sampler_of(params)
    torch.manual_seed(0)
    for _ in range(20):
        logits = torch.randn(3, 50)
        tokens = sampler(logits)
        assert tokens[0] == logits[0].argmax() and tokens[2] == logits[2].argmax()


def test_a_stream_depends_on_the_seed_alone():
    alone = sampler_of([SamplingParams(seed=7, temperature=1)])
    among = sampler_of(
        [SamplingParams(seed=1, temperature=1, max_new_tokens=90), SamplingParams(seed=7, temperature=1)]
    )
    torch.testing.assert_close(alone.uniforms[:, 0], among.uniforms[:64, 1], atol=0, rtol=0)
    assert not torch.equal(among.uniforms[:, 0], among.uniforms[:, 1])


@pytest.mark.parametrize("temperature", [1e-6, 1e-38, 1e-45])
def test_a_tiny_temperature_is_nearly_greedy(temperature):
    assert draw(torch.tensor([10.0, 20.0, -5.0]), n=100, temperature=temperature).tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_new_tokens": 0},
        {"max_new_tokens": 1.5},
        {"temperature": -1},
        {"temperature": float("nan")},
        {"temperature": "hot"},
        {"temperature": 10**400},
        {"top_k": 2**63},
        {"top_k": -1},
        {"top_p": 0},
        {"top_p": 1.01},
        {"seed": -1},
        {"stop": ("",)},
        {"stop": "end"},
    ],
)
def test_values_out_of_range_are_refused_by_name(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SamplingParams(**wrong)
