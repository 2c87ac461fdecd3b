"""What no schema can say: settings that contradict one another, or the model, refused before any work."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mcsmoe.methods import TASK_SPECIFIC, Method
from mcsmoe.workflow.given_model import largest_rank

_TRAINING = ("pretrain", "finetune", "recover", "compress")
_SPECIAL_TOKENS = 3  # padding, end and unknown
_BYTES = 258  # tokens that a vocabulary over bytes has at least: these, padding and end
SWITCH = "switch"
"""The family that is built where the configuration names no other; it alone reads and writes."""


def check(config: Mapping[str, Any], known: Mapping[str, Method]) -> None:
    """Check a configuration whose every value is right by itself.

    Args:
        config: complete, with defaults filled in.
        known: its methods by name.

    Raises:
        ValueError: the first settings that contradict one another; names them and the remedy.
    """
    for place, settings in _stages(config):
        _training(place, settings, config)
    for place, settings in _stages(config, "compress"):
        _fractions(place, settings)
    if config["model"]["checkpoint"] is None:
        _model(config)
        _excluded(config)
    largest = largest_rank(config)
    for place, settings in _stages(config, "compress"):
        if largest is not None and settings["rank"] > largest and _compresses(config, known):
            raise ValueError(
                f"{place}.rank is {settings['rank']}, but the shorter side of the experts' matrices is {largest}; give at "
                "most that"
            )


def _stages(config: Mapping[str, Any], only: str | None = None) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Each stage that trains, and each task's own settings of it, with where they stand."""
    for stage in _TRAINING if only is None else (only,):
        yield stage, config[stage]
        for task, changes in config["per_task"].items():
            if stage in changes:
                yield f"per_task.{task}.{stage}", {**config[stage], **changes[stage]}


def _training(place: str, settings: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    batch, processes = settings["batch_size"], config["processes"]
    if settings["accumulation"] > batch:
        raise ValueError(
            f"{place}.accumulation is {settings['accumulation']}, but {place}.batch_size only {batch}; a batch has no more "
            "pieces than examples"
        )
    if processes > batch:
        raise ValueError(
            f"processes is {processes}, but {place}.batch_size only {batch}; each needs an example at least"
        )
    if settings["patience"] and not settings["select_every"]:
        raise ValueError(
            f"{place}.patience is {settings['patience']}, but {place}.select_every is 0, so nothing is evaluated; set it, "
            "or patience: 0"
        )
    if settings["z_weight"] and not settings["balance_weight"]:
        raise ValueError(
            f"{place}.z_weight is {settings['z_weight']}, but {place}.balance_weight is 0, without which it has no effect; "
            "set it, or z_weight: 0"
        )
    if settings["precision"] == "fp16" and config["device"] == "cpu":
        raise ValueError(f"{place}.precision is 'fp16', which device cpu does not train in; use bf16, or no")


def _fractions(place: str, settings: Mapping[str, Any]) -> None:
    initial, final = settings["initial_fraction"], settings["final_fraction"]
    if initial + final >= 1:
        raise ValueError(
            f"{place}.initial_fraction is {initial} and {place}.final_fraction {final}; together they must leave steps to "
            "prune in (below 1)"
        )


# -- the model that is built ---------------------------------------------------------------------------------------
def sparse_numbers(layers: int, sparse: int) -> list[int]:
    """Numbers of the sparse layers among ``layers`` when ``sparse`` are asked for, as Switch Transformers spread them."""
    step = layers // sparse if sparse else 0
    return [number for number in range(layers) if step == 1 or (step and number % step == 1)]


def layer_names(architecture: Mapping[str, Any]) -> list[str]:
    """Names of the sparse layers of the model that is built, in forward order."""
    if architecture.get("family", SWITCH) != SWITCH:
        return [f"model.layers.{number}.mlp" for number in range(architecture["num_layers"])]
    encoder = sparse_numbers(architecture["num_layers"], architecture["num_sparse_encoder_layers"])
    decoder = sparse_numbers(architecture["num_decoder_layers"], architecture["num_sparse_decoder_layers"])
    return [f"encoder.block.{number}.layer.1.mlp" for number in encoder] + [
        f"decoder.block.{number}.layer.2.mlp" for number in decoder
    ]


def _model(config: Mapping[str, Any]) -> None:
    model = config["model"]
    architecture, tokenizer = model["architecture"], model["tokenizer"]
    place = "model.architecture"
    if architecture["family"] != SWITCH:
        _decoder(architecture, tokenizer)
        return
    for kind, layers in (("encoder", "num_layers"), ("decoder", "num_decoder_layers")):
        name, total = f"num_sparse_{kind}_layers", architecture[layers]
        asked = architecture[name]
        if asked > total:
            raise ValueError(f"{place}.{name} is {asked}, but {place}.{layers} only {total}; at most all can be sparse")
        if len(sparse_numbers(total, asked)) != asked:
            good = [number for number in range(total + 1) if len(sparse_numbers(total, number)) == number]
            raise ValueError(
                f"{place}.{name} is {asked}, which cannot be spread evenly over {total} layers; use one of "
                f"{', '.join(map(str, good))}"
            )
    if not layer_names(architecture):
        raise ValueError(
            f"{place}.num_sparse_encoder_layers and num_sparse_decoder_layers are both 0, so no layer is sparse and there "
            "are no experts; set one of them"
        )
    special = _SPECIAL_TOKENS + tokenizer["sentinels"]
    if tokenizer["vocab_size"] <= special:
        raise ValueError(
            f"model.tokenizer.sentinels is {tokenizer['sentinels']}, which with {_SPECIAL_TOKENS} more special tokens "
            f"leaves no room in a vocab_size of {tokenizer['vocab_size']}; lower it, or raise vocab_size"
        )


def _decoder(architecture: Mapping[str, Any], tokenizer: Mapping[str, Any]) -> None:
    place, taken = "model.architecture", architecture["experts_per_token"]
    if taken > architecture["num_experts"]:
        raise ValueError(
            f"{place}.experts_per_token is {taken}, but {place}.num_experts only {architecture['num_experts']}; lower it"
        )
    width, heads = architecture["d_model"], architecture["num_heads"]
    if width % heads or (width // heads) % 2 or architecture["d_kv"] % 2:
        raise ValueError(
            f"{place}.d_model is {width}, {place}.num_heads {heads} and {place}.d_kv {architecture['d_kv']}; the heads of a "
            "decoder-only model share the width in even parts"
        )
    if tokenizer["vocab_size"] < _BYTES:
        raise ValueError(
            f"model.tokenizer.vocab_size is {tokenizer['vocab_size']}; a decoder-only model has a token for every byte, so "
            f"give at least {_BYTES}"
        )


def _compresses(config: Mapping[str, Any], known: Mapping[str, Method]) -> bool:
    built = config["model"]["checkpoint"] is None  # its sizes are settings like the rank
    return built or any(known[name].compress for name in config["variants"])


def _excluded(config: Mapping[str, Any]) -> None:
    names, excluded = layer_names(config["model"]["architecture"]), config["merge"]["exclude_layers"]
    for name in excluded:
        if name not in names:
            raise ValueError(
                f"merge.exclude_layers names {name!r}, which is no sparse layer of the model; there are {', '.join(names)}"
            )
    if set(names) <= set(excluded):
        raise ValueError(
            "merge.exclude_layers names every sparse layer, so nothing is left to merge; leave one out of it"
        )


def check_groups(config: Mapping[str, Any], known: Mapping[str, Method], total: int | None) -> None:
    """Check that the experts to keep can be reached by every configured method, in a model with ``total`` experts a layer.

    Raises:
        ValueError: more experts than there are, or groups that cannot hold them all; names the field.
    """
    for count in config["experts"]:
        if total is not None and count > total:
            raise ValueError(
                f"experts is {config['experts']}, but the model has {total} experts a layer; keep at most {total}"
            )
    for name in config["variants"]:
        method = known[name]
        if method.budget == "predicted" and not method.in_sequence:
            raise ValueError(
                f"methods.{name}.budget is 'predicted', which takes a method that reduces layers in sequence; set a "
                "criterion or refit, or use adaptive or uniform"
            )
        if method.merge in (None, TASK_SPECIFIC):
            continue
        place = f"methods.{name}.capacity" if method.capacity else "merge.capacity"
        capacity = method.capacity or config["merge"]["capacity"]
        if capacity is None:
            continue
        if method.grouping != "dominant":
            raise ValueError(
                f"{place} is {capacity}, but {name} groups by {method.grouping!r}, which has no capacity; leave one out"
            )
        for count in config["experts"]:
            if total is not None and capacity * count < total:
                raise ValueError(
                    f"{place} is {capacity}, so {count} groups hold at most {capacity * count} of {total} experts; give at "
                    f"least {-(-total // count)}, or keep more experts"
                )
