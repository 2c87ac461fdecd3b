"""Tasks as data: a YAML file says which columns a data set has and how a row becomes a prompt, an answer and choices.

Adding a task is adding a file, to the folder ``tasks`` beside this module or anywhere else and given by its path.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mcsmoe.data import templates
from mcsmoe.data.columns import as_columns, plain

if TYPE_CHECKING:
    import pandas as pd

FOLDER = Path(__file__).with_name("tasks")
PROTOCOLS = ("rank", "generate")
METRICS = ("accuracy", "f1", "macro_f1", "f1a", "f1m", "exact_match", "token_f1", "hotpot_f1")
"""Names a task file may list; ``mcsmoe.evaluate.metrics`` computes them. The first one listed is the main metric."""

_HIDDEN = ("-1", "", "None", "nan")  # how data sets write a test label that is kept secret
_REQUIRED = ("name", "description", "columns", "prompt", "protocol", "metrics")
_OPTIONAL = ("hub", "idx", "group", "choices", "label", "label_values", "references", "compat_prompt", "published")


@dataclass(frozen=True)
class Hub:
    """A parquet data set on the hub, pinned to a commit."""

    repository: str
    config: str | None
    revision: str
    train: str = "train"
    validation: str = "validation"


@dataclass(frozen=True)
class Published:
    """Hyper-parameters the paper chose for the task; None where it did not train on it."""

    batch_size: int | None = None
    learning_rate: float | None = None


@dataclass(frozen=True)
class Task:
    """One task. Templates are Jinja over the columns of a row; expressions are Jinja expressions over the same names.

    Attributes:
        columns: name -> type: a scalar type name, a list of one type, or a mapping for a struct.
        prompt: template of the model's input.
        choices: fixed answers, or an expression that gives a row's list of answers; empty where the model generates.
        label: column that tells the right choice; None where the model generates.
        label_values: what that column holds for each choice in order: a list, an expression, or None for 0, 1, ...
        references: expression that gives all accepted answers, the first being the target; None for ranked tasks.
        idx: template of the identifier; None numbers the rows.
        group: template of what a grouped metric averages over; None for no groups.
        protocol: ``rank`` or ``generate``.
        metrics: the main metric first.
        compat_prompt: template in place of ``prompt`` under the ``paper_compat`` protocol; None for the same.
        file: the task's own file.
    """

    name: str
    description: str
    columns: Mapping[str, Any]
    prompt: str
    protocol: str
    metrics: tuple[str, ...]
    file: Path
    hub: Hub | None = None
    choices: tuple[str, ...] | str = ()
    label: str | None = None
    label_values: tuple[str, ...] | str | None = None
    references: str | None = None
    idx: str | None = None
    group: str | None = None
    compat_prompt: str | None = None
    published: Published = Published()

    @property
    def metric(self) -> str:
        """The main metric."""
        return self.metrics[0]

    def asked(self, protocol: str) -> str:
        """The protocol to use where the configuration asks for ``protocol``: ``auto`` is the task's own."""
        return self.protocol if protocol == "auto" else protocol

    # -- rows to examples ----------------------------------------------------------------------------------------
    def examples(
        self, frame: pd.DataFrame, split: str, file: str | Path | None = None, compat: bool = False
    ) -> pd.DataFrame:
        """Rows of the data set as the table ``examples``.

        Args:
            split: ``train`` or ``validation``, for messages.
            file: where the rows come from, for messages.
            compat: use ``compat_prompt``.

        Raises:
            ValueError: no rows, a missing column or value, a hidden label, an answer that is not among the choices, an
                identifier that occurs twice; names the file, the row (from 0), the value and the remedy.
        """
        import pandas as pd

        where = f"{self.name}, split {split}" + (f", {file}" if file is not None else "")
        self._check_frame(frame, where)
        prompt = self._templates["compat_prompt" if compat and self.compat_prompt else "prompt"]
        rows: list[dict[str, Any]] = []
        names = list(self.columns)
        for number, values in enumerate(zip(*(frame[name].tolist() for name in names), strict=True)):
            row = {name: plain(value) for name, value in zip(names, values, strict=True)}
            place = f"{where}, row {number}"
            for name, value in row.items():
                if value is None and name != self.label:
                    raise ValueError(f"{place}: column {name!r} is empty; complete the row or leave it out")
            rows.append(self._example(row, number, prompt, place))
        made = pd.DataFrame(rows)
        self._check_unique(made["idx"].tolist(), where)
        return made

    def row_prompt(self) -> Callable[[Mapping[str, Any]], str]:
        """A function from a row, as a mapping, to its prompt."""
        return self._templates["prompt"]

    def groups(self, frame: pd.DataFrame) -> list[str]:
        """The group of every row, by which rows must stay together; the row's number where the task has no groups."""
        if self.group is None:
            return [str(number) for number in range(len(frame))]
        template, names = self._templates["group"], list(self.columns)
        values = zip(*(frame[name].tolist() for name in names), strict=True)
        return [template({n: plain(v) for n, v in zip(names, row, strict=True)}) for row in values]

    def _check_frame(self, frame: pd.DataFrame, where: str) -> None:
        missing = [name for name in self.columns if name not in frame.columns]
        if missing:
            raise ValueError(
                f"{where}: column {missing[0]!r} is missing (there are {', '.join(map(str, frame.columns))}); "
                f"rename or add it, as in {self.hub.repository if self.hub else self.file}"
            )
        if not len(frame):
            raise ValueError(f"{where}: the split has no rows; give a file with rows")

    def _example(self, row: dict[str, Any], number: int, prompt: templates.Template, place: str) -> dict[str, Any]:
        choices, label, references = [], -1, []
        if self.protocol == "rank":
            choices = self._choices(row, place)
            label = self._label(row, choices, place)
            target = choices[label]
            references = [target]
        else:
            references = self._list("references", row, place)
            target = references[0]
        return {
            "idx": self._templates["idx"](row) if self.idx is not None else str(number),
            "input": prompt(row),
            "target": target,
            "choices": choices,
            "label": label,
            "references": references,
            "group": self._templates["group"](row) if self.group is not None else "",
        }

    def _choices(self, row: dict[str, Any], place: str) -> list[str]:
        if isinstance(self.choices, tuple):
            return list(self.choices)
        return self._list("choices", row, place)

    def _list(self, field: str, row: dict[str, Any], place: str) -> list[str]:
        found = self._templates[field](row)
        texts = [templates.squeeze(str(item)) for item in found] if isinstance(found, (list, tuple)) else []
        if not texts or not all(texts):
            raise ValueError(f"{place}: {field} gives {found!r}, not a list of texts; complete the row or leave it out")
        return texts

    def _label(self, row: dict[str, Any], choices: list[str], place: str) -> int:
        value = row[str(self.label)]
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if str(value) in _HIDDEN:
            raise ValueError(
                f"{place}: {self.label} is {value!r}, which marks a hidden test label; use a split whose labels are public"
            )
        if self.label_values is None:
            known = [str(number) for number in range(len(choices))]
        elif isinstance(self.label_values, tuple):
            known = list(self.label_values)
        else:
            known = self._list("label_values", row, place)
        if str(value) not in known[: len(choices)]:
            raise ValueError(
                f"{place}: {self.label} is {value!r}, which is not among the choices "
                f"({', '.join(f'{k}: {c}' for k, c in zip(known, choices, strict=False))}); correct the row or the task file"
            )
        return known.index(str(value))

    @staticmethod
    def _check_unique(values: list[str], where: str) -> None:
        seen: dict[Hashable, int] = {}
        for number, value in enumerate(values):
            if value in seen:
                raise ValueError(
                    f"{where}: rows {seen[value]} and {number} have the same identifier {value!r}; remove one of them"
                )
            seen[value] = number

    @cached_property
    def _templates(self) -> dict[str, Callable[[Mapping[str, Any]], Any]]:
        """Compiled once; a field that is absent has no entry."""
        made: dict[str, Callable[[Mapping[str, Any]], Any]] = {}
        for field in ("prompt", "compat_prompt", "idx", "group"):
            if (text := getattr(self, field)) is not None:
                made[field] = templates.template(text, self.columns, f"{self.file}: {field}")
        for field in ("choices", "label_values", "references"):
            if isinstance(text := getattr(self, field), str):
                made[field] = templates.expression(text, self.columns, f"{self.file}: {field}")
        return made


# -- task files --------------------------------------------------------------------------------------------------
def _key(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())


def known_tasks() -> list[str]:
    """Names of the tasks that come with the library."""
    return sorted((file.stem for file in FOLDER.glob("*.yaml")), key=str.lower)


def load_task(name_or_path: str | Path) -> Task:
    """A task that comes with the library, by name (case and hyphens do not matter), or one from a file of your own.

    Raises:
        ValueError: no such task or file, or a file that does not describe a task; names the field and the remedy.
    """
    text = str(name_or_path)
    path = Path(text)
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        if not path.is_file():
            raise ValueError(
                f"task file {text} does not exist; correct the path, or use one of {', '.join(known_tasks())}"
            )
        return _read(path)
    for file in FOLDER.glob("*.yaml"):
        if _key(file.stem) == _key(text):
            return _read(file)
    known = known_tasks()
    close = get_close_matches(_key(text), [_key(name) for name in known], n=1)
    hint = f"did you mean {next(name for name in known if _key(name) == close[0])!r}? " if close else ""
    raise ValueError(
        f"{text!r} is not a known task; {hint}Known tasks: {', '.join(known)}; or give the path of a task file"
    )


def _read(path: Path) -> Task:
    import yaml

    try:
        raw = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"task file {path} is not readable YAML ({error}); correct it") from error
    if not isinstance(raw, dict):
        raise ValueError(f"task file {path} is {raw!r}, not a mapping of fields; see {FOLDER} for examples")
    where = f"task file {path}"
    unknown = sorted(set(map(str, raw)) - {*_REQUIRED, *_OPTIONAL})
    if unknown:
        raise ValueError(
            f"{where}: {unknown[0]!r} is not a known field; known are {', '.join((*_REQUIRED, *_OPTIONAL))}"
        )
    missing = [field for field in _REQUIRED if raw.get(field) in (None, "", [], {})]
    if missing:
        raise ValueError(f"{where}: field {missing[0]!r} is missing; add it")
    for field in ("name", "description", "prompt", "protocol", "idx", "group", "label", "references", "compat_prompt"):
        if raw.get(field) is not None and not isinstance(raw[field], str):
            raise ValueError(f"{where}: {field} is {raw[field]!r}, which is not text; write it in quotes")
    if "/" in raw["name"]:
        raise ValueError(f"{where}: name is {raw['name']!r}, which names a folder of results and may hold no '/'")
    _one_of(raw["protocol"], PROTOCOLS, f"{where}: protocol")
    if not isinstance(raw["metrics"], list):
        raise ValueError(f"{where}: metrics is {raw['metrics']!r}, not a list; write the main metric first")
    for metric in raw["metrics"]:
        _one_of(metric, METRICS, f"{where}: metrics")
    as_columns(raw["columns"], where)
    texts: dict[str, Any] = {
        field: raw.get(field) for field in ("label", "references", "idx", "group", "compat_prompt")
    }
    task = Task(
        name=raw["name"],
        description=raw["description"],
        columns=raw["columns"],
        prompt=raw["prompt"],
        protocol=raw["protocol"],
        metrics=tuple(raw["metrics"]),
        file=path,
        hub=_record(Hub, raw.get("hub"), f"{where}: hub") if raw.get("hub") is not None else None,
        choices=_answers(raw.get("choices"), f"{where}: choices") or (),
        label_values=_answers(raw.get("label_values"), f"{where}: label_values"),
        published=_record(Published, raw.get("published") or {}, f"{where}: published"),
        **texts,
    )
    _check_answers(task, where)
    return task


def _check_answers(task: Task, where: str) -> None:
    """What the protocol needs is there, and templates use columns that are there."""
    if task.protocol == "rank":
        if not task.choices or task.label is None:
            raise ValueError(f"{where}: protocol is 'rank', which needs choices and label; add them")
        if task.label not in task.columns:
            raise ValueError(
                f"{where}: label is {task.label!r}, which is not among columns ({', '.join(task.columns)}); correct it"
            )
        if isinstance(task.choices, tuple) and len(set(task.choices)) < len(task.choices):
            raise ValueError(f"{where}: choices is {list(task.choices)}, which names one twice; make them differ")
    elif task.references is None:
        raise ValueError(f"{where}: protocol is 'generate', which needs references; add the expression")
    _ = task._templates


def _answers(value: Any, where: str) -> tuple[str, ...] | str | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(item, (str, int)) for item in value):
        return tuple(str(item) for item in value)
    raise ValueError(f"{where} is {value!r}, neither a list of texts nor an expression over columns; correct it")


def _one_of(value: Any, known: Iterable[str], where: str) -> None:
    if value not in known:
        raise ValueError(f"{where} is {value!r}; use one of {', '.join(known)}")


def _record(kind: Callable[..., Any], raw: Any, where: str) -> Any:
    if not isinstance(raw, dict):
        raise ValueError(f"{where} is {raw!r}, not a mapping of fields; correct it")
    try:
        return kind(**raw)
    except TypeError as error:
        raise ValueError(f"{where} is {raw!r}, with a field missing or unknown ({error}); correct it") from error
