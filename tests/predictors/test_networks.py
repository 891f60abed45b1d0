"""The scorers and what they are made by, against plain formulas in float64."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from dejavu.kernels.predict import standardise
from dejavu.predictors.networks import (
    GROUP,
    HeadContribution,
    LowRank,
    NeuronContribution,
    PackedLowRank,
    Random,
    Rows,
    SimHash,
    Static,
    dequantise,
    fold_norm,
    low_rank_of,
    quantise,
)


def normals(seed, *shapes):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes]


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_a_pre_norm_folds_in_exactly(with_bias, affine):
    residual, fc1, bias, gain, shift = normals(0, (2, 3, 16), (24, 16), (24,), (16,), (16,))
    gain, shift = (gain + 1, shift) if affine else (None, None)
    bias = bias if with_bias else None
    expected = F.linear(F.layer_norm(3 * residual + 1, (16,), gain, shift), fc1, bias)
    weight, folded = fold_norm(fc1, bias, gain, shift, pre_norm=True)
    torch.testing.assert_close(F.linear(standardise(3 * residual + 1), weight, folded), expected)


@pytest.mark.parametrize("with_bias", [True, False])
def test_a_post_norm_folds_in_for_a_stream_of_the_assumed_spread(with_bias):
    z, fc1, bias, gain, shift = normals(1, (2, 3, 16), (24, 16), (24,), (16,), (16,))
    gain, bias = gain + 1, bias if with_bias else None
    deviation = (gain.square().mean() + (shift - shift.mean()).square().mean()).sqrt()
    stream = shift.mean() + deviation * F.layer_norm(z, (16,), eps=0)
    weight, folded = fold_norm(fc1, bias, gain, shift, pre_norm=False)
    found = F.linear(standardise(stream), weight, folded)
    torch.testing.assert_close(found, F.linear(stream, fc1, bias), atol=1e-3, rtol=0)  # the norm's eps


def test_a_post_norm_assumes_what_a_typical_token_has():
    z, gain, shift = normals(2, (200, 512), (512,), (512,))
    stream = F.layer_norm(z, (512,), gain + 1, shift)
    weight, bias = fold_norm(torch.eye(512).double(), None, gain + 1, shift, pre_norm=False)
    assert float(stream.mean()) == pytest.approx(float(bias[0]), abs=0.02)
    assert float(stream.std(-1).mean()) == pytest.approx(float(weight[0, 0]), rel=0.02)
    assert torch.count_nonzero(weight) == 512 and (bias == bias[0]).all()


def covariance_root(D):
    (mixing,) = normals(3, (D, D))
    values, vectors = torch.linalg.eigh(mixing @ mixing.T / D + 0.01 * torch.eye(D))
    return vectors * values.sqrt() @ vectors.T


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("n, D", [(24, 16), (10, 16)])
def test_full_rank_is_exact(n, D, weighted):
    (weight,) = normals(4, (n, D))
    down, up = low_rank_of(weight, min(n, D), covariance_root(D) if weighted else None)
    assert down.shape == (min(n, D), D) and up.shape == (n, min(n, D))
    torch.testing.assert_close(up @ down, weight)


@pytest.mark.parametrize("weighted", [False, True])
def test_a_lower_rank_is_the_best_there_is(weighted):
    (weight,) = normals(5, (24, 16))
    scale = covariance_root(16) if weighted else torch.eye(16, dtype=torch.float64)

    def error(down, up):
        return float(((up @ down - weight) @ scale).norm())

    down, up = low_rank_of(weight, 5, scale if weighted else None)
    best = error(down, up)
    left_out = torch.linalg.svdvals(weight @ scale)[5:]
    assert best == pytest.approx(float(left_out.norm()))  # Eckart and Young
    for i in range(20):
        for size in (1e-3, 0.1):
            d, u = normals(i, down.shape, up.shape)
            assert error(down + size * d, up + size * u) > best
    if weighted:
        assert error(*low_rank_of(weight, 5)) > best


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("D", [2 * GROUP, GROUP, 100, 7])
def test_quantised_weights(bits, D):
    weight = normals(bits, (9, D))[0].float() * torch.logspace(-2, 2, 9)[:, None]
    codes, scales = quantise(weight, bits)
    top, groups = 2 ** (bits - 1) - 1, D // GROUP if D % GROUP == 0 and bits < 8 else 1
    assert codes.dtype == torch.int8 and codes.shape == weight.shape and int(codes.abs().max()) <= top
    assert scales.dtype == (torch.float16 if bits < 8 else torch.float32) and scales.shape == (9, groups)
    found = dequantise(codes, scales)
    assert found.dtype == torch.float32
    expected = codes.view(9, groups, -1) * scales.float()[..., None]
    torch.testing.assert_close(found, expected.view(9, D), atol=0, rtol=0)
    # rounding to a grid up to the peak is off by half a step at most, and the best scale is no worse
    grouped = weight.view(9, groups, -1)
    half_step = grouped.abs().amax(-1) / top / 2
    assert ((found - weight).view(grouped.shape).square().mean(-1).sqrt() <= half_step * 1.01).all()


def test_more_bits_are_closer_and_a_smaller_scale_can_be_better():
    weight = normals(0, (16, 4 * GROUP))[0].float()
    errors = [float((dequantise(*quantise(weight, bits)) - weight).norm()) for bits in (2, 3, 4, 8)]
    assert errors == sorted(errors, reverse=True)
    peak = weight.view(16, 4, -1).abs().amax(-1, keepdim=True)
    to_the_peak = ((weight.view(16, 4, -1) / peak).round() * peak).view_as(weight)
    assert errors[0] < 0.8 * float((to_the_peak - weight).norm())


def test_what_lies_on_the_grid_stays():
    codes = torch.randint(-7, 8, (5, GROUP), generator=torch.Generator().manual_seed(0))
    codes[:, 0], codes[4] = 7, 0  # the peak of each row; a row of zeros
    weight = codes * torch.tensor([0.25, 2.0, 1.0, 2**-8, 1.0])[:, None]
    assert torch.equal(dequantise(*quantise(weight, 4)), weight)


@pytest.mark.parametrize("D", [4 * GROUP, 100])
def test_what_was_stored_in_8_bits_is_what_the_kernels_read(D):
    sizes = torch.logspace(-7, 3, 24)[:, None]  # of rows
    down, up = normals(3, (16, D), (24, 16))
    stored = [dequantise(*quantise(w.float(), 8)) for w in (down * sizes[:16], up * sizes)]
    packed = PackedLowRank(LowRank(*stored, torch.zeros(24)), 8)
    for name, weight in zip(("down", "up"), stored, strict=True):
        torch.testing.assert_close(packed._wide(name), weight, atol=0, rtol=1e-6)


@pytest.mark.parametrize("relu", [False, True])
def test_low_rank(relu):
    z, down, up, bias = normals(6, (2, 3, 16), (5, 16), (24, 5), (24,))
    hidden = z @ down.T
    expected = (hidden.clamp(min=0) if relu else hidden) @ up.T + bias
    scores = LowRank(down, up, bias, relu=relu)(z)
    assert scores.shape == (2, 3, 24)
    torch.testing.assert_close(scores, expected)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("bits", [16, 8])
def test_a_packed_network_is_nearly_the_same(bits, relu):
    residual, down, up, bias = normals(7, (4, 1, 64), (16, 64), (200, 16), (200,))
    network = LowRank(down.float(), up.float(), bias.float(), relu=relu)
    packed = PackedLowRank(network, bits).at(3.0)
    assert {p.dtype for p in (packed.down, packed.up)} == {torch.float16 if bits == 16 else torch.int8}
    z = standardise(residual.float())
    scores, expected = packed(z)[:, 0], network(z)[:, 0]
    assert (scores - expected).norm() <= (1e-3 if bits == 16 else 3e-2) * expected.norm()
    alive = torch.tensor([1, 0, 1, 1])
    chosen = (scores > 3) & alive.bool()[:, None]
    ids, count = packed.active_set(residual[:, 0].float(), alive, union=True)
    assert ids[: int(count)].tolist() == chosen.any(0).nonzero()[:, 0].tolist() and 0 < count < 200
    ids, counts = packed.active_set(residual[:, 0].float(), alive, union=False)
    assert counts.tolist() == chosen.sum(1).tolist() and counts[1] == 0
    for row, k, mask in zip(ids, counts, chosen, strict=True):
        assert row[:k].tolist() == mask.nonzero()[:, 0].tolist()
    assert packed.tally.tolist() == [int(count) + int(counts.sum()), 1 + 3]
    other = packed.at(-1e9)
    assert other.active_set(residual[:, 0].float(), alive, union=True)[1] == 200
    assert other.tally.tolist() == [200, 1] and packed.threshold == 3 and other.down is packed.down


@pytest.mark.parametrize("bits", [16, 8])
def test_the_layers_of_few_heads_are_one_matrix(bits):
    residual, down, up, bias = normals(8, (4, 1, 64), (16, 64), (3, 16), (3,))
    network = LowRank(down.float(), up.float(), bias.float())
    packed = PackedLowRank(network, bits).at(0.5)
    assert packed.down.shape == (3, 64) and packed.down.dtype == torch.float32
    z = standardise(residual.float())
    torch.testing.assert_close(packed(z), network(z), atol=1e-4, rtol=1e-4)
    ids, counts = packed.active_set(residual[:, 0].float(), None, union=False)
    for row, k, scores in zip(ids, counts, network(z)[:, 0], strict=True):
        assert row[:k].tolist() == (scores > 0.5).nonzero()[:, 0].tolist()
    relu = PackedLowRank(LowRank(down.float(), up.float(), bias.float(), relu=True), bits)
    assert relu.down.shape == (16, 64)


def test_rows():
    z, weight, bias = normals(7, (2, 3, 16), (24, 16), (24,))
    torch.testing.assert_close(Rows(weight, bias)(z), z @ weight.T + bias)
    signs = torch.where(z > 0, 1.0, -1.0) * z.abs().mean(-1, keepdim=True)
    torch.testing.assert_close(Rows(weight, bias, signs=True)(z), signs @ weight.T + bias)


def test_more_planes_estimate_better():
    z, rows, bias = normals(8, (2, 3, 16), (40, 16), (40,))
    exact, errors = z @ rows.T + bias, []
    for M in (16, 256, 4096, 65536):
        (planes,) = normals(M, (M, 16))
        codes = torch.where(rows @ planes.T > 0, 1.0, -1.0).double()
        scores = SimHash(planes, codes, rows.norm(dim=-1), bias)(z)
        assert scores.shape == (2, 3, 40)
        errors.append(float((scores - exact).square().mean().sqrt()))
    assert all(later < earlier / 2 for earlier, later in pairwise(errors))
    assert errors[-1] < 0.15 < float(exact.std()) / 10


def test_static_scores_are_the_same_everywhere():
    (scores,) = normals(9, (24,))
    found = Static(scores)(torch.tensor([[0, 5, 9], [2, 2, 7]]))
    assert found.shape == (2, 3, 24) and (found == scores).all()


def scores_at(positions, n=64, *, layer=0, seed=0):
    return Random(torch.arange(n), layer=layer, seed=seed)(positions)


def test_random_scores_are_uniform_and_unrelated():
    positions = torch.arange(500)[None]
    scores = scores_at(positions)
    assert scores.shape == (1, 500, 64) and scores.min() >= 0 and scores.max() < 1
    shares = torch.histc(scores, bins=20, min=0, max=1) / scores.numel()
    torch.testing.assert_close(shares, torch.full((20,), 0.05), atol=0.005, rtol=0)  # 4 deviations
    assert float(scores.mean()) == pytest.approx(0.5, abs=0.007)
    others = [
        scores_at(positions, layer=1),
        scores_at(positions, seed=1),
        scores_at(positions + 1),
        scores_at(positions, 65)[..., 1:],
        scores_at(positions, layer=1, seed=1),
    ]
    for other in others:
        assert abs(float(torch.corrcoef(torch.stack([scores.flatten(), other.flatten()]))[0, 1])) < 0.025
    assert torch.equal(scores, scores_at(positions))
    assert (torch.corrcoef(scores[0].T) - torch.eye(64)).abs().max() < 0.25  # neurons among themselves


def test_random_scores_do_not_depend_on_the_ranks():
    positions = torch.tensor([[3, 4], [900, 0]])
    whole = scores_at(positions)
    parts = [Random(ids, layer=0, seed=0)(positions) for ids in torch.arange(64).split(16)]
    assert torch.equal(torch.cat(parts, dim=-1), whole)
    assert torch.equal(scores_at(positions[1:]), whole[1:])  # nor on the batch


def test_a_neurons_contribution():
    hidden, fc2 = normals(10, (2, 3, 24), (24, 16))
    hidden = hidden.relu()
    found = NeuronContribution(fc2.norm(dim=-1))(hidden)
    torch.testing.assert_close(found, (hidden[..., None] * fc2).norm(dim=-1))
    half = NeuronContribution(fc2.norm(dim=-1).float())(hidden.half())
    assert half.dtype == torch.float32
    assert torch.equal(found > 0, hidden > 0)  # what lossless rests on


@pytest.mark.parametrize("with_mean", [True, False])
def test_a_heads_contribution(with_mean):
    outputs, out_proj, mean = normals(11, (2, 3, 4, 8), (4, 8, 32), (4, 8))
    mean = mean if with_mean else torch.zeros_like(mean)
    expected = torch.einsum("bsnh,nhd->bsnd", outputs - mean, out_proj).norm(dim=-1)
    found = HeadContribution(out_proj, mean if with_mean else None)(outputs)
    torch.testing.assert_close(found, expected)
    nothing = HeadContribution(out_proj, mean)(mean.expand(1, 1, 4, 8))
    assert torch.equal(nothing, torch.zeros(1, 1, 4, dtype=torch.float64))


def test_scorers_are_no_place_for_gradients():
    tensors = normals(12, (5, 16), (24, 5), (24,), (24, 16), (24, 5), (4, 8, 32), (4, 8))
    down, up, bias, weight, codes, out_proj, mean = tensors
    scorers = [
        LowRank(down, up, bias),
        Rows(weight, bias),
        SimHash(down, codes, bias, bias),
        Static(bias),
        NeuronContribution(bias),
        HeadContribution(out_proj, mean),
    ]
    assert not any(p.requires_grad for scorer in scorers for p in scorer.parameters())
