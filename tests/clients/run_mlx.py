"""mlx-lm on the processor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from greedy import greedy, main, together
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model


def run(folder: str, order: dict[str, Any]) -> dict[str, Any]:
    mx.set_default_device(mx.cpu)
    model, _ = load_model(Path(folder))
    sizes: dict[str, int] = {}
    for _, tensor in tree_flatten(model.parameters()):
        kind = str(tensor.dtype).removeprefix("mlx.core.")
        sizes[kind] = sizes.get(kind, 0) + tensor.size
    model.set_dtype(getattr(mx, order["dtype"]))

    def logits(ids: list[int]) -> Any:
        return np.array(model(mx.array([ids]))[0, -1].astype(mx.float32))

    parts = [greedy(logits, ids, order["tokens"]) for ids in order["prompts"]]
    return together(parts, max(sizes, key=lambda kind: sizes[kind]))


if __name__ == "__main__":
    main(run)
