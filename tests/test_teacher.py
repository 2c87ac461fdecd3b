"""The teacher's cache: the loss of a student is that with the online teacher, and a wrong or damaged cache is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny_switch
import torch

from mcsmoe.data.collate import TaskBatches, Tokenised, collate, evaluation_batches
from mcsmoe.train.losses import cross_entropy_sum, distillation_sum
from mcsmoe.train.objectives import RecoveryObjective
from mcsmoe.train.stages import rows_learnt
from mcsmoe.train.teacher import TeacherCache, cache_teacher
from mcsmoe.types import IGNORED


def examples(rows: int = 23, seed: int = 5) -> Tokenised:
    rng = np.random.default_rng(seed)
    lengths, labels = rng.integers(3, 12, rows), rng.integers(1, 7, rows)

    def flat(sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return rng.integers(2, 96, sizes.sum()).astype(np.int32), np.concatenate([[0], np.cumsum(sizes)])

    return Tokenised(*flat(lengths), *flat(labels), 0, 0)


def make_cache(folder: Path, teacher: torch.nn.Module, train: Tokenised, batch_size: int = 4) -> None:
    cache_teacher(
        teacher,
        evaluation_batches(train, batch_size),
        lambda indices: collate(train, indices),
        train.label_lengths.tolist(),
        folder,
        {"examples": train.digest},
        torch.device("cpu"),
    )


def test_loss_and_gradient_are_those_of_the_online_teacher(tmp_path: Path) -> None:
    teacher, student, train = tiny_switch.model(seed=1), tiny_switch.model(seed=2), examples()
    make_cache(tmp_path / "teacher", teacher, train)
    objective = RecoveryObjective(TeacherCache(tmp_path / "teacher", train.digest), weight=0.2, temperature=2.0)
    for rows in ([0, 1, 2, 3, 4], [22, 7, 13], [9]):
        batch = collate(train, rows)
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
        labelled = batch["labels"] != IGNORED
        with torch.no_grad():
            teacher_NV = teacher(**inputs).logits[labelled]
        found = objective(student, batch, objective.prepare(batch))
        logits = student(**inputs).logits
        online = cross_entropy_sum(logits, batch["labels"]) / labelled.sum()
        online = online + 0.2 * distillation_sum(logits[labelled], teacher_NV, 2.0) / len(rows)
        assert float(found["loss"].detach()) == pytest.approx(float(online.detach()), rel=1e-5)
        parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
        ours = torch.autograd.grad(found["loss"], parameters, allow_unused=True)
        theirs = torch.autograd.grad(online, parameters, allow_unused=True)
        for one, other in zip(ours, theirs, strict=True):
            if one is not None and other is not None:
                assert torch.allclose(one, other, rtol=1e-4, atol=1e-6)


def test_rows_that_no_student_sees_are_left_out_and_said_to_be(tmp_path: Path) -> None:
    teacher, train = tiny_switch.model(seed=1), examples()
    settings = {"steps": 3, "epochs": 1, "batch_size": 4}
    seen = rows_learnt(settings, train, seed=6)
    batches = TaskBatches(train, 4, seed=6)
    assert seen == {row for step in range(3) for row in batches.indices(step).tolist()}
    assert 3 * 4 - 3 <= len(seen) <= 3 * 4
    cache_teacher(
        teacher,
        evaluation_batches(train, 4, seen),
        lambda indices: collate(train, indices),
        train.label_lengths.tolist(),
        tmp_path / "some",
        {"examples": train.digest},
        torch.device("cpu"),
    )
    make_cache(tmp_path / "all", teacher, train)
    some, every = (TeacherCache(tmp_path / name, train.digest) for name in ("some", "all"))
    assert len(some.states) == train.label_lengths[sorted(seen)].sum()
    rows = torch.tensor(sorted(seen))
    torch.testing.assert_close(some.logits(rows, rows.device), every.logits(rows, rows.device))
    absent = next(row for row in range(len(train)) if row not in seen)
    with pytest.raises(ValueError, match=rf"example {absent} is not in it"):
        some.logits(torch.tensor([rows[0], absent]), rows.device)
    for whole in ({"steps": 6, "epochs": 1, "batch_size": 4}, {"steps": None, "epochs": 1, "batch_size": 4}):
        assert rows_learnt(whole, train, seed=6) == set(range(len(train)))


def test_a_cache_holds_decoder_states_and_nothing_larger(tmp_path: Path) -> None:
    teacher, train = tiny_switch.model(seed=1), examples()
    make_cache(tmp_path / "teacher", teacher, train)
    states = np.load(tmp_path / "teacher" / "states.npy", mmap_mode="r")
    assert states.shape == (train.label_lengths.sum(), teacher.config.d_model)
    weights = sum(p.numel() for p in teacher.get_output_embeddings().parameters())  # type: ignore[operator]
    stored = sum(file.stat().st_size for file in (tmp_path / "teacher").iterdir())
    assert stored <= 4 * (states.size + weights) + 8 * (len(train) + 1) + 2048


def test_a_cache_does_not_depend_on_the_batches_it_was_made_in(tmp_path: Path) -> None:
    teacher, train = tiny_switch.model(seed=1), examples()
    make_cache(tmp_path / "one", teacher, train, batch_size=1)
    make_cache(tmp_path / "many", teacher, train, batch_size=23)
    one, many = (np.load(tmp_path / name / "states.npy") for name in ("one", "many"))
    assert np.allclose(one, many, atol=1e-5)


def test_a_cache_of_other_examples_is_refused(tmp_path: Path) -> None:
    train = examples()
    make_cache(tmp_path / "teacher", tiny_switch.model(), train)
    with pytest.raises(ValueError, match=r"teacher: it was made from other examples or another tokenizer; delete it"):
        TeacherCache(tmp_path / "teacher", examples(seed=6).digest)


@pytest.mark.parametrize("name", ["states.npy", "offsets.npy", "output.safetensors", "teacher.json"])
def test_a_cache_that_misses_a_file_is_refused_by_name(tmp_path: Path, name: str) -> None:
    train = examples()
    make_cache(tmp_path / "teacher", tiny_switch.model(), train)
    (tmp_path / "teacher" / name).unlink()
    with pytest.raises(ValueError, match=f"teacher/{name}: cannot be read .*; restore it, or delete"):
        TeacherCache(tmp_path / "teacher", train.digest)
