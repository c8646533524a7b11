"""Export a run as a folder that transformers loads; its logits are compared before it counts.

example:
  python launch/export.py RUN_DIR --out HF_DIR
"""

import argparse
import json
import sys
from pathlib import Path

from stacking.checkpoint import Checkpoint, CheckpointManager
from stacking.config import BertConfig
from stacking.config_loading import load_recipe
from stacking.errors import CheckpointError, UserError
from stacking.hf import ExportReport, save_pretrained
from stacking.modeling import BertForPreTraining
from stacking.resume import state_for


def main() -> int:
    """0 done, 2 the user's mistake."""
    arguments = parse_arguments()
    try:
        checkpoint = find_checkpoint(arguments.run_dir, arguments.tag)
        report = export(arguments.run_dir, checkpoint, arguments.out)
    except UserError as error:
        print(json.dumps({"error": str(error)}) if arguments.json else f"error: {error}",
              file=sys.stderr)  # fmt: skip
        return 2
    result = {
        "architecture": report.architecture,
        "max_logit_difference": report.max_logit_difference,
        "folder": str(report.folder),
        "tag": checkpoint.tag,
        "global_step": checkpoint.state.global_step,
        "notes": list(report.notes),
    }
    print(json.dumps(result) if arguments.json else as_text(report, checkpoint))
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
    add("--json", action="store_true", help="print the result as one JSON line")
    return parser.parse_args()


def find_checkpoint(run_dir: Path, tag: str | None) -> Checkpoint:
    """The named checkpoint, or the furthest; CheckpointError where there is none."""
    if not (run_dir / "recipe.json").is_file():
        raise CheckpointError(f"{run_dir}: no recipe.json, this is not a run folder")
    manager = CheckpointManager(run_dir / "checkpoints")
    checkpoint = manager.load(tag) if tag is not None else manager.latest()
    if checkpoint is None:
        raise CheckpointError(f"{manager.folder}: no committed checkpoint yet; train first")
    return checkpoint


def export(run_dir: Path, checkpoint: Checkpoint, out: Path) -> ExportReport:
    """Build the model of the checkpoint's stage, fill it and write it."""
    recipe = load_recipe(run_dir / "recipe.json")
    config = recipe.stage_model(state_for(checkpoint, recipe).stage)
    model = build_model(config, checkpoint)
    tokenizer = run_dir / "tokenizer"
    return save_pretrained(model, config, out, tokenizer if tokenizer.is_dir() else None)


def build_model(config: BertConfig, checkpoint: Checkpoint) -> BertForPreTraining:
    """Strictly: each weight that the recipe names, and no other."""
    model = BertForPreTraining(config)
    try:
        model.load_state_dict(checkpoint.weights())
    except RuntimeError as error:
        raise CheckpointError(f"{checkpoint.folder}: not this recipe's model: {error}") from error
    return model


def as_text(report: ExportReport, checkpoint: Checkpoint) -> str:
    """What people read."""
    head = f"{report.folder}: {report.architecture} of step {checkpoint.state.global_step:,}"
    proof = "transformers gives the same logits (largest difference "
    proof += f"{report.max_logit_difference:.1e})"
    return "\n".join([head, proof, *(f"note: {note}" for note in report.notes)])


if __name__ == "__main__":
    sys.exit(main())
