"""`dejavu convert --balance` on the embedded model, and what goes wrong with it."""

import json

import pytest
from command import DID, WHAT, WHO, dejavu, last_object, sentences

from dejavu.predictors.files import read_manifest

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = ["--device", "cpu"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("convert")
    (folder / "text.txt").write_text(sentences(300, WHO, DID, WHAT))
    return folder


@pytest.fixture(scope="module")
def convert(folder):
    def convert(*more, out="balanced", balance="text.txt", predictors="demo"):
        options = ["--predictors", predictors, "--balance", folder / balance, "--out", folder / out]
        return ["convert", *options, "--window", 32, "--tokens", 320, *CPU, *more]

    return convert


@pytest.fixture(scope="module")
def converted(folder, convert):
    return dejavu(*convert("--results", folder / "results", "--json"))


def test_what_it_says(folder, converted):
    status, out, err = converted
    assert status == 0, err
    assert "the slowest rank over the mean" in out and "what a token chooses over the mean token" in out
    assert f"{folder / 'balanced'}, with its predictors in {folder / 'balanced' / 'predictors'}" in err
    for row in last_object(out)["rows"]:
        if "ranks" in row and row["kind"] == "mlp":
            assert row["floor"] <= row["after"] < row["before"]


def test_its_record(folder, converted):
    record = json.loads((folder / "results" / "balance-opt-books-8m.json").read_text())
    assert record["rows"] == last_object(converted[1])["rows"]
    assert record["command"].startswith("dejavu convert --predictors demo --balance text.txt --out balanced ")
    assert record["counted_characters"][1] == record["characters"][0]
    assert record["blocks"] == {"mlp": 16, "heads": 8}
    table = (folder / "results" / "balance-opt-books-8m.md").read_text()
    assert "| kind | ranks | before | after | floor |" in table and "| tokens of | density |" in table
    assert str(folder) not in json.dumps(record) + table


def test_the_manifest_names_no_folder(folder, converted):
    manifest = read_manifest(folder / "balanced" / "predictors")
    assert manifest.commands[-1].startswith("dejavu convert --predictors demo --balance text.txt ")
    assert str(folder) not in manifest.model_dump_json()


def test_it_writes_the_same_text(folder, converted):
    ask = ["generate", "--prompt", "The old man", "--max-new-tokens", 24, "--json", *CPU]
    new = [*ask, "--model", folder / "balanced"]
    predictors = folder / "balanced" / "predictors"

    def texts(run):
        status, out, err = run
        assert status == 0, err
        return [result["text"] for result in last_object(out)["results"]]

    dense, sparse = texts(dejavu(*ask)), texts(dejavu(*ask, "--sparsity", "demo"))
    assert texts(dejavu(*new)) == dense
    assert texts(dejavu(*new, "--sparsity", predictors)) == sparse


CASES = {
    "there already": (["--results", "r"], {}, "balanced exists already"),
    "an empty text": ([], {"balance": "empty.txt", "out": "x"}, "part 1/2 of {}/empty.txt is empty"),
    "no text": (
        [],
        {"balance": "none.txt", "out": "x"},
        "cannot read {}/none.txt: No such file or directory",
    ),
    "a short text": ([], {"balance": "short.txt", "out": "x"}, "short.txt is too short"),
    "the same text twice": (["--report-part", "1/1"], {"out": "x"}, "overlap"),
    "dense": ([], {"predictors": "dense", "out": "x"}, "dense is no directory of predictors"),
    "no predictors": ([], {"predictors": "none", "out": "x"}, "none is no directory of predictors"),
    "no plain name": (["--name", "a/b", "--results", "r"], {"out": "x"}, "name='a/b' is no plain name"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_goes_wrong(folder, convert, converted, case):
    more, settings, expected = CASES[case]
    (folder / "empty.txt").write_text("")
    (folder / "short.txt").write_text("A word.\n" * 4)
    status, _, err = dejavu(*convert(*more, **settings))
    assert status == 2 and expected.format(folder) in err
    assert err.startswith("error: ") and len(err.splitlines()) == 1
    assert not (folder / "x").exists() and not (folder / "x.partial").exists()


def test_what_must_be_given():
    status, _, err = dejavu("convert", "--predictors", "demo")
    assert status == 2 and "Missing option" in err
