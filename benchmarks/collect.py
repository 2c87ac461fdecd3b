"""Make a Qwen3-MoE checkpoint of any size on the spot and measure the layer-major pass over it, each way in a process of its own.

Bytes are the operating system's account of what the process had read from storage (the files are dropped from the cache
before), memory its anonymous and its file-backed part at their peaks. Weights are random: nothing here depends on their
values.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mcsmoe.console import log, parser, run

WAYS = {
    "pass": "the layer-major pass alone",
    "statistics": "the same with all statistics, into a folder",
    "batch-major": "batch after batch, experts read as they are called",
    "in memory": "transformers, the model in memory",
}


def arguments() -> argparse.ArgumentParser:
    made = parser(
        (__doc__ or "").strip(), "python benchmarks/collect.py --threads 2 --folder /tmp --out benchmarks/collect.json"
    )
    made.set_defaults(threads=2)
    made.add_argument("--layers", type=int, default=7, help="blocks; 7 are 8.5 GB")
    made.add_argument("--width", type=int, default=2048, help="model width")
    made.add_argument("--experts", type=int, default=128, help="experts of a layer")
    made.add_argument("--rows", type=int, default=64, help="calibration rows")
    made.add_argument("--tokens", type=int, default=128, help="tokens of a row")
    made.add_argument("--batch-size", type=int, default=16, help="rows per forward pass")
    made.add_argument("--limit", type=float, help="address space of a process, GB: what ulimit -v sets")
    made.add_argument("--ways", nargs="+", choices=list(WAYS), default=["pass", "statistics"], help="what to measure")
    made.add_argument("--quick", action="store_true", help="an eighth of the width and of the experts, 2 blocks")
    made.add_argument("--folder", type=Path, help="where the checkpoint is put for the time being")
    made.add_argument("--keep", type=Path, help="make the checkpoint here, or use the one that is here, and leave it")
    made.add_argument("--measure", help=argparse.SUPPRESS)
    made.add_argument("--out", type=Path, help="also write the figures to this JSON file")
    return made


def make(options: argparse.Namespace, folder: Path) -> None:
    """A checkpoint of random weights in the names that the family publishes, written one layer at a time."""
    import torch
    from transformers import Qwen3MoeConfig

    from mcsmoe.artefacts.tensors import INDEX, TensorInfo
    from mcsmoe.artefacts.writing import write_tensors

    width, inner, experts = options.width, options.width * 3 // 8, options.experts
    config = Qwen3MoeConfig(
        hidden_size=width,
        num_hidden_layers=options.layers,
        num_experts=experts,
        num_experts_per_tok=8,
        moe_intermediate_size=inner,
        intermediate_size=2 * width,
        num_attention_heads=width // 128,
        num_key_value_heads=max(1, width // 512),
        head_dim=128,
        vocab_size=32000,
        norm_topk_prob=True,
        dtype="bfloat16",
    )
    config.architectures = ["Qwen3MoeForCausalLM"]
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    rows, kv = config.num_attention_heads * 128, config.num_key_value_heads * 128

    def layer(number: int) -> dict[str, tuple[int, ...]]:
        block = f"model.layers.{number}"
        made: dict[str, tuple[int, ...]] = {
            f"{block}.self_attn.q_proj.weight": (rows, width),
            f"{block}.self_attn.k_proj.weight": (kv, width),
            f"{block}.self_attn.v_proj.weight": (kv, width),
            f"{block}.self_attn.o_proj.weight": (width, rows),
            f"{block}.self_attn.q_norm.weight": (128,),
            f"{block}.self_attn.k_norm.weight": (128,),
            f"{block}.input_layernorm.weight": (width,),
            f"{block}.post_attention_layernorm.weight": (width,),
            f"{block}.mlp.gate.weight": (experts, width),
        }
        for expert in range(experts):
            made |= {f"{block}.mlp.experts.{expert}.{name}.weight": (inner, width) for name in ("gate_proj", "up_proj")}
            made[f"{block}.mlp.experts.{expert}.down_proj.weight"] = (width, inner)
        return made

    ends = {
        "model.embed_tokens.weight": (32000, width),
        "model.norm.weight": (width,),
        "lm_head.weight": (32000, width),
    }
    parts = [ends, *(layer(number) for number in range(options.layers))]
    where: dict[str, str] = {}
    generator = torch.Generator().manual_seed(0)
    for number, shapes in enumerate(parts):
        infos = {name: TensorInfo(torch.bfloat16, shape) for name, shape in shapes.items()}

        part = folder / "part"
        part.mkdir()
        write_tensors(part, infos, _drawn(shapes, generator), shard_bytes=2**62)
        name = f"model-{number + 1:05d}-of-{len(parts):05d}.safetensors"
        (part / "model.safetensors").replace(folder / name)
        part.rmdir()
        where |= dict.fromkeys(shapes, name)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))


def _drawn(shapes: dict[str, tuple[int, ...]], generator: Any) -> Iterator[tuple[str, Any]]:
    """Random tensors; a few of each shape take turns, since drawing them all would take longer than what is measured."""
    import torch

    drawn: dict[tuple[tuple[int, ...], int], Any] = {}
    for number, (name, shape) in enumerate(shapes.items()):
        key = (shape, number % 13)
        if "norm" in name:
            drawn[key] = torch.ones(shape, dtype=torch.bfloat16)
        elif key not in drawn:
            drawn[key] = (torch.randn(shape, generator=generator) * 0.02).bfloat16()
        yield name, drawn[key]


class Peaks:
    """Highest anonymous and file-backed memory of this process while the context lasts."""

    def __enter__(self) -> Peaks:
        self.anonymous = self.file = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._over.wait(0.02):
            lines = Path("/proc/self/status").read_text().splitlines()
            found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith("Rss")}
            self.anonymous = max(self.anonymous, found["RssAnon"])
            self.file = max(self.file, found["RssFile"])

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def account() -> dict[str, int]:
    """What this process has read so far."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return {name: int(value) for name, value in (line.split(": ") for line in lines)}


def measure(options: argparse.Namespace, folder: Path, way: str) -> dict[str, Any]:
    """One way, in this process."""
    import torch

    from mcsmoe.calibration.collect import Domain, collect
    from mcsmoe.calibration.layer_major import DomainBatch, LayerMajor, Options
    from mcsmoe.calibration.states import States
    from mcsmoe.checkpoint.streaming import Streamed

    generator = torch.Generator().manual_seed(1)
    batches = []
    for start in range(0, options.rows, options.batch_size):
        count = min(options.batch_size, options.rows - start)
        ids = torch.randint(0, 32000, (count, options.tokens), generator=generator)
        batches.append({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as handle:
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    settings = Options(cache_memory=10**9)
    with tempfile.TemporaryDirectory(dir=folder.parent) as work, Peaks() as peaks, torch.no_grad():
        idle = account()
        started = time.perf_counter()
        if way == "statistics":
            collect(Streamed(folder), [Domain("all", batches)], Path(work) / "statistics", settings)
        elif way == "pass":
            source = Streamed(folder)
            states = States(Path(work) / "states", settings.cache_memory)
            given = [DomainBatch("all", batch) for batch in batches]
            major = LayerMajor(source, given, states, settings, done=source.layers)
            with major.open():
                for _ in major.blocks(to_the_end=True):
                    pass
            states.close()
        elif way == "batch-major":
            with Streamed(folder).runnable() as model:
                for batch in batches:
                    model.model(**batch, use_cache=False)
        else:
            from transformers import AutoModelForCausalLM

            model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
            started = time.perf_counter()
            for batch in batches:
                model.model(**batch, use_cache=False)
        seconds = time.perf_counter() - started
        done = account()
    return {
        "way": way,
        "seconds": seconds,
        "rows_per_second": options.rows / seconds,
        "storage_bytes": done["read_bytes"] - idle["read_bytes"],
        "call_bytes": done["rchar"] - idle["rchar"],
        "anonymous_bytes": peaks.anonymous,
        "file_bytes": peaks.file,
    }


def main(options: argparse.Namespace) -> None:
    import torch

    from mcsmoe.artefacts.atomic import write_json

    if options.quick:
        options.width, options.experts, options.layers = options.width // 8, options.experts // 8, 2
    torch.set_num_threads(options.threads)
    if options.measure:
        print(json.dumps(measure(options, options.keep, options.measure)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        folder = options.keep or Path(place) / "full"
        if not (folder / "config.json").is_file():
            log.info("making the checkpoint")
            make(options, folder)
        stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        rows = [child(options, folder, way) for way in options.ways]
    states = options.rows * options.tokens * options.width * 2
    layer = options.experts * 3 * options.width * (options.width * 3 // 8) * 2
    sizes = {"checkpoint_bytes": stored, "states_bytes": states, "layer_bytes": layer}
    show(rows, sizes)
    if options.out:
        hidden = ("out", "log", "folder", "keep", "measure")
        settings = {key: value for key, value in vars(options).items() if key not in hidden}
        write_json(options.out, {"settings": settings, "sizes": sizes, "rows": rows})


def child(options: argparse.Namespace, folder: Path, way: str) -> dict[str, Any]:
    """One way, in a process of its own, under the limit."""
    log.info("measuring: %s", WAYS[way])
    words = ["--measure", way, "--keep", str(folder), "--threads", str(options.threads), "--width", str(options.width)]
    for name in ("layers", "experts", "rows", "tokens", "batch_size"):
        words += [f"--{name.replace('_', '-')}", str(getattr(options, name))]

    def limit() -> None:
        if options.limit:
            size = int(options.limit * 1e9)
            resource.setrlimit(resource.RLIMIT_AS, (size, size))

    done = subprocess.run(
        [sys.executable, __file__, *words], preexec_fn=limit, stdout=subprocess.PIPE, text=True, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def show(rows: list[dict[str, Any]], sizes: dict[str, int]) -> None:
    allowed = 1.05 * sizes["checkpoint_bytes"] + 2 * sizes["states_bytes"]
    print(
        f"\ncheckpoint {sizes['checkpoint_bytes'] / 1e9:.2f} GB, experts of a layer {sizes['layer_bytes'] / 1e9:.2f} GB, "
    )
    print(f"hidden states {sizes['states_bytes'] / 1e9:.3f} GB; bytes that may be read {allowed / 1e9:.2f} GB\n")
    print("| way | seconds | rows/s | read from storage, GB | read by calls, GB | anonymous, GB | file-backed, GB |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {WAYS[row['way']]} | {row['seconds']:.1f} | {row['rows_per_second']:.2f} | {row['storage_bytes'] / 1e9:.2f} "
            f"| {row['call_bytes'] / 1e9:.2f} | {row['anonymous_bytes'] / 1e9:.2f} | {row['file_bytes'] / 1e9:.2f} |"
        )


if __name__ == "__main__":
    run(main, arguments().parse_args())
