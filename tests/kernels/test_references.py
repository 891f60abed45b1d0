"""The plain-torch references against masks, loops and all-at-once computations in float64."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dejavu.kernels.qkv import SPREAD, fill_kv_reference
from dejavu.kernels.sparse_attention import sparse_attention
from dejavu.kernels.sparse_mlp import sparse_mlp
from dejavu.predictors.selection import Chosen

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 5e-2}
W = 20  # of the rings here


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normals(seed, *shapes):
    g = generator(seed)
    return [torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes]


def relative_error(found, expected):
    return (found.double() - expected).norm() / expected.norm().clamp(min=1e-9)


def shuffled(mask, seed=0):
    """``mask [B, n]`` as (ids, count) in no order; past the count, anything."""
    chosen = Chosen.from_mask(mask)
    ids = chosen.ids.clone()
    for row, count in zip(ids, chosen.count.tolist(), strict=True):
        row[:count] = row[:count][torch.randperm(count, generator=generator(seed))]
        row[count:] = torch.tensor([2**30, -7, 3]).repeat(len(row))[: len(row) - count]
    return ids, chosen.count


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
    return normals(batch + D + F, (batch, 1, D), (F, D), (F,), (F, D))


@pytest.mark.parametrize("density", [0, 0.3, 1])
@pytest.mark.parametrize("batch, D, F", [(1, 8, 16), (3, 7, 13), (2, 16, 1)])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shared", [True, False], ids=["one set", "one set a sequence"])
def test_sparse_mlp(batch, D, F, density, dtype, with_bias, shared):
    x, fc1, bias, fc2 = mlp_inputs(batch, D, F)
    mask = torch.rand(batch, F, generator=generator(F)) < density
    if not shared and 0 < density < 1:
        mask[-1] = batch == 1  # the last of several chooses nothing, and the others something
    mask = mask[0] if shared else mask
    ids, count = shuffled(mask.reshape(-1, F))
    bias = bias if with_bias else torch.zeros_like(bias)
    expected = ((x @ fc1.T + bias).relu() * (mask if shared else mask[:, None])) @ fc2
    out = torch.full((batch, 1, D), torch.nan, dtype=dtype)
    found = sparse_mlp(
        x.to(dtype),
        fc1.to(dtype),
        None,
        bias.to(dtype) if with_bias else None,
        fc2.to(dtype),
        None,
        ids[0] if shared else ids,
        count,
        out=out,
    )
    assert found.data_ptr() == out.data_ptr()
    assert relative_error(found, expected) <= TOLERANCE[dtype]


def test_one_set_a_sequence_is_a_batch_of_one_each():
    x, fc1, bias, fc2 = mlp_inputs(3, 7, 13)
    chosen = Chosen.from_mask(torch.rand(3, 13, generator=generator()) < 0.4)
    together = sparse_mlp(x, fc1, None, bias, fc2, None, chosen.ids, chosen.count)
    for i in range(3):
        alone = sparse_mlp(x[i : i + 1], fc1, None, bias, fc2, None, chosen.ids[i], chosen.count[i : i + 1])
        torch.testing.assert_close(together[i], alone[0])


def test_unsorted_ids_give_the_same_sum():
    x, fc1, bias, fc2 = mlp_inputs(2, 8, 16)
    named, past = [9, 2, 5, 14], 12 * [-1]
    count = torch.tensor([4], dtype=torch.int32)
    forward, backward = (
        sparse_mlp(x, fc1, None, bias, fc2, None, torch.tensor(ids + past, dtype=torch.int32), count)
        for ids in (named, named[::-1])
    )
    torch.testing.assert_close(forward, backward)


def filled(positions, N, D, dtype):
    """A ring, and keys and values that are complete."""
    ring = torch.zeros(len(positions), W, D, dtype=dtype)
    return {"inputs": ring, "filled_to": positions[:, None].repeat(1, N) + 1}


def attention_one_by_one(x, qkv, bias, keys, values, positions, out_proj, mask, mean):
    """Each chosen head of each sequence by itself; a plain loop."""
    out = torch.zeros_like(x)
    for b, n in mask.nonzero().tolist():
        q = qkv[n, 0] @ x[b] + bias[n, 0]
        seen = int(positions[b]) + 1
        weights = (keys[b, n, :seen] @ q / len(q) ** 0.5).softmax(0)
        out[b] += (weights @ values[b, n, :seen] - mean[n]) @ out_proj[n]
    return out


@pytest.mark.parametrize("chosen", ["nothing", "some", "everything"])
@pytest.mark.parametrize("batch, N, H, T, D", [(1, 4, 8, 5, 32), (3, 3, 5, 9, 14)])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("with_mean", [True, False])
def test_sparse_attention(batch, N, H, T, D, chosen, dtype, with_bias, with_mean):
    x, qkv, bias, keys, values, out_proj, mean = (
        t.to(dtype)
        for t in normals(
            batch, (batch, D), (N, 3, H, D), (N, 3, H), *[(batch, N, T, H)] * 2, (N, H, D), (N, H)
        )
    )
    qkv /= D**0.5  # scores of the size that a model has
    positions = torch.tensor([T - 1, 0, T - 3][:batch])
    mask = torch.rand(batch, N, generator=generator(batch)) < 0.5
    mask[0, 0], mask[-1] = True, mask[-1] & (batch == 1)  # the last of several chooses no head
    mask = {"nothing": torch.zeros_like(mask), "some": mask, "everything": torch.ones_like(mask)}[chosen]
    for kv in (keys, values):
        kv[~mask] = torch.nan  # whatever lies there
        for b, position in enumerate(positions.tolist()):
            kv[b, :, position + 1 :] = 1e3  # of a text that was there before
    ids, count = shuffled(mask)
    out = torch.full((batch, D), torch.nan, dtype=dtype)
    found = sparse_attention(
        x,
        qkv,
        None,
        bias if with_bias else None,
        keys,
        values,
        positions,
        out_proj,
        None,
        ids,
        count,
        mean=mean if with_mean else None,
        out=out,
        **filled(positions, N, D, dtype),
    )
    expected = attention_one_by_one(
        x.double(),
        qkv.double(),
        bias.double() * with_bias,
        keys.double(),
        values.double(),
        positions,
        out_proj.double(),
        mask,
        mean.double() * with_mean,
    )
    assert found.data_ptr() == out.data_ptr()
    assert relative_error(found, expected) <= TOLERANCE[dtype]


def test_attention_without_a_place_to_write_to():
    x, qkv, keys, values, out_proj = normals(0, (2, 6), (3, 3, 2, 6), *[(2, 3, 4, 2)] * 2, (3, 2, 6))
    ids, count = shuffled(torch.tensor([[True, False, True], [False, True, False]]))
    positions = torch.tensor([3, 1])
    arguments = (x, qkv, None, None, keys, values, positions, out_proj, None, ids, count)
    state = filled(positions, 3, 6, x.dtype)
    given_place = sparse_attention(*arguments, **state, out=torch.empty_like(x))
    torch.testing.assert_close(sparse_attention(*arguments, **state), given_place, atol=0, rtol=0)


class Filling:
    """Sequences that give the block ``x [B, T, D]``, one position a step; NaN is not written yet."""

    def __init__(self, B, N, T, *, dtype=torch.float64, with_bias=True, layer=0, start=None):
        H, D = 3, 8
        x, qkv, bias = (t.to(dtype) for t in normals(B + N, (B, T, D), (N, 3, H, D), (N, 3, H)))
        self.x, self.qkv, self.bias, self.layer = x, qkv, bias if with_bias else None, layer
        wide_bias = bias.double()[:, 1:, None] * with_bias
        self.expected = torch.einsum("btd,nchd->bncth", x.double(), qkv.double()[:, 1:]) + wide_bias
        self.ring = torch.full((B, W, D), torch.nan, dtype=dtype)
        self.keys, self.values = torch.full((2, B, N, T, H), torch.nan, dtype=dtype)
        self.positions = torch.zeros(B, dtype=torch.int64) if start is None else start.clone()
        self.filled_to = self.positions[:, None].repeat(1, N)
        self.tolerance = TOLERANCE[dtype]

    def step(self, mask, *, advance=None, keep=True):
        """One position of every sequence, whose heads of ``mask [B, N]`` are chosen."""
        b = torch.arange(len(self.x))
        self.fill(self.x[b, self.positions] if keep else None, mask)
        self.positions += 1 if advance is None else advance

    def fill(self, x, mask):
        ids, count = shuffled(mask)
        fill_kv_reference(
            x,
            self.ring,
            self.qkv,
            None,
            self.bias,
            self.keys,
            self.values,
            self.filled_to,
            self.positions,
            ids,
            count,
            self.layer,
        )

    def check(self, start=0):
        """What counts as filled, from ``start`` on, is right, and nothing else is written."""
        filled = torch.arange(self.keys.shape[2]) < self.filled_to[..., None]
        for b, first in enumerate(torch.as_tensor(start).expand(len(filled)).tolist()):
            filled[b, :, :first] = False
        found = torch.stack([self.keys, self.values], dim=2)
        assert torch.equal(~found.isnan().any(-1).any(2), filled)
        mask = filled[:, :, None, :, None]
        assert relative_error(found.nan_to_num() * mask, self.expected * mask) <= self.tolerance


def some(B, N, p, seed):
    return torch.rand(B, N, generator=generator(seed)) < p


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("with_bias", [True, False])
def test_filling_later_gives_what_all_at_once_gives(batch, dtype, with_bias):
    T = 3 * W + 10
    start = torch.tensor([5, 0, W + 1][:batch])
    filling = Filling(batch, 18, T, dtype=dtype, with_bias=with_bias, layer=2, start=start)
    for t in range(T - int(start.max())):
        mask = some(batch, 18, 0.04, seed=t)
        mask[:, 1] = True
        before = filling.filled_to.clone()
        filling.step(mask)
        assert (filling.filled_to >= before).all()
        assert (filling.filled_to == filling.positions[:, None])[mask].all()
    filling.check(start)


@pytest.mark.parametrize("layer", [0, 5, 15])
@pytest.mark.parametrize("gap", [1, W - 1, W, W + 1])
def test_a_head_comes_back_after(gap, layer):
    heads = SPREAD + 1  # every remainder, one of them twice
    filling = Filling(1, heads, 4 + 2 * gap + 1, layer=layer)
    times = {4, 4 + gap, 4 + 2 * gap}
    for t in range(4 + 2 * gap + 1):
        filling.step(torch.full((1, heads), t in times))
        filling.check()
        if t in times:
            assert (filling.filled_to == t + 1).all()


@pytest.mark.parametrize("layer", [0, 3, 31])
def test_heads_that_are_never_chosen_are_flushed_in_time(layer):
    heads, T = SPREAD + 3, 3 * W + 5
    filling = Filling(2, heads, T, layer=layer)
    period = W - (torch.arange(heads) + layer) % SPREAD
    for t in range(T):
        filling.step(torch.zeros(2, heads, dtype=torch.bool))
        assert torch.equal(filling.filled_to, ((t + 1) // period * period).expand(2, -1))
    filling.check()
    first = sorted(period[:SPREAD].tolist())
    assert all(late - early == 1 for early, late in pairwise(first)) and first[-1] == W


@settings(max_examples=40, deadline=None)
@given(
    chosen=st.sets(st.tuples(st.integers(0, 3 * W), st.integers(0, 2)), max_size=12),
    layer=st.integers(0, 40),
)
def test_whatever_is_chosen_the_ring_is_long_enough(chosen, layer):
    filling = Filling(1, 3, 3 * W + 1, layer=layer)
    for t in range(3 * W + 1):
        filling.step(torch.tensor([[(t, head) in chosen for head in range(3)]]))
        assert (filling.positions[:, None] - filling.filled_to < W).all()
    filling.check()


def test_without_an_input_the_ring_stays_and_all_is_filled():
    nobody = torch.zeros(2, 3, dtype=torch.bool)
    filling = Filling(2, 3, 20, start=torch.tensor([0, 6]))
    for _ in range(4):
        filling.step(nobody)
    ring = filling.ring.clone()
    filling.positions -= 1  # of the newest input in the ring
    chosen = torch.tensor([[True, False, True], [False, True, True]])
    filling.fill(None, chosen)
    torch.testing.assert_close(filling.ring, ring, equal_nan=True, atol=0, rtol=0)
    assert filling.filled_to.tolist() == [[4, 0, 4], [6, 10, 10]]
    filling.check(torch.tensor([0, 6]))


def test_filled_to_never_goes_back():
    filling = Filling(1, 2, 20)
    for _ in range(10):
        filling.step(torch.tensor([[True, False]]))
    keys, values = filling.keys.clone(), filling.values.clone()
    filling.positions.fill_(4)
    for x in (None, torch.zeros(1, 8, dtype=torch.float64)):
        filling.fill(x, torch.tensor([[True, False]]))
        assert filling.filled_to.tolist() == [[10, 0]]
        torch.testing.assert_close(filling.keys, keys, equal_nan=True, atol=0, rtol=0)
        torch.testing.assert_close(filling.values, values, equal_nan=True, atol=0, rtol=0)


def test_a_finished_sequence_waits_while_the_others_go_on():
    T = 4 * W
    filling = Filling(3, 5, T)
    advance = torch.ones(3, dtype=torch.int64)
    for t in range(T - 1):
        mask = some(3, 5, 0.1, seed=t)
        if t == 7:
            advance[1] = 0
            finished = filling.filled_to[1].clone()
        mask[1] &= t < 7
        filling.step(mask, advance=advance)
    assert filling.positions.tolist() == [T - 1, 7, T - 1]
    assert torch.equal(filling.filled_to[1], finished)
    filling.check()
