"""transformers of another version than the project's."""

from __future__ import annotations

from typing import Any

import torch
from greedy import greedy, main, together
from transformers import AutoModelForCausalLM


@torch.no_grad()
def run(folder: str, order: dict[str, Any]) -> dict[str, Any]:
    dtype = str(AutoModelForCausalLM.from_pretrained(folder, torch_dtype="auto").dtype).removeprefix("torch.")
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, torch_dtype=getattr(torch, order["dtype"]), output_loading_info=True
    )
    if wrong := {name: sorted(found)[:3] for name, found in report.items() if found}:
        raise ValueError(f"read otherwise than written: {wrong}")
    model.eval()

    def logits(ids: list[int]) -> Any:
        return model(torch.tensor([ids]), use_cache=False).logits[0, -1].float().numpy()

    return together([greedy(logits, ids, order["tokens"]) for ids in order["prompts"]], dtype)


if __name__ == "__main__":
    main(run)
