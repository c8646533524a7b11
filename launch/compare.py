"""How much growth saves: grown runs against the frontier of runs from scratch, everything charged.

Prints a table and writes compare.html, runs.csv, speedups.csv, curves.csv and a PNG for each axis.
A run's branches come with it; seeds of one recipe are taken together. Runs of other data, masks,
evaluation or batch are refused.

example:
  python launch/compare.py runs/scratch_* runs/stacked_* runs/small_alone --out comparison
  python launch/compare.py runs/stacked --baseline runs/long runs/short --control runs/small \\
      --out comparison
"""

import argparse
import json
import math
import sys
from dataclasses import asdict
from pathlib import Path

from stacking.commands import STARTS_ANEW, exit_code
from stacking.comparison import Comparison, compare
from stacking.comparison_budget import check_budget, within
from stacking.comparison_page import speedup_rows, text, write_comparison
from stacking.comparison_runs import each_once, read_pilots, read_runs, with_branches


def main() -> int:
    """0 done, 2 the user's mistake, 3 stopped by Ctrl-C."""
    arguments = parse_arguments()
    return exit_code(lambda: run(arguments), as_json=arguments.json, stopped=STARTS_ANEW)


def run(arguments: argparse.Namespace) -> int:
    """Compare, write the page and print the table; 0."""
    budget = None if arguments.budget is None else check_budget(arguments.budget)
    comparison = compare_folders(arguments)
    page = write_comparison(comparison, arguments.out, budget)
    if arguments.json:
        print(json.dumps(as_json(comparison, page, budget)))
    else:
        print(f"{text(comparison, budget)}\n{'page':<6} {page}")
    return 0


def compare_folders(arguments: argparse.Namespace) -> Comparison:
    """Each folder and its branches once, however often and by whatever path it is named."""
    control = [arguments.control] if arguments.control else []
    given = [path for folder in arguments.runs for path in with_branches(folder)]
    folders = {path.resolve(): path for path in each_once([*given, *arguments.baseline, *control])}
    baseline = [folders[path.resolve()] for path in arguments.baseline]
    named_control = folders[control[0].resolve()] if control else None
    pilots, timed = read_pilots(arguments.pilot), read_pilots(arguments.timed)
    return compare(read_runs(list(folders.values())), baseline, named_control, pilots, timed)


def as_json(comparison: Comparison, page: Path, budget: float | None) -> dict[str, object]:
    """The numbers; null where one is not known or infinite."""
    rows = [
        {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        for row in speedup_rows(comparison)
    ]
    controls = [
        {"grown": c.grown, "control": c.control, "verdict": c.verdict, "reason": c.reason}
        for c in comparison.controls
    ]
    found = {"page": str(page), "speedups": rows, "controls": controls, "notes": comparison.notes}
    if budget is not None:
        found["within_budget"] = [asdict(one) for one in within(comparison, budget)]
    return found


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="compare.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="run folders of launch/pretrain.py")
    add("--out", type=Path, required=True, metavar="DIR", help="folder for the page and files")
    add("--baseline", nargs="+", type=Path, default=[], metavar="RUN",
        help="the scratch runs (default: those of one stage of the target's size)")  # fmt: skip
    add("--control", type=Path, metavar="RUN",
        help="the small model that never grew (default: a grown run's first model)")  # fmt: skip
    add("--pilot", nargs="+", type=Path, default=[], metavar="RUN",
        help="runs by which the grown recipes were chosen: all are charged to each, with "
        "their branches")  # fmt: skip
    add("--timed", nargs="+", type=Path, default=[], metavar="RUN",
        help="short runs of the same stages, made alone on a quiet machine: their steps alone are "
        "the reference time")  # fmt: skip
    add("--budget", type=float, metavar="SECONDS",
        help="rank, too, what ends within so much reference time")  # fmt: skip
    add("--json", action="store_true", help="print the numbers as one JSON line")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
