"""Grow a finished model, ours or anybody's BERT: a Hugging Face folder in, a larger one out.

example:
  python launch/grow.py --model HF_DIR --to num_hidden_layers=12 hidden_size=768 --out NEW_DIR
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from stacking.commands import exit_code
from stacking.errors import ConfigError
from stacking.growth.plan import Operators
from stacking.hf_grow import FolderPlan, grow_folder, plan_folder

STOPPED = "stopped; nothing was written, the same command starts anew"
DIMENSIONS = ("depth", "ffn", "heads", "hidden", "positions")


def main() -> int:
    """0 done, 2 the user's mistake, 3 stopped by Ctrl-C with nothing written."""
    asked = parse_arguments()
    return exit_code(lambda: run(asked), as_json=asked.json, stopped=STOPPED)


def run(asked: argparse.Namespace) -> int:
    """Plan, grow, and print the report; 0."""
    plan = plan_of(asked)
    if not asked.json:
        print(plan.text(), flush=True)
    report = grow_folder(plan, asked.seed)
    result = report.as_dict() | {"decided": list(plan.notes)}
    print(json.dumps(result) if asked.json else report.text())
    return 0


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="grow.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, defaults = parser.add_argument, Operators()
    add("--model", type=Path, required=True, metavar="HF_DIR", help="folder to grow")
    add("--to", nargs="+", required=True, metavar="KEY=VALUE",
        help="sizes that change, as in num_hidden_layers=12 hidden_size=768")  # fmt: skip
    for dimension in DIMENSIONS:
        default = getattr(defaults, dimension)
        add(f"--{dimension}", default=default, metavar="NAME",
            help=f"operator, see docs/growth.md (default: {default})")  # fmt: skip
    add("--seed", type=int, default=0, help="of all that is drawn (default: 0)")
    add("--out", type=Path, required=True, metavar="HF_DIR",
        help="folder to write; what an earlier growth wrote there is replaced")  # fmt: skip
    add("--json", action="store_true", help="print the result as one JSON line")
    return parser.parse_args()


def plan_of(asked: argparse.Namespace) -> FolderPlan:
    """What is asked for, checked; ConfigError with all faults, those of the words first."""
    target, faults = sizes(asked.to)
    operators = Operators(**{name: getattr(asked, name) for name in DIMENSIONS})
    try:
        plan = plan_folder(asked.model, target, operators, asked.out)
    except ConfigError as error:
        raise ConfigError(faults + error.faults) from error
    if faults:
        raise ConfigError(faults)
    return plan


def sizes(words: Sequence[str]) -> tuple[dict[str, object], list[str]]:
    """(key -> number, faults) of words such as hidden_size=768."""
    target: dict[str, object] = {}
    faults = []
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not value.isdecimal():
            faults.append(f"--to {word}: no number; allowed: KEY=NUMBER, as in hidden_size=768")
        elif key in target:
            faults.append(f"--to {word}: {key} is given twice")
        else:
            target[key] = int(value)
    return target, faults


if __name__ == "__main__":
    sys.exit(main())
