"""Schemas of every parquet artefact, checked when written and when read (design: artefacts are the interface)."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from mcsmoe.artefacts.atomic import atomic_file
from mcsmoe.artefacts.digests import SEAL, UNSEALED, check_seal, seal
from mcsmoe.artefacts.values import check_values

if TYPE_CHECKING:
    import pandas as pd


def _schema(**columns: tuple[pa.DataType, str]) -> pa.Schema:
    return pa.schema([pa.field(name, kind, metadata={"description": text}) for name, (kind, text) in columns.items()])


_STRING, _INT, _LONG, _FLOAT, _BOOL = pa.string(), pa.int32(), pa.int64(), pa.float64(), pa.bool_()
_LAYER = (_STRING, "module path of the sparse layer")
_EXPERT = (_INT, "expert index in the layer's router")

SCHEMAS: dict[str, pa.Schema] = {
    "examples": _schema(
        idx=(_STRING, "identifier of the example, unique in its split"),
        input=(_STRING, "prompt given to the model"),
        target=(_STRING, "text the model is trained to answer"),
        choices=(pa.list_(_STRING), "answers to rank; empty where the model generates"),
        label=(_INT, "index of the right choice; -1 where the model generates"),
        references=(pa.list_(_STRING), "all accepted answers"),
        group=(_STRING, "what a grouped metric averages over (MultiRC: the question); else empty"),
    ),
    "permutation": _schema(
        layer=_LAYER,
        expert=_EXPERT,
        permutation=(pa.list_(_INT), "new neuron i is old neuron permutation[i]"),
        reference_expert=(_INT, "expert the neurons were aligned to"),
        gain=(_FLOAT, "matching objective gained over the identity, per unit of the reference's squared norm"),
    ),
    "routing": _schema(
        layer=_LAYER,
        expert=_EXPERT,
        tokens=(_LONG, "calibration tokens the expert computed"),
        frequency=(_FLOAT, "tokens over all tokens of the layer; sums to 1 in a layer"),
        router_probability=(_FLOAT, "router probability, mean over tokens"),
        dropped=(_LONG, "tokens that wanted the expert and were over its capacity"),
    ),
    "similarity": _schema(
        layer=_LAYER,
        base=(_STRING, "similarity base"),
        expert_i=_EXPERT,
        expert_j=_EXPERT,
        similarity=(_FLOAT, "in [0, 1], symmetric"),
    ),
    "groups": _schema(
        layer=_LAYER,
        expert=_EXPERT,
        group=(_INT, "group the expert is merged into"),
        dominant=(_BOOL, "whether the expert leads its group"),
        weight=(_FLOAT, "the expert's share in its group; sums to 1 in a group"),
    ),
    "training": _schema(
        step=(_LONG, "optimiser step, from 1"),
        epoch=(_FLOAT, "passes over the training rows"),
        loss=(_FLOAT, "what was minimised"),
        task_loss=(_FLOAT, "cross-entropy per label token, nats"),
        distillation_loss=(_FLOAT, "KL to the teacher as defined in the methods page; NaN without a teacher"),
        balance_loss=(_FLOAT, "load-balancing loss; NaN where it is off"),
        learning_rate=(_FLOAT, "after schedule"),
        kept_fraction=(_FLOAT, "share of residual rows kept; NaN where nothing is pruned"),
        seconds=(_FLOAT, "wall time of the step"),
        tokens=(_LONG, "real input and label tokens of the step"),
    ),
    "selection": _schema(
        step=(_LONG, "optimiser step of the evaluation"),
        metric=(_STRING, "selection metric"),
        value=(_FLOAT, "its value on the selection slice of the training set"),
        best=(_BOOL, "whether this state was the best so far"),
    ),
    "predictions": _schema(
        idx=(_STRING, "identifier of the example"),
        reference=(_STRING, "right answer; several joined by ' | '"),
        prediction=(_STRING, "the model's answer"),
        correct=(_BOOL, "whether it is right (exact match where answers are generated)"),
        score=(_FLOAT, "the example's contribution to the main metric"),
        group=(_STRING, "what a grouped metric averages over; else empty"),
    ),
    "documents": _schema(
        idx=(_STRING, "identifier of the document"),
        group=(_STRING, "its domain"),
        tokens=(_LONG, "tokens that were predicted"),
        nats=(_FLOAT, "sum over them of the negative log-probability"),
        reference_nats=(_FLOAT, "the same of the full model"),
        divergence=(_FLOAT, "sum of KL(full model, model) over the predictions, nats"),
        agreement=(_FLOAT, "predictions whose likeliest token is the full model's"),
        looping=(_FLOAT, "1 if the greedy continuation of its first half ends in a loop, else 0; NaN if not continued"),
        distinct_4grams=(_FLOAT, "distinct 4-grams of the continuation over all of them; NaN likewise"),
    ),
    "metrics": _schema(
        task=(_STRING, "task name"),
        variant=(_STRING, "method"),
        experts=(_INT, "experts kept per merged layer, on average"),
        seed=(_INT, "seed of the run"),
        stage=(
            _STRING,
            "checkpoint that was evaluated: full, finetuned (dense), merged, pruned, recovered, compressed",
        ),
        split=(_STRING, "split that was evaluated"),
        protocol=(_STRING, "rank, rank_normalised, generate, paper_compat or language"),
        metric=(
            _STRING,
            "metric name; of a domain of texts with /DOMAIN, of the one that lost most with /worst; layer_error/LAYER, expected_error/LAYER",
        ),
        value=(_FLOAT, "in [0, 1], or nats a token and what follows from them"),
        ci_low=(_FLOAT, "lower end of the 95 % bootstrap interval"),
        ci_high=(_FLOAT, "upper end"),
        n=(_LONG, "units averaged over"),
    ),
    "cost": _schema(
        task=(_STRING, "task name"),
        variant=(_STRING, "method"),
        experts=(_INT, "experts kept per merged layer, on average"),
        seed=(_INT, "seed of the run"),
        stage=(_STRING, "checkpoint that was measured"),
        parameters=(_LONG, "stored parameters, tied ones once"),
        nonzero_parameters=(_LONG, "of these, not exactly zero"),
        parameter_bytes=(_LONG, "parameters times the bytes of one: what the files should have"),
        bytes_on_disk=(_LONG, "weight files of the checkpoint"),
        packed_bytes=(_LONG, "weights at 16 bits each, rounded ones at their bits and their share of scale and zero"),
        resident_memory_bytes=(_LONG, "what loading the checkpoint adds to the memory of a process"),
        peak_memory_bytes=(_LONG, "peak resident memory of a process that loads the checkpoint and runs the batch"),
        flops=(_LONG, "of one forward pass at the settings"),
        flops_per_second=(_FLOAT, "rate at which they were done"),
        latency_ms=(_FLOAT, "of one forward pass, median of the repeats"),
        latency_spread_ms=(_FLOAT, "interquartile range of the repeats"),
        throughput=(_FLOAT, "examples per second"),
        generate_latency_ms=(_FLOAT, "generating label_tokens tokens for every example, median; NaN if it cannot"),
        generate_latency_spread_ms=(_FLOAT, "interquartile range of the repeats"),
        generate_tokens_per_second=(_FLOAT, "tokens generated, over all examples"),
        batch_size=(_INT, "setting: examples"),
        input_tokens=(_INT, "setting: tokens per example into the encoder"),
        label_tokens=(_INT, "setting: tokens per example into the decoder"),
        threads=(_INT, "setting: CPU threads"),
        device=(_STRING, "setting: device"),
        dtype=(_STRING, "setting: number format"),
        experts_per_layer=(pa.list_(_INT), "distinct experts stored in each sparse layer"),
    ),
    "language": _schema(
        row=(_STRING, "file and row of the document"),
        domain=(_STRING, "its domain"),
        tokens=(_LONG, "tokens that were predicted"),
        nats=(_FLOAT, "sum over them of the negative log-probability"),
        reference_nats=(_FLOAT, "the same of the reference; NaN without one"),
        divergence=(_FLOAT, "sum of KL(reference, model) over the predictions, nats; NaN without a reference"),
        agreement=(_FLOAT, "predictions whose likeliest token is the reference's; NaN without one"),
        looping=(
            _FLOAT,
            "whether the greedy continuation of its first half ends in a loop (1, 0); NaN if not continued",
        ),
        distinct_4grams=(_FLOAT, "share of the 4-grams of the continuation that differ from all others; NaN likewise"),
        reference_looping=(_FLOAT, "the same of the reference; NaN without one"),
        reference_distinct_4grams=(_FLOAT, "the same of the reference; NaN without one"),
    ),
    "harness": _schema(
        task=(_STRING, "task of lm-eval"),
        metric=(_STRING, "its metric"),
        filter=(_STRING, "how answers were read"),
        value=(_FLOAT, "the score"),
        ci_low=(_FLOAT, "lower end of the 95 % interval, by its standard error; NaN without one"),
        ci_high=(_FLOAT, "upper end"),
        n=(_LONG, "examples"),
        shots=(_INT, "examples shown before each question"),
    ),
    "summary": _schema(
        task=(_STRING, "task name"),
        variant=(_STRING, "method"),
        experts=(_INT, "experts kept per merged layer, on average"),
        seed=(_INT, "seed of the run"),
        stage=(_STRING, "final stage of the variant"),
        protocol=(_STRING, "evaluation protocol"),
        metric=(_STRING, "main metric of the task"),
        value=(_FLOAT, "in [0, 1], or nats a token"),
        ci_low=(_FLOAT, "lower end of the 95 % bootstrap interval"),
        ci_high=(_FLOAT, "upper end"),
        n=(_LONG, "units averaged over"),
        difference=(_FLOAT, "value minus the full model's, same examples"),
        p_value=(_FLOAT, "paired test against the full model; NaN for the full model"),
        test=(_STRING, "the paired test"),
        verdict=(_STRING, "in words: reference, within noise, better, worse"),
        parameters=(_LONG, "stored parameters"),
        bytes_on_disk=(_LONG, "weight files of the checkpoint"),
        packed_bytes=(_LONG, "weights at 16 bits each, rounded ones at their bits and their share of scale and zero"),
        flops=(_LONG, "of one forward pass"),
        latency_ms=(_FLOAT, "median"),
        peak_memory_bytes=(_LONG, "peak resident memory"),
    ),
}

MEASURED = (
    *("seconds", "latency_ms", "latency_spread_ms", "throughput", "peak_memory_bytes", "resident_memory_bytes"),
    *("flops_per_second", "generate_latency_ms", "generate_latency_spread_ms", "generate_tokens_per_second"),
)
"""Columns that a clock or a scale fills: everything else is the same when a run is repeated."""


def empty(name: str) -> pd.DataFrame:
    """An empty table with the columns of schema ``name``."""
    return SCHEMAS[name].empty_table().to_pandas()


def frame_of(rows: Sequence[Mapping[str, Any]], name: str) -> pd.DataFrame:
    """Rows as a frame with the columns of schema ``name``."""
    import pandas as pd

    return pd.DataFrame(list(rows), columns=SCHEMAS[name].names)


def write_table(path: str | Path, frame: pd.DataFrame, name: str) -> None:
    """Write ``frame`` atomically as parquet with schema ``name``.

    Raises:
        ValueError: columns missing, unknown, or of a type that does not convert; names the column.
    """
    schema = SCHEMAS[name]
    _check_columns(list(frame.columns), schema, name, path)
    try:
        table = pa.Table.from_pandas(frame[schema.names], schema=schema, preserve_index=False)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise ValueError(f"{path}: a column of table {name!r} has the wrong type: {error}") from error
    write_parquet(path, table)


def write_rows(path: str | Path, rows: Sequence[Mapping[str, Any]], name: str) -> None:
    """``write_table`` of numbers, texts and lists of them, row by row, in a process that is to stay without pandas.

    Raises:
        ValueError: as ``write_table``.
    """
    from pyarrow import json as reader

    schema = SCHEMAS[name]
    for row in rows:
        _check_columns(list(row), schema, name, path)
    # By way of JSON, for pyarrow imports pandas before it looks at any object of Python.
    lines = "".join(json.dumps({key: _or_null(value) for key, value in row.items()}) + "\n" for row in rows)
    as_told = reader.ParseOptions(explicit_schema=schema, unexpected_field_behavior="error")
    try:
        table = reader.read_json(io.BytesIO(lines.encode()), parse_options=as_told)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path}: a column of table {name!r} has the wrong type: {error}") from error
    write_parquet(path, table.select(schema.names))


def _or_null(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value


def write_parquet(path: str | Path, table: pa.Table) -> None:
    """Write ``table`` atomically, with checksums of its pages and, in its metadata, the SHA-256 of the file."""
    # No pandas metadata: the same rows give the same bytes whatever wrote them.
    table = table.replace_schema_metadata(None)
    with atomic_file(path) as partial:
        with pq.ParquetWriter(partial, table.schema, compression="zstd", write_page_checksum=True) as writer:
            writer.write_table(table)
            writer.add_key_value_metadata({SEAL: UNSEALED})
        seal(partial)


def read_table(path: str | Path, name: str) -> pd.DataFrame:
    """Read a parquet file, and check it against schema ``name`` and its values against what they must be.

    Raises:
        ValueError: a file that is missing, unreadable or altered since it was written, columns or types that are not the
            schema's, or values as in ``check_values``; names file and column or row.
    """
    schema = SCHEMAS[name]
    try:
        check_seal(path)
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: not a readable parquet file ({reason}); delete it and run again") from error
    _check_columns(table.column_names, schema, name, path)
    for field in schema:
        found = table.schema.field(field.name).type
        if found != field.type:
            raise ValueError(f"{path}: column {field.name!r} is {found}, table {name!r} has {field.type}")
    check_values(path, table, name)
    return table.to_pandas()


def _check_columns(columns: list[str], schema: pa.Schema, name: str, path: str | Path) -> None:
    twice = [column for column in schema.names if columns.count(column) > 1]
    if twice:
        raise ValueError(f"{path}: table {name!r} has two columns {twice[0]!r}")
    missing = sorted(set(schema.names) - set(columns))
    unknown = sorted(set(columns) - set(schema.names))
    if missing or unknown:
        raise ValueError(f"{path}: table {name!r} lacks columns {missing} and has unknown columns {unknown}")
