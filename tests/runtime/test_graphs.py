"""Decode states, tokens on their way to the host, recorded steps: what needs no GPU of it."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dejavu.kernels.tokens import NO_TOKEN
from dejavu.parallel.watchdog import PeerLostError
from dejavu.predictors.selection import Policy
from dejavu.runtime import decoding, graphs
from dejavu.runtime import engine as engine_module
from dejavu.runtime.engine import Engine
from dejavu.runtime.graphs import MAX_BATCH, TokenMail, bucket
from dejavu.runtime.sampling import SamplingParams

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = ["It was a dark night", "Once", "The old man looked at the sea, and the sea", "He said", "A"]
SPARSITIES = ("dense", "lossless", "demo")


@pytest.fixture(scope="module")
def engines():
    return {
        sparsity: Engine.from_pretrained("demo", device="cpu", sparsity=sparsity) for sparsity in SPARSITIES
    }


@pytest.fixture
def engine(engines):
    """A dense one, for a test to change."""
    return anew(engines["dense"])


def anew(engine, **options):
    """Another engine over the same model and policy."""
    settings = {"policy": engine.policy, "fill_kv": engine.fill_kv, **options}
    return Engine(engine.model, engine.tokenizer, engine.tp, engine.fingerprint, **settings)


def prefilled(engine, params):
    return engine.prefill([engine.tokenize(p, q) for p, q in zip(PROMPTS, params, strict=False)], params)


def answers(engine, params, **options):
    generation = engine.generate(PROMPTS[: len(params)], params, **options)
    return [(r.token_ids, r.text, r.finish_reason) for r in generation.results]


@given(st.integers(1, 10_000))
def test_a_bucket_is_the_next_power_of_2(n):
    size = bucket(n)
    assert size.bit_count() == 1 and size >= n > size // 2


def test_mail_holds_what_was_sent_whatever_the_tokens_become():
    tokens = torch.tensor([3, 1])
    mail = TokenMail(tokens)
    mail.send()
    tokens.copy_(torch.tensor([NO_TOKEN, 7]))
    mail.send()
    tokens.zero_()
    assert mail.receive() == [3, 1]
    mail.send()
    tokens.fill_(9)
    assert [mail.receive(), mail.receive()] == [[NO_TOKEN, 7], [0, 0]]
    assert mail.ahead == 0  # a CPU has computed a step when it has launched it


def test_mail_has_two_slots():
    mail = TokenMail(torch.zeros(1, dtype=torch.int64))
    mail.send(), mail.send()
    with pytest.raises(AssertionError, match="a slot is read before it is written again"):
        mail.send()
    mail.receive()
    mail.send()


class Event:
    """Has come after so many questions."""

    def __init__(self, questions):
        self.questions = questions
        self.records = 0

    def record(self):
        self.records += 1

    def query(self):
        self.questions -= 1
        return self.questions < 0


def test_mail_waits_until_its_event_has_come():
    mail, events = TokenMail(torch.tensor([5])), [Event(3), Event(0)]
    mail._arrived = events
    mail.send(), mail.send()
    assert [e.records for e in events] == [1, 1]
    assert mail.receive() == [5] and events[0].questions == -1 and events[1].questions == 0


def test_mail_that_never_comes_is_an_error(monkeypatch):
    monkeypatch.setattr(graphs, "step_timeout_s", lambda: 0.01)
    mail = TokenMail(torch.tensor([5]))
    mail._arrived = [Event(10**9), Event(0)]
    mail.send()
    with pytest.raises(PeerLostError, match="a step has not ended after 0 s: a rank hangs"):
        mail.receive()


def test_the_device_ends_a_sequence_whose_tokens_are_used_up(engine):
    params = [SamplingParams(max_new_tokens=n, ignore_eos=True) for n in (1, 3, 4)]
    state = prefilled(engine, params)
    start = state.cache.lengths.clone()
    assert start.tolist() == [len(engine.tokenize(p, params[0])) for p in PROMPTS[:3]]
    seen = [(state.alive.tolist(), state.left.tolist(), [0, 0, 0])]
    for _ in range(5):
        engine.decode_step(state)
        seen.append((state.alive.tolist(), state.left.tolist(), (state.cache.lengths - start).tolist()))
    assert seen == [
        ([0, 1, 1], [0, 2, 3], [0, 0, 0]),
        ([0, 1, 1], [0, 1, 2], [0, 1, 1]),
        ([0, 0, 1], [0, 0, 1], [0, 2, 2]),
        ([0, 0, 0], [0, 0, 0], [0, 2, 3]),
        ([0, 0, 0], [0, 0, 0], [0, 2, 3]),
        ([0, 0, 0], [0, 0, 0], [0, 2, 3]),
    ]


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_the_device_ends_a_sequence_at_its_end_of_text(engines, sparsity, monkeypatch):
    engine = anew(engines[sparsity])
    params = [SamplingParams(max_new_tokens=12)] * 2
    (free, _, _), (other, _, _) = answers(engine, params)
    place, end = next((i, t) for i, t in enumerate(free) if i and t not in (*free[:i], *other))
    monkeypatch.setattr(engine.model, "config", replace(engine.model.config, eos_token_id=end))
    state = prefilled(engine, params)
    assert state.last.tolist() == [end, end]
    start, drawn, alive, lengths = state.cache.lengths.clone(), [], [], []
    for _ in range(11):
        drawn.append(state.tokens.tolist())
        alive.append(state.alive.tolist())
        lengths.append((state.cache.lengths - start).tolist())
        engine.decode_step(state)
    assert [row[0] for row in drawn[: place + 1]] == free[: place + 1]
    assert [row[1] for row in drawn] == other[:11]
    assert alive == [[int(i < place), 1] for i in range(11)]
    assert lengths == [[min(i, place), i] for i in range(11)]

    ignoring = prefilled(engine, [replace(p, ignore_eos=True) for p in params])
    for _ in range(place):
        engine.decode_step(ignoring)
    assert ignoring.last.tolist() == [NO_TOKEN] * 2
    assert ignoring.tokens.tolist()[0] == end and ignoring.alive.tolist() == [1, 1]


@torch.inference_mode()
def test_a_step_behind_a_row_without_a_token_serves_the_others(engine):
    """The host sees it a step later; until then some row of the embedding is read."""
    params = [SamplingParams(max_new_tokens=9)] * 2
    state = prefilled(engine, params)
    state.tokens[0], state.alive[0] = NO_TOKEN, 0
    engine.decode_step(state)
    assert state.alive.tolist() == [0, 1]
    (_, (other, _, _)) = answers(engine, params)
    assert int(state.tokens[1]) == other[1]


class Ahead(TokenMail):
    """As on CUDA: a step is under way while the host reads the one before."""

    def __init__(self, tokens):
        super().__init__(tokens)
        self.ahead = 1


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_reading_a_step_late_changes_no_text(engines, sparsity, monkeypatch):
    """Stop strings, ends of text and lengths of their own; some sequence ends first, some last."""
    engine = anew(engines[sparsity])
    free = answers(engine, [SamplingParams(max_new_tokens=20)] * 4)
    end = next(t for t in free[1][0][3:] if t not in free[0][0])
    monkeypatch.setattr(engine.model, "config", replace(engine.model.config, eos_token_id=end))
    stop = free[2][1][20:26]
    params = [
        SamplingParams(max_new_tokens=7),
        SamplingParams(max_new_tokens=20),
        SamplingParams(max_new_tokens=20, stop=(stop,)),
        SamplingParams(max_new_tokens=20, temperature=0.9, seed=4, ignore_eos=True),
    ]
    expected = answers(engine, params)
    assert [reason for *_, reason in expected] == ["length", "stop", "stop", "length"]
    monkeypatch.setattr(engine_module, "TokenMail", Ahead)
    assert answers(engine, params) == expected
    assert (
        answers(engine, params[:3]) == answers(engine, params)[:3]
    )  # then nothing lasts to the longest's end


def test_reading_a_step_late_measures_the_same_drift(engines, monkeypatch):
    engine = anew(engines["demo"])
    params = SamplingParams(max_new_tokens=12, ignore_eos=True)
    found = []
    for mail in (TokenMail, Ahead):
        monkeypatch.setattr(engine_module, "TokenMail", mail)
        generation = engine.generate(PROMPTS[:2], params, verify_every=3)
        found.append((generation.drift, generation.density, [r.token_ids for r in generation.results]))
    assert found[0] == found[1] and found[0][0]["checks"] == 4


class Recorded:
    """A step as a graph has it: run twice while it is recorded, then again and again over the same memory."""

    made: list["Recorded"]  # in this test

    def __init__(self, step, device, pool):
        self.step = step
        step(), step()
        self.made.append(self)
        self.replays = 0

    def replay(self):
        self.replays += 1
        return self.step()


@pytest.fixture
def recording(monkeypatch):
    """Makes an engine record its steps, as on CUDA."""
    monkeypatch.setattr(decoding, "StepGraph", Recorded)
    monkeypatch.setattr(engine_module, "TokenMail", Ahead)
    monkeypatch.setattr(Recorded, "made", [], raising=False)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)

    def record(engine):
        engine._graphs = True
        return engine

    return record


@pytest.mark.parametrize("sparsity", ["dense", "lossless"])
@pytest.mark.parametrize("settings", [{}, {"temperature": 0.8, "top_k": 40}], ids=["greedy", "drawn"])
def test_a_recorded_step_serves_batches_of_its_bucket(engines, recording, sparsity, settings):
    eager, recorded = engines[sparsity], recording(anew(engines[sparsity]))
    for n in (3, 4, 1, 3):  # three use the graph of four, after four have, too
        params = [SamplingParams(max_new_tokens=15 - 3 * i, seed=i, **settings) for i in range(n)]
        found, expected = (e.generate(PROMPTS[:n], params) for e in (recorded, eager))
        assert found.results == expected.results
        # a batch of another size is multiplied in another order: one neuron, near zero, may live in one alone
        config, steps = eager.model.config, len(found.results[0].token_ids)
        one = 1 / (config.num_layers * config.ffn_dim * steps)
        assert found.density == pytest.approx(expected.density, abs=2 * one)
    assert len(Recorded.made) == 2 and all(graph.replays for graph in Recorded.made)


def test_what_is_not_capturable_is_not_recorded(engines, recording):
    engine = recording(anew(engines["demo"]))
    assert not engine.policy.capturable and engines["lossless"].policy.capturable
    assert engine.generate(PROMPTS[:1]).results[0].token_ids and not Recorded.made


def test_recording_moves_no_sequence_and_counts_nothing(engines, recording):
    engine = recording(anew(engines["lossless"]))
    state = prefilled(engine, [SamplingParams(max_new_tokens=8)])
    before = state.cache.lengths.clone()
    found = []
    for record in (False, True):
        state = prefilled(engine, [SamplingParams(max_new_tokens=8)])
        engine.decode_step(state)
        if record:
            engine.graph(state)
            assert state.alive.tolist() == [0]
        assert torch.equal(state.cache.lengths, before + 1)
        found.append(engine.density())
    assert found[0] == found[1] and 0 < found[0]["mlp"] < 1
    assert engine.density()["mlp"] == 1.0  # nothing was asked since


def test_states_are_kept_by_bucket_greediness_and_policy(engine, recording):
    recording(engine)
    state = engine.reserve(3, 20, greedy=True)
    assert len(state.tokens) == 4 and state.cache.keys.shape[3] == 128  # the least that is recorded
    assert engine.reserve(4, 128, greedy=True) is state
    assert engine.reserve(4, 20, greedy=False) is not state
    assert engine.reserve(2, 20, greedy=True) is not state
    engine.policy = Policy([], engine.model.config.num_layers)
    assert engine.reserve(3, 20, greedy=True) is not state
    engine.policy = None
    assert engine.reserve(3, 20, greedy=True) is state
    longer = engine.reserve(3, 129, greedy=True)
    assert longer is not state and longer.cache.keys.shape[3] == 256
    assert engine.reserve(3, 20, greedy=True) is longer
    positions = engine.model.config.max_position_embeddings
    assert engine.reserve(1, positions, greedy=True).cache.keys.shape[3] == positions


def test_the_places_that_a_batch_leaves_free_are_finished(engine, recording):
    recording(engine)
    prefilled(engine, [SamplingParams(max_new_tokens=9)] * 4)
    state = prefilled(engine, [SamplingParams(max_new_tokens=5, ignore_eos=True)] * 3)
    for _ in range(2):
        engine.decode_step(state)
    assert state.alive.tolist() == [1, 1, 1, 0] and state.left.tolist() == [2, 2, 2, 0]
    assert int(state.cache.lengths[3]) == 0


def test_other_states_make_room(engine, recording, monkeypatch):
    recording(engine)
    engine.reserve(1, 20, greedy=True)
    new, refused = engine._new_state, iter([True, False, True, True])

    def new_state(*sizes):
        if next(refused):
            raise torch.OutOfMemoryError
        return new(*sizes)

    monkeypatch.setattr(engine, "_new_state", new_state)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (3 * 2**29, 2**36))
    assert len(engine.reserve(8, 20, greedy=True).tokens) == 8
    assert [key[0] for key in engine._states] == [8]
    with pytest.raises(ValueError) as error:
        engine.reserve(33, 300, greedy=True)
    assert str(error.value) == (
        "a GPU has 1.5 GiB left, too little for keys and values of 64 sequences of 512 tokens: "
        "lower --max-batch or --max-new-tokens, or use more ranks"
    )


@pytest.mark.parametrize("max_batch", [-1, 0, MAX_BATCH + 1])
def test_batches_out_of_range_are_one_clear_line(engine, max_batch):
    with pytest.raises(ValueError, match=f"^max_batch={max_batch} is not from 1 to 64$"):
        engine.generate(PROMPTS[:1], max_batch=max_batch)


def test_the_largest_max_batch_is_taken(engine):
    results = engine.generate(["Once"] * 3, SamplingParams(max_new_tokens=2), max_batch=MAX_BATCH).results
    assert [len(r.token_ids) for r in results] == [2] * 3


@pytest.mark.parametrize(
    "option, message",
    [
        ({"overlap": "later"}, "overlap='later' is unknown: use auto, tap, collective, none"),
        ({"fill_kv": "never"}, "fill_kv='never' is unknown: use auto, lazy, always"),
    ],
)
def test_options_of_an_engine_that_are_unknown(engine, option, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        anew(engine, **option)
