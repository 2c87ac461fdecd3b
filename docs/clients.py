"""docs/clients.md from docs/clients.json, the record of ``tests/clients``; written by docs/generate.py.

MCSMOE_CLIENTS=1 MCSMOE_CLIENTS_RECORD=1 pytest tests/clients      makes the record (15 minutes, once the environments are there)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

RECORD = Path(__file__).resolve().parent / "clients.json"
FORMS = ("published", "pruned", "refitted", "dense", "stock")
PLUGIN = ("merged", "uneven", "pruned-unevenly")

TEXT = """# Programs that read what comes out

<!-- Written by `make docs` from docs/clients.json, which `tests/clients` records. Do not edit this page. -->

Small random models in the layout of the hub (a `config.json` as it was published, weights by its names), in float32 and in
bfloat16, given to the programs themselves, each in an environment of its own. A cell says for how many of ten checkpoints (five
forms in two number formats: as published, pruned, pruned with a refit, merged and written `dense`, merged and written `stock`)
36 greedy tokens after three prompts are those of transformers 5.23.0 and all their log-probabilities are within 1e-4, computed in
float32, and the number format that the program takes by itself is that of the published model. What fails on the published
model itself is the program's own, and said below; the other forms of that model are then not judged.

{table}

{notes}

What llama.cpp makes of gpt-oss is its YaRN, which does not know `truncate: false`: with `truncate: true` in `rope_scaling` the published
model's log-probabilities differ by 6e-6. A gpt-oss is tried in plain numbers here, not in MXFP4 as it was first published.

Merged checkpoints as they are stored, by the plugin of `plugins/vllm`: the tokens and log-probabilities of `mcsmoe.load`, and the
experts take the bytes that they have in the file. *uneven*: layers keep different numbers of groups; *pruned-unevenly*: routers
of different numbers of experts.

{plugin}

What else was tried. For K-quants a wider Qwen3-MoE of 16 experts (all rows of 256 weights), pruned to 12: the cost is the mean
divergence of the distributions of the next token over 48 held-out rows of 32 tokens, from the same model in float32.

{others}

How to get there, with commands: [serving.md](serving.md). To try it again, or other versions: `MCSMOE_CLIENTS=1
MCSMOE_CLIENTS_RECORD=1 pytest tests/clients` makes the environments first (12 GB; the versions stand in `tests/clients/installed.py`).
"""


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(results: Mapping[str, str], family: str) -> str:
    """In how many forms and formats a client gives the same for a family."""
    own = {
        name: said for name, said in results.items() if name.startswith(f"{family}/") and name.split("/")[2] in FORMS
    }
    if not own:
        return "not tried"
    if all(said.startswith("published model:") for said in own.values()):
        return "its own failure"
    return f"{sum(said == 'same' for said in own.values())} of {len(own)}"


def page() -> str:
    """docs/clients.md."""
    whole: dict[str, dict[str, str]] = json.loads(RECORD.read_text())
    record = {
        client: {name: said for name, said in results.items() if "/" in name} for client, results in whole.items()
    }
    clients = [client for client, results in record.items() if results]
    families = sorted({name.split("/")[0] for client in clients for name in record[client]})
    table = _table(["", *clients], [[family, *(_cell(record[one], family) for one in clients)] for family in families])
    notes = []
    for client in clients:
        for family in families:
            said: dict[str, set[str]] = {}
            for name, text in record[client].items():
                if name.startswith(f"{family}/") and text != "same":
                    said.setdefault(text, set()).add(name.split("/")[1])
            notes += [f"- {client}, {family} in {' and '.join(sorted(said[text]))}: {text}" for text in sorted(said)]
    served = {name: said for client in clients for name, said in record[client].items() if name.split("/")[2] in PLUGIN}
    plugin = _table(["checkpoint", "vLLM with the plugin"], [[f"`{name}`", served[name]] for name in sorted(served)])
    others = [
        f"- {client}: {name}: {said}"
        for client, results in whole.items()
        for name, said in results.items()
        if "/" not in name
    ]
    return TEXT.format(table=table, notes="\n".join(notes), plugin=plugin, others="\n".join(others))
