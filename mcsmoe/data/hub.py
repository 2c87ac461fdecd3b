"""The only module that reads the hub: parquet data sets by full repository name, pinned to a commit."""

from __future__ import annotations

import os
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from mcsmoe.data.columns import check_schema

if TYPE_CHECKING:
    import pandas as pd

    from mcsmoe.data.tasks import Task

_TRUE = {"1", "on", "yes", "true"}


def _stay_offline() -> None:
    """Keep both libraries from the network, whether or not they were imported before."""
    os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
    import datasets
    import huggingface_hub.constants

    datasets.config.HF_HUB_OFFLINE = True
    huggingface_hub.constants.HF_HUB_OFFLINE = True


def load(task: Task, split: str, mirror: str | Path | None = None, offline: bool = False) -> pd.DataFrame:
    """A split of the task's data set on the hub.

    Args:
        mirror: folder that holds copies of repositories, ``mirror/<owner>/<name>``, read in the place of the hub.
        offline: use what was fetched before, and never the network; also set by ``HF_HUB_OFFLINE``.

    Raises:
        ValueError: the data set, configuration or split is not there or cannot be fetched, or lacks a column.
    """
    assert task.hub is not None
    hub = task.hub
    name: str = hub.repository
    revision: str | None = hub.revision
    if mirror is not None:
        folder = Path(mirror) / hub.repository
        if not folder.is_dir():
            raise ValueError(f"{mirror} holds no copy of {hub.repository} ({folder} is not a folder); put it there")
        name, revision = str(folder), None
    environment = (os.environ.get(key, "").lower() for key in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"))
    offline = offline or mirror is not None or any(value in _TRUE for value in environment)
    if offline:
        _stay_offline()
    import datasets

    wanted = {"train": hub.train, "validation": hub.validation}[split]
    where = f"data set {name}" + (f", configuration {hub.config}" if hub.config else "") + f", split {wanted}"
    with ExitStack() as stack:
        # The library's cache tells local folders apart by name alone, so another folder's rows could come back.
        cache = None if mirror is None else stack.enter_context(tempfile.TemporaryDirectory())
        try:
            rows = datasets.load_dataset(name, hub.config, split=wanted, revision=revision, cache_dir=cache)
        except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
            remedy = "fetch it once online, or use data.source: files" if offline else "check the name and the network"
            raise ValueError(f"{where}: cannot be read ({error}); {remedy}") from error
        check_schema(rows.features.arrow_schema, task.columns, where, str(task.file))
        frame: pd.DataFrame = rows.select_columns(list(task.columns)).with_format("arrow")[:].to_pandas()
    if not len(frame):
        raise ValueError(f"{where}: has no rows; choose another split in {task.file}")
    return frame
