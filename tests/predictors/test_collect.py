"""Traces against Hugging Face's model on any number of ranks; collections killed, refused, or full."""

import errno
import json
import multiprocessing as mp
import os
import random
import signal
import subprocess
import sys
import time
from collections import namedtuple

import numpy as np
import pytest
import torch

from dejavu.launch import cli
from dejavu.parallel.groups import TPGroup
from dejavu.predictors import collect as collect_module
from dejavu.predictors.collect import Traces, collect, decode_table, encode, read_info, trace_bytes
from dejavu.predictors.corpus import Corpus
from dejavu.predictors.networks import Random
from dejavu.predictors.selection import Policy, Tap, Unit
from dejavu.runtime.engine import Engine
from models import BASE, KINDS, load_reference, make_model, windows_of
from ranks import run_ranks

pytestmark = pytest.mark.usefixtures("one_thread")

LAYERS, FFN, HEADS, HEAD_DIM = 2, 64, 4, 8
THRESHOLDS = {"mlp": 0.6, "heads": 0.4}


def corpus_of(windows, sha256="0" * 64):
    return Corpus(windows, "made.txt", sha256, 0, 1000)


def engine_of(directory, tp=None):
    return Engine.from_pretrained(str(directory), tp=tp or TPGroup(), dtype="fp32")


def random_policy(tp):
    """Chooses by a hash of the position alone, so that a test can know the sets."""
    units = []
    for kind, n in (("mlp", FFN), ("heads", HEADS)):
        rows = tp.shard(n)
        for layer in range(LAYERS):
            scorer = Random(torch.arange(rows.start, rows.stop), layer=layer, seed=5)
            units.append(Unit(kind, layer, None, scorer, threshold=THRESHOLDS[kind]))
    return Policy(units, LAYERS, sharing="mask", dense_until=1)


def collected(tp, directory, windows, out, sparse=False, on_progress=None):
    engine = engine_of(directory, tp)
    engine.policy = random_policy(tp) if sparse else None
    name = "predictors" if sparse else "dense"
    return collect(engine, corpus_of(windows), out, sparsity=name, on_progress=on_progress)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"))


class Seen:
    """What passed through Hugging Face's model in a pass over ``token_ids [B, S]``, without the first tokens:
    by layer, the stream at both taps ``[T, D]``, neurons ``[T, F]`` before ReLU, heads ``[T, N, H]``. With
    ``sparse``, what `random_policy` leaves out is taken out."""

    def __init__(self, directory, token_ids, sparse=False):
        model = load_reference(directory)
        self.attn_in, self.mlp_in, self.neurons, self.heads = ([None] * LAYERS for _ in range(4))
        positions = torch.arange(token_ids.shape[1]).expand(len(token_ids), -1)

        def keep(where, layer, x):
            where[layer] = x.detach().reshape(*token_ids.shape, -1)[:, 1:].flatten(0, 1)

        def mask(kind, layer, n):
            chosen = Random(torch.arange(n), layer=layer, seed=5)(positions) > THRESHOLDS[kind]
            return chosen | (positions < 1)[..., None]

        def hook(layer, block):
            def heads(module, args):
                keep(self.heads, layer, args[0])
                if sparse:
                    by_channel = mask("heads", layer, HEADS).repeat_interleave(HEAD_DIM, dim=-1)
                    return (args[0] * by_channel.view(args[0].shape),)

            def neurons(module, args, out):
                keep(self.neurons, layer, out)
                if sparse:
                    return out * mask("mlp", layer, FFN).view(out.shape)

            block.register_forward_pre_hook(lambda m, a: keep(self.attn_in, layer, a[0]))
            if model.config.do_layer_norm_before:
                norm = block.final_layer_norm
                norm.register_forward_pre_hook(lambda m, a: keep(self.mlp_in, layer, a[0]))
            else:
                norm = block.self_attn_layer_norm
                norm.register_forward_hook(lambda m, a, out: keep(self.mlp_in, layer, out))
            block.self_attn.out_proj.register_forward_pre_hook(heads)
            block.fc1.register_forward_hook(neurons)

        for layer, block in enumerate(model.model.decoder.layers):
            hook(layer, block)
        with torch.no_grad():
            model(token_ids)


def standardised(x):
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()


def check_traces(out, seen):
    """All of a directory of traces against plain computations."""
    traces = Traces(out)
    table = decode_table(torch.device("cpu"))
    for layer in range(LAYERS):
        for point in ("attn_in", "mlp_in"):
            found = traces.tap(Tap(point, layer))
            assert found.dtype == torch.float16
            expected = standardised(getattr(seen, point)[layer])
            torch.testing.assert_close(found.float(), expected, atol=1e-3, rtol=1e-3)
        codes, before = torch.cat(traces.neurons(layer), dim=1), seen.neurons[layer]
        assert codes.dtype == torch.uint8 and codes.shape == before.shape
        assert (codes[before < -1e-4] == 0).all() and (before < -1e-4).float().mean() > 0.2
        live = before > 1e-3
        error = (table[codes.long()] / before - 1)[live].abs()
        assert live.any() and 0.03 < error.max() < 0.045
        outputs = torch.cat(traces.heads(layer), dim=1)
        assert outputs.dtype == torch.float16
        expected = seen.heads[layer].view(-1, HEADS, HEAD_DIM)
        torch.testing.assert_close(outputs.float(), expected, atol=1e-3, rtol=1e-3)


def files_of(directory):
    return {
        str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()
    }


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("kind", ["pre-norm", "post-norm with projections"])
@pytest.mark.parametrize("sparse", [False, True])
def test_traces_are_what_passed_through_the_model(tmp_path, kind, ranks, sparse):
    """9 windows: a whole batch and one; with predictors running, those of the sparse run."""
    directory, windows = make_model(tmp_path / "model", **KINDS[kind]), windows_of(9, 12)
    out = tmp_path / "traces"
    info = run_ranks(ranks, collected, directory, windows, out, sparse)[0]
    assert (info.windows, info.window, info.ranks, info.tokens) == (9, 12, ranks, 99)
    assert info == read_info(out) and info.sparsity == ("predictors" if sparse else "dense")
    check_traces(out, Seen(directory, windows[:, :-1], sparse))


def test_ranks_write_their_own_slices(tmp_path, model_dir):
    windows = windows_of(9, 12)
    for ranks in (1, 2, 4):
        run_ranks(ranks, collected, model_dir, windows, tmp_path / str(ranks))
        n, h = FFN // ranks, HEADS // ranks
        expected = {"attn_in.npy", "mlp_in.npy"}
        expected |= {f"neurons.{r * n}-{(r + 1) * n}.npy" for r in range(ranks)}
        expected |= {f"heads.{r * h}-{(r + 1) * h}.npy" for r in range(ranks)}
        names = {f"layer.{layer:03d}/{name}" for layer in range(LAYERS) for name in expected}
        assert set(files_of(tmp_path / str(ranks))) == names | {"traces.json"}
    one = Traces(tmp_path / "1")
    for many in (Traces(tmp_path / "2"), Traces(tmp_path / "4")):
        for layer in range(LAYERS):
            for point in ("attn_in", "mlp_in"):
                a, b = one.tap(Tap(point, layer)), many.tap(Tap(point, layer))
                torch.testing.assert_close(a, b, atol=2e-3, rtol=2e-3)
            codes = [torch.cat(t.neurons(layer), dim=1).int() for t in (one, many)]
            away_from_zero = torch.stack(codes).amin(0) > 40
            assert ((codes[0] - codes[1]).abs()[away_from_zero] <= 1).all()
            assert (codes[0] != codes[1]).float().mean() < 0.01
            heads = [torch.cat(t.heads(layer), dim=1) for t in (one, many)]
            torch.testing.assert_close(*heads, atol=2e-3, rtol=2e-3)


def test_the_size_is_known_before(tmp_path, model_dir):
    engine = engine_of(model_dir)
    info = collect(engine, corpus_of(windows_of(5, 20)), tmp_path / "traces")
    stored = sum(np.load(p, mmap_mode="r").nbytes for p in (tmp_path / "traces").rglob("*.npy"))
    assert trace_bytes(engine.model.config, info.tokens) == stored


def test_activations_as_bytes():
    x = torch.tensor([0.0, 2.0**-30, 2.0**-16, 1.0, 2.0**15.875, 2.0**20, torch.inf, torch.nan])
    assert encode(x).tolist() == [0, 1, 1, 128, 255, 255, 255, 255]
    table = decode_table(torch.device("cpu"))
    assert table[0] == 0 and table[128] == 1 and (table.diff() > 0).all()
    values = torch.logspace(-15.8, 15.8, 10_000, base=2)
    assert ((table[encode(values).long()] / values - 1).abs() < 0.045).all()
    assert ((table[encode(values.half()).long()] / values - 1).abs() < 0.047)[values < 60000].all()


WINDOWS = 136  # a note is made after 64 and 128


def killed_in_the_middle(directory, windows, out, at):
    def on_progress(done, total):
        if done == at:
            os.kill(os.getpid(), signal.SIGKILL)

    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
    collected(TPGroup(), directory, windows, out, on_progress=on_progress)


@pytest.mark.parametrize("at", [8, 64, 104, WINDOWS])
def test_a_killed_collection_goes_on_to_the_same_bytes(tmp_path, model_dir, at):
    windows, out = windows_of(WINDOWS, 10), tmp_path / "killed"
    process = mp.get_context("fork").Process(target=killed_in_the_middle, args=(model_dir, windows, out, at))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL and not out.exists()
    assert (tmp_path / "killed.partial" / "traces.json").is_file()
    with pytest.raises(ValueError, match=r"no traces.json \(killed.partial is not finished: collect again\)"):
        Traces(out)
    steps = []
    collected(TPGroup(), model_dir, windows, out, on_progress=lambda *step: steps.append(step))
    assert steps[0] == (at // 64 * 64 + 8, WINDOWS) and steps[-1] == (WINDOWS, WINDOWS)
    collected(TPGroup(), model_dir, windows, tmp_path / "whole")
    assert files_of(out) == files_of(tmp_path / "whole")
    assert not (tmp_path / "killed.partial").exists()


class StoppedError(Exception):
    pass


def stopped_and_resumed(tp, directory, windows, out):
    def stop(done, total):
        if done == 80:
            raise StoppedError

    with pytest.raises(StoppedError):
        collected(tp, directory, windows, out, on_progress=stop)
    steps = []
    collected(tp, directory, windows, out, on_progress=lambda *step: steps.append(step))
    return steps


def test_a_stopped_collection_goes_on_on_two_ranks(tmp_path, model_dir):
    windows = windows_of(WINDOWS, 10)
    for steps in run_ranks(2, stopped_and_resumed, model_dir, windows, tmp_path / "stopped"):
        assert steps[0] == (72, WINDOWS) and len(steps) == 9
    run_ranks(2, collected, model_dir, windows, tmp_path / "whole")
    assert files_of(tmp_path / "stopped") == files_of(tmp_path / "whole")


def sentences(n, seed=0):
    """A text that no other test has."""
    draw = random.Random(seed)
    words = ["the", "old", "man", "looked", "at", "sea", "a", "dark", "night", "came", "over", "water"]
    return "\n".join(" ".join(draw.choices(words, k=12)).capitalize() + "." for _ in range(n))


def test_the_command_killed_with_its_note_goes_on(tmp_path, model_dir, monkeypatch, capfd):
    text, out, whole = tmp_path / "text.txt", tmp_path / "killed" / "traces", tmp_path / "whole" / "traces"
    text.write_text(sentences(4000))
    command = ["collect", "--model", model_dir, "--text", text, "--window", 8, "--device", "cpu"]
    command = [*map(str, command), "--out"]
    note = tmp_path / "killed" / "traces.partial" / "progress.json"
    running = [sys.executable, "-m", "dejavu.launch.cli", *command, str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(running, stderr=subprocess.DEVNULL, env=environment) as process:
        while process.poll() is None and not note.exists():
            time.sleep(0.001)
        process.kill()
    assert process.returncode == -signal.SIGKILL and not out.exists()
    assert json.loads(note.read_text())["windows"] % 64 == 0

    def dejavu(*arguments):
        monkeypatch.setattr(sys, "argv", ["dejavu", *arguments])
        with pytest.raises(SystemExit) as exit:
            cli.main()
        return exit.value.code or 0

    assert dejavu(*command, str(out)) == 0
    assert dejavu(*command, str(whole)) == 0
    assert files_of(out) == files_of(whole)
    assert "tokens of text.txt: " in (err := capfd.readouterr().err) and " GB" in err


@pytest.fixture
def begun(tmp_path, model_dir):
    """A collection that was stopped: its windows and where it should have come out."""
    windows, out = windows_of(WINDOWS, 10), tmp_path / "begun"

    def stop(done, total):
        if done == 80:
            raise StoppedError

    with pytest.raises(StoppedError):
        collected(TPGroup(), model_dir, windows, out, on_progress=stop)
    return windows, out


def refused(tp, directory, corpus, out, sparsity="dense"):
    engine = engine_of(directory, tp)
    with pytest.raises(ValueError) as error:
        collect(engine, corpus, out, sparsity=sparsity)
    return str(error.value)


def test_a_collection_begun_otherwise_is_not_gone_on_with(begun, tmp_path, model_dir):
    windows, out = begun
    before = files_of(tmp_path / "begun.partial")
    other_model = make_model(tmp_path / "other", seed=1)
    corpus = corpus_of(windows)
    for directory, text, ranks, sparsity in (
        (model_dir, corpus_of(windows, "1" * 64), 1, "dense"),
        (model_dir, corpus_of(windows[:-1]), 1, "dense"),
        (model_dir, corpus_of(windows[:, :-1]), 1, "dense"),
        (other_model, corpus, 1, "dense"),
        (model_dir, corpus, 2, "dense"),
        (model_dir, corpus, 1, "predictors"),
    ):
        for message in run_ranks(ranks, refused, directory, text, out, sparsity):
            assert message.endswith(
                "begun.partial was begun with another model, text, ranks or options: remove it first"
            )
    assert files_of(tmp_path / "begun.partial") == before
    collected(TPGroup(), model_dir, windows, out)
    assert out.is_dir()


def test_a_collection_begun_in_another_dtype_is_not_gone_on_with(begun, model_dir):
    windows, out = begun
    engine = Engine.from_pretrained(str(model_dir), device="cpu", dtype="bf16")
    with pytest.raises(ValueError, match="was begun with another model, text, ranks or options"):
        collect(engine, corpus_of(windows), out)


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_exists_is_not_written_over(tmp_path, model_dir, ranks):
    (tmp_path / "traces").mkdir()
    for message in run_ranks(ranks, refused, model_dir, corpus_of(windows_of(2, 8)), tmp_path / "traces"):
        assert message.endswith("traces exists already")
    assert list(tmp_path.iterdir()) == [tmp_path / "traces"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_too_small_a_disk(tmp_path, model_dir, ranks, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(collect_module.shutil, "disk_usage", lambda path: usage(10**9, 0, 20_000_000))
    corpus = corpus_of(torch.zeros(1000, 102, dtype=torch.int64))
    for message in run_ranks(ranks, refused, model_dir, corpus, tmp_path / "new" / "traces"):
        assert "traces needs 0.05 GB, but the disk has 0.02 GB left" in message
        assert "\n" not in message
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up(tmp_path, model_dir, monkeypatch):
    windows, out = windows_of(9, 10), tmp_path / "traces"
    took = []

    def full(descriptor, start, size):
        took.append(size)
        if len(took) > 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(collect_module.os, "posix_fallocate", full)
        with pytest.raises(ValueError, match="No space left on device"):
            collected(TPGroup(), model_dir, windows, out)
    assert not out.exists()
    assert len(list((tmp_path / "traces.partial").rglob("*.npy"))) == 3
    collected(TPGroup(), model_dir, windows, out)  # when there is space again
    collected(TPGroup(), model_dir, windows, tmp_path / "whole")
    assert files_of(out) == files_of(tmp_path / "whole")


@pytest.fixture(scope="module")
def traces_dir(tmp_path_factory, model_dir):
    out = tmp_path_factory.mktemp("traces") / "traces"
    collected(TPGroup(), model_dir, windows_of(9, 12), out)
    return out


@pytest.fixture
def copy(traces_dir, tmp_path):
    for name, data in files_of(traces_dir).items():
        path = tmp_path / "copy" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return tmp_path / "copy"


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "copy is no directory of traces: it has no traces.json"),
        (b"", "traces.json is damaged"),
        (b"{", "traces.json is damaged"),
        (b"[]", "traces.json is damaged"),
        (b"{}", "traces.json is damaged: model: Field required"),
    ],
)
def test_information_that_cannot_be_read(copy, content, message):
    (copy / "traces.json").unlink()
    if content is not None:
        (copy / "traces.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        Traces(copy)
    with pytest.raises(ValueError, match="is no directory of traces"):
        Traces(copy / "nowhere")


@pytest.mark.parametrize("change", [{"format": 2}, {"colour": "red"}, {"windows": "many"}])
def test_information_of_another_format(copy, change):
    info = json.loads((copy / "traces.json").read_text())
    (copy / "traces.json").write_text(json.dumps(info | change))
    with pytest.raises(ValueError, match=rf"traces.json is damaged: {next(iter(change))}: "):
        Traces(copy)


def test_files_that_are_missing_damaged_or_too_short(copy):
    traces, path = Traces(copy), copy / "layer.001" / "attn_in.npy"
    data = path.read_bytes()
    for content in (data[:-10], data[:50], b""):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"layer.001/attn_in.npy is damaged: "):
            traces.tap(Tap("attn_in", 1))
    np.save(path, np.zeros((3, BASE["hidden_size"]), np.float16))
    with pytest.raises(ValueError, match=r"attn_in.npy has shape \[3, 32\], expected \[99, 32\]"):
        traces.tap(Tap("attn_in", 1))
    path.unlink()
    with pytest.raises(ValueError, match=r"copy lacks layer.001/attn_in.npy"):
        traces.tap(Tap("attn_in", 1))
    (copy / "layer.000" / "neurons.0-64.npy").unlink()
    with pytest.raises(ValueError, match=r"copy lacks layer.000/neurons.0-64.npy"):
        traces.neurons(0)


def test_traces_are_read_and_not_written(copy):
    before = files_of(copy)
    Traces(copy).tap(Tap("mlp_in", 0)).zero_()
    assert files_of(copy) == before
