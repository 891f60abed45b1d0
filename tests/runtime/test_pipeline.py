"""Pipeline stages give the tokens of one process, and each holds its own layers alone."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from dejavu.parallel import pipeline
from dejavu.parallel.groups import TPGroup
from dejavu.parallel.pipeline import init_pipeline
from dejavu.predictors.networks import LowRank
from dejavu.predictors.selection import Policy, Tap, Unit
from dejavu.runtime.config import OPTConfig, published_config
from dejavu.runtime.decoding import Decoder
from dejavu.runtime.engine import Engine
from dejavu.runtime.loading import split_layers
from dejavu.runtime.opt import OPTModel
from dejavu.runtime.sampling import SamplingParams
from dejavu.runtime.weights import Checkpoint
from models import KINDS, make_model
from ranks import run_ranks

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = ["It was a dark and stormy night, and the rain", "Once", "The old man looked at the sea."]
GREEDY = SamplingParams(max_new_tokens=25, ignore_eos=True)
DRAWN = SamplingParams(max_new_tokens=20, temperature=0.9, top_p=0.95, seed=3)
PARAMS = {"greedy": GREEDY, "drawn": DRAWN}


def generate(world, pp, model, sparsity="dense", params=GREEDY, verify_every=0):
    engine = Engine.from_pretrained(str(model), tp=world, pp=pp, sparsity=sparsity)
    return engine.generate(PROMPTS, params, max_batch=2, verify_every=verify_every)


@pytest.mark.parametrize(
    "pp, tp, sparsity, params",
    [
        (2, 2, "dense", "greedy"),
        (2, 2, "lossless", "greedy"),
        (2, 2, "demo", "greedy"),
        (2, 2, "demo", "drawn"),
        (2, 1, "dense", "drawn"),
        (2, 1, "lossless", "drawn"),
        (4, 1, "demo", "drawn"),
    ],
)
def test_stages_give_the_tokens_of_one_process(pp, tp, sparsity, params):
    verify_every = 0 if sparsity == "dense" else 7
    run = "demo", sparsity, PARAMS[params], verify_every
    expected = run_ranks(tp, generate, 1, *run)[0]
    if params == "greedy":  # what is drawn may hang on the rounding of sums over ranks
        assert expected.results == generate(TPGroup(), 1, *run).results
    for found in run_ranks(pp * tp, generate, pp, *run):
        assert found.results == expected.results
        assert (found.pp, found.tp) == (pp, tp)
        assert found.density == pytest.approx(expected.density, abs=1e-6)
        assert found.weight_bytes == pytest.approx(expected.weight_bytes, rel=1e-6)
        assert found.drift == (pytest.approx(expected.drift, abs=1e-6) if verify_every else None)
    assert sparsity != "demo" or (expected.density["mlp"] < 0.6 and expected.density["heads"] < 0.95)


@pytest.fixture(
    scope="module", params=["untied", "post-norm with projections", "no final norm, odd vocabulary"]
)
def model_dir(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    return make_model(folder, num_hidden_layers=3, **KINDS[request.param])


@pytest.mark.parametrize("pp, tp", [(3, 1), (2, 2)])
def test_models_of_every_kind(model_dir, pp, tp):
    expected = generate(TPGroup(), 1, model_dir)
    for found in run_ranks(pp * tp, generate, pp, model_dir):
        assert found.results == expected.results


def messages(world):
    """The ranges of a decode step in which a stage talks with others, in order."""
    engine = Engine.from_pretrained("demo", tp=world, pp=world.size, sparsity="demo")
    state = engine.prefill([engine.tokenize(prompt, GREEDY) for prompt in PROMPTS], [GREEDY] * 3)
    ranges = []

    def note(name, category="compute"):
        ranges.append((name, category))
        return nullcontext()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "nvtx_range", note)
        engine.decode_step(state)
    assert {category for _, category in ranges} == {"collective"}
    return [name for name, _ in ranges]


def test_a_step_passes_the_hidden_state_on_and_the_tokens_back():
    assert run_ranks(3, messages) == [
        ["send", "broadcast"],
        ["receive", "send", "broadcast"],
        ["receive", "broadcast"],
    ]


def load(directory, tp, layers=None):
    config = OPTConfig.from_json(directory / "config.json")
    model = OPTModel(config, tp=tp, dtype=torch.float32, layers=layers)
    model.load(Checkpoint(directory))
    return model


def far_sighted(model):
    """Predictors that read up to two layers before their block, half of whose choices are left out."""
    g, units = torch.Generator().manual_seed(5), []
    D = model.config.hidden_size
    for kind, n in (("mlp", model.config.ffn_dim), ("heads", model.config.num_heads)):
        for layer in range(model.config.num_layers):
            down, up = torch.randn(8, D, generator=g), torch.randn(n, 8, generator=g)
            block = Tap("mlp_in" if kind == "mlp" else "attn_in", layer)
            tap = block.shift(-min(block.halves, 4 if kind == "mlp" else 3))
            scorer = LowRank(down, up[model.tp.shard(n)], torch.zeros(n)[model.tp.shard(n)])
            if layer in model.layer_range:
                units.append(Unit(kind, layer, tap, scorer))
    return Policy(units, model.config.num_layers)


def decode_far_sighted(world, pp, directory):
    """Tokens and the taps that came and went, of a run with a dense step in between."""
    stages, tp = init_pipeline(world, pp)
    config = OPTConfig.from_json(directory / "config.json")
    model = load(directory, tp, split_layers(config, pp, tp)[stages.stage])
    policy = far_sighted(model)
    decoder = Decoder(model, tp, policy, pipeline=stages)
    state = decoder.prefill([[5, 6, 7], [8], [9, 10, 11, 12, 13]], [GREEDY] * 3)
    tokens = [state.tokens.tolist()]
    for i in range(30):
        if i == 3:
            decoder.dense_step(state)
        decoder.decode_step(state)
        tokens.append(state.tokens.tolist())
    return tokens, (list(map(str, policy.arriving)), list(map(str, policy.leaving))), decoder.density()


@pytest.fixture(scope="module")
def long_dir(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"), num_hidden_layers=4, vocab_size=128)


@pytest.mark.parametrize("pp, tp", [(4, 1), (2, 2)])
def test_predictors_read_taps_of_earlier_stages(long_dir, pp, tp):
    expected, _, density = decode_far_sighted(TPGroup(), 1, long_dir)
    assert 0.2 < density["mlp"] < 0.9 and 0.2 < density["heads"] < 0.9
    found = run_ranks(pp * tp, decode_far_sighted, pp, long_dir)
    for tokens, _, share in found:
        assert tokens == expected
        assert share == pytest.approx(density, abs=1e-5)
    travelled = [taps for _, taps, _ in found][::tp]
    assert [leaving for _, leaving in travelled[:-1]] == [arriving for arriving, _ in travelled[1:]]
    assert travelled[0][0] == travelled[-1][1] == []
    if pp == 4:  # a stage also passes on what only later ones read
        assert [arriving for arriving, _ in travelled[1:]] == [
            ["attn_in[0]", "mlp_in[0]"],
            ["mlp_in[0]", "mlp_in[1]"],
            ["mlp_in[1]"],
        ]


def test_layers_are_split_by_bytes():
    tiny = replace(published_config("opt-125m"), vocab_size=256, max_position_embeddings=8)
    tp = TPGroup()
    assert split_layers(tiny, 1, tp) == [range(12)]
    assert list(map(len, split_layers(tiny, 4, tp))) == [3, 3, 3, 3]
    assert list(map(len, split_layers(tiny, 5, tp))) == [2, 3, 3, 2, 2]
    # a table of opt-125m weighs as much as five and a half of its layers
    assert list(map(len, split_layers(published_config("opt-125m"), 3, tp))) == [2, 8, 2]
    assert list(map(len, split_layers(published_config("opt-125m"), 6, tp))) == [1, 3, 3, 2, 2, 1]
    assert list(map(len, split_layers(published_config("opt-175b"), 2, TPGroup(size=8)))) == [48, 48]
    for stages in (2, 5, 12):
        split = split_layers(tiny, stages, tp)
        assert [i for layers in split for i in layers] == list(range(12))
    with pytest.raises(ValueError, match="pp=13: the model's 12 layers cannot be split into 13 stages"):
        split_layers(tiny, 13, tp)


@pytest.mark.parametrize("stages", [2, 3, 5])
def test_no_other_split_has_a_smaller_largest_stage(stages):
    config = replace(published_config("opt-125m"), num_layers=7)
    tp = TPGroup()

    def largest(split):
        with torch.device("meta"):
            parts = [OPTModel(config, tp=tp, dtype=torch.float32, layers=layers) for layers in split]
        return max(sum(p.nbytes for p in part.parameters()) for part in parts)

    cuts = torch.combinations(torch.arange(1, 7), stages - 1).tolist()
    others = [[range(a, b) for a, b in zip([0, *c], [*c, 7], strict=True)] for c in cuts]
    assert largest(split_layers(config, stages, tp)) == min(map(largest, others))


def read_by_stage(world, pp, directory):
    """What a rank holds, and the bytes that it said it had read."""
    seen = []
    engine = Engine.from_pretrained(
        str(directory), tp=world, pp=pp, on_load=lambda done, total: seen.append((done, total))
    )
    held = sum(p.nbytes for p in engine.model.parameters())
    return {name for name, _ in engine.model.named_parameters()}, held, seen[-1]


def test_a_stage_reads_its_own_slices(model_dir):
    ((names, whole, _),) = run_ranks(1, read_by_stage, 1, model_dir)
    found = run_ranks(3, read_by_stage, 3, model_dir)
    for held_names, held, (done, total) in found:
        assert held == total == done < whole
        assert {int(n.split(".")[1]) for n in held_names if n.startswith("layers.")} == {0}
    first, middle, last = (n for n, _, _ in found)
    assert first | middle | last == {
        n for n in names if n.split(".")[:2] not in (["layers", "1"], ["layers", "2"])
    }
    assert "embed_positions.weight.data" in first - last
    assert not any(n.startswith(("embed", "project", "lm_head", "final")) for n in middle)


def failing(world, pp, sparsity, directory):
    with pytest.raises(ValueError) as e:
        Engine.from_pretrained(str(directory), tp=world, pp=pp, sparsity=sparsity)
    return str(e.value)


def test_mistakes_are_told_by_all_ranks(model_dir):
    for ranks, pp, sparsity, message in (
        (4, 4, "dense", "pp=4: the model's 3 layers cannot be split into 4 stages"),
        (3, 2, "dense", "pp=2: 3 rank(s) cannot be dealt into 2 stages; 1, 3 would work"),
        (2, 2, "demo", "is of another model"),
    ):
        for said in run_ranks(ranks, failing, pp, sparsity, model_dir):
            assert message in said


def failing_on_one_stage(world, directory):
    """The last rank's copy of the model is damaged."""
    if world.rank == world.size - 1:
        directory = directory / "nowhere"
        directory.mkdir()
    with pytest.raises(ValueError) as e:
        Engine.from_pretrained(str(directory), tp=world, pp=2)
    return str(e.value)


def test_no_stage_waits_for_one_that_failed(tmp_path):
    directory = make_model(tmp_path)
    for said in run_ranks(4, failing_on_one_stage, directory):
        assert said.startswith("rank 3: ") and "has no config.json" in said
