"""Directories of predictors: what is written is read again; what is wrong with one is said in one line."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dejavu.kernels.predict import standardise
from dejavu.parallel.groups import TPGroup
from dejavu.predictors.files import (
    Entry,
    Manifest,
    ModelIdentity,
    OperatingPoint,
    PredictorTensors,
    Source,
    pack,
    read_manifest,
    save_tensors,
    write_manifest,
)
from dejavu.predictors.networks import GROUP, HeadContribution
from dejavu.predictors.selection import Tap
from dejavu.runtime.engine import Engine
from dejavu.runtime.sparsity import at_density, load_policy
from models import make_model
from ranks import run_ranks

D, FFN, HEADS = 32, 64, 4


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def engine(model_dir):
    return Engine.from_pretrained(str(model_dir), device="cpu", dtype="fp32")


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def point(mlp, heads, refine, mlp_density, head_density, **measured):
    return OperatingPoint(
        thresholds={"mlp": mlp, "heads": heads, "refine": refine},
        mlp_density=mlp_density,
        head_density=head_density,
        **{"ppl_increase": 0.01, "kl": 0.02} | measured,
    )


def manifest_of(engine):
    """Two stages for the neurons of layer 1, heads of layer 0 dense; three points, the second the default."""
    second = Entry(kind="mlp", layer=1, method="quantized", tap="mlp_in[1]", bits=4)
    return Manifest(
        model=ModelIdentity(
            fingerprint=engine.fingerprint, hidden_size=D, ffn_dim=FFN, num_layers=2, num_heads=HEADS
        ),
        method="predicted",
        lookahead="half",
        entries=[
            Entry(kind="mlp", layer=0, tap="attn_in[0]", rank=5),
            Entry(kind="mlp", layer=1, tap="attn_in[1]", rank=7, bits=8, refine=second),
            Entry(kind="heads", layer=0, dense=True),
            Entry(kind="heads", layer=1, tap="mlp_in[0]", rank=3, relu=True, held_out={"recall": 0.9}),
        ],
        sources=[Source(use="train", file="text.txt", sha256="0" * 64, start=0, stop=100, tokens=20)],
        commands=["dejavu train --out predictors"],
        target="recall 0.9",
        default=1,
        points=[
            point([3.0, 2.0], [None, 0.5], [None, 1.0], 0.1, 0.5, ppl_increase=0.04, kl=0.4),
            point([1.0, 1.0], [None, 0.1], [None, 0.0], 0.3, 0.75, ppl_increase=0.02, kl=0.2),
            point([None, -1.0], [None, None], [None, -2.0], 0.7, 1.0, ppl_increase=0.0, kl=0.0),
        ],
    )


def tensors():
    return {
        "mlp.0.down": randn(5, D).half(),
        "mlp.0.up": randn(FFN, 5).half(),
        "mlp.0.bias": randn(FFN),
        **pack("mlp.1.down", randn(7, D), 8),
        **pack("mlp.1.up", randn(FFN, 7), 8),
        "mlp.1.bias": randn(FFN),
        **pack("mlp.1.refine.weight", randn(FFN, D), 4),
        "mlp.1.refine.bias": randn(FFN),
        "heads.1.down": randn(3, D).half(),
        "heads.1.up": randn(HEADS, 3).half(),
        "heads.1.bias": randn(HEADS),
        "heads.1.mean": randn(HEADS, D // HEADS),
    }


@pytest.fixture
def directory(tmp_path, engine):
    path = tmp_path / "predictors"
    path.mkdir()
    write_manifest(path, manifest_of(engine))
    save_tensors(path / "predictors.safetensors", tensors())
    return path


def load(directory, engine, **settings):
    return load_policy(str(directory), engine.model, engine.fingerprint, **settings)


def message_of(directory, engine, **settings):
    with pytest.raises(ValueError) as error:
        load(directory, engine, **settings)
    message = str(error.value)
    assert "\n" not in message and str(directory) in message
    return message


def test_a_manifest_is_read_as_it_is_written(directory, engine):
    manifest = manifest_of(engine)
    assert read_manifest(directory) == manifest
    assert sorted(p.name for p in directory.iterdir()) == ["manifest.json", "predictors.safetensors"]
    assert json.loads((directory / "manifest.json").read_text())["format"] == 1
    assert [e.name for e in manifest.of("heads")] == ["heads.0", "heads.1"]


def test_files_are_never_half_written(directory, engine, monkeypatch):
    before = {p.name: p.read_bytes() for p in directory.iterdir()}

    def full(self, target):
        raise OSError("no space")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full)
        with pytest.raises(OSError, match="no space"):
            write_manifest(directory, manifest_of(engine).model_copy(update={"commands": []}))
        with pytest.raises(OSError, match="no space"):
            save_tensors(directory / "predictors.safetensors", {"x": torch.zeros(2)})
    assert {name: (directory / name).read_bytes() for name in before} == before
    write_manifest(directory, manifest_of(engine))
    save_tensors(directory / "predictors.safetensors", tensors())
    assert {p.name: p.read_bytes() for p in directory.iterdir()} == before


def test_the_policy_of_a_directory(directory, engine):
    policy = load(directory, engine)
    assert set(policy.units) == {("mlp", 0), ("mlp", 1), ("heads", 1)} and policy.name == "predicted"
    assert [policy.units["mlp", i].threshold for i in (0, 1)] == [1.0, 1.0]
    refine = policy.units["mlp", 1].refine
    assert refine.threshold == 0.0 and refine.tap == Tap("mlp_in", 1)
    heads = policy.units["heads", 1]
    assert heads.threshold == 0.1 and heads.tap == Tap("mlp_in", 0) and heads.scorer.relu
    z, stored = standardise(randn(1, 2, D, seed=3)), tensors()
    hidden = (z @ stored["heads.1.down"].float().T).relu()
    expected = hidden @ stored["heads.1.up"].float().T + stored["heads.1.bias"]
    torch.testing.assert_close(heads.scorer(z), expected)
    codes = stored["mlp.1.refine.weight.codes"] * stored["mlp.1.refine.weight.scales"].float()
    torch.testing.assert_close(refine.scorer(z), z @ codes.T + stored["mlp.1.refine.bias"])
    torch.testing.assert_close(heads.mean.output, stored["heads.1.mean"])
    W = engine.model.layers[1].self_attn.out_proj.weight.value
    torch.testing.assert_close(heads.mean.projected, stored["heads.1.mean"].flatten() @ W)


ENTRIES = {
    "predicted": Entry(kind="mlp", layer=0, tap="attn_in[0]", rank=5),
    "svd": Entry(kind="mlp", layer=0, method="svd", tap="attn_in[0]", rank=5, bits=3),
    "quantized": Entry(kind="mlp", layer=0, method="quantized", tap="attn_in[0]", bits=2),
    "sign": Entry(kind="mlp", layer=0, method="sign", tap="attn_in[0]"),
    "lsh": Entry(kind="mlp", layer=0, method="lsh", tap="attn_in[0]", rank=9),
    "static": Entry(kind="heads", layer=0, method="static"),
    "random": Entry(kind="mlp", layer=0, method="random", seed=4),
}
STORED = {
    "predicted": {"down": randn(5, D), "up": randn(FFN, 5), "bias": randn(FFN)},
    "svd": {**pack("down", randn(5, D), 3), **pack("up", randn(FFN, 5), 3), "bias": randn(FFN)},
    "quantized": {**pack("weight", randn(FFN, D), 2), "bias": randn(FFN)},
    "sign": {"weight": randn(FFN, D), "bias": randn(FFN)},
    "lsh": {
        "planes": randn(9, D),
        "codes": randn(FFN, 9).sign().to(torch.int8),
        "norms": randn(FFN).abs(),
        "bias": randn(FFN),
    },
    "static": {"scores": randn(HEADS)},
    "random": {},
}


@pytest.mark.parametrize("method", ENTRIES)
def test_ranks_read_their_own_rows(tmp_path, engine, method):
    entry, model = ENTRIES[method], manifest_of(engine).model
    save_tensors(tmp_path / "predictors.safetensors", {f"it.{k}": v for k, v in STORED[method].items()})
    x = torch.arange(6).view(2, 3) if entry.tap is None else randn(2, 3, D)

    def scores(tp):
        return PredictorTensors(tmp_path, model, tp).scorer("it", entry, None)(x)

    whole = scores(TPGroup())
    assert whole.shape == (2, 3, FFN if entry.kind == "mlp" else HEADS) and whole.dtype == torch.float32
    assert whole.std() > 0.1
    for size in (2, 4):
        parts = [scores(TPGroup(rank=rank, size=size)) for rank in range(size)]
        torch.testing.assert_close(torch.cat(parts, dim=-1), whole, atol=1e-5, rtol=1e-5)


def test_an_oracle_has_no_tensors(tmp_path, engine):
    save_tensors(tmp_path / "predictors.safetensors", {})
    truth = HeadContribution(randn(HEADS, 8, D))
    tensors = PredictorTensors(tmp_path, manifest_of(engine).model, TPGroup())
    assert tensors.scorer("it", Entry(kind="heads", layer=0, method="oracle"), lambda: truth) is truth
    assert tensors.head_mean(0) is None


BIG = ModelIdentity(fingerprint="", hidden_size=4 * GROUP, ffn_dim=1000, num_layers=1, num_heads=8)


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({"method": "predicted", "rank": 10}, 2 * (10 * 256 + 1000 * 10) + 2 * 1000),
        # a scale of two bytes for 64 weights, or a row where they do not divide it; of 8 bits four a row
        ({"method": "svd", "rank": 10, "bits": 4}, 10 * (256 / 2 + 8) + 1000 * (10 / 2 + 2) + 2 * 1000),
        ({"method": "predicted", "rank": 10, "bits": 8}, 10 * (256 + 4) + 1000 * (10 + 4) + 2 * 1000),
        ({"method": "quantized", "bits": 2}, 1000 * (256 / 4 + 8) + 2 * 1000),
        ({"method": "sign"}, 1000 * (256 / 8 + 8) + 2 * 1000),
        ({"method": "lsh", "rank": 16}, 2 * 16 * 256 + 1000 * 2 + 4 * 1000),
        ({"method": "static"}, 0),
        ({"method": "random"}, 0),
        ({"method": "oracle"}, 0),
        ({"method": "predicted", "rank": 10, "dense": True}, 0),
    ],
)
def test_what_a_token_reads_of_a_predictor(settings, expected):
    entry = Entry(kind="mlp", layer=0, tap="attn_in[0]", **settings)
    assert entry.read_bytes(BIG) == expected


def test_no_directory_and_no_manifest(tmp_path, engine):
    assert message_of(tmp_path / "none", engine).endswith("nor a directory of predictors")
    assert message_of(tmp_path, engine).endswith("is no directory of predictors: it has no manifest.json")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'{"format": 1}', b"null"])
def test_a_damaged_manifest(directory, engine, content):
    (directory / "manifest.json").write_bytes(content)
    assert "manifest.json is damaged: " in message_of(directory, engine)


def test_half_a_manifest(directory, engine):
    path = directory / "manifest.json"
    path.write_bytes(path.read_bytes()[:700])
    assert "manifest.json is damaged: " in message_of(directory, engine)


def edit(directory, change):
    path = directory / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


WRONG = {
    "another format": (lambda m: m.update(format=2), "manifest.json is damaged: format: Input should be 1"),
    "an unknown field": (lambda m: m.update(colour="red"), "damaged: colour: Extra inputs"),
    "an unknown field of an entry": (lambda m: m["entries"][0].update(x=1), "damaged: entries.0.x: Extra"),
    "an unknown field of a point": (lambda m: m["points"][2].update(x=1), "damaged: points.2.x: Extra"),
    "an unknown key": (lambda m: m["points"][0]["thresholds"].update(x=[]), "damaged: points.0.thresholds"),
    "an unknown method": (lambda m: m["entries"][0].update(method="magic"), "damaged: entries.0.method: "),
    "five bits": (lambda m: m["entries"][0].update(bits=5), "damaged: entries.0.bits: "),
    "no model": (lambda m: m.pop("model"), "damaged: model: Field required"),
    "a size in words": (lambda m: m["model"].update(ffn_dim="x"), "damaged: model.ffn_dim: "),
    "a layer missing": (lambda m: m["entries"].pop(1), "manifest.json: mlp of layer 1 is missing"),
    "a layer double": (lambda m: m["entries"].append(m["entries"][0]), "mlp of layer 0 is missing, double"),
    "a layer too much": (
        lambda m: m["entries"].append(m["entries"][3] | {"layer": 2, "tap": "mlp_in[1]"}),
        "manifest.json: heads of layer 2 is missing, double or too much; expected 0 to 1",
    ),
    "a negative layer": (lambda m: m["entries"][2].update(layer=-1), "damaged: entries.2.layer: "),
    "no predictors": (lambda m: m.update(entries=[]), "manifest.json has no predictors"),
    "neurons from a later layer": (
        lambda m: m["entries"][0].update(tap="attn_in[1]"),
        "manifest.json: mlp of layer 0 are predicted from attn_in[1], which comes later",
    ),
    "heads from their own MLP": (
        lambda m: m["entries"][3].update(tap="mlp_in[1]"),
        "manifest.json: heads of layer 1 are predicted from mlp_in[1], which comes later",
    ),
    "a second stage from later": (
        lambda m: m["entries"][1]["refine"].update(tap="attn_in[2]"),
        "manifest.json: mlp of layer 1 are predicted from attn_in[2], which comes later",
    ),
    "what is no tap": (lambda m: m["entries"][0].update(tap="mlp[0]"), "damaged: entries.0.tap: "),
    "no rank": (lambda m: m["entries"][0].update(rank=None), "mlp.0 has no rank"),
    "a model of no layers": (lambda m: m["model"].update(num_layers=0), "damaged: model.num_layers: "),
    "thresholds of one layer": (
        lambda m: m["points"][2]["thresholds"].update(mlp=[0.5]),
        "manifest.json: 1 thresholds for mlp, expected 2",
    ),
    "a density of 2": (lambda m: m["points"][0].update(mlp_density=2), "damaged: points.0.mlp_density: "),
    "a point that is not there": (lambda m: m.update(default=3), "manifest.json: default point 3 of 3"),
    "a point before the first": (lambda m: m.update(default=-1), "manifest.json: default point -1 of 3"),
    "not calibrated": (
        lambda m: m.update(default=None, points=[]),
        "is not calibrated: run dejavu calibrate on it first",
    ),
    "of another model": (
        lambda m: m["model"].update(fingerprint="abc"),
        "is of another model: its fingerprint is abc, this model's ",
    ),
    "of a wider model": (
        lambda m: m["model"].update(hidden_size=48),
        "is of another model: hidden_size is 48 there and 32 here",
    ),
    "of a model with more neurons": (
        lambda m: m["model"].update(ffn_dim=128),
        "is of another model: ffn_dim is 128 there and 64 here",
    ),
    "of a model with more heads": (
        lambda m: m["model"].update(num_heads=8),
        "is of another model: num_heads is 8 there and 4 here",
    ),
}  # fmt: skip


@pytest.mark.parametrize("change, expected", WRONG.values(), ids=WRONG)
def test_what_is_wrong_with_a_manifest(directory, engine, change, expected):
    edit(directory, change)
    assert expected in message_of(directory, engine)


def test_taps_up_to_the_block_itself_are_in_time(directory, engine):
    edit(
        directory,
        lambda m: [m["entries"][0].update(tap="mlp_in[0]"), m["entries"][3].update(tap="attn_in[1]")],
    )
    assert load(directory, engine).units["heads", 1].tap == Tap("attn_in", 1)


def test_an_entry_without_its_tap(directory, engine):
    edit(directory, lambda m: m["entries"][0].update(tap=None))
    assert "manifest.json" in message_of(directory, engine)


def changed(name, value):
    return lambda t: t.update({name: value})


WRONG_TENSORS = {
    "a tensor missing": (lambda t: t.pop("mlp.0.up"), "has no tensor mlp.0.up, which its manifest needs"),
    "codes missing": (lambda t: t.pop("mlp.1.up.codes"), "has no tensor mlp.1.up.codes, which its manifest"),
    "of the second stage": (lambda t: t.pop("mlp.1.refine.bias"), "has no tensor mlp.1.refine.bias"),
    "a rank too small": (
        changed("mlp.0.down", torch.zeros(4, D)),
        "mlp.0.down has shape [4, 32], the manifest expects [5, 32]",
    ),
    "scales of groups": (
        changed("mlp.1.down.scales", torch.ones(7, 2)),
        "mlp.1.down.scales has shape [7, 2], the manifest expects [7, 1]",
    ),
    "a mean of another shape": (
        changed("heads.1.mean", torch.zeros(HEADS)),
        "heads.1.mean has shape [4], the manifest expects [4, 8]",
    ),
    "not a number": (
        changed("mlp.0.bias", torch.full((FFN,), torch.nan)),
        "mlp.0.bias holds numbers that are not finite",
    ),
    "infinite": (
        changed("heads.1.up", torch.full((HEADS, 3), torch.inf)),
        "heads.1.up holds numbers that are not finite",
    ),
}


@pytest.mark.parametrize("change, expected", WRONG_TENSORS.values(), ids=WRONG_TENSORS)
def test_what_is_wrong_with_the_tensors(directory, engine, change, expected):
    path = directory / "predictors.safetensors"
    stored = load_file(path)
    change(stored)
    save_file(stored, path)
    message = message_of(directory, engine)
    assert expected in message and str(path) in message


def test_no_file_of_tensors_or_a_damaged_one(directory, engine):
    path = directory / "predictors.safetensors"
    data = path.read_bytes()
    for content in (data[:-100], data[:20], b"", b"x" * 300):
        path.write_bytes(content)
        assert "predictors.safetensors is damaged or no safetensors file: " in message_of(directory, engine)
    path.unlink()
    assert message_of(directory, engine).endswith("has no predictors.safetensors")


def damage_seen_by(tp, model_dir, directory):
    with pytest.raises(ValueError) as error:
        Engine.from_pretrained(str(model_dir), tp=tp, sparsity=str(directory))
    return str(error.value)


def test_damage_on_one_rank_is_told_to_all(directory, model_dir):
    path = directory / "predictors.safetensors"
    stored = load_file(path)
    stored["mlp.0.bias"][-1] = torch.nan
    save_file(stored, path)
    messages = run_ranks(2, damage_seen_by, model_dir, directory)
    assert messages == [f"rank 1: {path}: mlp.0.bias holds numbers that are not finite"] * 2


@pytest.mark.parametrize("density", [0, 0.0999, 0.7001, 2, -1, math.nan])
def test_densities_that_were_not_calibrated(directory, engine, density):
    message = message_of(directory, engine, density=density)
    expected = rf"density={density} is outside the calibrated range of .*predictors, 0.1000 to 0.7000"
    assert re.search(expected, message)


def test_a_density_is_of_predictors(engine):
    for spec in ("dense", "lossless"):
        with pytest.raises(ValueError, match=f"density=0.5 belongs to predictors; {spec} has none"):
            load_policy(spec, engine.model, engine.fingerprint, density=0.5)


@pytest.mark.parametrize("order", [1, -1])
def test_between_two_points(directory, engine, order):
    manifest = manifest_of(engine)
    manifest = manifest.model_copy(update={"points": manifest.points[::order]})
    found = at_density(manifest, 0.15, directory)  # a quarter of the way from the first to the second
    assert found.thresholds["heads"][0] is found.thresholds["refine"][0] is None
    found_here = [*found.thresholds["mlp"], found.thresholds["heads"][1], found.thresholds["refine"][1]]
    assert found_here == pytest.approx([2.5, 1.75, 0.4, 0.75])
    assert found.mlp_density == pytest.approx(0.15) and found.head_density == pytest.approx(0.5625)
    assert found.ppl_increase == pytest.approx(0.035) and found.kl == pytest.approx(0.35)
    dense = at_density(manifest, 0.5, directory).thresholds
    assert dense["heads"] == [None, None] and dense["mlp"][0] is dense["refine"][0] is None
    assert [dense["mlp"][1], dense["refine"][1]] == pytest.approx([0.0, -1.0])
    for point in manifest.points:
        same = at_density(manifest, point.mlp_density, directory).thresholds
        assert {key: pytest.approx(values) for key, values in same.items()} == point.thresholds


def test_the_density_of_a_policy(directory, engine):
    policy = load(directory, engine, density=0.2)
    assert policy.units["mlp", 1].threshold == pytest.approx(1.5)
    assert policy.units["mlp", 1].refine.threshold == pytest.approx(0.5)
    dense_first = load(directory, engine, density=0.6)
    assert set(dense_first.units) == {("mlp", 1)}


def test_without_predictors_of_neurons_the_density_is_of_heads(directory, engine):
    edit(directory, lambda m: m.update(entries=m["entries"][2:]))
    assert load(directory, engine, density=0.625).units["heads", 1].threshold == pytest.approx(0.3)
    assert "0.5000 to 1.0000" in message_of(directory, engine, density=0.4)
