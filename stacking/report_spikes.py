"""What a growth did to the training loss: how high it rose, and when it was back.

A window is one logged row: the mean loss of the steps since the row before. The loss before a
growth is the mean of the last WINDOWS windows of the small model, by steps. The spike is the
highest of the grown model's first PEAK_WINDOWS; from there on the loss is back when the mean of the
last WINDOWS windows of the grown model, or of as many as there are, is no higher than before. The
highest of ten windows is above their mean by chance, too: a spike of two or three times the noise,
the standard deviation of the small model's last PEAK_WINDOWS, need not be one.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import stdev

from stacking.report_metrics import RunMetrics, SwitchRow

WINDOWS = 5
"""That a mean is of: single windows are noisy."""
PEAK_WINDOWS = 10
"""In which a spike is looked for: the highest of a long stage's windows would be noise."""


@dataclass(frozen=True)
class Window:
    """Some optimizer steps up to `global_step`, with their mean loss."""

    global_step: int
    steps: int
    loss: float  # nats


@dataclass(frozen=True)
class Spike:
    """What one growth did to the training loss (MLM, nats)."""

    global_step: int  # of the growth
    before: float  # the small model's loss
    noise: float  # of single windows before; NaN where there are not two
    highest: float  # of the grown model's first windows
    probe_change: float  # of the loss of one held-out batch, MLM plus NSP, at the growth itself
    back_at: int | None  # the step; None: not yet, or not in this stage
    watched_to: int  # the last step of the stage so far
    is_over: bool  # whether the stage has come to its end

    @property
    def height(self) -> float:
        """Nats above the loss before; below 0 where it never rose; NaN where it is not known."""
        return self.highest - self.before

    @property
    def steps_to_recover(self) -> int | None:
        """From the growth to the step at which the loss is back; 0 where it never rose."""
        return None if self.back_at is None else self.back_at - self.global_step

    @property
    def recovery(self) -> str:
        """In words."""
        if not math.isfinite(self.height):
            return "not known yet"
        if self.steps_to_recover is not None:
            steps = self.steps_to_recover
            return f"recovered in {steps:,} steps" if steps else "never rose"
        watched = f"{self.watched_to - self.global_step:,} steps"
        return f"not recovered in the stage's {watched}" if self.is_over else (
            f"not recovered yet, after {watched}"
        )  # fmt: skip


def spikes(run: RunMetrics) -> list[Spike]:
    """One for each growth, in order."""
    return [_spike(run, switch) for switch in run.switches]


def _spike(run: RunMetrics, switch: SwitchRow) -> Spike:
    stage = switch.to_stage
    old, new = (_windows(run, index) for index in (stage - 1, stage))
    before, highest, back_at = rise(old, new, switch.global_step)
    watched_to = new[-1].global_step if new else switch.global_step
    return Spike(
        global_step=switch.global_step,
        before=before,
        noise=_deviation(old[-PEAK_WINDOWS:]),
        highest=highest,
        probe_change=switch.loss_after - switch.loss_before,
        back_at=back_at,
        watched_to=watched_to,
        is_over=watched_to >= run.first_step(stage + 1),
    )


def rise(
    old: Sequence[Window], new: Sequence[Window], growth_step: int, windows: int = WINDOWS
) -> tuple[float, float, int | None]:
    """The loss before, the highest after, and the step at which it is back, `growth_step` where it
    never rose.

    Args:
        old: of the small model.
        new: of the grown one.
        growth_step: where the one ends and the other begins.
        windows: that a mean is of.
    """
    old, new = (_known(part) for part in (old, new))
    if not old or not new:
        return math.nan, math.nan, None
    before = mean_loss(old[-windows:])
    peak = max(range(min(len(new), PEAK_WINDOWS)), key=lambda index: new[index].loss)
    highest = new[peak].loss
    if highest <= before:
        return before, highest, growth_step
    back = (
        new[index].global_step for index in range(peak, len(new))
        if mean_loss(new[max(0, index + 1 - windows) : index + 1]) <= before
    )  # fmt: skip
    return before, highest, next(back, None)


def mean_loss(windows: Sequence[Window]) -> float:
    """Nats, each step counted once."""
    return sum(w.loss * w.steps for w in windows) / sum(w.steps for w in windows)


def _windows(run: RunMetrics, stage: int) -> list[Window]:
    found, begin = [], run.first_step(stage)
    for row in run.train_rows(stage):
        found.append(Window(row.global_step, row.global_step - begin, row.mlm_loss))
        begin = row.global_step
    return found


def _deviation(windows: Sequence[Window]) -> float:
    losses = [window.loss for window in _known(windows)]
    return stdev(losses) if len(losses) > 1 else math.nan


def _known(windows: Sequence[Window]) -> list[Window]:
    return [w for w in windows if math.isfinite(w.loss) and w.steps > 0]
