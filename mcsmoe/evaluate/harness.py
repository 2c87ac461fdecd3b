"""Tasks of the field's evaluation harness (lm-eval, an optional extra) on a model in memory, compact ones included."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mcsmoe.device import pick

if TYPE_CHECKING:
    import pandas as pd
    from torch import nn

EXTRA = "lm-eval is not installed, which --tasks takes; install it with: pip install 'mcsmoe[lm-eval]'"
_NORMAL = 1.959964  # half width of a 95 % interval in standard errors
_ERROR = "_stderr"


def require() -> None:
    """Raise ValueError, with the remedy, where lm-eval is not installed."""
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise ValueError(EXTRA) from error


def split_names(given: Sequence[str]) -> tuple[list[str], list[Path]]:
    """(names of tasks, folders of task files) of what was given.

    Raises:
        ValueError: a folder that holds no task file; names it.
    """
    folders = [Path(one) for one in given if Path(one).is_dir()]
    names = [one for one in given if not Path(one).is_dir()]
    for folder in folders:
        own = _tasks_in(folder)
        if not own:
            raise ValueError(f"--tasks names folder {folder}, which has no task file with a field 'task'; name another")
        names += own
    return names, folders


def _tasks_in(folder: Path) -> list[str]:
    """Names of the tasks and groups that the files of a folder define, without running anything in them."""
    import yaml

    found: list[str] = []
    for file in sorted(folder.rglob("*.yaml")):
        try:
            # Tags of the harness (!function ...) are read as nothing: only the name is looked at.
            fields = yaml.load(file.read_text(encoding="utf-8"), _Names)
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise ValueError(f"--tasks: {file} is not readable YAML ({' '.join(str(error).split())[:200]})") from error
        name = fields.get("task") if isinstance(fields, Mapping) else None
        if isinstance(name, str):
            found.append(name)
    return found


def _loader() -> Any:
    import yaml

    class Names(yaml.SafeLoader):
        pass

    Names.add_multi_constructor("!", lambda loader, suffix, node: None)
    return Names


_Names = _loader()


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    batch_size: int = 16,
    device: str = "auto",
    limit: int | None = None,
    shots: int | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Table ``harness``: every score of every task.

    Args:
        model: decoder-only, in memory.
        tasks: names that the harness knows, or folders of task files of one's own.
        limit: examples of each task that are used; None for all.
        shots: examples shown before each question; None for the task's own number.
        seed: of the examples shown.

    Raises:
        ValueError: lm-eval is not installed, a task that it does not know, or an encoder-decoder model.
    """
    require()
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError("--tasks takes a decoder-only model; evaluate this one with the workflow's tasks, or --text")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    names, folders = split_names(tasks)
    manager = TaskManager(include_path=[str(folder) for folder in folders] or None)
    unknown = sorted(name for name in names if name not in manager.all_tasks)
    if unknown:
        raise ValueError(f"--tasks names {unknown[0]!r}, which lm-eval does not know; see `lm-eval ls tasks`")
    chosen = pick(device)
    wrapped = HFLM(pretrained=model.to(chosen), tokenizer=tokenizer, batch_size=batch_size, device=str(chosen))
    found = simple_evaluate(
        model=wrapped,
        tasks=list(names),
        num_fewshot=shots,
        limit=limit,
        task_manager=manager,
        bootstrap_iters=1000,
        log_samples=False,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
    )
    return rows_of(found)


def rows_of(results: Mapping[str, Any]) -> pd.DataFrame:
    """The harness's own results as table ``harness``."""
    import pandas as pd

    rows = []
    for task, scores in results["results"].items():
        counted = results.get("n-samples", {}).get(task, {}).get("effective", 0)
        for key, value in scores.items():
            name, _, how = key.partition(",")
            if not isinstance(value, int | float) or not how or name.endswith(_ERROR):
                continue
            error = scores.get(f"{name}{_ERROR},{how}", math.nan)
            error = float(error) if isinstance(error, int | float) else math.nan
            rows.append(
                {
                    "task": task,
                    "metric": name,
                    "filter": how,
                    "value": float(value),
                    "ci_low": float(value) - _NORMAL * error,
                    "ci_high": float(value) + _NORMAL * error,
                    "n": int(counted),
                    "shots": int(results.get("n-shot", {}).get(task) or 0),
                }
            )
    return pd.DataFrame(rows)


def in_words(row: Mapping[str, Any]) -> str:
    """One line for a reader."""
    interval = "" if math.isnan(row["ci_low"]) else f" [{row['ci_low']:.4f}, {row['ci_high']:.4f}]"
    return f"{row['task']}: {row['metric']} {row['value']:.4f}{interval}, n = {row['n']}, {row['shots']} shots"
