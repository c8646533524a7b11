"""Raw text to HDF5 shards, a vocabulary alone, other projects' shards to ours, or a check."""

import argparse
import json
import sys
from dataclasses import asdict
from typing import Any, NoReturn

from data_prep.errors import UserError
from data_prep.flags import arguments
from data_prep.foreign.convert import ConvertSettings, convert_folder
from data_prep.pipeline import prepare_shards, train_vocabulary
from data_prep.progress import Steps
from data_prep.report.report import splits_table
from data_prep.settings import PrepareSettings
from data_prep.shard_check import CheckSettings, check_folder

Outcome = tuple[Any, str, int]  # for scripts, for people, the exit code
EXAMPLE = "example: python launch/prepare_data.py "
EXAMPLES = {
    "shards": "shards corpus.jsonl.xz --out data --vocab-size 8192",
    "vocab": "vocab corpus.jsonl.xz --out vocabulary",
    "convert": "convert hdf5 --tokenizer vocab.txt --out data",
    "check": "check data",
}


def main() -> int:
    """Run one subcommand; 0 done, 2 the user's mistake, 3 stopped by Ctrl-C."""
    asked = _parser().parse_args()
    try:
        result, text, code = asked.run(asked)
    except UserError as error:
        return _complain(f"error: {error}", 2)
    except KeyboardInterrupt:
        return _complain("stopped early; the same command goes on from here", 3)
    if text:  # an MPI rank but the first has nothing to say
        print(json.dumps(result) if asked.json else text)
    return int(code)


def _complain(message: str, code: int) -> int:
    as_json = json.dumps({"error": message.removeprefix("error: ")})
    print(as_json if "--json" in sys.argv else message, file=sys.stderr)
    return code


class _Parser(argparse.ArgumentParser):
    """Complains in the form that was asked for."""

    def error(self, message: str) -> NoReturn:
        sys.exit(_complain(f"error: {message}; see {self.prog} --help", 2))


def _shards(asked: argparse.Namespace) -> Outcome:
    report = prepare_shards(_settings(PrepareSettings, asked), is_live=not asked.json)
    return ({}, "", 0) if report is None else (report.as_dict(), report.text(), 0)


def _vocab(asked: argparse.Namespace) -> Outcome:
    settings = _settings(PrepareSettings, asked)
    made = train_vocabulary(settings, is_live=not asked.json)
    result = {"out": str(settings.out), "vocab_size": made.vocab_size, "sha256": made.sha256}
    return result, f"{made.vocab_size:,} pieces in {settings.out}", 0


def _convert(asked: argparse.Namespace) -> Outcome:
    with Steps(is_live=not asked.json) as steps:
        manifest = convert_folder(_settings(ConvertSettings, asked), steps)
    result = {"out": str(asked.out), "manifest": asdict(manifest)}
    return result, f"{splits_table(manifest)}\n{asked.out}", 0


def _check(asked: argparse.Namespace) -> Outcome:
    faults = check_folder(asked.data_dir, asked.tokenizer)
    text = "\n".join(faults) or f"{asked.data_dir}: no fault"
    return {"faults": faults}, text, 2 if faults else 0


def _settings(kind: type[Any], asked: argparse.Namespace) -> Any:
    return kind(**{k: v for k, v in vars(asked).items() if k in kind.__dataclass_fields__})


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(description=__doc__, epilog=EXAMPLE + EXAMPLES["shards"])
    commands = parser.add_subparsers(required=True, metavar=f"{{{','.join(EXAMPLES)}}}")
    runs = {"shards": _shards, "vocab": _vocab, "convert": _convert, "check": _check}
    settings = {"convert": ConvertSettings, "check": CheckSettings}
    for name, run in runs.items():
        command = commands.add_parser(name, epilog=EXAMPLE + EXAMPLES[name])
        command.set_defaults(run=run)
        command.add_argument("--json", action="store_true", help="print one JSON object")
        for flag, options in arguments(settings.get(name, PrepareSettings), name == "vocab"):
            command.add_argument(flag, **options)
    return parser


if __name__ == "__main__":
    sys.exit(main())
