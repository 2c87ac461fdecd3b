"""The terms of the losses: closed forms, brute force and the sum over slices; and what weight decay leaves alone."""

from __future__ import annotations

import math

import pytest
import tiny_switch
import torch
from torch import Tensor

from mcsmoe.train.loop import decay_groups
from mcsmoe.train.losses import cross_entropy_sum, distillation_sum, load_balance_sum, router_z_sum
from mcsmoe.types import IGNORED


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_cross_entropy_counts_labelled_positions_only() -> None:
    logits, labels = numbers(3, 4, 7), torch.randint(0, 7, (3, 4), generator=torch.Generator().manual_seed(1))
    labels[1, 2:] = IGNORED
    expected = -sum(
        float(logits[row, place].double().softmax(0)[labels[row, place]].log())
        for row in range(3)
        for place in range(4)
        if labels[row, place] != IGNORED
    )
    assert float(cross_entropy_sum(logits, labels)) == pytest.approx(expected, rel=1e-5)
    assert float(cross_entropy_sum(logits, torch.full((3, 4), IGNORED))) == 0.0
    # Undecided logits cost log V a position.
    assert float(cross_entropy_sum(torch.zeros(1, 5, 7), labels[:1, :1].expand(1, 5))) == pytest.approx(5 * math.log(7))


def test_distillation_closed_form_and_no_square_of_the_temperature() -> None:
    student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0 * math.log(3.0), 0.0]])
    # At T = 2 the teacher says 3/4, 1/4 and the student 1/2, 1/2.
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert float(distillation_sum(student, teacher, 2.0)) == pytest.approx(expected, rel=1e-6)
    assert float(distillation_sum(teacher, teacher, 2.0)) == pytest.approx(0.0, abs=1e-7)


def test_defect_kd_padding_never_counts() -> None:
    # The sum over the label positions of a padded batch does not see what the logits are elsewhere.
    student, teacher = numbers(3, 4, 7), numbers(3, 4, 7, seed=1)
    labelled = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]]).bool()
    found = distillation_sum(student[labelled], teacher[labelled], 2.0)
    expected = 0.0
    for row, place in labelled.nonzero().tolist():
        p, q = ((logits[row, place].double() / 2).softmax(0) for logits in (teacher, student))
        expected += float((p * (p / q).log()).sum())
    assert float(found) == pytest.approx(expected, rel=1e-5)
    assert float(distillation_sum(student.flatten(0, 1), teacher.flatten(0, 1), 2.0)) > 1.2 * expected


def test_gradient_of_distillation_is_the_difference_of_probabilities() -> None:
    student, teacher = numbers(5, 7).requires_grad_(), numbers(5, 7, seed=1)
    distillation_sum(student, teacher, 2.0).backward()
    expected = ((student / 2).softmax(-1) - (teacher / 2).softmax(-1)) / 2
    assert torch.allclose(student.grad, expected.detach(), atol=1e-6)  # type: ignore[arg-type]


def test_slices_of_a_batch_add_up_to_the_whole() -> None:
    logits, labels = numbers(6, 4, 7), torch.randint(0, 7, (6, 4), generator=torch.Generator().manual_seed(1))
    labels[3:, 2:] = IGNORED
    teacher = numbers(6, 4, 7, seed=2)
    for pieces in (2, 3, 6):
        tasks = sum(cross_entropy_sum(logits[i::pieces], labels[i::pieces]) for i in range(pieces))
        assert torch.allclose(torch.as_tensor(tasks), cross_entropy_sum(logits, labels), rtol=1e-5)
        shares = sum(
            distillation_sum(logits[i::pieces].flatten(0, 1), teacher[i::pieces].flatten(0, 1), 2.0)
            for i in range(pieces)
        )
        whole = distillation_sum(logits.flatten(0, 1), teacher.flatten(0, 1), 2.0)
        assert torch.allclose(torch.as_tensor(shares), whole, rtol=1e-5)


def test_load_balance_closed_forms() -> None:
    # Everything to one expert of four, surely: E * 1 * 1 a token; undecided and evenly spread: 1 a token.
    sure = torch.tensor([[100.0, 0.0, 0.0, 0.0]]).expand(8, 4)
    assert float(load_balance_sum(sure, torch.tensor([8, 0, 0, 0]))) == pytest.approx(4 * 8)
    assert float(load_balance_sum(torch.zeros(8, 4), torch.tensor([2, 2, 2, 2]))) == pytest.approx(8)
    assert float(load_balance_sum(torch.zeros(0, 4), torch.zeros(4, dtype=torch.int64))) == 0.0


def test_router_losses_are_those_of_transformers() -> None:
    from transformers.models.switch_transformers.modeling_switch_transformers import (
        load_balancing_loss_func,
        router_z_loss_func,
    )

    logits = numbers(2, 9, 5)
    chosen = logits.argmax(dim=-1)
    flat = logits.flatten(0, 1)
    theirs = float(load_balancing_loss_func(logits.softmax(-1).flatten(0, 1)[None], chosen.flatten()[None]))
    ours = float(load_balance_sum(flat, torch.bincount(chosen.flatten(), minlength=5))) / len(flat)
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert float(router_z_sum(flat)) / len(flat) == pytest.approx(float(router_z_loss_func(logits)), rel=1e-5)
    assert float(router_z_sum(torch.zeros(3, 5))) == pytest.approx(3 * math.log(5) ** 2)


def test_losses_are_taken_in_float32_whatever_the_logits() -> None:
    student, teacher = numbers(5, 7).bfloat16(), numbers(5, 7, seed=1).bfloat16()
    exact = distillation_sum(student.float(), teacher.float(), 2.0)
    assert float(distillation_sum(student, teacher, 2.0)) == float(exact)
    labels = torch.zeros(1, 5, dtype=torch.int64)
    assert float(cross_entropy_sum(student[None], labels)) == float(cross_entropy_sum(student[None].float(), labels))


def test_defect_wd() -> None:
    # Layer norms and position biases are not decayed; every matrix is.
    model = tiny_switch.model()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, plain = decay_groups(model, 0.01)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.01, 0.0)
    spared = {names[id(parameter)] for parameter in plain["params"]}
    assert spared == {name for name in names.values() if "layer_norm" in name or "relative_attention_bias" in name}
    assert {names[id(parameter)] for parameter in decayed["params"]} == set(names.values()) - spared
