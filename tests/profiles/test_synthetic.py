"""Synthetic models and predictors compute what they were made to compute."""

from dataclasses import replace

import pytest
import torch

from dejavu.kernels.predict import standardise
from dejavu.parallel.groups import TPGroup
from dejavu.predictors.selection import Tap
from dejavu.profiles.synthetic import (
    UNION_66B,
    Profile,
    Taps,
    paper75,
    set_live_share,
    synthetic_model,
    synthetic_policy,
    union66b,
)
from dejavu.runtime.config import published_config
from dejavu.runtime.engine import Engine
from dejavu.runtime.loading import check_memory
from dejavu.runtime.opt import OPTModel
from dejavu.runtime.sampling import SamplingParams
from dejavu.runtime.sparsity import lossless
from models import tiny_opt

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = tiny_opt(256, vocab_size=1000)
LAYERS = CONFIG.num_layers
STEPS = 60


@pytest.fixture(scope="module")
def model():
    return synthetic_model(CONFIG, TPGroup(), torch.float32)


def decode(model, batch, policy=None, selector=None, on_step=lambda: None):
    """The engine, after `STEPS` steps of as many sequences."""
    engine = Engine(model, None, model.tp, "", policy)
    ids = torch.randint(4, 1000, (batch, 20), generator=torch.Generator().manual_seed(0)).tolist()
    params = SamplingParams(max_new_tokens=STEPS + 1, ignore_eos=True)
    state = engine.prefill(ids, [params] * batch)
    for _ in range(STEPS):
        engine.decode_step(state, selector)
        on_step()
    return engine


def mean(shares):
    return sum(shares) / len(shares)


def test_the_papers_setting_of_opt_175b():
    profile = paper75(96)
    assert round(mean(profile.mlp), 3) == 0.195 and round(mean(profile.heads), 3) == 0.372
    assert profile.mlp.count(5000 / 49152) == 86 and profile.mlp.count(1.0) == 10
    assert {n: profile.heads.count(n) for n in (0.25, 0.5, 1.0)} == {0.25: 61, 0.5: 29, 1.0: 6}
    assert profile.heads[34] == profile.heads[62] == 0.5 and profile.heads[33] == profile.heads[63] == 0.25


@pytest.mark.parametrize("num_layers", [12, 24, 32, 40, 48, 64])
def test_the_papers_setting_stretched(num_layers):
    profile, whole = paper75(num_layers), paper75(96)
    assert len(profile.mlp) == len(profile.heads) == num_layers
    assert mean(profile.mlp) == pytest.approx(mean(whole.mlp), abs=0.02)
    assert mean(profile.heads) == pytest.approx(mean(whole.heads), abs=0.02)


@pytest.mark.parametrize("batch", UNION_66B)
def test_the_union_over_a_batch(batch):
    profile = union66b(64, batch)
    assert profile.mlp == (UNION_66B[batch],) * 64 and profile.heads == paper75(64).heads


def test_a_batch_whose_union_nobody_measured():
    with pytest.raises(ValueError, match=r"^union66b knows batches of 1, 2, 4, 8, 16, 32, 64, not of 3$"):
        union66b(64, 3)


@pytest.mark.parametrize(
    "batch, profile, lookahead",
    [
        (1, paper75(LAYERS), "half"),
        (4, union66b(LAYERS, 4), "one"),
        (3, Profile("half", (0.5,) * LAYERS, (1.0,) * LAYERS), "one"),
    ],
    ids=["paper75", "union66b", "half"],
)
def test_a_step_computes_what_its_profile_says(model, batch, profile, lookahead):
    taps = Taps()
    decode(model, batch, selector=taps)
    policy = synthetic_policy(model, profile, taps, rank=32, bits=8, lookahead=lookahead)
    density = decode(model, batch, policy).density()
    assert density["mlp"] == pytest.approx(mean(profile.mlp), rel=0.03)
    assert density["heads"] == pytest.approx(mean((1.0, *profile.heads[1:])), rel=0.03)
    sparse = {(kind, layer) for kind in ("mlp", "heads") for layer in range(LAYERS)
              if (profile.mlp if kind == "mlp" else profile.heads)[layer] < 1}  # fmt: skip
    assert set(policy.units) == sparse - {("heads", 0)}  # what no tap comes before
    back = -1 if lookahead == "half" else -2
    for (kind, layer), unit in policy.units.items():
        expected = Tap("attn_in", layer).shift(-1) if kind == "heads" else Tap("mlp_in", layer).shift(back)
        assert unit.tap == (expected if layer else Tap("attn_in", 0))


def test_a_dense_profile_has_no_predictors(model):
    dense = Profile("dense", (1.0,) * LAYERS, (1.0,) * LAYERS)
    assert not synthetic_policy(model, dense, Taps(), rank=32, bits=8).units


def spread(counts):
    """(p95 - p5) / mean over tokens, the first dimension."""
    return (counts.quantile(0.95, 0) - counts.quantile(0.05, 0)) / counts.mean(0)


def test_what_is_chosen_moves_with_the_token_as_in_a_real_model(model):
    """The spread that was measured (0.77 over all layers, 1.01 in one), as far as so few tokens show it."""
    taps, counts = Taps(), []
    decode(model, 1, selector=taps)
    policy = synthetic_policy(model, paper75(LAYERS), taps, rank=256, bits=8)
    neurons = [unit for unit in policy.units.values() if unit.kind == "mlp"]

    def note():
        counts.append([int(policy.buffers(1).of(unit, union=True)[1]) for unit in neurons])

    decode(model, 1, policy, on_step=note)
    found = torch.tensor(counts, dtype=torch.float32)
    assert found.shape == (STEPS, 11)
    assert float(spread(found.sum(1))) == pytest.approx(0.77, abs=0.25)
    assert float(spread(found).median()) == pytest.approx(1.01, abs=0.35)


def test_ranks_choose_apart_and_move_together():
    """Of weights that are nowhere: predictors need a model's sizes and a stream alone."""
    config = replace(CONFIG, ffn_dim=16384)
    stream = torch.randn(150, 1, 1, 256, generator=torch.Generator().manual_seed(1))
    taps = Taps()
    for tap in (Tap("attn_in", layer) for layer in range(LAYERS)):
        for row in stream:
            taps.observe(tap, row)
    profile = replace(paper75(LAYERS), heads=(1.0,) * LAYERS)
    masks = []
    for rank in range(2):
        with torch.device("meta"):
            share = OPTModel(config, tp=TPGroup(rank=rank, shares=2), dtype=torch.float32)
        policy = synthetic_policy(share, profile, taps, rank=128, bits=16)
        scores = [u.scorer(standardise(taps.at(u.tap)))[:, 0] > u.threshold for u in policy.units.values()]
        masks.append(torch.stack(scores, 1))  # [T, L, n]
    assert masks[0].shape == (150, 11, 8192)
    first, second = (mask.sum(-1).float() for mask in masks)
    assert float(mean([first.mean(), second.mean()])) == pytest.approx(8192 * 5000 / 49152, rel=0.01)
    assert not torch.equal(masks[0], masks[1])
    together = torch.corrcoef(torch.stack([first.sum(1), second.sum(1)]))[0, 1]
    assert float(together) > 0.9
    larger = (torch.maximum(first, second) / ((first + second) / 2)).mean()
    assert 1.02 < float(larger) < 1.12  # measured: 1.03; a small rank adds to it


@pytest.mark.parametrize("batch, rel", [(1, 0.05), (4, 0.2)])  # several at one position are a little alike
def test_as_many_are_live_as_is_said(model, batch, rel):
    set_live_share(model, 0.04)
    try:
        density = decode(model, batch, lossless(model)).density()
    finally:
        set_live_share(model, 1.0)
    assert density["mlp"] == pytest.approx(1 - 0.96**batch, rel=rel)
    assert density["heads"] == 1


def test_all_are_live_at_first(model):
    assert decode(model, 1, lossless(model)).density()["mlp"] > 0.99


def test_ranks_hold_the_same_of_what_all_hold_and_their_own_of_the_rest():
    config = replace(CONFIG, num_layers=1)
    first, again, second = (
        dict(synthetic_model(config, TPGroup(rank=rank, shares=2), torch.bfloat16).named_parameters())
        for rank in (0, 0, 1)
    )
    for name, parameter in first.items():
        assert torch.equal(parameter, again[name]), name
        split = "weight" in name and "layer_norm" not in name and "embed_positions" not in name
        assert torch.equal(parameter, second[name]) != split, name
        assert parameter.dtype == torch.bfloat16 and parameter.isfinite().all()


@pytest.fixture
def gpu(monkeypatch):
    """A rank of two on GPUs with 8 GiB free."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (8 * 2**30, 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    return TPGroup(rank=1, size=2, device=torch.device("cuda", 1))


def test_weights_that_do_not_fit_are_one_clear_line(gpu):
    check_memory(8 * 2**30, gpu, "opt-6.7b")  # just so
    with pytest.raises(ValueError) as error:
        check_memory(20 * 2**30, gpu, "opt-66b")
    assert str(error.value) == (
        "opt-66b needs 20.0 GiB of weights on each of 2 GPU(s), and NVIDIA H100 80GB HBM3 has 8.0 GiB free: "
        "use at least 5 GPUs, or a smaller model"
    )
    with pytest.raises(ValueError, match=r"^the model needs 6\d\.\d GiB of weights on each of 2 GPU\(s\)"):
        synthetic_model(published_config("opt-66b"), gpu, torch.bfloat16)


def test_the_cpu_is_not_asked_for_its_memory(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (0, 0))
    assert check_memory(2**60, TPGroup(), "opt-175b") is None
