"""The terms of the training losses, as sums, so that slices of a batch add up exactly whatever their number."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mcsmoe.types import IGNORED


def cross_entropy_sum(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Cross-entropy summed over the labelled positions, in nats; scalar."""
    return F.cross_entropy(logits_BTV.flatten(0, 1).float(), labels_BT.flatten(), ignore_index=IGNORED, reduction="sum")


def distillation_sum(student_NV: Tensor, teacher_NV: Tensor, temperature: float) -> Tensor:
    """KL(teacher at T || student at T), summed over the vocabulary and over the N positions given, in nats; scalar.

    No T^2 factor, as published (section 3.3 of the paper; section 6 of the blueprint). Give label positions only:
    padding never counts.
    """
    student = F.log_softmax(student_NV.float() / temperature, dim=-1)
    teacher = F.log_softmax(teacher_NV.float() / temperature, dim=-1)
    return F.kl_div(student, teacher, reduction="sum", log_target=True)


def load_balance_sum(logits_TE: Tensor, counts_E: Tensor) -> Tensor:
    """Switch Transformers' load-balancing loss (equation 4 of arXiv 2101.03961) of one layer, times its tokens T.

    E * sum_e f_e * P_e with f the share of tokens an expert was chosen for and P its mean probability; 1 when balanced.

    Args:
        logits_TE: raw router logits of real tokens, with their graph.
        counts_E: how many tokens chose each expert, over the whole batch; a constant.
    """
    probability_sum_E = logits_TE.float().softmax(dim=-1).sum(dim=0)
    share_E = counts_E.to(probability_sum_E) / counts_E.sum().clamp(min=1)
    return logits_TE.shape[-1] * (share_E * probability_sum_E).sum()


def router_z_sum(logits_TE: Tensor) -> Tensor:
    """Router z-loss (equation 5 of arXiv 2202.08906), summed over tokens: keeps router logits small."""
    return torch.logsumexp(logits_TE.float(), dim=-1).square().sum()
