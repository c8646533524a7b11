"""A comparison's figures: loss over each axis, and by the step of the growth; SVG or PNG bytes."""

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from stacking.comparison import Comparison
from stacking.comparison_costs import AXES
from stacking.comparison_groups import Group
from stacking.comparison_names import short_names
from stacking.comparison_switch import SwitchCurve
from stacking.report_figures import (
    HALF,
    MUTED,
    UNIGRAM,
    WIDE,
    LineStyle,
    drawing,
    image_bytes,
    legend_below,
    logarithmic,
    plain_label,
)

COLOURS = ("#3b6fb5", "#c8452d", "#2f8f6b", "#d99a00", "#7a4fa3", "#1f9bb0", "#b0527c", "#6b6b2a")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINE_STYLES: dict[str, tuple[LineStyle, ...]] = {
    "scratch": ("-",),
    "grown": ("-", (0, (8, 1, 1, 1)), (0, (8, 1, 1, 1, 1, 1))),
    "control": ("--", (0, (2, 1)), (0, (4, 1, 1, 1))),
    "other": (":", (0, (1, 2)), (0, (1, 3))),
}
"""Of a role; the next one where the colours begin anew."""
LONGEST_LABEL, LEGEND_ROW = 52, 0.19  # characters; inches
TITLE_CHARACTERS = 66  # of a line over a half figure


@dataclass(frozen=True)
class Look:
    """How a recipe is drawn."""

    colour: str
    marker: str
    line: LineStyle
    label: str


def loss_over(
    comparison: Comparison, axis: str, file_format: str, *, is_wide: bool = False
) -> bytes:
    """Validation losses of all runs over one of AXES, their ends marked, on a logarithmic scale.

    The legend stands below a wide figure; others have the same looks and none.
    """
    looks = _looks(comparison.groups)
    labels = dict.fromkeys(look.label for look in looks)
    columns = _columns(list(labels))
    height = LEGEND_ROW * math.ceil((len(labels) + 1) / columns)
    with drawing((WIDE[0], WIDE[1] + height) if is_wide else HALF) as (figure, axes):
        costs = []
        for group, look in zip(comparison.groups, looks, strict=True):
            if labels.pop(look.label, "") is None:  # the first of this label
                axes.plot([], [], linestyle=look.line, color=look.colour, marker=look.marker,
                          markersize=4, linewidth=1, label=look.label)  # fmt: skip
            for result in group.results:
                spent = [point.costs[axis] for point in result.points]
                losses = [point.loss for point in result.points]
                costs += [cost for cost in spent if 0 < cost < math.inf]
                axes.plot(spent, losses, linestyle=look.line, color=look.colour, linewidth=1,
                          alpha=0.8)  # fmt: skip
                if not result.fault:
                    axes.plot(spent[-1:], losses[-1:], look.marker, color=look.colour, markersize=5)
        frontier = comparison.measures[axis].frontier
        if len(frontier.costs) > 1:
            # Straight in the logarithm of the cost, as it is read.
            axes.plot(frontier.costs, frontier.losses, color=UNIGRAM, linewidth=2, alpha=0.5,
                      label="frontier of scratch")  # fmt: skip
        if costs:
            logarithmic(axes)
        axes.set_xlabel(AXES[axis])
        axes.set_ylabel("validation MLM loss (nats)")
        if is_wide:
            legend_below(figure, columns)
        return image_bytes(figure, file_format)


def loss_by_switch(curve: SwitchCurve, file_format: str) -> bytes:
    """Final losses over the step of the growth, beside scratch's at equal reference time."""
    title = textwrap.fill(plain_label(curve.family), TITLE_CHARACTERS)
    height = HALF[1] + 3 * LEGEND_ROW + 0.16 * (1 + title.count("\n"))
    with drawing((HALF[0], height)) as (figure, axes):
        steps = [point.step for point in curve.points]
        losses = [point.loss for point in curve.points]
        if any(len(point.losses) > 1 for point in curve.points):
            below = [point.loss - min(point.losses) for point in curve.points]
            above = [max(point.losses) - point.loss for point in curve.points]
            axes.errorbar(steps, losses, yerr=[below, above], fmt="o-", color=COLOURS[0],
                          capsize=3, label="grown: mean and range of the seeds")  # fmt: skip
        else:
            axes.plot(steps, losses, "o-", color=COLOURS[0], label="grown, one seed")
        axes.plot(steps, [point.scratch_loss for point in curve.points], "s--", color=MUTED,
                  label="scratch at equal reference time")  # fmt: skip
        if curve.threshold is not None:
            axes.axvline(curve.threshold, color=UNIGRAM, linewidth=0.8, linestyle=":",
                         label="threshold: no later growth is surely better")  # fmt: skip
        axes.set_title(title, fontsize=9, loc="left")
        axes.set_xlabel("step of the growth")
        axes.set_ylabel("validation MLM loss (nats)")
        legend_below(figure, 1)
        return image_bytes(figure, file_format)


def _looks(groups: Sequence[Group]) -> list[Look]:
    """Scratch is grey; the others differ in colour or, from the ninth on, in marker and line."""
    looks, others = [], 0
    for group, label in zip(groups, short_names([g.name for g in groups], LONGEST_LABEL),
                            strict=True):  # fmt: skip
        if group.role == "scratch":
            looks.append(Look(MUTED, "o", "-", "scratch, each run"))
            continue
        again, place = divmod(others, len(COLOURS))
        styles, others = LINE_STYLES[group.role], others + 1
        looks.append(Look(COLOURS[place], MARKERS[again % len(MARKERS)],
                          styles[again % len(styles)],
                          plain_label(f"{label} ({group.role})")))  # fmt: skip
    return looks


def _columns(labels: Sequence[str]) -> int:
    """Of a legend as wide as the figure."""
    longest = max(map(len, labels), default=0)
    return 3 if longest <= 38 else 2 if longest <= 64 else 1
