"""Thresholds to a recall, to densities, to a budget; which texts may be used; the accounts of the meter."""

import math
import shutil
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from dejavu.parallel.groups import TPGroup
from dejavu.predictors.calibrate import Target, calibrate
from dejavu.predictors.collect import collect
from dejavu.predictors.corpus import Corpus
from dejavu.predictors.files import Entry, ModelIdentity, read_manifest
from dejavu.predictors.meter import Account, Metered, dense_bytes, sparse_bytes
from dejavu.predictors.networks import Random
from dejavu.predictors.selection import EVERYTHING, HeadMean, Policy, Selector, Unit
from dejavu.predictors.train import TrainConfig, train
from dejavu.profiles.evaluate import Asked, evaluate
from dejavu.profiles.quality import masked, whole_pass
from dejavu.runtime.engine import Engine
from dejavu.runtime.sparsity import load_policy
from models import load_reference, make_model
from ranks import run_ranks

D, FFN, HEADS, LAYERS = 32, 64, 4, 2
TRAINED, CALIBRATED, LEFT = (0, 1000), (1000, 2000), (2000, 3000)  # parts of one text


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"), vocab_size=200)


@pytest.fixture(scope="module")
def spoken(model_dir):
    """Windows of the model's own text: on no other is dense the best that it can do."""
    torch.manual_seed(0)
    tokens = load_reference(model_dir).generate(
        torch.full((60, 1), 2), do_sample=True, top_k=0, max_new_tokens=24, min_new_tokens=24, pad_token_id=1
    )
    return tokens.split(20)


def corpus_of(windows, part=CALIBRATED, sha256="0" * 64):
    return Corpus(windows, "text.txt", sha256, *part)


def engine_of(directory, tp=None, **settings):
    return Engine.from_pretrained(str(directory), tp=tp or TPGroup(), dtype="fp32", **settings)


@pytest.fixture(scope="module")
def engine(model_dir):
    return engine_of(model_dir)


CONFIG = TrainConfig(rank=16, head_rank=8, epochs=4, batch=64, lr=5e-3)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, model_dir, engine, spoken):
    """Directories of predictors that are not calibrated, by name."""
    folder = tmp_path_factory.mktemp("trained")
    collect(engine, corpus_of(spoken[0], TRAINED), folder / "traces")

    def make(name, **settings):
        traces = None if settings.get("method") in ("oracle", "random") else folder / "traces"
        train(model_dir, traces, folder / name, replace(CONFIG, **settings), tp=TPGroup())

    make("predicted")
    make("refined", refine_bits=4, kinds=("mlp",), rank=8)
    for method in ("svd", "static", "random", "oracle"):
        make(method, method=method)
    return folder


@pytest.fixture
def copy(trained, tmp_path):
    def copy(name):
        shutil.copytree(trained / name, tmp_path / name)
        return tmp_path / name

    return copy


@pytest.mark.parametrize(
    "settings, shown",
    [
        ({"max_ppl_increase": 0.01}, "max_ppl_increase 0.01"),
        ({"max_ppl_increase": 1}, "max_ppl_increase 1"),
        ({"recall": 0.99}, "recall 0.99"),
        ({"mlp_density": 0.1}, "mlp_density 0.1"),
        ({"head_density": 0.5}, "head_density 0.5"),
        ({"mlp_density": 1, "head_density": 0.5}, "mlp_density 1, head_density 0.5"),
    ],
)
def test_a_target(settings, shown):
    assert str(Target(**settings)) == shown


ONE_OF = "calibrate to one of --max-ppl-increase, --recall, and --mlp-density with --head-density"


@pytest.mark.parametrize(
    "settings, message",
    [
        ({}, ONE_OF),
        ({"recall": 0.9, "mlp_density": 0.1}, ONE_OF),
        ({"recall": 0.9, "max_ppl_increase": 0.1}, ONE_OF),
        ({"max_ppl_increase": 0.1, "head_density": 0.1}, ONE_OF),
        ({"max_ppl_increase": 0}, "max_ppl_increase=0 is not in (0, 1]"),
        ({"max_ppl_increase": 1.5}, "max_ppl_increase=1.5 is not in (0, 1]"),
        ({"max_ppl_increase": math.nan}, "max_ppl_increase=nan is not in (0, 1]"),
        ({"recall": 0}, "recall=0 is not in (0, 1]"),
        ({"recall": 99}, "recall=99 is not in (0, 1]"),
        ({"mlp_density": 0}, "mlp_density=0 is not in (0, 1]"),
        ({"mlp_density": -0.1}, "mlp_density=-0.1 is not in (0, 1]"),
        ({"mlp_density": 0.5, "head_density": 1.01}, "head_density=1.01 is not in (0, 1]"),
        ({"head_density": math.nan}, "head_density=nan is not in (0, 1]"),
    ],
)
def test_what_is_no_target(settings, message):
    with pytest.raises(ValueError) as error:
        Target(**settings)
    assert str(error.value) == message


def check_points(manifest, directory):
    """What holds whatever it was calibrated to."""
    assert manifest == read_manifest(directory)
    assert sorted(p.name for p in directory.iterdir()) == ["manifest.json", "predictors.safetensors"]
    points, default = manifest.points, manifest.points[manifest.default]
    assert all(a.mlp_density <= b.mlp_density for a, b in pairwise(points)) or all(
        a.head_density <= b.head_density for a, b in pairwise(points)
    )
    for point in points:
        assert set(point.thresholds) == {"mlp", "heads", "refine"}
        assert all(len(thresholds) == LAYERS for thresholds in point.thresholds.values())
        assert all(
            x is None or math.isfinite(x) for x in (*point.thresholds["mlp"], *point.thresholds["heads"])
        )
        assert 0 <= point.mlp_density <= 1 and 0 <= point.head_density <= 1 and point.kl >= -1e-6
    for entry in manifest.entries:
        assert (entry.held_out is None) == (default.thresholds[entry.kind][entry.layer] is None)
        if entry.held_out is not None:
            assert set(entry.held_out) == set(Account.__slots__)
            assert all(0 <= share <= 1 + 1e-9 for share in entry.held_out.values())
    return default


def measured(engine, directory, windows):
    """What a default point measures, by the parts: increase of perplexity, and densities."""
    policy = load_policy(str(directory), engine.model, engine.fingerprint, sharing="mask", dense_until=1)
    sparse, dense = masked(engine, windows, [policy, EVERYTHING])
    increase = math.exp(float(sparse.loss.double().mean() - dense.loss.double().mean())) - 1
    return increase, float(policy.density("mlp")), float(policy.density("heads"))


@pytest.mark.parametrize("budget", [0.02, 0.3])
def test_to_a_budget(engine, spoken, copy, budget):
    directory = copy("predicted")
    manifest = calibrate(engine, corpus_of(spoken[1]), directory, Target(max_ppl_increase=budget))
    default = check_points(manifest, directory)
    assert manifest.target == f"max_ppl_increase {budget:g}"
    assert -1 < default.ppl_increase <= budget
    increase, mlp, heads = measured(engine, directory, spoken[1])
    assert increase == pytest.approx(default.ppl_increase, abs=1e-5) and increase <= budget
    assert mlp == pytest.approx(default.mlp_density, rel=1e-5)
    assert heads == pytest.approx(default.head_density, rel=1e-5)
    assert default.mlp_density < 0.9  # it is worth something
    assert default.ppl_increase > budget / 4 and manifest.points[0].ppl_increase > default.ppl_increase
    assert manifest.points[-1].kl < default.kl < manifest.points[0].kl


def test_a_larger_budget_is_not_denser(engine, spoken, copy):
    directory = copy("svd")
    densities = []
    for budget in (0.01, 0.1, 1.0):
        manifest = calibrate(engine, corpus_of(spoken[1]), directory, Target(max_ppl_increase=budget))
        point = check_points(manifest, directory)
        assert point.head_density == 1  # it has no predictors of heads
        densities.append(point.mlp_density)
    assert densities[0] > densities[1] > densities[2]
    assert [s.use for s in manifest.sources] == ["train", "calibrate"]  # the last one alone
    assert (manifest.sources[1].start, manifest.sources[1].stop) == CALIBRATED


@pytest.mark.parametrize("recall", [0.6, 0.95])
def test_to_a_recall(engine, spoken, copy, recall):
    directory = copy("predicted")
    manifest = calibrate(engine, corpus_of(spoken[1]), directory, Target(recall=recall))
    default = check_points(manifest, directory)
    assert len(manifest.points) == len({0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, recall})
    for entry in manifest.entries:
        if entry.kind == "mlp":  # of a sparse run; the threshold is of a dense one
            assert entry.held_out["recall"] == pytest.approx(recall, abs=0.04)
        elif entry.layer == 1:
            assert entry.held_out["weighted_recall"] == pytest.approx(recall, abs=0.04)
    assert default.head_density > 0.5  # layer 0's are dense


@pytest.mark.parametrize("name", ["predicted", "static", "oracle", "svd", "refined"])
def test_to_a_density_of_neurons(engine, spoken, copy, name):
    directory = copy(name)
    manifest = calibrate(engine, corpus_of(spoken[1]), directory, Target(mlp_density=0.3))
    default = check_points(manifest, directory)
    assert default.mlp_density == pytest.approx(0.3, rel=0.15) and default.head_density == 1
    assert measured(engine, directory, spoken[1])[1:] == pytest.approx((default.mlp_density, 1), rel=1e-5)


def test_densities_between_a_sparse_layer_and_a_dense_one(engine, spoken, copy):
    directory = copy("random")
    manifest = calibrate(engine, corpus_of(spoken[1]), directory, Target(mlp_density=0.85))
    assert check_points(manifest, directory).mlp_density == pytest.approx(0.85, rel=0.1)


def test_to_densities_of_both(engine, spoken, copy):
    directory = copy("predicted")
    target = Target(mlp_density=0.4, head_density=0.75)
    default = check_points(calibrate(engine, corpus_of(spoken[1]), directory, target), directory)
    assert default.mlp_density == pytest.approx(0.4, rel=0.15)
    assert default.head_density == pytest.approx(0.75, rel=0.15)
    default = check_points(
        calibrate(engine, corpus_of(spoken[1]), directory, Target(head_density=0.8)), directory
    )
    assert default.head_density == pytest.approx(0.8, rel=0.1) and default.mlp_density == 1


def test_a_density_out_of_reach(engine, spoken, copy):
    directory = copy("predicted")
    before = (directory / "manifest.json").read_bytes()
    target = Target(mlp_density=0.3, head_density=0.2)
    with pytest.raises(ValueError, match=r"a mean density of 0.2 of heads is out of reach: 0\.5\d* is least"):
        calibrate(engine, corpus_of(spoken[1]), directory, target)
    assert (directory / "manifest.json").read_bytes() == before


def test_a_density_of_what_has_no_predictors(engine, spoken, copy):
    with pytest.raises(ValueError):
        calibrate(engine, corpus_of(spoken[1]), copy("svd"), Target(mlp_density=0.3, head_density=0.7))


def test_commands_are_kept(engine, spoken, copy):
    directory = copy("svd")
    for i in (1, 2):
        calibrate(
            engine, corpus_of(spoken[1][:4]), directory, Target(recall=0.9), command=f"dejavu calibrate {i}"
        )
    assert read_manifest(directory).commands == ["dejavu calibrate 1", "dejavu calibrate 2"]


def test_fewer_tokens_to_search_on(engine, spoken, copy):
    stages, directory = [], copy("predicted")
    manifest = calibrate(
        engine,
        corpus_of(spoken[1]),
        directory,
        Target(max_ppl_increase=0.1),
        search_tokens=100,
        on_progress=lambda *stage: stages.append(stage),
    )
    assert check_points(manifest, directory).ppl_increase <= 0.1
    assert {stage for stage, _, _ in stages} == {"trying every layer alone", "measuring the whole"}
    assert ("trying every layer alone", 4, 4) in stages


def calibrated_on(tp, model_dir, windows, directory, target):
    """Each rank has a directory of its own: rank 0's alone is written."""
    return calibrate(engine_of(model_dir, tp), corpus_of(windows), directory, target)


def flat(point):
    return [x for key in ("mlp", "heads", "refine") for x in point.thresholds[key]]


@pytest.mark.parametrize("name", ["predicted", "refined"])
@pytest.mark.parametrize(
    "target", [Target(recall=0.9), Target(max_ppl_increase=0.1), Target(mlp_density=0.3)]
)
def test_any_number_of_ranks_finds_the_same(model_dir, spoken, copy, name, target):
    directory = copy(name)
    one = calibrated_on(TPGroup(), model_dir, spoken[1], directory, target)
    shutil.copytree(directory, directory.with_name("again"))  # what is there of a calibration does not matter
    for manifest in run_ranks(2, calibrated_on, model_dir, spoken[1], directory.with_name("again"), target):
        assert manifest.default == one.default and len(manifest.points) == len(one.points)
        for a, b in zip(manifest.points, one.points, strict=True):
            assert [x is None for x in flat(a)] == [x is None for x in flat(b)]
            numbers = [[x for x in flat(point) if x is not None] for point in (a, b)]
            assert numbers[0] == pytest.approx(numbers[1], abs=1e-4, rel=1e-4)
            assert a.mlp_density == pytest.approx(b.mlp_density, abs=1e-3)
            assert a.ppl_increase == pytest.approx(b.ppl_increase, abs=1e-3)
    assert read_manifest(directory.with_name("again")).points == manifest.points


class Stages(Policy):
    """Keeps what the first stages let through and what was chosen in the end."""

    def __init__(self, policy):
        super().__init__(list(policy.units.values()), policy.num_layers, sharing="mask", dense_until=1)
        self.first, self.last = {}, {}

    def count_candidates(self, unit, mask):
        self.first[unit.layer] = mask[:, 1:]

    def count(self, unit, mask, truth):
        self.last[unit.layer] = mask


@pytest.mark.parametrize("target", [Target(max_ppl_increase=0.05), Target(recall=0.95)])
def test_second_stages_choose_among_the_first_ones(engine, spoken, copy, target):
    directory = copy("refined")
    manifest = calibrate(engine, corpus_of(spoken[1]), directory, target)
    default = check_points(manifest, directory)
    sparse = [layer for layer in range(LAYERS) if default.thresholds["mlp"][layer] is not None]
    assert sparse and all(default.thresholds["refine"][layer] is not None for layer in sparse)
    policy = load_policy(str(directory), engine.model, engine.fingerprint, sharing="mask", dense_until=1)
    stages = Stages(policy)
    whole_pass(engine, spoken[1][:, :-1], stages)
    for layer in sparse:
        first, last = stages.first[layer], stages.last[layer]
        assert not (last & ~first).any() and 0 < last.sum() < first.sum()
        held_out = next(e for e in manifest.entries if e.name == f"mlp.{layer}").held_out
        assert held_out["candidates"] == pytest.approx(float(first.float().mean()), rel=1e-5)
        assert held_out["density"] == pytest.approx(float(last.float().mean()), rel=1e-5)


def test_which_texts_may_be_used(engine, spoken, copy):
    directory, windows = copy("predicted"), spoken[1][:6]
    target = Target(recall=0.9)
    before = (directory / "manifest.json").read_bytes()
    for part in (TRAINED, (0, 3000), (999, 1001)):
        with pytest.raises(
            ValueError,
            match=r"has used characters 0 to 1000 of this text to train; take another text or --part",
        ):
            calibrate(engine, corpus_of(windows, part), directory, target)
    assert (directory / "manifest.json").read_bytes() == before
    calibrate(engine, corpus_of(windows), directory, target)
    calibrate(engine, corpus_of(windows), directory, target)  # once more, on the same
    asked = [Asked(str(directory)), Asked("lossless")]
    for part, use in (
        (TRAINED, "train"),
        (CALIBRATED, "calibrate"),
        ((0, 3000), "train"),
        ((1999, 2001), "calibrate"),
    ):
        with pytest.raises(ValueError, match=f"of this text to {use}; take another text or --part"):
            evaluate(engine, corpus_of(windows, part), asked, prefixes=[1])
    rows = evaluate(engine, corpus_of(windows, LEFT), asked, prefixes=[1])
    assert [row["policy"] for row in rows] == ["dense", "predicted", "lossless"]
    assert len(evaluate(engine, corpus_of(windows, CALIBRATED, "1" * 64), asked, prefixes=[1])) == 3
    assert len(evaluate(engine, corpus_of(windows, CALIBRATED), asked[1:], prefixes=[1])) == 2


def evaluated(tp, model_dir, windows, asked, prefixes):
    return evaluate(engine_of(model_dir, tp), corpus_of(windows, LEFT), asked, prefixes=prefixes)


def test_evaluations_agree_with_the_calibration_and_between_ranks(model_dir, engine, spoken, copy):
    directory = copy("predicted")
    point = check_points(
        calibrate(engine, corpus_of(spoken[1]), directory, Target(max_ppl_increase=0.1)), directory
    )
    asked = [Asked(str(directory)), Asked(str(directory), 0.5 * point.mlp_density + 0.5), Asked("lossless")]
    if asked[1].density > read_manifest(directory).points[-1].mlp_density:
        asked[1] = Asked(str(directory), read_manifest(directory).points[-1].mlp_density)
    (one,) = run_ranks(1, evaluated, model_dir, spoken[1], asked, [1, 8])
    assert [row["prefix"] for row in one] == [1] * 4 + [8] * 4
    assert [row["policy"] for row in one[:4]] == [
        "dense",
        "predicted",
        f"predicted at {asked[1].density:g}",
        "lossless",
    ]
    dense, default, denser, lossless = one[:4]
    assert dense["ppl_increase"] == 0 and dense["kl"] < 1e-6 and dense["top1"] == 1
    assert default["ppl_increase"] == pytest.approx(point.ppl_increase, abs=1e-4)
    assert default["density_mlp"] == pytest.approx(point.mlp_density, abs=1e-3)
    assert default["density_mlp"] < denser["density_mlp"] and abs(default["masked_loss_difference"]) < 1e-5
    assert abs(lossless["ppl_increase"]) < 1e-5 and lossless["recall_mlp"] == 1
    for other in run_ranks(2, evaluated, model_dir, spoken[1], asked, [1, 8]):
        for a, b in zip(other, one, strict=True):
            assert a.keys() == b.keys()
            for name in (
                "ppl",
                "kl",
                "density_mlp",
                "density_heads",
                "weighted_recall_mlp",
                "total_share_mlp",
            ):
                assert a.get(name) == (b.get(name) and pytest.approx(b[name], abs=2e-3))


@pytest.mark.parametrize("prefix", [0, -1, 24, 256])
def test_prefixes_that_leave_nothing(engine, spoken, prefix):
    with pytest.raises(ValueError, match=f"a prefix of {prefix} leaves nothing of windows of 24 tokens"):
        evaluate(engine, corpus_of(spoken[1], LEFT), [Asked("lossless")], prefixes=[1, prefix])


def test_predictors_of_another_model(engine, spoken, copy, tmp_path):
    directory = copy("predicted")
    other = engine_of(make_model(tmp_path / "other", seed=1, vocab_size=200))
    with pytest.raises(ValueError, match="is of another model: its fingerprint is"):
        calibrate(other, corpus_of(spoken[1]), directory, Target(recall=0.9))
    with pytest.raises(ValueError, match="is not calibrated: run dejavu calibrate on it first"):
        evaluate(engine, corpus_of(spoken[1], LEFT), [Asked(str(directory))], prefixes=[1])


class Looking(Selector):
    """Looks over a meter's shoulder: every truth and every mask."""

    def __init__(self, meter):
        self.meter = meter
        self.truths, self.masks = {}, {}

    def begin(self, positions, alive):
        self.meter.begin(positions, alive)

    def observe(self, tap, residual):
        self.meter.observe(tap, residual)

    def heads(self, layer, truth):
        return self.keep("heads", layer, truth, self.meter.heads(layer, truth))

    def neurons(self, layer, truth):
        return self.keep("mlp", layer, truth, self.meter.neurons(layer, truth))

    def keep(self, kind, layer, truth, choice):
        self.truths.setdefault((kind, layer), []).append(truth())
        if choice is not None:
            self.masks.setdefault((kind, layer), []).append(choice.mask)
        return choice


PREFIX = 3


def metered(tp, model_dir, windows):
    """Accounts, truths and masks of random choices; heads are left to made-up means."""
    engine, units = engine_of(model_dir, tp), []
    for kind, n in (("mlp", FFN), ("heads", HEADS)):
        rows = tp.shard(n)
        for layer in range(LAYERS):
            scorer, second = (
                Random(torch.arange(rows.start, rows.stop), layer=layer, seed=seed) for seed in (3, 4)
            )
            mean = None
            if (kind, layer) == ("heads", 1):
                output = torch.arange(HEADS * 8.0).view(HEADS, 8)[rows] / 16
                W = engine.model.layers[layer].self_attn.out_proj.weight.value
                mean = HeadMean(output, output.flatten() @ W)
            refine = None
            if (kind, layer) == ("mlp", 1):
                refine = Unit(kind, layer, None, second, threshold=0.5)
            units.append(Unit(kind, layer, None, scorer, threshold=0.4, mean=mean, refine=refine))
    meter = Metered(Policy(units, LAYERS, sharing="mask", dense_until=PREFIX), engine.model)
    looking = Looking(meter)
    masked(engine, windows[:5], [looking], prefix=PREFIX)
    masked(engine, windows[5:9], [looking], prefix=PREFIX)
    accounts = meter.accounts(tp)
    assert meter.accounts(tp) == {}
    return accounts, looking.truths, looking.masks


@pytest.mark.parametrize("ranks", [1, 2])
def test_accounts_are_what_they_say(model_dir, spoken, ranks):
    found = run_ranks(ranks, metered, model_dir, spoken[1])
    model = load_reference(model_dir)
    assert all(accounts == found[0][0] for accounts, _, _ in found)
    for layer, block in enumerate(model.model.decoder.layers):
        x, mask = (
            torch.cat([torch.cat(share[i]["mlp", layer])[:, PREFIX:] for share in found], dim=-1)
            for i in (1, 2)
        )
        worth = x * block.fc2.weight.detach().norm(dim=0)
        live, account = x > 0, found[0][0]["mlp", layer]
        assert account.density == pytest.approx(float(mask.float().mean()), rel=1e-5)
        assert account.live == pytest.approx(float((mask & live).float().mean()), rel=1e-5)
        assert account.recall == pytest.approx(int((mask & live).sum()) / int(live.sum()), rel=1e-5)
        assert account.precision == pytest.approx(int((mask & live).sum()) / int(mask.sum()), rel=1e-5)
        assert account.weighted_recall == pytest.approx(float((worth * mask).sum() / worth.sum()), rel=1e-4)
        if layer == 0:
            assert account.candidates == 1
            assert account.density == pytest.approx(0.6, abs=0.05)
        else:
            assert account.candidates == pytest.approx(0.6, abs=0.05)
            assert account.density == pytest.approx(0.3, abs=0.05)


def test_accounts_of_heads(model_dir, spoken):
    """Against as many heads of each token as were chosen, those that would be missed most."""
    ((accounts, truths, masks),) = run_ranks(1, metered, model_dir, spoken[1])
    for layer, block in enumerate(load_reference(model_dir).model.decoder.layers):
        outputs, mask = (torch.cat(x["heads", layer])[:, PREFIX:].flatten(0, 1) for x in (truths, masks))
        mean = 0 if layer == 0 else torch.arange(HEADS * 8.0).view(HEADS, 8) / 16
        W = block.self_attn.out_proj.weight.detach().T.unflatten(0, (HEADS, 8))
        worth = torch.einsum("tnh,nhd->tnd", outputs - mean, W).norm(dim=-1)
        hits = sum(
            len({*row.topk(int(m.sum())).indices.tolist()} & {*m.nonzero().flatten().tolist()})
            for row, m in zip(worth, mask, strict=True)
        )
        account = accounts["heads", layer]
        assert account.density == account.live == pytest.approx(float(mask.float().mean()), rel=1e-5)
        assert account.recall == account.precision == pytest.approx(hits / int(mask.sum()), rel=1e-4)
        assert account.weighted_recall == pytest.approx(float((worth * mask).sum() / worth.sum()), rel=1e-4)


def test_bytes_of_a_layer():
    model = ModelIdentity(fingerprint="", hidden_size=256, ffn_dim=1000, num_layers=1, num_heads=8)
    assert dense_bytes("mlp", model) == 2 * 2 * 1000 * 256
    assert dense_bytes("heads", model) == 2 * 4 * 256 * 256
    account = Account(density=0.3, live=0.1, candidates=0.5, recall=1, weighted_recall=1, precision=1)
    heads = Entry(kind="heads", layer=0, tap="attn_in[0]", rank=16)
    assert sparse_bytes(heads, account, model) == heads.read_bytes(model) + 0.3 * 2 * 4 * 256 * 256
    second = Entry(kind="mlp", layer=0, method="quantized", tap="mlp_in[0]", bits=4)
    first = Entry(kind="mlp", layer=0, tap="attn_in[0]", rank=16)
    rows = 2 * 1000 * 256 * (0.3 + 0.1)  # of fc1 what was chosen, of fc2 what of that is live
    assert sparse_bytes(first, account, model) == pytest.approx(first.read_bytes(model) + rows)
    both = first.model_copy(update={"refine": second})
    expected = first.read_bytes(model) + 0.5 * second.read_bytes(model) + rows
    assert sparse_bytes(both, account, model) == pytest.approx(expected)
