"""A Suggestion in; what people and programs read out: tables with reasons, or a JSON object."""

import math

from rich.console import Console
from rich.markup import escape

from stacking.config_loading import JsonObject
from stacking.stage_plan import LOWEST_CEILING
from stacking.stage_plan_suggest import Option, Suggestion
from stacking.stage_plan_table import table_of


def show_suggestion(found: Suggestion, console: Console) -> None:
    """Print everything, in the console's width."""
    console.print(
        f"[bold]{escape(found.recipe.name)}[/]: {found.evidence.target} in a budget of "
        f"{found.budget_seconds:,.0f} s: steps and stage switches; evaluation and saving come on "
        "top"
    )
    console.print("\n[bold]A step of each candidate[/]")
    _show_times(found, console)
    console.print(f"\n[bold]What fits the budget[/], growing to {found.evidence.target} in one hop")
    _show_options(found, console)
    for option in found.options:
        console.print(f"\n[bold]{escape(option.candidate.name)}[/]")
        for line in reasons(option):
            console.print(f"- {escape(line)}")
    console.print("\n[bold]Advice[/]")
    for line in advice(found):
        console.print(escape(line))


def reasons(option: Option) -> list[str]:
    """Why this candidate is, or is not, one; one line each."""
    candidate = option.candidate
    control = {"ahead": "is AHEAD", "behind": "is behind", "unknown": "is undecided"}
    lines = [
        f"mixing: {candidate.mixing.reason}",
        f"flattening: {candidate.flattening.reason}",
        f"never grown, it {control[candidate.control.verdict]} at equal time: "
        f"{candidate.control.reason}",
    ]
    return lines + ([f"not proposed: {option.refusal}"] if option.refusal else [])


def advice(found: Suggestion) -> list[str]:
    """What to do, what it rests on, and what would tell more."""
    lines = _proposal(found) if found.chosen else _scratch(found)
    lines += [
        f"{option.candidate.name}: if it mixed {_bound(option)}, the ceiling would be "
        f"{option.ceiling:.2f}x. To know, train a pilot that grows from it, and one of "
        f"{found.evidence.target} from scratch, until it has caught up at the constant rate."
        for option in found.options
        if option.ceiling >= LOWEST_CEILING and not option.candidate.mixing.is_known
        and not (found.chosen and option.ceiling <= found.chosen.ceiling)
    ]  # fmt: skip
    return lines + _controls(found) + list(found.evidence.notes)


def _proposal(found: Suggestion) -> list[str]:
    chosen, evidence = found.chosen, found.evidence
    assert chosen, "nothing is proposed"
    assert chosen.schedule, "what has no schedule is not chosen"
    schedule, candidate, charged = chosen.schedule, chosen.candidate, ""
    faster = f"at most {schedule.ceiling:.2f}x faster"
    if math.isfinite(found.pilots_ceiling):
        charged = (
            f" With the pilots' {evidence.pilot_seconds:,.0f} s charged, at most "
            f"{found.pilots_ceiling:.2f}x."
        )
    if found.runs_to_pay > 1:
        faster = (
            f"this pays only when repeated, in {found.runs_to_pay:,} such runs or more, because "
            f"the pilots took longer than one can save; each is {faster}"
        )
    return [
        f"Grow from {candidate.name} to {evidence.target} at step {schedule.switch_step:,} of "
        f"{schedule.steps:,}: {faster} than {schedule.steps:,} steps from scratch, of which "
        f"{found.scratch_steps:,} fit the budget.{charged}",
        f"The switch is the latest that leaves t_mix, {candidate.mixing.steps:,} steps, before the "
        f"decay. The pilot grew after {candidate.mixing.switch_step:,} steps; that t_mix is the "
        f"same after {schedule.switch_step:,} is assumed.",
    ]


def _scratch(found: Suggestion) -> list[str]:
    known = [option for option in found.options if math.isfinite(option.ceiling)]
    first = (
        f"Train {found.evidence.target} from scratch: {found.scratch_steps:,} steps fit the budget."
    )
    if not known:
        why = "No candidate has room to grow in it." if found.options else "No other was tried."
        return [f"{first} {why}"]
    best = max(known, key=lambda option: option.ceiling)
    return [
        f"{first} No growth is promised: the best would be from {best.candidate.name}, but "
        f"{best.refusal}."
    ]


def _controls(found: Suggestion) -> list[str]:
    """Which models that never grew may be as good; of those not proposed, which are better."""
    words = {"ahead": "was ahead at equal time. Lengthen the pilots, or choose a target for which "
             "it is clearly too small.", "unknown": "may be as good at equal time."}  # fmt: skip
    candidates = {
        option.candidate.model: option.candidate
        for option in found.options
        if option is found.chosen or option.candidate.control.verdict == "ahead"
    }
    return [
        f"No growth claim holds at the pilots' length: {model}, never grown, "
        f"{words[candidate.control.verdict]} Train it for the whole budget, too."
        for model, candidate in candidates.items() if candidate.control.verdict in words
    ]  # fmt: skip


def _bound(option: Option) -> str:
    steps = option.candidate.mixing.steps
    return f"right after the {steps:,} steps of its pilot" if steps else "at once"


def _show_times(found: Suggestion, console: Console) -> None:
    table = table_of(("model", "s a step", "of the target", "known from"), ("model", "known from"))
    target = found.evidence.target_time
    rows = {one.model: one.time for one in found.evidence.candidates}
    for name, time in (rows | {found.evidence.target: target}).items():
        is_known = math.isfinite(time.seconds)
        table.add_row(
            escape(name),
            f"{time.seconds:,.4g}" if is_known else "",
            f"{100 * time.seconds / target.seconds:.0f} %" if is_known else "",
            time.source,
        )
    console.print(table)


def _show_options(found: Suggestion, console: Console) -> None:
    columns = ("t_mix", "switch at step", "of steps", "s", "ceiling, at most")
    table = table_of(("from", *columns), ("from",))
    for option in found.options:
        mixing, schedule = option.candidate.mixing, option.schedule
        cells = ["", "", "", ""]
        if schedule:
            cells = [f"{schedule.switch_step:,}", f"{schedule.steps:,}", f"{schedule.seconds:,.0f}",
                     f"{schedule.ceiling:.2f}x"]  # fmt: skip
        at_least = f"over {mixing.steps:,}" if mixing.steps else "?"
        steps = f"{mixing.steps:,}" if mixing.is_known else at_least
        mark = " *" if option is found.chosen else ""
        table.add_row(escape(option.candidate.name) + mark, steps, *cells)
    seconds = found.scratch_steps * found.evidence.target_time.seconds
    table.add_row("scratch" + ("" if found.chosen else " *"), "", "", f"{found.scratch_steps:,}",
                  f"{seconds:,.0f}", "1.00x")  # fmt: skip
    console.print(table)


def suggestion_json(found: Suggestion) -> JsonObject:
    """The same as plain values; seconds and steps, null where nobody knows."""
    evidence = found.evidence
    return {
        "verdict": _verdict(found),
        "runs_to_pay": found.runs_to_pay if found.chosen else None,
        "from": found.chosen.candidate.name if found.chosen else None,
        "ceiling": _number(found.chosen.ceiling if found.chosen else math.nan),
        "ceiling_with_pilots": _number(found.pilots_ceiling),
        "budget_seconds": found.budget_seconds,
        "scratch_steps": found.scratch_steps,
        "target": {"name": evidence.target, "step_seconds": evidence.target_time.seconds,
                   "timed": evidence.target_time.source},
        "switch_seconds": _number(evidence.switch_seconds),
        "pilot_seconds": _number(evidence.pilot_seconds),
        "candidates": [_option_json(option) for option in found.options],
        "advice": advice(found),
        "recipe": found.recipe.model_dump(mode="json"),
    }  # fmt: skip


def _verdict(found: Suggestion) -> str:
    """In one word for programs."""
    if not found.chosen:
        return "scratch"
    return "grow_if_repeated" if found.runs_to_pay > 1 else "grow"


def _option_json(option: Option) -> JsonObject:
    candidate, schedule = option.candidate, option.schedule
    return {
        "name": candidate.name,
        "model": candidate.model,
        "num_hidden_layers": candidate.first.num_hidden_layers,
        "step_seconds": _number(candidate.time.seconds),
        "timed": candidate.time.source,
        "t_mix": candidate.mixing.steps,
        "t_mix_is_known": candidate.mixing.is_known,
        "flattens_at": candidate.flattening.step,
        "control": {"verdict": candidate.control.verdict, "nats": _number(candidate.control.nats)},
        "steps": schedule.steps if schedule else None,
        "switch_step": schedule.switch_step if schedule else None,
        "seconds": schedule.seconds if schedule else None,
        "ceiling": _number(option.ceiling),
        "reasons": reasons(option),
    }


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
