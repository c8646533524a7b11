"""Predictions from logits and submission files: by hand, and there and back."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stacking.errors import NonFiniteError
from stacking.glue_data import GlueError, GlueExample
from stacking.glue_predictions import (
    constant_predictions,
    predict,
    read_submission,
    submission_file,
    write_submission,
)
from stacking.glue_tasks import BY_NAME, TASKS, GlueTask

# What the leaderboard wants to find in the zip.
OFFICIAL = {"AX.tsv", "CoLA.tsv", "MNLI-m.tsv", "MNLI-mm.tsv", "MRPC.tsv", "QNLI.tsv", "QQP.tsv",
            "RTE.tsv", "SST-2.tsv", "STS-B.tsv", "WNLI.tsv"}  # fmt: skip


def examples(count: int) -> list[GlueExample]:
    return [GlueExample(index, "a", "b", None) for index in range(count)]


@pytest.mark.parametrize("name", ["CoLA", "MRPC", "QQP"])
def test_one_logit_is_class_1_above_0(name: str) -> None:
    """The 2019 code's argmax over one logit is 0 for every row."""
    logits = np.array([[-2.0], [0.0], [0.01], [5.0]], np.float32)
    assert logits.argmax(axis=1).tolist() == [0, 0, 0, 0]
    assert predict(BY_NAME[name], logits).tolist() == [0.0, 0.0, 1.0, 1.0]


def test_a_regression_is_scaled_back_into_its_range() -> None:
    """The 2019 code submits 0 for every row here, too."""
    logits = np.array([[-1.5], [0.0], [0.25], [1.0], [-9.0], [1.25]], np.float32)
    assert predict(BY_NAME["STS-B"], logits).tolist() == [0.0, 3.0, 3.5, 5.0, 0.0, 5.0]


def test_classes_are_the_largest_logits() -> None:
    logits = np.array([[0.0, 2.0, 1.0], [1.0, 1.0, 0.0], [-3.0, -2.0, -1.0]])
    assert predict(BY_NAME["MNLI-m"], logits).tolist() == [1.0, 0.0, 2.0]


def test_logits_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(NonFiniteError, match="CoLA: the model's logits hold NaN"):
        predict(BY_NAME["CoLA"], np.array([[1.0], [np.nan]]))
    with pytest.raises(AssertionError):
        predict(BY_NAME["CoLA"], np.zeros((3, 2)))


def test_all_files_have_official_names() -> None:
    assert {submission_file(task) for task in TASKS} == OFFICIAL


@pytest.mark.parametrize(
    ("name", "values", "written"),
    [
        ("CoLA", [0, 1], ["0", "1"]),
        ("RTE", [0, 1], ["entailment", "not_entailment"]),
        ("AX", [0, 1, 2], ["contradiction", "entailment", "neutral"]),
        ("STS-B", [0.0, 3.25, 5.0], ["0.000000", "3.250000", "5.000000"]),
    ],
)
def test_a_submission_by_hand(
    tmp_path: Path, name: str, values: list[float], written: list[str]
) -> None:
    path = write_submission(
        tmp_path / "new", BY_NAME[name], examples(len(values)), np.array(values, np.float64)
    )
    assert path == tmp_path / "new" / f"{name}.tsv"
    lines = [f"{index}\t{label}" for index, label in enumerate(written)]
    assert path.read_bytes().decode() == "\n".join(["index\tprediction", *lines, ""])


def test_wnli_is_all_0(tmp_path: Path) -> None:
    task = BY_NAME["WNLI"]
    path = write_submission(tmp_path, task, examples(3), constant_predictions(task, 3))
    assert path.read_text() == "index\tprediction\n0\t0\n1\t0\n2\t0\n"
    with pytest.raises(AssertionError, match="RTE is predicted by a model"):
        constant_predictions(BY_NAME["RTE"], 3)


@st.composite
def predicted(draw: st.DrawFn) -> tuple[GlueTask, dict[int, float]]:
    """A task and predictions for some of its rows, in any order."""
    task = draw(st.sampled_from(TASKS))
    values = (
        st.floats(0, 5)
        if task.kind == "regression"
        else st.integers(0, len(task.labels) - 1).map(float)
    )
    return task, draw(st.dictionaries(st.integers(0, 10**6), values, max_size=9))


@given(predicted())
def test_predictions_survive_the_file(
    tmp_path_factory: pytest.TempPathFactory, one: tuple[GlueTask, dict[int, float]]
) -> None:
    task, said = one
    rows = [GlueExample(index, "a", None, None) for index in said]
    folder = tmp_path_factory.getbasetemp() / "there_and_back"
    path = write_submission(folder, task, rows, np.array(list(said.values()), np.float64))
    found = read_submission(path, task)
    assert list(found) == list(said)
    assert list(found.values()) == pytest.approx(list(said.values()), abs=1e-6)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("id\tprediction\n0\tneutral\n", "line 1: allowed: the header index TAB prediction"),
        ("index\tprediction\n0\n", "line 2: allowed: an index, a tab and a prediction"),
        ("index\tprediction\n-1\tneutral\n", "line 2: allowed: an index"),
        ("index\tprediction\n0\tneutral\n1\t2\n", "line 3: got '2'; allowed: contradiction or"),
        ("index\tprediction\n4\tneutral\n4\tneutral\n", "line 3: index 4 has a prediction already"),
        ("", "it is empty"),
    ],
)
def test_a_file_that_is_none_is_one_message(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "MNLI-m.tsv"
    path.write_text(content)
    with pytest.raises(GlueError, match=message) as raised:
        read_submission(path, BY_NAME["MNLI-m"])
    assert str(path) in str(raised.value)


def test_carriage_returns_are_no_part_of_a_prediction(tmp_path: Path) -> None:
    path = tmp_path / "RTE.tsv"
    path.write_bytes(b"index\tprediction\r\n0\tentailment\r\n")
    assert read_submission(path, BY_NAME["RTE"]) == {0: 0.0}


def test_a_score_out_of_range_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "STS-B.tsv"
    for score in ("5.1", "-0.1", "nan", "many"):
        path.write_text(f"index\tprediction\n0\t{score}\n")
        with pytest.raises(GlueError, match="allowed: a number from 0 to 5"):
            read_submission(path, BY_NAME["STS-B"])
