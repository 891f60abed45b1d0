"""The group, the collectives and the layers, each alone."""

import pytest
import torch
import torch.nn.functional as F

from dejavu.parallel.collectives import all_gather_last, all_reduce, reduce_residual_norm
from dejavu.parallel.groups import TPGroup, pick_device
from dejavu.parallel.layers import LayerNorm, RowParallelLinear, VocabParallelEmbedding
from ranks import run_ranks

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("n, size", [(8, 2), (7, 4), (5, 4), (1, 4)])
def test_shards_cover_everything_once(n, size):
    rows = [i for rank in range(size) for i in range(n)[TPGroup(rank=rank, size=size).shard(n)]]
    assert rows == list(range(n))


def test_the_buffer_stays_where_it_is():
    tp = TPGroup()
    decode = tp.buffer((3, 4), torch.float32)
    prefill = tp.buffer((2000, 3000), torch.float32)
    assert prefill.shape == (2000, 3000) and prefill.data_ptr() != decode.data_ptr()
    assert tp.buffer((30, 4), torch.float32).data_ptr() == decode.data_ptr()
    assert tp.buffer((2, 2), torch.float16).dtype == torch.float16


def agreeing(tp, failing, same):
    def action():
        if tp.rank in failing:
            raise ValueError("it is broken" if same else f"broken on {tp.rank}")
        return tp.rank

    if not failing:
        return tp.agree(action)
    with pytest.raises(ValueError) as e:
        tp.agree(action)
    return str(e.value)


def test_ranks_agree_on_an_error():
    assert run_ranks(3, agreeing, (), True) == [0, 1, 2]
    assert run_ranks(3, agreeing, (2,), False) == ["rank 2: broken on 2"] * 3
    assert run_ranks(3, agreeing, (0, 1, 2), True) == ["it is broken"] * 3


def broadcasting(tp):
    return tp.broadcast_object({"from": tp.rank})


def test_rank_0_has_the_word():
    assert run_ranks(3, broadcasting) == [{"from": 0}] * 3


@pytest.mark.parametrize("local_ranks, gpus, message", [(1, 0, "no CUDA device"), (4, 2, "4 ranks .* 2 GPU")])
def test_cuda_that_is_not_there(monkeypatch, local_ranks, gpus, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local_ranks))
    with pytest.raises(ValueError, match=message):
        pick_device("cuda")
    assert pick_device("cpu").type == "cpu"


def test_an_unknown_device_is_refused():
    with pytest.raises(ValueError, match="device=tpu is unknown"):
        pick_device("tpu")


def collecting(tp, dtype):
    x = torch.full((2, 3), 1.0 + tp.rank, dtype=dtype)
    gathered = all_gather_last(x[..., :1] * torch.tensor([[1.0], [10.0]], dtype=dtype), tp)
    first = gathered.clone()
    all_gather_last(torch.zeros(2, 1, dtype=dtype), tp)
    assert torch.equal(gathered, first)  # the result is no view of a buffer
    return all_reduce(x, tp), gathered


@pytest.mark.parametrize("dtype", DTYPES)
def test_collectives(dtype):
    for total, gathered in run_ranks(3, collecting, dtype):
        torch.testing.assert_close(total, torch.full((2, 3), 6, dtype=dtype))
        torch.testing.assert_close(gathered, torch.tensor([[1, 2, 3], [10, 20, 30]], dtype=dtype))


def boundary(tp, dtype, with_norm, with_extra):
    g = torch.Generator().manual_seed(0)
    partials, residual, bias = (
        torch.randn(tp.size, 2, 1, 8, generator=g),
        *torch.randn(2, 2, 1, 8, generator=g),
    )
    norm = LayerNorm(8)
    extra = torch.full((3, 2), 1.0 + tp.rank, dtype=dtype) if with_extra else None
    before = residual.to(dtype)
    partial = partials[tp.rank].clone().to(dtype)
    with torch.inference_mode():
        total, x = reduce_residual_norm(
            partial, before.clone(), bias[0, 0].to(dtype), norm.to(dtype) if with_norm else None, extra, tp=tp
        )
        wanted = (residual + partials.sum(0) + bias[0, 0]).to(dtype)
        tolerance = 1e-5 if dtype == torch.float32 else 5e-2
        torch.testing.assert_close(total, wanted, atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(
            x, F.layer_norm(total, (8,)) if with_norm else total, atol=tolerance, rtol=tolerance
        )
    if extra is not None:
        torch.testing.assert_close(extra, torch.full((3, 2), tp.size * (tp.size + 1) / 2, dtype=dtype))
    return total


@pytest.mark.parametrize("with_extra", [False, True])
@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_boundary_adds_the_bias_once(dtype, with_norm, with_extra):
    first, second = run_ranks(2, boundary, dtype, with_norm, with_extra)
    torch.testing.assert_close(first, second, atol=0, rtol=0)
    if not with_extra:
        run_ranks(1, boundary, dtype, with_norm, with_extra)


class Stored:
    """A reader of given tensors."""

    def __init__(self, **tensors):
        self.tensors = tensors

    def read(self, name, shape, *index):
        tensor = self.tensors[name.replace(".", "_")]
        assert tuple(tensor.shape) == shape
        return tensor[index] if index else tensor


def row_parallel(tp):
    g = torch.Generator().manual_seed(0)
    weight, bias, x = (torch.randn(s, generator=g) for s in ((6, 8), (6,), (3, 5, 8)))
    layer = RowParallelLinear(8, 6, bias=True, tp=tp)
    layer.load(Stored(fc_weight=weight, fc_bias=bias), "fc")
    out = torch.empty(3, 5, 6)
    with torch.inference_mode():
        partial = layer(x[..., tp.shard(8)].contiguous(), out=out)
        assert partial is out
        torch.testing.assert_close(all_reduce(partial, tp) + layer.bias, F.linear(x, weight, bias))


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_row_parallel_linear_is_linear(ranks):
    assert run_ranks(ranks, row_parallel) == [None] * ranks


def vocabulary(tp, vocab):
    g = torch.Generator().manual_seed(0)
    table, x = torch.randn(vocab, 4, generator=g), torch.randn(2, 4, generator=g)
    layer = VocabParallelEmbedding(vocab, 4, tp=tp)
    layer.weight.data.fill_(torch.nan)  # what is not loaded must not be seen
    layer.load(Stored(e_weight=table), "e")
    with torch.inference_mode():
        ids = torch.arange(vocab).view(1, -1)
        torch.testing.assert_close(all_reduce(layer(ids), tp), table[None], atol=0, rtol=0)
        torch.testing.assert_close(layer.logits(x), x @ table.T)


@pytest.mark.parametrize("vocab", [8, 7, 5])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_vocabulary_of_any_size_over_any_ranks(ranks, vocab):
    assert run_ranks(ranks, vocabulary, vocab) == [None] * ranks
