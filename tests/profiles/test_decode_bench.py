"""`dejavu bench decode` without a GPU: its arithmetic by a clock that steps alone move, its mistakes."""

import json
import math
import re
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from command import dejavu

from dejavu.kernels.tuning import asked, forget, override
from dejavu.launch import bench_decode
from dejavu.parallel.groups import TPGroup
from dejavu.predictors.selection import Fixed
from dejavu.profiles import decode_bench, timing
from dejavu.profiles.decode_bench import Bench, Run
from dejavu.profiles.synthetic import paper75, synthetic_model
from dejavu.profiles.tune import candidates
from dejavu.runtime.config import published_config
from dejavu.runtime.decoding import Decoder
from dejavu.runtime.opt import OPTModel
from models import tiny_opt

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = tiny_opt(128, vocab_size=500, max_position_embeddings=128)
# of steps that choose nothing, that predict, and that are given their sets; of a prefill; of one predictor
DENSE_MS, SPARSE_MS, GIVEN_MS, PREFILL_MS, PREDICTOR_US = 4.0, 2.5, 2.0, 10.0, 50.0
BANDWIDTH = 1e9
KEYS = {
    "engine", "policy", "op", "shape", "tp", "gpus", "weights", "batch", "prompt_len", "new_tokens",
    "density_mlp", "density_heads", "ms_mean", "ms_p50", "ms_p99", "ttft_ms", "tokens_per_s", "gb_per_s",
    "floor_ms", "over_floor", "peak_gib", "joules_per_token",
}  # fmt: skip
PREDICTION = {"exposed_predictor_ms", "exposed_share", "predictors_alone_ms", "hidden_share"}
NOT_HERE = {"peak_gib", "joules_per_token"}  # what only a GPU has


@pytest.fixture
def engines(monkeypatch):
    """Steps and prefills move the clock and nothing else does; gives the engines that were measured."""
    clock, found = SimpleNamespace(ms=0.0), []
    advance, prefill = Decoder._advance, Decoder.prefill

    class Recorded(Decoder):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            self.kept = {}
            found.append(self)

        def reserve(self, batch, capacity, *, greedy):
            if batch not in self.kept:  # as with graphs, which are bound to a state
                self.kept[batch] = super().reserve(batch, capacity, greedy=greedy)
            return self.kept[batch]

        def _advance(self, state, selector=None):
            dense = self.policy is None
            clock.ms += GIVEN_MS if isinstance(selector, Fixed) else DENSE_MS if dense else SPARSE_MS
            return advance(self, state, selector)

        def prefill(self, prompts, params):
            clock.ms += PREFILL_MS
            return prefill(self, prompts, params)

        def graph(self, state, selector=None):
            return SimpleNamespace(replay=lambda: self._advance(state, selector))

    def time_calls(calls, replays):
        for call in calls:
            call()
        return timing.Times(PREDICTOR_US, PREDICTOR_US)

    def reserve(tp, dtype, choice):
        if tp.size > 1:
            tp.routes[dtype] = SimpleNamespace(enabled=choice != "nccl")

    monkeypatch.setattr(decode_bench, "Decoder", Recorded)
    monkeypatch.setattr(decode_bench, "reserve", reserve)
    monkeypatch.setattr(decode_bench, "time_calls", time_calls)
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: clock.ms / 1e3))
    return found


def bench_of(*, batch=1, tp=None, profile="paper75", new_tokens=12, prompt_len=9, **options):
    tp = tp or TPGroup()
    run = Run("tiny", CONFIG, tp, torch.float32, BANDWIDTH, batch, prompt_len, new_tokens)
    model = synthetic_model(CONFIG, tp, torch.float32)
    settings = {"rank": 16, "bits": 8, "lookahead": "half", "overlap": "auto", "symm": "auto", **options}
    return Bench(run, model, profile, **settings)


def assert_measured(row, keys):
    assert keys <= set(row), keys - set(row)
    for key, value in row.items():
        if key in NOT_HERE:
            assert value is None
        elif isinstance(value, float):
            assert math.isfinite(value) and value > 0, key


@pytest.mark.parametrize("batch, profile", [(1, "paper75"), (4, "union66b")])
def test_rows_say_what_was_measured(engines, batch, profile):
    bench = bench_of(batch=batch, profile=profile)
    dense, sparse, lossless = bench.rows(["lossless", "sparse", "dense"], False)
    for row in (dense, sparse, lossless):
        assert_measured(row, KEYS)
        assert (row["op"], row["engine"], row["shape"], row["weights"]) == (
            "decode", "dejavu", "tiny", "float32"
        )  # fmt: skip
        assert (row["batch"], row["prompt_len"], row["new_tokens"]) == (batch, 9, 12)
        assert row["ttft_ms"] == pytest.approx(PREFILL_MS)
        ms = DENSE_MS if row is dense else SPARSE_MS
        assert [row[key] for key in ("ms_mean", "ms_p50", "ms_p99")] == pytest.approx([ms] * 3)
        assert row["tokens_per_s"] == pytest.approx(1e3 * batch / ms)
        assert row["over_floor"] == pytest.approx(ms / row["floor_ms"])
        assert row["gb_per_s"] == pytest.approx(row["floor_ms"] / ms * BANDWIDTH / 1e9)
    assert [row["policy"] for row in (dense, sparse, lossless)] == ["dense", "sparse", "lossless"]
    assert dense["density_mlp"] == dense["density_heads"] == lossless["density_heads"] == 1
    assert lossless["density_mlp"] == pytest.approx(1 - 0.96**batch, rel=0.2)
    assert sparse["density_mlp"] == pytest.approx(sum(bench.profile.mlp) / 12, rel=0.15)
    assert sparse["density_heads"] == pytest.approx(sum(paper75(12).heads) / 12, rel=0.1)
    assert sparse["floor_ms"] < lossless["floor_ms"] < dense["floor_ms"]


def test_the_floor_is_what_must_be_read():
    tp = TPGroup(rank=1, shares=4)
    run = Run("tiny", CONFIG, tp, torch.bfloat16, BANDWIDTH, 3, 10, 8)
    model = OPTModel(CONFIG, tp=tp, dtype=torch.bfloat16)
    cache = model.empty_cache(3, 14)  # the middle of the run
    assert run.kv_bytes() == cache.keys.nbytes + cache.values.nbytes
    assert run.dense_bytes() == model.decode_bytes() + run.kv_bytes()
    decoded = timing.Decoded(7.0, (1.0, 2.0, 6.0), 1.5, 0.25)
    row = run.row(decoded, 2e6, engine="hf", policy="dense")
    assert (row["tp"], row["gpus"], row["weights"], row["engine"]) == (4, 1, "bfloat16", "hf")
    assert (row["ms_mean"], row["ms_p50"], row["floor_ms"], row["over_floor"]) == (3.0, 2.0, 2.0, 1.5)
    assert (row["ttft_ms"], row["peak_gib"], row["joules_per_token"]) == (7.0, 1.5, 0.25)
    assert row["tokens_per_s"] == pytest.approx(1000) and row["gb_per_s"] == pytest.approx(2e6 / 3 / 1e6)


@pytest.mark.parametrize("batch, profile", [(1, "paper75"), (2, "union66b")])
def test_exposed_is_what_predictors_add_to_a_step_and_hidden_the_rest(engines, batch, profile):
    bench = bench_of(batch=batch, profile=profile, lookahead="one", overlap="collective", bits=16)
    (row,) = bench.rows(["sparse"], False)
    assert_measured(row, KEYS | PREDICTION)
    units = len(engines[-1].policy.units)
    alone = units * PREDICTOR_US / 1e3
    assert units > 12 and row["predictors_alone_ms"] == pytest.approx(alone)
    assert row["exposed_predictor_ms"] == pytest.approx(SPARSE_MS - GIVEN_MS)
    assert row["exposed_share"] == pytest.approx((SPARSE_MS - GIVEN_MS) / SPARSE_MS)
    assert row["hidden_share"] == pytest.approx(1 - (SPARSE_MS - GIVEN_MS) / alone)
    assert (row["predictor_rank"], row["predictor_bits"], row["lookahead"]) == (16, 16, "one")
    assert engines[-1].overlap == "collective"


def test_given_sets_are_those_that_were_predicted(engines, monkeypatch):
    """The step that is timed without predictors computes the same tokens."""
    tokens, advance = {False: [], True: []}, decode_bench.Decoder._advance

    def noting(self, state, selector=None):
        logits = advance(self, state, selector)
        if self.policy is not None:
            tokens[isinstance(selector, Fixed)].append(state.tokens.tolist())
        return logits

    monkeypatch.setattr(decode_bench.Decoder, "_advance", noting)
    list(bench_of(batch=2, profile="union66b").rows(["sparse"], False))
    assert tokens[True][-11:] == tokens[False][-11:]
    assert len({tuple(row) for row in tokens[True][-11:]}) > 1


def switches(engine):
    """What of the product an engine has on."""
    mlp, heads = (engine.policy is not None and engine.policy.chooses(kind) for kind in ("mlp", "heads"))
    bits = {8 * u.scorer.down.itemsize for u in engine.policy.units.values()} if engine.policy else {16}
    return {
        "mlp": mlp,
        "heads": heads,
        "projections": heads and engine.fill_kv == "auto",
        "overlap": engine.overlap,
        "bits": bits,
    }


def test_each_line_of_the_waterfall_switches_one_thing(engines):
    bench = bench_of(new_tokens=6)
    rows, on = [], {}
    for row in bench.rows([], True):
        rows.append(row)
        on[row["policy"]] = switches(engines[-1])
    names = [row["policy"] for row in rows]
    assert names[:4] == ["dense", "+ MLP sparsity", "+ skipped K/V reads", "+ skipped projections"]
    bits = next(i for i, name in enumerate(names) if "8-bit" in name)
    first_without = next(i for i, name in enumerate(names) if name.startswith("all"))
    assert bits == 5 and all(name.startswith("+ ") for name in names[1:first_without])
    steps = [on[name] for name in names[1 : bits + 1]]
    changed = [{k for k in b if a[k] != b[k]} for a, b in pairwise(steps)]
    assert changed == [{"heads"}, {"projections"}, {"overlap"}, {"bits"}]
    everything = on[names[bits]]
    assert everything == {"mlp": True, "heads": True, "projections": True, "overlap": "auto", "bits": {8}}
    without = [{k for k in everything if on[name][k] != everything[k]} for name in names[first_without:]]
    assert without == [{"mlp"}, {"heads", "projections"}, {"projections"}, {"overlap"}, {"overlap"}, {"bits"}]
    assert not [name for name in names if "symmetric" in name]  # there is but one rank
    for row in rows:
        assert_measured(row, KEYS | {"over_first_line"})
        assert row["op"] == "waterfall"
        ms = DENSE_MS if row["policy"] == "dense" else SPARSE_MS
        assert row["over_first_line"] == pytest.approx(DENSE_MS / ms)
        assert (row["density_heads"] < 1) == on[row["policy"]]["heads"]
        assert (row["density_mlp"] < 1) == on[row["policy"]]["mlp"]


def test_what_there_is_not_has_no_line(engines, monkeypatch):
    """Symmetric memory but on several ranks, lazy keys and values but in small batches."""
    routes = {}
    for batch in (1, 8):
        bench = bench_of(batch=batch, tp=TPGroup(size=2), profile="union66b", new_tokens=3, symm="symm")
        routes[batch] = found = {}

        def measure(name, engine, run=None, bench=bench, found=found):
            found[name] = bench.run.tp.routes[torch.float32].enabled
            return {"ms_mean": 1.0}

        monkeypatch.setattr(bench, "_measure", measure)
        monkeypatch.setattr(bench, "_policy", lambda parts: None)
        list(bench.waterfall())
    nccl = [name for name, enabled in routes[1].items() if not enabled]
    assert nccl == [*list(routes[1])[:6], "all but symmetric memory"]  # up to "+ symmetric memory"
    assert list(routes[1])[6] == "+ symmetric memory"
    assert set(routes[1]) - set(routes[8]) == {"+ skipped projections", "all but skipped projections"}


def on_a_gpu(monkeypatch, **config):
    """The command believes that there is one, and that published models are tiny."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(bench_decode, "pick_device", lambda _: torch.device("cpu"))
    monkeypatch.setattr(bench_decode, "read_bandwidth", lambda _: BANDWIDTH)
    monkeypatch.setattr(bench_decode, "published_config", lambda _: replace(CONFIG, **config))


def test_the_command_records_speed_ups_over_dense_and_densities(engines, monkeypatch, tmp_path):
    on_a_gpu(monkeypatch)
    sizes = ["--batch", 1, "--batch", 2, "--prompt-len", 8, "--new-tokens", 6, "--predictor-rank", 8]
    options = ["--density-profile", "union66b", "--out", tmp_path, "--name", "tiny", "--waterfall"]
    status, out, err = dejavu("bench", "decode", *sizes, *options)
    assert (status, out.splitlines()[-1]) == (0, str(tmp_path / "tiny.json"))
    assert (tmp_path / "tiny.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads((tmp_path / "tiny.json").read_text())
    assert record["synthetic_weights"] is True and record["read_tb_per_s"] == BANDWIDTH / 1e12
    rows = [row for row in record["rows"] if row["op"] == "decode"]
    assert len(record["rows"]) > len(rows) + 20 and {row["op"] for row in record["rows"]} == {
        "decode", "waterfall"
    }  # fmt: skip
    assert [(r["batch"], r["policy"]) for r in rows] == [
        (batch, policy) for batch in (1, 2) for policy in ("dense", "sparse", "lossless")
    ]
    for row in rows:
        assert_measured(row, KEYS | {"speedup_vs_dense", "density_profile"})
        assert row["density_profile"] == "union66b"
        expected = 1 if row["policy"] == "dense" else DENSE_MS / SPARSE_MS
        assert row["speedup_vs_dense"] == pytest.approx(expected)
        line = f"opt-6.7b tp 1 on 1 GPU(s), batch {row['batch']}, prompt 8: dejavu {row['policy']}: "
        said = next(text for text in err.splitlines() if text.startswith(line))
        assert f"neurons {100 * row['density_mlp']:.1f}%, heads {100 * row['density_heads']:.1f}%" in said
        assert f"{row['speedup_vs_dense']:.2f} x dense" in said
        assert bool(re.search(r"exposed 20\.0%, hidden \d+%$", said)) == (row["policy"] == "sparse")


def test_a_slice_is_of_the_shares_that_are_asked_for(engines, monkeypatch, tmp_path):
    on_a_gpu(monkeypatch)
    sizes = ["--prompt-len", 8, "--new-tokens", 3, "--policy", "dense", "--tp-slice", 8]
    status, _, err = dejavu("bench", "decode", *sizes, "--out", tmp_path, "--name", "slice")
    (row,) = json.loads((tmp_path / "slice.json").read_text())["rows"]
    assert status == 0 and (row["tp"], row["gpus"]) == (8, 1)
    assert "tp 8 on 1 GPU(s)" in err


def test_settings_that_make_steps_shorter_go_into_the_table(engines, monkeypatch, tmp_path):
    on_a_gpu(monkeypatch)
    table = tmp_path / "table.json"
    table.write_text("{}")
    for module in ("dejavu.kernels.tuning", "dejavu.profiles.tune"):
        monkeypatch.setattr(f"{module}.TABLE", table)
    good = candidates("fc1", 4096, 2)[4]
    step_ms = Bench._step_ms

    def with_kernels(self):  # there are none on the CPU
        asked.update(override)
        return step_ms(self) - (good in override.values())

    monkeypatch.setattr(Bench, "_step_ms", with_kernels)
    options = ["--policy", "sparse", "--new-tokens", 4, "--prompt-len", 5, "--predictor-rank", 8]
    options += ["--tune", "fc1", "--tune", "up_beside", "--out", tmp_path, "--name", "tuned"]
    status, _, err = dejavu("bench", "decode", *options)
    assert status == 0 and not override
    assert json.loads(table.read_text()) == {"cpu": {"fc1 16384x4096 16-bit": good}}
    lines = err.splitlines()
    assert "fc1: in use: 2.500 ms" in lines and "up_beside: in use: 1.500 ms" in lines
    assert "1 of 2 kernels have better settings: fc1 16384x4096 16-bit" in lines
    status, _, err = dejavu("bench", "decode", "--tune", "fc1", "--density-profile", "union66b", "--batch", 2)
    assert_one_clear_line(status, err, "--tune is for sparse steps of one sequence of engine dejavu")
    forget()


def test_a_waterfall_follows_what_was_tuned(engines):
    bench = bench_of(new_tokens=3)
    assert bench._step_ms() == pytest.approx(SPARSE_MS)
    assert len(list(bench.rows(["sparse"], True))) > 10


def assert_one_clear_line(status, err, message):
    lines = err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0], err
    assert status == 2


@pytest.mark.parametrize(
    "options, message",
    [
        (["--engine", "vllm"], "engine='vllm' is unknown: use dejavu, hf, hf-compile, deepspeed"),
        (["--engine", "hf", "--engine", "HF"], "engine='HF' is unknown"),
        (["--policy", "oracle"], "policy='oracle' is unknown: use dense, lossless, sparse"),
        (["--density-profile", "paper"], "density_profile='paper' is unknown: use paper75, union66b"),
        (["--predictor-bits", "4"], "predictor_bits='4' is unknown: use 8, 16"),
        (["--predictor-rank", "2"], "--predictor-rank"),
        (["--dtype", "fp32"], "dtype='fp32' is unknown: use fp16, bf16"),
        (["--lookahead", "two"], "lookahead='two' is unknown: use half, one"),
        (["--batch", "0"], "--batch"),
        (["--new-tokens", "1"], "--new-tokens"),
        (["--tp-slice", "-1"], "--tp-slice"),
        (["--tune", "fc3"], "tune='fc3' is unknown: use qkv, attention, out_proj, fc1, fc2, down_beside"),
    ],
)
def test_options_that_are_wrong(options, message):
    status, _, err = dejavu("bench", "decode", *options)
    assert_one_clear_line(status, err, message)


def test_without_a_gpu_nothing_is_measured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, _, err = dejavu("bench", "decode")
    assert_one_clear_line(status, err, "measures a GPU, and torch sees no CUDA device here")


@pytest.mark.parametrize(
    "options, message",
    [
        (["--prompt-len", "100"], "prompt_len=100 and new_tokens=128 do not fit the model's 128 positions"),
        (["--tp-slice", "5"], "num_heads=16 and ffn_dim=512 cannot be split over 5 ranks"),
        (["--density-profile", "union66b", "--batch", "3", "--prompt-len", "8", "--new-tokens", "3"],
         "union66b knows batches of 1, 2, 4, 8, 16, 32, 64, not of 3"),
        (["--batch", "2"], "density_profile=paper75 is one sequence's: for batches use union66b"),
        (["--tp-slice", "2", "--engine", "hf"], "tp_slice is of engine dejavu alone"),
        (["--overlap", "never", "--prompt-len", "8", "--new-tokens", "3"],
         "overlap='never' is unknown: use auto, tap, collective, none"),
    ],
)  # fmt: skip
def test_sizes_that_are_wrong(engines, monkeypatch, options, message):
    on_a_gpu(monkeypatch)
    status, _, err = dejavu("bench", "decode", *options)
    *said, error = err.splitlines(keepends=True)
    assert all(line == "NVIDIA H100 80GB HBM3 reads 0.00 TB/s\n" for line in said)
    assert_one_clear_line(status, error, message)


def test_a_model_that_is_not_published(monkeypatch):
    on_a_gpu(monkeypatch)
    monkeypatch.setattr(bench_decode, "published_config", published_config)
    status, _, err = dejavu("bench", "decode", "--shape", "opt-7b")
    assert_one_clear_line(status, err.splitlines()[-1], "shape='opt-7b' is unknown: use opt-125m")
