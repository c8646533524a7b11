"""launch/glue.py train and launch/squad.py train: each mistake is one message with exit code 2.

Nothing here comes as far as training; tests/integration/test_fine_tuning.py does.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from fine_tuned import main_of, swap_two_tokens, write_model
from glue_sets import write_glue
from squad_sets import VERSION_1

Files = dict[str, Path]
Change = Callable[[Files], object]


@dataclass(frozen=True)
class Case:
    """A command, what is wrong with its files, and what it says."""

    words: str
    message: str
    change: Change = lambda _: None
    variables: tuple[tuple[str, str], ...] = ()


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fine_tuning")
    write_model(folder / "run")
    write_glue(folder / "glue")
    shutil.copy(VERSION_1, folder / "learn.json")
    shutil.copy(VERSION_1, folder / "dev.json")
    (folder / "engine.json").write_text('{"optimizer": {"type": "AdamW"}}')
    return folder


@pytest.fixture
def files(originals: Path, tmp_path: Path) -> Files:
    """Copies that a test may spoil, by the words of a command."""
    shutil.copytree(originals, tmp_path / "files")
    found = {path.name.partition(".")[0]: path for path in (tmp_path / "files").iterdir()}
    return found | {"out": tmp_path / "out", "none": tmp_path / "none"}


def squad(change: Callable[[dict[str, object]], object], name: str) -> Change:
    """Change what the questions of a SQuAD file say."""

    def spoil(files: Files) -> None:
        content = json.loads(files[name].read_text())
        for article in content["data"]:
            for paragraph in article["paragraphs"]:
                for question in paragraph["qas"]:
                    change(question)
        files[name].write_text(json.dumps(content))

    return spoil


def tokens(change: Callable[[dict[str, object]], object]) -> Change:
    """Change the vocabulary of a run that does not say which one it has."""

    def spoil(files: Files) -> None:
        shutil.rmtree(files["run"])
        write_model(files["run"], names_tokenizer=False)
        path = files["run"] / "tokenizer/tokenizer.json"
        content = json.loads(path.read_text())
        change(content["model"]["vocab"])
        content["added_tokens"] = []
        path.write_text(json.dumps(content))

    return spoil


def train_tsv(content: bytes) -> Change:
    return lambda files: (files["glue"] / "CoLA/train.tsv").write_bytes(content)


def as_folder(files: Files) -> None:
    (files["glue"] / "CoLA/train.tsv").unlink()
    (files["glue"] / "CoLA/train.tsv").mkdir()


GLUE = "glue.py train run glue --out out --tasks CoLA"
SQUAD = "squad.py train run learn dev --out out"
TWO_RANKS = (("RANK", "0"), ("WORLD_SIZE", "2"))

BOTH = [
    ("--seeds 0 --first-seed 0 --processes 0 --epochs 0 --batch-size -1 --learning-rate nan "
     "--dropout 1",
     "error: 7 faults in the configuration:\n  - --seeds: got 0; allowed: 1 or more\n"),
    ("--learning-rate 2", "--learning-rate: got 2.0; allowed: above 0, at most 1"),
    ("--dropout nan", "--dropout: got nan; allowed: 0 or more, below 1"),
    ("--batch-size 100000000", "global_batch_size: got 100000000; allowed: "),
    ("--first-seed 99999999999", "seed: got 99999999999; allowed: "),
    ("--deepspeed_config none", "none: "),
    ("--tag stage9_end", "no committed checkpoint 'stage9_end'"),
    ("--tokenizer none", "none: cannot be read: No such file"),
]  # fmt: skip
CASES: dict[str, Case] = {
    **{f"{command.split('.')[0]} {words}": Case(f"{command} {words}", message)
       for command in (GLUE, SQUAD) for words, message in BOTH},
    "model missing": Case("glue.py train none glue --out out", "none: no such folder"),
    "model is a file": Case("glue.py train engine glue --out out", "engine.json: no such folder"),
    "no model": Case("glue.py train glue glue --out out", "glue: no config.json, this is not a"),
    "no checkpoint": Case(GLUE, "no committed checkpoint yet; train first",
                          lambda files: shutil.rmtree(files["run"] / "checkpoints")),
    "recipe broken": Case(GLUE, "recipe.json",
                          lambda files: (files["run"] / "recipe.json").write_text("{")),
    "weights broken": Case(GLUE, "weights.safetensors: missing or changed since",
                           lambda files: (files["run"] / "checkpoints/end/weights.safetensors")
                           .write_bytes(b"1")),
    "glue missing": Case("glue.py train run none --out out", "no task can be trained:\n  - CoLA: "),
    "only WNLI": Case("glue.py train run glue --out out --tasks WNLI", "WNLI: is not trained"),
    "train empty": Case(GLUE, "CoLA/train.tsv: no table: it is empty", train_tsv(b"")),
    "train binary": Case(GLUE, "CoLA/train.tsv: no table: byte 0 is no UTF-8",
                         train_tsv(b"\xff\xfe\x00")),
    "train of another task": Case(GLUE, "CoLA/train.tsv: no GLUE file of this task: it lacks the",
                                  train_tsv(b"sentence\tlabel\nlamp\t1\n")),
    "train without labels": Case(GLUE, "it has no row that can be used",
                                 train_tsv(b"a\t7\tb\tlamp\n")),
    "train is a folder": Case(GLUE, "CoLA/train.tsv", as_folder),
    "grid and more": Case(f"{GLUE} --grid --epochs 3 --learning-rate 1e-3",
                          "--grid finds --epochs, --learning-rate; leave out one or the other"),
    "both grids": Case(f"{GLUE} --grid --grid-from none", "--grid searches, --grid-from does not"),
    "no grid there": Case(f"{GLUE} --grid-from none",
                          "none/grid/batch16_rate5e-05_epochs3/CoLA.json is missing; the grid of "),
    "glue ranks": Case(GLUE, "fine-tuning got 2 ranks; allowed: 1, started without the launcher",
                       variables=TWO_RANKS),
    "squad ranks": Case(SQUAD, "fine-tuning got 2 ranks; allowed: 1", variables=TWO_RANKS),
    "JSON broken": Case(f"{GLUE} --deepspeed_config engine", "engine.json",
                        lambda files: files["engine"].write_text("{")),
    "JSON unknown": Case(f"{SQUAD} --deepspeed_config engine", "engine.json: optimiser: unknown",
                         lambda files: files["engine"].write_text('{"optimiser": {}}')),
    "out is a file": Case("glue.py train run glue --out engine", "engine.json cannot be written: "),
    "out below a file": Case("squad.py train run learn dev --out engine/out",
                             "--out: engine/out cannot be written: "),
    "other tokens": Case(GLUE, "is not the tokenizer that",
                         lambda files: swap_two_tokens(files["run"] / "tokenizer/tokenizer.json")),
    "too many tokens": Case(GLUE, "has ids up to 200, but the model's vocabulary 128",
                            tokens(lambda vocabulary: vocabulary.update(zebra=200))),
    "no special tokens": Case(GLUE, "the tokenizer has no token [CLS] or <s> or <cls>",
                              tokens(lambda vocabulary: vocabulary.pop("[CLS]"))),
    "squad missing": Case("squad.py train run none dev --out out", "none: cannot be read"),
    "squad dev missing": Case("squad.py train run learn none --out out", "none: cannot be read"),
    "squad broken": Case(SQUAD, "learn.json: no SQuAD file of version 1.1 or 2.0",
                         lambda files: files["learn"].write_text('{"data": ')),
    "squad without answers": Case(
        SQUAD, "learn.json: 19 questions have no answer and are not impossible",
        squad(lambda question: question.pop("answers"), "learn")),
    "dev without answers": Case(
        SQUAD, "dev.json: 19 questions have no answer and are not impossible",
        squad(lambda question: question.pop("answers"), "dev")),
    "answers elsewhere": Case(
        SQUAD, "nothing to train on: no question has a usable answer",
        squad(lambda question: question.update(answers=[{"text": "zebra", "answer_start": 0}]),
              "learn")),
    "windows too long": Case(f"{SQUAD} --max-seq-length 49",
                             "--max-seq-length: got 49; allowed: at most 48, the model's longest"),
    "windows too short": Case(f"{SQUAD} --max-seq-length 4 --max-query-length 2",
                              "max_seq_length: got 4; allowed: more than max_query_length 2"),
    "no stride": Case(f"{SQUAD} --doc-stride 0", "doc_stride: got 0; allowed: an integer at least"),
    "no answers": Case(f"{SQUAD} --n-best-size 0 --max-answer-length 0",
                       "n_best_size: got 0; allowed: an integer at least 1\n  - max_answer_length"),
    "no threshold": Case(f"{SQUAD} --null-score-diff-threshold nan",
                         "--null-score-diff-threshold: got nan"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_each_mistake_is_one_message(
    name: str, files: Files, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[name]
    case.change(files)
    for variable, value in case.variables:
        monkeypatch.setenv(variable, value)
    script, *words = case.words.split()
    given = [str(files.get(word, word)).replace("engine/out", str(files["engine"] / "out"))
             for word in words]  # fmt: skip
    assert main_of(script, *given) == 2
    said = capsys.readouterr()
    told = said.err.replace(str(files["engine"]), files["engine"].name)
    assert case.message.replace("engine/out", "engine.json/out") in told
    assert said.err.count("error: ") == 1
    assert said.out == ""
    assert not list(files["out"].rglob("*.json"))


def test_a_mistake_can_be_read_as_json(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    for script, words in (("glue.py", ["glue"]), ("squad.py", ["learn", "dev"])):
        given = [files["none"], *(files[word] for word in words), "--out", files["out"], "--json"]
        assert main_of(script, "train", *given) == 2
        said = capsys.readouterr()
        assert json.loads(said.err)["error"].endswith("none: no such folder")
        assert said.out == ""


def test_ctrl_c_is_exit_code_3(
    files: Files, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    for module in ("glue_runs", "squad_runs"):
        monkeypatch.setattr(f"stacking.{module}.run_job", stop)
    for command in (GLUE, SQUAD):
        script, *words = command.split()
        assert main_of(script, *(files.get(word, word) for word in words)) == 3
        *told, last = capsys.readouterr().err.splitlines()
        assert last == "error: stopped; the same command goes on from here"
        assert [line.split(": has ")[0] for line in told] == [
            str(files["glue"] / f"CoLA/{split}.tsv") for split in ("train", "dev", "test")
            if script == "glue.py"
        ]  # fmt: skip


def test_a_disk_that_is_full_is_a_message_and_a_fault_of_ours_is_not(
    files: Files, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "CoLA.tsv")

    def wrong(*_: object) -> None:
        raise OSError("ours")

    script, *words = GLUE.split()
    given = [files.get(word, word) for word in words]
    monkeypatch.setattr("stacking.glue_runs.run_job", full)
    assert main_of(script, *given) == 2
    assert "No space left on device: 'CoLA.tsv'" in capsys.readouterr().err
    monkeypatch.setattr("stacking.glue_runs.run_job", wrong)
    with pytest.raises(OSError, match="ours"):
        main_of(script, *given)
