"""What the report says in words: numbers as text, and sentences that follow from the tests by fixed rules."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd

from mcsmoe.report.drawing import FULL, rows_of


def number(value: float, digits: int = 3) -> str:
    """A score with fixed digits, or a dash where there is none."""
    return "–" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def scaled(value: float, unit: float) -> str:
    """A quantity in a unit, three significant digits, never in powers of ten."""
    if value is None or math.isnan(value):
        return "–"
    shown = value / unit
    if shown == 0:
        return "0"
    decimals = max(0, 2 - math.floor(math.log10(abs(shown))))
    return f"{shown:,.{decimals}f}"


def signed(value: float) -> str:
    """A difference of two scores with its sign, or a dash where there is none."""
    if value is None or math.isnan(value):
        return "–"
    return f"{value:+.3f}".replace("-", "−") if abs(value) >= 0.0005 else "0.000"


def p_text(value: float) -> str:
    """A p value as text."""
    if value is None or math.isnan(value):
        return "–"
    return "< 0.001" if value < 0.001 else f"{value:.3f}" if value < 0.1 else f"{value:.2f}"


def join(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def words_for_task(rows: pd.DataFrame) -> list[str]:
    """What one task's rows of table ``summary`` say, as sentences; a method with several seeds is judged over all."""
    reference, others = rows[rows["variant"] == FULL], rows[rows["variant"] != FULL]
    if reference.empty:
        return ["There is no full model to compare with: the scores stand alone."]
    first, seeds = rows_of(reference)[0], len(reference)
    size, n = float(reference["bytes_on_disk"].mean()), f"{first['n']:,}"
    low, high = number(reference["value"].min()), number(reference["value"].max())
    spread = f"[{number(first['ci_low'])}, {number(first['ci_high'])}]"
    if seeds > 1:
        spread = f"({low} to {high} over {seeds} seeds)"
    said = [
        f"The full model scores {number(reference['value'].mean())} {first['metric']} {spread} on {n} examples "
        f"and takes {scaled(size, 1e6)} MB on disk."
    ]
    methods = [_judged(part) for _, part in others.groupby(["variant", "experts"], sort=False)]
    if not methods:
        return said
    kept = sorted(
        (each for each in methods if each["verdict"] in ("Better", "Within noise")),
        key=lambda each: float(each["bytes"]),
    )
    if kept:
        small = kept[0]
        said.append(
            f"The smallest checkpoint that is not measurably worse is {small['name']}: {number(small['value'])} "
            f"({signed(small['difference'])}) at {scaled(small['bytes'], 1e6)} MB, {100 * small['bytes'] / size:.0f} % "
            "of the full size."
        )
    else:
        said.append("No variant was found to be as good as the full model.")
    for phrase in ("Better", "Within noise", "Worse", "Worse with some seeds", "Not compared"):
        found = [each for each in methods if each["verdict"] == phrase]
        sizes = {each["with"] for each in found}
        # A long list of one size names the size once.
        once = len(found) > 3 and len(sizes) == 1
        names = [f"{each['variant' if once else 'name']} ({signed(each['difference'])})" for each in found]
        if found:
            said.append(f"{phrase}{f', {sizes.pop()}' if once else ''}: {join(names)}.")
    half = float(((reference["ci_high"] - reference["ci_low"]) / 2).mean())
    said.append(
        f"With {n} examples the full model's own score is only known to ±\u00a0{number(half)}, "
        "so “within noise” means that no difference was shown, not that there is none."
    )
    return said


def _judged(part: pd.DataFrame) -> dict[str, Any]:
    """One method at one number of experts: means over its seeds, and a verdict that holds for all of them."""
    row, verdicts = rows_of(part)[0], list(part["verdict"])
    worse = verdicts.count("worse")
    verdict = "Within noise"
    if worse:
        verdict = "Worse" if worse == len(verdicts) else "Worse with some seeds"
    elif any(each not in ("better", "within noise") for each in verdicts):
        verdict = "Not compared"
    elif verdicts.count("better") == len(verdicts):
        verdict = "Better"
    size = f"with {row['experts']} expert{'' if row['experts'] == 1 else 's'}"
    return {
        "name": f"{row['variant']} {size}",
        "variant": row["variant"],
        "with": size,
        "verdict": verdict,
        "value": float(part["value"].mean()),
        "difference": float(part["difference"].mean()),
        "bytes": float(part["bytes_on_disk"].mean()),
    }
