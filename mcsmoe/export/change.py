"""How far the logits of one model are from those of another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mcsmoe.types import IGNORED, Batch


@dataclass(frozen=True)
class Change:
    """How far the logits of one model are from another's, over the real positions of some batches."""

    largest: float  # largest absolute difference of a logit
    mean: float  # mean absolute difference
    divergence: float  # KL(reference || other), mean over positions, nats
    agreement: float  # share of positions with the same most likely token
    positions: int

    def __str__(self) -> str:
        return (
            f"logits change by {self.mean:.3g} on average and {self.largest:.3g} at most, KL {self.divergence:.3g} nats "
            f"a token, same top token at {self.agreement:.1%} of {self.positions} positions"
        )


def gives_logits(model: Any) -> bool:
    """Whether ``model`` predicts tokens: it has a head over the vocabulary, and not another one."""
    # A class around a language model, with towers beside it, may leave the head to that.
    return any(_head(one) is not None for one in (model, *model.children()))


def _head(model: Any) -> Any:
    try:
        return model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return None


def require_logits(model: nn.Module, folder: object, why: str) -> None:
    """Raise ValueError naming the class of a model that has no language-modelling head."""
    if not gives_logits(model):
        raise ValueError(
            f"{folder}: a {type(model).__name__} has no language-modelling head, so it gives no logits over tokens: {why}; "
            "use the checkpoint of the language model itself"
        )


def real_logits(model: nn.Module, batch: Batch) -> Tensor:
    """[N, V] float32: logits at the positions with a label, or with attention where a batch has no labels."""
    inputs = {
        name: batch[name] for name in ("input_ids", "attention_mask", "labels", "decoder_input_ids") if name in batch
    }
    logits_BTV = model(**inputs, use_cache=False).logits
    if "labels" in batch:
        return logits_BTV[batch["labels"] != IGNORED].float()
    if "decoder_input_ids" in batch:
        return logits_BTV.flatten(0, 1).float()
    return logits_BTV[batch["attention_mask"].bool()].float()


@torch.no_grad()
def logits_change(reference: nn.Module, other: nn.Module, batches: Sequence[Batch]) -> Change:
    """Compare two models that take the same tokens."""
    largest = total = total_divergence = 0.0
    same = positions = entries = 0
    for batch in batches:
        one_NV, two_NV = real_logits(reference, batch), real_logits(other, batch)
        difference_NV = (one_NV - two_NV).abs()
        largest = max(largest, float(difference_NV.max()))
        total, entries = total + float(difference_NV.sum(dtype=torch.float64)), entries + difference_NV.numel()
        total_divergence += float(divergence(one_NV, two_NV))
        same += int((one_NV.argmax(dim=1) == two_NV.argmax(dim=1)).sum())
        positions += len(one_NV)
    return Change(
        largest, total / max(1, entries), total_divergence / max(1, positions), same / max(1, positions), positions
    )


@torch.no_grad()
def states_change(reference: nn.Module, other: nn.Module, batches: Sequence[Batch]) -> float:
    """Largest difference of the outputs of two models without a language-modelling head, over the largest output."""
    largest = scale = 0.0
    for batch in batches:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "decoder_input_ids") if name in batch}
        if "labels" in batch and reference.config.is_encoder_decoder and "decoder_input_ids" not in batch:  # type: ignore[union-attr]
            inputs["decoder_input_ids"] = batch["labels"].clamp(min=0)
        one, two = (_states(model(**inputs)) for model in (reference, other))
        largest, scale = max(largest, float((one - two).abs().max())), max(scale, float(one.abs().max()))
    return largest / scale if scale else largest


def _states(outputs: Any) -> Tensor:
    found = getattr(outputs, "last_hidden_state", None)
    states: Tensor = outputs[0] if found is None else found
    return states.float()


def divergence(teacher_NV: Tensor, student_NV: Tensor) -> Tensor:
    teacher, student = teacher_NV.log_softmax(dim=-1), student_NV.log_softmax(dim=-1)
    return nn.functional.kl_div(student, teacher, reduction="sum", log_target=True)
