"""The study against plain computations in Hugging Face's model, on one rank and two, and its page."""

import json
import struct
from itertools import pairwise

import pytest
import torch

from dejavu.predictors import study as study_module
from dejavu.predictors.corpus import Corpus, read_corpus
from dejavu.predictors.study import judge, observe, study, trials
from dejavu.profiles.plots import study_page
from dejavu.profiles.records import write_record
from dejavu.profiles.study_tables import study_rows, study_tables
from dejavu.runtime.engine import Engine
from models import KINDS, load_reference, make_model, model_of
from ranks import run_ranks

TEXT = """
It was late in the afternoon when the old man came down to the shore. The sea was grey and quiet, and far
out a single sail stood against the sky. He looked at it for a long time, and then he sat down upon a
stone and took his pipe out of his pocket. "She will not come in before the night," he said to the boy,
who had followed him from the house. "The wind has fallen, and the tide is against her." The boy said
nothing. He had never seen his father's ship, and he did not know whether he wished to see it now. After
a while the lamps were lit in the village behind them, and one by one the windows of the cottages began
to shine upon the dark water.
"""


def windows_of(n, tokens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, 4000, (n, tokens + 1), generator=generator)


def corpus_of(windows):
    return Corpus(windows, "made.txt", "0" * 64, 0, 1000)


def engine_of(directory, tp=None):
    return Engine.from_pretrained(str(directory), tp=tp, device="cpu", dtype="fp32")


@pytest.fixture(scope="module")
def demo():
    return Engine.from_pretrained("demo", device="cpu", dtype="fp32")


class Seen:
    """What passed through Hugging Face's model in a pass over ``token_ids [B, S]``, the first token left out:
    per layer the stream at both taps, neurons ``[B, S - 1, F]`` and heads' shares ``[B, S - 1, N, D]``."""

    def __init__(self, directory, token_ids):
        model = load_reference(directory)
        pre_norm, N = model.config.do_layer_norm_before, model.config.num_attention_heads
        self.attn_in, self.mlp_in, self.neurons, self.heads, self.attention, self.mlp = ([] for _ in range(6))

        def keep(where, x):
            where.append(x.detach().reshape(*token_ids.shape, -1)[:, 1:])

        def keep_heads(module, args):
            y = args[0].reshape(*token_ids.shape, N, -1)[:, 1:]
            W = module.weight.detach().T.unflatten(0, (N, -1))
            self.heads.append(torch.einsum("bsnh,nhd->bsnd", y, W))

        for layer in model.model.decoder.layers:
            layer.register_forward_pre_hook(lambda m, a: keep(self.attn_in, a[0]))
            if pre_norm:
                layer.final_layer_norm.register_forward_pre_hook(lambda m, a: keep(self.mlp_in, a[0]))
            else:
                layer.self_attn_layer_norm.register_forward_hook(lambda m, a, out: keep(self.mlp_in, out))
            layer.self_attn.out_proj.register_forward_pre_hook(keep_heads)
            layer.self_attn.out_proj.register_forward_hook(lambda m, a, out: keep(self.attention, out))
            layer.fc1.register_forward_hook(lambda m, a, out: keep(self.neurons, out.relu()))
            layer.fc2.register_forward_hook(lambda m, a, out: keep(self.mlp, out))
        with torch.no_grad():
            model(token_ids)
        self.fc2 = [layer.fc2.weight.detach() for layer in model.model.decoder.layers]


def smallest_share(contributions, percent):
    """How many of ``contributions [n]``, largest first, until they make up so much; as a share of n."""
    total, so_far = contributions.sum(), 0.0
    for count, x in enumerate(sorted(contributions.tolist(), reverse=True), 1):
        so_far += x
        if so_far >= total * percent / 100:
            return count / len(contributions)
    return 1.0


def mean(figures):
    figures = list(figures)
    return sum(figures) / len(figures)


def indices(live):
    return set(live.nonzero().flatten().tolist())


def share_of_union(a, b):
    return len(a & b) / len(a | b)


@pytest.mark.parametrize("kind", ["pre-norm", "post-norm with projections"])
def test_figures_of_layers_agree_with_plain_computations(kind, tmp_path):
    directory = make_model(tmp_path, **{**KINDS[kind], "num_hidden_layers": 3})
    windows = windows_of(4, 11)
    rows = observe(engine_of(directory), windows).layers()
    seen = Seen(directory, windows[:, :-1])
    assert len(rows) == 3
    for layer, row in enumerate(rows):
        neurons, F = seen.neurons[layer], 64
        live = neurons > 0
        counts = sorted(live.sum(-1).flatten().tolist())
        assert row["live_mean"] == pytest.approx(mean(counts) / F)
        assert row["live_p5"] == counts[round(0.05 * 39)] / F
        assert row["live_p95"] == counts[round(0.95 * 39)] / F
        added = (neurons * seen.fc2[layer].norm(dim=0)).flatten(0, 1)
        heads = seen.heads[layer].norm(dim=-1).flatten(0, 1)
        for percent in (90, 95, 99):
            plain = mean(smallest_share(x, percent) for x in added)
            assert row[f"neurons_{percent}"] == pytest.approx(plain)
            assert row[f"heads_{percent}"] == pytest.approx(mean(smallest_share(x, percent) for x in heads))
        sets = [[indices(token) for token in window] for window in live]
        pairs = [(a, b) for window in sets for a, b in pairwise(window)]
        assert row["overlap"] == pytest.approx(mean(share_of_union(a, b) for a, b in pairs))
        by_chance = [len(a) * len(b) / F for a, b in pairs]
        assert row["overlap_by_chance"] == pytest.approx(
            mean(c / (len(a) + len(b) - c) for c, (a, b) in zip(by_chance, pairs, strict=True))
        )
        assert row["union"]["1"] == pytest.approx(row["live_mean"])
        everyone = [set.union(*at) for at in zip(*sets, strict=True)]
        assert row["union"]["4"] == pytest.approx(mean(len(s) / F for s in everyone))
        assert list(row["union"]) == ["1", "2", "4"]

        attn_in, mlp_in = seen.attn_in[layer], seen.mlp_in[layer]
        later = {"same": (attn_in, mlp_in)}
        if layer < 2:
            later["next"] = (mlp_in, seen.mlp_in[layer + 1])
        if layer < 1:
            later["two_on"] = (mlp_in, seen.mlp_in[layer + 2])
        for name in ("same", "next", "two_on"):
            if name not in later:
                assert row["cosine"][name] is None
                continue
            x, y = later[name]
            cosine = (x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))
            assert row["cosine"][name] == pytest.approx(float(cosine.mean()), abs=1e-5)
        for name, out, x in (
            ("attention_ratio", seen.attention[layer], attn_in),
            ("mlp_ratio", seen.mlp[layer], mlp_in),
        ):
            assert row[name] == pytest.approx(float((out.norm(dim=-1) / x.norm(dim=-1)).mean()), rel=1e-5)


@pytest.mark.parametrize("kind", ["mlp", "heads"])
@pytest.mark.parametrize("model", ["demo", "post-norm with projections"])
def test_a_density_is_what_is_computed_and_all_of_it_costs_nothing(kind, model, tmp_path):
    engine = Engine.from_pretrained(str(model_of(model, tmp_path)), device="cpu", dtype="fp32")
    windows = windows_of(2, 24)
    seen = observe(engine, windows)
    tried = trials(engine, seen, kind, (0.01, 0.4, 1.0) if kind == "mlp" else (0.5, 1.0))
    dense, scores = judge(engine, windows, tried)
    rows = [study_module._row(engine, *pair, dense) for pair in zip(tried, scores, strict=True)]
    most = mean(row["live_mean"] for row in seen.layers()) if kind == "mlp" else 1.0
    # the two-pass oracle judges the dense run, which the thresholds are from; the other's run differs
    slack = {"static": 0.02, "two-pass": 0.001, "random": 0.1, "oracle": 0.2}
    for row in rows:
        policy, asked = row["policy"], row["density_asked"]
        contextual = policy in ("oracle", "two-pass")
        expected = min(asked, most) if contextual and asked < 1 else asked
        assert row["density"] == pytest.approx(expected, abs=slack[policy])
        if asked == 1 or (contextual and asked > most):
            assert row["ppl_increase"] == 0 and row["kl"] == 0 and row["top1"] == 1
        else:
            assert row["kl"] > 0
    assert {row["policy"] for row in rows} == set(study_module.POLICIES)


def test_the_second_pass_computes_what_the_first_found(tmp_path):
    engine = engine_of(make_model(tmp_path))
    windows = windows_of(2, 16)
    seen = observe(engine, windows)
    tried = {t.row["policy"]: t for t in trials(engine, seen, "mlp", (0.2,))}
    judge(engine, windows, list(tried.values()))
    contributions = Seen(tmp_path, windows[:, :-1])
    units = tried["oracle"].selector.units
    for layer, neurons in enumerate(contributions.neurons):
        important = neurons * contributions.fc2[layer].norm(dim=0) > units["mlp", layer].threshold
        assert torch.equal(tried["two-pass"].first.levels[layer][:, 1:] > 0, important)


def plain_loss(directory, windows, change):
    """Mean loss of Hugging Face's model, changed, of every token but a window's first two."""
    model = load_reference(directory)
    handles = change(model.model.decoder.layers)
    with torch.no_grad():
        logits = model(windows[:, :-1]).logits[:, 1:]
    del handles
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 2:].flatten()))


def without_mlp(layers):
    layers[1].fc2.weight.data.zero_()


def without_attention(layers):
    layers[1].self_attn.out_proj.weight.data.zero_()


def in_parallel(layers):
    """The norm before fc1 is given what entered the layer."""
    entered = []
    for layer in layers:
        layer.register_forward_pre_hook(lambda m, args: entered.append(args[0]))
        layer.final_layer_norm.register_forward_pre_hook(lambda m, args: (entered[-1].view_as(args[0]),))


def test_skipped_blocks_and_parallel_ones_agree_with_a_changed_model(tmp_path):
    engine, windows = engine_of(make_model(tmp_path)), windows_of(3, 16)
    result = study(engine, corpus_of(windows), optional=True)
    rows = {(row["kind"], row["policy"], row["layer"]): row for row in result["optional"]}
    assert len(rows) == 3 * 2 + 1
    for key, change in (
        (("mlp", "skip", 1), without_mlp),
        (("heads", "skip", 1), without_attention),
        (("mlp", "parallel", None), in_parallel),
    ):
        plain = plain_loss(tmp_path, windows, change)
        assert torch.tensor(rows[key]["ppl"]).log() == pytest.approx(plain, rel=1e-4)
    assert torch.tensor(result["dense_ppl"]).log() == pytest.approx(
        plain_loss(tmp_path, windows, lambda layers: None), rel=1e-4
    )


def test_context_matters_in_the_embedded_model(demo, tmp_path, monkeypatch):
    monkeypatch.setattr(study_module, "DENSITIES", {"mlp": (0.1, 0.3), "heads": (0.75,)})
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    told = []
    result = study(
        demo,
        read_corpus(path, demo.tokenizer, window=48),
        on_progress=lambda done, total: told.append((done, total)),
    )
    mlp = {(row["policy"], row["density_asked"]): row for row in result["mlp"]}
    heads = {row["policy"]: row for row in result["heads"]}
    for density in (0.1, 0.3):
        costs = [mlp[policy, density]["ppl_increase"] for policy in ("oracle", "static", "random")]
        assert costs == sorted(costs) and costs[2] > 10 * max(costs[1], 1)
    assert mlp["oracle", 0.3]["ppl_increase"] == mlp["two-pass", 0.3]["ppl_increase"] == 0
    assert mlp["oracle", 0.1]["ppl_increase"] < 0.1 < mlp["static", 0.3]["ppl_increase"]
    assert heads["oracle"]["ppl_increase"] < heads["random"]["ppl_increase"]
    assert mlp["oracle", 0.3]["density"] == pytest.approx(result["union"]["1"])
    shares = list(result["union"].values())
    assert shares == sorted(shares) and shares[0] < 0.2
    assert [done for done, _ in told] == sorted(done for done, _ in told) and told[-1][0] == told[-1][1]


def studied(tp, directory):
    engine = engine_of(directory, tp)
    return study(engine, corpus_of(windows_of(5, 16)), optional=True)


@pytest.mark.parametrize("kind", ["pre-norm", "post-norm with projections"])
def test_ranks_find_the_same(kind, tmp_path):
    directory = make_model(tmp_path, **KINDS[kind])
    (alone,) = run_ranks(1, studied, directory)
    first, second = run_ranks(2, studied, directory)
    assert first == second
    assert first["model"] == alone["model"] and first["union"] == pytest.approx(alone["union"])
    assert first["dense_ppl"] == pytest.approx(alone["dense_ppl"], rel=1e-5)
    for ours, theirs in zip(study_rows(alone), study_rows(first), strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            assert theirs[key] == (
                pytest.approx(value, rel=1e-3, abs=1e-3) if isinstance(value, float) else value
            ), (ours, key)


@pytest.mark.parametrize(("n", "layers", "optional"), [(5, 2, True), (1, 1, False)])
def test_a_study_is_plain_json_rows_tables_and_a_page(n, layers, optional, tmp_path):
    engine = engine_of(make_model(tmp_path, num_hidden_layers=layers))
    result = study(engine, corpus_of(windows_of(n, 12)), optional=optional)
    result = json.loads(json.dumps(result, allow_nan=False))
    rows = study_rows(result)
    assert [row["layer"] for row in rows[:layers]] == list(range(layers))
    assert rows[0]["union_1"] == rows[0]["live_mean"] == result["layers"][0]["live_mean"]
    assert len(rows) == layers + sum(len(result[k]) for k in ("mlp", "heads", "optional"))
    write_record(tmp_path, "study", rows)
    tables = study_tables(result)
    assert [table.row_count for table in tables] == [layers, 7, 3, *([layers + 1] if optional else [])]
    study_page(result, tmp_path / "page.png")
    data = (tmp_path / "page.png").read_bytes()
    assert data.startswith(b"\x89PNG") and struct.unpack(">I", data[16:20]) == (1600,)
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("length", [2, 300])
def test_windows_that_do_not_fit_are_refused(length, tmp_path):
    engine = engine_of(make_model(tmp_path))
    with pytest.raises(ValueError, match=f"windows of {length} tokens: expected 3 to the model's 256"):
        study(engine, corpus_of(windows_of(2, length)))
