"""The methods that a configuration compares: built-in ones and its own, by name, and what contradicts itself among them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mcsmoe.artefacts.names import TAKEN_BY_RUN, check_folder_name
from mcsmoe.methods import (
    BUILTIN,
    CRITERIA,
    GROUPINGS,
    MERGES,
    MERGES_ON_TOKENS,
    REFIT,
    SIMILARITIES,
    TASK_SPECIFIC,
    Method,
    aligned_in_sequence,
    require_known,
)


def resolve(config: Mapping[str, Any]) -> dict[str, Method]:
    """Every method of ``config``, built-in and its own, by name.

    Raises:
        ValueError: an unknown base, similarity, grouping, merge method or parent; names the field.
    """
    known = dict(BUILTIN)
    for name, changes in config["methods"].items():
        check_folder_name("methods: the name", name, TAKEN_BY_RUN)
        settings = dict(changes)
        base = settings.pop("base", None)
        if base is not None:
            require_known(f"methods.{name}.base", base, known)
        start = known[base] if base else Method(name)
        if base is None and settings.get("merge") in MERGES:
            settings = {"budget": MERGES[settings["merge"]].budget, **settings}
        made = replace(start, **{"name": name, **settings})
        known[name] = aligned_in_sequence(made) if made.in_sequence and "alignment" not in settings else made
    for name in config["variants"]:
        start = name.removesuffix(REFIT)
        if name not in known and name.endswith(REFIT) and start in known and known[start].fewer:
            about = f"{known[start].description}, refitted"
            known[name] = replace(aligned_in_sequence(known[start]), name=name, description=about, refit=True)
    for name, method in known.items():
        field = f"methods.{name}"
        _check_in_sequence(field, method)
        require_known(f"{field}.similarity", method.similarity, SIMILARITIES)
        require_known(f"{field}.grouping", method.grouping, GROUPINGS)
        if method.merge is not None:
            require_known(f"{field}.merge", method.merge, (*MERGES, *MERGES_ON_TOKENS, TASK_SPECIFIC))
        if method.parent is not None:
            require_known(f"{field}.parent", method.parent, known)
            if not known[method.parent].fewer:
                raise ValueError(f"{field}.parent is {method.parent!r}, which merges nothing; name a method that does")
            if method.merge is not None or not method.compress:
                raise ValueError(f"{field} has a parent, so it must compress (compress: true) and not merge again")
        if method.dense and (method.merge or method.parent or method.compress):
            raise ValueError(
                f"{field} is dense, so it has no experts to merge or compress; leave merge, parent, compress out"
            )
        if not method.fewer and method.recover:
            raise ValueError(f"{field}.recover is true, but it merges nothing (merge: null); set one of the two")
    return _untrained(known, config["variants"]) if config["zero_shot"] else known


def _check_in_sequence(field: str, method: Method) -> None:
    """Raise ValueError where what a method does to layers in sequence contradicts itself; names the field."""
    if method.criterion is not None:
        require_known(f"{field}.criterion", method.criterion, CRITERIA)
        if method.merge is not None or method.parent is not None:
            raise ValueError(
                f"{field}.criterion is {method.criterion!r}, which prunes, and the method merges or has a parent; leave one out"
            )
    elif method.dropped != "delete":
        raise ValueError(f"{field}.dropped is {method.dropped!r}, which takes a criterion; set one, or leave it out")
    if method.refit and not (method.criterion or method.merge):
        raise ValueError(f"{field}.refit is true, but no expert is left out or merged; set criterion or merge")
    if method.refit_target != "layer" and not method.refit:
        raise ValueError(f"{field}.refit_target is {method.refit_target!r}, and there is no refit; set refit: true")
    if method.in_sequence and method.merge == TASK_SPECIFIC:
        raise ValueError(
            f"{field} is task-specific, which is trained and not reduced in sequence; leave refit and bits out"
        )
    if method.bits is not None and (method.recover or method.compress):
        raise ValueError(
            f"{field}.bits is {method.bits}, and the method trains afterwards; leave recover and compress out"
        )


def _untrained(known: dict[str, Method], variants: list[str]) -> dict[str, Method]:
    """The methods without any stage that trains.

    Raises:
        ValueError: a variant that is nothing without training.
    """
    for name in variants:
        if name in known and (known[name].compress or known[name].dense or known[name].merge == TASK_SPECIFIC):
            raise ValueError(
                f"variants names {name!r}, which has to train, and zero_shot is true; leave it out or set zero_shot: false"
            )
    return {name: replace(method, recover=False) for name, method in known.items()}
