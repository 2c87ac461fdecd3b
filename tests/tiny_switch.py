"""A small random Switch model whose encoder and decoder differ in depth and sparse step, and a padded batch for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def config(**changes: Any) -> Any:
    from transformers import SwitchTransformersConfig

    values: dict[str, Any] = {
        "vocab_size": 96,
        "d_model": 16,
        "d_kv": 4,
        "d_ff": 24,
        "num_heads": 4,
        "num_layers": 4,
        "num_sparse_encoder_layers": 2,
        "num_decoder_layers": 3,
        "num_sparse_decoder_layers": 3,
        "num_experts": 6,
        "expert_capacity": 64,
        "router_jitter_noise": 0.0,
        "dropout_rate": 0.0,
        "decoder_start_token_id": 0,
    }
    return SwitchTransformersConfig(**(values | changes))


def model(seed: int = 0, **changes: Any) -> nn.Module:
    from transformers import SwitchTransformersForConditionalGeneration

    torch.manual_seed(seed)
    made = SwitchTransformersForConditionalGeneration(config(**changes)).eval()
    # The default initial router is close to undecided and sends most tokens to few experts.
    generator = torch.Generator().manual_seed(seed + 1)
    for name, parameter in made.named_parameters():
        if "router" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return made


def batch(rows: int = 5, length: int = 11, labels: int = 7, seed: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = {
        "input_ids": torch.randint(2, 96, (rows, length), generator=generator),
        "attention_mask": torch.ones(rows, length, dtype=torch.int64),
        "labels": torch.randint(2, 96, (rows, labels), generator=generator),
    }
    for row in range(1, rows):
        made["input_ids"][row, length - row :] = 0
        made["attention_mask"][row, length - row :] = 0
        made["labels"][row, labels - row :] = -100
    return made


def logits(made: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return made(**inputs).logits
