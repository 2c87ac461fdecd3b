"""Building and pre-training: span corruption keeps every token, and new models look at neighbours from the start."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mcsmoe.train.pretrain import SpanCorruption, build_switch, corrupt, noise_mask

SENTINELS, EOS = [90, 91, 92, 93, 94, 95, 96, 97], 1
ARCHITECTURE = {
    "d_model": 16,
    "d_kv": 4,
    "d_ff": 24,
    "num_heads": 4,
    "num_layers": 2,
    "num_sparse_encoder_layers": 1,
    "num_experts": 4,
}


@pytest.mark.parametrize("seed", range(20))
def test_input_and_target_together_hold_every_token_once(seed: int) -> None:
    rng = np.random.default_rng(seed)
    window = rng.integers(3, 80, size=40)
    mask = noise_mask(40, 0.15, 3.0, rng)
    assert mask.sum() == 6
    ids, target = corrupt(window, mask, SENTINELS, EOS)
    rebuilt: list[int] = []
    spans = {int(t): [] for t in target if t in SENTINELS}
    current = None
    for token in target[:-1]:
        if int(token) in spans:
            current = int(token)
        else:
            spans[current].append(int(token))  # type: ignore[index]
    for token in ids[:-1]:
        rebuilt += spans[int(token)] if int(token) in spans else [int(token)]
    assert rebuilt == window.tolist()
    assert ids[-1] == target[-1] == EOS


def test_a_step_always_gives_the_same_batch_and_epochs_differ() -> None:
    stream = np.random.default_rng(0).integers(3, 80, size=1000)
    made = SpanCorruption(stream, 20, 4, SENTINELS, EOS, 0.15, 3.0, seed=5)
    first, again = made.batch(3), made.batch(3)
    assert all(torch.equal(first[name], again[name]) for name in first)
    later = made.batch(3 + made.steps_per_epoch)
    assert not torch.equal(first["input_ids"], later["input_ids"])


def test_a_corpus_smaller_than_a_batch_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"pretrain\.batch_size"):
        SpanCorruption(np.arange(50), 20, 4, SENTINELS, EOS, 0.15, 3.0, seed=0)


def test_heads_of_a_new_model_start_at_the_neighbours() -> None:
    model = build_switch(ARCHITECTURE, 99, seed=0)
    bias_HQK = model.encoder.block[0].layer[0].SelfAttention.compute_bias(9, 9)[0]
    queries = torch.arange(1, 8)
    assert torch.equal(bias_HQK[0, 1:8].argmax(dim=1), queries - 1)
    assert torch.equal(bias_HQK[1, 1:8].argmax(dim=1), queries + 1)
    # Wider heads are symmetric, and the widest is nearly flat over a short text.
    torch.testing.assert_close(bias_HQK[3], bias_HQK[3].T)
    assert float(bias_HQK[3].max().detach() - bias_HQK[3].min().detach()) == pytest.approx(8 * 0.5**3)
    causal_HQK = model.decoder.block[0].layer[0].SelfAttention.compute_bias(9, 9)[0]
    assert torch.equal(causal_HQK[0, 1:].argmax(dim=1), torch.arange(8))


def test_the_same_seed_builds_the_same_model() -> None:
    one, two = (build_switch(ARCHITECTURE, 99, seed=3).state_dict() for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_smaller_residual_stream_computes_the_same_function() -> None:
    inputs = {
        "input_ids": torch.randint(3, 99, (2, 9), generator=torch.Generator().manual_seed(0)),
        "labels": torch.randint(3, 99, (2, 5), generator=torch.Generator().manual_seed(1)),
    }
    logits = []
    for scale in (1.0, 0.1):
        model = build_switch({**ARCHITECTURE, "layer_norm_epsilon": 1e-12}, 99, seed=0, residual_scale=scale).eval()
        with torch.no_grad():
            logits.append(model(**inputs).logits)
        assert float(model.shared.weight.detach().std()) == pytest.approx(scale, rel=0.1)
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-4)
