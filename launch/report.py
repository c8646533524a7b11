"""Write RUN_DIR/report.html and RUN_DIR/loss.png, and print the headline numbers.

example:
  python launch/report.py RUN_DIR
"""

import argparse
import json
import sys
from pathlib import Path

from stacking.commands import STARTS_ANEW, exit_code
from stacking.report import read_metrics, summarize, write_report


def main() -> int:
    """0 done, 2 the user's mistake, 3 stopped by Ctrl-C."""
    arguments = parse_arguments()
    return exit_code(lambda: run(arguments), as_json=arguments.json, stopped=STARTS_ANEW)


def run(arguments: argparse.Namespace) -> int:
    """Write the page and print the headline; 0."""
    page = write_report(arguments.run_dir)
    summary = summarize(read_metrics(arguments.run_dir / "metrics.jsonl"))
    if arguments.json:
        print(json.dumps({"report": str(page), **summary.row()}))
    else:
        print(f"{summary.text()}\n{'report':<20} {page}")
    return 0


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="report.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("run_dir", type=Path, metavar="RUN_DIR", help="run folder of launch/pretrain.py")
    add("--json", action="store_true", help="print the numbers as one JSON line")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
