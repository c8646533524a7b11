"""The report's figures: RunMetrics -> SVG or PNG bytes, drawn without a display."""

import io
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import TypeAlias, TypeVar

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from stacking.report_html import scaled
from stacking.report_metrics import RunMetrics
from stacking.report_spikes import Spike, spikes

Item = TypeVar("Item")
LineStyle: TypeAlias = str | tuple[float, tuple[float, ...]]

TRAIN, VALIDATION, UNIGRAM, RATE, MUTED = "#3b6fb5", "#c8452d", "#3f4756", "#2f8f6b", "#8a94a3"
SPIKE = "#7a4fa3"
WIDE, HALF = (10.0, 4.2), (5.4, 3.4)  # inches
PNG_DPI = 160
SPIKE_SIZE = 8.0  # points
CHARACTER = 0.62  # of the font's size: a mean letter's width
MAX_POINTS = 2000  # more than the widest figure has pixels of curve
SMOOTHING_ROWS = 20  # mean age of the exponential average, in logged rows
SMOOTHING_SHARE = 1 / 25  # of a stage's rows, where that is less: the average must not lag behind


def loss_over_steps(run: RunMetrics, file_format: str) -> bytes:
    """Training and validation MLM loss, the unigram loss, the stage switches and their spikes."""
    with drawing(WIDE) as (figure, axes):
        steps = [float(row.global_step) for row in run.train]
        at = {row.global_step: float(row.global_step) for row in run.evaluations}
        _loss_curves(axes, run, steps, at)
        _mark_stages(axes, run)
        _mark_spikes(axes, [spike for spike in spikes(run) if spike.height > 0], run.global_step)
        axes.set_xlabel("optimizer step")
        axes.set_xlim(0, max(run.global_step, 1))
        return image_bytes(figure, file_format)


def loss_over_time(run: RunMetrics) -> bytes:
    """The same losses over the minutes that they took."""
    with drawing(HALF) as (figure, axes):
        minutes = [row.elapsed_seconds / 60 for row in run.train]
        at = {row.global_step: row.elapsed_seconds / 60 for row in run.evaluations}
        _loss_curves(axes, run, minutes, at)
        axes.set_xlabel("minutes")
        axes.set_xlim(left=0)
        return image_bytes(figure, "svg")


def learning_rate(run: RunMetrics) -> bytes:
    """The rate that each logged step used."""
    with drawing(HALF) as (figure, axes):
        rows = thinned(run.train)
        axes.plot([row.global_step for row in rows], [row.lr for row in rows], color=RATE)
        for switch in run.switches:
            axes.axvline(switch.global_step, color=MUTED, linewidth=0.8)
        axes.set_xlabel("optimizer step")
        axes.set_xlim(0, max(run.global_step, 1))
        axes.set_ylim(bottom=0)
        axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        return image_bytes(figure, "svg")


def speed_per_stage(run: RunMetrics) -> bytes:
    """Median tokens per second of each stage that has run."""
    with drawing((10.0, 0.9 + 0.42 * len(run.start.stages))) as (figure, axes):
        labels, rates = [], []
        for index, stage in enumerate(run.start.stages):
            speeds = [row.tokens_per_second for row in run.train_rows(index)]
            labels.append(f"stage {index + 1} ({_layers(stage.num_hidden_layers)})")
            rates.append(median(speeds) if speeds else 0.0)
        bars = axes.barh(labels, rates, color=TRAIN, height=0.6)
        texts = [f"{rate:,.0f}" if rate else "not run yet" for rate in rates]
        axes.bar_label(bars, texts, padding=4)
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("tokens per second")
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.set_xlim(0, 1.1 * max(*rates, 1.0))
        return image_bytes(figure, "svg")


def smoothed(values: Sequence[float], age: float) -> list[float]:
    """Exponential average with mean age `age` (rows), unbiased at the start; NaNs are passed by."""
    keep = 1 - 1 / max(1.0, age)
    total = weight = 0.0
    averages = []
    for value in values:
        if math.isfinite(value):
            total, weight = keep * total + value, keep * weight + 1
        averages.append(total / weight if weight else math.nan)
    return averages


def _loss_curves(
    axes: Axes, run: RunMetrics, x: Sequence[float], evaluation_x: dict[int, float]
) -> None:
    """`x`: a place for each training row; `evaluation_x`: one for each evaluation's step."""
    losses = [row.mlm_loss for row in run.train]
    average = _smoothed_by_stage(run)
    points = thinned(list(zip(x, losses, average, strict=True)))
    if points:
        xs, raw, line = zip(*points, strict=True)
        axes.plot(xs, raw, color=TRAIN, alpha=0.25, linewidth=0.8)
        axes.plot(xs, line, color=TRAIN, linewidth=1.6, label="training (smoothed)")
    if run.evaluations:
        axes.plot(
            [evaluation_x[row.global_step] for row in run.evaluations],
            [row.val_mlm_loss for row in run.evaluations],
            color=VALIDATION, marker="o", markersize=4, linewidth=0.8, label="validation",
        )  # fmt: skip
    if math.isfinite(run.start.unigram_loss):
        level = run.start.unigram_loss
        axes.axhline(level, color=UNIGRAM, linestyle="--", linewidth=1, label="unigram")
    axes.set_ylabel("MLM loss (nats)")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper right")


def _smoothed_by_stage(run: RunMetrics) -> list[float]:
    """Smoothed training loss; begins anew at each switch, whose jump it would smear."""
    averages: list[float] = []
    for index in range(len(run.start.stages)):
        rows = run.train_rows(index)
        age = min(SMOOTHING_ROWS, len(rows) * SMOOTHING_SHARE)
        averages += smoothed([row.mlm_loss for row in rows], age)
    return averages


def _mark_stages(axes: Axes, run: RunMetrics) -> None:
    """A line at each switch, and each begun stage's layers above it, as far as there is room."""
    for switch in run.switches:
        axes.axvline(switch.global_step, color=MUTED, linewidth=1)
    for index, stage in enumerate(run.start.stages):
        begin = run.first_step(index)
        if begin >= run.global_step:
            break
        end = min(begin + stage.steps, run.global_step)
        names = _layers(stage.num_hidden_layers), str(stage.num_hidden_layers)
        room = (end - begin) / run.global_step
        axes.text(
            (begin + end) / 2, 1.02, next((name for name in names if _share(name, 10) < room), ""),
            ha="center", va="bottom", color=UNIGRAM, transform=axes.get_xaxis_transform(),
        )  # fmt: skip


def _layers(number: int) -> str:
    return f"{number} layer{'' if number == 1 else 's'}"


def _share(text: str, size: float) -> float:
    """About the share of a wide figure's axes that the longest line of a text takes."""
    width = CHARACTER * size / 72 * max(map(len, text.split("\n")))  # inches
    return width / (WIDE[0] - 0.9)


def _mark_spikes(axes: Axes, found: Sequence[Spike], last_step: int) -> None:
    """Each with the longest of its labels for which its neighbours leave room."""
    free = 0.0  # share of the axes on the left that has labels
    begins = [spike.global_step / max(last_step, 1) for spike in found]
    for spike, at, after in zip(found, begins, [*begins, 1.0][1:], strict=True):
        _mark_spike(axes, spike)
        whole, short = f"+{spike.height:.2f} nats,\n{spike.recovery}", f"+{spike.height:.2f}"
        sides = ((whole, "left"), (whole, "right"), (short, "left"), (short, "right"))
        for text, alignment in sides:
            width = _share(text, SPIKE_SIZE) + 0.01
            begin = at if alignment == "left" else at - width
            if begin >= free and begin + width <= max(at, after):
                free = begin + width
                axes.annotate(
                    text, (spike.global_step, spike.highest), fontsize=SPIKE_SIZE, ha=alignment,
                    xytext=(5 if alignment == "left" else -5, 4), textcoords="offset points",
                    color=SPIKE, va="bottom",
                )  # fmt: skip
                break
        free = max(free, at)  # a label on the left of a spike would be taken for another's


def _mark_spike(axes: Axes, spike: Spike) -> None:
    """The loss before, from the growth to where it is back, and how high it rose."""
    begin, back = spike.global_step, spike.back_at
    end = spike.watched_to if back is None else back
    axes.plot([begin, end], [spike.before] * 2, color=SPIKE, linewidth=1.4, linestyle="--")
    axes.plot([begin] * 2, [spike.before, spike.highest], color=SPIKE, linewidth=1.4)
    if back is not None:
        axes.plot([back], [spike.before], "v", color=SPIKE, markersize=6)


def thinned(rows: Sequence[Item]) -> Sequence[Item]:
    """No more of them than MAX_POINTS."""
    return rows[:: math.ceil(len(rows) / MAX_POINTS) or 1]


@contextmanager
def drawing(size: tuple[float, float]) -> Iterator[tuple[Figure, Axes]]:
    """An empty figure of `size` (inches) in the house's style."""
    # Figure itself, not pyplot: no global state, no display, nothing to close.
    style = matplotlib.rc_context({
        "svg.hashsalt": "report",  # the same run gives the same bytes
        "font.size": 10.0,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": MUTED,
        "axes.grid": True,
        "grid.color": "#e8ebf0",
        "axes.axisbelow": True,
        "legend.edgecolor": "none",
        "legend.framealpha": 0.9,
    })  # fmt: skip
    with style:
        figure = Figure(figsize=size, layout="constrained")
        yield figure, figure.add_subplot()


def plain_label(text: str) -> str:
    """`text` as it is: no formula between dollars, no label that a legend leaves out."""
    escaped = text.replace("$", r"\$")
    return f" {escaped}" if escaped.startswith("_") else escaped


def logarithmic(axes: Axes) -> None:
    """A logarithmic x axis with plain numbers: 100, 200, 500, not powers of ten."""
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    decades = math.log10(high / low)
    axis = axes.xaxis
    if decades < 1:
        axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    else:
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if decades < 4 else (1.0,)))
    axis.set_major_formatter(lambda value, _: scaled(value, "g"))
    axis.set_minor_formatter(NullFormatter())


def legend_below(figure: Figure, columns: int) -> None:
    """All labels of the figure, under its axes, where they hide nothing."""
    figure.legend(loc="outside lower left", ncols=columns, fontsize=8, handlelength=3)


def image_bytes(figure: Figure, file_format: str) -> bytes:
    """`file_format`: "svg" or "png"."""
    buffer = io.BytesIO()
    metadata = {"Date": None} if file_format == "svg" else None
    figure.savefig(buffer, format=file_format, dpi=PNG_DPI, metadata=metadata)
    return buffer.getvalue()
