"""An examination in; what people and programs read out: a rich table, or one JSON object."""

from dataclasses import asdict

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from stacking.config_loading import JsonObject
from stacking.doctor import Examination
from stacking.doctor_findings import Finding, counted

_COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}


def show_examination(seen: Examination, console: Console) -> None:
    """Print the table, what was left out, and the sum."""
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for name in ("", "check", "where"):
        table.add_column(name, overflow="fold")
    table.add_column("found", ratio=1, overflow="fold")
    for finding in seen.findings:
        colour = _COLOURS[finding.status]
        cells = (finding.check, finding.where, _text(finding))
        table.add_row(f"[{colour}]{finding.status}[/]", *cells)
    console.print(table)
    if seen.left_out:
        console.print()
    for line in seen.left_out:
        console.print(f"not checked: {escape(line)}")
    console.print(f"\n{escape(_sum(seen))}")


def _text(finding: Finding) -> str:
    fix = f"\n[bold]fix:[/] {escape(finding.fix)}" if finding.fix else ""
    return escape(finding.found) + fix


def _sum(seen: Examination) -> str:
    fails, warnings = seen.count("fail"), seen.count("warn")
    where = counted(len(seen.hosts), "host") if seen.hosts else "this machine"
    verdict = f"{fails} to mend before the job is started" if fails else "nothing stands in the way"
    return (
        f"{where}, {counted(seen.world_size, 'rank')}: {verdict}; {counted(warnings, 'warning')} "
        f"({seen.seconds:.1f} s)"
    )


def examination_json(seen: Examination) -> JsonObject:
    """The same as plain values."""
    return {
        "ok": not seen.count("fail"),
        "fails": seen.count("fail"),
        "warnings": seen.count("warn"),
        "hosts": list(seen.hosts),
        "world_size": seen.world_size,
        "findings": [asdict(finding) for finding in seen.findings],
        "left_out": list(seen.left_out),
        "seconds": round(seen.seconds, 1),
    }
