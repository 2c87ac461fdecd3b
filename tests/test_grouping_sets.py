"""Groups within the sets of experts among which a router chooses first."""

from __future__ import annotations

import pytest
import torch

from mcsmoe.grouping import plan
from mcsmoe.grouping.sets import divide, join, respects
from mcsmoe.types import Grouping


def test_a_plan_of_each_set_joins_to_one_that_respects_them() -> None:
    random = torch.Generator().manual_seed(0)
    importance_E = torch.rand(12, generator=random)
    similarity_EE = torch.rand(12, 12, generator=random)
    similarity_EE = (similarity_EE + similarity_EE.T) / 2
    parts, names = divide({"layer": importance_E}, {"layer": 3})
    planned = plan(parts, divide({"layer": similarity_EE}, {"layer": 3})[0], 2, budget="uniform")
    made = join([planned[name] for name in names["layer"]])
    made.validate("layer")
    assert made.num_groups == 6
    assert respects(made.expert_to_group, 3)
    for number in range(3):
        here = slice(4 * number, 4 * number + 4)
        best = importance_E[here].topk(2).indices.sort().values + 4 * number
        assert made.dominant[2 * number : 2 * number + 2].tolist() == best.tolist()


@pytest.mark.parametrize(
    ("table", "sets", "expected"),
    [
        ([0, 0, 1, 1, 2, 2, 3, 3], 2, True),
        ([0, 1, 0, 1, 2, 3, 2, 3], 2, True),
        ([0, 1, 2, 3, 0, 1, 2, 3], 2, False),
        ([0, 0, 0, 1, 1, 2, 2, 2], 2, False),
        ([0, 1, 2, 3, 4, 5, 6, 7], 4, True),
    ],
)
def test_whether_a_redirect_table_respects_sets(table: list[int], sets: int, expected: bool) -> None:
    assert respects(torch.tensor(table), sets) is expected


def test_one_set_is_the_whole() -> None:
    grouping = Grouping(torch.tensor([0, 1, 0]), torch.tensor([0, 1]))
    assert join([grouping]).expert_to_group.tolist() == [0, 1, 0]
    assert respects(grouping.expert_to_group, 1)
