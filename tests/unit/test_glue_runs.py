"""What is trained, with which setting and seed, and what is done already; training is stubbed."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from fine_tuned import write_model
from glue_sets import write_glue

from stacking import glue_runs, glue_training
from stacking.errors import ConfigError, NonFiniteError
from stacking.fine_tuning import Examples, Rows, Setting
from stacking.fine_tuning_jobs import Asked, Start
from stacking.glue_data import GlueError
from stacking.glue_outcome import training_json, training_lines
from stacking.glue_runs import GlueOutcome, GlueRequest, file_notes, fine_tune_all
from stacking.glue_scores import score_folders
from stacking.glue_tasks import BY_NAME, GridPoint
from stacking.glue_training import GlueJob, GlueResult, run_job

BEST = GridPoint(batch_size=32, learning_rate=3e-5, num_epochs=4)


@dataclass
class Stub:
    """In place of run_job: a score by the setting; notes what it was asked."""

    asked: list[GlueJob] = field(default_factory=list)

    def __call__(self, job: GlueJob) -> GlueResult:
        self.asked.append(job)
        point = GridPoint(job.setting.batch_size, job.setting.learning_rate, job.setting.num_epochs)
        score = 90.0 if point == BEST else 70.0
        scores = {str(name): score + job.seed / 10 for name in BY_NAME[job.task].metrics}
        result = {"scores": scores, "seconds": 1.0, "conditions": job.conditions()}
        job.folder.mkdir(parents=True, exist_ok=True)
        job.result.write_text(json.dumps(result))
        for path in job.files():
            path.parent.mkdir(exist_ok=True)
            path.touch()
        return GlueResult(job, scores, 1.0)


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Stub:
    found = Stub()
    monkeypatch.setattr(glue_runs, "run_job", found)
    return found


@pytest.fixture
def request_of(tmp_path: Path) -> Any:
    """Return `(tasks, **changes) -> GlueRequest` on one model and one GLUE folder."""
    start = Start(write_model(tmp_path / "run"))
    glue = write_glue(tmp_path / "glue")

    def make(names: str, grid: bool = False, **asked: Any) -> GlueRequest:
        tasks = tuple(BY_NAME[name] for name in names.split())
        return GlueRequest(start, Asked(**asked), glue, tmp_path / "out", tasks, grid)

    return make


def run(request: GlueRequest) -> GlueOutcome:
    return fine_tune_all(request, lambda *_: None)


def test_each_task_has_its_recipe_and_each_seed_its_folder(stub: Stub, request_of: Any) -> None:
    outcome = run(request_of("RTE STS-B", num_seeds=2, first_seed=3))
    asked = [(job.task, job.seed, job.folder.name) for job in stub.asked]
    assert asked == [("RTE", 3, "seed_3"), ("RTE", 4, "seed_4"),
                     ("STS-B", 3, "seed_3"), ("STS-B", 4, "seed_4")]  # fmt: skip
    settings = {job.task: job.setting for job in stub.asked}
    assert settings == {"RTE": Setting(4, 16, 3e-5, 0.1, 0.01, 0.0, 0.1),
                        "STS-B": Setting(4, 32, 5e-5, 0.1, 0.01, 0.0, 0.1)}  # fmt: skip
    assert outcome.scores("RTE") == pytest.approx([70.3, 70.4])
    assert "RTE       70.35 +- 0.64   (2 seeds, 95 % interval)" in training_lines(outcome)


def test_flags_replace_the_recipe(stub: Stub, request_of: Any) -> None:
    run(request_of("CoLA", num_epochs=7, learning_rate=1e-3, dropout=0.0))
    assert stub.asked[0].setting == Setting(7, 16, 1e-3, 0.1, 0.01, 0.0, dropout=0.0)


def test_what_is_done_is_not_done_again(stub: Stub, request_of: Any) -> None:
    first = run(request_of("CoLA SST-2"))
    told: list[tuple[str, int, int]] = []
    again = fine_tune_all(
        request_of("CoLA SST-2", num_seeds=2),
        lambda result, done, total: told.append((result.job.task, done, total)),
    )
    assert [(job.task, job.seed) for job in stub.asked[2:]] == [("CoLA", 2), ("SST-2", 2)]
    assert told == [("CoLA", 3, 4), ("SST-2", 4, 4)]
    assert [again.results[0], again.results[2]] == list(first.results)


def test_what_has_lost_its_predictions_is_done_again(
    stub: Stub, request_of: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    request = request_of("CoLA SST-2")
    run(request)
    for lost in ("dev/CoLA.tsv", "test/SST-2.tsv"):
        del stub.asked[:]
        (request.out / "seed_1" / lost).unlink()
        run(request)
        assert [job.task for job in stub.asked] == [Path(lost).stem]
        told = (
            f"{Path(lost).stem} seed 1: {request.out}/seed_1/{lost} has gone, so it is done again"
        )
        assert capsys.readouterr().err == told + "\n"
        assert (request.out / "seed_1" / lost).exists()


def test_a_diagnostic_file_that_comes_later_is_not_left_out(stub: Stub, request_of: Any) -> None:
    """AX is predicted by MNLI-m's model: without it the submission would lack a file."""
    request = request_of("MNLI-m AX")
    path = request.glue / "diagnostic/diagnostic.tsv"
    rows = path.read_bytes()
    path.unlink()
    run(request)
    path.write_bytes(rows)
    with pytest.raises(ConfigError, match=r"MNLI-m\.json: is of another test of AX; give another"):
        run(request)
    (request.out / "seed_1/MNLI-m.json").unlink()
    run(request)
    assert (request.out / "seed_1/test/AX.tsv").exists()
    path.write_bytes(rows + rows.splitlines()[-1] + b"\n")
    with pytest.raises(ConfigError, match="is of another test of AX"):
        run(request)
    assert len(stub.asked) == 2


def test_each_metric_has_its_mean_and_interval(stub: Stub, request_of: Any) -> None:
    outcome = run(request_of("CoLA MRPC", num_seeds=2))
    lines = list(training_lines(outcome))
    assert lines[0] == "CoLA      70.15 +- 0.64   (2 seeds, 95 % interval)"
    assert lines[1] == ("MRPC      70.15 +- 0.64   (2 seeds, 95 % interval)   mean of "
                        "f1 70.15 +- 0.64, accuracy 70.15 +- 0.64")  # fmt: skip
    found = training_json(outcome)["metrics"]
    assert isinstance(found, dict)
    assert {task: set(metrics) for task, metrics in found.items()} == {
        "CoLA": {"matthews"}, "MRPC": {"f1", "accuracy"}
    }  # fmt: skip
    assert found["MRPC"]["f1"] == found["CoLA"]["matthews"]
    assert found["CoLA"]["matthews"]["mean"] == pytest.approx(70.15)


def test_a_grid_tells_what_it_tries_and_what_is_level(stub: Stub, request_of: Any) -> None:
    told: list[str] = []
    outcome = fine_tune_all(
        request_of("CoLA", grid=True), lambda result, *_: told.append(result.job.name)
    )
    assert len(set(told)) == 13
    assert "CoLA with batch 32, rate 3e-05, 4 epochs" in told
    assert told[-1] == "CoLA seed 1"
    grid = training_json(outcome)["grid"]
    assert isinstance(grid, list)
    assert len(grid) == 12
    assert [row for row in grid if row["chosen"]] == [
        {"task": "CoLA", "batch_size": 32, "learning_rate": 3e-5, "num_epochs": 4, "score": 90.0,
         "chosen": True}
    ]  # fmt: skip
    level = replace(outcome, tried={"CoLA": dict.fromkeys(outcome.tried["CoLA"], 50.0)})
    assert next(training_lines(level)).endswith(
        "   batch 16, rate 5e-05, 3 epochs, level with 11 of 11 others"
    )


def test_a_grid_selects_with_a_seed_that_is_not_reported(stub: Stub, request_of: Any) -> None:
    outcome = run(request_of("CoLA MRPC", grid=True, num_seeds=2))
    tried, reported = stub.asked[:24], stub.asked[24:]
    assert {job.seed for job in tried} == {0}
    assert not any(job.predicts_test for job in tried)
    assert len({(job.task, job.folder) for job in tried}) == 24
    assert tried[0].folder == request_of("CoLA").out / "grid/batch16_rate5e-05_epochs3"
    assert outcome.chosen == {"CoLA": BEST, "MRPC": BEST}
    assert {(job.task, job.seed) for job in reported} == {
        ("CoLA", 1), ("CoLA", 2), ("MRPC", 1), ("MRPC", 2)
    }  # fmt: skip
    assert {(job.setting.batch_size, job.setting.learning_rate, job.setting.num_epochs)
            for job in reported} == {(32, 3e-5, 4)}  # fmt: skip
    assert outcome.scores("CoLA") == pytest.approx([90.1, 90.2])
    lines = list(training_lines(outcome))
    assert lines[0].endswith("batch 32, rate 3e-05, 4 epochs")
    run(request_of("CoLA MRPC", grid=True, num_seeds=3))
    assert [(job.task, job.seed) for job in stub.asked[28:]] == [("CoLA", 3), ("MRPC", 3)]


def test_another_models_grid_is_taken_over(stub: Stub, request_of: Any, tmp_path: Path) -> None:
    """The paper's rule: the baseline searches, the others train with new seeds."""
    baseline = request_of("CoLA", grid=True)
    run(baseline)
    other = replace(
        request_of("CoLA", num_seeds=2), start=Start(write_model(tmp_path / "other", seed=2)),
        out=tmp_path / "other_out", grid_from=baseline.out,
    )  # fmt: skip
    del stub.asked[:]
    outcome = run(other)
    assert outcome.chosen == {"CoLA": BEST}
    assert [(job.seed, job.setting.batch_size, job.setting.learning_rate, job.setting.num_epochs)
            for job in stub.asked] == [(1, 32, 3e-5, 4), (2, 32, 3e-5, 4)]  # fmt: skip
    assert not (other.out / "grid").exists()
    path = baseline.glue / "CoLA/dev.tsv"
    path.write_text(path.read_text() + "gj04\t1\t\tThe mill.\n")
    with pytest.raises(ConfigError, match=r"epochs3/CoLA\.json: is of another dev; "):
        run(replace(other, out=tmp_path / "third"))
    with pytest.raises(ConfigError, match="--grid-from finds --epochs; leave out one"):
        replace(other, asked=Asked(num_epochs=2))


def test_tasks_that_are_not_trained_are_named(stub: Stub, request_of: Any) -> None:
    request = request_of("CoLA QQP RTE MNLI-m WNLI AX")
    (request.glue / "QQP/train.tsv").unlink()
    for name in ("train", "dev"):
        (request.glue / f"RTE/{name}.tsv").unlink()
    outcome = run(request)
    assert outcome.skipped == {
        "QQP": f"{request.glue}/QQP/train.tsv is missing",
        "RTE": f"{request.glue}/RTE/train.tsv and {request.glue}/RTE/dev.tsv are missing",
        "WNLI": "is not trained: 0 is submitted for every row",
        "AX": "is not trained: the model of MNLI-m predicts it",
    }
    assert [job.task for job in stub.asked] == ["CoLA", "MNLI-m"]
    for split, count in (("dev", 4), ("test", 3)):
        lines = (request.out / f"seed_1/{split}/WNLI.tsv").read_text().splitlines()
        assert lines == ["index\tprediction", *(f"{n}\t0" for n in range(count))]
    found = training_json(outcome)
    assert found["skipped"] == outcome.skipped
    for path in (request.glue / "WNLI").iterdir():
        path.unlink()
    assert run(request).skipped["WNLI"] == (
        f"is not trained, and {request.glue}/WNLI/test.tsv is missing"
    )


def test_files_are_told_of_before_anything_is_trained(request_of: Any) -> None:
    """How many rows they have, and of test files that they are missing: no submission is whole."""
    request = request_of("CoLA RTE MNLI-m WNLI")
    for name in ("CoLA/test", "RTE/dev", "WNLI/test", "diagnostic/diagnostic"):
        (request.glue / f"{name}.tsv").unlink()
    told = [note.replace(f"{request.glue}/", "") for note in file_notes(request)]
    rest = "scores are not comparable with published ones"
    assert told == [
        f"CoLA/train.tsv: has 4 rows, the official CoLA 8,551: {rest}",
        f"CoLA/dev.tsv: has 4 rows, the official CoLA 1,043: {rest}",
        "CoLA/test.tsv is missing: no CoLA.tsv for the leaderboard",
        f"MNLI/train.tsv: has 2 rows, the official MNLI-m 392,702: {rest}",
        f"MNLI/dev_matched.tsv: has 4 rows, the official MNLI-m 9,815: {rest}",
        f"MNLI/test_matched.tsv: has 3 rows, the official MNLI-m 9,796: {rest}",
        f"WNLI/train.tsv: has 4 rows, the official WNLI 635: {rest}",
        f"WNLI/dev.tsv: has 4 rows, the official WNLI 71: {rest}",
        "WNLI/test.tsv is missing: no WNLI.tsv for the leaderboard",
        "diagnostic/diagnostic.tsv is missing: no AX.tsv for the leaderboard",
    ]
    (request.glue / "MNLI/test_matched.tsv").write_text("index\n0\n")
    with pytest.raises(GlueError, match=r"test_matched.tsv: .* lacks the columns sentence1"):
        file_notes(request)


def test_train_and_score_count_the_constant_in_the_same_averages(
    stub: Stub, request_of: Any
) -> None:
    request = request_of("CoLA SST-2 MRPC STS-B QQP MNLI-m MNLI-mm QNLI RTE WNLI")
    outcome = run(request)
    told = training_json(outcome)
    assert told["constants"] == {"WNLI": 50.0}  # the labels are 0, 1, 1, 0
    eight = pytest.approx(70.1)  # the stub's, with seed 1
    nine = pytest.approx((8 * 70.1 + 50) / 9)
    assert told["average"] == {"eight_tasks": eight, "leaderboard": nine, "missing": ()}
    lines = list(training_lines(outcome))
    assert "WNLI      50.00   is not trained: 0 is submitted for every row" in lines
    assert lines[-2:] == ["average of all nine, as the leaderboard's: 67.87",
                          "average of the eight without WNLI: 70.10"]  # fmt: skip
    scored = score_folders(request.glue, request.out / "seed_1/dev", [BY_NAME["WNLI"]])
    assert scored.task_scores == told["constants"]
    without = run(replace(request, tasks=request.tasks[:-1]))
    assert training_json(without)["average"] == {
        "eight_tasks": eight, "leaderboard": None, "missing": ("WNLI",)
    }  # fmt: skip


def test_nothing_that_can_be_trained_is_a_message(stub: Stub, request_of: Any) -> None:
    request = replace(request_of("CoLA WNLI"), glue=request_of("CoLA").out / "none")
    with pytest.raises(GlueError, match=r"no task can be trained:\n  - CoLA: .*\n  - WNLI:"):
        run(request)
    assert stub.asked == []


CHANGES = [
    ({"learning_rate": 1e-4}, "setting"),
    ({"num_epochs": 5}, "setting"),
    ({"batch_size": 8}, "setting"),
]


@pytest.mark.parametrize(("changes", "what"), CHANGES)
def test_another_setting_is_refused(
    stub: Stub, request_of: Any, changes: dict[str, Any], what: str
) -> None:
    run(request_of("CoLA"))
    with pytest.raises(ConfigError, match=f"CoLA.json: is of another {what}; give another --out"):
        run(request_of("CoLA", **changes))
    assert len(stub.asked) == 1


def test_other_files_are_refused(stub: Stub, request_of: Any, tmp_path: Path) -> None:
    request = request_of("CoLA")
    run(request)
    other = replace(request, start=Start(write_model(tmp_path / "other", seed=2)))
    with pytest.raises(ConfigError, match="is of another model; "):
        run(other)
    json_file = tmp_path / "other.json"
    json_file.write_text('{"optimizer": {"type": "AdamW"}}')
    with pytest.raises(ConfigError, match="is of another deepspeed_config; "):
        run(replace(request, start=replace(request.start, deepspeed_config=json_file)))
    for split in ("train", "dev", "test"):
        path = request.glue / f"CoLA/{split}.tsv"
        before = path.read_text()
        path.write_text(before + before.splitlines()[-1] + "\n")
        with pytest.raises(ConfigError, match=f"is of another {split}; "):
            run(request)
        path.write_text(before)
    run(request)
    assert len(stub.asked) == 1


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"scores": 1}', "\\xff"])
def test_a_result_that_is_none_is_refused(stub: Stub, request_of: Any, content: str) -> None:
    request = request_of("CoLA")
    (request.out / "seed_1").mkdir(parents=True)
    (request.out / "seed_1/CoLA.json").write_text(content)
    with pytest.raises(ConfigError, match=r"CoLA\.json: is no result of a fine-tuning .*delete it"):
        run(request)
    assert stub.asked == []


class FakeTuner:
    """In place of FineTuner: says class 1 with certainty."""

    notices = ("a notice",)
    precision = "fp32"
    logit = 5.0

    def __init__(self, start: object, make: object, setting: Setting, *_: object, **more: Any):
        self.setting, self.more = setting, more

    def __enter__(self) -> "FakeTuner":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def train(self, epoch: Any, tell: Any) -> None:
        for number in range(self.setting.num_epochs):
            assert len(epoch(number)) == self.more["num_rows"]

    def predict(self, examples: Examples) -> Iterator[tuple[Rows, npt.NDArray[np.float32]]]:
        targets = examples.features  # type: ignore[attr-defined]
        width = 3 if targets.targets is None or targets.targets.dtype == np.int64 else 1
        logits = np.zeros((len(examples), width), np.float32)
        logits[:, width // 2] = self.logit
        yield np.arange(len(examples)), logits


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeTuner]:
    monkeypatch.setattr(glue_training, "FineTuner", FakeTuner)
    return FakeTuner


def job_of(request: GlueRequest, task: str) -> GlueJob:
    return request.job(BY_NAME[task], 1, request.out / "seed_1")


@pytest.mark.usefixtures("fake")
def test_the_model_of_mnli_m_predicts_the_diagnostics(request_of: Any) -> None:
    request = request_of("MNLI-m MNLI-mm")
    result = run_job(job_of(request, "MNLI-m"))
    run_job(job_of(request, "MNLI-mm"))
    files = {str(path.relative_to(request.out)) for path in request.out.rglob("*.tsv")}
    assert files == {f"seed_1/{name}.tsv" for name in (
        "dev/MNLI-m", "test/MNLI-m", "test/AX", "dev/MNLI-mm", "test/MNLI-mm")}  # fmt: skip
    lines = (request.out / "seed_1/test/AX.tsv").read_text().splitlines()
    assert lines == ["index\tprediction", *(f"{n}\tentailment" for n in range(3))]
    assert result.scores == {"accuracy": 25.0}
    told = json.loads(result.job.result.read_text())
    assert told["notes"][0] == "a notice"
    assert any("scores are not comparable" in note for note in told["notes"])
    assert told["precision"] == "fp32"
    assert told["model"].endswith("run, end (step 5)")


def test_a_broken_test_file_is_told_before_anything_is_trained(
    fake: type[FakeTuner], request_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = request_of("MNLI-m")
    monkeypatch.setattr(fake, "train", None)
    (request.glue / "diagnostic/diagnostic.tsv").write_text("")
    with pytest.raises(GlueError, match="diagnostic.tsv: no table: it is empty"):
        run_job(job_of(request, "MNLI-m"))


def test_a_result_is_of_the_files_that_were_read(
    fake: type[FakeTuner], request_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not of what stands there when the training ends."""
    request = request_of("MNLI-m")
    path = request.glue / "MNLI/train.tsv"

    def train(*_: object) -> None:
        lines = path.read_text().splitlines()
        path.write_text("\n".join([*lines, lines[-1]]) + "\n")

    monkeypatch.setattr(fake, "train", train)
    run(request)
    with pytest.raises(ConfigError, match="is of another train; "):
        run(request)


def test_a_logit_that_is_no_number_names_its_job(
    fake: type[FakeTuner], request_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = request_of("MNLI-m")
    monkeypatch.setattr(fake, "logit", float("nan"))
    with pytest.raises(NonFiniteError, match="MNLI-m seed 1: MNLI-m: the model's logits hold NaN"):
        run(request)
    assert not (request.out / "seed_1/MNLI-m.json").exists()
