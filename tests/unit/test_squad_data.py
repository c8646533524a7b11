"""SQuAD's files: what is read, which answers are found, and each fault with its place."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from squad_sets import VERSION_1, VERSION_2, answered

from stacking.squad_data import (
    Answer,
    SquadError,
    SquadExample,
    SquadSet,
    find_answer,
    read_squad,
    training_set,
)

CONTEXT = "The Japanese boat,  the blue\nboat and the boat. 10-10\u00a0km"


def at(text: str, start: int) -> tuple[int, int] | None:
    return find_answer(CONTEXT, Answer(text=text, answer_start=start))


def set_of(*examples: SquadExample) -> SquadSet:
    return SquadSet(Path("set.json"), examples, is_version_2=False)


def one_question(**changes: object) -> dict[str, Any]:
    """A file of one question, which `changes` change."""
    question = {"id": "q", "question": "?", "answers": [], **changes}
    return {"version": "1.1", "data": [{"paragraphs": [{"context": "a", "qas": [question]}]}]}


@pytest.fixture
def written(tmp_path: Path) -> Callable[[object], Path]:
    def write(content: object) -> Path:
        path = tmp_path / "set.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write


@pytest.mark.parametrize(("path", "count", "impossible"), [(VERSION_1, 19, 0), (VERSION_2, 11, 5)])
def test_a_set_is_read_whole(path: Path, count: int, impossible: int) -> None:
    squad = read_squad(path)
    assert len(squad.examples) == count
    assert sum(one.is_impossible for one in squad.examples) == impossible
    assert squad.is_version_2 == (path == VERSION_2)
    for one in squad.examples:
        assert bool(one.answers) != one.is_impossible
        for answer in one.answers:
            assert one.context.startswith(answer.text, answer.answer_start)


def test_plausible_answers_are_no_answers() -> None:
    bridge = next(one for one in read_squad(VERSION_2).examples if one.id == "mill-bridge")
    assert bridge.answers == ()


@pytest.mark.parametrize(
    ("version", "changes", "is_version_2"),
    [
        ("1.1", {}, False),
        ("v2.0", {}, True),
        ("2.0", {}, True),
        ("my own", {"is_impossible": False}, True),
    ],
)
def test_the_version_is_what_the_file_says_or_has(
    written: Callable[[object], Path], version: str, changes: dict[str, object], is_version_2: bool
) -> None:
    content = one_question(**changes) | {"version": version}
    assert read_squad(written(content)).is_version_2 == is_version_2


def test_training_takes_the_first_answer_and_its_place() -> None:
    training = training_set(read_squad(VERSION_1))
    assert training.notes() == []
    for one in training.examples:
        assert one.answer_span is not None
        begin, end = one.answer_span
        assert one.context[begin:end] == one.answers[0].text
    impossible = [one for one in training_set(read_squad(VERSION_2)).examples if one.is_impossible]
    assert [one.answer_span for one in impossible] == [None] * 5


def test_an_answer_stands_where_it_is_annotated_not_at_its_first_occurrence() -> None:
    assert at("boat", 29) == (29, 33)
    assert at("10", 51) == (51, 53)
    assert at("Japan", 4) == (4, 9)
    assert at(" blue\n", 23) == (24, 28)
    assert at("10\u00a0km", 51) == (51, 56)


def test_an_answer_beside_its_place_is_found_in_the_same_words_only() -> None:
    assert at("boat", 14) == (13, 17)
    assert at("blue boat", 24) == (24, 33)
    assert at("boat", 12) == (13, 17)
    assert at(" blue ", 23) == (24, 28)
    assert at("Japanese boat, the", 4) == (4, 23)
    assert at("boat", 24) is None
    assert at("and", 42) is None


def test_a_place_touches_the_words_of_its_first_and_last_character() -> None:
    context = "one two three"
    assert find_answer(context, Answer(text="two", answer_start=5)) == (4, 7)
    assert find_answer(context, Answer(text="three", answer_start=5)) == (8, 13)
    assert find_answer(context, Answer(text="one", answer_start=1)) == (0, 3)
    assert find_answer(context, Answer(text="two", answer_start=1)) is None  # it touches "ne "
    assert find_answer(context, Answer(text="one", answer_start=4)) is None
    assert find_answer(context, Answer(text="three", answer_start=2)) is None


@pytest.mark.parametrize(
    ("text", "start"), [("boat", -1), ("boat", 99), ("", 3), (" ", 3), ("(", 0)]
)
def test_an_impossible_place_holds_no_answer(text: str, start: int) -> None:
    assert at(text, start) is None


@given(one=answered())
def test_a_true_place_is_found_as_it_is(one: SquadExample) -> None:
    assert find_answer(one.context, one.answers[0]) == one.answer_span


def test_misfits_are_told_counted_and_skipped() -> None:
    def question(key: str, *answers: tuple[str, int]) -> SquadExample:
        given = tuple(Answer(text=text, answer_start=start) for text, start in answers)
        return SquadExample(key, "?", CONTEXT, given)

    lost = [question(f"lost-{number}", ("boat", 0)) for number in range(6)]
    training = training_set(
        set_of(*lost, question("near", ("boat", 14)), question("second", ("x", 0), ("boat", 29)))
    )
    assert [(one.id, one.answer_span) for one in training.examples] == [
        ("near", (13, 17)), ("second", (29, 33)),
    ]  # fmt: skip
    assert training.moved == ("near",)
    assert training.notes() == [
        "1 answers do not stand at their answer_start, but in the same words; taken from there: "
        "near",
        "6 questions left out: their answer does not stand at its answer_start: lost-0, lost-1, "
        "lost-2, lost-3, lost-4, ...",
    ]


def test_a_question_without_an_answer_cannot_be_trained_on() -> None:
    bare, impossible = SquadExample("bare", "?", "a"), SquadExample("no", "?", "a", (), True)
    with pytest.raises(SquadError, match="1 questions have no answer and are not impossible: bare"):
        training_set(set_of(bare, impossible))
    assert training_set(set_of(impossible)).examples == (impossible,)


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ("{", "EOF while parsing"),
        ('"\\ud800"', "hex escape"),
        ([], "got []; allowed: an object with the keys version, data"),
        ({"version": "1.1"}, "data: missing; allowed: a list of objects"),
        ({"data": []}, "data: holds no question"),
        ({"data": [{"title": "x"}]}, "data.0.paragraphs: missing; allowed: a list of objects"),
        (one_question(id=7), "data.0.paragraphs.0.qas.0.id: got 7; allowed: a string"),
        (one_question(id=""), "qas.0.id: got ''; allowed: a string that is not empty"),
        (one_question(question=None), "qas.0.question: got null; allowed: a string"),
        (one_question(answers=[{"text": "a"}]), "answers.0.answer_start: missing"),
        (one_question(answers=[{"text": "a", "answer_start": "0"}]), "answer_start: got '0'"),
        (one_question(is_impossible="no"), "is_impossible: got 'no'; allowed: true or false"),
        (
            one_question(is_impossible=True, answers=[{"text": "a", "answer_start": 0}]),
            "data.0.paragraphs.0.qas.0: is_impossible is true, but there are 1 answers",
        ),
        (
            {"data": one_question()["data"] * 2},
            "data.1.paragraphs.0.qas.0.id: 'q' is the id of 2 questions",
        ),
    ],
)
def test_each_fault_is_one_message_with_its_place(
    written: Callable[[object], Path], content: object, fault: str
) -> None:
    path = written(content)
    with pytest.raises(SquadError) as caught:
        read_squad(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: no SQuAD file of version 1.1 or 2.0:\n  - ")
    assert fault in message


def test_many_faults_are_cut_to_a_few(written: Callable[[object], Path]) -> None:
    with pytest.raises(SquadError, match="and 95 more") as caught:
        read_squad(written({"data": [{}] * 100}))
    assert len(str(caught.value).splitlines()) == 7


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(SquadError, match="none.json: cannot be read: No such file"):
        read_squad(tmp_path / "none.json")
    with pytest.raises(SquadError, match="cannot be read: is a folder"):
        read_squad(tmp_path)
