"""The report counts each step once whatever happened to the run; the page needs nothing else."""

import json
import math
import re
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from browser import measured, needs_browser
from matplotlib.figure import Figure

from stacking import report_figures, report_growth_figures
from stacking.errors import UserError
from stacking.report import read_metrics, summarize, write_report
from stacking.report_figures import smoothed
from stacking.report_growth_figures import gradient_caption
from stacking.report_html import scaled
from stacking.report_metrics import RunMetrics

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


def with_telemetry() -> list[Row]:
    """The same run by a version that measures hidden states and gradients; its loss spikes."""
    rows = []
    for row in whole_run():
        stage = row.get("stage", 0)
        if row["event"] == "train":
            step = int(str(row["global_step"]))
            loss = 6.75 if step == 8 else row["mlm_loss"]
            norms = {"grad_norm_old": 0.6, "grad_norm_new": 0.8} if stage else {}
            rows.append({**row, "mlm_loss": loss, "grad_norm": 1.0, **norms})
        elif row["event"] == "evaluation":
            rows.append({**row, "residual_rms": [0.5 + 0.25 * i for i in range(7 if stage else 4)]})
        elif row["event"] == "stage_switch":
            sizes = {"residual_rms_before": [0.5, 0.75, 1.0, 1.25],
                     "residual_rms_after": [0.5, 0.75, 1.0, 1.25, 1.5, 1.75, None]}  # fmt: skip
            rows.append({**row, **sizes})
        else:
            rows.append(row)
    return rows


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


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0"), (950, "950"), (6400, "6,400"), (9999.4, "9,999"), (9999.6, "10.0 k"),
        (12_345, "12.3 k"), (999_960, "1.0 M"), (1e10, "10.0 G"), (3.2e21, "3.2 Z"),
        (1e30, "1,000,000.0 Y"), (math.nan, "not known yet"), (0.05, "0.05"),
    ],
)  # fmt: skip
def test_counts_of_any_size_are_short(value: float, shown: str) -> None:
    assert scaled(value) == shown


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


def test_the_page_names_the_weights_that_a_run_began_with(tmp_path: Path) -> None:
    rows = whole_run()
    start = {"start_from": "models/a<b>", "start_sha256": "ab" * 32}
    write(tmp_path, [{**rows[0], **start}, *rows[1:]])
    text = write_report(tmp_path).read_text()
    assert f"the weights of models/a&lt;b&gt;, sha256 {'ab' * 32}" in text
    write(tmp_path, rows)
    assert "the weights of" not in write_report(tmp_path).read_text()


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


def test_each_growth_says_how_high_the_loss_rose_and_when_it_was_back(tmp_path: Path) -> None:
    rows = [*with_telemetry()[:-4], train_row(9, 1, 8.5), train_row(10, 1, 6.0)]
    write(tmp_path, rows)  # before: the mean of 8, 7, 6; after, by steps: 6.75, 6.75 8.5, ... 6
    summary = summarize(read_metrics(tmp_path / "metrics.jsonl"))
    (growth,) = summary.growths
    assert (growth.height, growth.steps_to_recover, growth.probe_change) == (1.5, 4, 0.25)
    assert "+1.500 (noise 1.000) nats, recovered in 4 steps" in summary.text()
    row = summary.row()
    assert row["growths"] == [{
        "global_step": 6, "spike_nats": 1.5, "noise_nats": 1.0, "steps_to_recover": 4,
        "recovery": "recovered in 4 steps", "probe_change_nats": 0.25,
    }]  # fmt: skip
    assert row["unigram_loss"] == UNIGRAM
    text = write_report(tmp_path).read_text()
    assert "<td>+1.500 (noise 1.000)</td><td>recovered in 4 steps</td>" in text
    json.dumps(row, allow_nan=False)


@pytest.mark.parametrize("count", [1, 6, 7])
def test_what_an_unfinished_run_does_not_know_is_null(tmp_path: Path, count: int) -> None:
    summary = summarize(read_metrics(write(tmp_path, with_telemetry()[:count])))
    row = summary.row()
    json.dumps(row, allow_nan=False)
    words = [growth.recovery for growth in summary.growths]
    assert words == {1: [], 6: ["not known yet"], 7: ["never rose"]}[count]


def test_what_was_measured_of_growth_is_read_and_drawn(tmp_path: Path) -> None:
    run = read_metrics(write(tmp_path, with_telemetry()))
    assert [(row.global_step, row.stage, len(row.rms)) for row in run.residuals] == [
        (6, 0, 4), (6, 1, 7), (10, 1, 7),
    ]  # fmt: skip
    assert math.isnan(run.residuals[1].rms[-1])
    assert (run.train[-1].grad_norm_old, run.train[-1].grad_norm_new) == (0.6, 0.8)
    assert math.isnan(run.train[0].grad_norm_old)
    text = write_report(tmp_path).read_text()
    for caption in ("Size of the hidden states in validation", "in the probe at each growth",
                    "Gradient norm, and apart", "Cosine between copies"):  # fmt: skip
        assert caption in text


def many_stages() -> list[Row]:
    """Seven growths of 40 steps each and a long stage, a spike of one nat after each."""
    start = start_row((*[40] * 7, 720))
    for layers, stage in enumerate(start["stages"], start=1):  # type: ignore[arg-type, var-annotated]
        stage["num_hidden_layers"] = layers
    rows = [start]
    for step in range(10, 1001, 10):
        stage = min((step - 1) // 40, 7)
        if stage and (step - 10) == 40 * stage:
            growth = {**switch_row(step - 10), "to_stage": stage}
            rows.append({k: v for k, v in growth.items() if "residual" not in k})
        spike = 1.0 if stage and step - 10 == 40 * stage else 0.0
        rows.append(train_row(step, stage, 5.0 + spike))
    return rows


def drawn(path: Path, draw: Callable[[RunMetrics], object], module: ModuleType) -> Figure:
    """The figure that `draw` makes."""
    found: list[Figure] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "image_bytes", lambda figure, _: found.append(figure))
        draw(read_metrics(path))
    found[0].draw_without_rendering()
    return found[0]


def test_no_two_names_or_labels_overlap_however_many_stages_there_are(tmp_path: Path) -> None:
    path = write(tmp_path, many_stages())
    axes = drawn(path, lambda run: report_figures.loss_over_steps(run, "svg"), report_figures).axes[
        0
    ]
    texts = [text for text in axes.texts if text.get_text()]
    words = [text.get_text() for text in texts]
    assert words[:8] == ["1", "2", "3", "4", "5", "6", "7", "8 layers"]
    assert any("recovered in" in word for word in words[8:])
    boxes = [text.get_window_extent() for text in texts]
    assert not [(a, b) for a, b in combinations(boxes, 2) if a.overlaps(b)]


def test_gradient_norms_end_with_their_stage_and_a_single_one_is_seen(tmp_path: Path) -> None:
    rows = [start_row((60, 20, 60)), *(train_row(step, 0, 5.0) for step in range(10, 61, 10))]
    for stage, steps in ((1, (70, 80)), (2, range(90, 141, 10))):
        rows.append({**switch_row(60 if stage == 1 else 80), "to_stage": stage})
        rows += [train_row(step, stage, 5.0) for step in steps]
    kept = [{k: v for k, v in row.items() if "residual" not in k} for row in rows]
    for row in kept:
        step = row.get("global_step", 0)
        if row["event"] == "train" and (step == 70 or int(str(step)) > 80):
            row |= {"grad_norm": 0.9, "grad_norm_old": 0.85, "grad_norm_new": 1.0}
    path = write(tmp_path, kept)
    axes = drawn(path, report_growth_figures.gradient_norms, report_growth_figures).axes[0]
    lines = [line for line in axes.lines if line.get_label() == "new ones"]
    assert [np.asarray(line.get_xdata()).tolist() for line in lines] == [
        [70],
        [90, 100, 110, 120, 130, 140],
    ]
    assert [line.get_marker() for line in lines] == ["o", "None"]
    low, high = axes.get_ylim()
    assert sum(low <= tick <= high for tick in axes.get_yticks()) >= 3
    assert len(axes.get_legend().get_texts()) == 3  # type: ignore[union-attr]
    assert gradient_caption(read_metrics(path)).endswith("of new ones")
    for row in kept:
        if row.get("global_step") == 70:
            row.pop("grad_norm_old", None)
            row.pop("grad_norm_new", None)
    caption = gradient_caption(read_metrics(write(tmp_path, kept)))
    assert caption.endswith("(not measured in stage 2: too short)")
    for row in kept:
        row.pop("grad_norm_old", None)
        row.pop("grad_norm_new", None)
    assert gradient_caption(read_metrics(write(tmp_path, kept))).endswith("of all parameters")


def test_a_run_of_an_older_version_has_no_empty_figures(tmp_path: Path) -> None:
    rows = [{**row, "duplicate_similarity": {}} for row in whole_run()]
    write(tmp_path, rows)
    text = write_report(tmp_path).read_text()
    assert text.count("<figure") == 4
    assert "hidden states" not in text


def test_sizes_of_another_model_are_refused(tmp_path: Path) -> None:
    rows = with_telemetry()
    rows[4]["residual_rms"] = [1.0, 2.0]
    write(tmp_path, rows)
    with pytest.raises(UserError, match="2 sizes of hidden states in a model of 3 layers"):
        write_report(tmp_path)
    rows[4]["residual_rms"] = "1.0"
    write(tmp_path, rows)
    with pytest.raises(UserError, match="residual_rms is 1.0, no list"):
        write_report(tmp_path)


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize("width", [1200, 500])
def test_a_browser_shows_every_figure_and_nothing_too_wide(tmp_path: Path, width: int) -> None:
    write(tmp_path, with_telemetry())
    shown = measured(write_report(tmp_path), tmp_path, width)
    assert shown == {"pictures": 8, "broken": 0, "tooWide": False}


@pytest.mark.parametrize(("last", "words"), [(9, "yet, after 3 steps"), (10, "stage's 4 steps")])
def test_a_loss_that_does_not_come_back_is_told(tmp_path: Path, last: int, words: str) -> None:
    rows = [*with_telemetry()[:-4], *(train_row(step, 1, 9.0) for step in range(8, last + 1))]
    (growth,) = summarize(read_metrics(write(tmp_path, rows))).growths
    assert growth.recovery.startswith("not recovered")
    assert growth.recovery.endswith(words)
    assert growth.steps_to_recover is None
