"""Save models of switch-base-32's shape full, merged, compressed and both, and measure each from its reloaded files.

The sizes that follow from the parameters stand beside those of the files and of memory; the FLOPs beside the time they
took. Every form is measured in a fresh process. Weights are random: nothing here depends on their values.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mcsmoe.console import log, parser, run

# What the paper's arithmetic says of the real shape, in millions of parameters.
PAPER = {"full": 1978.5, "merged": 732.8, "compressed": 380.7, "compressed alone": 570.2}


def arguments() -> argparse.ArgumentParser:
    made = parser(
        (__doc__ or "").strip(),
        "python benchmarks/checkpoint.py --threads 2 --folder /tmp --out benchmarks/checkpoint.json",
    )
    made.set_defaults(threads=2)
    made.add_argument(
        "--width", type=int, default=768, help="d_model; 768 is the real one, with 8 GB of files in float32"
    )
    made.add_argument("--groups", type=int, default=8, help="experts left in each of the 11 merged layers")
    made.add_argument("--rank", type=int, default=32, help="rank of the compressed matrices")
    made.add_argument("--keep", type=float, default=0.1, help="share of residual rows kept")
    made.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="number format")
    made.add_argument("--batch-size", type=int, default=8, help="examples")
    made.add_argument("--input-tokens", type=int, default=256, help="tokens into the encoder")
    made.add_argument("--label-tokens", type=int, default=8, help="tokens generated")
    made.add_argument("--repeats", type=int, default=5, help="timed repeats")
    made.add_argument("--quick", action="store_true", help="a sixteenth of the width, in a minute")
    made.add_argument("--folder", type=Path, help="where the checkpoints are put for the time being")
    made.add_argument("--out", type=Path, help="also write the figures to this JSON file")
    return made


def save(options: argparse.Namespace, form: str, folder: Path) -> None:
    """A random checkpoint of one form; the same base weights in all."""
    import torch
    from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration
    from transformers.initialization import no_init_weights

    import mcsmoe
    from mcsmoe.adapters.registry import adapter_for
    from mcsmoe.modules import PackedProjection
    from mcsmoe.types import CompressionSpec, LayerSpec

    width = options.width
    config = SwitchTransformersConfig(
        d_model=width,
        d_ff=4 * width,
        d_kv=width // 12,
        num_heads=12,
        vocab_size=32128,
        num_layers=12,
        num_decoder_layers=12,
        num_sparse_encoder_layers=6,
        num_sparse_decoder_layers=6,
        num_experts=32,
        router_jitter_noise=0.0,
        decoder_start_token_id=0,
    )
    dtype = getattr(torch, options.dtype)
    with torch.device("meta"), no_init_weights():
        made = SwitchTransformersForConditionalGeneration(config)
    made.tie_weights()
    adapter = adapter_for(made)
    groups = 32 if form in ("full", "compressed alone") else options.groups
    compression = None
    if form.startswith("compressed"):
        kept = {"wi": [round(options.keep * config.d_ff)] * groups, "wo": [round(options.keep * width)] * groups}
        compression = CompressionSpec(options.rank, kept)
    for layer in adapter.layers(made)[1:] if form != "full" else []:
        adapter.install(made, layer, LayerSpec(groups, [expert % groups for expert in range(32)], compression))
    tables = {path: m.expert_to_group.clone() for path, m in made.named_modules() if hasattr(m, "expert_to_group")}
    made = made.to(dtype).to_empty(device="cpu")
    made.tie_weights()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in made.named_parameters():
        parameter.data.fill_(1.0) if parameter.ndim == 1 else parameter.data.normal_(
            0, (4.0 if ".router." in name else 1.0) * parameter.shape[-1] ** -0.5, generator=generator
        )
    for path, table in tables.items():
        made.get_submodule(path).expert_to_group = table
    for module in made.modules():
        if isinstance(module, PackedProjection):
            rows = [torch.randperm(module.shape[1], generator=generator)[:kept].sort()[0] for kept in module.kept_rows]
            module.row_index_N = torch.cat(rows).to(torch.int32)
    mcsmoe.save(made, folder)


def main(options: argparse.Namespace) -> None:
    import torch

    from mcsmoe.artefacts.atomic import write_json
    from mcsmoe.evaluate.cost import measure

    if options.quick:
        options.width = 48
    torch.set_num_threads(options.threads)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        for form in PAPER:
            folder = Path(place) / form
            log.info("saving %s", form)
            save(options, form, folder)
            log.info("measuring %s", form)
            started = time.perf_counter()
            found = measure(
                folder,
                batch_size=options.batch_size,
                input_tokens=options.input_tokens,
                label_tokens=options.label_tokens,
                repeats=options.repeats,
                threads=options.threads,
                dtype=options.dtype,
            )
            rows.append({"form": form, "seconds": time.perf_counter() - started, **found})
            for file in folder.iterdir():  # one form at a time: the real shape has 8 GB of files
                file.unlink()
    show(rows, options)
    if options.out:
        settings = {key: value for key, value in vars(options).items() if key not in ("out", "log", "folder")}
        write_json(options.out, {"settings": settings, "rows": rows})


def show(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    print(
        "\n| form | M parameters | paper | parameters x bytes, MB | on disk, MB | resident, MB | peak of a process, MB |"
    )
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        paper = f"{PAPER[row['form']]:.1f}" if options.width == 768 and options.rank == 32 else "-"
        print(
            f"| {row['form']} | {row['parameters'] / 1e6:.1f} | {paper} | {row['parameter_bytes'] / 1e6:.1f} "
            f"| {row['bytes_on_disk'] / 1e6:.1f} | {row['resident_memory_bytes'] / 1e6:.1f} "
            f"| {row['peak_memory_bytes'] / 1e6:.1f} |"
        )
    print("\n| form | GFLOP a pass | ms a pass | spread | GFLOP/s | ms to generate | spread | tokens/s |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['form']} | {row['flops'] / 1e9:.1f} | {row['latency_ms']:.0f} | {row['latency_spread_ms']:.0f} "
            f"| {row['flops_per_second'] / 1e9:.0f} | {row['generate_latency_ms']:.0f} "
            f"| {row['generate_latency_spread_ms']:.0f} | {row['generate_tokens_per_second']:.0f} |"
        )


if __name__ == "__main__":
    run(main, arguments().parse_args())
