"""``mcsmoe inspect``: what a checkpoint holds, from its headers alone."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

NAME = "inspect"
HELP = "Show the layers, groups, ranks and bytes of a checkpoint, from its headers alone."
EXAMPLE = "mcsmoe inspect compressed"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.add_argument("model", type=Path, help="checkpoint folder")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> None:
    """Print what a checkpoint holds."""
    from mcsmoe.checkpoint.describe import describe

    found = describe(arguments.model)
    if arguments.json:
        print(json.dumps(found, indent=2))
        return
    print(
        f"{found['folder']}: {found['form']} checkpoint of a {found['architecture']}, {', '.join(found['dtypes'])}"
        + (f", quantised by {found['quantisation']}" if found["quantisation"] else "")
    )
    wide = max([len(row["layer"]) for row in found["layers"]] + [5])
    print(f"\n{'layer':<{wide}}  experts  groups  rank  rows kept  parameters       bytes")
    for row in found["layers"]:
        rank = "-" if row["rank"] is None else row["rank"]
        kept = "-"
        if row["kept_rows"] is not None:
            counts = [count for counts in row["kept_rows"].values() for count in counts]
            kept = f"{min(counts)}-{max(counts)}"
        print(
            f"{row['layer']:<{wide}}  {row['experts']:>7}  {row['groups']:>6}  {rank:>4}  {kept:>9}  "
            f"{row['parameters']:>10,}  {row['bytes']:>10,}"
        )
    for name in ("experts", "rest", "total"):
        print(f"{name:<{wide}}  {'':>37}{found[name]['parameters']:>10,}  {found[name]['bytes']:>10,}")
    if found["untreated"] is not None:
        print(
            f"note: experts are listed by the names of tensors, and no other command takes this model: {found['untreated']}"
        )
    for note in found["notes"]:
        print(f"note: {note}")
    for name, value in found["provenance"].items():
        print(f"{name}: {json.dumps(value)}")
