"""Small random models of every family of experts that is not Switch, padded batches for them, and plain arithmetic.

Routers and biases are made large: the default initialisation leaves the choice almost undecided and biases at zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

COMMON: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
# An expert is 24 wide: the grouped product of torch wants rows of a multiple of 16 bytes, in bfloat16 too.
SOME_DENSE = {"intermediate_size": 20, "moe_intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 3}


def _decoder(config: str, model: str, **own: Any) -> Callable[..., nn.Module]:
    def build(**changes: Any) -> nn.Module:
        import transformers

        return getattr(transformers, model)(getattr(transformers, config)(**(COMMON | own | changes)))

    return build


DEEPSEEK = {
    "intermediate_size": 20,
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 4,
}
GRANITE = {"intermediate_size": 24, "num_local_experts": 6, "num_experts_per_tok": 2}

DECODERS: dict[str, Callable[..., nn.Module]] = {
    "mixtral": _decoder(
        "MixtralConfig", "MixtralForCausalLM", intermediate_size=24, num_local_experts=6, num_experts_per_tok=2
    ),
    "qwen2_moe": _decoder(
        "Qwen2MoeConfig",
        "Qwen2MoeForCausalLM",
        shared_expert_intermediate_size=6,  # as wide as there are experts: its gate must not pass for a router
        mlp_only_layers=[0],
        **SOME_DENSE,
    ),
    "qwen3_moe": _decoder(
        "Qwen3MoeConfig", "Qwen3MoeForCausalLM", mlp_only_layers=[1], norm_topk_prob=True, **SOME_DENSE
    ),
    "olmoe": _decoder("OlmoeConfig", "OlmoeForCausalLM", intermediate_size=24, num_experts=6, num_experts_per_tok=3),
    "deepseek_v3": _decoder("DeepseekV3Config", "DeepseekV3ForCausalLM", **DEEPSEEK),
    "gpt_oss": _decoder(
        "GptOssConfig",
        "GptOssForCausalLM",
        intermediate_size=24,
        num_local_experts=6,
        num_experts_per_tok=3,
        sliding_window=8,
        swiglu_limit=0.5,  # low, so that the clamp acts
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    "granitemoe": _decoder("GraniteMoeConfig", "GraniteMoeForCausalLM", **GRANITE),
}
DENSE_LAYERS = {"qwen2_moe": {0}, "qwen3_moe": {1}, "deepseek_v3": {0}}
LAGUNA = {"shared_expert_intermediate_size": 20, "moe_router_logit_softcapping": 0.5} | SOME_DENSE
# Not in the tests of every law: one peculiarity each.
PECULIAR = {"laguna": _decoder("LagunaConfig", "LagunaForCausalLM", num_attention_heads_per_layer=[4, 4, 4], **LAGUNA)}
CHOICES = {"mixtral": 2, "granitemoe": 2}


def _nllb(**changes: Any) -> nn.Module:
    from transformers import NllbMoeConfig, NllbMoeForConditionalGeneration

    values: dict[str, Any] = {
        "vocab_size": 96,
        "d_model": 16,
        "max_position_embeddings": 64,
        "encoder_layers": 4,
        "decoder_layers": 3,
        "encoder_sparse_step": 2,
        "decoder_sparse_step": 1,
        "encoder_ffn_dim": 20,
        "decoder_ffn_dim": 24,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_layerdrop": 0.0,
        "decoder_layerdrop": 0.0,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "num_experts": 6,
        "pad_token_id": 1,
    }
    return NllbMoeForConditionalGeneration(NllbMoeConfig(**(values | changes)))


def model(family: str, seed: int = 0, **changes: Any) -> nn.Module:
    """A model of ``family`` in eval mode whose routing is decided and whose biases matter."""
    torch.manual_seed(seed)
    made = (_nllb if family == "nllb_moe" else (DECODERS | PECULIAR)[family])(**changes).eval()
    generator = torch.Generator().manual_seed(seed + 1)
    for name, tensor in [*made.named_parameters(), *made.named_buffers()]:
        last = name.rpartition(".")[2]
        if "router" in name or ".mlp.gate." in name or "e_score_correction_bias" in name:
            scale = 0.3 if "correction" in name else 1.0
        elif "experts" in name or "mlp" in name:
            scale = 0.3
        elif "embed_tokens" in name:
            scale = 0.5
        elif last == "bias":
            scale = 0.1
        else:
            continue
        tensor.data = scale * torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
    return made


def batch(rows: int = 5, length: int = 11, pad: int = 0, seed: int = 3) -> dict[str, Tensor]:
    """Padded on the right: row r has ``length`` - r tokens."""
    generator = torch.Generator().manual_seed(seed)
    made = {
        "input_ids": torch.randint(2, 96, (rows, length), generator=generator),
        "attention_mask": torch.ones(rows, length, dtype=torch.int64),
    }
    for row in range(1, rows):
        made["input_ids"][row, length - row :] = pad
        made["attention_mask"][row, length - row :] = 0
    return made


def seq2seq_batch(rows: int = 5, length: int = 11, labels: int = 7) -> dict[str, Tensor]:
    """The same with labels, of which row r has ``labels`` - r."""
    made = batch(rows, length, pad=1)
    made["labels"] = torch.randint(2, 96, (rows, labels), generator=torch.Generator().manual_seed(9))
    for row in range(1, rows):
        made["labels"][row, labels - row :] = -100
    return made


def logits(made: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return made(**inputs).logits
