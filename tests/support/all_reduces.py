"""What each rank does on its GPU to try every route; here, for ranks are started from modules."""

import random

import torch

from dejavu.parallel.collectives import all_reduce, reduce_residual_norm
from dejavu.parallel.layers import LayerNorm
from dejavu.parallel.routes import candidates, only, reserve

SIZES = (8, 1000, 12288, 12289, 49152, 786432)
RUNS, REPLAYS = 20, 50


def random_parts(tp, *shape, dtype, seed):
    """Every rank's tensor, on every rank."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(tp.size, *shape, generator=g).to(dtype)


@torch.inference_mode()
def sums(tp, dtype):
    """``{(route, numel): the sum}``, the same in every run."""
    reserve(tp, dtype, "symm")
    found = {}
    for numel in SIZES:
        mine = random_parts(tp, numel, dtype=dtype, seed=numel)[tp.rank].to(tp.device)
        for route in candidates("sum", dtype):
            tp.routes[dtype].table = only(route)
            runs = [all_reduce(tp.buffer((numel,), dtype).copy_(mine), tp).clone() for _ in range(RUNS)]
            assert all(torch.equal(run, runs[0]) for run in runs), f"{route} {numel}"
            found[route, numel] = runs[0].cpu()
    return found


@torch.inference_mode()
def boundaries(tp, dtype, route):
    """The worst error, relative to the largest number, of blocks in a graph that is replayed with new
    payloads while now one rank is late and now the other; and the last streams."""
    reserve(tp, dtype, "symm")
    tp.routes[dtype].table = only(route)
    shapes = [
        (1, 1, 1024),
        (3, 1, 1024),
        (3, 1, 512),
        (1, 1, 12288),
        (16, 1, 1024),
        (5, 1, 512),
        (64, 1, 4096),
    ]
    norms = [LayerNorm(shape[-1]).to(tp.device, dtype) for shape in shapes]
    sources = [torch.zeros(shape, dtype=dtype, device=tp.device) for shape in shapes]
    extra_source = torch.zeros(40, dtype=dtype, device=tp.device)
    extra = torch.empty_like(extra_source)

    def blocks():
        results = []
        for source, norm in zip(sources, norms, strict=True):
            residual, bias = torch.ones_like(source), torch.ones_like(source[0, 0])
            partial = tp.buffer(source.shape, dtype).copy_(source)
            results.append(reduce_residual_norm(partial, residual, bias, norm, tp=tp))
        extra.copy_(extra_source)
        partial = tp.buffer(sources[0].shape, dtype).copy_(sources[0])
        results.append(reduce_residual_norm(partial, results[0][0], None, None, extra, tp=tp))
        return results

    blocks()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = blocks()
    worst = 0.0
    late = random.Random(tp.rank)
    for replay in range(REPLAYS):
        everything = [
            random_parts(tp, *s.shape, dtype=dtype, seed=100 * replay + i) for i, s in enumerate(sources)
        ]
        extras = random_parts(tp, 40, dtype=dtype, seed=100 * replay + 50)
        for source, parts in zip([*sources, extra_source], [*everything, extras], strict=True):
            source.copy_(parts[tp.rank])
        torch.cuda._sleep(late.randrange(2_000_000))
        graph.replay()
        if replay % 10 == 3:
            blocks()  # the same outside of the graph, in between
        for (total, normed), parts in zip(results, everything, strict=False):
            wanted = parts.double().sum(0) + 2
            y = torch.nn.functional.layer_norm(wanted, wanted.shape[-1:])
            worst = max(worst, *(_error(a, b) for a, b in ((total, wanted), (normed, y))))
        total = everything[0].double().sum(0) * 2 + 2
        worst = max(worst, _error(extra, extras.double().sum(0)), _error(results[-1][0], total))
    return worst, [t.cpu() for pair in results for t in pair]


def _error(found, wanted):
    return float((found.cpu().double() - wanted).abs().max() / wanted.abs().max())
