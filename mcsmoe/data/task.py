"""One task: how a row of a data set becomes a prompt, an answer and choices."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mcsmoe.data import templates
from mcsmoe.data.columns import null_inside, plain
from mcsmoe.data.lines import shown

if TYPE_CHECKING:
    import pandas as pd

_HIDDEN = ("-1", "", "None", "nan")  # how data sets write a test label that is kept secret
LANGUAGE = "language"
"""The protocol of a task that has no answers: text is predicted."""


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
        group: template of what a grouped metric averages over, or of the domain of a text; None for no groups.
        text: column whose text is predicted, its second half after its first; None where a question is answered.
        protocol: ``rank``, ``generate`` or ``language``.
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
    text: str | None = None
    published: Published = Published()

    @property
    def metric(self) -> str:
        """The main metric."""
        return self.metrics[0]

    @property
    def is_language(self) -> bool:
        """Whether it is about predicting text, by document, and not about answers."""
        return self.protocol == LANGUAGE

    def asked(self, protocol: str) -> str:
        """The protocol to use where the configuration asks for ``protocol``: ``auto`` is the task's own.

        A task of language has no other than its own.
        """
        return self.protocol if protocol == "auto" or self.is_language else protocol

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
        prompt = self._templates.get("compat_prompt" if compat and self.compat_prompt else "prompt", str)
        rows: list[dict[str, Any]] = []
        names = list(self.columns)
        for number, values in enumerate(zip(*(frame[name].tolist() for name in names), strict=True)):
            row = {name: plain(value) for name, value in zip(names, values, strict=True)}
            place = f"{where}, row {number}"
            for name, value in row.items():
                if name != self.label and (null := null_inside(value, self.columns[name], name)) is not None:
                    raise ValueError(f"{place}: column {null!r} is empty; complete the row or leave it out")
            try:
                rows.append(self._example(row, number, prompt, place))
            except templates.TemplateError as error:
                raise ValueError(f"{place}: {error}") from error
        made = pd.DataFrame(rows)
        self._check_unique(made["idx"].tolist(), where)
        return made

    def row_prompt(self) -> Callable[[Mapping[str, Any]], str]:
        """A function from a row, as a mapping, to its prompt."""
        return self._templates["prompt"]

    def groups(self, frame: pd.DataFrame) -> list[str]:
        """The group of every row, by which rows must stay together; the row's number where the task has no groups."""
        if self.group is None or self.is_language:  # a domain is no group: every document is by itself
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
        if self.text is not None:
            return self._document(row, number, place)
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
            **self._names(row, number),
            "input": prompt(row),
            "target": target,
            "choices": choices,
            "label": label,
            "references": references,
        }

    def _names(self, row: dict[str, Any], number: int) -> dict[str, str]:
        return {
            "idx": self._templates["idx"](row) if self.idx is not None else str(number),
            "group": self._templates["group"](row) if self.group is not None else "",
        }

    def _document(self, row: dict[str, Any], number: int, place: str) -> dict[str, Any]:
        first, second = halves(row[str(self.text)])
        if not first or not second.strip():
            raise ValueError(f"{place}: column {self.text!r} is too short to be predicted; leave the row out")
        more = {"input": first, "target": second, "choices": [], "label": -1, "references": []}
        return {**self._names(row, number), **more}

    def _choices(self, row: dict[str, Any], place: str) -> list[str]:
        if isinstance(self.choices, tuple):
            return list(self.choices)
        return self._list("choices", row, place)

    def _list(self, field: str, row: dict[str, Any], place: str) -> list[str]:
        found = self._templates[field](row)
        plainly = isinstance(found, (list, tuple)) and all(isinstance(item, (str, int, float)) for item in found)
        texts = [templates.squeeze(str(item)) for item in found] if plainly else []
        if not texts or not all(texts):
            raise ValueError(
                f"{place}: {field} gives {shown(found)}, not a list of texts; complete the row or leave it out"
            )
        return texts

    def _label(self, row: dict[str, Any], choices: list[str], place: str) -> int:
        value = row[str(self.label)]
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if self.label_values is None:
            known = [str(number) for number in range(len(choices))]
        elif isinstance(self.label_values, tuple):
            known = list(self.label_values)
        else:
            known = self._list("label_values", row, place)
        # A value that the task file lists is a class, whatever it means elsewhere; no value at all never is one.
        if value is None or (str(value) in _HIDDEN and str(value) not in known):
            raise ValueError(
                f"{place}: {self.label} is {value!r}, which marks a hidden test label; use a split whose labels are "
                "public, or list it among label_values if it is a class"
            )
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
            if text := getattr(self, field):
                made[field] = templates.template(text, self.columns, f"{self.file}: {field}")
        for field in ("choices", "label_values", "references"):
            if isinstance(text := getattr(self, field), str):
                made[field] = templates.expression(text, self.columns, f"{self.file}: {field}")
        return made


def halves(text: str) -> tuple[str, str]:
    """A text cut at the white space nearest to its middle, which the second half begins with; together they are the text."""
    middle = len(text) // 2
    before = max(text.rfind(space, 0, middle) for space in (" ", "\n"))
    after = min((found for space in (" ", "\n") if (found := text.find(space, middle)) > 0), default=-1)
    places = [place for place in (before, after) if place > 0]
    cut = min(places, key=lambda place: abs(place - middle), default=middle)
    return text[:cut], text[cut:]
