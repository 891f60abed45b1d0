"""The Triton kernels against their references in float64: compiled where there is a GPU, else interpreted.

On a machine without a GPU the same device code runs in Triton's interpreter (tests/conftest.py asks for it).
"""

import functools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dejavu.kernels.predict import (
    _compact,
    _predict,
    compact_reference,
    launch_down,
    predict_reference,
    standardise,
)
from dejavu.kernels.residual_norm import _residual_norm, residual_norm_reference
from dejavu.kernels.sparse_attention import _sparse_attention, sparse_attention_reference
from dejavu.kernels.sparse_mlp import _sparse_mlp, sparse_mlp_reference
from dejavu.kernels.tokens import (
    NO_TOKEN,
    _count_down,
    _embed_rows,
    _likeliest,
    count_down_reference,
    embed_rows_reference,
    likeliest_reference,
)
from dejavu.kernels.tuning import override
from dejavu.kernels.weighted_rows import weighted_rows, weighted_rows_reference
from dejavu.profiles.tune import candidates

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FP8 = torch.float8_e4m3fn
WEIGHTS = [torch.float32, torch.float16, torch.bfloat16, torch.int8, FP8]
# of a result against float64, relative to its norm: the rounding of what is stored in the activations' dtype
TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
W = 20  # of the rings here


class Draw:
    """Random tensors, fresh for every seed."""

    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape, dtype=torch.float64):
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(dtype).to(DEVICE)

    def weight(self, *shape, dtype):
        """A weight, its scale (of 8-bit ones) and the numbers that the two stand for, in float64."""
        w = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        if dtype.itemsize > 1:
            data = w.to(dtype)
            return data.to(DEVICE), None, data.double().to(DEVICE)
        scale = torch.rand(*shape[:-1], 1, generator=self.generator) / 40 + 0.01
        data = (w / scale).round().clamp(-127, 127).to(dtype)
        return data.to(DEVICE), scale.to(DEVICE), (data.double() * scale.double()).to(DEVICE)

    def ids(self, mask):
        """``mask [S, n]`` as ids in no order, past the count anything (ids of before, too), and counts."""
        ids = torch.full(mask.shape, 2**30, dtype=torch.int32)
        for row, chosen in zip(ids, mask, strict=True):
            named, left_out = chosen.nonzero()[:, 0].int(), (~chosen).nonzero()[:, 0].int()
            row[: len(named)] = named[torch.randperm(len(named), generator=self.generator)]
            row[len(named) :: 2] = left_out[::2]
        return ids.to(DEVICE), mask.sum(-1).int().to(DEVICE)

    def mask(self, *shape, p):
        return torch.rand(*shape, generator=self.generator) < p


def activations(dtype):
    """What goes with weights of a dtype: 8-bit ones serve models of either 16-bit dtype."""
    return {torch.int8: torch.float16, FP8: torch.bfloat16}.get(dtype, dtype)


def assert_near(found, expected, dtype):
    assert found.dtype == dtype and found.isfinite().all()
    error = (found.double() - expected).norm() / expected.norm().clamp(min=1e-9)
    assert error <= TOLERANCE[dtype], float(error)


def check_mlp(batch, D, F, mask, dtype, *, with_bias=True, seed=0):
    """``mask`` None, ``[F]`` or ``[B, F]``."""
    draw, wide = Draw(seed), activations(dtype)
    x, bias = draw.normal(batch, 1, D, dtype=wide), draw.normal(F, dtype=wide)
    fc1, fc1_scale, exact1 = draw.weight(F, D, dtype=dtype)
    fc2, fc2_scale, exact2 = draw.weight(F, D, dtype=dtype)
    ids, count = (None, None) if mask is None else draw.ids(mask.view(-1, F))
    if mask is not None and mask.dim() == 1:
        ids = ids[0]
    bias = bias if with_bias else None
    expected = torch.empty(batch, 1, D, dtype=torch.float64, device=DEVICE)
    wide_bias = None if bias is None else bias.double()
    sparse_mlp_reference(x.double(), exact1, None, wide_bias, exact2, None, ids, count, expected)
    results = []
    for _ in range(2):
        out = torch.full_like(x, torch.nan)
        _sparse_mlp(x, fc1, fc1_scale, bias, fc2, fc2_scale, ids, count, out, None, None)
        results.append(out)
    assert_near(results[0], expected, wide)
    assert torch.equal(*results)


@pytest.mark.parametrize("batch, D, F", [(1, 48, 37), (3, 40, 1100), (18, 40, 50)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_lossless_mlp(batch, D, F, dtype):
    """All of fc1, live rows of fc2: a dense MLP, and the number of neurons that are live somewhere."""
    draw, wide = Draw(F), activations(dtype)
    x, bias = draw.normal(batch, 1, D, dtype=wide), draw.normal(F, dtype=wide) - 8
    fc1, fc1_scale, exact1 = draw.weight(F, D, dtype=dtype)
    fc2, fc2_scale, exact2 = draw.weight(F, D, dtype=dtype)
    alive = (torch.arange(batch, device=DEVICE) % 3 != 1).long()
    expected = torch.empty(batch, 1, D, dtype=torch.float64, device=DEVICE)
    found = torch.full_like(x, torch.nan)
    tallies = [torch.full((2,), 5, device=DEVICE) for _ in range(2)]
    exact = (x.double(), exact1, None, bias.double(), exact2, None, None, None, expected)
    sparse_mlp_reference(*exact, tallies[0], alive)
    _sparse_mlp(x, fc1, fc1_scale, bias, fc2, fc2_scale, None, None, found, tallies[1], alive)
    assert_near(found[alive == 1], expected[alive == 1], wide)
    assert 5 < tallies[0][0] < 5 + F
    if batch <= 16:  # more tokens take several launches, each with a union of its own
        assert tallies[1].tolist() == tallies[0].tolist()


@pytest.mark.parametrize("chosen", ["all", "one set", "one set a sequence", "nothing", "everything", "one"])
@pytest.mark.parametrize("batch, D, F", [(1, 48, 37), (3, 72, 50)])
@pytest.mark.parametrize("dtype", WEIGHTS)
def test_sparse_mlp(batch, D, F, chosen, dtype):
    draw = Draw(F)
    mask = {
        "all": None,
        "one set": draw.mask(F, p=0.3),
        "one set a sequence": draw.mask(batch, F, p=0.3),
        "nothing": torch.zeros(F, dtype=torch.bool),
        "everything": torch.ones(F, dtype=torch.bool),
        "one": torch.arange(F) == F - 1,
    }[chosen]
    check_mlp(batch, D, F, mask, dtype, with_bias=batch == 1)


FEW_ROWS = {"ROWS": 16, "BLOCK_D": 32, "SPLITS": 2, "STAGES": 3, "num_warps": 4}


@pytest.mark.parametrize("share", [0.02, 0.6, 1.0, "all"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_many_steps_over_the_rows(batch, share, dtype, monkeypatch):
    for name in ("fc2", "fc2_all"):
        monkeypatch.setitem(override, name, FEW_ROWS)
    check_mlp(batch, 40, 150, None if share == "all" else Draw(5).mask(150, p=share), dtype)


@pytest.mark.parametrize("share", [0.0, 0.02, 0.6, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("block", [16, 64])
def test_fc1_a_row_at_a_time(block, dtype, share, monkeypatch):
    """Whose first id is read before and after the wait."""
    monkeypatch.setitem(override, "fc1", {"ROWS": 1, "BLOCK_D": block, "PROGRAMS": 4, "num_warps": 4})
    check_mlp(1, 40, 50, Draw(5).mask(50, p=share), dtype)


@pytest.mark.parametrize("skip_zeros", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_what_lies_past_the_count_is_not_used(batch, skip_zeros, monkeypatch):
    monkeypatch.setitem(override, "rows", FEW_ROWS)
    draw = Draw(2)
    weight, h = draw.normal(100, 24, dtype=torch.float32), draw.normal(batch, 100, dtype=torch.float32)
    ids = torch.randperm(100, generator=draw.generator).int().to(DEVICE)
    h[:, 57:] = torch.nan
    out = torch.full((batch, 24), torch.nan, device=DEVICE)
    count = torch.tensor([57], dtype=torch.int32, device=DEVICE)
    weighted_rows(h, weight, None, ids, count, out, skip_zeros=skip_zeros)
    torch.testing.assert_close(out, h[:, :57] @ weight[ids[:57].long()], atol=1e-4, rtol=1e-4)


def test_more_tokens_than_one_launch_serves():
    check_mlp(35, 16, 24, Draw(0).mask(24, p=0.5), torch.float32)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    batch=st.integers(1, 4),
    D=st.integers(1, 70),
    F=st.integers(1, 60),
    share=st.floats(0, 1),
    dtype=st.sampled_from(WEIGHTS),
    seed=st.integers(0, 10),
)
def test_sparse_mlp_of_any_shape_and_count(batch, D, F, share, dtype, seed):
    check_mlp(batch, D, F, Draw(seed).mask(F, p=share), dtype, seed=seed)


def test_a_nan_is_not_silenced():
    x, w = torch.full((1, 1, 8), torch.nan, device=DEVICE), torch.ones(5, 8, device=DEVICE)
    out = torch.empty_like(x)
    _sparse_mlp(x, w, None, None, w, None, None, None, out, None, None)
    assert out.isnan().all()


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("dtype", WEIGHTS)
def test_rows_of_weight_zero_are_not_read(batch, dtype):
    draw = Draw(1)
    weight, scale, exact = draw.weight(40, 24, dtype=dtype)
    h, base = draw.normal(batch, 40, dtype=torch.float32), draw.normal(24, dtype=torch.float32)
    h[:, ::3] = 0
    if dtype != torch.int8:
        weight[::3] = torch.nan
    expected = torch.empty(batch, 24, dtype=torch.float64, device=DEVICE)
    weighted_rows_reference(h.double(), exact, None, None, None, expected, base.double())
    out = torch.full((batch, 24), torch.nan, device=DEVICE)
    weighted_rows(h, weight, scale, None, None, out, base)
    error = (out.double() - expected).norm() / expected.norm()
    assert error <= TOLERANCE[torch.float32 if batch == 1 else activations(dtype)]


@pytest.mark.parametrize("norm", ["affine", "plain", "none"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rows, D", [(1, 37), (3, 64), (16, 100), (17, 100)])
def test_residual_norm(rows, D, dtype, norm):
    draw = Draw(D)
    partial, residual = draw.normal(rows, D, dtype=dtype), 3 + 5 * draw.normal(rows, D, dtype=dtype)
    bias, weight, shift = (draw.normal(D, dtype=dtype) if norm == "affine" else None for _ in range(3))
    total, normed = torch.full((2, rows, D), torch.nan, dtype=dtype, device=DEVICE)
    expected = torch.empty(2, rows, D, dtype=torch.float64, device=DEVICE)
    wide = [None if t is None else t.double() for t in (partial, residual, bias, weight, shift)]
    residual_norm_reference(*wide, 1e-5, expected[0], expected[1])
    _residual_norm(partial, residual, bias, weight, shift, 1e-5, total, None if norm == "none" else normed)
    assert_near(total, expected[0], dtype)
    if norm != "none":
        assert_near(normed, expected[1], dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rows, D", [(1, 37), (17, 100)])
def test_layer_norm(rows, D, dtype):
    draw = Draw(D)
    residual, weight, shift = 3 + 5 * draw.normal(rows, D, dtype=dtype), *draw.normal(2, D, dtype=dtype)
    normed = torch.full((rows, D), torch.nan, dtype=dtype, device=DEVICE)
    _residual_norm(None, residual, None, weight, shift, 1e-5, None, normed)
    expected = F.layer_norm(residual.double(), (D,), weight.double(), shift.double(), 1e-5)
    assert_near(normed, expected, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("first", [0, 3])
def test_embed_rows(first, dtype):
    table, ids = Draw(first).normal(5, 1100, dtype=dtype), torch.tensor([4, 0, 7, 3, 99], device=DEVICE)
    out, expected = (torch.full((5, 1100), torch.nan, dtype=dtype, device=DEVICE) for _ in range(2))
    _embed_rows(ids, table, first, out)
    embed_rows_reference(ids, table, first, expected)
    assert torch.equal(out, expected)
    assert torch.equal(out[0], table[4 - first])
    assert not out[4].any(), "of a token that another rank holds"


def test_likeliest():
    V = 9000  # more than a program looks at in a go
    logits = torch.randn(8, V, generator=torch.Generator().manual_seed(0))
    logits[1, [40, 8200, 8900]] = 9.0  # the first of the largest
    logits[2, 5] = torch.nan
    logits[3, 8999] = torch.inf
    logits[4] = -torch.inf
    logits[5, 1:] = -torch.inf
    logits[6, 8500] = 9.0
    found, expected = (torch.empty(8, dtype=torch.int64, device=DEVICE) for _ in range(2))
    _likeliest(logits.to(DEVICE), found)
    likeliest_reference(logits.to(DEVICE), expected)
    assert torch.equal(found, expected)
    assert found[1:7].tolist() == [40, NO_TOKEN, NO_TOKEN, NO_TOKEN, 0, 8500]


def test_count_down():
    tokens, last, alive = ([5, 5, 5, NO_TOKEN, 5], [5, 6, 6, NO_TOKEN, 6], [1, 1, 1, 1, 0])
    left = [9, 9, 1, 9, 0]
    state = [torch.tensor(x, device=DEVICE) for x in (tokens, last, left, alive)]
    expected = [x.clone() for x in state]
    _count_down(*state)
    count_down_reference(*expected)
    assert torch.equal(torch.stack(state), torch.stack(expected))
    assert [x.tolist() for x in state[2:]] == [[8, 8, 0, 8, 0], [0, 1, 0, 0, 0]]


def predictor(draw, batch, D, r, n, dtype, residual_dtype):
    down, down_scale, exact_down = draw.weight(r, D, dtype=dtype)
    up, up_scale, exact_up = draw.weight(n, r, dtype=dtype)
    residual = 2 + 3 * draw.normal(batch, D, dtype=residual_dtype)
    bias = draw.normal(n, dtype=torch.float32)
    bias[0] = 1000  # chosen by every live token
    lean = (down, down_scale, exact_down.sum(-1).float(), up, up_scale, bias)
    exact = (exact_down, None, exact_down.sum(-1), exact_up, None, bias.double())
    return residual, lean, exact


@pytest.mark.parametrize("union", [True, False])
@pytest.mark.parametrize("batch", [1, 3, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int8, FP8])
@pytest.mark.parametrize("D, r, n, limit", [(40, 24, 1100, 20.0), (33, 7, 5, 1.0)])
@pytest.mark.parametrize("beside", [False, True])
def test_predict(batch, union, dtype, D, r, n, limit, beside):
    draw = Draw(n)
    residual, lean, exact = predictor(draw, batch, D, r, n, dtype, torch.bfloat16)
    threshold = torch.tensor([limit], device=DEVICE)
    alive = (torch.arange(batch, device=DEVICE) % 3 != 1).long()
    found = []
    for run, x, weights in ((predict_reference, residual.double(), exact), (_predict, residual, lean)):
        ids = torch.full((n,) if union else (batch, n), -1, dtype=torch.int32, device=DEVICE)
        count = torch.full((1 if union else batch,), -1, dtype=torch.int32, device=DEVICE)
        tally = torch.full((2,), 5, device=DEVICE)
        run(x, *weights, threshold, alive, ids, count, tally, r == 7, beside)
        found.append((ids.view(-1, n), count, tally))
    (ids, count, tally), (found_ids, found_count, found_tally) = found
    assert found_tally.tolist() == [5 + int(found_count.sum()), 5 + (1 if union else int(alive.sum()))]
    assert found_tally[1] == tally[1] and int(count.sum()) > 0 and (n < 9 or int(count.max()) < n)
    for row, k, found_row, found_k in zip(ids, count, found_ids, found_count, strict=True):
        named = found_row[:found_k].tolist()
        assert named == sorted(set(named))
        # scores within rounding of the threshold may fall on either side
        assert len(set(named) ^ set(row[:k].tolist())) <= max(1, n // 200)


@pytest.mark.parametrize(("dtype", "r"), [(FP8, 8), (torch.int8, 6)])
def test_settings_for_words_serve_8_bit_weights_that_do_not_come_by_words(monkeypatch, dtype, r):
    """They share a line of the table."""
    draw = Draw(r)
    residual, lean, exact = predictor(draw, 1, 32, r, 40, dtype, torch.float32)
    for name in ("down", "up"):
        monkeypatch.setitem(override, name, candidates(name, 32, 1)[0])
    chosen = []
    for run, x, weights in ((predict_reference, residual.double(), exact), (_predict, residual, lean)):
        ids, count = (torch.zeros(n, dtype=torch.int32, device=DEVICE) for n in (40, 1))
        tally = torch.zeros(2, dtype=torch.int64, device=DEVICE)
        run(x, *weights, torch.tensor([1.0], device=DEVICE), None, ids, count, tally, False, False)
        chosen.append(ids[: int(count)].tolist())
    assert chosen[0] == chosen[1] and 0 < len(chosen[0]) < 40


@pytest.mark.parametrize(
    ("D", "r", "beside"), [(40, 24, False), (20, 3, False), (4112, 5, False), (4112, 11, True)]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_8_bit_weights_times_a_stream_with_an_outlier(D, r, beside, dtype):
    """Whole numbers of 23 bits: the error is a small part of the largest."""
    draw = Draw(D)
    down, scale, exact = draw.weight(r, D, dtype=torch.int8)
    residual = draw.normal(1, D, dtype=dtype)
    residual[0, 7] = -300
    found = launch_down(residual, down, scale, exact.sum(-1).float(), beside=beside)
    z = standardise(residual.double())
    error = (found - z @ exact.T).abs() / exact.norm(dim=-1)
    assert float(error.max()) < 2e-6 * float(z.abs().max())


@pytest.mark.parametrize("batch", [1, 3])
def test_a_stream_far_from_zero_and_one_without_spread(batch):
    draw = Draw(3)
    residual, lean, exact = predictor(draw, batch, 64, 16, 100, torch.float16, torch.float32)
    residual += 200
    residual[1:2] = 300.7  # the second of several
    chosen = []
    for run, x, weights in ((predict_reference, residual.double(), exact), (_predict, residual, lean)):
        ids = torch.zeros(batch, 100, dtype=torch.int32, device=DEVICE)
        count = torch.zeros(batch, dtype=torch.int32, device=DEVICE)
        tally = torch.zeros(2, dtype=torch.int64, device=DEVICE)
        run(x, *weights, torch.tensor([-1.0], device=DEVICE), None, ids, count, tally, False, False)
        chosen.append([set(row[:k].tolist()) for row, k in zip(ids, count, strict=True)])
    for i, (expected, found) in enumerate(zip(*chosen, strict=True)):
        assert len(expected) > 9 and 0 in found  # nothing is lost to a root of less than nothing
        assert i == 1 or len(expected ^ found) <= 2  # rounding is all that has no spread to be told from


@settings(max_examples=30, deadline=None)
@given(sets=st.integers(1, 3), n=st.integers(1, 2100), p=st.floats(0, 1), seed=st.integers(0, 99))
def test_compaction(sets, n, p, seed):
    mask = Draw(seed).mask(sets, n, p=p).to(DEVICE)
    found, expected = (
        (
            torch.full((sets, n), -1, dtype=torch.int32, device=DEVICE),
            torch.full((sets,), -1, dtype=torch.int32, device=DEVICE),
        )
        for _ in range(2)
    )
    _compact(mask, *found)
    compact_reference(mask, *expected)
    assert torch.equal(found[1], expected[1])
    for row, wanted, k in zip(found[0], expected[0], expected[1].tolist(), strict=True):
        assert torch.equal(row[:k], wanted[:k])


class Attention:
    """Weights and state of one attention block; ``run`` makes a step of a copy of the state."""

    def __init__(self, batch, N, H, D, T, dtype, *, lazy=True, with_mean=True, seed=0):
        draw, self.dtype = Draw(seed), activations(dtype)
        self.qkv, self.qkv_scale, self.exact_qkv = draw.weight(N, 3, H, D, dtype=dtype)
        self.out_proj, self.out_scale, self.exact_out = draw.weight(N, H, D, dtype=dtype)
        shrink = D**-0.5  # scores of the size that a model has
        if self.qkv_scale is None:
            self.qkv = (self.qkv * shrink).to(dtype)
            self.exact_qkv = self.qkv.double()
        else:
            self.qkv_scale, self.exact_qkv = self.qkv_scale * shrink, self.exact_qkv * shrink
        self.bias = draw.normal(N, 3, H, dtype=self.dtype)
        self.mean, self.base = (
            draw.normal(*shape, dtype=self.dtype) if with_mean else None for shape in ((N, H), (D,))
        )
        self.draw, self.lazy, self.shape = draw, lazy, (batch, N, T, H)
        self.ring = draw.normal(batch, W, D, dtype=self.dtype)
        self.keys, self.values = (draw.normal(batch, N, T, H, dtype=self.dtype) for _ in range(2))
        self.positions = torch.tensor([T - 2, 6, W + 3][:batch], device=DEVICE)
        # what a head may lack: never more than the ring holds
        lack = torch.randint(1, W - 6, (batch, N), generator=draw.generator).to(DEVICE)
        self.filled_to = (self.positions[:, None] + 1 - lack).clamp(min=0)

    def run(self, kernel, x, ids, count, layer=0, exact=False):
        """The output and the state after a step: by the kernels, or by the reference in float64."""
        wide = (lambda t: None if t is None else t.double()) if exact else (lambda t: t)
        ring, keys, values = (wide(t).clone() for t in (self.ring, self.keys, self.values))
        filled_to = self.filled_to.clone()
        out = torch.full_like(wide(x), torch.nan)
        weights = (
            (self.exact_qkv, None, self.exact_out, None)
            if exact
            else (self.qkv, self.qkv_scale, self.out_proj, self.out_scale)
        )
        kernel(
            wide(x),
            ring if self.lazy else None,
            *weights[:2],
            wide(self.bias),
            keys,
            values,
            filled_to if self.lazy else None,
            self.positions,
            *weights[2:],
            ids,
            count,
            wide(self.mean),
            wide(self.base),
            out,
            layer,
        )
        return out, ring, keys, values, filled_to


@pytest.mark.parametrize("chosen", ["all", "some", "nothing", "everything"])
@pytest.mark.parametrize("lazy", [True, False], ids=["lazy", "always"])
@pytest.mark.parametrize("batch, H", [(1, 20), (3, 8)])
@pytest.mark.parametrize("dtype", WEIGHTS)
def test_sparse_attention(batch, H, lazy, chosen, dtype):
    N, D, T = 3, 40, 45
    block = Attention(batch, N, H, D, T, dtype, lazy=lazy, with_mean=chosen != "all")
    mask = block.draw.mask(batch, N, p=0.5)
    mask[0, 0], mask[-1] = True, mask[-1] & (batch == 1)
    mask = {"nothing": mask & False, "everything": mask | True}.get(chosen, mask)
    ids, count = (None, None) if chosen == "all" else block.draw.ids(mask)
    x = block.draw.normal(batch, D, dtype=block.dtype)
    expected = block.run(sparse_attention_reference, x, ids, count, layer=2, exact=True)
    found = block.run(_sparse_attention, x, ids, count, layer=2)
    for ours, theirs in zip(found[:4], expected[:4], strict=True):
        assert_near(ours, theirs, block.dtype)
    assert torch.equal(found[4], expected[4])
    for ours, again in zip(found, block.run(_sparse_attention, x, ids, count, layer=2), strict=True):
        assert torch.equal(ours, again)


@pytest.mark.parametrize("batch, splits", [(1, 2), (3, 1)])
def test_all_programs_of_qkv_fill_the_ring(batch, splits, monkeypatch):
    small = {"ROWS": 32, "BLOCK_D": 16, "SPLITS": splits, "num_warps": 4, "num_stages": 2}
    monkeypatch.setitem(override, "qkv", small)
    block = Attention(batch, 3, 8, 72, 45, torch.bfloat16, lazy=True, with_mean=True)
    ids, count = block.draw.ids(block.draw.mask(batch, 3, p=0.5))
    x = block.draw.normal(batch, 72, dtype=block.dtype)
    _, ring, *_ = block.run(_sparse_attention, x, ids, count)
    _, expected, *_ = block.run(sparse_attention_reference, x, ids, count)
    assert torch.equal(ring, expected) and (ring == x[:, None]).all(-1).any(-1).all()


@pytest.mark.parametrize("dtype", WEIGHTS)
def test_all_heads_in_blocks_that_do_not_divide_them(dtype, monkeypatch):
    small = {"ROWS": 4, "BLOCK_D": 16, "PROGRAMS": 2, "num_warps": 4}
    monkeypatch.setitem(override, "qkv_all", small)
    block = Attention(1, 3, 7, 40, 45, dtype, lazy=False, with_mean=False)  # 63 rows of Q, K and V
    x = block.draw.normal(1, 40, dtype=block.dtype)
    runs = (
        block.run(kernel, x, None, None, exact=kernel is sparse_attention_reference)
        for kernel in (_sparse_attention, sparse_attention_reference)
    )
    for ours, theirs in zip(*(run[:4] for run in runs), strict=True):
        assert_near(ours, theirs, block.dtype)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("dtype", WEIGHTS)
def test_a_key_has_the_same_bits_whenever_it_is_filled(dtype, batch):
    """The same inputs, once with all heads chosen at every step and once at the last alone."""
    N, H, D, steps = 2, 20, 40, 18  # more than a narrow product holds, less than a flush waits for
    filled = []
    for chosen_at in (range(steps), (steps - 1,)):
        block = Attention(batch, N, H, D, steps + 1, dtype, with_mean=False)
        block.filled_to.zero_()
        for t in range(steps):
            block.positions = torch.full((batch,), t, device=DEVICE)
            ids, count = Draw(t).ids(torch.full((batch, N), t in chosen_at))
            x = Draw(t).normal(batch, D, dtype=block.dtype)
            _, block.ring, block.keys, block.values, block.filled_to = block.run(
                _sparse_attention, x, ids, count
            )
            assert (block.filled_to == (t + 1 if t in chosen_at else 0)).all()
        filled.append(torch.stack([block.keys, block.values])[..., :steps, :])
    if DEVICE == "cpu" and dtype == torch.float32:  # the interpreter's own products round by their shapes
        torch.testing.assert_close(*filled)
    else:
        assert torch.equal(*filled)


@functools.cache
def sets_of_steps(steps, N):
    """Which heads each of three sequences chooses in each step; one is hardly ever chosen."""
    masks = Draw(5).mask(steps, 3, N, p=0.15)
    masks[:, :, -1] = False
    return masks


def test_heads_come_and_go_over_many_steps():
    """State carried from step to step, past the ring's end, flushes included, in float32."""
    N, H, D, steps = 3, 4, 16, 3 * W
    block = Attention(3, N, H, D, steps + 10, torch.float32)
    block.positions = torch.tensor([0, 4, 9], device=DEVICE)
    block.filled_to = block.positions[:, None].repeat(1, N)
    reference = Attention(3, N, H, D, steps + 10, torch.float32)
    reference.filled_to = block.filled_to.clone()
    flushed = 0
    for mask in sets_of_steps(steps, N):
        ids, count = block.draw.ids(mask)
        x = block.draw.normal(3, D, dtype=torch.float32)
        before = block.filled_to
        out, block.ring, block.keys, block.values, block.filled_to = block.run(
            _sparse_attention, x, ids, count, layer=7
        )
        reference.positions = block.positions
        expected, *state = reference.run(sparse_attention_reference, x, ids, count, layer=7)
        reference.ring, reference.keys, reference.values, reference.filled_to = state
        torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)
        assert torch.equal(block.filled_to, reference.filled_to)
        torch.testing.assert_close(block.keys, reference.keys, atol=1e-4, rtol=1e-4)
        flushed += int((block.filled_to > before)[~mask.to(DEVICE)].sum())
        block.positions = block.positions + 1
    assert flushed >= 9


@pytest.fixture(params=["last first", "by splits", "at random"])
def order_of_programs(request, monkeypatch):
    """The interpreter runs a launch's programs in another order than that of their numbers."""
    from triton.runtime.interpreter import interpreter_builder

    place = interpreter_builder.set_grid_idx

    def at(x, y, z):
        X, Y, Z = interpreter_builder.grid_dim
        number = (x * Y + y) * Z + z
        if request.param == "at random":
            order = torch.randperm(X * Y * Z, generator=torch.Generator().manual_seed(X * Y * Z))
            number = int(order[number])
        elif request.param == "last first":
            number = X * Y * Z - 1 - number
        else:
            number = (number % X) * Y * Z + number // X
        place(number // (Y * Z), number // Z % Y, number % Z)

    monkeypatch.setattr(interpreter_builder, "set_grid_idx", at)


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU has an order of its own")
@pytest.mark.usefixtures("order_of_programs")
@pytest.mark.parametrize("batch", [1, 3])
def test_the_order_of_programs_does_not_matter(batch):
    """Nor where one head lacks many keys and its neighbours few, whose partial sums lie side by side."""
    check_mlp(batch, 600, 50, Draw(0).mask(50, p=0.5), torch.float32)
    block = Attention(batch, 6, 20, 40, 45, torch.float32)
    lack = torch.tensor([17, 1, 2, 17, 1, 3]).expand(batch, -1)
    block.filled_to = (block.positions[:, None] + 1 - lack).clamp(min=0)
    ids, count = block.draw.ids(torch.ones(batch, 6, dtype=torch.bool))
    x = block.draw.normal(batch, 40, dtype=torch.float32)
    expected = block.run(sparse_attention_reference, x, ids, count, exact=True)
    found = block.run(_sparse_attention, x, ids, count)
    for ours, theirs in zip(found[:4], expected[:4], strict=True):
        assert_near(ours, theirs, torch.float32)
