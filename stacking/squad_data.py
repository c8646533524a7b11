"""SQuAD's official JSON, v1.1 or v2.0, in; questions with their contexts and answers out.

Offsets count characters, as in the files. What a question is trained on is its answer's exact place
in the context (`training_set`); what it is scored on are the texts of all its answers.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from data_prep.plain_files import read_plain
from stacking.config_faults import fault_lines
from stacking.errors import UserError

MOST_BYTES = 2**30  # of one file; the official ones have at most 42 MB
_MOST_FAULTS = 5  # that one message lists
_MOST_IDS = 5
# What separates words for the official preprocessing: other blanks are parts of words there.
_BLANKS = " \t\r\n\u202f"


class SquadError(UserError):
    """A SQuAD file that is none, or predictions that do not belong to it."""


class _Part(BaseModel):
    """A part of the file; keys that nobody reads here, such as `plausible_answers`, may stand."""

    model_config = ConfigDict(frozen=True, strict=True)


class Answer(_Part):
    """An answer as annotated."""

    text: str
    answer_start: int
    """Characters of the context before the answer; -1 and other misfits are met when training."""


class _Question(_Part):
    id: str = Field(min_length=1)
    question: str
    answers: tuple[Answer, ...] = ()
    is_impossible: bool | None = None


class _Paragraph(_Part):
    context: str
    qas: tuple[_Question, ...]


class _Article(_Part):
    paragraphs: tuple[_Paragraph, ...]


class _File(_Part):
    version: str = ""
    data: tuple[_Article, ...]


@dataclass(frozen=True)
class SquadExample:
    """One question about one context."""

    id: str
    question: str
    context: str
    answers: tuple[Answer, ...] = ()
    """As annotated, in the file's order; several in the development sets, none if impossible."""
    is_impossible: bool = False
    answer_span: tuple[int, int] | None = None
    """Characters [begin, end) of the context to train on; set by `training_set` only."""


@dataclass(frozen=True)
class SquadSet:
    """The questions of a file in its order; their ids are unique."""

    path: Path
    examples: tuple[SquadExample, ...]
    is_version_2: bool
    """Whether questions may have no answer: the file says version 2, or `is_impossible`."""


@dataclass(frozen=True)
class TrainingSet:
    """The questions that can be trained on, each with an `answer_span` or impossible."""

    examples: tuple[SquadExample, ...]
    moved: tuple[str, ...] = ()
    """Ids of questions whose answer stands near its `answer_start` only."""
    skipped: tuple[str, ...] = ()
    """Ids of questions that are left out: none of their answers stands where it should."""

    def notes(self) -> list[str]:
        """What is to be told about misfits, a line each."""
        lines = []
        if self.moved:
            lines.append(
                f"{len(self.moved)} answers do not stand at their answer_start, but in the same "
                f"words; taken from there: {some_ids(self.moved)}"
            )
        if self.skipped:
            lines.append(
                f"{len(self.skipped)} questions left out: their answer does not stand at its "
                f"answer_start: {some_ids(self.skipped)}"
            )
        return lines


def read_squad(path: Path) -> SquadSet:
    """Read a file of SQuAD's form; SquadError with the faults' places if it is none."""
    try:
        content = _File.model_validate_json(read_plain(path, MOST_BYTES))
    except OSError as error:
        raise SquadError(f"{path}: cannot be read: {error.strerror or error}") from error
    except ValidationError as error:
        raise SquadError(_refusal(path, _form_faults(error))) from error
    questions = [question for *_, question in _questions(content)]
    faults = _content_faults(content)
    if not questions:
        faults.append("data: holds no question")
    if faults:
        raise SquadError(_refusal(path, faults))
    examples = tuple(
        SquadExample(
            question.id,
            question.question,
            paragraph.context,
            question.answers,
            bool(question.is_impossible),
        )
        for _, paragraph, question in _questions(content)
    )
    says_impossible = any(question.is_impossible is not None for question in questions)
    return SquadSet(path, examples, says_impossible or content.version.lstrip("v")[:1] == "2")


def require_answers(squad: SquadSet) -> None:
    """SquadError if a question has no answer and is not impossible: it can teach nothing."""
    bare = [one.id for one in squad.examples if not one.answers and not one.is_impossible]
    if bare:
        raise SquadError(
            f"{squad.path}: {len(bare)} questions have no answer and are not impossible: "
            f"{some_ids(bare)}; give the file with answers"
        )


def training_set(squad: SquadSet) -> TrainingSet:
    """Find the answers in their contexts; SquadError if a question has none and is not impossible.

    As in the official preprocessing an answer counts if it stands within the words that its
    `answer_start` and length touch; other questions are left out. Of several answers the first that
    is found is taken (the official training files have one a question).
    """
    require_answers(squad)
    examples, moved, skipped = [], [], []
    for one in squad.examples:
        if one.is_impossible:
            examples.append(one)
            continue
        found = next(((a, s) for a in one.answers if (s := find_answer(one.context, a))), None)
        if found is None:
            skipped.append(one.id)
            continue
        answer, span = found
        if not one.context.startswith(answer.text, answer.answer_start):
            moved.append(one.id)
        examples.append(replace(one, answer_span=span))
    return TrainingSet(tuple(examples), tuple(moved), tuple(skipped))


def find_answer(context: str, answer: Answer) -> tuple[int, int] | None:
    """Characters [begin, end) of an answer without blanks at its ends; None: it is not there.

    An answer that stands elsewhere than annotated, or with other blanks between its words, is
    looked for in the words of the context that its annotated place touches.
    """
    begin, words = answer.answer_start, answer.text.split()
    end = min(begin + len(answer.text), len(context))
    if not words or not 0 <= begin < end:
        return None
    if context.startswith(answer.text, begin):
        inner = answer.text.lstrip()
        begin = end - len(inner)
        return begin, begin + len(inner.rstrip())
    while begin > 0 and context[begin - 1] not in _BLANKS:
        begin -= 1
    end -= 1  # the word of the last character, not the one behind it
    while end < len(context) and context[end] not in _BLANKS:
        end += 1
    found = re.compile(r"\s+".join(map(re.escape, words))).search(context, begin, end)
    return found.span() if found else None


def _questions(content: _File) -> Iterator[tuple[str, _Paragraph, _Question]]:
    """Each question with its place in the file, as in data.0.paragraphs.2.qas.1."""
    for a, article in enumerate(content.data):
        for p, paragraph in enumerate(article.paragraphs):
            for q, question in enumerate(paragraph.qas):
                yield f"data.{a}.paragraphs.{p}.qas.{q}", paragraph, question


def _content_faults(content: _File) -> list[str]:
    """What types do not tell."""
    counts = Counter(question.id for *_, question in _questions(content))
    faults = []
    for place, _, question in _questions(content):
        if counts[question.id] > 1:
            faults.append(
                f"{place}.id: {question.id!r} is the id of {counts[question.id]} questions; "
                "allowed: ids that are unique"
            )
        if question.is_impossible and question.answers:
            faults.append(
                f"{place}: is_impossible is true, but there are {len(question.answers)} answers; "
                "allowed: none (plausible_answers is not read)"
            )
    return faults


def _form_faults(error: ValidationError) -> list[str]:
    first = error.errors(include_url=False)[0]
    return [first["msg"]] if first["type"] == "json_invalid" else fault_lines(error, _File)


def _refusal(path: Path, faults: Sequence[str]) -> str:
    listed = [f"  - {fault}" for fault in faults[:_MOST_FAULTS]]
    if len(faults) > _MOST_FAULTS:
        listed.append(f"  - and {len(faults) - _MOST_FAULTS} more")
    return "\n".join([f"{path}: no SQuAD file of version 1.1 or 2.0:", *listed])


def some_ids(ids: Sequence[str]) -> str:
    """The first of them, for people."""
    return ", ".join(ids[:_MOST_IDS]) + (", ..." if len(ids) > _MOST_IDS else "")
