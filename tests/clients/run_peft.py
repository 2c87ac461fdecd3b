"""peft on a compact model: python run_peft.py MODEL OUT. The project is on the path."""

from __future__ import annotations

import sys

import torch
from peft import LoraConfig, PeftModel, get_peft_model

import mcsmoe

source, out = sys.argv[1:]
ids = torch.arange(3, 27).reshape(2, 12)
model = mcsmoe.load(source)
with torch.no_grad():
    before = model(input_ids=ids).logits
tuned = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=True))
with torch.no_grad():
    assert torch.equal(tuned(input_ids=ids).logits, before), "a new adapter changes nothing"
optimiser = torch.optim.Adam([one for one in tuned.parameters() if one.requires_grad], lr=1e-2)
tuned.train()
losses = []
for _ in range(5):
    loss = tuned(input_ids=ids, labels=ids).loss
    loss.backward()
    optimiser.step()
    optimiser.zero_grad()
    losses.append(float(loss))
assert losses[-1] < losses[0], losses
tuned.eval()
with torch.no_grad():
    after = tuned(input_ids=ids).logits
tuned.save_pretrained(f"{out}/adapter")
again = PeftModel.from_pretrained(mcsmoe.load(source), f"{out}/adapter").eval()
with torch.no_grad():
    assert torch.equal(again(input_ids=ids).logits, after), "the adapter alone is read back"
# Merged into the weights, the model is a compact checkpoint again.
merged = tuned.merge_and_unload()
mcsmoe.save(merged, f"{out}/merged")
with torch.no_grad():
    apart = (mcsmoe.load(f"{out}/merged")(input_ids=ids).logits - after).abs().max()
assert apart < 1e-4, apart
print("peft: well")
