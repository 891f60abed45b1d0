"""The model's seams: layer ranges, active sets, several queries at once."""

import pytest
import torch

from dejavu.parallel.groups import TPGroup
from dejavu.predictors.selection import EVERYTHING, ActiveSet, Chosen, Fixed
from dejavu.runtime.config import OPTConfig
from dejavu.runtime.opt import OPTModel
from dejavu.runtime.weights import Checkpoint
from models import KINDS, make_model
from ranks import run_ranks

B, S, STEPS = 3, 7, 12


@pytest.fixture(scope="module", params=["pre-norm", "untied", "post-norm with projections"])
def model_dir(request, tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"), num_hidden_layers=3, **KINDS[request.param])


def load(directory, tp, layers=None):
    model = OPTModel(
        OPTConfig.from_json(directory / "config.json"), tp=tp, dtype=torch.float32, layers=layers
    )
    model.load(Checkpoint(directory))
    return model


def token_ids(n=S + STEPS, batch=B):
    return torch.randint(4096, (batch, n), generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def forced_logits(model, ids, selector=EVERYTHING, prompt=S, width=1):
    """Logits after every position from ``prompt - 1`` on, decoding ``width`` given tokens a step."""
    cache = model.empty_cache(len(ids), ids.shape[1])
    step = cache.prompt(prompt)
    logits = [model.logits(model(model.embed(ids[:, :prompt], step.positions), cache, step)[:, -1:])]
    cache.lengths.fill_(prompt)
    for t in range(prompt, ids.shape[1], width):
        step = cache.step(width)
        x = model(model.embed(ids[:, t : t + width], step.positions), cache, step, selector)
        cache.lengths.add_(width)
        logits.append(model.logits(x))
    return torch.cat(logits, dim=1)


def test_prefill_decode_and_several_queries_agree(model_dir):
    model = load(model_dir, TPGroup())
    one_by_one = forced_logits(model, token_ids())
    by_threes = forced_logits(model, token_ids(), width=3)
    later = forced_logits(model, token_ids(), prompt=S + 5)
    torch.testing.assert_close(by_threes, one_by_one, atol=1e-4, rtol=0)
    torch.testing.assert_close(later, one_by_one[:, 5:], atol=1e-4, rtol=0)


@torch.inference_mode()
def test_stages_in_a_row_are_the_whole_model(model_dir):
    tp = TPGroup()
    ids = token_ids()
    whole = load(model_dir, tp)
    stages = [load(model_dir, tp, layers) for layers in (range(0, 1), range(1, 2), range(2, 3))]
    cache = whole.empty_cache(B, S + STEPS)
    step = cache.prompt(S)
    expected = whole.logits(whole(whole.embed(ids[:, :S], step.positions), cache, step))
    residual = stages[0].embed(ids[:, :S], step.positions)
    for stage in stages:
        residual = stage(residual, stage.empty_cache(B, S + STEPS), step)
    torch.testing.assert_close(stages[-1].logits(residual), expected, atol=0, rtol=0)
    sizes = [sum(p.numel() for p in stage.parameters()) for stage in stages]
    assert sizes[1] < min(sizes[0], sizes[2])  # the middle holds neither table nor head


def everything(model):
    neurons, heads = model.layers[0].mlp.fc1.weight.data.shape[0], model.config.num_heads // model.tp.size
    return [
        ActiveSet(
            neurons=Chosen.from_mask(torch.ones(neurons, dtype=torch.bool)),
            heads=Chosen.from_mask(torch.ones(B, heads, dtype=torch.bool)),
        )
        for _ in model.layers
    ]


def dense_and_everything(tp, directory):
    model = load(directory, tp)
    return forced_logits(model, token_ids()), forced_logits(model, token_ids(), Fixed(everything(model)))


@pytest.mark.parametrize("ranks", [1, 2])
def test_everything_chosen_is_dense(model_dir, ranks):
    for dense, chosen in run_ranks(ranks, dense_and_everything, model_dir):
        torch.testing.assert_close(chosen, dense, atol=1e-4, rtol=0)


def global_masks(config):
    generator = torch.Generator().manual_seed(2)
    neurons = torch.rand(config.num_layers, config.ffn_dim, generator=generator) < 0.4
    heads = torch.rand(config.num_layers, B, config.num_heads, generator=generator) < 0.6
    heads[0, 0] = False  # a sequence that chooses no head
    neurons[1] = False  # a layer that chooses no neuron
    return neurons, heads


def chosen_logits(tp, directory):
    model = load(directory, tp)
    neurons, heads = global_masks(model.config)
    active = [
        ActiveSet(
            neurons=Chosen.from_mask(n[tp.shard(model.config.ffn_dim)]),
            heads=Chosen.from_mask(h[:, tp.shard(model.config.num_heads)]),
        )
        for n, h in zip(neurons, heads, strict=True)
    ]
    return forced_logits(model, token_ids(), Fixed(active))


def masked_logits(directory):
    """The same selection by zeros: what is not chosen is computed and then multiplied away."""
    model = load(directory, TPGroup())
    neurons, heads = global_masks(model.config)
    for layer, n, h in zip(model.layers, neurons, heads, strict=True):
        fc2, out_proj = layer.mlp.fc2.forward, layer.self_attn.out_proj.forward
        by_channel = h.repeat_interleave(model.config.head_dim, dim=-1)[:, None]

        def masked_fc2(x, out=None, f=fc2, n=n):
            return f(x * n if x.shape[1] == 1 else x, out)

        def masked_out_proj(x, out=None, f=out_proj, h=by_channel):
            return f(x * h if x.shape[1] == 1 else x, out)

        layer.mlp.fc2.forward, layer.self_attn.out_proj.forward = masked_fc2, masked_out_proj
    return forced_logits(model, token_ids())


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_an_active_set_is_a_mask(model_dir, ranks):
    expected = masked_logits(model_dir)
    for found in run_ranks(ranks, chosen_logits, model_dir):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
        assert not torch.allclose(found, forced_logits(load(model_dir, TPGroup()), token_ids()), atol=1e-2)


def test_more_ranks_than_fit_are_refused(model_dir):
    for size in (3, 8):
        with pytest.raises(ValueError, match=f"cannot be split over {size} ranks; 1, 2, 4 would work"):
            load(model_dir, TPGroup(size=size))


def test_a_scale_belongs_to_its_weight(model_dir):
    model, scaled = load(model_dir, TPGroup()), load(model_dir, TPGroup())
    for layer in scaled.layers:
        for weight in (layer.mlp.fc1.weight, layer.mlp.fc2.weight, layer.self_attn.qkv_proj.weight):
            per_row = torch.rand(*weight.data.shape[:-1], 1) + 0.5
            weight.scale = torch.nn.Parameter(per_row, requires_grad=False)
            weight.data.div_(per_row)
    expected = forced_logits(model, token_ids())
    torch.testing.assert_close(forced_logits(scaled, token_ids()), expected, atol=1e-4, rtol=0)
