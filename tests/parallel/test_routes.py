"""Which way an all-reduce takes, and the kernel of our own: its peers emulated, and ranks at once."""

import sys
import time

import pytest
import torch
import torch.nn.functional as F

from dejavu.kernels.reduce_residual_norm import (
    SLOT_WORDS,
    SLOTS,
    Inboxes,
    fused_reduce_residual_norm,
    push_all_reduce,
    row_length,
)
from dejavu.kernels.residual_norm import residual_norm
from dejavu.launch import bench_all_reduce, cli
from dejavu.parallel import routes
from dejavu.parallel.collectives import all_reduce
from dejavu.parallel.groups import RESERVED, TPGroup
from dejavu.parallel.layers import LayerNorm
from dejavu.parallel.routes import (
    DTYPES,
    OPS,
    Routes,
    candidates,
    choose,
    load_table,
    reserve,
    section,
    table_key,
)
from dejavu.profiles import all_reduce_bench
from ranks import run_ranks

HALF = [torch.float16, torch.bfloat16]
SHIPPED = routes.json.loads(routes.TABLE.read_text())
TABLE = {
    "sum bfloat16": {"100": "push", "2000": "two_shot"},
    "sum float32": {"100": "one_shot", "2000": "two_shot"},
    "sum float16": {"2000": "push"},
}


@pytest.mark.parametrize(
    "nbytes, dtype, expected",
    [
        (1, torch.bfloat16, "push"),
        (100, torch.float32, "one_shot"),
        (101, torch.bfloat16, "two_shot"),
        (2001, torch.bfloat16, "two_shot"),
        (1, torch.float16, "push"),
    ],
)
def test_the_first_entry_that_reaches_the_size(nbytes, dtype, expected):
    assert choose(TABLE, "sum", nbytes, dtype) == expected


@pytest.mark.parametrize("key", [*SHIPPED, table_key("a GPU that nobody knows", 3)])
def test_every_op_and_dtype_has_a_section_of_its_own_routes(key):
    table = load_table(key)
    ways = {section(op, dtype): candidates(op, dtype) for op in OPS for dtype in DTYPES}
    assert table.keys() == ways.keys()
    for name, entries in table.items():
        assert entries and set(entries.values()) <= set(ways[name]), name


def test_only_the_payload_leaves_nccl():
    payload = torch.zeros(RESERVED, dtype=torch.bfloat16)
    inboxes = Inboxes(torch.zeros(2, dtype=torch.int64), Inboxes.zero_epochs(), 0)
    ways = Routes(payload, "0", inboxes, load_table("unknown"))
    assert ways.of_sum(payload[:64].view(4, 16)) == "push"
    assert ways.of_sum(payload) == "two_shot"
    assert ways.of_sum(payload[8:64]) == "nccl"
    assert ways.of_sum(payload[:64].view(4, 16).T) == "nccl"
    assert ways.of_sum(torch.zeros(64, dtype=torch.bfloat16)) == "nccl"
    assert ways.is_fused(payload[:64].view(4, 1, 16))
    assert not ways.is_fused(payload[:60].view(4, 1, 15))  # pairs of numbers travel
    assert not ways.is_fused(payload[: 65 * 16].view(65, 1, 16))
    assert not ways.is_fused(torch.zeros(2, 1, 16))  # fp32
    ways.enabled = False
    assert ways.of_sum(payload) == "nccl" and not ways.is_fused(payload[:64].view(4, 1, 16))


def test_choices_on_the_cpu():
    for tp in (TPGroup(), TPGroup(size=1)):
        reserve(tp, torch.float32)
        assert not tp.routes
    with pytest.raises(
        ValueError, match=r"^all_reduce=symm needs CUDA devices: on the CPU gloo sums, use auto$"
    ):
        reserve(TPGroup(), torch.float32, "symm")
    with pytest.raises(ValueError, match="all_reduce=nccl needs CUDA"):
        reserve(TPGroup(), torch.float32, "nccl")
    with pytest.raises(ValueError, match="all_reduce='ring' is unknown: use auto, nccl, symm"):
        reserve(TPGroup(), torch.float32, "ring")


def rank_0_chooses(tp):
    with pytest.raises(ValueError, match="all_reduce=symm needs CUDA"):
        reserve(tp, torch.float32, "symm" if tp.rank == 0 else "auto")
    reserve(tp, torch.float32, "auto" if tp.rank == 0 else "symm")
    x = tp.buffer((3,), torch.float32).fill_(1.0 + tp.rank)
    return all_reduce(x, tp) is x, x.tolist()


def test_rank_0_chooses_and_gloo_sums_in_place():
    assert run_ranks(2, rank_0_chooses) == [(True, [3.0] * 3)] * 2


def without_peer_access(tp, where, choice):
    """Ranks that claim to have GPUs, up to the point at which symmetric memory fails."""
    lines = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        patch.setattr(torch.cuda, "can_device_access_peer", lambda *_: tp.rank == 0)
        patch.setattr(routes, "print", lambda line, **_: lines.append(line), raising=False)
        if where == "hosts":
            patch.setattr(routes.socket, "gethostname", lambda: f"host{tp.rank}")
        index = 0 if where == "one GPU" else tp.rank
        on_cuda = TPGroup(tp.rank, tp.size, torch.device("cuda", index), tp.group)
        if choice == "symm":
            with pytest.raises(ValueError, match="all_reduce=symm: no symmetric memory here: ") as e:
                reserve(on_cuda, torch.float16, choice)
            lines.append(str(e.value))
        else:
            reserve(on_cuda, torch.float16, choice)
        assert not on_cuda.routes
    return lines


@pytest.mark.parametrize(
    "where, reason",
    [
        ("peers", "rank 1: GPU 1 cannot read the memory of GPU 0"),
        ("hosts", "the ranks are on 2 hosts"),
        ("one GPU", "each rank sees but its own GPU, or two share one"),
    ],
)
def test_without_symmetric_memory(where, reason):
    line = f"warning: no symmetric memory, all-reduces go by NCCL: {reason}"
    assert run_ranks(2, without_peer_access, where, "auto") == [[line], []]
    first, second = run_ranks(2, without_peer_access, where, "symm")
    assert first == second == [f"all_reduce=symm: no symmetric memory here: {reason}"]


@pytest.mark.parametrize(
    "numel, row", [(1, 2048), (SLOTS * 2048, 2048), (SLOTS * 2048 + 1, 4096), (2**20, 16384)]
)
def test_rows_of_a_pushed_payload(numel, row):
    assert row_length(numel) == row and -(-numel // row) <= SLOTS


class Ranks:
    """The inboxes of some ranks in one process. Launches run one after the other, so what a rank waits for is
    put into its inbox by hand, as a peer's kernel would have."""

    def __init__(self, size):
        self.memory = torch.zeros(size, 2, size, SLOTS, SLOT_WORDS, dtype=torch.int64).share_memory_()
        addresses = torch.tensor([inbox.data_ptr() for inbox in self.memory])
        self.inboxes = [Inboxes(addresses, Inboxes.zero_epochs(), r) for r in range(size)]

    def deliver(self, receiver, partials):
        """``partials[r] [T, D]`` of all ranks into the receiver's inbox."""
        epochs = self.inboxes[receiver].epochs[:, 0, 0] + 1
        for sender, partial in enumerate(partials):
            words = partial.view(torch.int32).to(torch.int64) & 0xFFFFFFFF
            for t, row in enumerate(words):
                epoch = int(epochs[t])
                self.memory[receiver, epoch % 2, sender, t, : len(row)] = row | epoch << 32


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter, in which peers are emulated")
@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize("size, tokens, D", [(2, 1, 64), (2, 3, 40), (3, 2, 6)])
@pytest.mark.parametrize("dtype", HALF)
def test_the_fused_boundary(dtype, size, tokens, D, with_norm):
    g = torch.Generator().manual_seed(0)
    ranks = Ranks(size)
    assert Inboxes.nbytes(size) == ranks.memory[0].nbytes
    norm = LayerNorm(D).to(dtype).requires_grad_(False) if with_norm else None
    for _ in range(5):  # both halves of the inboxes, again and again
        partials = torch.randn(size, tokens, D, generator=g).to(dtype)
        residual, bias = (
            torch.randn(tokens, 1, D, generator=g).to(dtype),
            torch.randn(D, generator=g).to(dtype),
        )
        found = []
        for rank, inboxes in enumerate(ranks.inboxes):
            ranks.deliver(rank, [p if r != rank else p * torch.nan for r, p in enumerate(partials)])
            found.append(
                fused_reduce_residual_norm(partials[rank].view(tokens, 1, D), residual, bias, norm, inboxes)
            )
            assert (inboxes.epochs[:tokens] == inboxes.epochs[0, 0, 0]).all()
            assert not inboxes.epochs[tokens:].any()
        total, normed = found[0]
        wanted = residual[:, 0].double() + partials.double().sum(0) + bias.double()
        torch.testing.assert_close(total[:, 0], wanted.to(dtype))
        torch.testing.assert_close(normed, F.layer_norm(total, (D,)) if with_norm else total)
        in_two_steps = residual_norm(partials.float().sum(0).to(dtype)[:, None], residual, bias, norm)
        torch.testing.assert_close(found[0], in_two_steps, atol=3e-2, rtol=3e-2)
        for other in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


# (tokens, D) of boundaries; (0, numel) of sums alone, in between
SHAPES = [(1, 64), (5, 40), (0, 70), (1, 6), (16, 12), (0, 5000), (3, 250), (20, 8), (1, 64)]


@torch.inference_mode()
def exchanged(tp, inboxes, dtype):
    """What one rank, whose kernels wait for those of the others, makes of SHAPES, and what it should be."""
    g = torch.Generator().manual_seed(1)
    results = []
    for tokens, D in SHAPES:
        time.sleep(0.02 * ((tp.rank + D) % 3))  # now one is late and now another
        if tokens == 0:
            payloads = torch.randn(tp.size, 8192, generator=g).to(dtype)
            total = push_all_reduce(payloads[tp.rank], D, inboxes[tp.rank])
            results.append((total, total, payloads[:, :D].double().sum(0)))
            continue
        partials = torch.randn(tp.size, tokens, 1, D, generator=g).to(dtype)
        residual, bias = (
            torch.randn(tokens, 1, D, generator=g).to(dtype),
            torch.randn(D, generator=g).to(dtype),
        )
        norm = LayerNorm(D).to(dtype) if D % 4 else None
        total, normed = fused_reduce_residual_norm(partials[tp.rank], residual, bias, norm, inboxes[tp.rank])
        results.append((total, normed, residual.double() + partials.double().sum(0) + bias.double()))
    return results


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter, over memory that processes share")
@pytest.mark.parametrize("size, dtype", [(2, torch.bfloat16), (3, torch.float16)])
def test_ranks_at_once_give_each_other_their_sums(size, dtype):
    ranks = Ranks(size)
    first, *others = run_ranks(size, exchanged, ranks.inboxes, dtype)
    for i, ((tokens, D), (total, normed, wanted)) in enumerate(zip(SHAPES, first, strict=True)):
        torch.testing.assert_close(total, wanted.to(dtype))
        torch.testing.assert_close(normed, F.layer_norm(total, (D,)) if tokens and D % 4 else total)
        for results in others:
            assert torch.equal(results[i][0], total) and torch.equal(results[i][1], normed)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter, in which peers are emulated")
def test_what_a_rank_sends_is_what_its_peer_waits_for():
    ranks = Ranks(2)
    payloads = torch.randn(2, 4096).to(torch.float16)
    for numel in (4095, 10, 3000):
        rows = payloads.view(2, 2, 2048)[:, : -(-numel // 2048)]
        ranks.deliver(0, rows)
        first = push_all_reduce(payloads[0], numel, ranks.inboxes[0])
        second = push_all_reduce(payloads[1], numel, ranks.inboxes[1])  # rank 0's kernel has sent to it
        assert torch.equal(first, second)
        torch.testing.assert_close(first, payloads.double().sum(0)[:numel].to(torch.float16))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["generate", "--prompt", "x", "--all-reduce", "ring"],
            "all_reduce='ring' is unknown: use auto, nccl",
        ),
        (
            ["generate", "--prompt", "x", "--device", "cpu", "--all-reduce", "symm"],
            "needs CUDA devices: on the",
        ),
        *([] if torch.cuda.is_available() else [(["bench", "all-reduce"], "torch sees no CUDA device here")]),
    ],
)
def test_what_a_user_gets_wrong_is_one_line(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(sys, "argv", ["dejavu", *arguments])
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err


def test_one_rank_has_nothing_to_bench(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(bench_all_reduce, "pick_device", lambda _: torch.device("cpu"))
    with pytest.raises(
        ValueError, match="needs 2 ranks or more: dejavu launch --nproc-per-node 2 bench all-reduce"
    ):
        bench_all_reduce.all_reduce()


def row(op, route, nbytes, us):
    return {"op": op, "route": route, "bytes": nbytes, "us_p50": us}


def test_the_table_takes_the_fastest(monkeypatch, tmp_path):
    table = tmp_path / "table.json"
    table.write_text('{"another x4": {}}')
    monkeypatch.setattr(all_reduce_bench, "TABLE", table)
    monkeypatch.setattr(routes, "TABLE", table)
    rows = [
        row(op, route, nbytes, us)
        for op, ways in (("sum", 4), ("boundary", 5))
        for nbytes, times in ((8, (9, 1, 5, 7, 1)), (16, (9, 1, 5, 7, 0)), (32, (9, 7, 3, 10, 12)))
        for route, us in zip(("nccl", "one_shot", "two_shot", "push", "fused"), times[:ways], strict=False)
    ]
    all_reduce_bench.write_table(rows, "GPU", 2)
    assert load_table("GPU x2") == {
        "sum bfloat16": {"16": "one_shot", "32": "two_shot"},
        "sum float32": {"16": "one_shot", "32": "two_shot"},
        "sum float16": {"16": "push", "32": "nccl"},
        "boundary bfloat16": {"8": "one_shot", "16": "fused", "32": "two_shot"},
        "boundary float32": {"16": "one_shot", "32": "two_shot"},
        "boundary float16": {"16": "fused", "32": "nccl"},
    }
    assert "another x4" in routes.json.loads(table.read_text())
