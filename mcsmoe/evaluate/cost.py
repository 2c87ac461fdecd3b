"""What a checkpoint costs: parameters, bytes on disk, memory, FLOPs and time, all measured on the reloaded files.

``measure`` is light: it starts one fresh process, which alone imports torch and transformers, so that the peak memory
is that of loading and running the checkpoint and of nothing the caller did before. ``measure_in_this_process`` is for a
process that is fresh itself, such as a job of the workflow.
"""

from __future__ import annotations

import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
_WARM_UP = 2
_SEED = 0
_FIRST_ID = 3  # below it tokenizers keep padding, end of sequence and unknown
_DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Settings:
    """What a measurement is taken at; the setting columns of the ``cost`` table."""

    batch_size: int
    input_tokens: int
    label_tokens: int
    threads: int
    device: str
    dtype: str


def measure(
    path: str | Path,
    batch_size: int = 8,
    input_tokens: int = 128,
    label_tokens: int = 8,
    repeats: int = 10,
    threads: int = 1,
    device: str = "cpu",
    dtype: str = "float32",
    dense: bool = False,
) -> dict[str, Any]:
    """Measure the checkpoint folder ``path`` in a fresh process.

    One forward pass over a batch of seeded random token ids, no padding: ``batch_size`` examples of ``input_tokens``
    into the encoder and ``label_tokens`` into the decoder (a decoder-only model sees both in one sequence). ``dense``: the
    model has no experts.

    Returns:
        The columns of the ``cost`` table that follow ``stage``. Bytes in bytes, ``latency_ms`` the median of
        ``repeats`` passes after warm-up, ``latency_spread_ms`` their interquartile range, ``throughput`` in examples
        per second of median latency. ``peak_memory_bytes`` is the high-water mark of resident memory up to and
        including the first pass, interpreter and libraries included; on an accelerator it is the peak of
        memory allocated there. ``resident_memory_bytes`` is what loading the model added to resident memory, to be held
        against ``parameter_bytes`` (parameters times the bytes of one) and ``bytes_on_disk``. ``flops_per_second`` is
        the rate at which ``flops`` were done. ``generate_...`` are of greedily generating ``label_tokens`` tokens for
        every example, with the cache of keys and values; NaN for a model that cannot.

    Raises:
        ValueError: a setting below 1, an unknown dtype, a folder without weight files, or what loading refused.
        RuntimeError: the measuring process died; the message ends with what it last wrote.
    """
    settings = Settings(batch_size, input_tokens, label_tokens, threads, device, dtype)
    check(path, settings, repeats)  # refuse before seconds go into a process
    asked = {"path": os.fspath(path), "settings": asdict(settings), "repeats": repeats, "dense": dense}
    request = json.dumps(asked)
    environment = dict(os.environ, OMP_NUM_THREADS=str(threads), MKL_NUM_THREADS=str(threads))
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run(
        [sys.executable, "-m", "mcsmoe.evaluate.cost", request], capture_output=True, text=True, env=environment
    )
    if done.returncode:
        raise RuntimeError(
            f"{path}: measuring ended with status {done.returncode} (a negative one is a signal, -9 mostly a lack of "
            f"memory): {done.stderr.strip()[-2000:]}"
        )
    answer = json.loads(done.stdout)
    if "error" in answer:
        raise ValueError(answer["error"])
    return answer


def check(path: str | Path, settings: Settings, repeats: int) -> None:
    """Raise ValueError on a setting that cannot be measured at, or a folder that is no checkpoint."""
    for name, value in {**asdict(settings), "repeats": repeats}.items():
        if isinstance(value, int) and value < 1:
            raise ValueError(f"cost setting {name} is {value}; it must be at least 1")
    if settings.dtype not in _DTYPES:
        raise ValueError(f"cost setting dtype is {settings.dtype!r}; use one of {', '.join(_DTYPES)}")
    weight_bytes(path)


def measure_in_this_process(
    path: str | Path, settings: Settings, repeats: int, dense: bool = False, bits: float | None = None
) -> dict[str, Any]:
    """What ``measure`` returns, taken in this process, which has done nothing else: its memory is what is measured.

    Args:
        bits: what a weight of the experts takes, where they were rounded.

    Raises:
        ValueError: as ``measure``.
    """
    check(path, settings, repeats)
    import torch

    from mcsmoe.adapters.registry import adapters
    from mcsmoe.checkpoint.load import load_model

    adapters()  # model classes are libraries: they are in memory before the model is counted

    def load() -> nn.Module:
        return load_model(path, dtype=getattr(torch, settings.dtype), device=settings.device, dense=dense)

    return measure_here(path, settings, repeats, load, bits)


def weight_bytes(path: str | Path) -> int:
    """Bytes of the weight files of a checkpoint folder that are read.

    Raises:
        ValueError: the folder is absent or holds no such file.
    """
    from mcsmoe.artefacts.tensors import TensorFolder

    return TensorFolder(path).nbytes


def measure_here(
    path: str | Path,
    settings: Settings,
    repeats: int,
    load: Callable[[], nn.Module],
    bits: float | None = None,
) -> dict[str, Any]:
    """The measurement itself: ``load`` gives the model, ready, on its device and in its dtype."""
    import torch

    torch.set_num_threads(settings.threads)
    device = torch.device(settings.device)
    empty = resident_memory(device)
    model = load()
    resident = resident_memory(device) - empty
    # Who counts operations watches gradients too, and fails at a module that gives a parameter as it is.
    model.requires_grad_(False)
    inputs = batch(model, settings)
    with torch.inference_mode():
        # Before anything else is counted: counting must not raise the high-water mark.
        model(**inputs)
        memory = peak_memory(device)
        parameters, nonzero = count_parameters(model)
        flops = count_flops(lambda: model(**inputs))
        milliseconds = _time(lambda: model(**inputs), repeats, device)
        generation = _time(_generation(model, inputs, settings), repeats, device) if _generates(model) else [math.nan]
    median, generating = statistics.median(milliseconds), statistics.median(generation)
    return {
        "parameters": parameters,
        "nonzero_parameters": nonzero,
        "parameter_bytes": sum(parameter.nbytes for parameter in model.parameters()),
        "bytes_on_disk": weight_bytes(path),
        "packed_bytes": packed_bytes(model, bits),
        "resident_memory_bytes": resident,
        "peak_memory_bytes": memory,
        "flops": flops,
        "flops_per_second": flops / median * 1000,
        "latency_ms": median,
        "latency_spread_ms": spread(milliseconds),
        "throughput": settings.batch_size / median * 1000,
        "generate_latency_ms": generating,
        "generate_latency_spread_ms": spread(generation),
        "generate_tokens_per_second": settings.batch_size * settings.label_tokens / generating * 1000,
        **asdict(settings),
        "experts_per_layer": experts_per_layer(model),
    }


def batch(model: nn.Module, settings: Settings) -> dict[str, Tensor]:
    """Seeded token ids for one forward pass of ``model``, uniform over the vocabulary without its first ids."""
    import torch

    config: Any = model.config
    text = config.get_text_config()
    generator = torch.Generator().manual_seed(_SEED)

    def ids(length: int) -> Tensor:
        size = (settings.batch_size, length)
        drawn = torch.randint(min(_FIRST_ID, text.vocab_size - 1), text.vocab_size, size, generator=generator)
        return drawn.to(settings.device)

    if not config.is_encoder_decoder:
        made = ids(settings.input_tokens + settings.label_tokens)
        return {"input_ids": made, "attention_mask": torch.ones_like(made)}
    source, target = ids(settings.input_tokens), ids(settings.label_tokens)
    return {"input_ids": source, "attention_mask": torch.ones_like(source), "decoder_input_ids": target}


def _generates(model: Any) -> bool:
    return bool(getattr(model, "can_generate", lambda: False)())


def _generation(model: Any, inputs: Mapping[str, Tensor], settings: Settings) -> Callable[[], object]:
    """Greedily generate exactly ``label_tokens`` tokens from the inputs, with the cache."""
    prompt = {name: inputs[name][:, : settings.input_tokens] for name in ("input_ids", "attention_mask")}
    length = {"min_new_tokens": settings.label_tokens, "max_new_tokens": settings.label_tokens}
    # Some configurations name no padding, and each call would then warn.
    pad = model.config.pad_token_id if getattr(model.config, "pad_token_id", None) is not None else 0
    return lambda: model.generate(**prompt, **length, do_sample=False, use_cache=True, pad_token_id=pad)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Stored parameters and how many of them are not exactly zero; a tied tensor counts once."""
    total = nonzero = 0
    for parameter in model.parameters():  # gives a tied parameter once
        total += parameter.numel()
        nonzero += int(parameter.count_nonzero())
    return total, nonzero


def count_flops(run: Callable[[], object]) -> int:
    """Floating-point operations of ``run``, two to a multiply-add, in matrix products, attention and convolutions."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

    def attention(
        query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...], *_: Any, out_shape: Any = None, **__: Any
    ) -> int:
        return sdpa_flop_count(query, key, value)

    def grouped(left: tuple[int, ...], right: tuple[int, ...], *_: Any, out_shape: Any = None, **__: Any) -> int:
        # [T, i] x [G, i, o]: each row meets the matrix of its own group only.
        return 2 * left[0] * right[-2] * right[-1]

    # torch 2.13 counts neither of these two, which are what attention and stacked experts use on a CPU.
    aten = torch.ops.aten
    extra: Mapping[Any, Callable[..., int]] = {
        aten._scaled_dot_product_flash_attention_for_cpu: attention,
        aten._grouped_mm: grouped,
    }
    with FlopCounterMode(display=False, custom_mapping=dict(extra)) as counter:
        run()
    return counter.get_total_flops()


def packed_bytes(model: nn.Module, bits: float | None) -> int:
    """Bytes of the weights at 16 bits each; of the experts' matrices at ``bits`` each, where they were rounded."""
    from mcsmoe.adapters.registry import adapter_for, has_experts

    total, _ = count_parameters(model)
    if bits is None or not has_experts(model):
        return 2 * total
    adapter: Any = adapter_for(model)
    matrices = 0
    for layer in adapter.layers(model):
        weights = adapter.read_experts(model, layer)
        matrices += sum(tensor.numel() for tensor in weights.tensors.values() if tensor.ndim == 3)
    return round(2 * (total - matrices) + matrices * bits / 8)


def experts_per_layer(model: nn.Module) -> list[int]:
    """Distinct experts stored in each sparse layer, in forward order; none of a model without experts."""
    from mcsmoe.adapters.registry import adapter_for, has_experts

    if not has_experts(model):
        return []
    adapter = adapter_for(model)
    return [adapter.expert_to_group(model, layer).unique().numel() for layer in adapter.layers(model)]


def spread(values: list[float]) -> float:
    """Interquartile range; 0 for a single value."""
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return high - low


def _time(run: Callable[[], object], repeats: int, device: Any) -> list[float]:
    """Milliseconds of each of ``repeats`` runs after the warm-up."""
    import torch

    def wait() -> None:
        # Kernels are queued: without waiting, only their launch would be timed.
        if device.type != "cpu":
            torch.accelerator.synchronize(device)

    times = []
    for _ in range(_WARM_UP + repeats):
        wait()
        start = time.perf_counter()
        run()
        wait()
        times.append((time.perf_counter() - start) * 1000)
    return times[_WARM_UP:]


def resident_memory(device: Any) -> int:
    """Bytes of this process in memory now; on an accelerator, allocated there."""
    import torch

    if device.type != "cpu":
        return torch.accelerator.memory_allocated(device)
    import psutil

    return int(psutil.Process().memory_info().rss)


def peak_memory(device: Any) -> int:
    """High-water mark of this process's resident memory, in bytes; on an accelerator, of what was allocated there."""
    import torch

    if device.type != "cpu":
        return torch.accelerator.max_memory_allocated(device)
    # Not getrusage: its ru_maxrss survives exec, and would give the size of whatever process started this one.
    status = Path("/proc/self/status")
    if status.exists():
        found = re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(), re.MULTILINE)
        if found:
            return int(found.group(1)) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _main(request: str) -> dict[str, Any]:
    asked = json.loads(request)
    try:
        return measure_in_this_process(asked["path"], Settings(**asked["settings"]), asked["repeats"], asked["dense"])
    except ValueError as error:
        return {"error": str(error)}


if __name__ == "__main__":
    with redirect_stdout(sys.stderr):  # a library's greeting must not end up in the answer
        result = _main(sys.argv[1])
    print(json.dumps(result))
