"""What only a GPU shows of the kernels: real shapes, equal bits every time, graphs, launches, sanitizers."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from dejavu.kernels.predict import _compact, compact, predict, predict_reference
from dejavu.kernels.sparse_attention import sparse_attention, sparse_attention_reference
from dejavu.kernels.sparse_mlp import sparse_mlp, sparse_mlp_reference
from dejavu.kernels.tuning import override, shape_key
from dejavu.predictors.networks import LowRank, PackedLowRank
from dejavu.predictors.selection import Policy, Tap, Unit
from dejavu.profiles.kernel_bench import DTYPES, random_ids, random_weight
from dejavu.runtime.engine import Engine
from dejavu.runtime.sampling import SamplingParams

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda", 0)
TOLERANCE = 1e-2  # of the norm of a 16-bit result against float64
# D, local ffn, local heads, head dim: opt-2.7b, opt-6.7b, opt-66b, opt-175b on 8 ranks
SHAPES = [(2560, 10240, 32, 80), (4096, 16384, 32, 128), (9216, 36864, 72, 128), (12288, 6144, 12, 128)]


def exact(weight, rows=slice(None)):
    data, scale = weight
    return data[rows].double() if scale is None else data[rows].double() * scale[rows].double()


def relative_error(found, expected):
    return float((found.double() - expected).norm() / expected.norm())


def same_every_time(run, times=20):
    first = run().clone()
    assert all(torch.equal(run(), first) for _ in range(times - 1))
    return first


@pytest.mark.parametrize("batch", [1, 3, 16])
@pytest.mark.parametrize("weights", ["bf16", "fp8", "int8"])
@pytest.mark.parametrize("D, ffn, N, H", SHAPES)
def test_mlp(D, ffn, N, H, weights, batch, record_property):
    fc1, fc2 = (random_weight((ffn, D), DTYPES[weights], CUDA) for _ in range(2))
    x = torch.randn(batch, 1, D, device=CUDA, dtype=torch.bfloat16)
    bias = torch.randn(ffn, device=CUDA, dtype=torch.bfloat16)
    ids, count = random_ids(1, ffn, ffn // 10, CUDA)
    out = torch.full_like(x, torch.nan)
    found = same_every_time(lambda: sparse_mlp(x, *fc1, bias, *fc2, ids[0], count, out))
    chosen = ids[0, : ffn // 10].long()
    rows1, rows2 = exact(fc1, chosen), exact(fc2, chosen)
    expected = (x.double() @ rows1.T + bias[chosen]).relu() @ rows2
    error = relative_error(found, expected)
    record_property("relative_error", error)
    assert error <= TOLERANCE


@pytest.mark.parametrize("batch", [1, 3])
def test_ids_that_the_kernel_right_before_writes(batch, monkeypatch):
    D, ffn = 4096, 16384
    a_row_a_program = {"ROWS": 1, "BLOCK_D": 4096, "PROGRAMS": 16, "num_warps": 4}  # which reads ids early
    monkeypatch.setitem(override, shape_key("fc1", ffn, D, torch.bfloat16), a_row_a_program)
    fc1, fc2 = (random_weight((ffn, D), torch.bfloat16, CUDA) for _ in range(2))
    x = torch.randn(batch, 1, D, device=CUDA, dtype=torch.bfloat16)
    masks = [torch.rand(1, ffn, device=CUDA) < share for share in (0.1, 0.3, 0.001)]
    expected = []
    for mask in masks:
        ids, count = compact(mask)
        torch.cuda.synchronize()
        expected.append(sparse_mlp(x, *fc1, None, *fc2, ids[0], count))
    ids, count = torch.full_like(ids, 2**30), torch.full_like(count, -1)
    wrong = torch.zeros(3, dtype=torch.int64, device=CUDA)
    for i in [0, 1, 2] * 300:
        _compact(masks[i], ids, count)  # lets fc1 begin before it has written any
        wrong[i] += (sparse_mlp(x, *fc1, None, *fc2, ids[0], count) != expected[i]).any()
    assert wrong.tolist() == [0, 0, 0]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("D, ffn, N, H", SHAPES)
def test_attention(D, ffn, N, H, batch, record_property):
    T, W = 1937, 64
    qkv, out_proj = (random_weight((N, *rest), torch.bfloat16, CUDA)[0] for rest in ((3, H, D), (H, D)))
    keys, values = torch.randn(2, batch, N, T, H, device=CUDA, dtype=torch.bfloat16)
    ring = torch.randn(batch, W, D, device=CUDA, dtype=torch.bfloat16)
    x = torch.randn(batch, D, device=CUDA, dtype=torch.bfloat16)
    positions = torch.tensor([1920, 77, 300][:batch], device=CUDA)
    ids, count = random_ids(batch, N, N // 2, CUDA)
    # mostly short absences, some longer than one narrow product holds, some that are overdue
    lack = torch.randint(1, 70, (batch, N), device=CUDA).clamp(max=W)
    start = torch.where(lack > 40, lack, lack % 5 + 1)
    start = positions[:, None] + 1 - start
    states = []

    def run():
        state = [t.clone() for t in (ring, keys, values, start)]
        states.append(state)
        r, k, v, filled_to = state
        arguments = (x, qkv, None, None, k, v, positions, out_proj, None, ids, count)
        return sparse_attention(*arguments, inputs=r, filled_to=filled_to, layer=5)

    found = same_every_time(run)
    assert all(torch.equal(a, b) for state in states[1:] for a, b in zip(state, states[0], strict=True))
    r, k, v, filled_to = ring.double(), keys.double(), values.double(), start.clone()
    expected = torch.empty(batch, D, device=CUDA, dtype=torch.float64)
    weights = (qkv.double(), None, None, k, v, filled_to, positions, out_proj.double(), None)
    sparse_attention_reference(x.double(), r, *weights, ids, count, None, None, expected, 5)
    error = relative_error(found, expected)
    record_property("relative_error", error)
    assert error <= TOLERANCE and torch.equal(states[0][3], filled_to)
    assert relative_error(states[0][1], k) <= TOLERANCE and relative_error(states[0][2], v) <= TOLERANCE


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    ("weights", "stream"),
    [("fp32", "bf16"), ("fp16", "bf16"), ("int8", "bf16"), ("int8", "fp16"), ("fp8", "bf16")],
)
def test_predictor(weights, stream, batch, beside):
    D, n, r = 12288, 6144, 1024
    dtype = DTYPES.get(weights, torch.float32)
    down, up = random_weight((r, D), dtype, CUDA), random_weight((n, r), dtype, CUDA)
    residual = 3 * torch.randn(batch, D, device=CUDA, dtype=DTYPES[stream]) + 1
    bias, alive = torch.randn(n, device=CUDA) * 0.1, torch.ones(batch, dtype=torch.int64, device=CUDA)
    threshold = torch.tensor([1.28 * 0.02**2 * (D * r) ** 0.5], device=CUDA)
    tally = torch.zeros(2, dtype=torch.int64, device=CUDA)
    sums = exact(down).sum(-1)
    for union in (True, False):
        arguments = (*down, sums.float(), *up, bias, threshold, alive, tally)
        ids, count = predict(residual, *arguments, union=union, beside=beside)
        for _ in range(20):
            again, count_again = predict(residual, *arguments, union=union, beside=beside)
            assert torch.equal(count, count_again)
            for a, b, k in zip(ids.view(-1, n), again.view(-1, n), count.tolist(), strict=True):
                assert torch.equal(a[:k], b[:k])
        expected, expected_count = torch.empty_like(ids), torch.empty_like(count)
        exact_arguments = (exact(down), None, sums, exact(up), None, bias.double(), threshold, alive)
        predict_reference(residual.double(), *exact_arguments, expected, expected_count, tally.clone(), False)
        for a, b, k, m in zip(
            ids.view(-1, n), expected.view(-1, n), count.tolist(), expected_count.tolist(), strict=True
        ):
            assert 0 < m < n and len(set(a[:k].tolist()) ^ set(b[:m].tolist())) <= n // 100


def test_a_graph_replays_over_a_count_that_changes():
    D, ffn = 1024, 4096
    fc1, fc2 = (random_weight((ffn, D), torch.float16, CUDA) for _ in range(2))
    x, out = torch.randn(2, 1, 1, D, device=CUDA, dtype=torch.float16)
    ids, count = random_ids(1, ffn, ffn, CUDA)

    def run():
        sparse_mlp(x, *fc1, None, *fc2, ids[0], count, out)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for chosen in (ffn, 1, 0, 700, 4000):
        more, _ = random_ids(1, ffn, chosen, CUDA)
        ids.copy_(more)
        count.fill_(chosen)
        graph.replay()
        expected = torch.empty(1, 1, D, device=CUDA, dtype=torch.float64)
        sparse_mlp_reference(
            x.double(), fc1[0].double(), None, None, fc2[0].double(), None, ids[0], count, expected
        )
        assert (out.double() - expected).norm() <= TOLERANCE * expected.norm()


def learned(engine):
    """A policy of random predictors for every layer's neurons, and for the heads of all but the first."""
    config, g = engine.model.config, torch.Generator().manual_seed(0)
    units = []
    for layer in range(config.num_layers):
        for kind, n, tap in (
            ("mlp", config.ffn_dim, Tap("attn_in", layer)),
            ("heads", config.num_heads, Tap("mlp_in", layer - 1)),
        ):
            if tap.layer >= 0:
                shapes = ((16, config.hidden_size), (n, 16), (n,))
                network = LowRank(*(torch.randn(shape, generator=g) for shape in shapes))
                units.append(Unit(kind, layer, tap, PackedLowRank(network, 8).to(CUDA)))
    return Policy(units, config.num_layers)


@pytest.fixture
def sparse_run():
    """An engine with predictors, in the middle of a generation."""
    engine = Engine.from_pretrained("demo", device="cuda", cuda_graph=False)
    engine.policy = learned(engine)
    params = SamplingParams(max_new_tokens=100, ignore_eos=True)
    state = engine.prefill([engine.tokenize("The old man looked at the sea", params)], [params])
    for _ in range(3):
        engine.decode_step(state)
    return engine, state


def test_a_sparse_step_never_waits_for_the_host(sparse_run):
    engine, state = sparse_run
    torch.cuda.set_sync_debug_mode("error")
    try:
        engine.decode_step(state)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert 0.1 < float(engine.policy.density("mlp")) < 0.9
    assert 0.1 < float(engine.policy.density("heads")) < 0.95


@torch.inference_mode()
def test_launches_of_a_layer(sparse_run, record_property):
    """At most 7 on the main stream besides collectives, at most 3 a predictor, in the captured graph."""
    engine, state = sparse_run
    layer, policy = engine.model.layers[3], engine.policy
    policy.sides = {}
    residual = torch.randn(1, 1, 256, device=CUDA, dtype=torch.float16)
    x = torch.randn_like(residual)
    step, kv = state.cache.step(1, state.alive), state.cache.layer(3)

    def run():
        layer(residual, x, kv, step, engine.model.layers[4].self_attn_layer_norm, policy)

    policy.begin(step.positions, step.alive)
    policy.observe(Tap("mlp_in", 2), residual)
    run()
    policy.begin(step.positions, step.alive)
    policy.observe(Tap("mlp_in", 2), residual)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        graph.replay()
        torch.cuda.synchronize()
    names = [event.name for event in profiler.events() if event.device_type.name == "CUDA"]
    of_predictors = [name for name in names if name in ("_down_kernel", "_up_kernel", "_compact_kernel")]
    record_property("launches", len(names) - len(of_predictors))
    record_property("launches_of_predictors", len(of_predictors))
    assert len(of_predictors) == 2 * 3  # the neurons of this layer, the heads of the next
    assert 0 < len(names) - len(of_predictors) <= 7, names


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer(tool):
    if shutil.which("compute-sanitizer") is None:
        pytest.skip("no compute-sanitizer here")
    script = Path(__file__).parent.parent / "support" / "run_kernels.py"
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable, str(script)]
    path = os.pathsep.join([str(script.parent), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    assert "ran every kernel" in run.stdout
