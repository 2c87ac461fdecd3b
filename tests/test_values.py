"""Tables are believed for what they hold: complete, once each, in range, finite, and of the same model."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from mcsmoe.artefacts.tables import SCHEMAS, frame_of, read_table, write_rows, write_table
from mcsmoe.artefacts.values import VALUES
from mcsmoe.calibration import evidence
from mcsmoe.calibration.evidence import Evidence
from mcsmoe.statistics.routing import RoutingStatistics
from mcsmoe.types import ExpertWeights, RoutedBatch

ROOT = Path(__file__).resolve().parents[1]
LAYERS, EXPERTS, WIDTH = ("encoder.1", "decoder.1"), 4, 5


def permutation() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "layer": layer,
            "expert": expert,
            "permutation": torch.randperm(WIDTH, generator=generator).tolist(),
            "reference_expert": 0,
            "gain": 0.1,
        }
        for layer in LAYERS
        for expert in range(EXPERTS)
    ]


def groups() -> list[dict[str, Any]]:
    return [
        {"layer": layer, "expert": e, "group": e // 2, "dominant": e % 2 == 0, "weight": 0.25 + 0.5 * (e % 2)}
        for layer in LAYERS
        for e in range(EXPERTS)
    ]


def routing() -> list[dict[str, Any]]:
    share = {"frequency": 1 / EXPERTS, "router_probability": 1 / EXPERTS, "dropped": 0}
    return [{"layer": layer, "expert": e, "tokens": 3, **share} for layer in LAYERS for e in range(EXPERTS)]


ROWS = {"permutation": permutation, "groups": groups, "routing": routing}


def each(column: str, change: Callable[[Any], Any]) -> Callable[[list[dict[str, Any]]], list[dict[str, Any]]]:
    return lambda rows: [row | {column: change(row[column])} for row in rows]


def last(column: str, value: Any) -> Callable[[list[dict[str, Any]]], list[dict[str, Any]]]:
    return lambda rows: [*rows[:-1], rows[-1] | {column: value}]


BROKEN: list[tuple[str, str, Callable[[list[dict[str, Any]]], list[dict[str, Any]]], str]] = [
    *((table, "no rows", lambda rows: [], "has no rows") for table in ROWS),
    *((table, "doubled", lambda rows: [*rows, *rows], "twice") for table in ROWS),
    *(
        (table, "one row twice", lambda rows: [*rows, rows[0]], "row 8: .*'encoder.1', expert 0 twice")
        for table in ROWS
    ),
    *((table, "a row missing", lambda rows: rows[1:], "no row of expert 0 in layer") for table in ROWS),
    *((table, "negative expert", last("expert", -1), "row 7: column 'expert' is -1") for table in ROWS),
    *((table, "a null", last("expert", None), "row 7: column 'expert' is null") for table in ROWS),
    *((table, "no layer", last("layer", None), "row 7: column 'layer' is null") for table in ROWS),
    ("permutation", "constant", each("permutation", lambda p: [0] * len(p)), "row 0: column 'permutation'"),
    ("permutation", "out of range", last("permutation", [0, 1, 2, 3, 10**6]), "row 7: column 'permutation'"),
    ("permutation", "negative", last("permutation", [0, 1, 2, 3, -1]), "row 7: column 'permutation'"),
    ("permutation", "unequal", last("permutation", [0, 1, 2, 3]), "row 7: column 'permutation' has 4 neurons"),
    ("permutation", "empty", each("permutation", lambda p: []), "row 0: column 'permutation'"),
    ("permutation", "null", last("permutation", None), "row 7: column 'permutation' is null"),
    ("permutation", "null within", last("permutation", [0, 1, 2, 3, None]), "row 7: column 'permutation' is null"),
    ("permutation", "gain", last("gain", math.inf), "row 7: column 'gain' is inf"),
    *(
        ("groups", str(v), each("weight", lambda _, v=v: v), "column 'weight'")
        for v in (math.nan, math.inf, -1.0, 2.0, 0.3)
    ),
    ("groups", "one NaN", last("weight", math.nan), "row 7: column 'weight' is nan"),
    ("groups", "sums", last("weight", 0.7), "column 'weight' sums to 0.95 in layer, group"),
    ("groups", "group", last("group", -1), "row 7: column 'group' is -1"),
    ("routing", "frequency", last("frequency", 0.3), "column 'frequency' sums to 1.05 in layer"),
    ("routing", "probability", last("router_probability", math.nan), "row 7: column 'router_probability' is nan"),
    ("routing", "tokens", last("tokens", -3), "row 7: column 'tokens' is -3"),
]


def write(path: Path, rows: list[dict[str, Any]], name: str) -> Path:
    """As another program writes it: without a digest that would tell of a change."""
    columns = {column: [row[column] for row in rows] for column in SCHEMAS[name].names}
    pq.write_table(pa.table(columns, schema=SCHEMAS[name].remove_metadata()), path)
    return path


@pytest.mark.parametrize("name", ROWS)
def test_what_is_right_is_read_in_any_order(name: str, tmp_path: Path) -> None:
    rows = ROWS[name]()
    write_table(tmp_path / "ours.parquet", frame_of(rows, name), name)
    one = read_table(tmp_path / "ours.parquet", name)
    two = read_table(write(tmp_path / "theirs.parquet", rows[::-1], name), name)
    pd.testing.assert_frame_equal(one, two.iloc[::-1].reset_index(drop=True))


@pytest.mark.parametrize(("name", "what", "change", "message"), BROKEN, ids=[f"{one[0]}-{one[1]}" for one in BROKEN])
def test_a_broken_table_is_refused_by_row_or_column(
    name: str, what: str, change: Callable[[Any], Any], message: str, tmp_path: Path
) -> None:
    file = write(tmp_path / "t.parquet", change(ROWS[name]()), name)
    with pytest.raises(ValueError, match=rf"t\.parquet: .*{message}") as refused:
        read_table(file, name)
    assert "\n" not in str(refused.value)


COST = {
    "task": "SST-2",
    "variant": "full",
    "experts": 8,
    "seed": 0,
    "stage": "full",
    "device": "cpu",
    "dtype": "float32",
    **{
        name: 2**40 + number
        for number, name in enumerate(("parameters", "nonzero_parameters", "flops", "packed_bytes"))
    },
    **dict.fromkeys(("parameter_bytes", "bytes_on_disk", "resident_memory_bytes", "peak_memory_bytes"), 7),
    **dict.fromkeys(("flops_per_second", "latency_ms", "latency_spread_ms", "throughput"), 1 / 3),
    **dict.fromkeys(("generate_latency_ms", "generate_latency_spread_ms", "generate_tokens_per_second"), math.nan),
    **dict.fromkeys(("batch_size", "input_tokens", "label_tokens", "threads"), 3),
    "experts_per_layer": [8, 4],
}


def test_rows_are_written_as_a_frame_of_them_is(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.parquet", [COST, COST | {"seed": 1}], "cost")
    write_table(tmp_path / "frame.parquet", pd.DataFrame([COST, COST | {"seed": 1}]), "cost")
    rows, frame = pq.read_table(tmp_path / "rows.parquet"), pq.read_table(tmp_path / "frame.parquet")
    assert rows.equals(frame)
    assert rows.schema.equals(frame.schema)
    assert read_table(tmp_path / "rows.parquet", "cost").equals(read_table(tmp_path / "frame.parquet", "cost"))


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({**COST, "latency_ms": "soon"}, "latency_ms"),
        ({**COST, "task": 3}, "task"),
        ({name: value for name, value in COST.items() if name != "flops"}, r"lacks columns \['flops'\]"),
        ({**COST, "colour": "red"}, r"unknown columns \['colour'\]"),
    ],
)
def test_rows_of_another_table_are_refused_by_column(row: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        write_rows(tmp_path / "rows.parquet", [row], "cost")
    assert not (tmp_path / "rows.parquet").exists()


def test_a_process_that_writes_rows_stays_without_pandas(tmp_path: Path) -> None:
    code = (
        "import json, sys\n"
        "from mcsmoe.artefacts.tables import write_rows\n"
        "write_rows(sys.argv[1], [json.loads(sys.argv[2])], 'cost')\n"
        "assert 'pandas' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "rows.parquet", json.dumps(COST)], check=True, cwd=ROOT)
    assert len(read_table(tmp_path / "rows.parquet", "cost")) == 1


def test_every_table_has_its_rules_and_they_name_its_columns() -> None:
    assert set(VALUES) == set(SCHEMAS)
    for name, wanted in VALUES.items():
        assert {*wanted.key, *wanted.numbered, *wanted.ranges, *wanted.unknown} <= set(SCHEMAS[name].names), name


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    table = pa.table([pa.array(["a"]), pa.array(["b"])], names=["layer", "layer"])
    pq.write_table(table, tmp_path / "t.parquet")
    with pytest.raises(ValueError, match=r"t\.parquet: .*layer"):
        read_table(tmp_path / "t.parquet", "groups")


# -- tables beside statistics and models -------------------------------------------------------------------------
def statistics(layers: tuple[str, ...] = LAYERS, experts: int = EXPERTS) -> RoutingStatistics:
    made = RoutingStatistics()
    choice_TK = torch.arange(6)[:, None] % experts
    batch = RoutedBatch(
        inputs_TD=torch.randn(6, 3),
        logits_TE=torch.randn(6, experts),
        wanted_TK=choice_TK,
        chosen_TK=choice_TK,
        weights_TK=torch.ones(6, 1),
        valid_T=torch.ones(6, dtype=torch.bool),
    )
    made.update(dict.fromkeys(layers, batch))
    return made


def read(rows: list[dict[str, Any]], found: RoutingStatistics, folder: Path, patch: pytest.MonkeyPatch) -> Evidence:
    patch.setattr(evidence, "load_statistics", lambda _path, _lineage: found)
    return Evidence.read(folder / "routing", permutation=write(folder / "permutation.parquet", rows, "permutation"))


def test_a_permutation_is_of_the_layers_and_experts_of_the_statistics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = read(permutation(), statistics(), tmp_path, monkeypatch)
    for layer in LAYERS:
        wanted = [row["permutation"] for row in permutation() if row["layer"] == layer]
        assert made.permutations[layer].tolist() == wanted
    with pytest.raises(ValueError, match=r"permutation\.parquet: layer 'decoder.1' is missing in the permutation"):
        read(permutation()[:EXPERTS], statistics(), tmp_path, monkeypatch)
    with pytest.raises(ValueError, match=r"layer 'decoder.1' is missing in the routing statistics"):
        read(permutation(), statistics(LAYERS[:1]), tmp_path, monkeypatch)
    with pytest.raises(ValueError, match=r"permutation for 4 experts, the routing statistics are of 5"):
        read(permutation(), statistics(experts=5), tmp_path, monkeypatch)


def test_evidence_is_of_the_shape_of_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mcsmoe.types import Role

    def weights(width: int, d_model: int = 3) -> ExpertWeights:
        shapes = {"wi": (EXPERTS, width, d_model), "wo": (EXPERTS, d_model, width)}
        roles = {"wi": Role.INPUT, "wo": Role.OUTPUT}
        return ExpertWeights({name: torch.zeros(shape) for name, shape in shapes.items()}, roles)

    made = read(permutation(), statistics(), tmp_path, monkeypatch)
    made.check_against("encoder.1", weights(WIDTH))
    with pytest.raises(ValueError, match=r"'encoder.1': the permutation is of 4 experts with 5 neurons"):
        made.check_against("encoder.1", weights(WIDTH + 1))
    with pytest.raises(ValueError, match=r"'encoder.1': statistics are of 3 input features"):
        made.check_against("encoder.1", weights(WIDTH, 2))
