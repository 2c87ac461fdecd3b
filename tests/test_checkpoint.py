"""Compact checkpoints: the same bits back, the size promised, and no damaged or foreign file believed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_switch import batch, logits, model
from torch import nn

import mcsmoe
from mcsmoe import modules
from mcsmoe.adapters.registry import adapter_for
from mcsmoe.artefacts.atomic import directory_bytes
from mcsmoe.artefacts.digests import SUMS
from mcsmoe.checkpoint import format as compact
from mcsmoe.checkpoint.format import is_compact, layer_specs
from mcsmoe.checkpoint.save import save_model
from mcsmoe.checkpoint.streaming import Streamed
from mcsmoe.types import CompressionSpec, ExpertWeights, LowRankFactors

TABLE = torch.tensor([0, 1, 0, 2, 1, 0])


def merge_in_place(made: nn.Module, keep_first: bool = True) -> nn.Module:
    adapter = adapter_for(made)
    for layer in adapter.layers(made)[int(keep_first) :]:
        weights = adapter.read_experts(made, layer)
        groups = [
            weights.select((group == TABLE).nonzero()[:, 0]).map(lambda _, t: t.mean(0)[None]) for group in range(3)
        ]
        merged = {name: torch.cat([g.tensors[name] for g in groups]) for name in weights.tensors} if groups else {}
        adapter.write_experts(made, layer, ExpertWeights(merged, weights.roles), TABLE)
    return made


def compress_in_place(made: nn.Module, rank: int = 3, seed: int = 0) -> nn.Module:
    adapter = adapter_for(made)
    generator = torch.Generator().manual_seed(seed)
    for layer in adapter.layers(made)[1:]:
        weights, table = adapter.read_experts(made, layer), adapter.expert_to_group(made, layer)
        factors = {}
        for name, matrix in weights.tensors.items():
            u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
            residual = matrix - (u[..., :rank] * s[:, None, :rank]) @ vh[:, :rank]
            residual[torch.rand(residual.shape[:2], generator=generator) < 0.7] = 0
            factors[name] = LowRankFactors(u[..., :rank] * s[:, None, :rank], vh[:, :rank], residual)
        adapter.write_compressed(made, layer, factors, {}, table)
    return modules.pack(made)


def merged() -> nn.Module:
    return merge_in_place(model())


def compressed() -> nn.Module:
    return compress_in_place(merged())


def compressed_only() -> nn.Module:
    return compress_in_place(model())


FORMS = {"stock": model, "merged": merged, "compressed": compressed, "compressed only": compressed_only}


@pytest.mark.parametrize("form", list(FORMS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_then_load_gives_the_same_bits(form: str, dtype: torch.dtype, tmp_path: Path) -> None:
    made, inputs = FORMS[form]().to(dtype), batch()
    before = logits(made, inputs)
    mcsmoe.save(made, tmp_path / "out", provenance={"config": "abc"})
    back = mcsmoe.load(tmp_path / "out")
    assert not back.training
    assert type(back) is type(made)
    assert torch.equal(logits(back, inputs), before)
    if form != "stock":
        dtypes = {name: parameter.dtype for name, parameter in made.named_parameters()}
        assert {name: parameter.dtype for name, parameter in back.named_parameters()} == dtypes
    assert is_compact(tmp_path / "out") == (form != "stock")
    mcsmoe.save(back, tmp_path / "again", provenance={"config": "abc"})
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "out" / "model.safetensors"
    ).read_bytes()


def test_training_goes_on_after_loading_with_every_parameter_live(tmp_path: Path) -> None:
    mcsmoe.save(compressed(), tmp_path / "out")
    back = mcsmoe.load(tmp_path / "out").train()
    back(**batch(rows=20)).loss.backward()
    silent = [name for name, parameter in back.named_parameters() if parameter.grad is None]
    assert silent == []


def test_sharded_with_an_index_and_tied_weights_once(tmp_path: Path) -> None:
    made, inputs = compressed(), batch()
    save_model(made, tmp_path / "out", shard_bytes=20_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    names = set(index["weight_map"])
    assert "shared.weight" in names
    assert not names & {"lm_head.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}
    assert names == {name for file in (tmp_path / "out").glob("*.safetensors") for name in load_file(file)}
    back = mcsmoe.load(tmp_path / "out")
    assert back.lm_head.weight is back.shared.weight
    assert torch.equal(logits(back, inputs), logits(made, inputs))


def test_untied_output_is_stored_and_kept(tmp_path: Path) -> None:
    made, inputs = merge_in_place(model(tie_word_embeddings=False)), batch()
    mcsmoe.save(made, tmp_path / "out")
    back = mcsmoe.load(tmp_path / "out")
    assert back.lm_head.weight is not back.shared.weight
    assert torch.equal(logits(back, inputs), logits(made, inputs))


def test_files_hold_no_more_than_the_parameters(tmp_path: Path) -> None:
    made = compressed()
    mcsmoe.save(made, tmp_path / "out")
    stored = sum(tensor.numel() for tensor in made.parameters()) * 4
    indices = sum(buffer.nbytes for name, buffer in made.named_buffers() if name.endswith("row_index_N"))
    overhead = (tmp_path / "out" / "model.safetensors").stat().st_size - stored - indices
    assert 0 < overhead < 30_000
    full = model()
    mcsmoe.save(full, tmp_path / "full")
    assert directory_bytes(tmp_path / "out") < 0.8 * directory_bytes(tmp_path / "full")


def test_dtype_is_chosen_at_load(tmp_path: Path) -> None:
    mcsmoe.save(compressed(), tmp_path / "out")
    back = mcsmoe.load(tmp_path / "out", dtype="bfloat16")
    assert {parameter.dtype for parameter in back.parameters()} == {torch.bfloat16}
    assert logits(back, batch()).isfinite().all()
    with pytest.raises(ValueError, match="'float31' is not a torch dtype"):
        mcsmoe.load(tmp_path / "out", dtype="float31")


def test_structure_can_be_read_without_weights(tmp_path: Path) -> None:
    mcsmoe.save(compressed(), tmp_path / "out")
    specs = layer_specs(tmp_path / "out")
    assert list(specs) == sorted(adapter_for(model()).layers(model())[1:])
    spec = specs["decoder.block.0.layer.2.mlp"]
    assert spec.expert_to_group == TABLE.tolist()
    assert isinstance(spec.compression, CompressionSpec)
    assert spec.compression.rank == 3
    assert len(spec.compression.kept_rows["wi"]) == 3


def test_a_dense_residual_must_be_packed_first(tmp_path: Path) -> None:
    made = model()
    adapter, layer = adapter_for(made), "encoder.block.1.layer.1.mlp"
    weights = adapter.read_experts(made, layer)
    zero = {n: LowRankFactors(t[..., :2] * 0, t[:, :2] * 0, t) for n, t in weights.tensors.items()}
    adapter.write_compressed(made, layer, zero, {}, torch.arange(6))
    with pytest.raises(ValueError, match=rf"{layer}.*pack"):
        mcsmoe.save(made, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# -- damage ------------------------------------------------------------------------------------------------------
@pytest.fixture
def folder(tmp_path: Path) -> Path:
    mcsmoe.save(compressed(), tmp_path / "out")
    return tmp_path / "out"


def test_a_truncated_file_is_refused_by_name(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors: truncated"):
        mcsmoe.load(folder)
    file.write_bytes(b"")
    with pytest.raises(ValueError, match=r"model\.safetensors: truncated"):
        mcsmoe.load(folder)
    file.unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors: cannot be read"):
        mcsmoe.load(folder)


def test_one_flipped_bit_is_refused_by_name(folder: Path) -> None:
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1000] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"model\.safetensors: altered"):
        mcsmoe.load(folder)


def test_weights_of_another_model_are_refused_by_name(folder: Path, tmp_path: Path) -> None:
    mcsmoe.save(merged(), tmp_path / "other")
    (folder / "model.safetensors").write_bytes((tmp_path / "other" / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"model\.safetensors: was not written for"):
        mcsmoe.load(folder)


def _edit(folder: Path, **changes: object) -> None:
    fields = json.loads((folder / "config.json").read_text())
    for path, value in changes.items():
        inside = fields
        *parents, last = path.split("__")
        for parent in parents:
            inside = inside[parent]
        inside[last] = value
    (folder / "config.json").write_text(json.dumps(fields))
    (folder / SUMS).unlink()  # as by someone who means the change


def test_an_edited_redirect_table_is_refused(folder: Path) -> None:
    fields = json.loads((folder / "config.json").read_text())
    fields["mcsmoe"]["layers"]["decoder.block.0.layer.2.mlp"]["expert_to_group"][0] = 1
    (folder / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=r"config\.json: altered"):
        mcsmoe.load(folder)
    (folder / SUMS).unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors: was not written for"):
        mcsmoe.load(folder)


def test_a_newer_format_is_refused(folder: Path) -> None:
    _edit(folder, mcsmoe__format_version=99)
    with pytest.raises(ValueError, match=r"config\.json: format version 99.*upgrade"):
        mcsmoe.load(folder)


def test_what_is_not_a_moe_checkpoint_is_refused_by_name(tmp_path: Path) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    dense = T5ForConditionalGeneration(T5Config(num_layers=1, d_model=8, d_ff=8, num_heads=2, d_kv=4, vocab_size=16))
    dense.save_pretrained(tmp_path / "t5")
    with pytest.raises(ValueError, match=r"t5: T5ForConditionalGeneration"):
        mcsmoe.load(tmp_path / "t5")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty: no config\.json"):
        mcsmoe.load(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"absent.*no such checkpoint folder"):
        mcsmoe.load(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"no tokenizer"):
        mcsmoe.load_tokenizer(tmp_path / "t5")


def test_a_truncated_or_incomplete_stock_checkpoint_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    made = model()
    mcsmoe.save(made, tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    gone = "decoder.block.1.layer.2.mlp.experts.expert_3.wi.weight"
    save_file({name: t for name, t in tensors.items() if name != gone}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.safetensors: altered"):
        mcsmoe.load(tmp_path / "out")
    (tmp_path / "out" / SUMS).unlink()
    with pytest.raises(ValueError, match=r"1 weights are missing.*expert_3"):
        mcsmoe.load(tmp_path / "out")
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"model\.safetensors: truncated"):
        mcsmoe.load(tmp_path / "out")


def test_config_json_of_a_compact_checkpoint_is_read_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    original = compact.read_config
    monkeypatch.setattr(compact, "read_config", lambda place: read.append(place) or original(place))
    found = compact.CompactConfig.read(folder)
    assert found.layers == layer_specs(folder)
    for open_it in (mcsmoe.load, Streamed):
        read.clear()
        open_it(folder)
        assert len(read) == 1


# -- Auto classes ------------------------------------------------------------------------------------------------
def test_auto_classes_load_it_after_importing_mcsmoe(folder: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    back = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype="auto")
    assert torch.equal(logits(back, batch()), logits(mcsmoe.load(folder), batch()))
    assert AutoConfig.from_pretrained(folder).d_model == 16
    with pytest.raises(ValueError, match="AutoModelForSeq2SeqLM"):
        AutoModelForCausalLM.from_pretrained(folder)


def _python(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_import_is_cheap() -> None:
    _python("import sys, mcsmoe; assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)")


def test_a_loader_that_does_not_know_it_refuses_until_mcsmoe_is_imported(folder: Path) -> None:
    _python(
        f"""
from transformers import AutoModelForSeq2SeqLM as Auto
try:
    Auto.from_pretrained({str(folder)!r})
except ValueError as error:
    assert "mcsmoe" in str(error), error
else:
    raise SystemExit("it was loaded without mcsmoe")
import mcsmoe
assert type(Auto.from_pretrained({str(folder)!r})).__name__ == "SwitchTransformersForConditionalGeneration"
"""
    )
