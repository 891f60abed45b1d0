"""Taps, sets, what a policy makes of scores, and when and where it does so."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from dejavu.kernels.predict import standardise
from dejavu.kernels.sparse_mlp import sparse_mlp
from dejavu.predictors.networks import LowRank, NeuronContribution, PackedLowRank, Static
from dejavu.predictors.selection import (
    EVERYTHING,
    KINDS,
    ActiveSet,
    Chosen,
    Fixed,
    HeadMean,
    Live,
    Masked,
    Policy,
    SetBuffers,
    Tap,
    Unit,
)

TAPS = st.builds(Tap, st.sampled_from(["attn_in", "mlp_in"]), st.integers(0, 200))


@given(TAPS)
def test_a_tap_is_read_as_it_is_written(tap):
    assert Tap.parse(str(tap)) == tap
    assert str(Tap("mlp_in", 7)) == "mlp_in[7]"


@pytest.mark.parametrize(
    "text",
    ["", "attn_in", "attn_in[]", "attn_in[-1]", "mlp[3]", "mlp_in[3] ", "mlp_in[1.5]", None, 3],
)
def test_what_is_no_tap(text):
    with pytest.raises(ValueError, match=r"is no tap: expected attn_in\[LAYER\] or mlp_in\[LAYER\]") as error:
        Tap.parse(text)
    assert repr(text) in str(error.value)


@given(TAPS, st.integers(-9, 9), st.integers(-9, 9))
def test_taps_follow_one_another(tap, a, b):
    assert tap.shift(0) == tap and tap.shift(a).shift(b) == tap.shift(a + b)
    assert tap.shift(2) == Tap(tap.point, tap.layer + 1)
    assert Tap("attn_in", tap.layer).shift(1) == Tap("mlp_in", tap.layer)
    assert Tap("mlp_in", tap.layer).shift(1) == Tap("attn_in", tap.layer + 1)
    assert Tap("attn_in", tap.layer + 1).shift(-1) == Tap("mlp_in", tap.layer)


def named(chosen):
    """The sets ``[B][count]`` that a `Chosen` names."""
    ids = chosen.ids.reshape(len(chosen.count), -1)
    return [row[:count].tolist() for row, count in zip(ids, chosen.count.tolist(), strict=True)]


@given(st.lists(st.booleans(), min_size=1, max_size=20))
def test_one_set_of_a_batch(mask):
    chosen = Chosen.from_mask(torch.tensor(mask))
    assert chosen.ids.shape == (len(mask),) and chosen.count.shape == (1,)
    assert chosen.ids.dtype == chosen.count.dtype == torch.int32
    assert named(chosen) == [[i for i, yes in enumerate(mask) if yes]]
    assert sorted(chosen.ids.tolist()) == list(range(len(mask)))


def test_a_set_of_each_sequence():
    mean = HeadMean(torch.zeros(3, 2), torch.zeros(6))
    chosen = Chosen.from_mask(torch.tensor([[True, False, True], [False] * 3, [True] * 3]), mean)
    assert named(chosen) == [[0, 2], [], [0, 1, 2]] and chosen.mean is mean


def test_what_is_taken_out_leaves_nothing_or_the_mean():
    g = torch.Generator().manual_seed(0)
    hidden, heads, mean = (torch.randn(s, generator=g) for s in ((2, 3, 4), (2, 3, 4, 5), (4, 5)))
    mask = torch.rand(2, 3, 4, generator=g) < 0.5
    assert torch.equal(Masked(mask).apply(hidden), hidden * mask)
    assert torch.equal(Masked(mask).apply(heads), heads * mask[..., None])
    found = Masked(mask, HeadMean(mean.double(), torch.zeros(1))).apply(heads)
    assert torch.equal(found, torch.where(mask[..., None], heads, mean)) and found.dtype == heads.dtype
    assert not Masked(mask).apply(torch.full((2, 3, 4), torch.nan))[~mask].isnan().any()


def test_selectors_that_are_given_their_sets():
    sets = [ActiveSet(), ActiveSet(neurons=Chosen.from_mask(torch.ones(3, dtype=torch.bool)))]
    assert Fixed(sets).neurons(1, None) is sets[1].neurons
    assert Fixed(sets).neurons(0, None) is Fixed(sets).heads(1, None) is None
    assert EVERYTHING.heads(0, None) is EVERYTHING.neurons(5, None) is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_tap_is_standardised(dtype):
    x = (torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0)) * 300 + 50).to(dtype)
    z = standardise(x)
    assert z.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(z.mean(-1), torch.zeros(2, 3, dtype=z.dtype), atol=1e-5, rtol=0)
    torch.testing.assert_close(z.var(-1, correction=0), torch.ones(2, 3, dtype=z.dtype), atol=1e-4, rtol=0)


class Given(nn.Module):
    """Scores that are what they are, whatever is read; keeps what it was given."""

    def __init__(self, scores):
        super().__init__()
        self.scores = scores
        self.seen = []

    def forward(self, x):
        self.seen.append(x)
        return self.scores


SCORES = torch.tensor([[0.9, 0.1, 0.6, 0.5], [0.2, 0.1, 0.8, 0.7], [0.4, 0.95, 0.3, 0.1]])[:, None]


def unit(kind="mlp", layer=0, scores=SCORES, threshold=0.5, **settings):
    return Unit(kind, layer, None, Given(scores), threshold=threshold, **settings)


def begun(units, *, num_layers=1, alive=None, positions=None, **settings):
    """A policy in the middle of a pass over three sequences."""
    policy = Policy(units, num_layers, **settings)
    policy.begin(torch.zeros(3, 1, dtype=torch.int64) if positions is None else positions, alive)
    return policy


@pytest.mark.parametrize(
    "alive, union", [(None, [0, 1, 2, 3]), ([1, 1, 0], [0, 2, 3]), ([0, 0, 1], [1]), ([0, 0, 0], [])]
)
def test_neurons_are_shared_by_the_live(alive, union):
    alive = None if alive is None else torch.tensor(alive)
    policy = begun([unit()], alive=alive)
    chosen = policy.neurons(0, None)
    assert chosen.ids.shape == (4,) and named(chosen) == [union]
    assert float(policy.density("mlp")) == pytest.approx(len(union) / 4)


@pytest.mark.parametrize("max_batch, chosen", [(2, False), (3, True), (4, True), (None, True)])
def test_where_the_union_of_many_does_not_pay_all_neurons_are_computed(max_batch, chosen):
    policy = begun([unit(max_batch=max_batch), unit("heads", max_batch=max_batch)])
    assert (policy.neurons(0, None) is not None) == chosen and policy.heads(0, None) is not None
    alone = Policy([unit(max_batch=max_batch, scores=SCORES[:1])], 1)
    alone.begin(torch.zeros(1, 1, dtype=torch.int64), None)
    assert alone.neurons(0, None) is not None
    assert (float(policy.density("mlp")) == 1) == (
        not chosen or named(policy.neurons(0, None)) == [[0, 1, 2, 3]]
    )


@pytest.mark.parametrize("kind, sharing", [("heads", "union"), ("heads", "each"), ("mlp", "each")])
def test_each_sequence_has_its_own(kind, sharing):
    mean = HeadMean(torch.zeros(4, 2), torch.zeros(8))
    for alive, sets in ((None, [[0, 2], [2, 3], [1]]), (torch.tensor([1, 0, 1]), [[0, 2], [], [1]])):
        policy = begun([unit(kind, mean=mean)], alive=alive, sharing=sharing)
        chosen = policy.heads(0, None) if kind == "heads" else policy.neurons(0, None)
        assert named(chosen) == sets and chosen.mean is mean
        live = 3 if alive is None else 2
        assert float(policy.density(kind)) == pytest.approx(sum(map(len, sets)) / (4 * live))


@pytest.mark.parametrize("kind", ["mlp", "heads"])
def test_a_whole_pass_has_a_set_for_every_token(kind):
    g = torch.Generator().manual_seed(1)
    scores = torch.rand(2, 6, 4, generator=g)
    mean = HeadMean(torch.zeros(4, 2), torch.zeros(8))
    policy = begun(
        [unit(kind, scores=scores, mean=mean)],
        positions=torch.arange(6).expand(2, -1),
        sharing="mask",
        dense_until=2,
    )
    ask = policy.heads if kind == "heads" else policy.neurons
    choice = ask(0, lambda: torch.zeros(2, 6, 4))
    assert isinstance(choice, Masked) and choice.mean is mean
    assert choice.mask[:, :2].all() and torch.equal(choice.mask[:, 2:], scores[:, 2:] > 0.5)
    assert float(policy.density(kind)) == pytest.approx(float((scores[:, 2:] > 0.5).float().mean()))


@given(st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=3, max_size=3), st.data())
def test_a_union_is_what_some_live_sequence_wants(wants, data):
    alive = torch.tensor(data.draw(st.lists(st.booleans(), min_size=3, max_size=3)))
    mask = torch.tensor(wants)
    policy = begun(
        [unit(scores=mask.float()[:, None]), unit("heads", scores=mask.float()[:, None])], alive=alive
    )
    live = mask[alive]
    assert named(policy.neurons(0, None)) == [live.any(0).nonzero().flatten().tolist()]
    for found, row, is_alive in zip(named(policy.heads(0, None)), mask, alive, strict=True):
        assert found == (row & is_alive).nonzero().flatten().tolist()
    assert float(policy.density("heads")) == pytest.approx(float(live.float().mean()) if len(live) else 0)


def test_layers_without_a_unit_are_dense():
    policy = begun([unit(layer=1)], num_layers=4)
    assert policy.neurons(0, None) is policy.heads(0, None) is policy.heads(1, None) is None
    assert policy.chooses("mlp") and not policy.chooses("heads")
    assert float(policy.density("mlp")) == 1  # nothing was asked yet
    policy.neurons(1, None)
    assert float(policy.density("mlp")) == pytest.approx((3 + 1) / 4)
    assert policy.density("heads").tolist() == [1] and policy.density("heads").dtype == torch.float32


def test_density_is_a_mean_over_tokens_and_layers_since_the_last_call():
    scores = [SCORES.clone(), torch.zeros(3, 1, 4)]
    units = [unit("heads", 0, scores[0]), unit("heads", 2, scores[1]), unit("mlp", 0)]
    policy = Policy(units, 3)
    for alive in (torch.tensor([1, 1, 1]), torch.tensor([1, 0, 0])):
        policy.begin(torch.zeros(3, 1, dtype=torch.int64), alive)
        policy.heads(0, None), policy.heads(2, None), policy.neurons(0, None)
    assert float(policy.density("heads")) == pytest.approx(((5 + 2) / (12 + 4) + 0 + 1) / 3)  # of live tokens
    assert float(policy.density("mlp")) == pytest.approx(((1 + 2 / 4) / 2 + 2) / 3)  # heads' call left it
    assert float(policy.density("heads")) == float(policy.density("mlp")) == 1


def test_chosen_is_what_is_above_the_threshold():
    policy = begun([unit(threshold=0.1), unit("heads", threshold=-torch.inf)], sharing="each")
    assert named(policy.neurons(0, None)) == [[0, 2, 3], [0, 2, 3], [0, 1, 2]]  # above it, not at it
    assert named(policy.heads(0, None)) == [[0, 1, 2, 3]] * 3


def test_a_second_stage_chooses_among_the_chosen():
    tap = Tap("attn_in", 0)
    second = Unit("mlp", 0, tap, Given(torch.tensor([[[1.0, 1.0, 0.0, 1.0]]]).expand(3, 1, 4)), threshold=0.5)
    policy = begun([unit(refine=second)], sharing="each")
    policy.observe(tap, torch.randn(3, 1, 8))
    assert named(policy.neurons(0, None)) == [[0], [3], [1]]
    assert len(second.scorer.seen) == 1
    third = unit(scores=torch.zeros(3, 1, 4), threshold=0.0)
    second.refine = third
    policy = begun([unit(refine=unit(refine=third))], sharing="each")
    assert named(policy.neurons(0, None)) == [[], [], []]


def test_scorers_read_the_tap_standardised():
    tap, residual = Tap("mlp_in", 0), 5 * torch.randn(3, 1, 8) + 2
    reader = Unit("heads", 1, tap, Given(SCORES), threshold=0.5)
    policy = begun([reader], num_layers=2)
    policy.observe(Tap("attn_in", 0), residual - 1)
    policy.observe(tap, residual)
    torch.testing.assert_close(reader.scorer.seen, [standardise(residual)])
    assert named(policy.heads(1, None)) == [[0, 2], [2, 3], [1]]


def test_a_unit_is_not_asked_before_its_tap():
    reader = Unit("heads", 0, Tap("attn_in", 0), Given(SCORES))
    policy = begun([reader])
    with pytest.raises(AssertionError, match=r"heads of layer 0 was asked before attn_in\[0\]"):
        policy.heads(0, None)
    policy.observe(reader.tap, torch.randn(3, 1, 8))
    policy.begin(torch.ones(3, 1, dtype=torch.int64), None)  # what an earlier pass saw is forgotten
    with pytest.raises(AssertionError, match="was asked before"):
        policy.heads(0, None)


def test_only_those_that_see_the_truth_ask_for_it():
    truth, positions = torch.randn(3, 1, 4), torch.tensor([[4], [7], [2]])
    seeing, blind = unit(sees_truth=True), unit("heads")
    policy = begun([seeing, blind], positions=positions)
    policy.neurons(0, lambda: truth)
    policy.heads(0, None)
    assert seeing.scorer.seen == [truth] and blind.scorer.seen == [positions]


def test_two_units_of_one_layer_are_a_mistake():
    with pytest.raises(AssertionError, match="one unit a kind and layer"):
        Policy([unit(), unit()], 1)
    assert Policy([unit(), unit("heads")], 1).name == "policy"


def test_what_scoring_reads():
    scorer = Static(torch.zeros(10))
    units = [
        Unit("mlp", 0, None, scorer, refine=Unit("mlp", 0, None, Static(torch.zeros(3)))),
        Unit("heads", 0, None, scorer, sees_truth=True),
    ]
    assert Policy(units, 1).read_bytes() == 4 * 13


def test_what_the_kernels_choose_is_what_scores_choose():
    """A policy of packed predictors, asked once through its scores and once at its taps in one go."""
    g = torch.Generator().manual_seed(1)
    units = []
    for kind, tap, n in (("mlp", Tap("attn_in", 1), 40), ("heads", Tap("mlp_in", 0), 6)):
        network = LowRank(*(torch.randn(s, generator=g) for s in ((5, 16), (n, 5), (n,))))
        units.append(Unit(kind, 1, tap, PackedLowRank(network, 16), threshold=0.5))
    residual, alive = torch.randn(3, 1, 16, generator=g), torch.tensor([1, 1, 0])
    for sharing in ("union", "each"):
        policy = Policy(units, 2, sharing=sharing)
        policy.begin(torch.zeros(3, 1, dtype=torch.int64), alive)
        for tap in (Tap("mlp_in", 0), Tap("attn_in", 1), Tap("mlp_in", 1)):
            policy.observe(tap, residual)
        assert policy.heads(0, None) is None
        for kind, unit in zip(("mlp", "heads"), units, strict=True):
            mask = (unit.scorer(standardise(residual))[:, 0] > 0.5) & alive.bool()[:, None]
            if kind == "mlp" and sharing == "union":
                mask = mask.any(0, keepdim=True)
            chosen = policy.neurons(1, None) if kind == "mlp" else policy.heads(1, None)
            assert named(chosen) == [row.nonzero()[:, 0].tolist() for row in mask]
            rows = 1 if len(mask) == 1 else 2
            share = (float(mask.sum()) / mask.shape[1] / rows + 1) / 2  # the other layer is dense
            assert float(policy.density(kind)) == pytest.approx(share)


def packed(kind, layer, tap, n, seed=0, **settings):
    """A unit whose sets the kernels find."""
    g = torch.Generator().manual_seed(seed)
    network = LowRank(*(torch.randn(s, generator=g) for s in ((5, 16), (n, 5), (n,))))
    return Unit(kind, layer, tap, PackedLowRank(network, 8), threshold=0.5, **settings)


MEAN = HeadMean(torch.zeros(6, 2), torch.zeros(12))
ALIVE = torch.tensor([1, 1, 0])


def packed_units():
    """In a model of three layers, the last of which is dense."""
    return [
        packed("mlp", 0, Tap("attn_in", 0), 40, seed=1),
        packed("mlp", 1, Tap("attn_in", 1), 37, seed=2),
        packed("heads", 1, Tap("mlp_in", 0), 6, seed=3, mean=MEAN),
    ]


def mask_of(unit, residual, *, union):
    """What a packed unit should choose for those alive."""
    mask = (unit.scorer(standardise(residual))[:, 0] > unit.threshold) & ALIVE.bool()[:, None]
    return mask.any(0, keepdim=True) if union else mask


def rows_of(mask):
    return [row.nonzero()[:, 0].tolist() for row in mask]


class Side:
    """A side stream that keeps account of what happens in which order."""

    def __init__(self, log, kind):
        self.log, self.kind = log, kind

    @contextmanager
    def beside(self):
        self.log.append(f"{self.kind} begin")
        yield
        self.log.append("main")

    def mark(self):
        return f"{self.kind} end"

    def join(self, event):
        self.log.append(f"join {event}")


@pytest.fixture
def log(monkeypatch):
    """The predictors that have run, and whether beside other work."""
    log, find = [], PackedLowRank.active_set

    def active_set(self, *arguments, beside=False, **options):
        log.append(("predict", len(self.bias), beside))
        return find(self, *arguments, beside=beside, **options)

    monkeypatch.setattr(PackedLowRank, "active_set", active_set)
    return log


def in_a_step(overlap, sides=(), units=None):
    policy = Policy(units or packed_units(), 3)
    policy.sides, policy.overlap = dict(sides), overlap
    policy.begin(torch.zeros(3, 1, dtype=torch.int64), ALIVE)
    return policy


RESIDUAL = torch.randn(3, 1, 16, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("overlap", ["auto", "tap", "none"])
def test_predictors_start_at_their_tap(log, overlap):
    policy = in_a_step(overlap)
    policy.observe(Tap("attn_in", 2), RESIDUAL)
    assert log == []
    policy.observe(Tap("attn_in", 0), RESIDUAL)
    assert log == [("predict", 40, False)]
    policy.before_collective()
    policy.neurons(0, None)
    assert log == [("predict", 40, False)]  # once


def test_predictors_start_with_the_next_collective(log):
    policy = in_a_step("collective")
    policy.observe(Tap("mlp_in", 0), RESIDUAL)
    policy.observe(Tap("attn_in", 1), RESIDUAL)
    assert log == []
    policy.before_collective()
    assert log == [("predict", 6, False), ("predict", 37, False)]
    policy.before_collective()
    policy.heads(1, None), policy.neurons(1, None)
    assert len(log) == 2


@pytest.mark.parametrize(("overlap", "early"), [("auto", ["heads"]), ("tap", ["heads", "mlp"])])
def test_who_has_a_whole_layer_waits_for_a_collective(log, overlap, early):
    """And gives way to the main stream."""
    units = [packed("heads", 1, Tap("mlp_in", 0), 6), packed("mlp", 1, Tap("mlp_in", 0), 37)]
    assert [unit.halves_ahead for unit in units] == [1, 2]
    sides = {(k, patient): Side(log, f"{k} {patient}") for k in KINDS for patient in (False, True)}
    policy = in_a_step(overlap, sides, units)
    policy.observe(Tap("mlp_in", 0), RESIDUAL)
    patient = overlap == "auto"
    assert [entry for entry in log if "begin" in entry] == [f"{kind} {patient} begin" for kind in early]
    policy.before_collective()
    policy.heads(1, None), policy.neurons(1, None)
    assert [entry for entry in log if "begin" in entry] == [f"{kind} {patient} begin" for kind in KINDS[::-1]]
    assert log[-2:] == [f"join heads {patient} end", f"join mlp {patient} end"]


@pytest.mark.parametrize("overlap", ["auto", "collective"])
def test_asking_for_a_layer_starts_no_other(log, overlap):
    units = [packed("mlp", 0, Tap("attn_in", 0), 40), packed("mlp", 1, Tap("mlp_in", 0), 37)]
    policy = in_a_step(overlap, units=units)
    policy.observe(Tap("attn_in", 0), RESIDUAL)
    policy.before_collective()
    policy.observe(Tap("mlp_in", 0), RESIDUAL)
    policy.neurons(0, None)
    assert log == [("predict", 40, False)]
    policy.before_collective()
    assert log == [("predict", 40, False), ("predict", 37, False)]


def test_asking_for_what_waits_starts_no_other(log):
    policy = in_a_step("collective")
    policy.observe(Tap("attn_in", 1), RESIDUAL)
    policy.observe(Tap("attn_in", 0), RESIDUAL)
    policy.neurons(0, None)
    assert log == [("predict", 40, False)]
    policy.before_collective()
    assert log == [("predict", 40, False), ("predict", 37, False)]


def test_predictors_wait_for_no_collective_that_comes_after_their_layer(log):
    policy = in_a_step("collective")
    policy.observe(Tap("attn_in", 0), RESIDUAL)
    chosen = policy.neurons(0, None)
    assert log == [("predict", 40, False)]
    assert named(chosen) == rows_of(mask_of(policy.units["mlp", 0], RESIDUAL, union=True))


def test_a_pass_forgets_what_waits_for_a_collective(log):
    policy = in_a_step("collective")
    policy.observe(Tap("attn_in", 0), RESIDUAL)
    policy.begin(torch.ones(3, 1, dtype=torch.int64), ALIVE)
    policy.before_collective()
    assert log == []
    with pytest.raises(KeyError):
        policy.neurons(0, None)


@pytest.mark.parametrize("overlap", ["auto", "tap", "collective", "none"])
def test_the_main_stream_waits_for_a_set_when_it_asks(log, overlap):
    policy = in_a_step(overlap, {(kind, False): Side(log, kind) for kind in KINDS})
    policy.observe(Tap("mlp_in", 0), RESIDUAL)
    policy.observe(Tap("attn_in", 1), RESIDUAL)
    policy.before_collective()
    policy.heads(1, None), policy.neurons(1, None)
    heads, neurons = (("predict", n, overlap != "none") for n in (6, 37))
    beside = ["heads begin", heads, "main", "mlp begin", neurons, "main"]
    joins = ["join heads end", "join mlp end"]
    assert log == ([heads, neurons] if overlap == "none" else [*beside, *joins])


@pytest.mark.parametrize("sharing", ["union", "each"])
@pytest.mark.parametrize("overlap", ["auto", "tap", "collective", "none"])
def test_sets_lie_in_the_same_place_at_every_step(overlap, sharing):
    policy = Policy(packed_units(), 3, sharing=sharing)
    policy.overlap = overlap
    places, recorded, expected = set(), [], []
    for step in range(4):
        residual = torch.randn(3, 1, 16, generator=torch.Generator().manual_seed(step))
        policy.begin(torch.zeros(3, 1, dtype=torch.int64), ALIVE)
        for tap in policy._by_tap:
            policy.observe(tap, residual)
        chosen = [policy.neurons(0, None), policy.neurons(1, None), policy.heads(1, None)]
        places.add(tuple(t.data_ptr() for c in chosen for t in (c.ids, c.count)))
        recorded.append(policy.buffers(3).data.clone())
        shared = (sharing == "union", sharing == "union", False)
        units = policy.units.values()
        expected.append(
            [rows_of(mask_of(u, residual, union=union)) for u, union in zip(units, shared, strict=True)]
        )
        assert [named(c) for c in chosen] == expected[-1]
    assert len(places) == 1 and expected[0] != expected[1]
    assert policy.buffers(3) is policy.buffers(3) is not policy.buffers(2)

    given_sets = policy.given(3)
    assert given_sets.capturable
    for data, sets in zip(recorded, expected, strict=True):
        policy.buffers(3).data.copy_(data)
        found = [given_sets.neurons(0, None), given_sets.neurons(1, None), given_sets.heads(1, None)]
        assert [named(c) for c in found] == sets
        assert {tuple(t.data_ptr() for c in found for t in (c.ids, c.count))} == places
        assert [c.mean for c in found] == [None, None, MEAN]
    assert given_sets.heads(0, None) is given_sets.heads(2, None) is given_sets.neurons(2, None) is None


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 40)), min_size=1, max_size=6))
def test_buffers_begin_at_16_bytes_and_do_not_overlap(sizes):
    units = [SimpleNamespace() for _ in sizes]
    buffers = SetBuffers({id(u): s for u, s in zip(units, sizes, strict=True)}, torch.device("cpu"))
    views = []
    for unit, (sets, n) in zip(units, sizes, strict=True):
        ids, count = buffers.of(unit, union=False)
        assert ids.shape == (sets, n) and count.shape == (sets,)
        if sets == 1:
            flat, same = buffers.of(unit, union=True)
            assert flat.shape == (n,) and (flat.data_ptr(), same.data_ptr()) == (
                ids.data_ptr(),
                count.data_ptr(),
            )
        views += [ids, count]
    assert all(view.dtype == torch.int32 and view.data_ptr() % 16 == 0 for view in views)
    for number, view in enumerate(views, start=1):
        view.fill_(number)
    assert [set(view.flatten().tolist()) for view in views] == [{i + 1} for i in range(len(views))]
    assert int((buffers.data != 0).sum()) == sum(view.numel() for view in views)  # all of them lie in it


def lossless_unit(**settings):
    return Unit("mlp", 0, None, NeuronContribution(torch.rand(8) + 0.5), sees_truth=True, **settings)


@pytest.mark.parametrize("alive", [None, ALIVE])
def test_what_is_live_is_for_the_kernel_to_find(alive):
    unit = lossless_unit()
    policy = Policy([unit], 2)
    assert policy.capturable
    policy.begin(torch.zeros(3, 1, dtype=torch.int64), alive)

    def truth():
        raise AssertionError("nothing need be computed twice")

    choice = policy.neurons(0, truth)
    assert isinstance(choice, Live) and choice.tally is unit.live_tally and choice.alive is alive
    assert policy.neurons(1, truth) is None

    g = torch.Generator().manual_seed(0)
    x, fc1, fc2, bias = (torch.randn(s, generator=g) for s in ((3, 1, 4), (8, 4), (8, 4), (8,)))
    bias -= 1.5  # few are live
    live = (x[:, 0] @ fc1.T + bias > 0) & (torch.ones(3) if alive is None else alive).bool()[:, None]
    union = int(live.any(0).sum())
    assert 0 < union < 8
    for times in (1, 2):
        for _ in range(times):
            sparse_mlp(x, fc1, None, bias, fc2, None, None, None, None, *choice)
        assert float(policy.density("mlp")) == pytest.approx((union / 8 + 1) / 2)
    assert float(policy.density("mlp")) == 1  # nothing since
    choice.tally.add_(torch.tensor([6, 2]))
    assert float(policy.density("mlp")) == pytest.approx((6 / 2 / 8 + 1) / 2)


@pytest.mark.parametrize(
    "settings, sharing, choice",
    [({}, "each", Chosen), ({}, "mask", Masked), ({"threshold": 0.3}, "union", Chosen)],
)
def test_what_is_live_is_scored_for_other_uses(settings, sharing, choice):
    policy = begun([lossless_unit(**settings)], sharing=sharing)
    assert isinstance(policy.neurons(0, lambda: torch.rand(3, 1, 8)), choice)
    assert not policy.capturable


def test_what_is_scored_in_plain_torch_is_not_captured():
    assert Policy(packed_units(), 3).capturable
    assert not Policy([*packed_units(), unit("heads", 2)], 3).capturable
    assert not Policy([packed("mlp", 0, Tap("attn_in", 0), 8, refine=unit())], 1).capturable
    assert not Policy(packed_units(), 3, sharing="mask").capturable
