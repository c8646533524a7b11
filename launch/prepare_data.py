"""Raw text to HDF5 shards, a vocabulary alone, other projects' shards to ours, or a check."""

import argparse
import json
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from data_prep.errors import UserError
from data_prep.flags import argument
from data_prep.foreign.convert import ConvertSettings, convert_folder
from data_prep.pipeline import prepare_shards, train_vocabulary
from data_prep.progress import Steps
from data_prep.settings import PrepareSettings
from data_prep.shard_check import check_folder

EXAMPLES = {
    "shards": "python launch/prepare_data.py shards corpus.jsonl.xz --out data --vocab-size 8192",
    "vocab": "python launch/prepare_data.py vocab corpus.jsonl.xz --out vocabulary",
    "convert": "python launch/prepare_data.py convert hdf5 --tokenizer vocab.txt --out data",
    "check": "python launch/prepare_data.py check data",
}


def main() -> int:
    """Run one subcommand; 0 done, 2 the user's mistake, 3 stopped by Ctrl-C."""
    arguments = _parser().parse_args()
    try:
        return int(arguments.run(arguments))
    except UserError as error:
        message = json.dumps({"error": str(error)}) if arguments.json else f"error: {error}"
        print(message, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped early; the same command goes on from here", file=sys.stderr)
        return 3


def _shards(arguments: argparse.Namespace) -> int:
    report = prepare_shards(_settings(PrepareSettings, arguments), is_live=not arguments.json)
    if report is not None:
        print(json.dumps(report.as_dict()) if arguments.json else report.text())
    return 0


def _vocab(arguments: argparse.Namespace) -> int:
    settings = _settings(PrepareSettings, arguments)
    tokenizer = train_vocabulary(settings, is_live=not arguments.json)
    size, digest = tokenizer.vocab_size, tokenizer.sha256
    result = {"out": str(arguments.out), "vocab_size": size, "sha256": digest}
    print(json.dumps(result) if arguments.json else f"{size:,} pieces in {arguments.out}")
    return 0


def _convert(arguments: argparse.Namespace) -> int:
    settings = _settings(ConvertSettings, arguments)
    with Steps(is_live=not arguments.json) as steps:
        manifest = convert_folder(settings, steps)
    rows = sum(entry.rows for entry in manifest.training + manifest.validation)
    result = {"out": str(arguments.out), "sequences": rows, "dialect": manifest.dialect}
    print(json.dumps(result) if arguments.json else f"{rows:,} sequences in {arguments.out}")
    return 0


def _check(arguments: argparse.Namespace) -> int:
    faults = check_folder(arguments.data_dir)
    text = "\n".join(faults) or f"{arguments.data_dir}: no fault"
    print(json.dumps({"faults": faults}) if arguments.json else text)
    return 2 if faults else 0


def _settings(kind: type[Any], arguments: argparse.Namespace) -> Any:
    return kind(**{k: v for k, v in vars(arguments).items() if k in kind.__dataclass_fields__})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, epilog=f"example: {EXAMPLES['shards']}")
    commands = parser.add_subparsers(required=True, metavar=f"{{{','.join(EXAMPLES)}}}")
    runs = {"shards": _shards, "vocab": _vocab, "convert": _convert, "check": _check}
    for name, run in runs.items():
        command = commands.add_parser(name, epilog=f"example: {EXAMPLES[name]}")
        command.set_defaults(run=run)
        command.add_argument("--json", action="store_true", help="print one JSON object")
        if name == "check":
            command.add_argument("data_dir", type=Path, metavar="DIR", help="folder of shards")
            continue
        settings = ConvertSettings if name == "convert" else PrepareSettings
        for field in fields(settings):
            if name != "vocab" or field.metadata["vocab"]:
                flag, options = argument(field)
                command.add_argument(flag, **options)
    return parser


if __name__ == "__main__":
    sys.exit(main())
