"""What the values of every table must be: a table is believed for what it holds, not for the types of its columns."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mcsmoe.artefacts.names import EXPECTED_ERROR, LAYER_ERROR

if TYPE_CHECKING:
    import pandas as pd

_ANY = (-math.inf, math.inf)
_COUNT, _SHARE, _AMOUNT = (0, math.inf), (0, 1), (0, math.inf)
_ROUNDING = 1e-6


@dataclass(frozen=True)
class Values:
    """What a table's values must be.

    Attributes:
        key: columns whose values together occur once.
        numbered: columns that, with the others of the key given, number things 0, 1, ... without a gap.
        ranges: smallest and largest value of a column; NaN and infinity are in no range.
        unknown: columns in which NaN (written as null) stands for what there is not.
        rows: whether there has to be a row.
        more: a further check of the whole table; it gives what is wrong, or None.
    """

    key: tuple[str, ...] = ()
    numbered: tuple[str, ...] = ()
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    unknown: frozenset[str] = frozenset()
    rows: bool = True
    more: Callable[[pd.DataFrame], str | None] | None = None


def _permutations(frame: pd.DataFrame) -> str | None:
    for row, (layer, neurons) in enumerate(zip(frame["layer"], frame["permutation"], strict=True)):
        if not len(neurons) or not np.array_equal(np.sort(neurons), np.arange(len(neurons))):
            return f"row {row}: column 'permutation' does not name each of the {len(neurons)} neurons once"
        first = frame["permutation"].iloc[int((frame["layer"] == layer).to_numpy().argmax())]
        if len(neurons) != len(first):
            return f"row {row}: column 'permutation' has {len(neurons)} neurons, others of layer {layer!r} {len(first)}"
    return None


def _sums(column: str, *within: str) -> Callable[[pd.DataFrame], str | None]:
    def check(frame: pd.DataFrame) -> str | None:
        sums = frame.groupby(list(within), sort=False)[column].sum()
        wrong = (sums - 1).abs() > _ROUNDING
        if not wrong.any():
            return None
        where = sums.index[int(wrong.to_numpy().argmax())]
        return f"column {column!r} sums to {sums[wrong].iloc[0]:.6g} in {', '.join(within)} {where!r}, not to 1"

    return check


_UNBOUNDED = ("nats", "nats_lost", "perplexity", "divergence")
"""Metrics whose values are no shares; of a domain they are called ``nats/DOMAIN`` and so on."""


def _scores(frame: pd.DataFrame) -> str | None:
    names = frame["metric"].str.partition("/")[0]
    share = ~names.isin([*_UNBOUNDED, LAYER_ERROR, EXPECTED_ERROR]).to_numpy()
    values = frame["value"].to_numpy()
    bad = (share & ((values < 0) | (values > 1))) | (~share & (names != "nats_lost").to_numpy() & (values < 0))
    if not bad.any():
        return None
    row = int(bad.argmax())
    return f"row {row}: column 'value' is {values[row]}, which {frame['metric'].iloc[row]!r} cannot be"


_EXPERT = {"expert": _COUNT}
_RUNNING_ON = ("looping", "distinct_4grams", "reference_looping", "reference_distinct_4grams")
_COST = ("generate_latency_ms", "generate_latency_spread_ms", "generate_tokens_per_second")

VALUES: dict[str, Values] = {
    "examples": Values(key=("idx",), ranges={"label": (-1, math.inf)}),
    "permutation": Values(
        key=("layer", "expert"),
        numbered=("expert",),
        ranges={**_EXPERT, "reference_expert": _COUNT, "gain": _ANY},
        more=_permutations,
    ),
    "routing": Values(
        key=("layer", "expert"),
        numbered=("expert",),
        ranges={
            **_EXPERT,
            "tokens": _COUNT,
            "dropped": _COUNT,
            "frequency": _SHARE,
            "router_probability": _SHARE,
        },
        more=_sums("frequency", "layer"),
    ),
    "similarity": Values(
        key=("layer", "base", "expert_i", "expert_j"),
        ranges={"expert_i": _COUNT, "expert_j": _COUNT, "similarity": (-_ROUNDING, 1 + _ROUNDING)},
    ),
    "groups": Values(
        key=("layer", "expert"),
        numbered=("expert",),
        ranges={**_EXPERT, "group": _COUNT, "weight": _SHARE},
        more=_sums("weight", "layer", "group"),
    ),
    "training": Values(
        key=("step",),
        unknown=frozenset({"task_loss", "distillation_loss", "balance_loss", "kept_fraction"}),
        ranges={"step": _COUNT, "kept_fraction": _SHARE, "seconds": _AMOUNT, "tokens": _COUNT},
        rows=False,
    ),
    "selection": Values(key=("step",), ranges={"step": _COUNT}, rows=False),
    "predictions": Values(key=("idx",), ranges={"score": _ANY}),
    "documents": Values(
        key=("idx",),
        ranges={
            "tokens": _COUNT,
            "nats": _AMOUNT,
            "reference_nats": _AMOUNT,
            "divergence": _AMOUNT,
            "agreement": _COUNT,
            "looping": _SHARE,
            "distinct_4grams": _SHARE,
        },
        unknown=frozenset({"reference_nats", "divergence", "agreement", "looping", "distinct_4grams"}),
    ),
    "metrics": Values(
        ranges={"value": _ANY, "n": _COUNT, "experts": _COUNT},
        unknown=frozenset({"value", "ci_low", "ci_high"}),
        more=_scores,
    ),
    "cost": Values(ranges={"parameters": _COUNT, "bytes_on_disk": _COUNT, "flops": _COUNT}, unknown=frozenset(_COST)),
    "language": Values(
        ranges={"tokens": _COUNT, "nats": _AMOUNT, **dict.fromkeys(_RUNNING_ON, _SHARE)},
        unknown=frozenset({"reference_nats", "divergence", "agreement", *_RUNNING_ON}),
    ),
    "harness": Values(ranges={"value": _ANY, "n": _COUNT, "shots": _COUNT}, unknown=frozenset({"ci_low", "ci_high"})),
    "summary": Values(
        ranges={"value": _ANY, "n": _COUNT},
        unknown=frozenset({"value", "ci_low", "ci_high", "difference", "p_value"}),
        rows=False,
        more=_scores,
    ),
}


def check_values(path: str | Path, table: pa.Table, name: str) -> None:
    """Look at every value of table ``name``.

    Raises:
        ValueError: no rows, a row that occurs twice or is missing, a null, a number out of its range or not finite; names
            the file, the row (from 0) or the column, and the value.
    """
    wanted = VALUES.get(name, Values(rows=False))
    remedy = "delete it and run again"
    if not table.num_rows:
        if wanted.rows:
            raise ValueError(f"{path}: table {name!r} has no rows; {remedy}")
        return
    for column in table.column_names:
        row = _first_null(table[column])
        if row is not None and column not in wanted.unknown:
            raise ValueError(f"{path}: row {row}: column {column!r} is null; {remedy}")
    frame = table.to_pandas()
    for column, values in frame.items():
        if values.dtype.kind in "iuf":
            low, high = wanted.ranges.get(str(column), _ANY)
            found = values.to_numpy()
            bad = ~((found >= low) & (found <= high) & np.isfinite(found))
            if column in wanted.unknown:
                bad &= ~np.isnan(found)
            if bad.any():
                row = int(bad.argmax())
                raise ValueError(
                    f"{path}: row {row}: column {column!r} is {found[row]}, not {_range(low, high)}; {remedy}"
                )
    if wanted.key:
        twice = frame.duplicated(list(wanted.key)).to_numpy()
        if twice.any():
            row = int(twice.argmax())
            what = ", ".join(f"{column} {frame[column].tolist()[row]!r}" for column in wanted.key)
            raise ValueError(f"{path}: row {row}: table {name!r} has {what} twice; {remedy}")
    for column in wanted.numbered:
        others = [one for one in wanted.key if one != column]
        for where, part in frame.groupby(others, sort=False):
            if int(part[column].max()) != len(part) - 1:
                missing = sorted(set(range(len(part))) - set(part[column]))[0]
                raise ValueError(
                    f"{path}: table {name!r} has no row of {column} {missing} in {', '.join(others)} {where}"
                )
    problem = None if wanted.more is None else wanted.more(frame)
    if problem is not None:
        raise ValueError(f"{path}: {problem}; {remedy}")


def _range(low: float, high: float) -> str:
    if (low, high) == _ANY:
        return "a finite number"
    return f"a number from {low:g}" + ("" if high == math.inf else f" to {high:g}")


def _first_null(column: pa.ChunkedArray) -> int | None:
    if column.null_count:
        return int(pc.index(column.is_null(), True).as_py())
    if pa.types.is_list(column.type) and pc.list_flatten(column).null_count:
        return next(row for row, value in enumerate(column.to_pylist()) if None in value)
    return None
