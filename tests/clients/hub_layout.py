"""Small random checkpoints in the layout that the hub has: a ``config.json`` as it was published, weights by its names.

``save_pretrained`` of the installed library would write the fields that it knows today; what the hub holds was written by
older ones, and that is what clients read.
"""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

VOCABULARY = 288
# rope_theta is no family's default, so that a client which does not find it computes something else.
_COMMON: dict[str, Any] = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 64,
    "initializer_range": 0.02,
    "max_position_embeddings": 256,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 50000.0,
    "tie_word_embeddings": False,
    "use_cache": True,
    "vocab_size": VOCABULARY,
}
_GROUPED = {
    "first_k_dense_replace": 1,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "n_group": 1,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_experts_per_tok": 2,
    "num_nextn_predict_layers": 0,
    "routed_scaling_factor": 1.5,
    "topk_group": 1,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "hidden_size": 128,  # the family says nothing of the size of a head
        "intermediate_size": 32,
        "num_experts_per_tok": 2,
        "num_local_experts": 8,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.02,
        "sliding_window": None,
        "transformers_version": "4.36.0.dev0",
    },
    "qwen3_moe": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "decoder_sparse_step": 1,
        "head_dim": 32,
        "intermediate_size": 96,
        "max_window_layers": 3,
        "mlp_only_layers": [],
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
        "sliding_window": None,
        "transformers_version": "4.51.0",
        "use_sliding_window": False,
    },
    "olmoe": {
        "architectures": ["OlmoeForCausalLM"],
        "model_type": "olmoe",
        "clip_qkv": None,
        "hidden_size": 128,
        "intermediate_size": 32,
        "norm_topk_prob": False,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "num_key_value_heads": 4,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.01,
        "transformers_version": "4.43.0.dev0",
    },
    "glm4_moe": _GROUPED
    | {
        "architectures": ["Glm4MoeForCausalLM"],
        "model_type": "glm4_moe",
        "attention_bias": True,
        "eos_token_id": [2],
        "head_dim": 32,
        "partial_rotary_factor": 0.5,
        "rms_norm_eps": 1e-05,
        "transformers_version": "4.54.0",
        "use_qk_norm": True,
    },
    "deepseek_v3": _GROUPED
    | {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "ep_size": 1,
        "kv_lora_rank": 512,  # with rotary parts of 64 the one size that vLLM's kernel takes
        "moe_layer_freq": 1,
        "num_key_value_heads": 4,
        "q_lora_rank": 32,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 64,
        "rope_theta": 20000,
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "transformers_version": "4.33.1",
        "v_head_dim": 32,
    },
    "gpt_oss": {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "attention_bias": True,
        "experts_per_token": 2,
        "head_dim": 32,
        "initial_context_length": 256,
        "intermediate_size": 64,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "max_position_embeddings": 131072,
        "num_experts_per_tok": 2,
        "num_local_experts": 8,
        "output_router_logits": False,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "rope_type": "yarn",
            "truncate": False,
        },
        "router_aux_loss_coef": 0.9,
        "sliding_window": 128,
        "swiglu_limit": 7.0,
        "transformers_version": "4.55.0.dev0",
    },
}


WIDE: dict[str, Any] = {"head_dim": 64, "hidden_size": 256, "moe_intermediate_size": 256, "num_experts": 16}
"""A Qwen3-MoE all of whose matrices have rows of 256 weights, which K-quants are for."""


def write(folder: Path, family: str, dtype: str = "float32", gain: float = 1.5, **changes: Any) -> Path:
    """A checkpoint of ``family`` in ``folder``, its weights drawn with a fixed seed and stored as ``dtype``.

    Args:
        gain: standard deviation of what a matrix makes of independent inputs of deviation 1. The larger, the more each
            choice of an expert weighs, and what is lost by quantising.
        changes: fields of config.json that are to be others.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = dict(sorted((_COMMON | FAMILIES[family] | {"torch_dtype": dtype} | changes).items()))
    folder.mkdir(parents=True)
    text = json.dumps(fields, indent=2) + "\n"
    (folder / "config.json").write_text(text)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
    _decide(model, gain)
    with TemporaryDirectory() as place:
        model.to(getattr(torch, dtype)).save_pretrained(place)
        for file in Path(place).glob("*.safetensors"):
            (folder / file.name).write_bytes(file.read_bytes())
    generation = {"bos_token_id": 1, "eos_token_id": fields["eos_token_id"], "temperature": 0.6, "do_sample": True}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    _tokenizer(folder)
    (folder / "LICENSE").write_text("Terms of the model.\n")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# The model as published\n")
    return folder


def _decide(model: Any, gain: float) -> None:
    """Weights by which tokens differ, routers choose and biases matter."""
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if not tensor.is_floating_point() or "inv_freq" in name or "rotary" in name:
                continue
            noise = torch.randn(tensor.shape, generator=random)
            if "norm" in name:
                tensor.copy_(1 + 0.1 * noise)
            elif "bias" in name or "sinks" in name:
                tensor.copy_(0.1 * noise)
            elif "embed" in name:
                tensor.copy_(noise)
            elif tensor.ndim >= 2:
                tensor.copy_(gain * noise * tensor.shape[-1] ** -0.5)


def _tokenizer(folder: Path) -> None:
    """Bytes, two merges, and the special tokens; as files of an older library than the installed one wrote them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    # The last ones are of GLM-4, whose conversion to GGUF looks for them.
    special = ["<pad>", "<s>", "</s>", "[gMASK]", "<|endoftext|>", "<|user|>", "<|observation|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*special, *letters, "th", "the"])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[("t", "h"), ("th", "e")]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(special)
    made.save(str(folder / "tokenizer.json"))
    told = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "clean_up_tokenization_spaces": False}
    told |= {"model_max_length": 256, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(told, indent=2) + "\n")
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)


def rows(file: Path, count: int = 24, length: int = 32, seed: int = 5) -> Path:
    """Calibration rows of token ids, as JSON lines."""
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (count, length), generator=random).tolist()
    file.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in ids))
    return file


def prompts(count: int = 3, length: int = 12) -> list[list[int]]:
    """Token ids that clients are asked to go on from."""
    random = torch.Generator().manual_seed(11)
    return torch.randint(3, VOCABULARY, (count, length), generator=random).tolist()
