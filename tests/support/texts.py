"""What the embedded model says on GPUs, however it is run."""

import torch

from dejavu.parallel.groups import TPGroup
from dejavu.runtime.engine import Engine
from dejavu.runtime.sampling import SamplingParams
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
