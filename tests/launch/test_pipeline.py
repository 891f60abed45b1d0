"""From a text to sparse generation through the command line, and what goes wrong on the way."""

import json
import os
import subprocess
import sys

import pytest
import torch
from command import DID, WHAT, WHEN, WHO, dejavu, last_object, sentences
from safetensors.torch import load_file, save_file

from models import make_model

CPU = ["--device", "cpu"]
PNG = b"\x89PNG\r\n\x1a\n"


def launched(*arguments):
    """Runs the command on two ranks."""
    command = [sys.executable, "-m", "dejavu.launch.cli", "launch", "--nproc-per-node", "2"]
    run = subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, timeout=240)
    return run.returncode, run.stdout, run.stderr


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "text.txt"
    path.write_text(sentences(450, WHO, DID, WHAT, WHEN))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def steps(folder, text):
    """Every step's arguments and what came of it, on the embedded model."""
    windows = ["--text", text, "--window", 32, *CPU]
    traces, predictors = folder / "traces", folder / "predictors"
    arguments = {
        "collect": [*windows, "--part", "1/3", "--tokens", 1500, "--out", traces],
        "train": [
            *("--traces", traces, "--out", predictors, *CPU),
            *("--rank", 8, "--head-rank", 8, "--epochs", 1, "--batch", 256),
        ],
        "calibrate": [
            *("--predictors", predictors, *windows, "--part", "2/3", "--tokens", 192),
            *("--search-tokens", 128, "--max-ppl-increase", "25%", "--json"),
        ],
        "eval": [
            *(*windows, "--part", "3/3", "--tokens", 160, "--prefix", 1, "--sparsity", predictors),
            *("--sparsity", "lossless", "--out", folder / "results", "--name", "demo", "--json"),
        ],
        "generate": [
            *("--prompt", "The old man", "--sparsity", predictors, "--max-new-tokens", 24),
            *("--verify-every", 8, "--json", *CPU),
        ],
    }
    return {name: dejavu(name, *given) for name, given in arguments.items()}, arguments


def test_every_step_ends_well(steps):
    for status, _, err in steps[0].values():
        assert status == 0, err
        assert "Traceback" not in err and "error" not in err


def test_collecting_says_how_much_before(steps, folder):
    _, out, err = steps[0]["collect"]
    assert out == "" and "1472 tokens of text.txt" in err and "0.03 GB" in err
    info = json.loads((folder / "traces" / "traces.json").read_text())
    assert (info["windows"], info["window"], info["sparsity"]) == (46, 32, "dense")
    assert not (folder / "traces.partial").exists()


def test_training_says_what_comes_next(steps, folder):
    _, out, err = steps[0]["train"]
    assert out == "" and "next: dejavu calibrate --predictors" in " ".join(err.split())
    assert not (folder / "predictors.partial").exists()


def test_calibrating_shows_points_and_writes_a_report(steps, folder):
    _, out, err = steps[0]["calibrate"]
    assert "calibrated to max_ppl_increase 0.25" in out and "heads.7" in out and "report.png" in err
    manifest = json.loads((folder / "predictors" / "manifest.json").read_text())
    assert last_object(out) == manifest
    default = manifest["points"][manifest["default"]]
    assert default["mlp_density"] < 1 and default["ppl_increase"] <= 0.25
    assert sorted(p.name for p in (folder / "predictors").iterdir()) == [
        "manifest.json", "predictors.safetensors", "report.png",
    ]  # fmt: skip
    assert (folder / "predictors" / "report.png").read_bytes().startswith(PNG)


def test_the_manifest_says_how_it_was_made_and_names_no_folder(steps, folder, text):
    text_of_it = (folder / "predictors" / "manifest.json").read_text()
    assert str(folder) not in text_of_it and str(text.parent) not in text_of_it
    manifest = json.loads(text_of_it)
    assert [command.partition(" --device cpu ")[0] for command in manifest["commands"]] == [
        "dejavu collect --text text.txt --window 32",
        "dejavu train --traces traces --out predictors",
        "dejavu calibrate --predictors predictors --text text.txt --window 32",
    ]
    assert "--part 2/3" in manifest["commands"][2]
    assert [(s["use"], s["file"]) for s in manifest["sources"]] == [
        ("train", "text.txt"),
        ("calibrate", "text.txt"),
    ]
    assert manifest["sources"][0]["stop"] == manifest["sources"][1]["start"]


def test_evaluating_shows_rows_and_records_them(steps, folder, text):
    _, out, err = steps[0]["eval"]
    rows = last_object(out)["rows"]
    assert [row["policy"] for row in rows] == ["dense", "predictors", "lossless"]
    dense, sparse, lossless = rows
    assert dense["density_mlp"] == dense["density_heads"] == 1 and dense["ppl_increase"] == 0
    assert sparse["density_mlp"] < 1 and sparse["kl"] > 0
    assert lossless["density_mlp"] < 0.9 and abs(lossless["ppl_increase"]) < 1e-4
    assert "lossless" in out and "demo.json" in err
    record = json.loads((folder / "results" / "demo.json").read_text())
    assert record["rows"] == rows and record["command"].startswith("dejavu eval --text text.txt --window 32")
    assert str(folder) not in json.dumps(record) and str(text.parent) not in json.dumps(record)
    assert (record["model"], record["window"], record["windows"], record["tp"]) == ("opt-books-8m", 32, 5, 1)
    assert (folder / "results" / "demo.md").read_text().startswith("# demo")
    assert (folder / "results" / "demo.png").read_bytes().startswith(PNG)


def test_generating_is_sparse_on_one_rank_and_two(steps, folder):
    results, arguments = steps
    status, out, err = launched("generate", *arguments["generate"])
    assert (status, err) == (0, "")
    one, two = last_object(results["generate"][1]), json.loads(out)
    assert (one["tp"], two["tp"]) == (1, 2)
    assert one["results"] == two["results"] and len(one["results"][0]["token_ids"]) == 24
    for answer in (one, two):
        assert answer["policy"] == "predicted"
        assert 0 < answer["density"]["mlp"] < 1 and 0 < answer["density"]["heads"] <= 1
        assert answer["drift"]["checks"] == 3 and answer["drift"]["kl"] > 0
    assert one["density"] == pytest.approx(two["density"], abs=1e-3)


def test_generating_aloud_says_how_sparse_it_was(steps, folder):
    status, out, err = dejavu(
        "generate", "--prompt", "The captain", "--sparsity", folder / "predictors", "--verify-every", 4,
        "--max-new-tokens", 10, *CPU,
    )  # fmt: skip
    assert status == 0 and out.startswith("The captain")
    assert "predicted: " in err and "% of neurons, " in err and "drift over 3 checks: KL " in err


def test_the_same_text_is_not_used_twice(steps, folder, text):
    arguments = steps[1]
    for name, change, use in (
        ("calibrate", {"--part": "1/3"}, "train"),
        ("eval", {"--part": "1/3"}, "train"),
        ("eval", {"--part": "2/3"}, "calibrate"),
    ):
        given = list(arguments[name])
        for option, value in change.items():
            given[given.index(option) + 1] = value
        status, out, err = dejavu(name, *given)
        assert_one_clear_line(status, err, f"of this text to {use}; take another text or --part")
        assert out == ""


def test_what_is_there_is_not_written_over(steps):
    for name in ("collect", "train"):
        status, _, err = dejavu(name, *steps[1][name])
        assert status == 2 and err.splitlines()[-1].endswith("exists already")


def assert_one_clear_line(status, err, message):
    lines = err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0], err
    assert status == 2


@pytest.fixture(scope="module")
def small(tmp_path_factory, text):
    """A folder to work in: a model and another one, a text, too small ones, and predictors in every state."""
    here = tmp_path_factory.mktemp("small")
    make_model(here / "model")
    make_model(here / "other", seed=1)
    (here / "text.txt").write_text(text.read_text())
    (here / "empty.txt").write_text("\n")
    (here / "short.txt").write_text("It was late.")
    (here / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    (here / "exists").mkdir()
    for model, name in (("model", "raw"), ("model", "calibrated"), ("other", "others")):
        made = dejavu(
            "train", "--model", here / model, "--method", "svd", "--rank", 8, "--out", here / name, *CPU
        )
        assert made[0] == 0, made
    for model, name in (("model", "calibrated"), ("other", "others")):
        made = dejavu(
            "calibrate", "--model", here / model, "--predictors", here / name, "--text", here / "text.txt",
            "--window", 16, "--tokens", 256, "--recall", 0.9, "--part", "1/2", *CPU,
        )  # fmt: skip
        assert made[0] == 0, made
    return here


COLLECT = "collect --model model --out new"
TRAIN = "train --model model --out new"
CALIBRATE = "calibrate --model model --predictors raw"
EVAL = "eval --model model --prefix 1 --part 2/2"
GENERATE = "generate --model model --prompt Once --max-new-tokens 3"
TEXT = "--text text.txt --window 16"
MISTAKES = {
    f"{COLLECT} --window 16 --text none.txt": "cannot read none.txt: No such file or directory",
    f"{COLLECT} --window 16 --text empty.txt": "empty.txt is empty",
    f"{COLLECT} --text short.txt --window 16": "short.txt is too short: ",
    f"{COLLECT} --window 16 --text bytes.txt": "cannot read bytes.txt: not UTF-8 text",
    f"{COLLECT} --window 16": "--text",
    f"{COLLECT} {TEXT} --tokens -5": "tokens=-5 is less than the 16 of a window",
    f"{COLLECT} {TEXT} --tokens 15": "tokens=15 is less than the 16 of a window",
    f"{COLLECT} {TEXT} --part 3/2": "part='3/2' is not of the form i/n",
    f"{COLLECT} {TEXT} --sparsity nowhere": "sparsity='nowhere' is neither dense, lossless",
    f"{COLLECT} {TEXT} --sparsity raw": "raw is not calibrated: run dejavu calibrate on it first",
    f"{COLLECT} {TEXT} --density 0.5": "density=0.5 belongs to predictors; dense has none",
    f"{COLLECT} {TEXT} --window 1": "--window",
    f"{COLLECT} --text text.txt --window 257": "windows of 257 tokens do not fit the model's 256 positions",
    f"{COLLECT} --text text.txt --window many": "--window",
    f"{TRAIN} --method magic": "method='magic' is unknown: use predicted, svd, ",
    f"{TRAIN} --method svd --lookahead three": "lookahead='three' is unknown: use none, half, one, two",
    f"{TRAIN} --method svd --kind neurons": "kinds=('neurons',): expected one or both of mlp and heads",
    f"{TRAIN} --method svd --bits 5": "bits=5 is not one of (2, 3, 4, 8, 16)",
    f"{TRAIN} --method svd --refine-bits 16": "refine_bits=16 is not one of",
    f"{TRAIN} --method svd --rank 0": "rank=0 is less than 1",
    f"{TRAIN} --method svd --rank-of mlp.0": "--rank-of mlp.0: expected NAME=RANK, as mlp.0=64",
    f"{TRAIN} --method svd --rank-of mlp.0=-3": "--rank-of mlp.0=-3: expected NAME=RANK, as mlp.0=64",
    f"{TRAIN} --method svd --rank-of mlp.0=0": "rank 0 of mlp.0 is less than 1",
    f"{TRAIN} --method svd --rank-of mlp.9=4": "there is no predictor mlp.9",
    f"{TRAIN} --method svd --start nowhere": "nowhere is no directory of predictors: it has no manifest.json",
    TRAIN: "method predicted needs --traces",
    f"{TRAIN} --traces nowhere": "nowhere is no directory of traces: it has no traces.json",
    f"{TRAIN} --epochs 0 --method svd": "epochs=0.0",
    "train --model model --method svd --out exists": "exists exists already",
    "train --model nowhere --method svd --out new": "no such model: 'nowhere'",
    f"{CALIBRATE} {TEXT}": "calibrate to one of --max-ppl-increase, --recall, and --mlp-density",
    f"{CALIBRATE} {TEXT} --recall 0.9 --mlp-density 0.1": "calibrate to one of --max-ppl-increase",
    f"{CALIBRATE} {TEXT} --max-ppl-increase 0%": "max_ppl_increase=0.0 is not in (0, 1]",
    f"{CALIBRATE} {TEXT} --max-ppl-increase 150%": "max_ppl_increase=1.5 is not in (0, 1]",
    f"{CALIBRATE} {TEXT} --max-ppl-increase abc": "'abc' is no share: write 1% or 0.01",
    f"{CALIBRATE} {TEXT} --mlp-density 0": "mlp_density=0.0 is not in (0, 1]",
    f"{CALIBRATE} {TEXT} --mlp-density 2": "mlp_density=2.0 is not in (0, 1]",
    f"{CALIBRATE} --text none.txt --window 16 --recall 0.9": "cannot read none.txt: No such file",
    f"{CALIBRATE} --text empty.txt --window 16 --recall 0.9": "empty.txt is empty",
    "calibrate --model model --predictors nowhere --text text.txt --window 16 --recall 0.9": (
        "nowhere is no directory of predictors: it has no manifest.json"
    ),
    "calibrate --model model --predictors others --text text.txt --window 16 --recall 0.9": (
        "others is of another model: its fingerprint is "
    ),
    f"{EVAL} --window 16 --text none.txt --sparsity lossless": "cannot read none.txt: No such file",
    f"{EVAL} {TEXT}": "--sparsity",
    f"{EVAL} {TEXT} --sparsity nowhere --out new": "sparsity='nowhere' is neither dense, lossless",
    f"{EVAL} {TEXT} --sparsity raw --out new": "raw is not calibrated: run dejavu calibrate on",
    f"{EVAL} {TEXT} --sparsity others --out new": "others is of another model",
    f"{EVAL} {TEXT} --sparsity calibrated@0": "density=0.0 is outside the calibrated range",
    f"{EVAL} {TEXT} --sparsity calibrated@2": "density=2.0 is outside the calibrated range",
    f"{EVAL} {TEXT} --sparsity calibrated@much": "'calibrated@much': 'much' is no density",
    f"{EVAL} {TEXT} --sparsity lossless@0.5": "density=0.5 belongs to predictors; lossless has none",
    f"{EVAL} {TEXT} --sparsity lossless --prefix 16": "a prefix of 16 leaves nothing of windows",
    f"{EVAL} {TEXT} --sparsity lossless --part 0/2": "part='0/2' is not of the form i/n",
    f"{GENERATE} --sparsity others": "others is of another model: its fingerprint is ",
    f"{GENERATE} --sparsity raw": "raw is not calibrated: run dejavu calibrate on it first",
    f"{GENERATE} --sparsity nowhere": "sparsity='nowhere' is neither dense, lossless",
    f"{GENERATE} --sparsity exists": "exists is no directory of predictors: it has no manifest.json",
    f"{GENERATE} --sparsity calibrated --density 0": "density=0.0 is outside the calibrated range",
    f"{GENERATE} --sparsity calibrated --density 2": "density=2.0 is outside the calibrated range",
    f"{GENERATE} --sparsity lossless --density 0.5": "density=0.5 belongs to predictors; lossless has none",
    f"{GENERATE} --density 0.5": "density=0.5 belongs to predictors; dense has none",
    f"{GENERATE} --verify-every 4": "verify_every=4: expected 0 or more, and a sparse policy to verify",
    f"{GENERATE} --sparsity calibrated --verify-every -1": "--verify-every",
    f"{GENERATE} --sparsity calibrated --fill-kv never": "fill_kv='never' is unknown: use auto, lazy, always",
}


def everything_in(folder):
    return {p: p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


@pytest.mark.parametrize("command", MISTAKES)
def test_mistakes_end_in_one_line_and_leave_nothing(small, monkeypatch, command):
    monkeypatch.chdir(small)
    before = everything_in(small)
    status, out, err = dejavu(*command.split(), *CPU)
    assert_one_clear_line(status, err, MISTAKES[command])
    assert out == "" and everything_in(small) == before


def test_commands_with_equals_signs_are_kept_whole(small, tmp_path):
    made = ["--method=svd", "--rank=8", f"--model={small / 'model'}", f"--out={tmp_path / 'made'}"]
    assert dejavu("train", *made, *CPU)[0] == 0
    manifest = json.loads((tmp_path / "made" / "manifest.json").read_text())
    assert manifest["commands"] == [
        "dejavu train --method=svd --rank=8 --model=model --out=made --device cpu"
    ]


def test_fewer_tokens_to_search_on_than_none(small, monkeypatch):
    monkeypatch.chdir(small)
    given = (
        "calibrate --model model --predictors calibrated --text text.txt --window 16 --tokens 64 --part 1/2"
    )
    before = everything_in(small)
    try:
        status, _, err = dejavu(*given.split(), "--recall", 0.9, "--search-tokens", -5, *CPU)
        assert_one_clear_line(status, err, "search")
    finally:
        for path, content in before.items():
            if content is not None:
                path.write_bytes(content)


def test_results_for_a_file_and_no_folder(small, monkeypatch):
    monkeypatch.chdir(small)
    given = [*EVAL.split(), *TEXT.split(), "--tokens", 32, "--sparsity", "lossless", "--out", "short.txt"]
    status, _, err = dejavu(*given, *CPU)
    assert_one_clear_line(status, err, "short.txt")


def test_an_interval_of_one_window_is_json(small, monkeypatch):
    monkeypatch.chdir(small)
    given = [*EVAL.split(), *TEXT.split(), "--tokens", 16, "--sparsity", "lossless", "--json"]
    status, out, _ = dejavu(*given, *CPU)
    assert status == 0 and "Infinity" not in out.splitlines()[-1]


def test_traces_of_a_sparse_run_name_no_folder(small, tmp_path):
    (tmp_path / "text.txt").write_text(sentences(20) + " The end.")
    given = ["--model", small / "model", "--text", tmp_path / "text.txt", "--window", 16]
    out = tmp_path / "traces"
    assert dejavu("collect", *given, "--sparsity", small / "calibrated", "--out", out, *CPU)[0] == 0
    assert json.loads((out / "traces.json").read_text())["sparsity"].split()[0] == "calibrated"


def test_a_collection_begun_at_another_density_is_not_gone_on_with(small, tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text(sentences(200) + " The end.")
    given = ["--model", small / "model", "--text", tmp_path / "text.txt", "--window", 16, *CPU]
    given += ["--out", tmp_path / "traces", "--sparsity", small / "calibrated"]
    points = json.loads((small / "calibrated" / "manifest.json").read_text())["points"]

    def full(*arguments):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr("dejavu.predictors.collect._finish", full)
        assert dejavu("collect", *given, "--density", points[0]["mlp_density"])[0] == 2
    status, _, err = dejavu("collect", *given, "--density", points[-1]["mlp_density"])
    assert status == 2 and "was begun with another" in err


def test_an_error_ends_both_ranks(small, monkeypatch):
    monkeypatch.chdir(small)
    before = everything_in(small)
    given = [*COLLECT.split(), "--text", "short.txt", "--window", 16]
    status, out, err = launched(*given, *CPU)
    assert_one_clear_line(status, err, "short.txt is too short: ")
    assert out == "" and everything_in(small) == before


def test_damage_that_rank_1_alone_sees_is_told(small, tmp_path):
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "manifest.json").write_bytes((small / "raw" / "manifest.json").read_bytes())
    tensors = load_file(small / "raw" / "predictors.safetensors")
    tensors["mlp.1.bias"][-1] = torch.nan
    save_file(tensors, damaged / "predictors.safetensors")
    status, _, err = launched(
        "calibrate", "--model", small / "model", "--predictors", damaged, "--text", small / "text.txt",
        "--window", 16, "--tokens", 64, "--recall", 0.9, *CPU,
    )  # fmt: skip
    assert_one_clear_line(status, err, "mlp.1.bias holds numbers that are not finite")
    assert os.listdir(damaged) == ["manifest.json", "predictors.safetensors"]
