"""The laws every adapter obeys, for Switch, and what capture says about capacity and padding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_switch import batch, config, logits, model
from torch import nn

from mcsmoe import modules
from mcsmoe.adapters.registry import adapter_for
from mcsmoe.types import CompressionSpec, ExpertWeights, LayerSpec, LowRankFactors, Role

LAYERS = [
    "encoder.block.1.layer.1.mlp",
    "encoder.block.3.layer.1.mlp",
    "decoder.block.0.layer.2.mlp",
    "decoder.block.1.layer.2.mlp",
    "decoder.block.2.layer.2.mlp",
]
# Float32 logits of this model are of size 0.1 to 1; another order of the same sums moves them by some 1e-7.
TOLERANCE = 2e-6


def test_layers_follow_each_stacks_own_depth_and_sparse_step() -> None:
    made = model()
    adapter = adapter_for(made)
    assert adapter.layers(made) == LAYERS
    assert {adapter.num_experts(made, layer) for layer in LAYERS} == {6}
    weights = adapter.read_experts(made, LAYERS[0])
    assert (weights.num_experts, weights.width, weights.d_model) == (6, 24, 16)
    assert weights.roles == {"wi": Role.INPUT, "wo": Role.OUTPUT}


def test_an_encoder_alone_is_treated_too() -> None:
    from transformers import SwitchTransformersEncoderModel

    made = SwitchTransformersEncoderModel(config())
    assert adapter_for(made).layers(made) == LAYERS[:2]


def test_a_model_without_sparse_layers_is_refused_by_name() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    made = T5ForConditionalGeneration(T5Config(num_layers=1, d_model=8, d_ff=8, num_heads=2, d_kv=4, vocab_size=16))
    with pytest.raises(ValueError, match=r"T5ForConditionalGeneration.*'t5'.*switch_transformers"):
        adapter_for(made)


def test_read_then_write_changes_no_logit() -> None:
    made, inputs = model(), batch()
    adapter, before = adapter_for(made), logits(made, inputs)
    stock = {layer: adapter.read_experts(made, layer) for layer in LAYERS}
    for layer in LAYERS:
        adapter.write_experts(made, layer, stock[layer])
    assert torch.equal(logits(made, inputs), before)
    for layer in LAYERS:
        adapter.write_experts(made, layer, stock[layer], torch.arange(6))
    assert (logits(made, inputs) - before).abs().max() < TOLERANCE
    for layer in LAYERS:
        back = adapter.read_experts(made, layer)
        assert all(torch.equal(back.tensors[name], stock[layer].tensors[name]) for name in ("wi", "wo"))


def test_read_experts_gives_copies() -> None:
    made = model()
    adapter = adapter_for(made)
    adapter.read_experts(made, LAYERS[0]).tensors["wi"].zero_()
    assert adapter.read_experts(made, LAYERS[0]).tensors["wi"].abs().sum() > 0


def test_permuting_neurons_changes_no_logit() -> None:
    made, inputs = model(), batch()
    adapter, before = adapter_for(made), logits(made, inputs)
    for layer in LAYERS:
        weights = adapter.read_experts(made, layer)
        order = torch.stack([torch.randperm(24, generator=torch.Generator().manual_seed(e)) for e in range(6)])
        wi = torch.stack([weights.tensors["wi"][e, order[e]] for e in range(6)])
        wo = torch.stack([weights.tensors["wo"][e][:, order[e]] for e in range(6)])
        adapter.write_experts(made, layer, ExpertWeights({"wi": wi, "wo": wo}, weights.roles))
    after = logits(made, inputs)
    assert not torch.equal(after, before)
    assert (after - before).abs().max() < TOLERANCE


def test_merging_identical_experts_changes_no_logit() -> None:
    made, inputs = model(), batch()
    adapter = adapter_for(made)
    table = torch.tensor([0, 1, 0, 2, 1, 0])
    for layer in LAYERS:
        three = adapter.read_experts(made, layer).select(torch.tensor([0, 1, 3]))
        adapter.write_experts(made, layer, three.select(table))
    before = logits(made, inputs)
    for layer in LAYERS:
        adapter.write_experts(made, layer, adapter.read_experts(made, layer).select(torch.tensor([0, 1, 3])), table)
        assert torch.equal(adapter.expert_to_group(made, layer), table)
        assert adapter.num_experts(made, layer) == 6
        assert adapter.read_experts(made, layer).num_experts == 3
    assert (logits(made, inputs) - before).abs().max() < TOLERANCE


@pytest.mark.parametrize("capacity", [64, 2])
def test_counts_sum_to_dispatched_tokens(capacity: int) -> None:
    made, inputs = model(expert_capacity=capacity), batch()
    adapter = adapter_for(made)
    with adapter.capture(made) as captured:
        logits(made, inputs)
    assert list(captured.batches) == LAYERS
    real = {"e": int(inputs["attention_mask"].sum()), "d": int((inputs["labels"] != -100).sum())}
    for layer, routed in captured.batches.items():
        assert int(routed.valid_T.sum()) == real[layer[0]]
        seen = routed.only_valid()
        counts = torch.bincount(seen.chosen_TK[seen.chosen_TK >= 0], minlength=6)
        dropped = int((seen.chosen_TK < 0).sum())
        assert int(counts.sum()) + dropped == real[layer[0]]
        assert (dropped > 0) == (capacity == 2)
        assert not routed.logits_TE.requires_grad
        assert torch.equal(routed.wanted_TK[:, 0], routed.logits_TE.argmax(dim=1))
        # Capacity is per sequence, in order: no sequence computes an expert more often than that.
        rows = routed.chosen_TK.reshape(5, -1)
        assert max(int((rows == expert).sum(dim=1).max()) for expert in range(6)) <= capacity


def test_an_over_capacity_token_gets_no_expert_output_in_either_form() -> None:
    made, inputs = model(expert_capacity=1), batch()
    adapter, before = adapter_for(made), logits(made, inputs)
    for layer in LAYERS:
        adapter.write_experts(made, layer, adapter.read_experts(made, layer), torch.arange(6))
    assert (logits(made, inputs) - before).abs().max() < TOLERANCE


def test_capture_keeps_the_graph_of_logits_on_request_and_forgets_the_last_batch() -> None:
    made = model()
    adapter = adapter_for(made)
    with adapter.capture(made, detach=False) as captured:
        made(**batch())
        captured.batches[LAYERS[0]].logits_TE.sum().backward()
        assert made.get_submodule(LAYERS[0]).router.classifier.weight.grad.abs().sum() > 0
        made(**batch(rows=2))
        assert captured.batches[LAYERS[0]].inputs_TD.shape[0] == 2 * 11
    with torch.no_grad():
        made(**batch())
    assert captured.batches[LAYERS[0]].inputs_TD.shape[0] == 2 * 11


def test_decoder_positions_are_masked_by_labels_else_by_their_own_mask_else_all_count() -> None:
    made, inputs = model(), batch()
    adapter = adapter_for(made)
    decoder = {"decoder_input_ids": torch.ones(5, 7, dtype=torch.int64)}
    mask = torch.ones(5, 7, dtype=torch.int64)
    mask[:, 4:] = 0
    base = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    with adapter.capture(made) as captured, torch.no_grad():
        made(**base, **decoder, decoder_attention_mask=mask)
        assert int(captured.batches[LAYERS[-1]].valid_T.sum()) == 20
        made(inputs["input_ids"], **decoder)
        assert int(captured.batches[LAYERS[-1]].valid_T.sum()) == 35
        assert int(captured.batches[LAYERS[0]].valid_T.sum()) == 55


def test_capture_works_while_generating_with_a_cache() -> None:
    made, inputs = model(), batch()
    with adapter_for(made).capture(made) as captured, torch.no_grad():
        made.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=3, do_sample=False)
    assert captured.batches[LAYERS[-1]].inputs_TD.shape[0] == captured.batches[LAYERS[-1]].valid_T.shape[0]


def test_router_is_read_and_named() -> None:
    made = model(router_bias=True)
    adapter = adapter_for(made)
    router = adapter.read_router(made, LAYERS[0])
    assert router.weight_ED.shape == (6, 16)
    assert router.bias_E is not None
    names = dict(made.named_parameters())
    assert set(adapter.router_parameters(made)) == {name for name in names if ".router." in name}


def _factors(weights: ExpertWeights, rank: int) -> dict[str, LowRankFactors]:
    made = {}
    for name, matrix in weights.tensors.items():
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        u, v = u[..., :rank] * s[:, None, :rank].sqrt(), s[:, :rank, None].sqrt() * vh[:, :rank]
        made[name] = LowRankFactors(u, v, matrix - u @ v)
    return made


def test_an_exact_decomposition_changes_no_logit_trainable_or_packed() -> None:
    made, inputs = model(), batch()
    adapter, before = adapter_for(made), logits(made, inputs)
    for layer in LAYERS:
        weights = adapter.read_experts(made, layer)
        adapter.write_compressed(made, layer, _factors(weights, 4), {}, torch.arange(6))
        back = adapter.read_experts(made, layer)
        assert all((back.tensors[n] - weights.tensors[n]).abs().max() < 1e-6 for n in back.tensors)
    assert (logits(made, inputs) - before).abs().max() < 5e-6
    assert len(modules.residuals(made)) == 10
    modules.pack(made)
    assert (logits(made, inputs) - before).abs().max() < 5e-6
    assert not modules.residuals(made)


def test_install_builds_the_empty_structure_on_meta() -> None:
    from transformers import SwitchTransformersForConditionalGeneration

    with torch.device("meta"):
        made = SwitchTransformersForConditionalGeneration(config())
        spec = LayerSpec(2, [0, 1, 0, 1, 0, 1], CompressionSpec(4, {"wi": [3, 0], "wo": [1, 16]}))
        adapter_for(made).install(made, LAYERS[2], spec)
    experts = made.get_submodule(LAYERS[2]).experts
    assert experts.projection("wi").residual_rows_Ni.shape == (3, 16)
    assert experts.projection("wo").residual_rows_Ni.shape == (17, 24)
    assert experts.projection("wo").residual_rows_Ni.is_meta
    assert experts.expert_to_group.tolist() == spec.expert_to_group
    assert experts.spec() == spec


def _weights(made: nn.Module) -> ExpertWeights:
    return adapter_for(made).read_experts(made, LAYERS[0])


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ([0, 1, 2, 3, 4], "shape"),
        ([0, 1, 2, 3, 4, 6], "expert 5 goes to group 6"),
        ([0, 1, 2, 3, 4, 4], "no expert is redirected to group 5"),
    ],
)
def test_a_bad_redirect_table_names_layer_and_expert(table: list[int], message: str) -> None:
    made = model()
    with pytest.raises(ValueError, match=f"{LAYERS[0]}.*{message}"):
        adapter_for(made).write_experts(made, LAYERS[0], _weights(made), torch.tensor(table))


def test_weights_that_do_not_fit_are_refused() -> None:
    made = model()
    adapter, weights = adapter_for(made), _weights(made)
    with pytest.raises(ValueError, match="expert_to_group"):
        adapter.write_experts(made, LAYERS[0], weights.select(torch.tensor([0])))
    narrow = weights.map(lambda name, t: t[:, :20] if name == "wi" else t[:, :, :20])
    with pytest.raises(ValueError, match=r"'wi' is \(20, 16\).*needs \(24, 16\)"):
        adapter.write_experts(made, LAYERS[0], narrow)
    with pytest.raises(ValueError, match=r"nowhere.*not a sparse layer"):
        adapter.read_experts(made, "nowhere")


@pytest.mark.golden
def test_logits_routing_and_merged_logits_agree_with_the_published_implementation(shared: Path) -> None:
    import json

    from safetensors.torch import load_file
    from transformers import SwitchTransformersForConditionalGeneration

    golden = shared / "golden"
    batches, forward = load_file(golden / "batches.safetensors"), load_file(golden / "forward.safetensors")
    made = SwitchTransformersForConditionalGeneration.from_pretrained(golden / "model").eval()
    adapter = adapter_for(made)
    inputs = {name: batches[f"pad.{name}"] for name in ("input_ids", "attention_mask", "labels")}
    with adapter.capture(made) as captured:
        assert (logits(made, inputs) - forward["pad.logits"]).abs().max() < 2e-5
    for layer, routed in captured.batches.items():
        recorded = forward[f"pad.{layer}.router_logits"].reshape(-1, 8)
        assert (routed.logits_TE - recorded).abs().max() < 2e-5
        assert torch.equal(routed.chosen_TK[:, 0], forward[f"pad.{layer}.router_index"].flatten())
    alias = json.loads((golden / "merge" / "index.json").read_text())["variants"]["freq_normal_avg3"]["alias"]
    merged = load_file(golden / "merge" / "freq_normal_avg3.safetensors")
    for layer in adapter.layers(made):
        leaders = sorted(set(alias[layer]))
        stack = {
            name: torch.stack([merged[f"{layer}.experts.expert_{e}.{name}.weight"] for e in leaders])
            for name in ("wi", "wo")
        }
        table = torch.tensor([leaders.index(e) for e in alias[layer]])
        adapter.write_experts(made, layer, ExpertWeights(stack, {"wi": Role.INPUT, "wo": Role.OUTPUT}), table)
    recorded = load_file(golden / "merge" / "logits.safetensors")
    for kind in ("full", "pad"):
        inputs = {name: batches[f"{kind}.{name}"][:16] for name in ("input_ids", "attention_mask", "labels")}
        assert (logits(made, inputs) - recorded[f"freq_normal_avg3.{kind}"]).abs().max() < 2e-5


def test_a_masked_router_chooses_among_the_other_experts_as_if_there_were_no_more(tmp_path: Path) -> None:
    made, inputs = model(), batch()
    adapter = adapter_for(made)
    layer = adapter.layers(made)[1]
    dropped_E = torch.tensor([False, True, False, True, True, False])
    weight_ED = adapter.read_router(made, layer).weight_ED
    adapter.mask_router(made, layer, dropped_E)
    with torch.no_grad(), adapter.capture(made) as captured:
        made(**inputs)
    found = captured.batches[layer]
    kept = (~dropped_E).nonzero()[:, 0]
    alone_TE = (found.inputs_TD @ weight_ED[kept].T).softmax(dim=1)
    assert torch.equal(found.wanted_TK[:, 0], kept[alone_TE.argmax(dim=1)])
    torch.testing.assert_close(found.weights_TK[:, 0], alone_TE.max(dim=1).values)
    made.save_pretrained(tmp_path / "stock")
    back = type(made).from_pretrained(tmp_path / "stock").eval()
    torch.testing.assert_close(logits(back, inputs), logits(made, inputs), rtol=0, atol=TOLERANCE)
