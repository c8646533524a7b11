"""Raw text to HDF5 shards, a vocabulary alone, or a check of finished shards."""

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

from data_prep.errors import UserError
from data_prep.pipeline import prepare_shards, train_vocabulary
from data_prep.settings import PrepareSettings
from data_prep.shard_format import check_folder

EXAMPLES = {
    "shards": "python launch/prepare_data.py shards corpus.jsonl.xz --out data --vocab-size 8192",
    "vocab": "python launch/prepare_data.py vocab corpus.jsonl.xz --out vocabulary",
    "check": "python launch/prepare_data.py check data",
}


def main() -> int:
    """Run one subcommand; 0 done, 2 the user's mistake."""
    arguments = _parser().parse_args()
    try:
        return int(arguments.run(arguments))
    except UserError as error:
        message = json.dumps({"error": str(error)}) if arguments.json else f"error: {error}"
        print(message, file=sys.stderr)
        return 2


def _shards(arguments: argparse.Namespace) -> int:
    report = prepare_shards(_settings(arguments))
    print(json.dumps(asdict(report), default=str) if arguments.json else report.text())
    return 0


def _vocab(arguments: argparse.Namespace) -> int:
    tokenizer = train_vocabulary(_settings(arguments))
    tokenizer.save(arguments.out)
    size, digest = tokenizer.vocab_size, tokenizer.sha256
    result = {"out": str(arguments.out), "vocab_size": size, "sha256": digest}
    print(json.dumps(result) if arguments.json else f"{size:,} pieces in {arguments.out}")
    return 0


def _check(arguments: argparse.Namespace) -> int:
    faults = check_folder(arguments.data_dir)
    text = "\n".join(faults) or f"{arguments.data_dir}: no fault"
    print(json.dumps({"faults": faults}) if arguments.json else text)
    return 2 if faults else 0


def _settings(arguments: argparse.Namespace) -> PrepareSettings:
    fields = PrepareSettings.__dataclass_fields__
    return PrepareSettings(**{k: v for k, v in vars(arguments).items() if k in fields})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, epilog=f"example: {EXAMPLES['shards']}")
    commands = parser.add_subparsers(required=True, metavar="{shards,vocab,check}")
    made = {}
    for name, run in (("shards", _shards), ("vocab", _vocab), ("check", _check)):
        made[name] = commands.add_parser(name, epilog=f"example: {EXAMPLES[name]}")
        made[name].set_defaults(run=run)
        made[name].add_argument("--json", action="store_true", help="print one JSON object")
    made["check"].add_argument("data_dir", type=Path, metavar="DIR", help="folder of shards")
    _add_text(made["vocab"])
    _add_text(made["shards"])
    _add_shards(made["shards"])
    return parser


def _add_text(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("inputs", nargs="+", type=Path, metavar="INPUT", help=".jsonl, .txt (.gz, .xz) or folders")
    add("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    add("--validation", nargs="+", type=Path, default=[], metavar="FILE", help="held-out files")
    add("--field", default="text", help="key of the text in JSON lines (text)")
    add("--vocab-size", type=int, default=8192, metavar="N", help="pieces to train (8192)")


def _add_shards(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--tokenizer", type=Path, metavar="FILE", help="vocab.txt or tokenizer.json (train one)")
    add("--max-seq-length", type=int, default=128, metavar="S", help="tokens a sequence (128)")
    add("--pairs", choices=("none", "nsp"), default="none", help="nsp: BERT's sentence pairs")
    add("--static-masks", action="store_true", help="masks in the files: NVIDIA's dialect")
    add("--masked-lm-prob", type=float, default=0.15, help="static masks' share (0.15)")
    add("--max-predictions-per-seq", type=int, default=0, metavar="P", help="static; 0: by share")
    add("--rows-per-shard", type=int, default=65_536, help="most sequences a file (65536)")
    add("--workers", type=int, default=os.cpu_count() or 1, help="processes; same bytes for any")
    add("--seed", type=int, default=1, help="of pairs, static masks and order (1)")


if __name__ == "__main__":
    sys.exit(main())
