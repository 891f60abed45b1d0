"""The order that loads ranks alike: the deal, and that a model in it computes and chooses what it did."""

import json
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import OPTForCausalLM

from dejavu.parallel.groups import TPGroup
from dejavu.predictors.balance import BLOCKS, Spread, balance, blocks_of, deal, deal_all, record
from dejavu.predictors.corpus import Corpus
from dejavu.predictors.files import (
    TENSORS,
    Entry,
    Manifest,
    OperatingPoint,
    pack,
    read_manifest,
    save_tensors,
    write_manifest,
)
from dejavu.predictors.selection import EVERYTHING
from dejavu.profiles.quality import whole_pass
from dejavu.runtime.engine import Engine
from dejavu.runtime.sampling import SamplingParams
from dejavu.runtime.sparsity import identity, load_policy
from models import KINDS, load_reference, make_model, windows_of
from ranks import run_ranks

pytestmark = pytest.mark.usefixtures("one_thread")

D, FFN, HEADS, LAYERS = 32, 64, 4, 2
TEXTS = [(0, 1000), (1000, 2000)]


def corpus_of(windows, part):
    return Corpus(windows, "text.txt", "0" * 64, *TEXTS[part])


def engine_of(directory, tp=None, **settings):
    return Engine.from_pretrained(str(directory), tp=tp or TPGroup(), dtype="fp32", **settings)


def randn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tensors_of(entry, seed):
    """Random ones, as `dejavu train` names them; some neurons are chosen often, some hardly ever."""
    n = FFN if entry.kind == "mlp" else HEADS
    bias = 2 * randn(n, seed=seed)
    match entry.method:
        case "predicted" | "svd":
            r = entry.rank
            tensors = pack("down", randn(r, D, seed=seed + 1) / D**0.5, entry.bits)
            tensors |= pack("up", randn(n, r, seed=seed + 2) / r**0.5, entry.bits)
        case "quantized" | "sign":
            tensors = pack("weight", randn(n, D, seed=seed + 1) / D**0.5, entry.bits)
        case "lsh":
            codes = torch.where(randn(n, entry.rank, seed=seed + 1) > 0, 1, -1).to(torch.int8)
            planes, norms = randn(entry.rank, D, seed=seed + 2), randn(n, seed=seed + 3).abs()
            tensors = {"planes": planes, "codes": codes, "norms": norms}
        case "static":
            return {"scores": bias}
        case "oracle":
            return {}
    tensors["bias"] = bias
    if entry.kind == "heads":
        tensors["mean"] = randn(n, D // HEADS, seed=seed + 4)
    if entry.refine is not None:
        tensors |= {f"refine.{name}": t for name, t in tensors_of(entry.refine, seed + 5).items()}
    return tensors


def predictors_of(model_dir, directory, method="predicted", heads=True, **settings):
    """A calibrated directory of a model: of its neurons and, from layer 1 on, of its heads."""
    engine = engine_of(model_dir)
    tapless = method in ("static", "oracle", "random")
    rank = 5 if method in ("predicted", "svd", "lsh") else None

    def mlp(layer):
        tap = None if tapless else f"attn_in[{layer}]"
        return Entry(kind="mlp", layer=layer, method=method, tap=tap, rank=rank, **settings)

    entries = [] if method is None else [mlp(0), mlp(1)]
    if heads:
        second = Entry(kind="heads", layer=1, tap="mlp_in[0]", rank=3, relu=True)
        entries += [Entry(kind="heads", layer=0, dense=True), second]
    point = OperatingPoint(
        thresholds={"mlp": [0.2, 0.0], "heads": [None, -0.5], "refine": [-0.5, -0.5]},
        **{"mlp_density": 0.5, "head_density": 0.7, "ppl_increase": 0.01, "kl": 0.02},
    )
    directory.mkdir()
    tensors = {
        f"{entry.name}.{name}": tensor
        for i, entry in enumerate(e for e in entries if not e.dense)
        for name, tensor in tensors_of(entry, 100 * i).items()
    }
    save_tensors(directory / TENSORS, tensors or {"none": torch.zeros(1)})
    manifest = Manifest(
        model=identity(engine.model.config, engine.fingerprint),
        method=method or "predicted",
        lookahead="half",
        entries=entries,
        commands=["dejavu train"],
        default=0,
        points=[point],
    )
    write_manifest(directory, manifest)
    return directory


def balanced(model_dir, predictors, out, tp=None, engine=None):
    engine = engine or engine_of(model_dir, tp)
    windows = [windows_of(6, 16, seed=part) for part in (0, 1)]
    return balance(
        engine,
        model_dir,
        predictors,
        out,
        corpus_of(windows[0], 0),
        corpus_of(windows[1], 1),
        command="dejavu convert",
    )


def orders_of(engine, predictors, windows):
    """As `balanced` deals."""
    policy = load_policy(str(predictors), engine.model, engine.fingerprint, sharing="mask", dense_until=1)
    return deal_all(engine.model.config, TPGroup(), record(engine, policy, windows))


def masks_of(engine, predictors, windows):
    policy = load_policy(str(predictors), engine.model, engine.fingerprint, sharing="mask", dense_until=1)
    sizes = {"mlp": FFN, "heads": HEADS}
    return {
        key: torch.from_numpy(np.unpackbits(bits, axis=-1, count=sizes[key[0]])).bool()
        for key, bits in record(engine, policy, windows).items()
    }


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def predictors(tmp_path_factory, model_dir):
    return predictors_of(model_dir, tmp_path_factory.mktemp("predictors") / "predictors")


@pytest.fixture(scope="module")
def converted(tmp_path_factory, model_dir, predictors):
    out = tmp_path_factory.mktemp("out") / "balanced"
    return out, balanced(model_dir, predictors, out)


# The deal


@given(st.integers(1, 80), st.integers(1, 12), st.floats(0, 1), st.integers(0, 99))
def test_a_deal_is_an_order_by_equal_blocks(n, tokens, density, seed):
    chosen = torch.rand(tokens, n, generator=torch.Generator().manual_seed(seed)) < density
    order = deal(chosen)
    assert order.dtype == torch.int64 and order.sort().values.tolist() == list(range(n))
    for block in order.view(blocks_of(n), -1).tolist():
        assert block == sorted(block)
    assert deal(chosen).equal(order)


@given(st.integers(1, 5), st.integers(1, 3), st.integers(0, 99))
def test_what_is_always_chosen_together_is_split_evenly(groups, each, seed):
    """Groups of 16 or more neurons that share their tokens: at every token all ranks get the same."""
    generator = torch.Generator().manual_seed(seed)
    group = torch.arange(groups).repeat_interleave(16 * each)
    group = group[torch.randperm(len(group), generator=generator)]
    active = torch.randint(groups, (30,), generator=generator)
    chosen = active[:, None] == group
    dealt = chosen[:, deal(chosen)]
    for ranks in (2, 4, 8, 16):
        shares = dealt.unflatten(1, (ranks, -1)).sum(-1)
        assert shares.eq(16 * each // ranks).all()


@given(st.lists(st.integers(0, 40), min_size=32, max_size=32))
def test_equal_frequencies(counts):
    """Chosen at the first so many tokens, a neuron meets all that are rarer: blocks' sums come out alike."""
    chosen = torch.arange(40)[:, None] < torch.tensor(counts)
    sums = chosen.sum(0)[deal(chosen)].view(BLOCKS, -1).sum(-1)
    assert int(sums.max() - sums.min()) <= max(counts)


def test_few_heads_are_paired_hot_with_cold():
    frequency = torch.tensor([8, 7, 6, 5, 4, 3, 2, 1])
    chosen = torch.arange(8)[:, None] < frequency
    sums = frequency[deal(chosen)]
    assert sums.view(4, 2).sum(-1).tolist() == [9] * 4


@pytest.mark.parametrize("n, blocks", [(2048, 16), (49152, 16), (40, 8), (12, 4), (96, 16), (7, 1), (1, 1)])
def test_blocks(n, blocks):
    assert blocks_of(n) == blocks


def test_a_deal_holds_for_other_tokens():
    """Neurons that follow topics: the spread falls on tokens that nothing was dealt by."""
    follows = torch.arange(8).repeat_interleave(16)
    topics = torch.rand(600, 8, generator=torch.Generator().manual_seed(0)) < 0.3
    noise = torch.rand(600, 128, generator=torch.Generator().manual_seed(1)) < 0.7
    chosen = topics[:, follows] & noise

    def spread(mask, ranks):
        shares = mask.unflatten(1, (ranks, -1)).sum(-1).double()
        return float(shares.amax(1).sum() / shares.mean(1).sum())

    order = deal(chosen[:300])
    for ranks in (2, 4, 8):
        before, after = spread(chosen[300:], ranks), spread(chosen[300:][:, order], ranks)
        assert after - 1 < 0.6 * (before - 1)


# What is reported


def test_the_spread_by_hand(model_dir):
    config = engine_of(model_dir).model.config
    orders = {
        (kind, layer): torch.arange(n) for kind, n in (("mlp", FFN), ("heads", HEADS)) for layer in (0, 1)
    }
    orders["mlp", 1] = torch.arange(FFN).view(-1, 2).T.flatten()  # the even ones, the odd ones
    spread = Spread(orders, config)
    mask = torch.zeros(1, 2, FFN, dtype=torch.bool)
    mask[0, 0, :8] = True  # all on the first rank of two; dealt, four on each
    mask[0, 1, :3] = True
    spread.see(("mlp", 1), mask)
    spread.see(("mlp", 0), mask[:, :1])
    spread.see(("mlp", 0), mask[:, 1:])
    rows = spread.rows()
    assert [(row["kind"], row["ranks"]) for row in rows[:-1]] == [("mlp", 2), ("mlp", 4)]  # 8: only 4 heads
    two = rows[0]
    assert two["before"] == pytest.approx((8 + 3 + 8 + 3) / 11)
    assert two["after"] == pytest.approx((8 + 3 + 4 + 2) / 11)
    assert two["floor"] == pytest.approx(2 * (4 + 2) / 11)
    tokens = rows[-1]
    assert (tokens["tokens of"], tokens["layers"]) == ("mlp", 2)
    assert tokens["density"] == pytest.approx(5.5 / FFN)
    assert tokens["p5"] == tokens["layer_p5"] == pytest.approx((3 + 0.05 * 5) / 5.5)
    assert tokens["p95"] == tokens["layer_p95"] == pytest.approx((8 - 0.05 * 5) / 5.5)


def test_rows_of_both_kinds(converted):
    rows = converted[1].rows
    assert [(row.get("kind"), row.get("ranks"), row.get("tokens of")) for row in rows] == [
        ("mlp", 2, None), ("mlp", 4, None), ("heads", 2, None), ("heads", 4, None),
        (None, None, "mlp"), (None, None, "heads"),
    ]  # fmt: skip
    for row in rows[:4]:
        assert 1 <= row["floor"] <= min(row["before"], row["after"]) + 1e-9


# The same function

ON_TWO = ("pre-norm", "post-norm with projections")


def dense_and_sparse(tp, model_dir, predictors, windows):
    """Logits of a dense and of a sparse pass, and a text decoded sparsely."""
    engine = engine_of(model_dir, tp, sparsity=str(predictors))
    policy = load_policy(str(predictors), engine.model, engine.fingerprint, sharing="mask", dense_until=1)
    passes = [whole_pass(engine, windows[:, :-1], selector) for selector in (EVERYTHING, policy)]
    generation = engine.generate(["The old man", "Once"], SamplingParams(max_new_tokens=8, ignore_eos=True))
    return [*(x.numpy() for x in passes)], [result.token_ids for result in generation.results]


@pytest.mark.parametrize("kind, ranks", [*((kind, 1) for kind in KINDS), *((kind, 2) for kind in ON_TWO)])
def test_a_converted_model_computes_the_same(tmp_path, kind, ranks):
    model_dir = make_model(tmp_path / "model", **KINDS[kind])
    predictors = predictors_of(model_dir, tmp_path / "predictors")
    out = tmp_path / "out"
    run_ranks(ranks, partial(convert_on, model_dir, predictors, out))
    windows = windows_of(2, 24, seed=5)
    with torch.inference_mode():
        theirs = [load_reference(path)(windows[:, :-1]).logits for path in (model_dir, out)]
    torch.testing.assert_close(theirs[1], theirs[0], atol=1e-4, rtol=1e-4)
    before = dense_and_sparse(None, model_dir, predictors, windows)
    for after in run_ranks(ranks, dense_and_sparse, out, out / "predictors", windows):
        for x, y in zip(after[0], before[0], strict=True):
            np.testing.assert_allclose(x, y, atol=1e-4, rtol=1e-4)
        assert after[1] == before[1]


def convert_on(model_dir, predictors, out, tp):
    return balanced(model_dir, predictors, out, tp).rows


METHODS = {
    "predicted": {},
    "predicted in 8 bits": {"method": "predicted", "bits": 8},
    "two stages": {"method": "predicted", "bits": 4, "refine": True},
    "svd": {"method": "svd"},
    "quantized": {"method": "quantized", "bits": 3},
    "sign": {"method": "sign"},
    "lsh": {"method": "lsh"},
    "static": {"method": "static"},
    "oracle": {"method": "oracle"},
    "heads alone": {"method": None},
    "neurons alone": {"method": "predicted", "heads": False},
}


@pytest.mark.parametrize("name", METHODS)
def test_converted_predictors_choose_the_same(tmp_path, model_dir, name):
    settings = dict(METHODS[name])
    two_stages = settings.pop("refine", False)
    predictors = predictors_of(model_dir, tmp_path / "predictors", **settings)
    if two_stages:
        with_second_stage(predictors)
    out = tmp_path / "out"
    balanced(model_dir, predictors, out)
    old, new = engine_of(model_dir), engine_of(out)
    orders = orders_of(old, predictors, windows_of(6, 16, seed=0))
    assert any(not order.equal(torch.arange(len(order))) for order in orders.values())
    windows = windows_of(3, 24, seed=7)
    before = masks_of(old, predictors, windows)
    after = masks_of(new, out / "predictors", windows)
    assert before.keys() == after.keys() and before
    for key, mask in before.items():
        assert 0 < mask.float().mean() < 1
        assert after[key].equal(mask[:, orders[key]])


def with_second_stage(directory):
    manifest, tensors = read_manifest(directory), load_file(directory / TENSORS)
    entries = []
    for entry in manifest.entries:
        if entry.kind == "mlp":
            tap = f"mlp_in[{entry.layer}]"
            second = Entry(kind="mlp", layer=entry.layer, method="quantized", tap=tap, bits=4)
            entry = entry.model_copy(update={"refine": second})
            found = tensors_of(second, 50 + entry.layer)
            tensors |= {f"{entry.name}.refine.{name}": tensor for name, tensor in found.items()}
        entries.append(entry)
    save_tensors(directory / TENSORS, tensors)
    write_manifest(directory, manifest.model_copy(update={"entries": entries}))


def test_ranks_agree_on_the_order(tmp_path, model_dir, predictors, converted):
    rows = run_ranks(2, partial(convert_on, model_dir, predictors, tmp_path / "out"))
    assert rows[0] == rows[1]
    for name in ("model.safetensors", "predictors/predictors.safetensors"):
        ours, theirs = load_file(converted[0] / name), load_file(tmp_path / "out" / name)
        assert ours.keys() == theirs.keys()
        assert all(ours[key].equal(theirs[key]) for key in ours)


# What is written


def test_the_files(model_dir, predictors, converted):
    out, found = converted
    names = sorted(str(p.relative_to(out)) for p in out.rglob("*") if p.is_file())
    there = [p.name for p in model_dir.iterdir()]
    assert names == sorted([*there, "predictors/manifest.json", "predictors/predictors.safetensors"])
    assert (out / "config.json").read_bytes() == (model_dir / "config.json").read_bytes()
    assert not list(out.parent.glob("*.partial"))
    assert (out / "model.safetensors").stat().st_mode == (out / "config.json").stat().st_mode
    with safe_open(out / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    old, new = read_manifest(predictors), read_manifest(out / "predictors")
    assert new == found.manifest
    assert new.model.fingerprint == engine_of(out).fingerprint != old.model.fingerprint
    assert (old.source_fingerprint, new.source_fingerprint) == (None, old.model.fingerprint)
    assert new.commands == ["dejavu train", "dejavu convert"]
    same = ("entries", "points", "default", "sources", "method", "lookahead")
    assert all(getattr(new, name) == getattr(old, name) for name in same)


def test_predictors_of_one_are_refused_by_the_other(model_dir, predictors, converted):
    for model, theirs in ((model_dir, converted[0] / "predictors"), (converted[0], predictors)):
        with pytest.raises(ValueError, match="is of another model: its fingerprint is"):
            engine_of(model, sparsity=str(theirs))


def test_a_deal_that_keeps_the_rows_by_which_a_model_is_known(tmp_path, monkeypatch, model_dir, predictors):
    """As heads may move where no neuron does."""

    def heads_alone(chosen):
        order = torch.arange(chosen.shape[1])
        return order.flip(0) if len(order) == HEADS else order

    monkeypatch.setattr("dejavu.predictors.balance.deal", heads_alone)
    balanced(model_dir, predictors, tmp_path / "out")
    assert engine_of(tmp_path / "out").fingerprint != engine_of(model_dir).fingerprint


def test_converted_again(tmp_path, model_dir, converted):
    again = balanced(converted[0], converted[0] / "predictors", tmp_path / "again").manifest
    assert again.source_fingerprint == engine_of(model_dir).fingerprint
    assert again.commands == ["dejavu train", "dejavu convert", "dejavu convert"]


def sharded(model_dir, path):
    load_reference(model_dir).save_pretrained(path, max_shard_size="50kB")


def in_bin(model_dir, path):
    state = load_reference(model_dir).state_dict()  # with the tied head, which shares the table's memory
    torch.save(state, path / "pytorch_model.bin")


def in_bin_shards(model_dir, path):
    state = {k: v.clone() for k, v in load_file(model_dir / "model.safetensors").items()}
    parts = {"pytorch_model-00001-of-00002.bin": {}, "pytorch_model-00002-of-00002.bin": {}}
    for i, (key, tensor) in enumerate(state.items()):
        list(parts.values())[i % 2][key] = tensor
    for name, part in parts.items():
        torch.save(part, path / name)
    where = {key: name for name, part in parts.items() for key in part}
    (path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))


def of_old_names(model_dir, path):
    state = load_file(model_dir / "model.safetensors")
    save_file(
        {key.removeprefix("model."): tensor for key, tensor in state.items()}, path / "model.safetensors"
    )


def in_half(model_dir, path):
    load_reference(model_dir, torch.float16).save_pretrained(path)


@pytest.mark.parametrize("write", [sharded, in_bin, in_bin_shards, of_old_names, in_half])
def test_every_kind_of_checkpoint(tmp_path, model_dir, write):
    source = tmp_path / "source"
    shutil.copytree(model_dir, source, ignore=shutil.ignore_patterns("*.safetensors"))
    write(model_dir, source)
    predictors = predictors_of(source, tmp_path / "predictors")
    out = tmp_path / "out"
    balanced(source, predictors, out)
    assert not list(out.glob("*.bin*"))
    weights = sorted(out.glob("*.safetensors"))
    assert len(weights) == len([p for p in source.iterdir() if p.suffix in (".bin", ".safetensors")])
    dtypes = {tensor.dtype for path in weights for tensor in load_file(path).values()}
    assert dtypes == {torch.float16 if write is in_half else torch.float32}
    windows = windows_of(2, 16, seed=3)
    before, after = (whole_pass(engine_of(path), windows[:, :-1], EVERYTHING) for path in (source, out))
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)
    loaded = OPTForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    with torch.inference_mode():
        torch.testing.assert_close(loaded(windows[:, :-1]).logits, before, atol=1e-3, rtol=1e-3)


# What goes wrong


def message_of(*arguments, **settings):
    with pytest.raises(ValueError) as error:
        balanced(*arguments, **settings)
    return str(error.value)


def test_what_is_there_is_kept(tmp_path, model_dir, predictors):
    out = tmp_path / "out"
    out.mkdir()
    assert message_of(model_dir, predictors, out) == f"{out} exists already"
    out.rename(tmp_path / "out.partial")
    assert message_of(model_dir, predictors, out).endswith(
        "out.partial is left of a run that was not finished: remove it first"
    )
    assert not out.exists()


def test_predictors_that_cannot_be_balanced(tmp_path, model_dir, predictors):
    def message(change):
        shutil.rmtree(tmp_path / "changed", ignore_errors=True)
        shutil.copytree(predictors, tmp_path / "changed")
        manifest = read_manifest(predictors)
        write_manifest(tmp_path / "changed", manifest.model_copy(update=change(manifest)))
        return message_of(model_dir, tmp_path / "changed", tmp_path / "out")

    nothing = {"thresholds": {"mlp": [None, None]}}
    cases = {
        "changed is not calibrated": lambda m: {"default": None, "points": []},
        "is of another model: its fingerprint is 0": lambda m: {
            "model": m.model.model_copy(update={"fingerprint": "0"})
        },
        "is of another model: ffn_dim is 128": lambda m: {
            "model": m.model.model_copy(update={"ffn_dim": 128})
        },
        "leave every layer dense": lambda m: {"points": [m.points[0].model_copy(update=nothing)]},
        "choose by a hash": lambda m: {
            "entries": [Entry(kind="mlp", layer=i, method="random") for i in (0, 1)]
        },
    }
    for expected, change in cases.items():
        assert expected in message(change)
    assert not list(tmp_path.glob("out*"))


def test_no_predictors(tmp_path, model_dir):
    assert "is no directory of predictors" in message_of(model_dir, tmp_path / "none", tmp_path / "out")


@pytest.mark.parametrize("name", ["mlp.0.up", "heads.1.mean"])
def test_damaged_predictors(tmp_path, model_dir, predictors, name):
    shutil.copytree(predictors, tmp_path / "damaged")
    tensors = load_file(predictors / TENSORS)
    save_tensors(tmp_path / "damaged" / TENSORS, tensors | {name: tensors[name][:-1]})
    assert f"{name} has shape" in message_of(model_dir, tmp_path / "damaged", tmp_path / "out")


def test_texts_that_overlap(tmp_path, model_dir, predictors):
    corpus = corpus_of(windows_of(2, 16), 0)
    with pytest.raises(ValueError, match="overlap"):
        balance(engine_of(model_dir), model_dir, predictors, tmp_path / "out", corpus, corpus)


def test_a_full_disk(tmp_path, model_dir, predictors, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    assert "GB, but the disk has 0.00 GB left" in message_of(model_dir, predictors, tmp_path / "out")


def test_an_error_while_writing_leaves_nothing_under_the_name(tmp_path, model_dir, predictors, monkeypatch):
    def fail(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("dejavu.predictors.balance.write_predictors", fail)
    assert message_of(model_dir, predictors, tmp_path / "out") == "no space left on device"
    assert [p.name for p in tmp_path.glob("out*")] == ["out.partial"]
