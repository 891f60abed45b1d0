"""The ops as torch sees them: what they write to, and what they are to a tracer."""

import pytest
import torch
from torch.library import opcheck

import dejavu.kernels.predict
import dejavu.kernels.residual_norm
import dejavu.kernels.sparse_attention
import dejavu.kernels.sparse_mlp
import dejavu.kernels.tokens  # noqa: F401  (each registers its ops)


def arguments(name):
    """Valid ones: two sequences, hidden 8, three heads of 4, five neurons."""
    torch.manual_seed(0)
    x, out, residual = torch.randn(3, 2, 8)
    ids, count = torch.tensor([3, 1, 0, 0, 0], dtype=torch.int32), torch.tensor([2], dtype=torch.int32)
    heads, counts = torch.tensor([[2, 0, 0], [1, 0, 2]], dtype=torch.int32), torch.tensor([2, 1]).int()
    tally, positions = torch.zeros(2, dtype=torch.int64), torch.tensor([4, 2])
    qkv, out_proj, keys, values = (torch.randn(s) for s in ((3, 3, 4, 8), (3, 4, 8), *[(2, 3, 6, 4)] * 2))
    ring, filled_to = torch.randn(2, 20, 8), torch.tensor([[4, 3, 5], [0, 2, 1]])
    fc1, fc2 = torch.randn(2, 5, 8)
    down, up, bias, threshold = torch.randn(4, 8), torch.randn(5, 4), torch.randn(5), torch.zeros(1)
    return {
        "sparse_mlp": (x[:, None], fc1, None, bias, fc2, None, ids, count, out[:, None], None, None),
        "sparse_attention": (
            *(x, ring, qkv, None, None, keys, values, filled_to, positions, out_proj, None, heads, counts),
            *(None, None, out, 1),
        ),
        "residual_norm": (x, residual, x[0], residual[0], out[0], 1e-5, out, torch.empty(2, 8)),
        "predict": (
            *(x, down, None, down.sum(1), up, None, bias, threshold, None, ids, count, tally, False, False),
        ),
        "compact": (torch.rand(2, 3) < 0.5, heads, counts),
        "embed_rows": (positions, torch.randn(3, 8), 2, out[:2]),
        "likeliest": (x, tally),
        "count_down": (positions, positions + 1, tally, tally + 1),
    }[name]


NAMES = ("sparse_mlp", "sparse_attention", "residual_norm", "predict", "compact", "embed_rows", "likeliest",
         "count_down")  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_an_op_writes_to_what_it_says_and_traces(name):
    op = getattr(torch.ops.dejavu, name).default
    assert op._schema.is_mutable and not op._schema.returns
    opcheck(op, arguments(name), test_utils=("test_schema", "test_faketensor"))
