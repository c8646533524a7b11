"""Reading GLUE: each task's columns on tiny files, the real ones where they are, and misfits."""

from pathlib import Path

import pytest
from glue_sets import FILES, write_glue, write_rows

from stacking.glue_data import GlueError, find_file, missing_files, read_glue
from stacking.glue_tasks import BY_NAME, SPLITS, TASKS, Split

REAL = Path(__file__).resolve().parents[3] / "shared/data/glue"

# First example of dev (AX: test): texts, label, and all labels.
DEV: dict[str, tuple[str, str | None, list[float]]] = {
    "CoLA": ("The mill 0.", None, [1, 1, 0, 1]),
    "SST-2": ("a large lamp", None, [1, 0, 1]),
    "MRPC": ('He said " so .', "She said 0 .", [1, 0, 1, 1]),
    "STS-B": ("a lamp 0", "a mill", [5.0, 0.4, 2.25]),
    "QQP": ("When is it lit?", "Is it 0?", [0, 1, 1, 0]),
    "MNLI-m": ("The lamp is lit.", "It is dusk 0", [2, 0, 1, 2]),
    "MNLI-mm": ("The lamp is lit.", "It is dusk 0", [2, 1, 0, 2]),
    "QNLI": ('The "lamp 0', "is lit at 0", [0, 1, 0, 1]),
    "RTE": ('The "lamp 0', "is lit at 0", [0, 1, 0, 1]),
    "WNLI": ('The "lamp 0', "is lit at 0", [0, 1, 1, 0]),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_glue(tmp_path / "glue")


@pytest.mark.parametrize("name", DEV)
def test_dev_columns_of_each_task(folder: Path, name: str) -> None:
    found = read_glue(folder, BY_NAME[name], "dev")
    first, second, labels = DEV[name]
    assert (found.examples[0].first, found.examples[0].second) == (first, second)
    assert [one.label for one in found.examples] == labels
    assert [one.index for one in found.examples] == list(range(len(labels)))
    assert found.num_rows == len(labels)
    assert not found.faults


@pytest.mark.parametrize("name", [task.name for task in TASKS])
def test_train_and_test_of_each_task(folder: Path, name: str) -> None:
    task = BY_NAME[name]
    test = read_glue(folder, task, "test")
    assert [one.index for one in test.examples] == list(range(test.num_rows))
    assert {one.label for one in test.examples} == {None}
    assert all((one.second is not None) == task.is_pair for one in test.examples)
    assert test.examples[0].first != test.examples[0].second
    if task.train is None:
        with pytest.raises(GlueError, match="AX has no train file"):
            read_glue(folder, task, "train")
    else:
        train = read_glue(folder, task, "train")
        assert all(one.label is not None for one in train.examples)


def test_mnlis_label_is_the_gold_one(folder: Path) -> None:
    train = read_glue(folder, BY_NAME["MNLI-m"], "train")  # label1: entailment, neutral
    assert [BY_NAME["MNLI-m"].labels[int(one.label or 0)] for one in train.examples] == [
        "neutral", "contradiction",
    ]  # fmt: skip


def test_rows_end_at_line_feeds_only_and_quotes_are_text(folder: Path) -> None:
    odd = 'a "b\u2028c\x85d\x0b\x1ce " f'
    rows = [["sentence", "label"], [odd, "1"], ['"', "0"]]
    write_rows(folder / "SST-2/dev.tsv", rows, end="\r\n")
    path = folder / "SST-2/dev.tsv"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    found = read_glue(folder, BY_NAME["SST-2"], "dev")
    assert [one.first for one in found.examples] == [odd, '"']
    assert not found.faults


def test_misfits_are_left_out_and_told(folder: Path) -> None:
    rows = [*FILES["QQP/dev.tsv"]]
    rows[2:2] = [
        ["1", "2", "3", "When?"],
        ["1", "2", "3", "a", "b", ""],
        [""],
        ["9", "1", "2", "a", "b", "maybe"],
    ]
    write_rows(folder / "QQP/dev.tsv", rows)
    found = read_glue(folder, BY_NAME["QQP"], "dev")
    assert found.faults == {"not 6 columns": (3, 5), "no label of the task": (4, 6)}
    assert [one.index for one in found.examples] == [0, 5, 6, 7]
    assert found.num_rows == 8
    first, second, third = found.notes()
    assert first.endswith("dev.tsv: 2 of 8 rows left out: not 6 columns: line 3, 5")
    assert "line 4, 6" in second
    assert "has 8 rows, the official QQP 40,430: scores are not comparable" in third


def test_disagreement_of_mnli_is_no_label_and_a_score_lies_in_range(folder: Path) -> None:
    rows = [list(row) for row in FILES["MNLI/dev_matched.tsv"]]
    rows[1][-1] = "-"
    write_rows(folder / "MNLI/dev_matched.tsv", rows)
    assert len(read_glue(folder, BY_NAME["MNLI-m"], "dev").examples) == 3
    rows = [list(row) for row in FILES["STS-B/dev.tsv"]]
    rows[1][-1], rows[2][-1] = "5.001", "nan"
    write_rows(folder / "STS-B/dev.tsv", rows)
    found = read_glue(folder, BY_NAME["STS-B"], "dev")
    assert found.faults == {"no label of the task": (2, 3)}


def test_a_test_row_keeps_its_place(folder: Path) -> None:
    write_rows(folder / "RTE/test.tsv", [["index", "sentence1", "sentence2"], ["4", "a", "b"],
                                         ["2", "a"]])  # fmt: skip
    found = read_glue(folder, BY_NAME["RTE"], "test")
    assert [(one.index, one.first, one.second) for one in found.examples] == [
        (4, "a", "b"), (2, "a", ""),
    ]  # fmt: skip
    assert "1 of 2 rows kept as they are: not 3 columns: line 3" in found.notes()[0]


def test_an_empty_sentence_is_a_sentence(folder: Path) -> None:
    write_rows(folder / "RTE/dev.tsv", [FILES["RTE/dev.tsv"][0], ["0", "a", "", "entailment"]])
    assert read_glue(folder, BY_NAME["RTE"], "dev").examples[0].second == ""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is empty"),
        (b"a\xff\n", "byte 1 is no UTF-8"),
        (b"index\tsentence1\tlabel\n0\ta\tentailment\n", "lacks the columns sentence2; its own"),
        (b"index\tsentence1\tsentence2\tlabel\n", "it has no row that can be used"),
        (b"index\tsentence1\tsentence2\tlabel\n0\ta\tb\t1\n", "no label of the task: line 2"),
    ],
)
def test_a_file_that_is_none_is_one_message(folder: Path, content: bytes, message: str) -> None:
    (folder / "RTE/dev.tsv").write_bytes(content)
    with pytest.raises(GlueError, match=message) as raised:
        read_glue(folder, BY_NAME["RTE"], "dev")
    assert "RTE/dev.tsv" in str(raised.value)


def test_without_a_header_most_rows_say_how_many_columns_there_are(folder: Path) -> None:
    rows = FILES["CoLA/dev.tsv"]
    write_rows(folder / "CoLA/dev.tsv", [["gj04", "1"], *rows])
    found = read_glue(folder, BY_NAME["CoLA"], "dev")
    assert found.faults == {"not 4 columns": (1,)}
    assert [one.index for one in found.examples] == [1, 2, 3, 4]


def test_a_cola_file_with_too_few_columns_is_none(folder: Path) -> None:
    write_rows(folder / "CoLA/dev.tsv", [["sentence", "label"], ["a", "1"]])
    with pytest.raises(GlueError, match="lacks the columns 3; its own are 0, 1"):
        read_glue(folder, BY_NAME["CoLA"], "dev")


def test_indices_are_numbers_and_unique(folder: Path) -> None:
    head = ["index", "sentence"]
    write_rows(folder / "CoLA/test.tsv", [head, ["0", "a"], ["x", "b"]])
    with pytest.raises(GlueError, match=r"test\.tsv: row 1: index: got 'x'"):
        read_glue(folder, BY_NAME["CoLA"], "test")
    write_rows(folder / "CoLA/test.tsv", [head, ["3", "a"], ["3", "b"]])
    with pytest.raises(GlueError, match="index 3 stands in 2 rows"):
        read_glue(folder, BY_NAME["CoLA"], "test")


def test_a_folder_in_a_files_place_is_one_message(folder: Path) -> None:
    (folder / "RTE/dev.tsv").unlink()
    (folder / "RTE/dev.tsv").mkdir()
    with pytest.raises(GlueError, match="cannot be read: is a folder"):
        read_glue(folder, BY_NAME["RTE"], "dev")


def test_missing_files_are_named(folder: Path) -> None:
    assert missing_files(folder) == {}
    (folder / "MNLI/train.tsv").unlink()
    (folder / "QQP/test.tsv").unlink()
    assert missing_files(folder) == {
        "QQP": ["QQP/test.tsv"], "MNLI-m": ["MNLI/train.tsv"], "MNLI-mm": ["MNLI/train.tsv"],
    }  # fmt: skip
    assert missing_files(folder, [BY_NAME["QQP"]], ["train", "dev"]) == {}
    with pytest.raises(GlueError, match=r"QQP: .*QQP/test\.tsv is missing"):
        read_glue(folder, BY_NAME["QQP"], "test")
    assert set(missing_files(folder / "none")) == set(BY_NAME)


def test_a_part_of_the_training_set_is_taken_and_told(folder: Path) -> None:
    (folder / "QNLI/train.tsv").rename(folder / "QNLI/train_subset4.tsv")
    found = read_glue(folder, BY_NAME["QNLI"], "train")
    assert found.path.name == "train_subset4.tsv"
    assert "the official QNLI 104,743" in found.notes()[0]


@pytest.mark.skipif(not REAL.is_dir(), reason="needs ../shared/data/glue")
def test_the_real_files() -> None:
    counts: dict[tuple[str, Split], int] = {}
    unofficial = set()
    for task in TASKS:
        for split in SPLITS:
            if find_file(REAL, task, split) is None:
                continue
            found = read_glue(REAL, task, split)
            counts[task.name, split] = len(found.examples)
            assert not found.faults
            if not found.is_official:
                unofficial.add((task.name, split))
            else:
                assert found.num_rows == found.num_official_rows
    assert unofficial == {("QNLI", "train"), ("QQP", "train"), ("QQP", "dev")}
    assert counts["QNLI", "train"] == 10_475
    assert set(missing_files(REAL)) == {"QQP", "MNLI-m", "MNLI-mm"}
