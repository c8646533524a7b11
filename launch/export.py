"""Export a run as a folder that transformers loads; its logits are compared before it counts.

example:
  python launch/export.py RUN_DIR --out HF_DIR --data-license cc-by-sa-4.0 --language en
"""

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from stacking.checkpoint import Checkpoint
from stacking.commands import STARTS_ANEW, exit_code
from stacking.hf import ExportReport, save_pretrained
from stacking.hf_card import card
from stacking.hf_card_facts import run_facts
from stacking.hf_tokenizer import TOKENIZER
from stacking.pretrained import checkpoint_model, find_checkpoint, require_tokenizer

HINT = "the model card does not state the data's licence; to do so: --data-license TEXT"


def main() -> int:
    """0 done, 2 the user's mistake, 3 stopped by Ctrl-C."""
    options = parse_arguments()
    return exit_code(lambda: run(options), as_json=options.json, stopped=STARTS_ANEW)


def run(options: argparse.Namespace) -> int:
    """Export and say what came of it; 0."""
    checkpoint = find_checkpoint(options.run_dir, options.tag)
    report = export(
        options.run_dir, checkpoint, options.out, options.data_license, options.language
    )
    hints = [HINT] if options.data_license is None else []
    result = {
        "architecture": report.architecture,
        "max_logit_difference": report.max_logit_difference,
        "folder": str(report.folder),
        "tag": checkpoint.tag,
        "global_step": checkpoint.state.global_step,
        "notes": list(report.notes), "hints": hints,
    }  # fmt: skip
    print(json.dumps(result) if options.json else as_text(report, checkpoint, hints))
    return 0


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="export.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("run_dir", type=Path, metavar="RUN_DIR", help="run folder of launch/pretrain.py")
    add("--out", type=Path, required=True, metavar="HF_DIR",
        help="folder to write; an earlier export there is replaced")  # fmt: skip
    add("--tag", help="checkpoint under RUN_DIR/checkpoints (default: the furthest committed one)")
    add("--data-license", metavar="TEXT",
        help="licence of the training data, for the model card (default: not stated)")  # fmt: skip
    add("--language", nargs="+", default=[], metavar="CODE",
        help="languages of the training data, as ISO 639 has them, for the card")  # fmt: skip
    add("--json", action="store_true", help="print the result as one JSON line")
    return parser.parse_args()


def export(
    run_dir: Path,
    checkpoint: Checkpoint,
    out: Path,
    data_license: str | None = None,
    languages: Sequence[str] = (),
) -> ExportReport:
    """Build the model of the checkpoint's stage, fill it and write it, with its card."""
    facts = run_facts(run_dir, checkpoint, data_license, languages)
    model = checkpoint_model(checkpoint, facts.recipe)
    tokenizer = run_dir / "tokenizer" if (run_dir / "tokenizer").is_dir() else None
    path = run_dir / "tokenizer" / TOKENIZER
    if path.is_file():
        require_tokenizer(path.read_bytes(), checkpoint.state.tokenizer_sha256, path, run_dir)
    return save_pretrained(model, model.config, out, tokenizer, partial(card, facts))


def as_text(report: ExportReport, checkpoint: Checkpoint, hints: Sequence[str]) -> str:
    """What people read."""
    head = f"{report.folder}: {report.architecture} of step {checkpoint.state.global_step:,}"
    proof = "transformers gives the same logits (largest difference "
    proof += f"{report.max_logit_difference:.1e})"
    notes = [f"note: {note}" for note in report.notes]
    return "\n".join([head, proof, *notes, *(f"hint: {hint}" for hint in hints)])


if __name__ == "__main__":
    sys.exit(main())
