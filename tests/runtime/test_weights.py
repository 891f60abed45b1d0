"""Loading: every format gives the same weights, each rank reads its own share, and damage is named."""

import gc
import json
import shutil
import weakref
from functools import partial
from types import SimpleNamespace

import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file

from dejavu.runtime import weights
from dejavu.runtime.engine import Engine
from dejavu.runtime.weights import find_model
from models import make_model
from ranks import run_ranks


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def copy(model_dir, tmp_path):
    """A copy of the model that a test may damage."""
    return shutil.copytree(model_dir, tmp_path / "copy")


def as_single_bin(directory):
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()


def as_old_hub_bin(directory):
    """The names of the first OPT files on the hub, without the prefix ``model.``."""
    tensors = load_file(directory / "model.safetensors")
    tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    torch.save(tensors, directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()


def as_shards(directory, save, suffix):
    """Three files, a tensor here and a tensor there, and their index."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    files = [f"{stem}-{i + 1:05}-of-00003.{suffix}" for i in range(3)]
    where = {name: files[i % 3] for i, name in enumerate(sorted(tensors))}
    for file in files:
        save({name: tensors[name] for name in tensors if where[name] == file}, directory / file)
    index = directory / f"{stem}.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))


FORMATS = {
    "one .bin": as_single_bin,
    "the hub's old names": as_old_hub_bin,
    "sharded safetensors": partial(as_shards, save=save_file, suffix="safetensors"),
    "sharded .bin": partial(as_shards, save=torch.save, suffix="bin"),
}


def state(tp, directory):
    model = Engine.from_pretrained(str(directory), tp=tp, dtype="fp32").model
    return {name: p.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("form", FORMATS)
def test_every_format_gives_the_same_weights(model_dir, copy, form, ranks):
    FORMATS[form](copy)
    expected = run_ranks(ranks, state, model_dir)
    for found, wanted in zip(run_ranks(ranks, state, copy), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=0, rtol=0)


def test_weights_lie_head_and_neuron_major(model_dir):
    model = Engine.from_pretrained(str(model_dir), dtype="fp32", device="cpu").model
    stored = load_file(model_dir / "model.safetensors")
    name = "model.decoder.layers.1"
    layer = model.layers[1]
    assert layer.mlp.fc2.weight.data.is_contiguous() and layer.self_attn.qkv_proj.weight.data.is_contiguous()
    torch.testing.assert_close(layer.mlp.fc2.weight.data, stored[f"{name}.fc2.weight"].T)
    heads = layer.self_attn.qkv_proj.weight.data  # [N, 3, H, D]
    assert heads.shape == (4, 3, 8, 32)
    torch.testing.assert_close(heads[2, 1], stored[f"{name}.self_attn.k_proj.weight"][16:24])
    out = layer.self_attn.out_proj.weight.data
    torch.testing.assert_close(out[16:24], stored[f"{name}.self_attn.out_proj.weight"][:, 16:24].T)
    assert layer.mlp.fc1.weight.scale is None


class Counter:
    """Counts, where the file libraries hand it out, what a rank reads and what it holds of that at a time."""

    def __init__(self):
        self.read = self.alive = self.peak = self.largest = 0

    def take(self, part):
        self.read += part.nbytes
        self.alive += part.nbytes
        self.peak, self.largest = max(self.peak, self.alive), max(self.largest, part.nbytes)
        weakref.finalize(part, self.give_back, part.nbytes)
        return part

    def give_back(self, n):
        self.alive -= n

    def lazily(self, tensor):
        """A stand-in for a slice of safetensors or a mapped tensor: only indexing it reads."""
        shape = tensor.shape if isinstance(tensor, torch.Tensor) else tensor.get_shape()
        index = type("Lazy", (), {"__getitem__": lambda _, index: self.take(tensor[index])})()
        index.get_shape = lambda: list(shape)
        return index

    def safe_open(self, path, framework):
        file = safetensors.safe_open(path, framework=framework)
        return SimpleNamespace(keys=file.keys, get_slice=lambda name: self.lazily(file.get_slice(name)))

    def torch_load(self, path, **options):
        assert options["mmap"] and options["weights_only"]
        return {name: self.lazily(tensor) for name, tensor in TORCH_LOAD(path, **options).items()}


TORCH_LOAD = torch.load


def reading(tp, directory):
    """What this rank reads while it loads, and the bytes of weights it then holds."""
    counter = Counter()
    weights.safe_open, torch.load = counter.safe_open, counter.torch_load
    gc.disable()
    try:
        engine = Engine.from_pretrained(str(directory), tp=tp, dtype="fp32")
        config = engine.model.config
        counter.read -= config.num_layers * 2 * config.hidden_size * 4  # the rows of the fingerprint
    finally:
        weights.safe_open, torch.load = safetensors.safe_open, TORCH_LOAD
        gc.enable()
    return counter.read, sum(p.nbytes for p in engine.model.parameters()), counter.peak, counter.largest


@pytest.mark.parametrize("form", [None, "one .bin"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_rank_reads_its_share_and_holds_one_tensor_more(copy, ranks, form):
    if form is not None:
        FORMATS[form](copy)
    for bytes_read, held, peak, largest in run_ranks(ranks, reading, copy):
        assert bytes_read == held > 0  # every byte it holds is read, and read once
        assert peak == largest


def test_shares_of_the_sharded_tensors_add_up(model_dir):
    whole = sum(t.nbytes for t in load_file(model_dir / "model.safetensors").values())
    read = [bytes_read for bytes_read, *_ in run_ranks(4, reading, model_dir)]
    replicated = (4 * read[0] - whole) / 3  # positions, norms, row-parallel biases
    assert len(set(read)) == 1
    assert 0 < replicated < 0.3 * whole


FC1 = "model.decoder.layers.0.fc1.weight"


def load(directory):
    return Engine.from_pretrained(str(directory), dtype="fp32", device="cpu")


def edit_config(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def rewrite(directory, change):
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda d: (d / "model.safetensors").unlink(), "copy has no weights: expected one of model.safetens"),
        (lambda d: (d / "config.json").unlink(), "copy is no model directory: it has no config.json"),
        (
            lambda d: (d / "tokenizer.json").unlink(),
            "copy has no usable tokenizer",
        ),
        (
            lambda d: [(d / name).unlink() for name in ("tokenizer.json", "tokenizer_config.json")],
            "copy has no usable tokenizer",
        ),
        (
            lambda d: (d / "model.safetensors").write_bytes(b"\xff" * 64),
            r"model\.safetensors is damaged or no safetensors file",
        ),
        (
            lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:-100]),
            r"model\.safetensors is damaged or no safetensors file",
        ),
        (lambda d: edit_config(d, ffn_dim=128), r"fc1\.weight has shape \[64, 32\].* expects \[128, 32\]"),
        (lambda d: edit_config(d, num_hidden_layers=3), r"copy has no tensor model\.decoder\.layers\.2\."),
        (lambda d: edit_config(d, tie_word_embeddings=False), r"copy has no tensor lm_head\.weight"),
        (
            lambda d: rewrite(d, lambda t: t.update({FC1: t[FC1].to(torch.int8)})),
            r"layers\.0\.fc1\.weight is torch\.int8, expected one of 16, 32 or 64-bit floats",
        ),
        (
            lambda d: rewrite(d, lambda t: t.pop("model.decoder.layers.0.fc1.bias")),
            r"copy has no tensor model\.decoder\.layers\.0\.fc1\.bias",
        ),
    ],
)
def test_damage_is_named(copy, damage, message):
    damage(copy)
    with pytest.raises(ValueError, match=message):
        load(copy)


def test_a_missing_shard_is_named(copy):
    FORMATS["sharded safetensors"](copy)
    (copy / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(
        ValueError, match=r"lacks model-00002-of-00003.safetensors, which model.safetensors.ind"
    ):
        load(copy)


@pytest.mark.parametrize("index", ["{", "[]", '{"weight_map": 3}', "{}"])
def test_a_damaged_index_is_named(copy, index):
    FORMATS["sharded .bin"](copy)
    (copy / "pytorch_model.bin.index.json").write_text(index)
    with pytest.raises(ValueError, match=r"pytorch_model.bin.index.json is damaged"):
        load(copy)


def test_a_truncated_bin_is_named(copy):
    FORMATS["one .bin"](copy)
    path = copy / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"pytorch_model.bin is damaged"):
        load(copy)


def test_one_whole_file_goes_before_a_stale_index(copy):
    (copy / "model.safetensors.index.json").write_text('{"weight_map": {"x": "gone.safetensors"}}')
    assert load(copy).model.layers


def test_progress_ends_where_it_said(model_dir):
    seen = []
    Engine.from_pretrained(
        str(model_dir), device="cpu", dtype="fp16", on_load=lambda done, total: seen.append((done, total))
    )
    done, totals = zip(*seen, strict=True)
    assert list(done) == sorted(done) and done[-1] == totals[-1] and len(set(totals)) == 1


def test_a_pickle_with_code_is_refused(copy):
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("the pickle ran",))

    (copy / "model.safetensors").unlink()
    torch.save({"x": Bomb()}, copy / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model.bin is damaged or holds more than plain tensors"):
        load(copy)


def test_hub_ids_come_from_the_cache(model_dir, tmp_path, monkeypatch):
    repo = tmp_path / "models--someone--tiny-opt"
    shutil.copytree(model_dir, repo / "snapshots" / "abc")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert find_model("someone/tiny-opt") == repo / "snapshots" / "abc"


@pytest.mark.parametrize("name", ["no-such-directory", "/no/such/directory", "./nope", "some one/model", ""])
def test_a_name_that_can_be_no_model(name):
    with pytest.raises(ValueError, match="no such model"):
        find_model(name)


def test_a_hub_id_that_is_not_to_be_had(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match="'someone/none' is not a directory, and the hub cannot be reached"):
        find_model("someone/none")


def damaged_on_one_rank(tp, directory):
    if tp.rank == 1:
        directory = directory / "nowhere"
    with pytest.raises(ValueError, match="rank 1: no such model"):
        Engine.from_pretrained(str(directory), tp=tp)


def test_what_fails_on_one_rank_is_raised_on_all(model_dir):
    assert run_ranks(2, damaged_on_one_rank, model_dir) == [None, None]
