"""What the embedded model says on GPUs, however it is run."""

import torch

from dejavu.parallel.groups import TPGroup
from dejavu.predictors.networks import LowRank, PackedLowRank
from dejavu.predictors.selection import Policy, Tap, Unit
from dejavu.runtime.engine import Engine
from dejavu.runtime.sampling import SamplingParams
from dejavu.runtime.sparsity import rides
from parity import PROMPTS


def engine_of(sparsity="dense", tp=None, **options):
    tp = tp or TPGroup(device=torch.device("cuda", 0))
    return Engine.from_pretrained("demo", tp=tp, sparsity=sparsity, **options)


def texts(engine, prompts=PROMPTS, **params):
    generation = engine.generate(list(prompts), SamplingParams(**params))
    return [r.token_ids for r in generation.results], generation


def on_a_rank(tp, many):
    """200 greedy tokens of every prompt, in fp32, with each of ``many`` options; what every rank runs."""
    params = {"max_new_tokens": 200, "ignore_eos": True}
    return [texts(engine_of(tp=tp, dtype="fp32", **options), **params)[0] for options in many]


def ahead_on_a_rank(tp, prompts):
    """Random predictors of neurons, a layer ahead: with their first layers whole, and shared by the ranks."""
    engine = engine_of(tp=tp, dtype="bf16")
    config, rank, found = engine.model.config, 64, []
    for shared in (False, True):
        units = []
        for layer in range(1, config.num_layers):
            g = torch.Generator().manual_seed(layer)
            sizes = (rank, config.hidden_size), (config.ffn_dim, rank)
            down, up = (torch.randn(size, generator=g) / size[1] ** 0.5 for size in sizes)
            up = up[tp.shard(config.ffn_dim)].contiguous()
            scorer = PackedLowRank(LowRank(down, up, torch.zeros(len(up))), 8).to(tp.device)
            tap = Tap("mlp_in", layer - 1)
            assert rides(engine.model, "mlp", layer, tap, rank)
            scorer = scorer.split(tp.rank, tp.shares) if shared else scorer
            units.append(Unit("mlp", layer, tap, scorer, threshold=0.7))
        engine.policy = Policy(units, config.num_layers)
        for some in (prompts[:1], prompts, prompts):  # the last is a replay of the one before
            tokens, generation = texts(engine, some, max_new_tokens=100, ignore_eos=True)
            found.append((tokens, generation.density))
    return found
