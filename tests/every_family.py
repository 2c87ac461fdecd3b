"""A small random model of every Mixture-of-Experts type of the installed transformers, from its own configuration class.

Sizes are cut by the names of the fields. A type whose configuration cannot be cut so is not built, and said so.
"""

from __future__ import annotations

import copy
import re
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from mcsmoe.adapters.counts import EXPERT_FIELDS

EXPERTS, CHOICES, WIDTH, VOCABULARY = 8, 2, 32, 96
TEXT = 72  # tokens from here on stand for pictures and sounds
_ORDER = ("CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "TOKEN_CLASSIFICATION")
# The first pattern that a field's whole name matches says its size.
_SIZES: list[tuple[str, int]] = [
    (r"num_experts|num_local_experts|n_routed_experts|moe_num_experts", EXPERTS),
    (r"num_experts_per_tok(en)?|moe_top_?k|moe_k|top_k_experts", CHOICES),
    (r"n_group|num_expert_group", 1),
    (r"topk_group", 1),
    (r".*vocab_size.*", VOCABULARY),
    (r"(moe|expert|shared).*(intermediate|ffn|hidden).*(size|dim)|.*shared_intermediate_size|share_expert_dim", 16),
    (r".*(intermediate|ffn).*(size|dim)|d_ff|(en|de)coder_ffn_dim|d_inner|mlp_dim", 48),
    (
        r"hidden_size|d_model|n_embd|(text|audio|out|projector)_hidden_size|(adapter|projector)_(in|out|input|output)_dim",
        WIDTH,
    ),
    (r"vision_output_dim|output_dim|adapter_(in|out)put_size", WIDTH),
    (r"num_hidden_layers|n_layers?|(en|de)coder_layers|num_(decoder_)?layers|depth", 4),
    (r".*num_(key_value|kv)_heads|kv_n_heads|num_attention_groups|.*linear_num_key_heads", 2),
    (r".*(num_.*heads|n_heads|attention_heads)", 4),
    (r".*head_dim|d_kv|kv_channels", 8),
    (r".*(lora_rank|_rank)", 16),
    (r"max_position_embeddings|max_seq_len|n_positions|sliding_window.*", 64),
    (r"first_k_dense_replace|num_dense_layers|n_shared_experts|(moe_)?num_shared_experts", 1),
    (r"(en|de)coder_sparse_step", 2),
    (r"image_size|patch_size", 16),
]
_PATTERNS = [(re.compile(pattern), size) for pattern, size in _SIZES]
# Made anew from the others; a list of the old length does not fit.
_DERIVED = re.compile(
    r"layer_types|mlp_layer_types|layers_block_type|.*_layers_types?|no_rope_layers|indexer_types|per_layer_config|"
    r"transformers_version|qk_head_dim|architectures|layer_rope_theta"
)
_WHERE_NONE = ("num_key_value_heads", "head_dim", "num_experts_per_tok", "sliding_window")
_OWN: dict[str, dict[str, Any]] = {
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]},
    "unlimited_ocr_text": {"mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]},
    "glm5_next_text": {"mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]},
    "diffusion_gemma_text": {
        "global_head_dim": 8,
        "num_experts": EXPERTS,
        "top_k_experts": CHOICES,
        "moe_intermediate_size": 16,
    },
    "dots1": {"n_routed_experts": EXPERTS, "num_experts_per_tok": CHOICES, "n_shared_experts": 1},
    "dots3_note_text": {
        "head_dim": 16,
        "swa_head_dim": 16,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16,
        "swa_qk_nope_head_dim": 8,
        "swa_qk_rope_head_dim": 8,
        "swa_v_head_dim": 8,
    },
    "dots3_note_vision_encoder": {"per_layer_config": {}},
    "ernie4_5_vl_moe_text": {
        "moe_intermediate_size": [16, 16],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
    },
    "glm4v_moe_text": {
        "head_dim": 16,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": [2, 1, 1],
            "partial_rotary_factor": 0.5,
        },
    },
    "qwen4_exp_text": {
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 64,
        "indexer_compress_ratio": 4,
    },
    "qwen3_omni_moe_thinker": {
        "vision_start_token_id": TEXT,
        "vision_end_token_id": TEXT,
        "audio_start_token_id": TEXT,
    },
    "step3p5": {
        "moe_layers_enum": None,
        "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
        "layer_types": ["full_attention", "sliding_attention"] * 2,
    },
    "dbrx": {
        "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": EXPERTS, "moe_top_k": CHOICES},
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
    },
    "gemma4_text": {
        "num_experts": EXPERTS,
        "top_k_experts": CHOICES,
        "moe_intermediate_size": 16,
        "enable_moe_block": True,
        "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 0,
        "global_head_dim": 8,
    },
    "doge": {"is_moe": True, "num_experts": 16, "num_experts_per_tok": 4},
    "deepseek_v2": {"num_experts_per_tok": CHOICES},
    "inkling2_text": {"n_layers_per_attn_res_block": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mistral4": {"head_dim": 16},
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "n_groups": 2,
    },
    "radio": {"video_temporal_patch_size": 2},
    "qwen3_omni_moe_talker": {"spatial_merge_size": 2},
    "qwen3_omni_moe_talker_text": {"shared_expert_intermediate_size": 16},
    "zaya": {"num_experts_per_tok": 1},
    "jamba": {"expert_layer_period": 2, "expert_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 4},
    "nllb-moe": {"decoder_start_token_id": 2},
    "switch_transformers": {"decoder_start_token_id": 0},
    "phimoe": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "gpt_oss": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "intermediate_size": 16},
}


# transformers 5.23 does not load what it saves of these itself: sizes of tied embeddings differ.
UNLOADABLE = ("nemo_speechlm",)


@cache
def every_type() -> dict[str, str]:
    """Model class by model type, of every type whose configuration names a number of experts."""
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    found: dict[str, str] = {}
    for kind in CONFIG_MAPPING:
        names = [getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES").get(kind) for mapping in _ORDER]
        names = [name if isinstance(name, str) else name[0] for name in names if name is not None]
        if names and kind not in UNLOADABLE and _names_experts(CONFIG_MAPPING[kind]):
            whole = [name for name in names if "ForConditional" in name]
            # With a text model inside, the class that has the whole of it.
            found[kind] = whole[0] if whole and getattr(CONFIG_MAPPING[kind], "sub_configs", None) else names[0]
    return dict(sorted(found.items()))


def _names_experts(config: Any) -> bool:
    try:
        default = config()
    except Exception:  # a configuration without defaults that can be
        return False
    # None too: experts that a configuration has by itself only where it is asked for them.
    if any(name in vars(default) for name in EXPERT_FIELDS) or hasattr(default, "enable_moe_block"):
        return True
    if hasattr(vars(default).get("ffn_config"), "moe_num_experts"):
        return True
    return any(_names_experts(type(part)) for part in _parts(default).values())


def _parts(config: Any) -> dict[str, Any]:
    """The configurations inside one: of its text model, of its towers."""
    names = getattr(config, "sub_configs", None) or {}
    parts = {name: getattr(config, name, None) for name in names}
    return {name: part for name, part in parts.items() if hasattr(part, "to_dict")}


def fields_of(kind: str) -> dict[str, Any]:
    """Arguments for a small configuration of ``kind``."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return _fields(CONFIG_MAPPING[kind], kind)


def _fields(config: Any, kind: str) -> dict[str, Any]:
    default, made = config(), {}
    parts, marks = _parts(default), iter(range(VOCABULARY - 1, TEXT, -1))
    for name, value in default.to_dict().items():
        if name in parts:
            part = parts[name]
            made[name] = _fields(type(part), part.model_type) | {"model_type": part.model_type}
            continue
        if _DERIVED.fullmatch(name):
            continue
        size = next((size for pattern, size in _PATTERNS if pattern.fullmatch(name)), None)
        if size is not None and (isinstance(value, int) or value is None) and not isinstance(value, bool):
            # Zero says that there is no such thing; None, often, that it is as another field.
            if (value is not None and (value or name == "head_dim")) or name in _WHERE_NONE:
                made[name] = size
        elif re.search(r"token_(id|index)$", name) and isinstance(value, int):
            made[name] = min(value, 2) if re.match("(pad|bos|eos|decoder_start)_", name) else next(marks)
    made |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if "kv_lora_rank" in made:
        made["num_key_value_heads"] = made["num_attention_heads"]
    if "moe_intermediate_size" not in made and "intermediate_size" in made:
        made["intermediate_size"] = 16
    return made | _OWN.get(kind, {})


def build(kind: str, cls: str) -> nn.Module:
    """The model, its routers decided and its biases not zero."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](**fields_of(kind))
    made: Any = getattr(transformers, cls)(config)
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in [*made.named_parameters(), *made.named_buffers()]:
            last = name.rpartition(".")[2]
            if not tensor.is_floating_point() or re.search(r"norm|A_log|dt_|conv|inv_freq|scale|position|\.D$", name):
                continue
            if "bias" in last:
                tensor.copy_(0.2 * torch.randn(tensor.shape, generator=random))
            elif tensor.ndim >= 2:
                wide = 1.0 if re.search(r"gate\.weight|router|classifier", name) else tensor.shape[-1] ** -0.5
                tensor.copy_(wide * torch.randn(tensor.shape, generator=random))
    made.tie_weights()
    return made.eval()


def inputs_of(model: Any) -> dict[str, Tensor]:
    """Tokens, the last of a row padded."""
    random = torch.Generator().manual_seed(2)
    made = {"input_ids": torch.randint(3, TEXT, (3, 12), generator=random)}
    made["attention_mask"] = torch.ones(3, 12, dtype=torch.int64)
    if model.config.is_encoder_decoder:
        made["decoder_input_ids"] = torch.randint(3, TEXT, (3, 7), generator=random)
    return made


@torch.no_grad()
def logits_of(model: Any) -> Tensor:
    return model(**inputs_of(model), use_cache=False).logits.float()


def clone(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)
