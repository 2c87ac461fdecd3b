"""Names that become folders of results: one rule for tasks and for methods. And the name of a metric that several read."""

from __future__ import annotations

import re
from collections.abc import Collection

LAYER_ERROR = "layer_error"
"""Metrics of layers are called ``layer_error/LAYER``."""
EXPECTED_ERROR = "expected_error"
"""What calibration let expect of them: ``expected_error/LAYER``."""

_LONGEST = 80  # bytes; a task's and a method's name stand in one file name together
_ALLOWED = re.compile(r"[\w .,+()=@~#-]+")
_SEED = re.compile(r"(^|-)seed\d")


def check_folder_name(field: str, name: object, taken: Collection[str] = ()) -> str:
    """``name``, which is to name a folder.

    Args:
        field: what is named, for messages.
        taken: names that the folder around it uses itself, whatever their case; one that ends in ``*`` stands for all
            that begin so.

    Raises:
        ValueError: no name, one that leads elsewhere, that a file system or a pattern of paths cannot hold, or that is
            taken; names the field, the value and the remedy.
    """
    if not isinstance(name, str):
        raise ValueError(f"{field} is {name!r}, which is not text; write it in quotes")
    shown = repr(name if len(name) <= 40 else f"{name[:40]}...")
    if not name:
        raise ValueError(f"{field} is empty; it names a folder of results, so give it one letter at least")
    if len(name.encode(errors="surrogatepass")) > _LONGEST:
        raise ValueError(f"{field} is {shown}, which is longer than {_LONGEST} bytes; it names a folder, shorten it")
    if not _ALLOWED.fullmatch(name) or name[0] in ".- ~" or name[-1] in ". ":
        raise ValueError(
            f"{field} is {shown}, which cannot name a folder of results; use letters, digits, spaces and _ - . , + ( ) = @ "
            "# ~, and begin with a letter or digit"
        )
    if _SEED.search(name):
        raise ValueError(f"{field} is {shown}, which reads as the folder of a seed; choose another name")
    lower = name.casefold()
    for one in taken:
        if lower == one or (one.endswith("*") and lower.startswith(one[:-1])):
            raise ValueError(f"{field} is {shown}, a name that the results use themselves; choose another name")
    return name


TAKEN_BY_RESULTS: tuple[str, ...] = ("data", "base", "logs", "benchmarks", "tokens", "mlartifacts", "mlflow.db*")
TAKEN_BY_RESULTS += ("mlruns", "summary.parquet", "report.html", "published.json", "config.json", "runs.json")
"""What stands in a results folder beside the folders of tasks."""

TAKEN_BY_RUN = ("examples", "full", "full_*", "permuted*", "permutation*", "routing*", "gradients*", "teacher*")
"""What stands in the folder of a task and seed beside the folders of methods."""
