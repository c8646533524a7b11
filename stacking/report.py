"""A run folder's metrics.jsonl -> report.html, one self-contained page, and loss.png."""

import base64
import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from string import Template

from stacking import report_figures
from stacking.errors import UserError
from stacking.report_metrics import RunMetrics, SwitchRow, read_metrics

__all__ = ["RunMetrics", "Summary", "read_metrics", "summarize", "write_report"]

UNKNOWN = "not known yet"


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

    def text(self) -> str:
        """A few lines for a terminal."""
        state = "finished" if self.is_finished else "unfinished, so far"
        rows = [
            (f"run {self.name}", f"{state}: step {self.global_step:,} of {self.total_steps:,}"),
            ("validation MLM loss", f"{_number(self.val_mlm_loss)} nats per masked token"),
            ("unigram loss", f"{_number(self.unigram_loss)} (predicting word frequencies)"),
            ("below unigram", f"{_number(self.nats_below_unigram)} nats"),
            ("masked tokens right", _percent(self.val_mlm_accuracy)),
            ("training time", f"{_number(self.elapsed_seconds, 0)} s"),
            ("speed", f"{_number(self.tokens_per_second, 0)} tokens/s (median)"),
        ]
        return "\n".join(f"{label:<20} {value}" for label, value in rows)


def write_report(run_dir: Path) -> Path:
    """Write RUN_DIR/report.html and RUN_DIR/loss.png; returns the page's path. Raises UserError."""
    run = read_metrics(run_dir / "metrics.jsonl")
    page = run_dir / "report.html"
    try:
        _replace(run_dir / "loss.png", report_figures.loss_over_steps(run, "png"))
        _replace(page, _page(run).encode("ascii", "xmlcharrefreplace"))
    except OSError as error:
        raise UserError(f"{run_dir}: the report cannot be written there: {error}") from error
    return page


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
    )


def _page(run: RunMetrics) -> str:
    summary = summarize(run)
    depths = " &rarr; ".join(str(stage.num_hidden_layers) for stage in run.start.stages)
    plural = "s" if len(run.start.stages) != 1 else ""
    return _PAGE.substitute(
        title=html.escape(run.start.name),
        lead=f"{len(run.start.stages)} stage{plural}: {depths} layers",
        banner=_banner(summary),
        cards=_cards(summary),
        figures=_figures(run),
        stages=_stage_table(run),
        switches=_switch_table(run.switches) + _symmetry_table(run),
        environment=_environment(run),
    )


def _banner(summary: Summary) -> str:
    if summary.is_finished:
        return ""
    return (
        f'<p class="banner">Unfinished: step {summary.global_step:,} of '
        f"{summary.total_steps:,}. The numbers are those so far.</p>"
    )


def _cards(summary: Summary) -> str:
    cards = [
        (_number(summary.val_mlm_loss), "validation MLM loss", "nats per masked token"),
        (_number(summary.unigram_loss), "unigram loss", "predicting word frequencies"),
        (_number(summary.nats_below_unigram), "nats below unigram", "what was learnt"),
        (_percent(summary.val_mlm_accuracy), "masked tokens right", "on held-out text"),
        (_duration(summary.elapsed_seconds), "training time", "switches included"),
        (f"{summary.tokens:,}", "tokens seen", "padding included"),
    ]
    return "".join(
        f'<div class="card"><b>{value}</b><span>{label}</span><i>{note}</i></div>'
        for value, label, note in cards
    )


def _figures(run: RunMetrics) -> str:
    drawn = [
        ("wide", "Loss over optimizer steps; lines mark the stage switches",
         report_figures.loss_over_steps(run, "svg")),
        ("", "Loss over training time", report_figures.loss_over_time(run)),
        ("", "Learning rate", report_figures.learning_rate(run)),
        ("wide", "Tokens per second in each stage", report_figures.speed_per_stage(run)),
    ]  # fmt: skip
    return "".join(
        f'<figure class="{kind}"><img alt="{caption}" src="data:image/svg+xml;base64,'
        f'{base64.b64encode(image).decode()}"><figcaption>{caption}</figcaption></figure>'
        for kind, caption, image in drawn
    )


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
            f"{done:,} of {stage.steps:,}", _number(median(rates) if rates else math.nan, 0),
            _duration(run.stage_seconds(index)), _number(losses[0]), _number(losses[-1]),
            _number(validated[-1] if validated else math.nan),
        ))  # fmt: skip
    return _table(head, rows)


def _switch_table(switches: Sequence[SwitchRow]) -> str:
    if not switches:
        return "<p>No stage switch so far.</p>"
    head = ("step", "what grew", "operators", "moments", "loss before", "loss after", "change",
            "largest logit change", "seconds", "seconds by part")  # fmt: skip
    rows = [
        (
            f"{row.global_step:,}",
            _changes(row.changes),
            html.escape(row.operator),
            html.escape(row.moments),
            _number(row.loss_before),
            _number(row.loss_after),
            _signed(row.loss_after - row.loss_before),
            _number(row.max_logit_difference, 2),
            _number(row.seconds, 1),
            ", ".join(f"{html.escape(k)} {v:.2f}" for k, v in row.seconds_by_part.items()),
        )
        for row in switches
    ]
    return _table(head, rows)


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
            *(_number(similarity.get(kind, math.nan), 4) for kind in kinds),
        )
        for step, stage, similarity in sorted(measured, key=lambda row: row[:2])
        if similarity
    ]
    table = _table(("step", "stage", "steps since growth", *kinds), rows)
    return (
        "<h2>Copies of duplicated units</h2><p>Mean cosine between each further copy and the "
        f"first; copies that stay at 1 waste the width.</p>{table}"
    )


def _environment(run: RunMetrics) -> str:
    start = run.start
    rows = [
        ("ranks", str(start.world_size)),
        ("device", html.escape(start.device)),
        ("precision", html.escape(start.precision)),
        ("resumed", f"{run.num_resumes} times" if run.num_resumes else "never"),
        ("whole configuration", "recipe.json and deepspeed.json beside this page"),
    ]
    return _table((), rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    top = f"<thead><tr>{cells}</tr></thead>" if head else ""
    return f'<div class="scroll"><table>{top}<tbody>{body}</tbody></table></div>'


def _number(value: float, digits: int = 3) -> str:
    return f"{value:,.{digits}f}" if math.isfinite(value) else UNKNOWN


def _signed(value: float) -> str:
    return f"{value:+.3f}" if math.isfinite(value) else UNKNOWN


def _percent(share: float) -> str:
    return f"{share:.1%}" if math.isfinite(share) else UNKNOWN


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return UNKNOWN
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours:,} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content)
    temporary.replace(path)


_PAGE = Template("""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
body { margin: 0; background: #f4f5f7; color: #1b2330;
       font: 15px/1.5 system-ui, "Segoe UI", "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 36px 24px 60px; }
h1 { margin: 0; font-size: 28px; overflow-wrap: anywhere; }
h2 { margin: 36px 0 12px; font-size: 18px; }
.lead { margin: 2px 0 24px; color: #5a6577; }
.banner { padding: 10px 14px; background: #fff4d6; border-left: 4px solid #d99a00; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; }
.card, figure, .scroll { background: #fff; border: 1px solid #e1e5eb; border-radius: 8px; }
.card { padding: 14px 16px; }
.card b { display: block; font-size: 22px; line-height: 1.3; font-variant-numeric: tabular-nums; }
.card span { display: block; font-size: 13px; }
.card i { display: block; font-size: 12px; font-style: normal; color: #5a6577; }
.figures { display: grid; grid-template-columns: 1fr 1fr; gap: 12px; margin-top: 12px; }
figure { margin: 0; padding: 12px 14px; min-width: 0; }
figure.wide { grid-column: 1 / -1; }
figure img { display: block; width: 100%; }
figcaption { font-size: 13px; color: #5a6577; }
.scroll { overflow-x: auto; }
table { width: 100%; border-collapse: collapse; font-size: 13px;
        font-variant-numeric: tabular-nums; }
th, td { padding: 8px 12px; text-align: left; border-bottom: 1px solid #eceff3; }
tbody tr:last-child td { border-bottom: 0; }
th { font-weight: 600; color: #5a6577; }
@media (max-width: 720px) { .figures { grid-template-columns: 1fr; } }
</style>
<main>
<h1>$title</h1>
<p class="lead">$lead</p>
$banner
<div class="cards">$cards</div>
<div class="figures">$figures</div>
<h2>Stages</h2>
$stages
<h2>Stage switches</h2>
$switches
<h2>Where it ran</h2>
$environment
</main>
</html>
""")
