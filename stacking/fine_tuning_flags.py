"""The command-line flags of fine-tuning, shared by glue.py and squad.py or not, for argparse."""

from pathlib import Path
from typing import Any

FLAGS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("model", {"type": Path, "metavar": "MODEL", "help": "a run folder, or a Hugging Face folder"}),
    ("--out", {"type": Path, "required": True, "metavar": "DIR",
               "help": "results and predictions, seed by seed; what is there is not done again"}),
    ("--seeds", {"type": int, "default": 1, "metavar": "N", "dest": "num_seeds",
                 "help": "runs of each task (default: 1)"}),
    ("--first-seed", {"type": int, "default": 1, "metavar": "N", "help": "the others follow it"}),
    ("--epochs", {"type": int, "metavar": "N", "dest": "num_epochs",
                  "help": "instead of the recipe's own"}),
    ("--batch-size", {"type": int, "metavar": "N", "help": "likewise, in sequences"}),
    ("--learning-rate", {"type": float, "metavar": "X", "help": "likewise, the highest"}),
    ("--dropout", {"type": float, "metavar": "X", "help": "likewise, of hidden states and of "
                   "attention (default: 0.1, whatever the pre-training had)"}),
    ("--processes", {"type": int, "default": 1, "metavar": "N", "help": "so many runs at a time"}),
    ("--tag", {"help": "checkpoint of the run folder (default: the furthest)"}),
    ("--tokenizer", {"type": Path, "metavar": "FILE", "help": "tokenizer.json, if MODEL has none"}),
    ("--deepspeed_config", {"type": Path, "help": "how it runs: deepspeed_configs/*.json"}),
    ("--strict-precision", {"action": "store_true",
                            "help": "refuse another precision than the JSON's"}),
    ("--json", {"action": "store_true", "help": "print the numbers as one JSON line"}),
)  # fmt: skip

GLUE_FLAGS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("glue", {"type": Path, "metavar": "GLUE_DIR", "help": "GLUE's official layout"}),
    ("--grid", {"action": "store_true", "help": "first find each task's batch, rate and epochs on "
                "dev: the paper's 12 settings, one run each"}),
    ("--grid-from", {"type": Path, "metavar": "OUT", "help": "take what --grid found there, with "
                     "another model: the paper searches with its baseline only"}),
)  # fmt: skip

SQUAD_FLAGS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("train", {"type": Path, "metavar": "TRAIN", "help": "SQuAD JSON to train on"}),
    ("dev", {"type": Path, "metavar": "DEV", "help": "SQuAD JSON with the answers, to be scored"}),
    ("--max-seq-length", {"type": int, "metavar": "N", "help": "tokens of a window (default: 384, "
                          "or the model's longest)"}),
    ("--doc-stride", {"type": int, "metavar": "N", "help": "tokens from a window to the next one"}),
    ("--max-query-length", {"type": int, "metavar": "N", "help": "tokens of a question"}),
    ("--n-best-size", {"type": int, "metavar": "N", "default": 20,
                       "help": "answers kept for each question (default: 20)"}),
    ("--max-answer-length", {"type": int, "metavar": "N", "default": 30,
                             "help": "tokens (default: 30)"}),
    ("--null-score-diff-threshold", {"type": float, "metavar": "X", "default": 0.0,
                                     "help": "version 2: how much more likely no answer must be"}),
)  # fmt: skip
