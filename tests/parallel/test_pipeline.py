"""Ranks dealt into stages, and what passes between stages."""

import pytest
import torch

from dejavu.parallel.groups import TPGroup
from dejavu.parallel.pipeline import Pipeline, init_pipeline
from ranks import run_ranks


def placed(world, stages):
    pipeline, tp = init_pipeline(world, stages)
    ranks = [group.gather_objects(world.rank) for group in (tp, pipeline.peers)]
    return (pipeline.stage, tp.rank), (pipeline.stages, tp.size), ranks


def test_neighbouring_ranks_share_a_stage():
    found = run_ranks(4, placed, 2)
    assert [place for place, _, _ in found] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [sizes for _, sizes, _ in found] == [(2, 2)] * 4
    assert [ranks for _, _, ranks in found] == [
        [[0, 1], [0, 2]],
        [[0, 1], [1, 3]],
        [[2, 3], [0, 2]],
        [[2, 3], [1, 3]],
    ]
    assert [found[:2] for found in run_ranks(3, placed, 3)] == [((i, 0), (3, 1)) for i in range(3)]


@pytest.mark.parametrize(
    "ranks, stages, message",
    [
        (6, 4, r"pp=4: 6 rank\(s\) cannot be dealt into 4 stages; 1, 2, 3, 6 would work"),
        (1, 2, r"pp=2: 1 rank\(s\) .* stages; 1 would work$"),
        (2, 4, "1, 2 would work"),
        (2, 0, "pp=0"),
        (2, -1, "pp=-1"),
    ],
)
def test_ranks_that_cannot_be_dealt(ranks, stages, message):
    with pytest.raises(ValueError, match=message):
        init_pipeline(TPGroup(size=ranks), stages)


def test_one_stage_is_the_group_itself():
    world = TPGroup()
    pipeline, tp = init_pipeline(world, 1)
    assert tp is world and pipeline.world is world
    assert pipeline.is_first and pipeline.is_last and pipeline.gather_objects("x") == ["x"]
    x = torch.ones(3)
    Pipeline(world).broadcast_from_last(x)
    assert x.tolist() == [1, 1, 1]


def passed_on(world, stages):
    """Every stage adds its number to what it receives; the last one's sum goes to all."""
    pipeline, tp = init_pipeline(world, stages)
    x, y = torch.full((2, 3), float(tp.rank)), torch.ones(2, 3)
    if not pipeline.is_first:
        x, y = pipeline.receive(2, (2, 3), torch.float32)
    x, y = x + pipeline.stage, 2 * y
    if not pipeline.is_last:
        pipeline.send([x, y])
    total = torch.stack([x, y])
    pipeline.broadcast_from_last(total)
    return total.unique().tolist()


def test_what_is_sent_arrives_at_the_same_share_of_the_next_stage():
    assert run_ranks(4, passed_on, 2) == [[1, 4], [2, 4], [1, 4], [2, 4]]
    assert run_ranks(3, passed_on, 3) == [[3, 8]] * 3
