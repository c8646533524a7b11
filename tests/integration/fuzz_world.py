"""What is damaged: a folder with recipes, engine JSONs, two data folders and a run, all tiny."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import h5py
import numpy as np
import torch
from launching import ROOT

from data_prep.masking import MaskingPolicy, mask_tokens
from data_prep.shard_format import (
    Manifest,
    ShardEntry,
    file_sha256,
    write_manifest,
    write_token_counts,
)
from stacking.checkpoint import CheckpointManager, TrainState
from stacking.config import Recipe
from stacking.config_loading import load_recipe, resolved_json
from stacking.modeling import BertForPreTraining, init_weights
from stacking.run_folder import recipe_sha256
from stacking.snapshot import MOMENTS, Snapshot

VOCAB, LENGTH, ROWS, SPLITS = 29, 11, 10, ("training", "validation")
SPECIAL = {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4}
STEPS = {"step_00000002": (2, 0, 1), "stage1_end": (3, 0, 1), "stage2_begin": (3, 1, 2)}
"""Tags of the run: global step, stage and layers."""

_RICH: dict[str, object] = {
    "name": "rich",
    "description": "says everything that a recipe can say",
    "model": {
        "vocab_size": VOCAB, "hidden_size": 12, "num_hidden_layers": 4, "num_attention_heads": 2,
        "intermediate_size": 20, "layer_intermediate_sizes": [20, 20, 20, 20],
        "max_position_embeddings": LENGTH, "type_vocab_size": 2, "pad_token_id": 0,
        "shared_attention_layers": [],
    },
    "data": {"max_seq_length": LENGTH, "max_predictions_per_seq": 3, "masked_lm_prob": 0.15},
    "global_batch_size": 4,
    "optimizer": {"betas": [0.9, 0.99], "eps": 1e-6, "weight_decay": 0.01, "max_grad_norm": 1.0},
    "learning_rate": {"schedule": "piecewise", "peak": 0.01, "points": [[0, 0.001], [4, 0.01]]},
    "stages": [
        {"num_hidden_layers": 1, "steps": 3, "hidden_size": 6, "num_attention_heads": 1,
         "intermediate_size": 10, "max_seq_length": 7, "max_predictions_per_seq": 2,
         "shared_attention_layers": [], "layer_intermediate_sizes": []},
        {"num_hidden_layers": 2, "steps": 3, "hidden": "uneven", "ffn": "split", "depth": "stack",
         "moments": "grow", "shared_attention_layers": [], "layer_intermediate_sizes": [],
         "rewarm": {"parameters": "all", "steps": 2, "start": 0.1, "factor": 1.0}},
        {"num_hidden_layers": 4, "steps": 2, "depth": "copy_top",
         "freeze": {"layers": 1, "dropout": False, "decoder": "train"},
         "deepspeed": {"train_micro_batch_size_per_gpu": 2,
                       "zero_optimization": {"stage": 1, "reduce_bucket_size": 5e5}}},
    ],
    "evaluation": {"every_steps": 3, "max_sequences": 7, "batch_size": 4},
    "checkpoint": {"every_steps": 2, "keep_last": 2},
    "seed": 5,
}  # fmt: skip
_SMALL = {
    "name": "small",
    "model": {
        "vocab_size": VOCAB, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 12, "max_position_embeddings": LENGTH, "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    },
    "data": {"max_seq_length": LENGTH, "max_predictions_per_seq": 3},
    "global_batch_size": 4,
    "learning_rate": {"schedule": "constant", "peak": 0.001},
    "stages": [{"num_hidden_layers": 1, "steps": 3}, {"num_hidden_layers": 2, "steps": 2}],
    "evaluation": {"every_steps": 2, "max_sequences": 7, "batch_size": 4},
}  # fmt: skip
_LEARNED = {
    **_SMALL,
    "name": "learned",
    "stages": [
        {"num_hidden_layers": 1, "steps": 3, "hidden_size": 4, "num_attention_heads": 1},
        {"num_hidden_layers": 2, "steps": 2,
         "learned": {"steps": 2, "learning_rate": 0.01, "batch_size": 4}},
    ],
    "learning_rate": {"schedule": "wsd", "peak": 0.001, "warmup_steps": 1, "decay_steps": 2,
                      "end": 1e-5, "total_steps": 6},
}  # fmt: skip
_ENGINE = {
    "train_micro_batch_size_per_gpu": 2, "steps_per_print": 1, "wall_clock_breakdown": False,
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "torch_adam": True, "fused": True}},
    "torch_autocast": {"enabled": True, "dtype": "bfloat16",
                       "lower_precision_safe_modules": ["torch.nn.Linear"]},
    "zero_optimization": {
        "stage": 2, "reduce_bucket_size": 1e5, "allgather_bucket_size": 100000,
        "overlap_comm": False, "round_robin_gradients": True, "sub_group_size": 1e9,
        "offload_optimizer": {"device": "cpu", "pin_memory": False, "ratio": 1.0},
    },
    "zero_force_ds_cpu_optimizer": False,
    "data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32",
    "prescale_gradients": False, "gradient_predivide_factor": 1.0,
    "csv_monitor": {"enabled": True, "output_path": "", "job_name": "csv"},
    "comms_logger": {"enabled": False, "prof_ops": ["all_reduce"]},
    "flops_profiler": {"enabled": False, "profile_step": 1, "module_depth": -1, "top_modules": 1},
}  # fmt: skip


def make_world(world: Path) -> Path:
    """Write everything; the same bytes whenever."""
    for folder in ("recipes", "engines"):
        (world / folder).mkdir(parents=True)
    for name, text in (("rich", _RICH), ("small", _SMALL), ("learned", _LEARNED)):
        (world / "recipes" / f"{name}.json").write_text(json.dumps(text))
    for shipped in ("demo", "mslt_tiny", "compoundgrow_tiny", "stackingbert_small"):
        resolved = resolved_json(load_recipe(ROOT / "launch" / "recipes" / f"{shipped}.json"))
        (world / "recipes" / f"shipped_{shipped}.json").write_text(resolved)
    for path in sorted((ROOT / "deepspeed_configs").glob("*.json")):
        shutil.copy(path, world / "engines")
    (world / "engines" / "rich.json").write_text(json.dumps(_ENGINE))
    _write_data(world / "ours", is_static=False)
    _write_data(world / "nvidia", is_static=True)
    recipe = load_recipe(world / "recipes" / "small.json")
    _write_run(world / "run", recipe, world / "ours")
    return world


def _write_data(folder: Path, *, is_static: bool) -> None:
    """Two shards a split: with a manifest, or NVIDIA's dialect without one."""
    folder.mkdir()
    count = ROWS * 2
    ids = np.random.default_rng(0).integers(5, VOCAB, (count, LENGTH))
    ids[:, 0], ids[:, 5], ids[:, -1] = SPECIAL["cls"], SPECIAL["sep"], SPECIAL["sep"]
    ids[::3, -2:] = [SPECIAL["sep"], SPECIAL["pad"]]
    arrays = {
        "input_ids": ids.astype("u2"),
        "segment_ids": np.tile((np.arange(LENGTH) > 5).astype("i1"), (count, 1)),
        "next_sentence_labels": (np.arange(count) % 2).astype("i1"),
    }
    if is_static:
        policy = MaskingPolicy(
            vocab_size=VOCAB, special_token_ids=SPECIAL, max_predictions_per_seq=3
        )
        masked = mask_tokens(ids, policy, seed=77, epoch=0, sample_indices=np.arange(count))
        arrays |= {
            "input_ids": masked.input_ids.astype("i4"),
            "input_mask": (ids != 0).astype("i1"),
            "masked_lm_positions": masked.masked_lm_positions.astype("i4"),
            "masked_lm_ids": np.maximum(masked.masked_lm_ids, 0).astype("i4"),
        }
    for split in SPLITS:
        for number in range(2):
            with h5py.File(folder / f"{split}_{number:05d}.hdf5", "w") as file:
                for name, array in arrays.items():
                    file.create_dataset(
                        name,
                        data=array[number * ROWS : (number + 1) * ROWS],
                        compression="gzip" if is_static else None,
                    )
    tokens = [f"[{name.upper()}]" for name in SPECIAL]
    tokens += [f"{'##' if n % 3 == 0 else ''}w{n}" for n in range(len(SPECIAL), VOCAB)]
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n")
    if not is_static:
        write_token_counts(folder, np.bincount(ids.ravel(), minlength=VOCAB), SPECIAL)
        sign_data(folder)


def sign_data(folder: Path) -> None:
    """The manifest with the hashes of the shards as they are now."""
    entries = {
        split: tuple(
            ShardEntry(path.name, ROWS, file_sha256(path))
            for path in sorted(folder.glob(f"{split}_*.hdf5"))
        )
        for split in SPLITS
    }
    manifest = Manifest(
        format_version=1,
        dialect="unmasked",
        max_seq_length=LENGTH,
        max_predictions_per_seq=0,
        vocab_size=VOCAB,
        tokenizer_sha256=file_sha256(folder / "vocab.txt"),
        special_token_ids=SPECIAL,
        has_next_sentence_labels=True,
        seed=1,
        num_documents={"training": 3, "validation": 3},
        **entries,  # type: ignore[arg-type]
    )
    assert asdict(manifest)
    write_manifest(folder, manifest)


def _write_run(folder: Path, recipe: Recipe, data: Path) -> None:
    """A run in its second stage, as the trainer leaves it."""
    (folder / "tokenizer").mkdir(parents=True)
    shutil.copy(data / "vocab.txt", folder / "tokenizer")
    (folder / "recipe.json").write_text(resolved_json(recipe))
    (folder / "deepspeed.json").write_text(json.dumps({"stages": [_ENGINE, _ENGINE]}))
    manager = CheckpointManager(folder / "checkpoints", keep_last=9)
    for tag, (step, stage, layers) in STEPS.items():
        generator = torch.Generator().manual_seed(step + stage)
        model = BertForPreTraining(recipe.stage_model(stage))
        init_weights(model, generator)
        weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        moments = {
            key: {name: torch.rand(t.shape, generator=generator) for name, t in weights.items()}
            for key in MOMENTS
        }
        counts = dict.fromkeys(weights, step)
        has_history = not tag.endswith("begin")
        state = TrainState(
            global_step=step, stage=stage, num_hidden_layers=layers,
            loader={"samples_consumed": step * recipe.global_batch_size, "num_rows": 2 * ROWS,
                    "seed": recipe.seed, "fingerprint": 7},
            tokens=step * 40, real_tokens=step * 38, elapsed_seconds=1.5 * step,
            sample_hash="0123456789abcdef", recipe_sha256=recipe_sha256(recipe),
        )  # fmt: skip
        snapshot = Snapshot(weights, moments, counts) if has_history else Snapshot(weights)
        manager.save(tag, snapshot, state)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in _rows(recipe)))


def _rows(recipe: Recipe) -> list[dict[str, object]]:
    """metrics.jsonl of such a run."""
    stages = [
        {"num_hidden_layers": stage.num_hidden_layers, "steps": stage.steps,
         "num_parameters": 1000 + index, "num_trained": 1000 + index}
        for index, stage in enumerate(recipe.stages)
    ]  # fmt: skip
    rows: list[dict[str, object]] = [
        {"event": "run_start", "name": recipe.name, "total_steps": recipe.total_steps,
         "stages": stages, "world_size": 1, "device": "cpu", "precision": "fp32",
         "unigram_loss": 3.1, "matmul_flops_per_second": 1e9}
    ]  # fmt: skip
    for step, stage in ((1, 0), (2, 0), (3, 0), (4, 1)):
        rows.append({
            "event": "train", "global_step": step, "stage": stage, "mlm_loss": 3.5 - 0.1 * step,
            "lr": 0.001, "tokens": 40 * step, "tokens_per_second": 812.5, "step_seconds": 0.5,
            "elapsed_seconds": 0.6 * step, "grad_norm": None,
        })  # fmt: skip
        if step == 2:
            rows.append({"event": "resume", "global_step": 2, "tag": "step_00000002"})
        if step == 3:
            rows.append({"event": "evaluation", "global_step": 3, "stage": 0, "val_mlm_loss": 3.2,
                         "val_mlm_accuracy": 0.1, "elapsed_seconds": 2.0})  # fmt: skip
            rows.append({
                "event": "stage_switch", "global_step": 3, "to_stage": 1,
                "changes": {"num_hidden_layers": [1, 2]}, "operator": "depth stack",
                "moments": "reset", "duplicate_similarity": {"ffn": 0.9}, "loss_before": 3.2,
                "loss_after": 3.3, "max_logit_difference": 0.2, "seconds": 1.0,
                "seconds_by_part": {"save": 0.1},
            })  # fmt: skip
    rows.append({"event": "symmetry", "global_step": 4, "stage": 1, "steps_in_stage": 1,
                 "duplicate_similarity": {"ffn": 0.8}})  # fmt: skip
    return rows
