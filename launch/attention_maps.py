"""Draw the attention of a run's models on a sentence: before a stage switch, after it, and trained.

Writes into DIR, as PNG and SVG: maps_TAG, a heat map for each layer and head; side_by_side, chosen
heads and what growth and training made of them (Gong et al. 2019, figure 4); shares, how much of
the words' attention goes to neighbours, the start token and the separator; and shares.csv.

example:
  python launch/attention_maps.py RUN_DIR --out figures --text held_out.txt
  python launch/attention_maps.py RUN_DIR --out figures --tags stage1_end stage2_begin step_00020000
"""

import argparse
import json
import sys
from pathlib import Path

from data_prep.tokens.tokenizer import load_tokenizer
from stacking.attention_maps_files import Limits, share_rows, table, write_attention
from stacking.attention_maps_models import find_models
from stacking.attention_maps_text import read_sentences
from stacking.commands import STARTS_ANEW, exit_code


def main() -> int:
    """0 done, 2 the user's mistake, 3 stopped by Ctrl-C."""
    asked = parse_arguments()
    return exit_code(lambda: run(asked), as_json=asked.json, stopped=STARTS_ANEW)


def run(asked: argparse.Namespace) -> int:
    """Draw, and print the shares; 0."""
    source = find_models(asked.model, asked.tags, all_switches=asked.all_switches)
    tokenizer = load_tokenizer(source.tokenizer)
    shown, measured, notes = read_sentences(asked.sentence, asked.text, tokenizer, source.longest)
    models = list(source.attention(shown, measured))
    limits = Limits(asked.layers, asked.heads, asked.show)
    files, left_out = write_attention(models, shown, asked.out, limits)
    notes = [*source.notes, *notes, *left_out]
    if asked.json:
        print(json.dumps({"sentence": shown.tokens, "sentences": len(measured),
                          "shares": list(share_rows(models)), "files": list(map(str, files)),
                          "notes": notes}))  # fmt: skip
    else:
        print(f"shown: {' '.join(shown.tokens)}")
        words = sum(len(sentence.ids) - 2 for sentence in measured)
        print(f"shares of attention: mean over heads and {words:,} words\n\n{table(models)}\n")
        print("\n".join([*(f"note: {n}" for n in notes), f"{len(files)} files in {asked.out}"]))
    return 0


def positive(word: str) -> int:
    """A whole number from 1 on."""
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"got {word!r}; allowed: a whole number from 1 on")
    return int(word)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="attention_maps.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", type=Path, metavar="RUN_DIR", help="run folder, or a Hugging Face folder")
    add("--out", type=Path, required=True, metavar="DIR", help="folder for the figures")
    add(
        "--sentence",
        metavar="TEXT",
        help="what the maps show (default: the file's first line, or one of ours)",
    )
    add("--text", type=Path, metavar="FILE",
        help="held-out sentences for the shares, one a line (default: the one shown)")  # fmt: skip
    add("--tags", nargs="+", default=[], metavar="TAG",
        help="checkpoints (default: around the last stage switch, and the newest)")  # fmt: skip
    add("--all-switches", action="store_true", help="around each stage switch, and the newest")
    add("--layers", type=positive, default=12, help="most layers in a figure (default: 12)")
    add("--heads", type=positive, default=12, help="most heads in a figure (default: 12)")
    add("--show", nargs="+", default=[], metavar="LAYER:HEAD",
        help="heads of the first model to follow, from 1:1 (default: six, evenly)")  # fmt: skip
    add("--json", action="store_true", help="print the numbers as one JSON line")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
