"""GLUE's official TSV files in; examples with their texts and labels out.

A line is a row and a tab ends a column, whatever quotation marks a text has. Rows that are none are
left out and told; a test row keeps its place, as a submission needs a prediction for it.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_prep.plain_files import read_plain
from stacking.errors import UserError
from stacking.glue_tasks import SPLITS, STS_B_RANGE, TASKS, Columns, GlueTask, Split

MOST_BYTES = 2**30  # of one file; the largest official one has 78 MB
_PART = "train_subset*.tsv"
_MOST_ROWS = 5  # that one message lists


class GlueError(UserError):
    """A GLUE file that is none, or predictions that do not belong to it."""


@dataclass(frozen=True)
class GlueExample:
    """One row."""

    index: int
    """What a submission calls it: the file's index, else its number from 0, left-out rows counted.
    """
    first: str
    second: str | None
    """None: the task has single sentences."""
    label: float | None
    """Number of the class, or the score of a regression; None in test files."""


@dataclass(frozen=True)
class GlueSet:
    """The rows of one file in its order; their indices are unique."""

    task: GlueTask
    split: Split
    path: Path
    examples: tuple[GlueExample, ...]
    num_rows: int
    """With those that are left out."""
    faults: Mapping[str, tuple[int, ...]]
    """What is wrong with which lines of the file, counted from 1."""

    @property
    def num_official_rows(self) -> int:
        """What the official file has."""
        file = self.task.file(self.split)
        assert file is not None
        return file.num_rows

    @property
    def is_official(self) -> bool:
        """Whether the number of rows is the official one, but for a hundredth of misfits."""
        return math.isclose(self.num_rows, self.num_official_rows, rel_tol=0.01)

    def notes(self) -> list[str]:
        """What is to be told about the file, a line each."""
        deed = "kept as they are" if self.split == "test" else "left out"
        lines = [
            f"{self.path}: {len(rows)} of {self.num_rows} rows {deed}: {fault}: line {_some(rows)}"
            for fault, rows in self.faults.items()
        ]
        if not self.is_official:
            lines.append(
                f"{self.path}: has {self.num_rows:,} rows, the official {self.task.name} "
                f"{self.num_official_rows:,}: scores are not comparable with published ones"
            )
        return lines


def find_file(folder: Path, task: GlueTask, split: Split) -> Path | None:
    """The file of a split below the GLUE folder; None if the task has none or it is not there.

    Where train.tsv is missing a `train_subset*.tsv` beside it is taken.
    """
    file = task.file(split)
    if file is None:
        return None
    path = folder / file.path
    if path.exists() or split != "train":
        return path if path.exists() else None
    parts = sorted(path.parent.glob(_PART))
    return parts[0] if parts else None


def missing_files(
    folder: Path, tasks: Sequence[GlueTask] = TASKS, splits: Sequence[Split] = SPLITS
) -> dict[str, list[str]]:
    """Tasks by name, each with the files below the folder that it has officially and lacks here."""
    lacking: dict[str, list[str]] = {}
    for task in tasks:
        for split in splits:
            file = task.file(split)
            if file is not None and find_file(folder, task, split) is None:
                lacking.setdefault(task.name, []).append(file.path)
    return lacking


def read_glue(folder: Path, task: GlueTask, split: Split) -> GlueSet:
    """Read a split of a task below the GLUE folder; GlueError if it is missing or none."""
    file = task.file(split)
    if file is None:
        raise GlueError(f"{task.name} has no {split} file")
    path = find_file(folder, task, split)
    if path is None:
        raise GlueError(
            f"{task.name}: {folder / file.path} is missing; give the folder of GLUE's official "
            "download, which has a folder for each task"
        )
    lines = read_rows(path)
    places = _places(path, lines, file.columns)
    first = 1 if file.columns.has_header else 0
    examples: list[GlueExample] = []
    faults: dict[str, list[int]] = {}
    for number, row in enumerate(lines[first:]):
        example, fault = _example(path, number, row, places, task)
        if fault:
            faults.setdefault(fault, []).append(number + first + 1)
        if not fault or split == "test":
            examples.append(example)
    found = GlueSet(
        task, split, path, tuple(examples), len(lines) - first,
        {fault: tuple(numbers) for fault, numbers in faults.items()},
    )  # fmt: skip
    _check(found)
    return found


def read_rows(path: Path) -> list[list[str]]:
    """The columns of each line; GlueError if the file is no table of text.

    Only a line feed ends a line: texts have other characters that Python takes for one. A carriage
    return before it stays in the last cell, whose readers strip it.
    """
    try:
        text = read_plain(path, MOST_BYTES).decode("utf-8-sig")
    except OSError as error:
        raise GlueError(f"{path}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise GlueError(f"{path}: no table: byte {error.start} is no UTF-8") from error
    lines = text.split("\n")
    if lines[-1] == "":
        lines.pop()
    if not lines:
        raise GlueError(f"{path}: no table: it is empty")
    return [line.split("\t") for line in lines]


@dataclass(frozen=True)
class _Places:
    """Numbers of the columns."""

    first: int
    second: int | None
    label: int | None
    index: int | None
    width: int
    """Columns of a whole row."""


def _places(path: Path, rows: Sequence[Sequence[str]], columns: Columns) -> _Places:
    """GlueError if a column is not there. Where nothing names them most rows say how many."""
    names: list[str | int] = [name.strip() for name in rows[0]]
    if not columns.has_header:
        names = [*range(Counter(map(len, rows)).most_common(1)[0][0])]
    wanted = (columns.first, columns.second, columns.label, columns.index)
    absent = [str(name) for name in wanted if name is not None and name not in names]
    if absent:
        found = ", ".join(map(str, names))[:200]
        raise GlueError(
            f"{path}: no GLUE file of this task: it lacks the columns {', '.join(absent)}; its "
            f"own are {found}"
        )

    def place(name: str | int | None) -> int | None:
        return None if name is None else names.index(name)

    return _Places(
        names.index(columns.first), place(columns.second), place(columns.label),
        place(columns.index), len(names),
    )  # fmt: skip


def _example(
    path: Path, number: int, row: Sequence[str], places: _Places, task: GlueTask
) -> tuple[GlueExample, str]:
    """The row as far as it goes, and what is wrong with it or "". A sentence may be empty."""

    def cell(place: int) -> str:
        return row[place].strip() if place < len(row) else ""

    fault = "" if len(row) == places.width else f"not {places.width} columns"
    index, label, second = number, None, None
    if places.index is not None:
        written = cell(places.index)
        if not written.isdecimal():
            raise GlueError(f"{path}: row {number}: index: got {written[:40]!r}; allowed: a number")
        index = int(written)
    if places.label is not None:
        label = label_number(task, cell(places.label))
        if label is None:
            fault = fault or "no label of the task"
    if places.second is not None:
        second = cell(places.second)
    return GlueExample(index, cell(places.first), second, label), fault


def label_number(task: GlueTask, text: str) -> float | None:
    """The class number or score that a cell writes; None: it is none of the task's.

    MNLI's "-", where annotators do not agree, is none.
    """
    if task.kind != "regression":
        return float(task.labels.index(text)) if text in task.labels else None
    try:
        score = float(text)
    except ValueError:
        return None
    low, high = STS_B_RANGE
    return score if low <= score <= high else None  # NaN is not


def _check(found: GlueSet) -> None:
    """GlueError if nothing is left, or two rows have one index."""
    if not found.examples:
        raise GlueError(
            "\n".join(
                [f"{found.path}: no GLUE file of {found.task.name}: it has no row that can be used"]
                + found.notes()
            )
        )
    index, times = Counter(one.index for one in found.examples).most_common(1)[0]
    if times > 1:
        raise GlueError(
            f"{found.path}: index {index} stands in {times} rows; allowed: unique indices"
        )


def _some(lines: Sequence[int]) -> str:
    return ", ".join(map(str, lines[:_MOST_ROWS])) + (", ..." if len(lines) > _MOST_ROWS else "")
