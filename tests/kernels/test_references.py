"""The plain-torch references against masks in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dejavu.kernels.sparse_attention import sparse_attention_reference
from dejavu.kernels.sparse_mlp import sparse_mlp_reference
from dejavu.predictors.selection import Chosen


@settings(max_examples=60, deadline=None)
@given(mask=st.lists(st.lists(st.booleans(), min_size=9, max_size=9), min_size=1, max_size=3))
def test_chosen_ids_ascend_and_count(mask):
    mask = torch.tensor(mask)
    chosen = Chosen.from_mask(mask)
    assert chosen.ids.dtype == chosen.count.dtype == torch.int32
    assert chosen.ids.shape == mask.shape and chosen.count.shape == (len(mask),)
    for row, ids, count in zip(mask, chosen.ids, chosen.count, strict=True):
        assert ids[:count].tolist() == row.nonzero().flatten().tolist()
    assert Chosen.from_mask(mask[0]).count.shape == (1,)


def mlp_inputs(batch, D, F):
    g = torch.Generator().manual_seed(batch + D + F)
    return [torch.randn(s, generator=g, dtype=torch.float64) for s in ((batch, 1, D), (F, D), (F,), (F, D))]


@pytest.mark.parametrize("density", [0, 0.3, 1])
@pytest.mark.parametrize("batch, D, F", [(1, 8, 16), (3, 7, 13), (2, 16, 1)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("with_bias", [True, False])
def test_sparse_mlp(batch, D, F, density, dtype, with_bias):
    x, fc1, bias, fc2 = mlp_inputs(batch, D, F)
    mask = torch.rand(F, generator=torch.Generator().manual_seed(F)) < density
    chosen = Chosen.from_mask(mask)
    chosen.ids[int(chosen.count) :] = 2**30  # past the count, anything
    bias = bias if with_bias else torch.zeros_like(bias)
    expected = ((x @ fc1.T + bias).relu() * mask) @ fc2
    out = torch.full((batch, 1, D), torch.nan, dtype=dtype)
    found = sparse_mlp_reference(
        x.to(dtype),
        fc1.to(dtype),
        bias.to(dtype) if with_bias else None,
        fc2.to(dtype),
        chosen.ids,
        chosen.count,
        out=out,
    )
    assert found.data_ptr() == out.data_ptr()
    error = (found.double() - expected).norm() / expected.norm().clamp(min=1e-9)
    assert (
        error <= {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 5e-2}[dtype]
    )


def test_unsorted_ids_give_the_same_sum():
    x, fc1, bias, fc2 = mlp_inputs(2, 8, 16)
    ids = torch.tensor([9, 2, 5, 14], dtype=torch.int32)
    count = torch.tensor([4], dtype=torch.int32)
    forward = sparse_mlp_reference(x, fc1, bias, fc2, ids, count)
    backward = sparse_mlp_reference(x, fc1, bias, fc2, ids.flip(0), count)
    torch.testing.assert_close(forward, backward)


@pytest.mark.parametrize("batch, N, H, T, D", [(1, 4, 8, 5, 32), (3, 3, 5, 9, 15)])
def test_sparse_attention(batch, N, H, T, D):
    g = torch.Generator().manual_seed(batch)
    q, keys, values, out_proj = (
        torch.randn(s, generator=g, dtype=torch.float64)
        for s in ((batch, 1, N, H), (batch, N, T, H), (batch, N, T, H), (N, H, D))
    )
    lengths = torch.tensor([T, 1, T - 2][:batch])
    visible = (torch.arange(T) < lengths[:, None])[:, None, None]
    mask = torch.rand(batch, N, generator=g) < 0.5
    mask[0, 0], mask[-1] = True, mask[-1] & (batch == 1)  # the last of several chooses no head
    chosen = Chosen.from_mask(mask)
    scores = torch.einsum("bnh,bnth->bnt", q[:, 0], keys) / H**0.5
    weights = scores.masked_fill(~visible[:, :, 0], -torch.inf).softmax(-1)
    heads = torch.einsum("bnt,bnth->bnh", weights, values) * mask[..., None]
    expected = torch.einsum("bnh,nhd->bd", heads, out_proj)[:, None]
    found = sparse_attention_reference(q, keys, values, visible, out_proj, chosen.ids, chosen.count)
    torch.testing.assert_close(found, expected)
