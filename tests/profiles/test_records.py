import json

import pytest

from dejavu.profiles.records import command_line, device_name, device_slug, write_file, write_record


def test_a_record_holds_its_conditions_and_its_table(tmp_path):
    rows = [{"op": "mlp", "us_p50": 12.3456}, {"op": "head", "gib": 2}]
    path = write_record(tmp_path, "kernels-test", rows, command="make it", dtype="bf16")
    record = json.loads(path.read_text())
    assert record["rows"] == rows and record["dtype"] == "bf16" and record["command"] == "make it"
    assert all(record[key] for key in ("commit", "date", "device", "torch", "triton"))
    table = (tmp_path / "kernels-test.md").read_text()
    assert "| op | us_p50 | gib |" in table and "| mlp | 12.35 |  |" in table and "dtype bf16" in table
    assert sorted(p.name for p in tmp_path.iterdir()) == ["kernels-test.json", "kernels-test.md"]


@pytest.mark.parametrize(
    ("environment", "launcher"),
    [
        ({}, ""),
        ({"WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}, ""),
        ({"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}, "launch --nproc-per-node 2 "),
        ({"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}, "launch --nnodes 2 --nproc-per-node 4 "),
    ],
)
def test_a_command_that_can_be_repeated(environment, launcher, monkeypatch, tmp_path):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(
        "sys.argv", ["cli.py", "bench", "decode", "--model", "facebook/opt-66b", "--out", str(tmp_path)]
    )
    assert command_line() == f"dejavu {launcher}bench decode --model facebook/opt-66b --out {tmp_path.name}"


def test_the_hardware_is_that_of_the_ranks_and_not_all_of_the_machine(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert device_name() == "1 x NVIDIA H100 80GB HBM3" and device_slug() == "1xh100"
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert device_name() == "2 x NVIDIA H100 80GB HBM3" and device_slug() == "2xh100"
    assert device_slug(8) == "8xh100"


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "record.json"
    path.write_text("old")
    monkeypatch.setattr("os.fsync", lambda fd: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_file(path, "new")
    assert path.read_text() == "old"
