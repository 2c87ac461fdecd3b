"""One process and two: the same training, the same masks, the same statistics; and only one of them writes.

Sums over a batch are taken in another order by two processes, so weights agree to rounding and not bit for bit. Where a
random number is drawn for every row (dropout), two processes draw others than one, so these trainings have none.
"""

from __future__ import annotations

import socket
import subprocess
from pathlib import Path

import pytest
import torch
import two_processes
from faults import loaded
from safetensors.torch import load_file
from torch import Tensor

from mcsmoe.statistics import routing

pytestmark = pytest.mark.workflow
ROOT = Path(__file__).resolve().parents[1]
WEIGHTS = 1e-5  # largest difference of a weight after the trainings below, learning rate 1e-3; 2e-6 was seen
LOSSES = 1e-5  # and of a loss; 2e-6 was seen


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert set(one) == set(other)
    apart = [(one[name].double() - other[name].double()).abs() for name in one]
    # A router's mask is minus infinity in both.
    return max(
        float(gap.masked_fill(one[name] == other[name], 0.0).max()) for name, gap in zip(one, apart, strict=True)
    )


def of(kind: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name.startswith(kind)}


# -- the loop ----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes made together (``*-0``, ``*-1``), and one alone (``one-*``)."""
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = [*loaded.LAUNCH, two_processes.__file__]
    started = [
        subprocess.Popen([*program, str(rank), str(folder), str(port)], stderr=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    shown = [process.communicate(timeout=300)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], "\n".join(shown)[-4000:]
    alone = folder / "one"
    alone.mkdir()
    two_processes.plain(alone, "plain")
    two_processes.plain(alone, "pieces", accumulation=4)
    two_processes.pruned(alone, "pruned")
    two_processes.experts_fall(alone, "fallen")
    return folder


def made(folder: Path, name: str, rank: int = 0) -> dict[str, Tensor]:
    return load_file(folder / f"{name}-{rank}.safetensors")


@pytest.mark.parametrize("name", ["plain", "pieces", "pruned", "fallen"])
def test_two_processes_train_like_one(found: Path, name: str) -> None:
    one, two = made(found / "one", name), made(found, name)
    assert largest_difference(of("model/", one), of("model/", two)) < WEIGHTS
    assert largest_difference(of("curve", one), of("curve", two)) < LOSSES
    # Moments exist for the same weights, and have seen as many gradients.
    assert set(one) == set(two)
    assert all(torch.equal(one[key], two[key]) for key in of("step/", one))


@pytest.mark.parametrize("name", ["plain", "pieces"])
def test_an_expert_without_a_token_is_left_alone(found: Path, name: str) -> None:
    """It has no gradient, which is not a gradient of zero: AdamW would decay it."""
    two = made(found, name)
    unused = [key.removeprefix("model/") for key in of("model/", two) if f"expert_{two_processes.UNUSED}" in key]
    assert unused
    assert not [key for key in unused if f"exp_avg/{key}" in two]
    assert sum(key.startswith("exp_avg/") for key in two) > len(unused)


@pytest.mark.parametrize("name", ["plain", "pieces", "pruned", "noisy", "fallen"])
def test_all_processes_hold_the_same(found: Path, name: str) -> None:
    main, other = made(found, name, 0), made(found, name, 1)
    different = [key for key in main if not torch.equal(main[key], other[key])]
    assert different == []


def test_masks_are_those_of_one_process(found: Path) -> None:
    one, two, noisy = made(found / "one", "pruned"), made(found, "pruned"), made(found, "noisy")
    masks = of("kept/", one)
    assert 0.2 < torch.cat([mask.flatten() for mask in masks.values()]).double().mean() < 0.4
    assert all(torch.equal(mask, two[key]) for key, mask in masks.items())
    # The noise of the second process would have chosen others, but does not count.
    assert all(torch.equal(mask, noisy[key]) for key, mask in masks.items())


def test_the_same_experts_fall(found: Path) -> None:
    one, two = made(found / "one", "fallen"), made(found, "fallen")
    assert all(int(alive_E.sum()) == 3 for alive_E in of("alive/", one).values())
    for kind in ("alive/", "usage/"):  # of counts, which add up exactly
        assert all(torch.equal(tensor, two[key]) for key, tensor in of(kind, one).items())


def test_the_state_is_chosen_by_the_main_process(found: Path) -> None:
    for rank in (0, 1):
        assert int(made(found, "plain", rank)["best"]) == 2 * two_processes.SELECT_EVERY


def test_what_cannot_be_shared_is_refused(found: Path) -> None:
    for rank in (0, 1):
        assert "after step 2 for one process and after 0 for another" in (found / f"state-{rank}.txt").read_text()
        assert "a batch of 1 rows cannot be shared by 2 processes" in (found / f"few-{rank}.txt").read_text()


def test_two_jobs_keep_tokens_in_one_folder_at_once(found: Path) -> None:
    digests = [(found / f"tokens-{rank}.txt").read_text().split() for rank in (0, 1)]
    assert len(set(digests[0])) == 1
    assert digests[0] == digests[1]
    assert len(list((found / "tokens").iterdir())) == 1  # no part of a file is left behind


# -- the stages --------------------------------------------------------------------------------------------------


def test_tokens_of_other_processes_are_counted() -> None:
    """``skip`` before, between and after: positions as in one pass over everything."""
    statistics = routing.RoutingStatistics(reservoir=2)
    statistics.skip({"layer": 3})
    statistics.skip({"layer": 4})
    assert statistics.position() == {"layer": 7}
