"""llm-compressor: python run_compressor.py SOURCE OUT SCHEME."""

from __future__ import annotations

import sys

from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoModelForCausalLM

source, out, scheme = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
recipe = QuantizationModifier(targets="Linear", scheme=scheme, ignore=["lm_head", "re:.*mlp.gate$"])
oneshot(model=model, recipe=recipe)
model.save_pretrained(out)
