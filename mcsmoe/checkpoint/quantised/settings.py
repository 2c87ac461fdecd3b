"""What a configuration says of quantisation, and what that of a result must say: a format for each ``quant_method``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mcsmoe.checkpoint.quantised import awq, bitsandbytes, compressed, fp8, gptq, mxfp4
from mcsmoe.checkpoint.quantised.base import Format

OWN_METHOD = "mcsmoe"
"""Name of the section of compact checkpoints, and ``quant_method`` of ours: never a quantiser's."""
FORMATS: Mapping[str, Format] = {
    "fp8": fp8,
    "fbgemm_fp8": fp8,
    "mxfp4": mxfp4,
    "compressed-tensors": compressed,
    "gptq": gptq,
    "awq": awq,
    "bitsandbytes": bitsandbytes,
}
"""By ``quant_method``, how its tensors are read."""
FIELDS = (
    "quantization_config",
    "quantization",
    "compression_config",
)  # of transformers, mlx, older compressed-tensors


@dataclass(frozen=True)
class Settings:
    """One entry of a configuration about quantisation.

    Attributes:
        path: keys to it, from the outermost inwards.
        method: its ``quant_method``, or what else names it.
        fields: the entry.
    """

    path: tuple[str, ...]
    method: str
    fields: Mapping[str, Any]

    @property
    def format(self) -> Format | None:
        """How its tensors are read; None where that is not known."""
        return FORMATS.get(self.method)

    def replaced(self, config: Mapping[str, Any], fields: Mapping[str, Any] | None) -> dict[str, Any]:
        """``config`` with ``fields`` in the place of this entry; without it for None."""
        return _replaced(config, self.path, fields)


def _replaced(config: Mapping[str, Any], path: Sequence[str], fields: Mapping[str, Any] | None) -> dict[str, Any]:
    made = dict(config)
    if len(path) == 1:
        if fields is None:
            made.pop(path[0], None)
        else:
            made[path[0]] = dict(fields)
    elif isinstance(made.get(path[0]), Mapping):
        made[path[0]] = _replaced(made[path[0]], path[1:], fields)
    return made


def settings_of(config: Mapping[str, Any]) -> list[Settings]:
    """Every entry of a configuration about quantisation, at any depth; none of compact checkpoints' own."""
    found = []
    for path, value in entries(config):
        if path[-1] in FIELDS and isinstance(value, Mapping) and value.get("quant_method") != OWN_METHOD:
            method = value.get("quant_method") or value.get("quant_algo") or value.get("mode") or path[-1]
            if method == path[-1] and ("load_in_4bit" in value or "load_in_8bit" in value):
                method = "bitsandbytes"  # older versions name no method
            found.append(Settings(path, str(method), value))
    return found


def entries(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every entry of a nested configuration, the own section of compact checkpoints left out."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            if name == OWN_METHOD and not path:
                continue
            yield (*path, str(name)), inner
            yield from entries(inner, (*path, str(name)))


def without_quantisation(config: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` of a checkpoint whose weights are all plain numbers."""
    made = dict(config)
    for one in settings_of(config):
        made = one.replaced(made, None)
    return made


_EXPERT = re.compile(r"^(.*\.experts)\.\d+\.")


def plain_modules(names: Iterable[str]) -> list[str]:
    """The modules of published tensors, those of all experts of a layer as the one that holds them."""
    found: dict[str, None] = {}
    for name in names:
        expert = _EXPERT.match(name)
        found[expert[1] if expert else name.rpartition(".")[0]] = None
    return list(found)


def renumbered(fields: Mapping[str, Any], kept: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Settings in which the experts of a layer that are named by number have their new numbers.

    Entries of experts that are gone are left out. Expressions and prefixes that name no single expert stay.

    Args:
        kept: by the module that holds a layer's experts, the old numbers of those that are left, in their new order.
    """

    def text(value: str) -> str | None:
        for module, old in kept.items():
            found = re.match(rf"^({re.escape(module)}\.)(\d+)(?=\.|$)", value)
            if found:
                number = int(found[2])
                return f"{found[1]}{list(old).index(number)}{value[found.end() :]}" if number in old else None
        return value

    def change(value: Any) -> Any:
        if isinstance(value, str):
            return text(value)
        if isinstance(value, list):
            made = [change(one) for one in value]
            return [one for one, old in zip(made, value, strict=True) if one is not None or old is None]
        if isinstance(value, Mapping):
            return {
                name: change(inner) if isinstance(inner, (Mapping, list)) else inner
                for old, inner in value.items()
                if (name := text(old)) is not None
            }
        return value

    made: dict[str, Any] = change(fields)
    return made
