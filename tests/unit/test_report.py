"""The report counts each step once whatever happened to the run; the page needs nothing else."""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from stacking.errors import UserError
from stacking.report import read_metrics, summarize, write_report
from stacking.report_figures import smoothed

UNIGRAM = 6.25
Row = dict[str, object]


def start_row(steps: Sequence[int] = (6, 4), name: str = "tiny") -> Row:
    stages = [{"num_hidden_layers": 3 * 2**index, "steps": count, "num_parameters": 1000 + index,
               "num_trained": 500 + index}
              for index, count in enumerate(steps)]  # fmt: skip
    return {
        "event": "run_start", "name": name, "total_steps": sum(steps), "stages": stages,
        "world_size": 2, "device": "cpu", "precision": "bf16", "unigram_loss": UNIGRAM,
    }  # fmt: skip


def train_row(step: int, stage: int, loss: float, seconds: float = 0.5) -> Row:
    return {
        "event": "train", "global_step": step, "stage": stage, "lr": 1e-3 * step, "loss": loss,
        "mlm_loss": loss, "tokens": 700 * step, "tokens_per_second": 1000.0 / (stage + 1),
        "step_seconds": seconds, "elapsed_seconds": seconds * step,
    }  # fmt: skip


def evaluation_row(step: int, stage: int, loss: float) -> Row:
    return {
        "event": "evaluation", "global_step": step, "stage": stage, "val_loss": loss,
        "val_mlm_loss": loss, "val_mlm_accuracy": 0.125, "elapsed_seconds": step / 2 + 0.25,
    }  # fmt: skip


def switch_row(step: int) -> Row:
    return {
        "event": "stage_switch", "global_step": step, "from_stage": 0, "to_stage": 1,
        "changes": {"num_hidden_layers": [3, 6], "pooling": ["mean", "none"]},
        "operator": "pooling end + depth stack", "moments": "keep",
        "duplicate_similarity": {"ffn": 1.0},
        "loss_before": 5.5, "loss_after": 5.75, "max_logit_difference": 1.5, "seconds": 2.5,
        "seconds_by_part": {"save": 1.0, "grow": 0.25},
    }  # fmt: skip


def symmetry_row(step: int, cosine: float) -> Row:
    return {"event": "symmetry", "global_step": step, "stage": 1, "steps_in_stage": step - 6,
            "duplicate_similarity": {"ffn": cosine}}  # fmt: skip


def whole_run() -> list[Row]:
    return [
        start_row(), train_row(2, 0, 8.0), train_row(4, 0, 7.0), train_row(6, 0, 6.0),
        evaluation_row(6, 0, 6.125), switch_row(6), train_row(8, 1, 5.0), train_row(10, 1, 4.5),
        evaluation_row(10, 1, 4.75), symmetry_row(10, 0.875),
        {"event": "run_end", "global_step": 10},
    ]  # fmt: skip


def write(folder: Path, rows: Sequence[Row], tail: str = "") -> Path:
    path = folder / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    return path


def test_the_headline_numbers_are_those_of_the_last_evaluation(tmp_path: Path) -> None:
    summary = summarize(read_metrics(write(tmp_path, whole_run())))
    assert summary.val_mlm_loss == 4.75
    assert summary.unigram_loss == UNIGRAM
    assert summary.nats_below_unigram == UNIGRAM - 4.75
    assert summary.is_finished
    assert (summary.global_step, summary.total_steps, summary.tokens) == (10, 10, 7000)
    assert summary.elapsed_seconds == 5.25
    assert summary.tokens_per_second == 1000.0  # the median of 1000 1000 1000 500 500


def test_a_resume_takes_the_place_of_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    rows = [
        start_row(), train_row(2, 0, 8.0), train_row(4, 0, 1.0), evaluation_row(4, 0, 1.0),
        {"event": "resume", "global_step": 2}, train_row(4, 0, 7.0),
    ]  # fmt: skip
    run = read_metrics(write(tmp_path, rows))
    assert [(row.global_step, row.mlm_loss) for row in run.train] == [(2, 8.0), (4, 7.0)]
    assert run.evaluations == ()
    assert run.num_resumes == 1


def test_a_resume_at_a_switch_keeps_what_the_checkpoint_holds(tmp_path: Path) -> None:
    rows = whole_run()
    at_switch = next(index for index, row in enumerate(rows) if row["event"] == "stage_switch") + 1
    resumed = [*rows[:at_switch], {"event": "resume", "global_step": 6}, *rows[at_switch:]]
    run, undisturbed = read_metrics(write(tmp_path, resumed)), read_metrics(write(tmp_path, rows))
    assert run.train == undisturbed.train
    assert run.evaluations == undisturbed.evaluations
    assert run.switches == undisturbed.switches


def test_a_run_resumed_before_its_end_is_unfinished(tmp_path: Path) -> None:
    rows = [*whole_run(), {"event": "resume", "global_step": 8}]
    run = read_metrics(write(tmp_path, rows))
    assert not run.is_finished
    assert run.global_step == 8


@pytest.mark.parametrize("torn", ['{"event": "train", "global_st', '{"event": "train"}'])
def test_a_line_torn_by_a_kill_does_not_count(tmp_path: Path, torn: str) -> None:
    run = read_metrics(write(tmp_path, whole_run()[:3], torn))
    assert [row.global_step for row in run.train] == [2, 4]


def test_a_stages_time_is_its_steps_time(tmp_path: Path) -> None:
    run = read_metrics(write(tmp_path, whole_run()))
    assert run.stage_seconds(0) == pytest.approx(6 * 0.5)
    assert run.stage_seconds(1) == pytest.approx(4 * 0.5)


def test_the_page_is_one_file_that_asks_for_no_other(tmp_path: Path) -> None:
    write(tmp_path, whole_run())
    page = write_report(tmp_path)
    text = page.read_text()
    assert page == tmp_path / "report.html"
    links = re.findall(r'(?:src|href)="([^"]{1,30})', text)
    assert links
    assert all(link.startswith("data:image/svg+xml;base64,") for link in links)
    assert not re.search(r"<script|<link|@import|url\(", text)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in tmp_path.iterdir()} == {
        "metrics.jsonl", "report.html", "loss.png",
    }  # fmt: skip


def test_the_page_shows_the_numbers_of_each_stage_and_switch(tmp_path: Path) -> None:
    write(tmp_path, whole_run())
    text = write_report(tmp_path).read_text()
    for shown in ("4.750", "6.250", "1.500", "12.5%", "3 &rarr; 6", "+0.250", "grow 0.25",
                  "6 of 6", "4 of 4", "1,001", "501", "bf16"):  # fmt: skip
        assert shown in text, shown
    assert "Unfinished" not in text


def test_the_same_run_gives_the_same_page(tmp_path: Path) -> None:
    write(tmp_path, whole_run())
    first = write_report(tmp_path).read_bytes()
    assert write_report(tmp_path).read_bytes() == first


def test_a_run_name_cannot_break_the_page(tmp_path: Path) -> None:
    write(tmp_path, [start_row(name="<script>$lead & co \u00e9"), *whole_run()[1:]])
    text = write_report(tmp_path).read_text()
    assert "<script" not in text
    assert "&lt;script&gt;$lead &amp; co &#233;" in text


@pytest.mark.parametrize("count", [1, 2, 4, 7])
def test_an_unfinished_run_is_reported_as_such(tmp_path: Path, count: int) -> None:
    """Nothing but the start; no evaluation; before the switch; in the second stage."""
    write(tmp_path, whole_run()[:count])
    assert "Unfinished: step" in write_report(tmp_path).read_text()


def test_a_run_of_one_stage_without_unigram_loss_is_reported(tmp_path: Path) -> None:
    start = {**start_row((6,)), "unigram_loss": None}
    write(tmp_path, [start, train_row(6, 0, 5.0), evaluation_row(6, 0, 5.0)])
    assert "not known yet" in write_report(tmp_path).read_text()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("", "no run_start row"),
        ("no json\n", "line 1"),
        ('{"global_step": 1}\n', "line 1"),
        ('{"event": "run_start", "name": "x"}\n', "KeyError"),
        (json.dumps(start_row()) + '\n{"event": "train", "global_step": "one"}\n', "global_step"),
    ],
)
def test_a_file_that_is_no_runs_metrics_is_refused(
    tmp_path: Path, content: str | None, message: str
) -> None:
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(UserError, match=message):
        write_report(tmp_path)


def test_smoothing_keeps_a_constant_and_passes_over_gaps() -> None:
    assert smoothed([3.0, math.nan, 3.0, 3.0], 5) == pytest.approx([3.0, 3.0, 3.0, 3.0])
    assert smoothed([1.0, 2.0], 1) == [1.0, 2.0]
    # Weights of age 2: the newest counts double the one before.
    assert smoothed([0.0, 3.0], 2)[-1] == pytest.approx(2.0)


def test_the_page_says_what_grew_and_whether_copies_come_apart(tmp_path: Path) -> None:
    write(tmp_path, whole_run())
    page = write_report(tmp_path).read_text()
    assert "hidden layers 3 &rarr; 6<br>pooling mean &rarr; none" in page
    assert "<td>keep</td>" in page
    cells = re.findall(r"<td[^>]*>([^<]*)</td>", page[page.index("Copies of duplicated units") :])
    assert cells[:8] == ["6", "2", "0", "1.0000", "10", "2", "4", "0.8750"]


def test_a_run_that_duplicates_nothing_has_no_such_table(tmp_path: Path) -> None:
    rows = [row for row in whole_run() if row["event"] != "symmetry"]
    rows = [{**row, "duplicate_similarity": {}} for row in rows]
    write(tmp_path, rows)
    assert "Copies of duplicated units" not in write_report(tmp_path).read_text()
