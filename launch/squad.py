"""SQuAD v1.1 and v2.0: fine-tune a pre-trained model, score answers as the official scripts do.

examples:
  python launch/squad.py train RUN_DIR train-v2.0.json dev-v2.0.json --out OUT --seeds 3
  python launch/squad.py score dev-v2.0.json predictions.json --null-odds null_odds.json
  python launch/squad.py score dev-v2.0.json nbest_predictions.json --null-odds null_odds.json \
      --null-threshold -1.5 --out predictions.json
"""

import argparse
import importlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path

from stacking.commands import GOES_ON, exit_code
from stacking.fine_tuning_flags import FLAGS, SQUAD_FLAGS
from stacking.squad_scoring import score_files

EXAMPLES = "examples:" + (__doc__ or "").partition("examples:")[2]


def main() -> int:
    """0 done, 2 the user's mistake, 3 stopped by Ctrl-C."""
    asked = parse_arguments()
    return exit_code(lambda: run(asked), as_json=asked.json, stopped=GOES_ON)


def run(asked: argparse.Namespace) -> int:
    """Print the scores; 0."""
    widths: Mapping[str, float | None] = {}
    if asked.verb == "train":
        training = importlib.import_module("stacking.squad_runs")  # only this verb needs torch
        results = training.train(vars(asked))
        scores, widths = training.means(results), training.half_widths(results)
        numbers = training.training_json(results)
    else:
        files = (asked.gold, asked.predictions, asked.null_odds)
        scores = numbers = score_files(*files, asked.null_threshold, asked.out)
    if asked.json:
        print(json.dumps(numbers))
        return 0
    for name, value in scores.items():
        width = widths.get(name)
        interval = (
            "" if not width else f" +- {width:.4f}   ({asked.num_seeds} seeds, 95 % interval)"
        )
        shown = f"{value:10,d}" if isinstance(value, int) else f"{value:10.4f}"
        print(f"{name:<18} {shown}{interval}")
    return 0


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="squad.py", description=__doc__, formatter_class=raw)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    verb = verbs.add_parser("train", formatter_class=raw, epilog=EXAMPLES,
                            help="fine-tune, answer a file's questions, print the means over the "
                            "seeds; OUT/seed_N has the original script's files")  # fmt: skip
    for name, options in (*FLAGS, *SQUAD_FLAGS):
        verb.add_argument(name, **options)
    verb = verbs.add_parser("score", formatter_class=raw, epilog=EXAMPLES,
                            help="exact match and F1 of predictions, in per cent, as "
                            "evaluate-v1.1.py or evaluate-v2.0.py computes them")  # fmt: skip
    add = verb.add_argument
    add("gold", type=Path, metavar="GOLD", help="SQuAD JSON with the answers; it says its version")
    add("predictions", type=Path, metavar="PREDICTIONS",
        help="JSON: question id -> text; or nbest_predictions.json, whose best answer counts, "
        "whatever its odds")  # fmt: skip
    add("--null-odds", type=Path, metavar="FILE",
        help="JSON: question id -> number, larger where no answer is likelier; version 2.0 only: "
        "adds the best scores and their thresholds")  # fmt: skip
    add("--null-threshold", type=float, metavar="X",
        help="null odds above which a prediction counts as no answer; version 2.0 only "
        "(default: 1.0)")  # fmt: skip
    add("--out", type=Path, metavar="FILE", help="write the answers that are scored: none "
        "where the null odds exceed the threshold")  # fmt: skip
    add("--json", action="store_true", help="print the numbers as one JSON line")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
