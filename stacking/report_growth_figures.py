"""The report's figures of growth: hidden states, gradients by age, duplicates; SVG bytes."""

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from stacking.report_figures import (
    HALF,
    MUTED,
    RATE,
    TRAIN,
    VALIDATION,
    WIDE,
    drawing,
    image_bytes,
    thinned,
)
from stacking.report_metrics import ResidualRow, RunMetrics

COLOURS = (TRAIN, VALIDATION, RATE, "#d99a00", "#7a4fa3", "#1f9bb0", "#b0527c", "#6b6b2a")


def residuals_over_steps(run: RunMetrics) -> bytes | None:
    """A heat map: the size of the hidden states, layer by step; None where none was measured."""
    rows = run.residuals
    values = [size for row in rows for size in row.rms if math.isfinite(size) and size > 0]
    if not values:
        return None
    with drawing(WIDE) as (figure, axes):
        low, high = min(values), max(values)
        axes.grid(visible=False)
        mesh = None
        for stage in sorted({row.stage for row in rows}):
            of_stage = [row for row in rows if row.stage == stage]
            rows_of_map = np.arange(len(of_stage[0].rms) + 1) - 0.5
            mesh = axes.pcolormesh(
                _edges(of_stage, run), rows_of_map, _columns(of_stage),
                norm="log", vmin=low, vmax=max(high, 1.001 * low), cmap="viridis",
                edgecolors="face",
            )  # fmt: skip
        assert mesh is not None
        _plain_ticks(figure.colorbar(mesh, ax=axes, label="root mean square").ax)
        _mark_switches(axes, run)
        _name_layers(axes, max(len(row.rms) for row in rows))
        return image_bytes(figure, "svg")


def residuals_at_switches(run: RunMetrics) -> bytes | None:
    """The same in the probe, before (dashed) and after each growth; None where not measured."""
    switches = [switch for switch in run.switches if switch.residual_rms_after]
    if not switches:
        return None
    with drawing(HALF) as (figure, axes):
        for index, switch in enumerate(switches):
            colour, step = COLOURS[index % len(COLOURS)], f"step {switch.global_step:,}"
            axes.plot(switch.residual_rms_before, "s--", color=colour, linewidth=1, markersize=7,
                      fillstyle="none", label=f"{step}: before")  # fmt: skip
            axes.plot(switch.residual_rms_after, "o-", color=colour, markersize=3,
                      label=f"{step}: after")  # fmt: skip
        axes.set_xlabel("layer (0: embeddings)")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylabel("root mean square")
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=7)
        return image_bytes(figure, "svg")


def gradient_norms(run: RunMetrics) -> bytes | None:
    """Norms of all gradients, of old and of new parameters; None in a run without any.

    A line ends with its stage: the next one's parameters are others.
    """
    names = {"all": "grad_norm", "old parameters": "grad_norm_old", "new ones": "grad_norm_new"}
    with drawing(HALF) as (figure, axes):
        for stage in range(len(run.start.stages)):
            curves = {
                label: [(row.global_step, getattr(row, name)) for row in run.train_rows(stage)]
                for label, name in names.items()
            }
            _draw_lines(axes, curves, (MUTED, TRAIN, VALIDATION))
        lines = {str(line.get_label()): line for line in axes.get_lines()}
        if not lines:
            return None
        axes.legend(list(lines.values()), list(lines), fontsize=7)
        axes.set_yscale("log")
        axes.set_ylabel("gradient norm")
        _plain_ticks(axes)
        _over_steps(axes, run)
        return image_bytes(figure, "svg")


def gradient_caption(run: RunMetrics) -> str:
    """What `gradient_norms` shows, and of which stages it does not."""
    missing = [
        switch.to_stage + 1 for switch in run.switches
        if not any(math.isfinite(norm) for row in run.train_rows(switch.to_stage)
                   for norm in (row.grad_norm_old, row.grad_norm_new))
    ]  # fmt: skip
    if len(missing) == len(run.switches):
        return "Gradient norm of all parameters"
    words = "Gradient norm, and apart that of parameters that a stage found and of new ones"
    stages = " and ".join(map(str, missing))
    return words + (f" (not measured in stage {stages}: too short)" if missing else "")


def duplicate_similarity(run: RunMetrics) -> bytes | None:
    """Mean cosine between copies of duplicated units over steps; None where there are none."""
    measured = [(row.global_step, row.to_stage, row.similarity) for row in run.switches]
    measured += [(row.global_step, row.stage, row.similarity) for row in run.symmetry]
    curves: dict[str, list[tuple[int, float]]] = {}
    for step, stage, similarity in sorted(measured, key=lambda row: row[:2]):
        for kind, cosine in similarity.items():
            curves.setdefault(f"{kind}, stage {stage + 1}", []).append((step, cosine))
    with drawing(HALF) as (figure, axes):
        if not _draw_lines(axes, curves, COLOURS, "o-"):
            return None
        axes.axhline(1.0, color=MUTED, linestyle="--", linewidth=1)
        axes.set_ylabel("cosine of copies")
        _over_steps(axes, run)
        return image_bytes(figure, "svg")


def _draw_lines(
    axes: Axes,
    curves: Mapping[str, Sequence[tuple[int, float]]],
    colours: Sequence[str],
    style: str = "-",
) -> bool:
    """Whether there was anything to draw; points that nobody measured are passed by."""
    is_drawn = False
    for index, (label, points) in enumerate(curves.items()):
        known = [(step, value) for step, value in points if math.isfinite(value)]
        if known:
            steps, values = zip(*thinned(known), strict=True)
            shape = style if len(known) > 1 else "o"  # a line of one point is nothing
            axes.plot(steps, values, shape, color=colours[index % len(colours)], markersize=3,
                      linewidth=1, label=label)  # fmt: skip
            is_drawn = True
    if is_drawn:
        axes.legend(fontsize=7)
    return is_drawn


def _over_steps(axes: Axes, run: RunMetrics) -> None:
    _mark_switches(axes, run)
    axes.set_xlabel("optimizer step")
    axes.set_xlim(0, max(run.global_step, 1))


def _mark_switches(axes: Axes, run: RunMetrics) -> None:
    for switch in run.switches:
        axes.axvline(switch.global_step, color=MUTED, linewidth=0.8)


def _plain_ticks(axes: Axes) -> None:
    """0.5 on a logarithmic axis of y, not 5 x 10^-1, and no more than there is room for."""
    low, high = axes.get_ylim()
    logarithmic = LogLocator(subs=(1, 2, 5) if high > 10 * low else range(1, 10))
    axes.yaxis.set_major_locator(logarithmic if high > 3 * low else MaxNLocator(5))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def _edges(rows: Sequence[ResidualRow], run: RunMetrics) -> list[float]:
    """Steps between which each measurement of one stage is shown: half-way to its neighbours."""
    stage = run.start.stages[rows[0].stage]
    begin = run.first_step(rows[0].stage)
    steps = [float(row.global_step) for row in rows]
    end = max(min(begin + stage.steps, run.global_step), steps[-1])
    middles = [(left + right) / 2 for left, right in pairwise(steps)]
    return [begin, *middles, max(end, begin + 1)]


def _columns(rows: Iterable[ResidualRow]) -> np.ndarray:
    """[1 + L, measurements]; NaN, left white, where a number is none."""
    sizes = np.array([row.rms for row in rows], dtype=float).T
    return np.where(sizes > 0, sizes, np.nan)


def _name_layers(axes: Axes, count: int) -> None:
    """Ticks of 1 + L rows: the embeddings, then at most 12 layers' numbers."""
    every = math.ceil((count - 1) / 12)
    numbers = list(range(0, count, max(1, every)))
    axes.set_yticks(numbers, ["embeddings", *map(str, numbers[1:])])
    axes.set_ylabel("after layer")
    axes.set_xlabel("optimizer step")
