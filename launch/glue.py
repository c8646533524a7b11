"""GLUE: fine-tune a pre-trained model on its tasks; score predictions for the dev sets.

examples:
  python launch/glue.py train RUN_DIR GLUE_DIR --out OUT --seeds 3
  python launch/glue.py score GLUE_DIR OUT/seed_1/dev --tasks CoLA MRPC STS-B
"""

import argparse
import importlib
import json
import sys
from dataclasses import asdict
from pathlib import Path

from stacking.commands import GOES_ON, exit_code
from stacking.fine_tuning_flags import FLAGS, GLUE_FLAGS
from stacking.glue_scores import score_folders
from stacking.glue_tables import score_lines
from stacking.glue_tasks import BY_NAME, GlueTask

EXAMPLES = "examples:" + (__doc__ or "").partition("examples:")[2]


def main() -> int:
    """0 done, 2 the user's mistake, 3 stopped by Ctrl-C."""
    asked = parse_arguments()
    run = train if asked.verb == "train" else score
    return exit_code(lambda: run(asked), as_json=asked.json, stopped=GOES_ON)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="glue.py", description=__doc__, formatter_class=raw)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    verb = verbs.add_parser("train", formatter_class=raw, epilog=EXAMPLES,
                            help="fine-tune on each task, with one seed or several: predictions "
                            "and submission files in OUT/seed_N")  # fmt: skip
    for name, options in (*FLAGS, *GLUE_FLAGS):
        verb.add_argument(name, **options)
    _add_tasks(verb)
    verb = verbs.add_parser("score", formatter_class=raw, epilog=EXAMPLES,
                            help="metrics and averages of predictions for the dev sets, in per "
                            "cent; tasks that lack gold or predictions are named")  # fmt: skip
    verb.add_argument("gold", type=Path, metavar="GLUE_DIR", help="GLUE's official layout")
    verb.add_argument("predictions", type=Path, metavar="PREDICTIONS_DIR",
                      help="CoLA.tsv, MNLI-m.tsv, ... in the form of a submission: a header `index "
                      "TAB prediction`; index: number of the dev row from 0")  # fmt: skip
    _add_tasks(verb)
    verb.add_argument("--json", action="store_true", help="print the numbers as one JSON line")
    return parser.parse_args()


def _add_tasks(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--tasks", nargs="+", choices=list(BY_NAME), default=list(BY_NAME),
                      metavar="NAME", help=f"of {', '.join(BY_NAME)} (default: all)")  # fmt: skip


def train(asked: argparse.Namespace) -> int:
    """Fine-tune and print a line a task; 0."""
    training = importlib.import_module("stacking.glue_outcome")  # only this verb needs torch
    print(training.train(vars(asked) | {"tasks": _tasks(asked)}))
    return 0


def _tasks(asked: argparse.Namespace) -> tuple[GlueTask, ...]:
    return tuple(BY_NAME[name] for name in BY_NAME if name in asked.tasks)


def score(asked: argparse.Namespace) -> int:
    """Score the predictions of a folder; 0."""
    found = score_folders(asked.gold, asked.predictions, _tasks(asked))
    for note in found.notes:
        print(note, file=sys.stderr)
    if asked.json:
        print(json.dumps({"scores": found.scores, "task_scores": found.task_scores,
                          "skipped": found.skipped, "average": asdict(found.average)}))  # fmt: skip
    else:
        print("\n".join(score_lines(found)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
