"""config.json of a merged checkpoint: the base model's configuration, and the tables of its layers beside it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

from mcsmoe_vllm import ARCHITECTURES, PREFIX

MODEL_TYPE = SECTION = "mcsmoe"
FORMAT_VERSION = 1
_NUMBER = re.compile(r"\blayers\.(\d+)\b")


@dataclass(frozen=True)
class Layer:
    """One merged layer.

    Attributes:
        name: module path in the checkpoint, such as ``model.layers.3.mlp``.
        groups: experts that are stored.
        table: by each of the router's outputs, the stored expert that answers.
    """

    name: str
    groups: int
    table: tuple[int, ...]


def number_of(name: str) -> int:
    """The number of the block that a module path lies in.

    Raises:
        ValueError: it lies in none.
    """
    found = _NUMBER.search(name)
    if found is None:
        raise ValueError(f"{name!r} lies in no numbered layer")
    return int(found[1])


def layers_of(section: Mapping[str, Any]) -> dict[int, Layer]:
    """Merged layers by the number of their block.

    Raises:
        ValueError: a format, or a kind of layer, that is not served; names it and the remedy.
    """
    if section.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"mcsmoe: format_version is {section.get('format_version')}, and this plugin reads 1; update it"
        )
    made: dict[int, Layer] = {}
    for name, spec in section["layers"].items():
        for key, kind in (("compression", "compressed"), ("novices", "extended by novices")):
            if spec.get(key) is not None:
                raise ValueError(f"mcsmoe: layer {name} is {kind}, which is not served; use mcsmoe export --form dense")
        table = tuple(spec["expert_to_group"])
        made[number_of(name)] = Layer(name, int(spec["num_groups"]), table)
    return made


class CompactConfig(PretrainedConfig):
    """Reads as the base model's configuration, whose architecture is the one of ``mcsmoe_vllm.models``."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **options: Any) -> Any:
        """The base model's configuration with the section as ``mcsmoe``.

        Raises:
            ValueError: of an architecture, or with layers, that are not served.
        """
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        section = config_dict[SECTION]
        layers_of(section)
        names = config_dict.get("architectures") or []
        if not names or names[0] not in ARCHITECTURES:
            raise ValueError(
                f"mcsmoe: {names} is not served in its merged form, only {', '.join(ARCHITECTURES)}; use mcsmoe export "
                "--form dense, or --form stock"
            )
        fields = {name: value for name, value in config_dict.items() if name != SECTION}
        fields |= {"model_type": section["base_model_type"], "architectures": [PREFIX + names[0]]}
        made = CONFIG_MAPPING[section["base_model_type"]].from_dict(fields, **options)
        config = made[0] if isinstance(made, tuple) else made
        config.mcsmoe = dict(section)
        return made
