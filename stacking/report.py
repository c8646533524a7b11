"""A run folder's metrics.jsonl -> report.html, one self-contained page, and loss.png."""

import html
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from stacking import report_figures, report_growth_figures
from stacking.errors import UserError
from stacking.report_html import (
    cards,
    duration,
    figure,
    number,
    page,
    percent,
    replace_file,
    scaled,
    signed,
    table,
)
from stacking.report_metrics import RunMetrics, RunStart, read_metrics
from stacking.report_spikes import WINDOWS, Spike, spikes

__all__ = ["RunMetrics", "Summary", "read_metrics", "summarize", "write_report"]


@dataclass(frozen=True)
class Summary:
    """The headline numbers of a run; NaN where the run has not come to them."""

    name: str
    is_finished: bool
    global_step: int
    total_steps: int
    val_mlm_loss: float  # nats per masked token
    val_mlm_accuracy: float
    unigram_loss: float  # nats per masked token
    nats_below_unigram: float
    elapsed_seconds: float
    tokens: int  # padding included
    tokens_per_second: float  # median over the logged steps, without padding
    growths: tuple[Spike, ...]

    def text(self) -> str:
        """A few lines for a terminal."""
        state = "finished" if self.is_finished else "unfinished, so far"
        rows = [
            (f"run {self.name}", f"{state}: step {self.global_step:,} of {self.total_steps:,}"),
            ("validation MLM loss", f"{number(self.val_mlm_loss)} nats per masked token"),
            ("unigram loss", f"{number(self.unigram_loss)} (predicting word frequencies)"),
            ("below unigram", f"{number(self.nats_below_unigram)} nats"),
            ("masked tokens right", percent(self.val_mlm_accuracy)),
            ("training time", f"{number(self.elapsed_seconds, 0)} s"),
            ("speed", f"{number(self.tokens_per_second, 0)} tokens/s (median)"),
        ]
        rows += [
            (
                f"growth at step {growth.global_step:,}",
                f"training loss {_with_noise(growth)} nats, {growth.recovery}",
            )
            for growth in self.growths
        ]
        return "\n".join(f"{label:<20} {value}" for label, value in rows)

    def row(self) -> dict[str, object]:
        """As JSON holds it: null where a number is not known."""
        growths = [
            {
                "global_step": growth.global_step,
                "spike_nats": _known(growth.height),
                "noise_nats": _known(growth.noise),
                "steps_to_recover": growth.steps_to_recover,
                "recovery": growth.recovery,
                "probe_change_nats": _known(growth.probe_change),
            }
            for growth in self.growths
        ]
        numbers = {name: _known(value) for name, value in vars(self).items()}
        return {**numbers, "growths": growths}


def _known(value: object) -> object:
    return None if isinstance(value, float) and math.isnan(value) else value


def write_report(run_dir: Path) -> Path:
    """Write RUN_DIR/report.html and RUN_DIR/loss.png; returns the page's path. Raises UserError."""
    run = read_metrics(run_dir / "metrics.jsonl")
    path = run_dir / "report.html"
    try:
        replace_file(run_dir / "loss.png", report_figures.loss_over_steps(run, "png"))
        replace_file(path, _page(run))
    except OSError as error:
        raise UserError(f"{run_dir}: the report cannot be written there: {error}") from error
    return path


def summarize(run: RunMetrics) -> Summary:
    """The headline numbers."""
    last = run.evaluations[-1] if run.evaluations else None
    loss = last.val_mlm_loss if last else math.nan
    rates = [row.tokens_per_second for row in run.train]
    return Summary(
        name=run.start.name,
        is_finished=run.is_finished,
        global_step=run.global_step,
        total_steps=run.start.total_steps,
        val_mlm_loss=loss,
        val_mlm_accuracy=last.val_mlm_accuracy if last else math.nan,
        unigram_loss=run.start.unigram_loss,
        nats_below_unigram=run.start.unigram_loss - loss,
        elapsed_seconds=run.elapsed_seconds,
        tokens=run.train[-1].tokens if run.train else 0,
        tokens_per_second=median(rates) if rates else math.nan,
        growths=tuple(spikes(run)),
    )


def _page(run: RunMetrics) -> bytes:
    depths = " &rarr; ".join(str(stage.num_hidden_layers) for stage in run.start.stages)
    plural = "s" if len(run.start.stages) != 1 else ""
    summary = summarize(run)
    parts = [
        _banner(summary),
        _cards(summary),
        f'<div class="figures">{_figures(run)}</div>',
        "<h2>Stages</h2>",
        _stage_table(run),
        "<h2>Stage switches</h2>",
        _switch_table(run) + _growth_figures(run) + _symmetry_table(run),
        "<h2>Where it ran</h2>",
        _environment(run),
    ]
    lead = f"{len(run.start.stages)} stage{plural}: {depths} layers"
    return page(run.start.name, lead, "\n".join(parts))


def _banner(summary: Summary) -> str:
    if summary.is_finished:
        return ""
    return (
        f'<p class="banner">Unfinished: step {summary.global_step:,} of '
        f"{summary.total_steps:,}. The numbers are those so far.</p>"
    )


def _cards(summary: Summary) -> str:
    contents = [
        (number(summary.val_mlm_loss), "validation MLM loss", "nats per masked token"),
        (number(summary.unigram_loss), "unigram loss", "predicting word frequencies"),
        (number(summary.nats_below_unigram), "nats below unigram", "what was learnt"),
        (percent(summary.val_mlm_accuracy), "masked tokens right", "on held-out text"),
        (duration(summary.elapsed_seconds), "training time", "switches included"),
        (scaled(summary.tokens), "tokens seen", "padding included"),
    ]
    return cards(contents)


def _figures(run: RunMetrics) -> str:
    drawn = [
        ("wide", "Loss over optimizer steps; lines mark the stage switches",
         report_figures.loss_over_steps(run, "svg")),
        ("", "Loss over training time", report_figures.loss_over_time(run)),
        ("", "Learning rate", report_figures.learning_rate(run)),
        ("wide", "Tokens per second in each stage", report_figures.speed_per_stage(run)),
    ]  # fmt: skip
    return "".join(figure(image, caption, kind) for kind, caption, image in drawn)


def _stage_table(run: RunMetrics) -> str:
    head = ("stage", "layers", "parameters", "trained", "steps", "tokens/s (median)",
            "training time", "first train loss", "last train loss", "validation loss")  # fmt: skip
    rows = []
    for index, stage in enumerate(run.start.stages):
        train = run.train_rows(index)
        rates = [row.tokens_per_second for row in train]
        losses = [row.mlm_loss for row in train] or [math.nan]
        validated = [row.val_mlm_loss for row in run.evaluations if row.stage == index]
        done = train[-1].global_step - run.first_step(index) if train else 0
        rows.append((
            str(index + 1), str(stage.num_hidden_layers), f"{stage.num_parameters:,}",
            f"{stage.num_trained:,}",
            f"{done:,} of {stage.steps:,}", number(median(rates) if rates else math.nan, 0),
            duration(run.stage_seconds(index)), number(losses[0]), number(losses[-1]),
            number(validated[-1] if validated else math.nan),
        ))  # fmt: skip
    return table(head, rows)


def _switch_table(run: RunMetrics) -> str:
    if not run.switches:
        return "<p>No stage switch so far.</p>"
    head = ("step", "what grew", "operators", "moments", "loss before", "loss after", "change",
            "training loss", "recovery", "largest logit change", "seconds", "seconds by part",
            )  # fmt: skip
    rows = [
        (
            f"{row.global_step:,}",
            _changes(row.changes),
            html.escape(row.operator),
            html.escape(row.moments),
            number(row.loss_before),
            number(row.loss_after),
            signed(row.loss_after - row.loss_before),
            _with_noise(spike),
            spike.recovery,
            number(row.max_logit_difference, 2),
            number(row.seconds, 1),
            ", ".join(f"{html.escape(k)} {v:.2f}" for k, v in row.seconds_by_part.items()),
        )
        for row, spike in zip(run.switches, spikes(run), strict=True)
    ]
    words = (
        "<p>Losses before and after are those of one held-out batch at the growth. Training loss: "
        "the highest row of metrics.jsonl after the growth, above the mean of the last "
        f"{WINDOWS} before it; it has recovered when the mean of {WINDOWS} is back there. Noise: "
        "the standard deviation of single rows before.</p>"
    )
    return words + table(head, rows)


def _with_noise(spike: Spike) -> str:
    return f"{signed(spike.height)} (noise {number(spike.noise)})"


def _growth_figures(run: RunMetrics) -> str:
    """What was measured of hidden states, gradients and duplicates; older runs have none."""
    drawn = [
        ("wide", "Size of the hidden states in validation, layer by step (the last layer's where "
         "a loss reads it; at a switch all of the probe's)",
         report_growth_figures.residuals_over_steps(run)),
        ("", "Size of the hidden states in the probe at each growth",
         report_growth_figures.residuals_at_switches(run)),
        ("", report_growth_figures.gradient_caption(run),
         report_growth_figures.gradient_norms(run)),
        ("", "Cosine between copies of duplicated units; 1: locked",
         report_growth_figures.duplicate_similarity(run)),
    ]  # fmt: skip
    images = [figure(image, caption, kind) for kind, caption, image in drawn if image is not None]
    return f'<div class="figures">{"".join(images)}</div>' if images else ""


def _changes(changes: Mapping[str, tuple[str, str]]) -> str:
    """One line a field: "hidden size 128 -> 256"."""
    lines = (
        f"{html.escape(name.removeprefix('num_').replace('_', ' '))} {html.escape(old)} &rarr; "
        f"{html.escape(new)}"
        for name, (old, new) in changes.items()
    )
    return "<br>".join(lines) or "nothing"


def _symmetry_table(run: RunMetrics) -> str:
    """Mean cosine between copies of duplicated units; empty where nothing was duplicated."""
    measured = [(row.global_step, row.to_stage, row.similarity) for row in run.switches]
    measured += [(row.global_step, row.stage, row.similarity) for row in run.symmetry]
    kinds = list(dict.fromkeys(kind for _, _, similarity in measured for kind in similarity))
    if not kinds:
        return ""
    rows = [
        (
            f"{step:,}",
            str(stage + 1),
            f"{step - run.first_step(stage):,}",
            *(number(similarity.get(kind, math.nan), 4) for kind in kinds),
        )
        for step, stage, similarity in sorted(measured, key=lambda row: row[:2])
        if similarity
    ]
    cosines = table(("step", "stage", "steps since growth", *kinds), rows)
    return (
        "<h2>Copies of duplicated units</h2><p>Mean cosine between each further copy and the "
        f"first; copies that stay at 1 waste the width.</p>{cosines}"
    )


def _environment(run: RunMetrics) -> str:
    start = run.start
    rows = [
        ("ranks", str(start.world_size)),
        ("device", html.escape(f"{start.device}, {start.device_name}".rstrip(", "))),
        ("precision", html.escape(start.precision)),
        ("resumed", f"{run.num_resumes} times" if run.num_resumes else "never"),
        *([("branched from", html.escape(start.branch_from))] if start.branch_from else []),
        *([("began with", html.escape(_first_weights(start)))] if start.start_from else []),
        ("whole configuration", "recipe.json and deepspeed.json beside this page"),
    ]
    return table((), rows)


def _first_weights(start: RunStart) -> str:
    return f"the weights of {start.start_from}, sha256 {start.start_sha256}"
