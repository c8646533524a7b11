"""A Comparison -> compare.html, one self-contained page, PNG and CSV files, and text."""

import csv
import html
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

from stacking.comparison import Comparison, Speedup
from stacking.comparison_budget import scratch_unknown, within
from stacking.comparison_controls import ControlVerdict, worst
from stacking.comparison_costs import AXES, TIME
from stacking.comparison_figures import loss_by_switch, loss_over
from stacking.comparison_frontier import Interval
from stacking.comparison_groups import Group
from stacking.comparison_switch import switch_curves
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
    table,
)

RunRow = dict[str, object]

LONGEST_NAME = 48  # characters of a name that stands in the terminal's table

METHOD = """<p>t is what a recipe cost; t0 is what scratch needs for the same validation loss, read
off the frontier of scratch runs of several lengths whose learning rate came down to at most a tenth
of its peak; between two of them the loss is linear in the logarithm of the cost. Outside of them
nothing is said. Reference time is the median seconds per step of each configuration, over all runs
that have it (where runs were made to be timed, over these alone), times its steps, and the stage
switches as measured. FLOPs and tokens count all stages
and the steps of learned growth maps; tokens and FLOPs of padding are included. Wall time includes
evaluating and saving, and whatever else the machine did, but no start of a process: what its first
logged row took longer than rows of that stage usually do is left out, because of the runs that one
process trains only the first would pay for it. Pilots are charged to each grown recipe
where they were named, steps that they share once; tuning and pilots that were not are not
charged.</p>
<p>Intervals (95 %) are a bootstrap over seeds: each draw gives every recipe other seeds, by
residuals that are pooled over all recipes, and reads the ratio off the frontier that these would
make. In reference time it draws the step times, too, by the rows that they are medians of; that the
machine was slower for all rows of a size it does not know. Runs that branched from the same trunk
have their noise in common: they move together, and count once. How large the noise is few seeds do
not tell, so every draw divides by a size of its own, as Student's t does. In 1,000 simulated
comparisons whose truth is known, of 3 seeds and with noise of one size, these intervals held it in
94 % with scratch runs trained independently, in 95 %
with decay branches of one trunk; of 2 seeds in 95 and 96 %. They do not know of other data or
sizes, of recipes that are noisier than others, nor that the best of many recipes was chosen by this
comparison. What a seed does to all recipes alike, by its masks of the evaluation and its order of
the samples, is estimated by least squares and taken out of the losses, where recipes with equal
seeds leave two degrees of freedom or more to know the rest by: two families of three seeds, or
three of two. Elsewhere it stays in, and makes intervals too wide rather than too narrow.</p>"""


def write_comparison(comparison: Comparison, out: Path, budget: float | None = None) -> Path:
    """Write compare.html, three CSV files and a PNG for each axis into `out`; returns the page.

    `budget`: seconds of reference time within which the recipes are ranked, too.
    """
    path = out / "compare.html"
    try:
        out.mkdir(parents=True, exist_ok=True)
        for axis in AXES:
            image = loss_over(comparison, axis, "png", is_wide=True)
            replace_file(out / f"loss_over_{axis}.png", image)
        for index, curve in enumerate(switch_curves(comparison), 1):
            replace_file(out / f"loss_by_switch_{index}.png", loss_by_switch(curve, "png"))
        for name, rows in (
            ("runs", run_rows(comparison)),
            ("speedups", speedup_rows(comparison)),
            ("curves", curve_rows(comparison)),
        ):
            replace_file(out / f"{name}.csv", _csv(rows))
        replace_file(path, _page(comparison, budget))
    except OSError as error:
        raise UserError(f"{out}: the comparison cannot be written there: {error}") from error
    return path


def run_rows(comparison: Comparison) -> list[RunRow]:
    """One row a run: what it is and where it ended."""
    return [
        {
            "recipe": group.name, "role": group.role, "seed": result.run.recipe.seed,
            "folder": str(result.run.folder), "layers": _layers(group),
            "peak_learning_rate": result.run.recipe.learning_rate.peak,
            "fault": result.fault,
            **(result.points[-1].costs if result.points else dict.fromkeys(AXES, math.nan)),
            "val_mlm_loss": result.points[-1].loss if result.points else math.nan,
        }
        for group in comparison.groups for result in group.results
    ]  # fmt: skip


def speedup_rows(comparison: Comparison) -> list[RunRow]:
    """One row a recipe and axis."""
    return [
        {
            "recipe": group.name, "role": group.role, "seeds": len(group.counted),
            "val_mlm_loss": group.loss, "axis": found.axis, "cost": found.cost,
            "scratch_cost": found.scratch_cost, "t0_over_t": found.ratio,
            "low": found.interval.low, "high": found.interval.high,
            "time_saved": found.time_saved, "gain": found.gain,
            "nats_ahead_at_equal_cost": found.nats_ahead,
            "nats_low": found.nats_interval.low, "nats_high": found.nats_interval.high,
            "refusal": found.refusal,
        }
        for group in comparison.groups for found in comparison.of(group)
    ]  # fmt: skip


def curve_rows(comparison: Comparison) -> list[RunRow]:
    """One row an evaluation."""
    return [
        {"recipe": group.name, "role": group.role, "seed": result.run.recipe.seed,
         **point.costs, "val_mlm_loss": point.loss}
        for group in comparison.groups for result in group.results for point in result.points
    ]  # fmt: skip


def text(comparison: Comparison, budget: float | None = None) -> str:
    """For a terminal; names are whole, the long ones on a line of their own."""
    lines = ["At equal, fully decayed validation loss: t0 is scratch's reference time, t the run's"]
    names = [group.name for group in comparison.groups]
    width = max((len(name) for name in names if len(name) <= LONGEST_NAME), default=LONGEST_NAME)
    lines.append(
        f"{'recipe':<{width}} {'role':<8} seeds   loss       t, s     t0/t  1-t/t0  t0/t-1  95 %"
    )
    for group in comparison.groups:
        if len(group.name) > LONGEST_NAME:
            lines.append(group.name)
        lines.append(_line(comparison, group, width))
    for group in comparison.groups:
        found = _at(comparison.of(group), TIME)
        if found and found.refusal:
            lines.append(f"no speed-up of {group.name}: {found.refusal}")
    lines += [f"never-grown control of {control.grown} ({control.control}): {control.verdict}; "
              f"{control.reason}" for control in comparison.controls]  # fmt: skip
    lines += [f"growing at {len(curve.points)} times ({curve.family}): {curve.told}"
              for curve in switch_curves(comparison)]  # fmt: skip
    if budget is not None:
        lines.append(f"within {budget:,.0f} s of reference time:")
        lines += [f"  {one.loss:.4f}  {one.name} ({one.role}), {one.cost:,.1f} s"
                  for one in within(comparison, budget)] or ["  nothing"]  # fmt: skip
        lines += [f"  {told}" for told in scratch_unknown(comparison, budget)]
    return "\n".join(lines + [f"note: {note}" for note in comparison.notes])


def _line(comparison: Comparison, group: Group, width: int) -> str:
    """A recipe's row; its name has `width` characters, or stands above."""
    name = group.name if len(group.name) <= LONGEST_NAME else ""
    row = f"{name:<{width}} {group.role:<8} {len(group.counted):>5}"
    if not group.counted:
        return f"{row}  does not count"
    row += f" {group.loss:>6.4f} {group.cost(TIME):>10,.1f}"
    found = _at(comparison.of(group), TIME)
    if found and not found.refusal:
        row += f" {found.ratio:>7.2f}x {found.time_saved:>6.1%} {found.gain:>7.1%}"
        row += f"  {_between(found.interval)}"
    return row


def _page(comparison: Comparison, budget: float | None) -> bytes:
    num_runs = sum(len(group.results) for group in comparison.groups)
    parts = [
        "".join(f'<p class="banner">{html.escape(note)}</p>' for note in comparison.notes),
        _cards(comparison),
        "<h2>At equal, fully decayed validation loss, in reference time</h2>",
        _time_table(comparison),
        "<h2>The same on every axis, t0/t</h2>",
        _axes_table(comparison),
        _refusals(comparison),
        "<h2>The never-grown control</h2>",
        _control_table(comparison.controls),
        "" if budget is None else _budget_table(comparison, budget),
        f'<div class="figures">{_figures(comparison)}</div>',
        "<h2>The runs</h2>",
        _run_table(comparison),
        "<h2>Seconds of a step</h2>",
        _step_table(comparison),
        "<h2>How it is computed</h2>",
        METHOD,
    ]
    lead = f"{num_runs} runs of {len(comparison.groups)} recipes"
    return page("Growth against training from scratch", lead, "\n".join(parts))


def _cards(comparison: Comparison) -> str:
    best = comparison.headline()
    if best is None:
        return cards([("no speed-up known", "of any grown recipe", "the tables say why")])
    group, found = best
    verdict = worst(comparison.controls, group.name)
    tried = sum(other.role == "grown" for other in comparison.groups)
    return cards([
        (f"{found.ratio:.2f}x", "t0/t in reference time", f"95 %: {_between(found.interval)}"),
        (percent(found.time_saved), "time saved, 1 - t/t0", "at equal validation loss"),
        (percent(found.gain), "speed-up, t0/t - 1", "at equal validation loss"),
        (_known(found.nats_ahead), "nats ahead at equal time", _ahead(comparison, found)),
        (verdict, "the never-grown control", "at equal reference time"),
        (html.escape(group.name), "best grown recipe", f"of {tried}; chosen by this comparison"),
    ])  # fmt: skip


def _ahead(comparison: Comparison, found: Speedup) -> str:
    """How surely, or why nobody knows."""
    unknown = scratch_unknown(comparison, found.cost)
    return unknown[0] if unknown else _between(found.nats_interval, 4)


def _time_table(comparison: Comparison) -> str:
    head = ("recipe", "role", "layers", "seeds", "validation loss", "reference time t",
            "scratch's t0", "t0/t", "1 - t/t0", "t0/t - 1", "nats ahead at equal time")  # fmt: skip
    rows = []
    for group in comparison.groups:
        found = _at(comparison.of(group), TIME)
        rows.append((
            html.escape(group.name), group.role, _layers(group), _seeds(group), _loss(group),
            _time(group.cost(TIME)), *_found_cells(group, found),
        ))  # fmt: skip
    return table(head, rows)


def _found_cells(group: Group, found: Speedup | None) -> tuple[str, ...]:
    if found is None:
        return ("the measure" if group.role == "scratch" else "does not count", *[""] * 4)
    ahead = f"{_known(found.nats_ahead)}<br>{_between(found.nats_interval, 4)}"
    if found.refusal:
        return ("see below", *[""] * 3, ahead)
    saved, gain = percent(found.time_saved), percent(found.gain)
    return (_time(found.scratch_cost), _ratio(found), saved, gain, ahead)


def _axes_table(comparison: Comparison) -> str:
    rows = [
        (html.escape(group.name),
         *("outside" if found.refusal else _ratio(found) for found in speedups))
        for group in comparison.groups
        if (speedups := comparison.of(group))
    ]  # fmt: skip
    return table(("recipe", *AXES.values()), rows)


def _refusals(comparison: Comparison) -> str:
    """One line a recipe that is refused on some axis; on the others it is for the same reason."""
    lines = []
    for group in comparison.groups:
        refused = [s for s in comparison.of(group) if s.refusal]
        found = _at(refused, TIME) or (refused[0] if refused else None)
        if found:
            why = html.escape(f"{group.name}, {AXES[found.axis]}: {found.refusal}")
            lines.append(f"<li>{why}</li>")
    if not lines:
        return ""
    return f"<p>No speed-up is given where it would be a guess:</p><ul>{''.join(lines)}</ul>"


def _control_table(controls: Sequence[ControlVerdict]) -> str:
    if not controls:
        return "<p>No grown run that counts.</p>"
    head = ("grown recipe", "control", "the control", "behind at equal time, nats", "95 %", "why")
    rows = [
        (html.escape(c.grown), html.escape(c.control), f"<b>{c.verdict}</b>", _known(c.nats),
         _between(c.interval, 4), html.escape(c.reason))
        for c in controls
    ]  # fmt: skip
    return table(head, rows)


def _budget_table(comparison: Comparison, budget: float) -> str:
    rows = [
        (html.escape(one.name), one.role, _time(one.cost), f"{one.loss:.4f}")
        for one in within(comparison, budget)
    ]
    head = f"<h2>Within {_time(budget)} of reference time</h2>"
    unknown = "".join(f"<p>{told}.</p>" for told in scratch_unknown(comparison, budget))
    if not rows:
        return f"{head}<p>No recipe ends within it.</p>{unknown}"
    columns = ("recipe", "role", "reference time", "validation loss")
    return head + table(columns, rows) + unknown


def _figures(comparison: Comparison) -> str:
    drawn = []
    for axis in (TIME, *(axis for axis in AXES if axis != TIME)):
        is_wide = axis == TIME
        caption = f"Validation loss over {AXES[axis]}; points: finished and decayed"
        caption += "" if is_wide else "; colours as in the first figure"
        image = loss_over(comparison, axis, "svg", is_wide=is_wide)
        drawn.append(figure(image, caption, "wide" if is_wide else ""))
    for curve in switch_curves(comparison):
        caption = html.escape(f"Final loss by the step of the growth. {curve.family}; {curve.told}")
        drawn.append(figure(loss_by_switch(curve, "svg"), caption))
    return "".join(drawn)


def _run_table(comparison: Comparison) -> str:
    head = ("folder", "recipe", "seed", "peak rate", "steps", "tokens", "FLOP",
            "reference time", "wall time", "validation loss", "counts")  # fmt: skip
    rows = []
    for group in comparison.groups:
        for result in group.results:
            run = result.run
            costs = result.points[-1].costs if result.points else dict.fromkeys(AXES, math.nan)
            rows.append((
                html.escape(str(run.folder)), html.escape(group.name), str(run.recipe.seed),
                f"{run.recipe.learning_rate.peak:g}", number(costs["steps"], 0),
                _count(costs["tokens"]), _count(costs["flops"]),
                _time(costs[TIME]), _time(costs["wall_seconds"]),
                number(result.points[-1].loss if result.points else math.nan, 4),
                html.escape(result.fault) or "yes",
            ))  # fmt: skip
    return table(head, rows)


def _step_table(comparison: Comparison) -> str:
    rows = [
        (html.escape(group.name), str(stage + 1), str(plan.num_hidden_layers), f"{plan.steps:,}",
         *_median(comparison.step_rows.get(group.first.configuration(stage), [])))
        for group in comparison.groups
        for stage, plan in enumerate(group.first.recipe.stages)
    ]  # fmt: skip
    head = ("recipe", "stage", "layers", "steps", "median seconds per step", "of rows")
    return table(head, rows)


def _median(seconds: Sequence[float]) -> tuple[str, str]:
    return number(median(seconds) if seconds else math.nan, 4), f"{len(seconds):,}"


def _at(speedups: Sequence[Speedup], axis: str) -> Speedup | None:
    return next((found for found in speedups if found.axis == axis), None)


def _layers(group: Group) -> str:
    return " to ".join(str(stage.num_hidden_layers) for stage in group.first.recipe.stages)


def _seeds(group: Group) -> str:
    return ", ".join(map(str, group.seeds)) or "none"


def _loss(group: Group) -> str:
    """Mean, and the range over the seeds."""
    if len(group.losses) < 2:
        return _known(group.loss)
    return f"{group.loss:.4f}<br>{min(group.losses):.4f} to {max(group.losses):.4f}"


def _ratio(found: Speedup) -> str:
    return f"<b>{found.ratio:.2f}x</b><br>{_between(found.interval)}"


def _between(found: Interval, digits: int = 2) -> str:
    """An interval; of a bound beyond the frontier only the side is known."""
    if math.isnan(found.low):
        return "no interval"
    low = f"{found.low:.{digits}f}" if found.low else "below the frontier"
    high = f"{found.high:.{digits}f}" if math.isfinite(found.high) else "beyond the frontier"
    return f"{low} to {high}"


def _known(nats: float) -> str:
    return number(nats, 4) if math.isfinite(nats) else "not known"


def _time(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "not known"
    return duration(seconds) if seconds >= 100 else f"{seconds:.3g} s"


def _count(value: float) -> str:
    """On one line."""
    return scaled(value).replace(" ", "&nbsp;") if math.isfinite(value) else "not known"


def _csv(rows: Sequence[Mapping[str, object]]) -> bytes:
    """With a head; an empty cell where a number is not known."""
    stream = io.StringIO()
    if rows:
        writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            {k: "" if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()}
            for row in rows
        )
    return stream.getvalue().encode()
