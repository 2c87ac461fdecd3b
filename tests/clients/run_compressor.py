"""llm-compressor: python run_compressor.py SOURCE OUT SCHEME."""

from __future__ import annotations

import sys

from compressed_tensors.quantization import preset_name_to_scheme
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoModelForCausalLM

source, out, name = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
scheme = preset_name_to_scheme(name, ["Linear"])
if scheme.weights.group_size:
    scheme.weights.group_size = 32  # rows of the small model are shorter than the usual group
ignore = ["lm_head", "re:.*mlp.gate$"]
oneshot(model=model, recipe=QuantizationModifier(config_groups={"group_0": scheme}, ignore=ignore))
model.save_pretrained(out)
