"""vLLM on the processor."""

from __future__ import annotations

import os
from typing import Any

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}

from greedy import main, together
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory


def held(model: Any) -> int:
    """Bytes of all that experts are held in."""
    return sum(
        tensor.numel() * tensor.element_size() for name, tensor in model.named_parameters() if "routed_experts" in name
    )


def run(folder: str, order: dict[str, Any]) -> dict[str, Any]:
    try:
        model = LLM(
            folder,
            skip_tokenizer_init=True,
            enforce_eager=not order.get("compiled"),
            dtype=order["dtype"],
            max_model_len=128,
            max_num_seqs=4,
            enable_prefix_caching=False,
        )
        settings = SamplingParams(
            temperature=0, max_tokens=order["tokens"], logprobs=0, ignore_eos=True, detokenize=False
        )
        asked = [{"prompt_token_ids": ids} for ids in order["prompts"]]
        parts = []
        for answer in model.generate(asked, settings, use_tqdm=False):
            tokens = list(answer.outputs[0].token_ids)
            probabilities = [
                step[token].logprob for token, step in zip(tokens, answer.outputs[0].logprobs, strict=True)
            ]
            parts.append({"tokens": tokens, "logprobs": probabilities})
        stored = model.llm_engine.model_config.hf_config.dtype
        made = together(parts, str(stored).removeprefix("torch."))
        return made | {"expert_bytes": model.apply_model(held)[0]}
    finally:
        model = None
        cleanup_dist_env_and_memory()


if __name__ == "__main__":
    main(run)
