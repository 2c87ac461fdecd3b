"""vLLM serves merged checkpoints as they are stored: the router's choices go through the redirect table of the layer.

Installed beside vLLM, and found by it: ``pip install ./plugins/vllm``, then ``vllm serve MERGED``. Needs nothing of the
project but the checkpoint's config.json, whose section ``mcsmoe`` docs/artefacts.md describes.
"""

from __future__ import annotations

ARCHITECTURES = (
    *("Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM", "OlmoeForCausalLM", "MixtralForCausalLM", "Glm4MoeForCausalLM"),
    *("DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM"),
)
"""Architectures of vLLM whose experts are made by its own factory and whose other tensors have the library's names."""
PREFIX = "Compact"


def register() -> None:
    """The entry point: vLLM calls it in each of its processes, maybe more than once."""
    from vllm import ModelRegistry
    from vllm.transformers_utils.config import _CONFIG_REGISTRY

    from mcsmoe_vllm.config import MODEL_TYPE, CompactConfig

    _CONFIG_REGISTRY[MODEL_TYPE] = CompactConfig
    known = ModelRegistry.get_supported_archs()
    for name in ARCHITECTURES:
        if name in known and PREFIX + name not in known:
            ModelRegistry.register_model(PREFIX + name, f"mcsmoe_vllm.models:{PREFIX}{name}")
