"""Write RUN_DIR/report.html and RUN_DIR/loss.png, and print the headline numbers.

example:
  python launch/report.py RUN_DIR
"""

import argparse
import json
import sys
from pathlib import Path

from stacking.errors import UserError
from stacking.report import read_metrics, summarize, write_report


def main() -> int:
    """0 done, 2 the user's mistake."""
    arguments = parse_arguments()
    try:
        page = write_report(arguments.run_dir)
        summary = summarize(read_metrics(arguments.run_dir / "metrics.jsonl"))
    except UserError as error:
        print(json.dumps({"error": str(error)}) if arguments.json else f"error: {error}",
              file=sys.stderr)  # fmt: skip
        return 2
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
