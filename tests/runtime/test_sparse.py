"""Sparse decoding against dense decoding and against masks: what DESIGN calls invariants 2, 3 and 5."""

import pytest
import torch

from dejavu.parallel.groups import TPGroup
from dejavu.predictors.networks import LowRank, Random, Static, fold_norm, low_rank_of
from dejavu.predictors.selection import Chosen, HeadMean, Masked, Policy, Selector, Tap, Unit
from dejavu.profiles import quality
from dejavu.runtime.cache import WINDOW
from dejavu.runtime.config import OPTConfig
from dejavu.runtime.engine import Drift, Engine
from dejavu.runtime.opt import OPTModel
from dejavu.runtime.sampling import SamplingParams
from dejavu.runtime.sparsity import contribution, load_policy
from dejavu.runtime.weights import Checkpoint
from models import KINDS, load_reference, make_model
from ranks import run_ranks

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS_HERE = ["pre-norm", "post-norm with projections", "no bias, no affine"]
VOCABULARY = 128
LENGTHS = (5, 23, 1)  # of the prompts
STEPS = 330
GAPS = (1, WINDOW - 1, WINDOW, WINDOW + 1)
PROMPTS = ["It was a dark night", "Once", "The old man looked at the sea"]


@pytest.fixture(scope="module", params=KINDS_HERE)
def model_dir(request, tmp_path_factory):
    """A model of each kind, with as many heads as flushes are spread over."""
    return make_wide_model(tmp_path_factory.mktemp("model"), request.param)


@pytest.fixture(scope="module", params=KINDS_HERE[:2])
def long_dir(request, tmp_path_factory):
    """The same, of the kinds that long runs are tried on."""
    return make_wide_model(tmp_path_factory.mktemp("model"), request.param)


def make_wide_model(folder, kind):
    sizes = {"hidden_size": 64, "word_embed_proj_dim": 64, "num_attention_heads": 16}
    return make_model(
        folder, **{"vocab_size": VOCABULARY, "max_position_embeddings": 512} | sizes | KINDS[kind]
    )


@pytest.fixture(scope="module")
def talking_dir(tmp_path_factory):
    """A model that its tokenizer fits."""
    return make_model(tmp_path_factory.mktemp("model"), num_hidden_layers=3)


def load(directory, tp, dtype=torch.float64):
    config = OPTConfig.from_json(directory / "config.json")
    model = OPTModel(config, tp=tp, dtype=torch.float32)
    model.load(Checkpoint(directory))
    model.to(dtype)
    model.dtype = dtype
    return model


def engine_of(model, policy=None, fill_kv="lazy"):
    return Engine(model, None, model.tp, "no fingerprint", policy, fill_kv)


def token_ids(batch, length):
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(batch))


@torch.inference_mode()
def decode(engine, ids, lengths, steps, probe_every=0):
    """Logits ``[B, steps, V]`` of given tokens, after prompts that are the first ``lengths`` of them; and the
    dense steps' before them."""
    params = [SamplingParams(max_new_tokens=steps + 1, ignore_eos=True)] * len(lengths)
    state = engine.prefill([row[:n].tolist() for row, n in zip(ids, lengths, strict=True)], params)
    logits, dense = [], []
    for i in range(steps):
        state.tokens.copy_(torch.stack([row[n + i] for row, n in zip(ids, lengths, strict=True)]))
        if probe_every and i % probe_every == 0:
            dense.append(engine.dense_step(state))
        logits.append(engine.decode_step(state))
    return torch.stack(logits, dim=1), torch.stack(dense, dim=1) if dense else None


def decoded(logits, lengths, steps):
    """Of a whole pass's logits ``[B, T, V]`` those that `decode` gives."""
    return torch.stack([row[n : n + steps] for row, n in zip(logits, lengths, strict=True)])


def assert_same(found, expected, atol=1e-5):
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)


def everything(model):
    """A policy that chooses all that there is."""
    units = [
        Unit(kind, layer, None, Static(torch.ones(n)))
        for kind, n in (
            ("mlp", model.tp.divide(model.config.ffn_dim)),
            ("heads", model.tp.divide(model.config.num_heads)),
        )
        for layer in model.layer_range
    ]
    return Policy(units, model.config.num_layers)


def dense_everything_lossless(tp, directory, dtype):
    model = load(directory, tp, dtype)
    ids = token_ids(3, 23 + 16)
    policies = [None, everything(model), load_policy("lossless", model, "")]
    logits = [decode(engine_of(model, policy), ids, LENGTHS, 16)[0] for policy in policies]
    density = [[float(policy.density(kind)) for kind in ("mlp", "heads")] for policy in policies[1:]]
    return logits, density


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_everything_and_lossless_are_dense(model_dir, ranks):
    for logits, density in run_ranks(ranks, dense_everything_lossless, model_dir, torch.float32):
        dense, chosen, lossless = logits
        assert dense.std() > 0.1
        assert_same(chosen, dense, atol=1e-4)
        assert_same(lossless, dense, atol=1e-4)
        assert density[0] == [1, 1]
        assert 0.2 < density[1][0] < 0.95 and density[1][1] == 1


def test_dense_has_no_policy_and_no_density(model_dir):
    model = load(model_dir, TPGroup())
    assert load_policy("dense", model, "") is None
    for spec in ("dense", "lossless"):
        with pytest.raises(ValueError, match=f"density=0.5 belongs to predictors; {spec} has none"):
            load_policy(spec, model, "", density=0.5)


def scripted_masks(config, lengths, total):
    """Which heads and neurons each position has: ``[L, B, T, N]`` and ``[L, B, T, F]``; all in a prompt.

    Most heads come back after each of `GAPS` in turn; one never comes, one always, one at random.
    """
    g = torch.Generator().manual_seed(3)
    L, B, N = config.num_layers, len(lengths), config.num_heads
    heads = torch.zeros(L, B, total, N, dtype=torch.bool)
    neurons = torch.rand(L, B, total, config.ffn_dim, generator=g) < 0.4
    for layer, b, n in torch.cartesian_prod(*map(torch.arange, (L, B, N))).tolist():
        at, gap = lengths[b] + (7 * layer + 5 * n + 3 * b) % 13, n + b
        while at < total:
            heads[layer, b, at, n] = True
            at, gap = at + GAPS[gap % 4], gap + 1
    heads[..., 1], heads[..., 2] = False, True
    heads[..., 3] = torch.rand(L, B, total, generator=g) < 0.3
    for b, n in enumerate(lengths):
        heads[:, b, :n] = neurons[:, b, :n] = True
    return heads, neurons


def test_the_script_has_every_gap(long_dir):
    config = OPTConfig.from_json(long_dir / "config.json")
    heads, _ = scripted_masks(config, LENGTHS, max(LENGTHS) + STEPS)
    for n in (0, 4, 5, 15):
        times = heads[1, 0, LENGTHS[0] :, n].nonzero()[:, 0]
        assert set(times.diff().tolist()) == set(GAPS)
    assert STEPS > 300 and STEPS // WINDOW > 4


class Scripted(Selector):
    """Sets that are given by layer, sequence and position; a rank takes its share of them."""

    def __init__(self, tp, masks, means=None):
        heads, neurons = masks
        self.head_masks = heads[..., tp.shard(heads.shape[-1])]
        self.neuron_masks = neurons[..., tp.shard(neurons.shape[-1])]
        self.means = means

    def begin(self, positions, alive):
        self.positions = positions

    def heads(self, layer, truth):
        return self.choice(self.head_masks[layer], None if self.means is None else self.means[layer])

    def neurons(self, layer, truth):
        return self.choice(self.neuron_masks[layer], None)

    def choice(self, mask, mean):
        mask = mask[torch.arange(len(self.positions))[:, None], self.positions]
        return Chosen.from_mask(mask[:, 0], mean) if mask.shape[1] == 1 else Masked(mask, mean)

    def chooses(self, kind):
        return True


def mean_outputs(config):
    """Something to stand in for the heads left out: ``[L, N, H]``."""
    shape = (config.num_layers, config.num_heads, config.head_dim)
    return torch.randn(shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def head_means(model):
    """This rank's `HeadMean` of every layer."""
    means = mean_outputs(model.config)[:, model.tp.shard(model.config.num_heads)].to(model.dtype)
    weights = [layer.self_attn.out_proj.weight.value for layer in model.layers]
    return [HeadMean(m, m.flatten() @ w) for m, w in zip(means, weights, strict=True)]


@torch.inference_mode()
def masked_reference(directory, ids, masks, means=None):
    """Hugging Face's model in one pass, in float64: every key and value is there, and what is not chosen is
    taken out behind them. Logits ``[B, T, V]``."""
    model = load_reference(directory, torch.float64)
    head_dim = model.config.hidden_size // model.config.num_attention_heads
    for i, (layer, heads, neurons) in enumerate(zip(model.model.decoder.layers, *masks, strict=True)):
        by_channel = heads.repeat_interleave(head_dim, dim=-1)
        mean = torch.zeros(()) if means is None else means[i].flatten()

        def without_heads(module, args, mask=by_channel, mean=mean):
            return (torch.where(mask, args[0], mean),)

        def without_neurons(module, args, mask=neurons):
            return (args[0] * mask.view(args[0].shape),)

        layer.self_attn.out_proj.register_forward_pre_hook(without_heads)
        layer.fc2.register_forward_pre_hook(without_neurons)
    return model(ids).logits.float()


def scripted_run(tp, directory, ids, lengths, masks, with_means, dtype):
    """Logits of decoding lazily, and of one whole pass."""
    model = load(directory, tp, dtype)
    selector = Scripted(tp, masks, head_means(model) if with_means else None)
    return decode(engine_of(model, selector), ids, lengths, STEPS)[0], quality.whole_pass(
        engine_of(model), ids, selector
    )


@pytest.mark.parametrize(
    "batch, ranks, with_means, dtype",
    [
        (1, 1, False, torch.float64),
        (3, 1, True, torch.float64),
        (3, 2, True, torch.float64),
        (3, 2, False, torch.float32),
    ],
)
def test_heads_come_and_go_as_in_a_masked_pass(long_dir, batch, ranks, with_means, dtype):
    lengths, total = LENGTHS[:batch], max(LENGTHS[:batch]) + STEPS
    config = OPTConfig.from_json(long_dir / "config.json")
    ids, masks = token_ids(batch, total), scripted_masks(config, lengths, total)
    expected = masked_reference(long_dir, ids, masks, mean_outputs(config) if with_means else None)
    atol = 1e-4 if dtype == torch.float32 else 1e-5
    for logits, whole in run_ranks(ranks, scripted_run, long_dir, ids, lengths, masks, with_means, dtype):
        assert_same(whole, expected, atol)
        assert_same(logits, decoded(expected, lengths, STEPS), atol)
    dense = masked_reference(long_dir, ids, [torch.ones_like(m) for m in masks])
    assert (dense - expected).abs().mean() > 1e-2


def test_filling_later_and_at_once_agree(long_dir):
    model = load(long_dir, TPGroup())
    ids = token_ids(3, 23 + STEPS)
    selector = Scripted(model.tp, scripted_masks(model.config, LENGTHS, 23 + STEPS), head_means(model))
    late, early = (
        decode(engine_of(model, selector, fill_kv), ids, LENGTHS, STEPS)[0] for fill_kv in ("lazy", "always")
    )
    assert_same(late, early)
    assert model.empty_cache(1, 8, lazy=True).inputs.shape == (2, 1, WINDOW, 64)
    assert model.empty_cache(1, 8).filled_to is None


def test_filling_later_is_put_off(long_dir):
    model = load(long_dir, TPGroup())
    policy = Policy([Unit("heads", 1, None, Static(torch.zeros(16)), threshold=0.5)], 2)
    params = [SamplingParams(max_new_tokens=20, ignore_eos=True)]
    state = engine_of(model, policy).prefill([[3, 4, 5]], params)
    for _ in range(10):
        engine_of(model, policy).decode_step(state)
    assert (state.cache.filled_to[0] == 13).all()  # dense
    assert (state.cache.filled_to[1] == 3).all()
    assert (state.cache.keys[1, :, :, 3:] == 0).all()


def test_probes_leave_the_run_as_it_is(long_dir):
    model = load(long_dir, TPGroup())
    steps = WINDOW + 40
    ids, masks = token_ids(3, 23 + steps), scripted_masks(model.config, LENGTHS, 23 + steps)
    engine = engine_of(model, Scripted(model.tp, masks))
    without, _ = decode(engine, ids, LENGTHS, steps)
    probed, dense = decode(engine, ids, LENGTHS, steps, probe_every=1)
    assert_same(probed, without)
    for i in (0, 3, steps - 1):
        all_of_one = [m.clone() for m in masks]
        for b, n in enumerate(LENGTHS):
            for mask in all_of_one:
                mask[:, b, n + i] = True
        expected = decoded(masked_reference(long_dir, ids, all_of_one), LENGTHS, steps)
        assert_same(dense[:, i], expected[:, i])
        assert (dense[:, i] - without[:, i]).abs().mean() > 1e-2


def random_policy(model, density):
    """Heads and neurons by lot."""
    sizes = {"mlp": model.config.ffn_dim, "heads": model.config.num_heads}
    units = []
    for kind, n in sizes.items():
        rows = model.tp.shard(n)
        for layer in model.layer_range:
            scorer = Random(torch.arange(rows.start, rows.stop), layer=layer, seed=kind == "mlp")
            units.append(Unit(kind, layer, None, scorer, threshold=1 - density))
    return Policy(units, model.config.num_layers, name="random")


def generate(tp, directory, sparsity, params, verify_every=0):
    engine = Engine.from_pretrained(
        str(directory), tp=tp, sparsity="dense" if sparsity == "random" else sparsity
    )
    if sparsity == "random":
        engine.policy = random_policy(engine.model, 0.3)
    return engine.generate(PROMPTS, params, verify_every=verify_every)


@pytest.mark.parametrize("ranks", [1, 2])
def test_drift_is_nothing_where_nothing_is_lost(talking_dir, ranks):
    params = SamplingParams(max_new_tokens=30, ignore_eos=True)
    (dense,) = run_ranks(1, generate, talking_dir, "dense", params)
    for found in run_ranks(ranks, generate, talking_dir, "lossless", params, 1):
        assert found.results == dense.results and (found.policy, dense.policy) == ("lossless", "dense")
        assert found.drift["checks"] == 29 and found.drift["top1_agreement"] == 1
        assert abs(found.drift["kl"]) < 1e-5
        assert 0.2 < found.density["mlp"] < 0.95 and found.density["heads"] == 1
        assert found.weight_bytes > 0
    assert dense.drift is None and dense.density == {"mlp": 1, "heads": 1}


def test_drift_is_large_where_most_is_left_out(talking_dir):
    params = SamplingParams(max_new_tokens=30, ignore_eos=True)
    checked = generate(TPGroup(), talking_dir, "random", params, verify_every=4)
    plain = generate(TPGroup(), talking_dir, "random", params)
    assert checked.results == plain.results and plain.drift is None
    assert checked.drift["checks"] == 8  # steps 0, 4, ..., 28
    assert checked.drift["kl"] > 0.1 and 0 <= checked.drift["top1_agreement"] < 0.9
    assert checked.density == plain.density
    assert checked.density["heads"] == pytest.approx(0.3, abs=0.05)
    assert checked.density["mlp"] == pytest.approx(1 - 0.7**3, abs=0.05)  # a union of three


def test_drift_is_a_mean_over_live_sequences():
    sparse, dense = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    drift = Drift()
    assert drift.report() is None
    drift.add(sparse, dense, torch.tensor([1, 0, 1]))
    drift.add(dense, dense, torch.tensor([0, 1, 0]))
    p, q = dense.softmax(-1), sparse.softmax(-1)
    kl = (p * (p / q).log()).sum(-1)
    same = (p.argmax(-1) == q.argmax(-1)).float()
    report = drift.report()
    assert report["checks"] == 2
    assert report["kl"] == pytest.approx(float(kl[0] + kl[2]) / 3, rel=1e-5)
    assert report["top1_agreement"] == pytest.approx(float(same[0] + same[2] + 1) / 3)


@pytest.mark.parametrize("sparsity, every", [("dense", 1), ("lossless", -1)])
def test_what_cannot_be_verified(talking_dir, sparsity, every):
    with pytest.raises(ValueError, match=f"verify_every={every}: expected 0 or more, and a sparse policy"):
        generate(TPGroup(), talking_dir, sparsity, SamplingParams(), verify_every=every)


class Recorder(Policy):
    """Keeps every set, and the scores that it was chosen by."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.steps = []

    def begin(self, positions, alive):
        super().begin(positions, alive)
        self.steps.append({"positions": positions[:, 0].clone(), "alive": alive.bool()})

    def count(self, unit, mask, truth):
        super().count(unit, mask, truth)
        self.steps[-1][unit.kind, unit.layer] = mask.clone()

    def _mask(self, unit, truth):
        mask = super()._mask(unit, truth)
        self.steps[-1]["wanted", unit.kind, unit.layer] = mask[:, 0].clone()
        return mask


def svd_units(model, whole):
    """Neurons by a low-rank fc1 half a layer ahead, heads by a random net; each rank has its rows."""
    wide, pre_norm = torch.promote_types(model.dtype, torch.float32), model.config.do_layer_norm_before
    here = model.tp.shard(model.config.ffn_dim)
    units = []
    for i, layer in enumerate(whole.layers):
        norm = layer.final_layer_norm if pre_norm else layer.self_attn_layer_norm
        fc1 = layer.mlp.fc1
        weight, bias = fold_norm(fc1.weight.value, fc1.bias, norm.weight, norm.bias, pre_norm=pre_norm)
        down, up = low_rank_of(weight.to(wide), 8)
        units.append(Unit("mlp", i, Tap("attn_in", i), LowRank(down, up[here], bias[here].to(wide))))
        if i:
            units.append(Unit("heads", i, Tap("mlp_in", i - 1), random_head_scorer(model, i)))
    return units


def random_head_scorer(model, layer):
    g, D, N = torch.Generator().manual_seed(layer), model.config.hidden_size, model.config.num_heads
    down, up, bias = (torch.randn(s, generator=g, dtype=torch.float64) for s in ((N, D), (N, N), (N,)))
    here = model.tp.shard(N)
    return LowRank(down, up[here], bias[here], relu=True).to(torch.promote_types(model.dtype, torch.float32))


def oracle_units(model, whole, *, with_means=False):
    """The half of the heads and the third of the neurons that matter most, more or less."""
    units = contribution_units(model, with_means)
    look = Quantiles(contribution_units(whole, with_means), {"mlp": 0.7, "heads": 0.5})
    quality.whole_pass(engine_of(whole), token_ids(2, 40), look)
    for unit in units:
        unit.threshold = look.found[unit.kind, unit.layer]
    return units


def contribution_units(model, with_means):
    means = head_means(model) if with_means else [None] * len(model.layers)
    return [
        Unit(
            kind,
            layer,
            None,
            contribution(model, kind, layer, None if mean is None else mean.output),
            sees_truth=True,
            mean=mean if kind == "heads" else None,
        )
        for layer, mean in zip(model.layer_range, means, strict=True)
        for kind in ("mlp", "heads")
    ]


class Quantiles(Selector):
    """Chooses everything, and notes a quantile of each unit's scores."""

    def __init__(self, units, shares):
        self.scorers = {(unit.kind, unit.layer): unit.scorer for unit in units}
        self.shares = shares
        self.found = {}

    def heads(self, layer, truth):
        return self.look("heads", layer, truth)

    def neurons(self, layer, truth):
        return self.look("mlp", layer, truth)

    def look(self, kind, layer, truth):
        self.found[kind, layer] = float(self.scorers[kind, layer](truth()).quantile(self.shares[kind]))


def record(engine, new_tokens, sharing="union"):
    """Generates with live ends, and returns the results and the recorded steps."""
    engine.policy = Recorder(
        svd_units(engine.model, engine.model), engine.model.config.num_layers, sharing=sharing
    )
    params = [SamplingParams(max_new_tokens=n, ignore_eos=True) for n in new_tokens]
    generation = engine.generate(PROMPTS[: len(new_tokens)], params)
    return generation, engine.policy.steps


@pytest.fixture(scope="module")
def talker(talking_dir):
    engine = Engine.from_pretrained(str(talking_dir), device="cpu")
    engine.model.double()
    engine.model.dtype = torch.float64
    return engine


def test_neurons_are_a_union_and_heads_are_not(talker):
    _, steps = record(talker, (20, 6, 20))
    assert len(steps) == 19
    for i, step in enumerate(steps):
        assert step["alive"].tolist() == [True, i < 5, True]
        advanced = step["positions"] - steps[0]["positions"]
        assert advanced.tolist() == [i, min(i, 5), i]  # a finished sequence stays where it is
        for kind, layer in (k for k in step if len(k) == 2):
            wanted = step["wanted", kind, layer] & step["alive"][:, None]
            expected = wanted.any(0) if kind == "mlp" else wanted
            assert torch.equal(step[kind, layer], expected)
    heads = torch.stack([step["heads", 1] for step in steps])
    assert not heads[5:, 1].any() and heads[:5, 1].any() and heads[:, 0].any()
    assert (heads[:5, 0] != heads[:5, 1]).any()


def test_a_sequence_with_its_own_sets_does_not_notice_its_companions(talker):
    generation, steps = record(talker, (25, 6, 25), sharing="each")
    alone, own_steps = record(talker, (25,), sharing="each")
    assert generation.results[0] == alone.results[0]
    for step, own in zip(steps, own_steps, strict=True):
        for key in (k for k in own if len(k) == 2):
            assert torch.equal(step[key][:1], own[key])
    assert [len(r.token_ids) for r in generation.results] == [25, 6, 25]


def test_a_finished_sequence_takes_nothing_along(talker):
    """After the end of one, the others go on as if there were only two, which then share their sets."""
    _, steps = record(talker, (20, 1, 20))
    prompts = [talker.tokenize(p, SamplingParams()) for p in PROMPTS]
    pair = [prompts[0], prompts[2]]
    policy = Recorder(svd_units(talker.model, talker.model), talker.model.config.num_layers)
    talker.policy = policy
    state = talker.prefill(pair, [SamplingParams(max_new_tokens=20, ignore_eos=True)] * 2)
    for _ in range(19):
        talker.decode_step(state)
    for step, own in zip(steps, policy.steps, strict=True):
        for key in (k for k in own if len(k) == 2):
            found = step[key] if key[0] == "mlp" else step[key][[0, 2]]
            assert torch.equal(found, own[key])
            assert key[0] == "mlp" or not step[key][1].any()


def sets_of_a_run(tp, directory, units):
    model = load(directory, tp)
    policy = Recorder(units(model, load(directory, TPGroup())), model.config.num_layers)
    logits, _ = decode(engine_of(model, policy), token_ids(3, 73), LENGTHS, 40)
    sets = [{key: step[key] for key in step if len(key) == 2} for step in policy.steps]
    return logits, sets, [float(policy.density(kind)) for kind in ("mlp", "heads")]


@pytest.mark.parametrize("units", [svd_units, oracle_units])
def test_any_number_of_ranks_chooses_the_same_sets(tmp_path, units):
    directory = make_model(tmp_path, vocab_size=VOCABULARY, ffn_dim=96)
    ((logits, sets, density),) = run_ranks(1, sets_of_a_run, directory, units)
    assert all(0.1 < d < 0.9 for d in density)
    for ranks in (2, 4):
        shares = run_ranks(ranks, sets_of_a_run, directory, units)
        for i, whole in enumerate(sets):
            for key, mask in whole.items():
                assert torch.equal(torch.cat([share[1][i][key] for share in shares], dim=-1), mask)
        for kind, d in enumerate(density):
            assert sum(share[2][kind] for share in shares) / ranks == pytest.approx(d, rel=1e-5)
        for share in shares:
            assert_same(share[0], logits)


@pytest.mark.parametrize("prefix", [1, 20])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", KINDS_HERE[:2])
@pytest.mark.parametrize(
    "units, with_means", [(oracle_units, False), (oracle_units, True), (svd_units, None)]
)
def test_whole_passes_and_decoding_agree(tmp_path, prefix, dtype, kind, units, with_means):
    model = load(make_model(tmp_path, **{"vocab_size": VOCABULARY} | KINDS[kind]), TPGroup(), dtype)
    chosen = units(model, model) if with_means is None else units(model, model, with_means=with_means)
    policies = [
        Policy(chosen, 2, sharing="mask", dense_until=prefix),
        Policy(chosen, 2, sharing="each"),
    ]
    windows = token_ids(4, 71)
    (whole,) = quality.masked(engine_of(model), windows, [policies[0]], prefix=prefix)
    dense, sparse = quality.decode(engine_of(model), windows, [None, policies[1]], prefix=prefix)
    tolerance = 1e-6 if dtype == torch.float64 else 1e-4
    assert whole.loss.shape == sparse.loss.shape == (4, 70 - prefix)
    assert float(whole.loss.mean()) == pytest.approx(float(sparse.loss.mean()), rel=tolerance)
    assert float(whole.kl.mean()) == pytest.approx(float(sparse.kl.mean()), rel=max(tolerance, 1e-5))
    assert float(sparse.kl.mean()) > 1e-3 and float(dense.kl.abs().max()) < 1e-4
    if dtype == torch.float64:
        assert_same(whole.loss, sparse.loss)
        assert torch.equal(whole.top1, sparse.top1)
        for kind_of in ("mlp", "heads"):
            shares = [float(policy.density(kind_of)) for policy in policies]
            assert shares[0] == pytest.approx(shares[1], rel=1e-5) and 0.1 < shares[0] < 0.9
