"""lm-eval on a compact model: python run_lm_eval.py MODEL OUT. The project is on the path; nothing is fetched."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import lm_eval
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

import mcsmoe

source, out = sys.argv[1:]
model = mcsmoe.load(source)
pairs = [("the old miller", " counts grain"), ("birds", " fly to the mill")]


def asked(harness: HFLM) -> list[float]:
    requests = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]
    return [value for value, _ in harness.loglikelihood(requests)]


given = asked(HFLM(pretrained=model, tokenizer=mcsmoe.load_tokenizer(source), batch_size=1))
by_name = asked(HFLM(pretrained=source, device="cpu", dtype="float32", batch_size=1))
expected = []
tokenizer = mcsmoe.load_tokenizer(source)
for context, continuation in pairs:
    whole, start = tokenizer(context + continuation).input_ids, len(tokenizer(context).input_ids)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([whole])).logits[0].log_softmax(dim=-1)
    expected.append(float(sum(logits[place - 1, whole[place]] for place in range(start, len(whole)))))
for found in (given, by_name):
    assert all(abs(one - two) < 1e-3 for one, two in zip(found, expected, strict=True)), (found, expected)

place = Path(out)
place.mkdir()
(place / "rows.jsonl").write_text(
    "".join(json.dumps({"question": "the", "choices": [" old", " mill"], "answer": n % 2}) + "\n" for n in range(6))
)
(place / "local.yaml").write_text(
    f"""task: local
dataset_path: json
dataset_kwargs: {{data_files: {{test: {place / "rows.jsonl"}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}]
"""
)
results = lm_eval.simple_evaluate(
    model="hf",
    model_args={"pretrained": source, "dtype": "float32"},
    device="cpu",
    tasks=["local"],
    task_manager=lm_eval.tasks.TaskManager(include_path=str(place), include_defaults=False),
    bootstrap_iters=0,
)
assert results["results"]["local"]["acc,none"] == 0.5, results["results"]
print("lm-eval: well")
