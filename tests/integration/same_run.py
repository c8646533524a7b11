"""Small recipes for the tests that disturb runs, and what makes two runs the same, bit for bit."""

import json
from collections.abc import Sequence
from pathlib import Path

from launching import ROOT, rows

RECIPE = ROOT / "launch" / "recipes" / "tiny_test.json"
CHANGES = (
    "model.vocab_size=400", "model.type_vocab_size=2", "model.num_nsp_labels=2",
    "model.pooler=true", "model.position=learned", "learning_rate.peak=0.01",
    "model.hidden_dropout_prob=0.1", "model.attention_probs_dropout_prob=0.1",
)  # fmt: skip
"""Three stages, sentence pairs, dropout; each module says how many steps."""

COMPARED = {
    "train": (
        "stage", "num_hidden_layers", "lr", "new_lr", "loss", "mlm_loss", "nsp_loss",
        "mlm_accuracy", "tokens", "real_tokens", "loss_scale", "skipped_steps", "grad_norm",
        "sample_hash",
    ),
    "evaluation": ("stage", "val_loss", "val_mlm_loss", "val_nsp_loss", "val_mlm_accuracy"),
    "stage_switch": ("from_stage", "loss_before", "loss_after", "max_logit_difference"),
    "run_end": ("final_val_loss",),
}  # fmt: skip
"""Keys of metrics.jsonl that time and place have no part in."""


def engine_json(folder: Path, zero_stage: int, *, is_bf16: bool = False, micro: int = 3) -> Path:
    """A DeepSpeed JSON of small buckets, in which ZeRO-3 parts every parameter; logs each step.

    `micro` 3 is two accumulation steps on two ranks, as the global batch is 12.
    """
    path = folder / f"zero{zero_stage}{'_bf16' if is_bf16 else ''}_{micro}.json"
    zero: dict[str, object] = {"stage": zero_stage}
    if zero_stage:
        zero["reduce_bucket_size"] = 1000
    if zero_stage == 3:
        zero["stage3_param_persistence_threshold"] = 0
    settings = {
        "train_micro_batch_size_per_gpu": micro,
        "optimizer": {"type": "AdamW"},
        "gradient_clipping": "auto",
        "zero_optimization": zero,
        "steps_per_print": 1,
        "bf16": {"enabled": is_bf16},
    }
    path.write_text(json.dumps(settings))
    return path


def arguments(data: Path, run_dir: Path, engine: Path, changes: Sequence[str]) -> list[object]:
    """The command line of pretrain.py for CHANGES and `changes`."""
    words = [word for change in (*CHANGES, *changes) for word in ("--set", change)]
    places = ["--recipe", RECIPE, "--data", data, "--run-dir", run_dir]
    return [*places, "--deepspeed_config", engine, *words]


def figures(run_dir: Path, event: str) -> dict[object, dict[str, object]]:
    """Step -> what is compared of the last row of this kind and step."""
    return {
        row["global_step"]: {key: row[key] for key in COMPARED[event]}
        for row in rows(run_dir, event)
    }


def weights(run_dir: Path, tag: str) -> bytes:
    """The tag's weights.safetensors, as it lies there."""
    return (run_dir / "checkpoints" / tag / "weights.safetensors").read_bytes()


def tags(run_dir: Path) -> set[str]:
    """Committed tags."""
    return {path.parent.name for path in (run_dir / "checkpoints").glob("[!.]*/COMMITTED")}


def assert_the_same_run(ours: Path, theirs: Path) -> None:
    """Every row and the weights and moments of every stage's begin and end are equal to the bit."""
    for event in COMPARED:
        mine, other = figures(ours, event), figures(theirs, event)
        assert mine, event
        assert mine.keys() == other.keys(), event
        for step, row in other.items():
            assert mine[step] == row, f"{event} at step {step}"
    staged = {tag for tag in tags(theirs) if tag.startswith("stage")}
    assert staged <= tags(ours)
    for tag in sorted(staged):
        assert weights(ours, tag) == weights(theirs, tag), tag
        moments = [run / "checkpoints" / tag / "moments.safetensors" for run in (ours, theirs)]
        assert moments[0].exists() == moments[1].exists(), tag
        if moments[0].exists():
            assert moments[0].read_bytes() == moments[1].read_bytes(), tag
