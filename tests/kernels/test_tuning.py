"""The table of launch settings that ships with the package."""

import json
import math

import pytest
import torch
from triton.runtime.errors import OutOfResources

from dejavu.kernels import predict, qkv, sparse_attention, sparse_mlp, weighted_rows
from dejavu.kernels.device import row_settings
from dejavu.kernels.tuning import TABLE, asked, crossover, forget, override, settings, shape_key
from dejavu.profiles.kernel_bench import DTYPES, SHAPES, Local
from dejavu.profiles.tune import (
    STEP_KERNELS,
    _key,
    candidates,
    crossing,
    tune_steps,
    write_crossovers,
    write_table,
)

CPU = torch.device("cpu")


def defaults(tokens=1, predictors=torch.float16):
    fc1 = sparse_mlp.default_settings(4096, torch.bfloat16, tokens)
    rows = weighted_rows.default_settings(torch.bfloat16, tokens)
    words = predictors == torch.int8
    of_all = {"fc1_all": fc1, "fc2_all": rows, "out_proj_all": rows} if tokens == 1 else {}
    return of_all | {
        "fc1": fc1,
        "fc2": rows,
        "out_proj": rows,
        "qkv": qkv.default_settings(torch.bfloat16, tokens, CPU),
        "qkv_all": row_settings(4096, torch.bfloat16),
        "attention": sparse_attention._default_attention_settings(32, CPU),
        "down": predict._default_down_settings(4096, predictors, tokens, words=words),
        "up": predict._default_up_settings(1024, predictors, tokens, words=words),
        "down_beside": predict._default_down_settings(4096, predictors, tokens, True, words=words),
        "up_beside": predict._default_up_settings(1024, predictors, tokens, True, words=words),
    }


def test_every_entry_has_the_settings_that_its_kernel_takes():
    table = json.loads(TABLE.read_text())
    assert table
    for entries in table.values():
        for key, entry in entries.items():
            predictors = torch.int8 if " 8-bit" in key else torch.float16
            expected = defaults(1 + key.endswith("several"), predictors)[key.split()[0]]
            assert entry.keys() == expected.keys(), key


@pytest.mark.parametrize(
    ("kernel", "tokens"),
    [
        (kernel, n)
        for kernel in defaults()
        for n in (1, 8)
        if n == 1 or not (kernel == "attention" or kernel.endswith(("_all", "_beside")))
    ],
)
def test_what_is_tried_has_the_settings_that_its_kernel_takes(kernel, tokens):
    for dtype in (torch.int8, torch.float16):
        found = candidates(kernel, 1024, dtype.itemsize, tokens)
        assert found and all(s.keys() == defaults(tokens, dtype)[kernel].keys() for s in found)


def test_the_table_comes_before_the_default_and_a_trial_before_both(monkeypatch, tmp_path):
    path = tmp_path / "tuned.json"
    path.write_text("{}")
    for module in ("dejavu.kernels.tuning", "dejavu.profiles.tune"):
        monkeypatch.setattr(f"{module}.TABLE", path)
    wanted = ("fc1", {"ROWS": 2}, 64, 32, torch.float16, 1, CPU)
    write_table({shape_key("fc1", 64, 32, torch.bfloat16): {"ROWS": 8}}, CPU)
    assert settings(*wanted) == {"ROWS": 8}  # of any 16-bit type
    assert settings("fc1", {"ROWS": 2}, 64, 48, torch.float16, 1, CPU) == {"ROWS": 2}
    assert settings("fc1", {"ROWS": 2}, 64, 32, torch.float16, 3, CPU) == {"ROWS": 2}  # several tokens
    monkeypatch.setitem(override, shape_key("fc1", 64, 32, torch.bfloat16), {"ROWS": 4})
    assert settings(*wanted) == {"ROWS": 4} and "fc1 64x32 16-bit" in asked
    assert settings("fc1", {"ROWS": 2}, 64, 48, torch.float16, 1, CPU) == {"ROWS": 2}
    monkeypatch.setitem(override, "fc1", {"ROWS": 1})  # of all shapes
    assert settings(*wanted) == {"ROWS": 1}
    monkeypatch.undo()
    forget()


@pytest.mark.parametrize(
    ("tokens", "chosen", "names"),
    [(1, False, ["fc1_all", "fc2_all"]), (1, True, ["fc1", "fc2"]), (3, False, ["fc1", "fc2"])],
)
def test_one_token_has_settings_of_its_own_for_all_rows(monkeypatch, tokens, chosen, names):
    asked = []
    for module in (sparse_mlp, weighted_rows):
        monkeypatch.setattr(module, "settings", lambda name, default, *_: asked.append(name) or default)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    x, fc1, fc2 = (torch.zeros(*shape, device=device) for shape in ((tokens, 1, 32), (8, 32), (8, 32)))
    ids = (
        torch.arange(8, dtype=torch.int32, device=device),
        torch.tensor([4], dtype=torch.int32, device=device),
    )
    of = ids if chosen else (None, None)
    sparse_mlp._sparse_mlp(x, fc1, None, None, fc2, None, *of, torch.empty_like(x), None, None)
    assert asked == names
    if tokens == 1:
        keys = [shape_key(name, 18432, 9216, torch.bfloat16) for name in names]
        assert [_key(name, Local("opt-66b", 2), "bf16", 0, 1) for name in names] == keys


def test_steps_are_tuned_one_kernel_beside_the_ones_before():
    """A step that takes what its kernels say: fc1 gains, fc2 by too little, and what does not fit is out."""
    local, seen = Local("opt-66b", 2), []
    keys = [_key(*of, 1) for of in (
        ("fc1", local, "bf16", 0), ("fc2", local, "bf16", 0), ("down_beside", local, "int8", 1024)
    )]  # fmt: skip
    assert keys[2] == shape_key("down_beside", 1024, 9216, torch.int8)
    tried = {key: candidates(key.split()[0], 9216, 1 if "8-bit" in key else 2) for key in keys}
    times = {(keys[0], 3): 0.9, (keys[1], 1): 0.9995, (keys[2], 0): 0.95}

    def step_ms():
        asked.update(override)
        in_use = [(key, tried[key].index(settings)) for key, settings in override.items()]
        if (keys[1], 2) in in_use:
            raise OutOfResources(300000, 232448, "shared memory")
        return 10 * math.prod(times.get(item, 1.0) for item in in_use)

    kernels = [key.split()[0] for key in (keys[0], *keys)]  # one of them twice
    best = tune_steps(step_ms, kernels, local, "bf16", ("int8", 1024), lambda *trial: seen.append(trial))
    assert best == {keys[0]: tried[keys[0]][3], keys[2]: tried[keys[2]][0]} and not override
    assert [ms for _, settings, ms in seen if settings is None] == pytest.approx([10, 9, 9])
    assert ("fc2", tried[keys[1]][2], math.inf) in seen
    assert len(seen) == 3 + sum(map(len, tried.values()))
    assert all(candidates(kernel, 1024, 2) for kernel in STEP_KERNELS)


def test_what_steps_do_not_take_is_not_tuned():
    trials = []
    with pytest.raises(ValueError, match="--tune attention: these steps take none of its settings"):
        tune_steps(lambda: 1.0, ["attention"], Local("opt-66b", 2), "bf16", ("int8", 1024),
                   lambda *trial: trials.append(trial))  # fmt: skip
    assert not override and trials == [("attention", None, 1.0)]


def test_a_crossover_is_the_tables_for_the_next_power_of_2(monkeypatch, tmp_path):
    path = tmp_path / "crossover.json"
    path.write_text("{}")
    for module in ("dejavu.kernels.tuning", "dejavu.profiles.tune"):
        monkeypatch.setattr(f"{module}.CROSSOVERS", path)
    forget()
    of = (16384, 4096, torch.bfloat16)
    assert [crossover(*of, batch, CPU) for batch in (1, 2, 40)] == [1.0, 0.5, 0.5]
    row = {"shape": "opt-6.7b", "tp": 1, "weights": "bf16", "engine": "dejavu", "live": 1.0}
    sparse = [{**row, "density": d, "us_p50": 100 * d + 20} for d in (1.0, 0.5, 0.1)]
    slow = {**row, "density": 0.1, "us_p50": 500.0, "live": 1 / 3}
    dense = [{**row, "engine": name, "us_p50": us} for name, us in (("cublas", 90.0), ("dejavu dense", 95.0))]
    write_crossovers([*dense, *sparse, slow], 8, CPU)
    assert [crossover(*of, batch, CPU) for batch in (4, 5, 8, 16)] == [0.5, 0.7, 0.7, 0.5]
    assert crossover(16384, 4096, torch.int8, 8, CPU) == 0.5
    assert crossing([{**dense[0], "us_p50": 125.0}, *sparse]) == 1.0
    monkeypatch.undo()
    forget()


def test_the_shapes_of_the_benchmarks():
    sizes = {(local.name, local.tp): local.sizes for local in SHAPES}
    assert sizes["opt-66b", 1] == (9216, 36864, 72, 128)
    assert sizes["opt-175b", 8] == (12288, 6144, 12, 128)
    assert DTYPES["fp8"] == torch.float8_e4m3fn
