"""Predictors of every method against plain computations, on several ranks; stopped, refused, damaged."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from dejavu.parallel.groups import TPGroup
from dejavu.predictors import train as train_module
from dejavu.predictors.collect import Traces, collect, decode_table
from dejavu.predictors.corpus import Corpus
from dejavu.predictors.files import OperatingPoint, PredictorTensors, read_manifest, write_manifest
from dejavu.predictors.networks import dequantise, quantise
from dejavu.predictors.selection import Tap
from dejavu.predictors.train import TrainConfig, train
from dejavu.runtime.engine import Engine
from dejavu.runtime.sampling import SamplingParams
from models import KINDS, load_reference, make_model, windows_of
from ranks import run_ranks

pytestmark = pytest.mark.usefixtures("one_thread")

D, FFN, HEADS, HEAD_DIM = 32, 64, 4, 8
LAYERS = 2
QUICK = TrainConfig(rank=8, head_rank=4, epochs=2, batch=64)


def collected(tp, directory, windows, out):
    engine = Engine.from_pretrained(str(directory), tp=tp, dtype="fp32")
    corpus = Corpus(windows, "made.txt", f"{int(windows.sum()):064x}", 0, 1000)
    return collect(engine, corpus, out)


def trained(tp, model, traces, out, config, **settings):
    return train(model, traces, out, config, tp=tp, **settings)


def alone(model, traces, out, config=QUICK, **settings):
    return trained(TPGroup(), model, traces, out, config, **settings)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def traces_dir(tmp_path_factory, model_dir):
    out = tmp_path_factory.mktemp("traces") / "traces"
    collected(TPGroup(), model_dir, windows_of(24, 21), out)
    return out


@pytest.fixture(scope="module")
def model(model_dir):
    return load_reference(model_dir)


def files_of(directory):
    return {p.name: p.read_bytes() for p in sorted(directory.iterdir())}


def scorers(directory):
    """The manifest, and the scorers by name with all neurons and heads."""
    manifest = read_manifest(directory)
    tensors = PredictorTensors(directory, manifest.model, TPGroup())
    found = {e.name: tensors.scorer(e.name, e, lambda: None) for e in manifest.entries if not e.dense}
    return manifest, tensors, found


@pytest.mark.parametrize("ranks", [2, 4])
def test_any_number_of_ranks_makes_the_same_bytes(tmp_path, model_dir, traces_dir, ranks):
    config = replace(QUICK, refine_bits=4)
    alone(model_dir, traces_dir, tmp_path / "one", config, command="dejavu train")
    manifests = run_ranks(
        ranks, trained_with_command, model_dir, traces_dir, tmp_path / "many", config, "dejavu train"
    )
    assert set(files_of(tmp_path / "one")) == {"manifest.json", "predictors.safetensors"}
    assert files_of(tmp_path / "one") == files_of(tmp_path / "many")
    assert manifests == [read_manifest(tmp_path / "one")] * ranks
    assert manifests[0].commands == ["dejavu train"] and manifests[0].default is None
    assert [(s.use, s.file, s.tokens) for s in manifests[0].sources] == [("train", "made.txt", 24 * 21)]


def trained_with_command(tp, model, traces, out, config, command):
    return trained(tp, model, traces, out, config, command=command)


@pytest.mark.parametrize("kind", ["pre-norm", "post-norm with projections"])
def test_traces_of_any_number_of_ranks_give_the_same_sets(tmp_path, kind):
    directory, windows = make_model(tmp_path / "model", **KINDS[kind]), windows_of(12, 21)
    for ranks in (1, 4):
        run_ranks(ranks, collected, directory, windows, tmp_path / f"traces-{ranks}")
        alone(directory, tmp_path / f"traces-{ranks}", tmp_path / str(ranks))
    traces = Traces(tmp_path / "traces-1")
    (manifest, _, one), (_, _, four) = scorers(tmp_path / "1"), scorers(tmp_path / "4")
    entries = {e.name: e for e in manifest.entries}
    assert set(one) == set(four) == {"mlp.0", "mlp.1", "heads.1"}
    for name in one:
        z = traces.tap(Tap.parse(entries[name].tap))[None].float()
        a, b = one[name](z), four[name](z)
        threshold = a.quantile(0.8)
        # training enlarges what rounding does to the traces; what is not trained on activations stays
        blur = 1e-5 if name == "heads.1" else 5e-3
        torch.testing.assert_close(a, b, atol=blur * float(a.std()), rtol=0)
        clear = (a - threshold).abs() > blur * a.std()
        assert clear.float().mean() > 0.98 and torch.equal((a > threshold)[clear], (b > threshold)[clear])


class StoppedError(Exception):
    pass


def stopped(tp, model, traces, out, config, after):
    """Trains until so many predictors are there."""

    def stop(done, total):
        assert total == 3
        if done >= after:
            raise StoppedError

    with pytest.raises(StoppedError):
        trained(tp, model, traces, out, config, on_progress=stop)


@pytest.mark.parametrize("after, ranks", [(1, 1), (2, 1), (3, 1), (1, 2)])
def test_a_stopped_training_goes_on_to_the_same_bytes(tmp_path, model_dir, traces_dir, after, ranks):
    run_ranks(ranks, stopped, model_dir, traces_dir, tmp_path / "stopped", QUICK, after)
    left = {p.name for p in (tmp_path / "stopped.partial").iterdir()}
    assert "plan.json" in left and len(left) >= 1 + after and not (tmp_path / "stopped").exists()
    made = {p: p.stat().st_mtime_ns for p in (tmp_path / "stopped.partial").glob("*.safetensors")}
    seen = []
    alone(
        model_dir,
        traces_dir,
        tmp_path / "stopped",
        on_progress=lambda *step: seen.append({p: p.stat().st_mtime_ns for p in made}),
    )
    assert seen == [made] * 3  # what was there is not made again
    alone(model_dir, traces_dir, tmp_path / "whole")
    assert files_of(tmp_path / "stopped") == files_of(tmp_path / "whole")
    assert not (tmp_path / "stopped.partial").exists()


def test_training_that_is_stopped_at_its_end_goes_on(tmp_path, model_dir, traces_dir, monkeypatch):
    def full(*arguments):
        raise OSError("no space left")

    alone(model_dir, traces_dir, tmp_path / "whole")
    for name in ("write_manifest", "save_tensors"):
        out = tmp_path / name
        with monkeypatch.context() as patch:
            patch.setattr(train_module, name, full)
            with pytest.raises(ValueError, match="no space left"):
                alone(model_dir, traces_dir, out)
        assert not out.exists()
        alone(model_dir, traces_dir, out)
        assert files_of(out) == files_of(tmp_path / "whole")


def test_what_was_left_without_a_plan_is_begun_again(tmp_path, model_dir, traces_dir):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "mlp.0.safetensors").write_bytes(b"damaged")
    alone(model_dir, traces_dir, tmp_path / "out")
    assert set(files_of(tmp_path / "out")) == {"manifest.json", "predictors.safetensors"}


def refused(tp, model, traces, out, config=QUICK, **settings):
    with pytest.raises(ValueError) as error:
        trained(tp, model, traces, out, config, **settings)
    assert "\n" not in str(error.value)
    return str(error.value)


def refused_alone(*arguments, **settings):
    return refused(TPGroup(), *arguments, **settings)


def test_training_begun_otherwise_is_not_gone_on_with(tmp_path, model_dir, traces_dir):
    out = tmp_path / "out"
    stopped(TPGroup(), model_dir, traces_dir, out, QUICK, 1)
    before = files_of(tmp_path / "out.partial")
    collected(TPGroup(), model_dir, windows_of(3, 21, seed=1), tmp_path / "others")
    expected = "out.partial was begun with other options or traces: remove it first"
    assert refused_alone(model_dir, traces_dir, out, replace(QUICK, lr=1e-3)).endswith(expected)
    assert refused_alone(model_dir, traces_dir, out, replace(QUICK, ranks={"mlp.0": 3})).endswith(expected)
    assert refused_alone(model_dir, tmp_path / "others", out).endswith(expected)
    for message in run_ranks(2, refused, model_dir, tmp_path / "others", out):
        assert message.endswith(expected)
    assert files_of(tmp_path / "out.partial") == before


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_exists_is_not_written_over(tmp_path, model_dir, traces_dir, ranks):
    (tmp_path / "out").mkdir()
    for message in run_ranks(ranks, refused, model_dir, traces_dir, tmp_path / "out"):
        assert message.endswith("out exists already")
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


METHODS = {
    "predicted": QUICK,
    "predicted by the paper's labels": replace(QUICK, labels="paper", weighting=0.0),
    "predicted in 2 bits": replace(QUICK, bits=2),
    "predicted in 4 bits": replace(QUICK, bits=4),
    "predicted of too large a rank": replace(QUICK, rank=40, head_rank=40),
    "predicted with a second stage": replace(QUICK, refine_bits=3),
    "svd": replace(QUICK, method="svd"),
    "svd without traces": replace(QUICK, method="svd"),
    "svd in 8 bits": replace(QUICK, method="svd", bits=8),
    "sign": replace(QUICK, method="sign"),
    "sign without traces": replace(QUICK, method="sign"),
    "lsh without traces": replace(QUICK, method="lsh", rank=64),
    "quantized in 2 bits without traces": replace(QUICK, method="quantized", bits=2),
    "quantized in 3 bits without traces": replace(QUICK, method="quantized", bits=3),
    "quantized in 4 bits without traces": replace(QUICK, method="quantized", bits=4),
    "quantized in 16 bits without traces": replace(QUICK, method="quantized"),
    "static": replace(QUICK, method="static"),
    "random": replace(QUICK, method="random"),
    "random without traces": replace(QUICK, method="random"),
    "oracle": replace(QUICK, method="oracle"),
    "oracle without traces": replace(QUICK, method="oracle"),
}  # fmt: skip


def calibrated_by_hand(directory, threshold):
    """Gives every predictor one threshold."""
    manifest = read_manifest(directory)
    thresholds = {key: [threshold] * LAYERS for key in ("mlp", "heads", "refine")}
    point = OperatingPoint(thresholds=thresholds, mlp_density=0.5, head_density=0.5, ppl_increase=0, kl=0)
    write_manifest(directory, manifest.model_copy(update={"points": [point], "default": 0}))


@pytest.mark.parametrize("name", METHODS)
def test_every_method_makes_predictors_that_run(tmp_path, model_dir, traces_dir, name):
    config, out = METHODS[name], tmp_path / "out"
    without = "without traces" in name or config.method in ("sign", "lsh", "quantized")
    traces = None if without else traces_dir
    manifest = alone(model_dir, traces, out, config)
    assert manifest == read_manifest(out)
    assert manifest.method == config.method and manifest.lookahead == "half"
    from_fc1 = config.method in ("svd", "sign", "lsh", "quantized")
    sparse_heads = [False, not from_fc1]  # nothing comes before layer 0's, and all methods are compared alike
    assert [not e.dense for e in manifest.of("heads")] == sparse_heads
    assert not any(e.dense for e in manifest.of("mlp"))
    assert len(manifest.sources) == (traces is not None)
    calibrated_by_hand(out, 0.25)
    engine = Engine.from_pretrained(str(model_dir), device="cpu", dtype="fp32", sparsity=str(out))
    for (kind, _), unit in engine.policy.units.items():
        assert (unit.mean is not None) == (kind == "heads" and traces is not None)
    generation = engine.generate(["It was a dark night"], SamplingParams(max_new_tokens=6, ignore_eos=True))
    assert generation.policy == config.method and len(generation.results[0].token_ids) == 6
    assert 0 < generation.density["mlp"] < 1
    assert 0 <= generation.density["heads"] <= 1 and (generation.density["heads"] == 1 or any(sparse_heads))


@pytest.mark.parametrize("method", ["predicted", "static"])
def test_methods_that_need_traces(tmp_path, model_dir, method):
    message = refused_alone(model_dir, None, tmp_path / "out", replace(QUICK, method=method))
    assert message == f"method {method} needs --traces"
    assert not list(tmp_path.iterdir())


TAPS = {
    "none": (["mlp_in[0]", "mlp_in[1]", "mlp_in[2]"], ["attn_in[0]", "attn_in[1]", "attn_in[2]"]),
    "half": (["attn_in[0]", "attn_in[1]", "attn_in[2]"], [None, "mlp_in[0]", "mlp_in[1]"]),
    "one": (["attn_in[0]", "mlp_in[0]", "mlp_in[1]"], [None, "attn_in[0]", "attn_in[1]"]),
    "two": (["attn_in[0]", "attn_in[0]", "mlp_in[0]"], [None, "attn_in[0]", "attn_in[0]"]),
}


@pytest.mark.parametrize("lookahead", TAPS)
def test_taps_of_a_lookahead(lookahead):
    config = TrainConfig(lookahead=lookahead, refine_bits=4)
    for kind, expected in zip(("mlp", "heads"), TAPS[lookahead], strict=True):
        entries = [config.entry(kind, layer) for layer in range(3)]
        assert [e.tap for e in entries] == expected
        assert [e.dense for e in entries] == [tap is None for tap in expected]
        if kind == "mlp":  # a second stage reads what the MLP itself reads
            assert [e.refine.tap for e in entries] == ["mlp_in[0]", "mlp_in[1]", "mlp_in[2]"]


@pytest.mark.parametrize("lookahead", ["none", "one", "two"])
def test_training_at_every_lookahead(tmp_path, model_dir, traces_dir, lookahead):
    manifest = alone(model_dir, traces_dir, tmp_path / "out", replace(QUICK, lookahead=lookahead))
    for kind, expected in zip(("mlp", "heads"), TAPS[lookahead], strict=True):
        assert [e.tap for e in manifest.of(kind)] == expected[:LAYERS]
    assert read_manifest(tmp_path / "out").lookahead == lookahead
    calibrated_by_hand(tmp_path / "out", 0.0)
    Engine.from_pretrained(str(model_dir), device="cpu", sparsity=str(tmp_path / "out"))


def test_exceptions_to_the_rank(tmp_path, model_dir, traces_dir):
    config = replace(QUICK, ranks={"mlp.1": 3, "heads.1": 2})
    manifest, _, found = scorers_of(model_dir, traces_dir, tmp_path, config)
    assert [e.rank for e in manifest.entries] == [8, 3, None, 2]
    assert found["mlp.0"].down.shape == (8, D) and found["mlp.1"].down.shape == (3, D)
    assert found["heads.1"].up.shape == (HEADS, 2)
    for name in ("mlp.2", "attention.0", "mlp", "mlp.00"):
        message = refused_alone(model_dir, traces_dir, tmp_path / "no", replace(QUICK, ranks={name: 3}))
        assert message == (
            f"there is no predictor {name} that has a rank: they are called KIND.LAYER, as mlp.0"
        )


def scorers_of(model_dir, traces_dir, folder, config):
    alone(model_dir, traces_dir, folder / "out", config)
    return scorers(folder / "out")


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"lookahead": "three"}, "lookahead='three' is unknown: use none, half, one, two"),
        ({"method": "magic"}, "method='magic' is unknown: use predicted, svd, sign, "),
        ({"kinds": ()}, "expected one or both of mlp and heads"),
        ({"kinds": ("mlp", "attention")}, "expected one or both of mlp and heads"),
        ({"labels": "none"}, "labels='none' is unknown: use contribution or paper"),
        ({"bits": 5}, "bits=5 is not one of"),
        ({"refine_bits": 16}, "refine_bits=16 is not one of"),
        ({"rank": 0}, "rank=0 is less than 1"),
        ({"head_rank": -1}, "head_rank=-1 is less than 1"),
        ({"batch": 0}, "batch=0 is less than 1"),
        ({"ranks": {"mlp.0": 0}}, "rank 0 of mlp.0 is less than 1"),
        ({"epochs": 0}, "epochs=0"),
        ({"epochs": float("nan")}, "epochs=nan"),
        ({"lr": 1.0}, "lr=1.0"),
        ({"lr": -1e-3}, "lr=-0.001"),
        ({"weighting": 5}, "weighting=5"),
    ],
)
def test_options_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**settings)


def test_a_kind_given_twice(tmp_path, model_dir):
    with pytest.raises(ValueError, match="expected one or both"):
        replace(QUICK, method="svd", kinds=("mlp", "mlp"))


@torch.no_grad()
def folded(model, layer):
    """fc1 as it acts on the standardised stream, in a model with norms before its blocks."""
    block = model.model.decoder.layers[layer]
    gain, shift = block.final_layer_norm.weight, block.final_layer_norm.bias
    return block.fc1.weight * gain, block.fc1.bias + block.fc1.weight @ shift


def activations_of(traces, layer):
    codes = torch.cat(traces.neurons(layer), dim=1).long()
    return decode_table(torch.device("cpu"))[codes]


def test_a_rank_larger_than_fc1_has(tmp_path, model_dir):
    alone(model_dir, None, tmp_path / "out", replace(QUICK, method="svd", rank=40))
    for scorer in scorers(tmp_path / "out")[2].values():
        assert scorer.down.shape == (40, D) and not scorer.down[D:].any() and not scorer.up[:, D:].any()


@pytest.mark.parametrize("settings", [{"method": "svd", "rank": D}, {"method": "quantized", "bits": 16}])
def test_scores_made_of_all_of_fc1_are_the_activations(tmp_path, model_dir, traces_dir, settings):
    config = replace(QUICK, lookahead="none", **settings)
    alone(model_dir, None, tmp_path / "out", config)
    traces, found = Traces(traces_dir), scorers(tmp_path / "out")[2]
    for layer in range(LAYERS):
        scores = found[f"mlp.{layer}"](traces.tap(Tap("mlp_in", layer))[None].float())[0]
        torch.testing.assert_close(scores.relu(), activations_of(traces, layer), atol=0.05, rtol=0.05)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_quantised_rows_of_fc1(tmp_path, model_dir, model, bits):
    alone(model_dir, None, tmp_path / "out", replace(QUICK, method="quantized", bits=bits))
    found = scorers(tmp_path / "out")[2]
    for layer in range(LAYERS):
        weight, bias = folded(model, layer)
        torch.testing.assert_close(found[f"mlp.{layer}"].weight, dequantise(*quantise(weight, bits)))
        torch.testing.assert_close(found[f"mlp.{layer}"].bias, bias)


def test_signs_and_hashes_of_fc1(tmp_path, model_dir, model):
    alone(model_dir, None, tmp_path / "sign", replace(QUICK, method="sign"))
    alone(model_dir, None, tmp_path / "lsh", replace(QUICK, method="lsh", rank=4096))
    sign, lsh = scorers(tmp_path / "sign")[2], scorers(tmp_path / "lsh")[2]
    z = torch.randn(1, 100, D, generator=torch.Generator().manual_seed(0))
    for layer in range(LAYERS):
        weight, bias = folded(model, layer)
        exact = z @ weight.T + bias
        scale = weight.abs().mean(-1, keepdim=True)
        torch.testing.assert_close(sign[f"mlp.{layer}"].weight, weight.sign() * scale, atol=1e-3, rtol=1e-3)
        for scorer, least in ((sign, 0.5), (lsh, 0.99)):
            scores = scorer[f"mlp.{layer}"](z)
            assert torch.corrcoef(torch.stack([scores.flatten(), exact.flatten()]))[0, 1] > least


def test_a_regression_is_the_best_linear_map(tmp_path, model_dir, model, traces_dir):
    """Its scores are the best estimates of the pre-activations, in units of each neuron's error."""
    alone(model_dir, traces_dir, tmp_path / "whole", replace(QUICK, method="svd", rank=40))
    alone(model_dir, traces_dir, tmp_path / "low", replace(QUICK, method="svd", rank=4))
    traces, whole, low = Traces(traces_dir), scorers(tmp_path / "whole")[2], scorers(tmp_path / "low")[2]
    for layer in range(LAYERS):
        weight, bias = folded(model, layer)
        z = traces.tap(Tap("attn_in", layer)).double()
        wanted = traces.tap(Tap("mlp_in", layer)).double() @ weight.T.double() + bias
        centred, mean = z - z.mean(0), wanted.mean(0)
        # standardised, it has no part along the vector of ones but rounding
        slope = torch.linalg.lstsq(centred, wanted - mean, rcond=1e-3, driver="gelsd").solution
        best = centred @ slope + mean
        expected = best / (best - wanted).square().mean(0).sqrt()
        scores = whole[f"mlp.{layer}"](z[None].float())[0].double()
        torch.testing.assert_close(scores, expected, atol=0.02 * float(expected.std()), rtol=0.02)
        assert float((scores - expected).abs().mean()) < 0.005 * float(expected.std())
        coarse = low[f"mlp.{layer}"](z[None].float())[0].double()
        agreement = [
            torch.corrcoef(torch.stack([x.flatten(), wanted.flatten()]))[0, 1] for x in (scores, coarse)
        ]
        assert 0.3 < agreement[1] < agreement[0] - 0.02


def test_means_of_the_traces(tmp_path, model_dir, model, traces_dir):
    _, tensors, found = scorers_of(model_dir, traces_dir, tmp_path, replace(QUICK, method="static"))
    traces = Traces(traces_dir)
    for layer in range(LAYERS):
        block = model.model.decoder.layers[layer]
        contribution = activations_of(traces, layer) * block.fc2.weight.detach().norm(dim=0)
        torch.testing.assert_close(found[f"mlp.{layer}"].scores, contribution.mean(0), rtol=1e-4, atol=1e-5)
        if layer == 0:  # its heads are dense
            assert tensors.head_mean(0) is None and "heads.0" not in found
            continue
        outputs = torch.cat(traces.heads(layer), dim=1).float()
        mean = outputs.mean(0)
        torch.testing.assert_close(tensors.head_mean(layer), mean)
        W = block.self_attn.out_proj.weight.detach().T.unflatten(0, (HEADS, HEAD_DIM))
        wrong_by = torch.einsum("tnh,nhd->tnd", outputs - mean, W).norm(dim=-1)
        torch.testing.assert_close(found[f"heads.{layer}"].scores, wrong_by.mean(0), rtol=1e-3, atol=1e-4)


def test_random_and_oracle(tmp_path, model_dir):
    config = replace(QUICK, method="random", lookahead="none")
    alone(model_dir, None, tmp_path / "7", replace(config, seed=7))
    alone(model_dir, None, tmp_path / "8", replace(config, seed=8))
    positions = torch.arange(4000).view(2, 2000)
    scores = [
        scorer(positions)[..., :HEADS].flatten()
        for seed in ("7", "8")
        for scorer in scorers(tmp_path / seed)[2].values()
    ]
    assert len(scores) == 8  # of two seeds, two kinds and two layers
    assert all(0 <= x.min() < 0.01 and 0.99 < x.max() < 1 for x in scores)
    assert (torch.corrcoef(torch.stack(scores)) - torch.eye(8)).abs().max() < 0.05
    manifest = alone(model_dir, None, tmp_path / "oracle", replace(QUICK, method="oracle", kinds=("mlp",)))
    assert [e.name for e in manifest.entries] == ["mlp.0", "mlp.1"]


def kept(scores, contribution, density):
    """The share of the contribution of so many entries, those of the highest scores."""
    order = scores.flatten().argsort(descending=True)[: int(density * scores.numel())]
    return float(contribution.flatten()[order].sum() / contribution.sum())


@pytest.fixture(scope="module")
def well_trained(tmp_path_factory, model_dir):
    """Predictors of more text than the other tests have, and traces that they have not seen."""
    folder = tmp_path_factory.mktemp("well")
    collected(TPGroup(), model_dir, windows_of(100, 26), folder / "traces")
    collected(TPGroup(), model_dir, windows_of(12, 26, seed=9), folder / "held-out")
    config = TrainConfig(rank=24, head_rank=24, epochs=8, batch=128, lr=5e-3)
    alone(model_dir, folder / "traces", folder / "learned", config)
    return folder


@pytest.mark.parametrize("name, density", [("mlp.0", 0.2), ("mlp.1", 0.2), ("heads.1", 0.5)])
def test_what_is_learned_holds_on_other_text(well_trained, model, name, density):
    manifest, tensors, found = scorers(well_trained / "learned")
    traces = Traces(well_trained / "held-out")
    entry = next(e for e in manifest.entries if e.name == name)
    scores = found[name](traces.tap(Tap.parse(entry.tap))[None].float())[0]
    block = model.model.decoder.layers[entry.layer]
    if entry.kind == "mlp":
        contribution = activations_of(traces, entry.layer) * block.fc2.weight.detach().norm(dim=0)
    else:
        outputs = torch.cat(traces.heads(1), dim=1).float() - tensors.head_mean(1)
        W = block.self_attn.out_proj.weight.detach().T.unflatten(0, (HEADS, HEAD_DIM))
        contribution = torch.einsum("tnh,nhd->tnd", outputs, W).norm(dim=-1)
    by_chance = kept(
        torch.rand(scores.shape, generator=torch.Generator().manual_seed(0)), contribution, density
    )
    assert abs(by_chance - density) < 0.03
    learned = kept(scores, contribution, density)
    of_what_there_is = {"mlp": 0.5, "heads": 0.1}[entry.kind]
    assert learned > density + of_what_there_is * (kept(contribution, contribution, density) - density)


def test_rounded_in_training_is_as_it_is_stored(tmp_path, model_dir, traces_dir):
    """Few bits cost little if training knows of them."""
    config = replace(QUICK, kinds=("mlp",), rank=16, epochs=8, lr=5e-3)
    alone(model_dir, traces_dir, tmp_path / "16", config)
    alone(model_dir, traces_dir, tmp_path / "3", replace(config, bits=3))
    traces = Traces(traces_dir)
    shares = []
    for bits in ("16", "3"):
        scores = scorers(tmp_path / bits)[2]["mlp.0"](traces.tap(Tap("attn_in", 0))[None].float())[0]
        shares.append(kept(scores, activations_of(traces, 0), 0.2))
    assert 0.35 < shares[1] < shares[0] + 0.02


def test_training_goes_on_from_predictors(tmp_path, model_dir, traces_dir):
    collected(TPGroup(), model_dir, windows_of(6, 21, seed=3), tmp_path / "traces")
    alone(model_dir, traces_dir, tmp_path / "first", command="dejavu train one")
    slow = replace(QUICK, lr=1e-9, epochs=0.1)
    manifest = alone(
        model_dir,
        tmp_path / "traces",
        tmp_path / "second",
        slow,
        start=tmp_path / "first",
        command="dejavu train two",
    )
    assert manifest.commands == ["dejavu train one", "dejavu train two"]
    assert [s.tokens for s in manifest.sources] == [24 * 21, 6 * 21]
    first, second = scorers(tmp_path / "first")[2], scorers(tmp_path / "second")[2]
    z = torch.randn(1, 50, D, generator=torch.Generator().manual_seed(0))
    for name in first:  # hardly trained, it is where it was
        torch.testing.assert_close(first[name](z), second[name](z), atol=5e-3, rtol=5e-3)
    alone(model_dir, tmp_path / "traces", tmp_path / "third", start=tmp_path / "first")
    assert (scorers(tmp_path / "third")[2]["mlp.0"](z) - first["mlp.0"](z)).abs().max() > 0.05


def test_predictors_of_other_shapes_are_no_start(tmp_path, model_dir, traces_dir):
    start = tmp_path / "first"
    alone(model_dir, traces_dir, start)
    other = make_model(tmp_path / "other", seed=1)
    collected(TPGroup(), other, windows_of(3, 21), tmp_path / "traces")
    for change, what in (
        ({"rank": 9}, "0: rank 8 there, 9 here"),
        ({"lookahead": "one"}, "1: tap attn_in[1] there, mlp_in[0] here"),
        ({"bits": 8}, "0: bits 16 there, 8 here"),
        ({"refine_bits": 4}, "0: refine None there, {"),
        ({"method": "svd"}, "0: method predicted there, svd here"),
        ({"ranks": {"mlp.1": 3}}, "1: rank 8 there, 3 here"),
    ):
        message = refused_alone(
            model_dir, traces_dir, tmp_path / "out", replace(QUICK, **change), start=start
        )
        assert message.startswith(f"the predictors to start from have another mlp.{what}")
    message = refused_alone(other, tmp_path / "traces", tmp_path / "out", start=start)
    assert message == f"{start} is of another model than {other}"
    message = refused_alone(model_dir, traces_dir, tmp_path / "out", start=tmp_path / "none")
    assert message == f"{tmp_path / 'none'} is no directory of predictors: it has no manifest.json"
    assert not list(tmp_path.glob("out*"))


@pytest.fixture
def damaged(traces_dir, tmp_path):
    """A copy of the traces, to be damaged."""
    shutil.copytree(traces_dir, tmp_path / "traces")
    return tmp_path / "traces"


def put(path, value):
    array = np.load(path, mmap_mode="r+")
    array[7, ..., 3] = value
    array.flush()


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    "name, message",
    [
        ("layer.000/attn_in", "attn_in[0] holds numbers that are not finite"),
        ("layer.001/attn_in", "attn_in[1] holds numbers that are not finite"),
        ("layer.001/heads.0-4", "head outputs of layer 1 are not finite"),
    ],
)
def test_traces_that_are_not_finite(tmp_path, model_dir, damaged, name, message, value, ranks):
    put(damaged / f"{name}.npy", value)
    config = replace(QUICK, epochs=0.1)
    for error in run_ranks(ranks, refused, model_dir, damaged, tmp_path / "out", config):
        assert error.endswith(f"{damaged}: {message}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["predicted", "svd"])
@pytest.mark.parametrize("layer", range(LAYERS))
def test_what_a_regression_aims_at_is_finite(tmp_path, model_dir, damaged, layer, method):
    put(damaged / f"layer.{layer:03d}" / "mlp_in.npy", np.nan)
    config = replace(QUICK, method=method, kinds=("mlp",))
    assert f"mlp_in[{layer}]" in refused_alone(model_dir, damaged, tmp_path / "out", config)


@pytest.mark.parametrize("name", ["attn_in", "neurons.0-64", "heads.0-4"])
def test_traces_that_are_damaged(tmp_path, model_dir, damaged, name):
    path = damaged / "layer.001" / f"{name}.npy"
    data = path.read_bytes()
    path.write_bytes(data[:-5])
    assert f"{path} is damaged: " in refused_alone(model_dir, damaged, tmp_path / "out")
    path.unlink()
    assert refused_alone(model_dir, damaged, tmp_path / "out") == f"{damaged} lacks layer.001/{name}.npy"
    path.write_bytes(data)
    alone(model_dir, damaged, tmp_path / "out")  # goes on
    alone(model_dir, damaged, tmp_path / "whole")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_traces_of_another_model_or_of_none(tmp_path, model_dir, traces_dir):
    other = make_model(tmp_path / "other", seed=1)
    message = refused_alone(other, traces_dir, tmp_path / "out")
    assert message == f"{traces_dir} are traces of another model than {other}"
    message = refused_alone(model_dir, tmp_path / "none", tmp_path / "out")
    assert message == f"{tmp_path / 'none'} is no directory of traces: it has no traces.json"
    message = refused_alone(tmp_path / "none", traces_dir, tmp_path / "out")
    assert message.startswith(f"{tmp_path / 'none'} is no model directory")
    (tmp_path / "unfinished.partial").mkdir()
    message = refused_alone(model_dir, tmp_path / "unfinished", tmp_path / "out")
    assert message.endswith("(unfinished.partial is not finished: collect again)")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("lr", [0.5, 0.999])
def test_too_large_a_learning_rate_leaves_no_nonsense(tmp_path, model_dir, traces_dir, lr):
    try:
        alone(model_dir, traces_dir, tmp_path / "out", replace(QUICK, lr=lr, epochs=10))
    except ValueError as error:
        assert f"training diverged: lr={lr} is too large" in str(error)
        assert not (tmp_path / "out").exists()
    else:
        scorers(tmp_path / "out")  # reads nothing that is not finite


def test_weights_beyond_16_bits_are_not_stored(tmp_path, model_dir, traces_dir, monkeypatch):
    def diverge(self, network, z, loss):
        network.up.fill_(1e6)  # finite, but not in fp16

    monkeypatch.setattr(train_module.Descent, "run", diverge)
    with pytest.raises(ValueError):
        alone(model_dir, traces_dir, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_hardly_any_traces(tmp_path, model_dir):
    collected(TPGroup(), model_dir, windows_of(4, 4), tmp_path / "traces")
    alone(model_dir, tmp_path / "traces", tmp_path / "out")
    assert len(scorers(tmp_path / "out")[2]) == 2 * LAYERS - 1  # all but the first layer's heads


@pytest.mark.parametrize("windows, tokens", [(1, 2), (1, 3), (2, 3)])
def test_too_few_traces(tmp_path, model_dir, windows, tokens):
    collected(TPGroup(), model_dir, windows_of(windows, tokens), tmp_path / "traces")
    try:
        alone(model_dir, tmp_path / "traces", tmp_path / "out")
    except ValueError as error:
        assert "traces" in str(error)
    else:
        scorers(tmp_path / "out")


def test_the_plan_holds_no_folders_of_this_machine(tmp_path, model_dir, traces_dir):
    stopped(TPGroup(), model_dir, traces_dir, tmp_path / "out", QUICK, 1)
    plan = json.loads((tmp_path / "out.partial" / "plan.json").read_text())
    assert str(tmp_path) not in json.dumps(plan) and plan["config"]["rank"] == 8
