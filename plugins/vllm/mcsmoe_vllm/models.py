"""By its name, the merged form of each architecture: ``CompactQwen3MoeForCausalLM`` of ``Qwen3MoeForCausalLM``."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from functools import cache
from typing import Any

from torch import Tensor
from vllm import ModelRegistry

from mcsmoe_vllm import ARCHITECTURES, PREFIX
from mcsmoe_vllm.config import layers_of
from mcsmoe_vllm.redirect import redirected


@cache
def compact(architecture: str) -> Any:
    """The class of vLLM for ``architecture``, with merged layers as its checkpoint says."""
    base: Any = ModelRegistry.models[architecture].load_model_cls()

    def __init__(self: Any, *, vllm_config: Any, prefix: str = "") -> None:
        layers = layers_of(vllm_config.model_config.hf_config.mcsmoe)
        with redirected(sys.modules[base.__module__], layers) as made:
            base.__init__(self, vllm_config=vllm_config, prefix=prefix)
        self.mcsmoe = made

    def load_weights(self: Any, weights: Iterable[tuple[str, Tensor]]) -> Any:
        return base.load_weights(self, self.mcsmoe.published(weights))

    return type(
        PREFIX + architecture, (base,), {"__init__": __init__, "load_weights": load_weights, "__module__": __name__}
    )


def __getattr__(name: str) -> Any:
    if name.removeprefix(PREFIX) in ARCHITECTURES:
        return compact(name.removeprefix(PREFIX))
    raise AttributeError(name)
