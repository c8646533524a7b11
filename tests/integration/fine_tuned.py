"""What tests of fine-tuning share: a tiny model's run folder, and tasks that it can learn by heart.

A toy task asks for a word that a text has, or for how many of them: one layer learns it in a few
dozen updates.
"""

import importlib.util
import json
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from glue_sets import Rows, write_rows
from launching import LAUNCH
from squad_sets import tokenizer

from data_prep.shard_format import file_sha256
from stacking.checkpoint import CheckpointManager, TrainState
from stacking.config import BertConfig, Recipe
from stacking.modeling import BertForPreTraining, init_weights
from stacking.run_folder import recipe_sha256
from stacking.snapshot import Snapshot

VOCABULARY = 128  # a little more than the tokenizer's ids
FILLERS = ("the", "is", "lit", "at", "blue", "when", "it", "large")
YES, NO = "lamp", "mill"


def fresh_model(seed: int = 1, **changes: object) -> BertForPreTraining:
    """One layer, 32 wide, all of its weights random."""
    config = BertConfig.model_validate({
        "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "intermediate_size": 48, "max_position_embeddings": 48,
        "initializer_range": 0.1, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
        **changes,
    })  # fmt: skip
    model = BertForPreTraining(config)
    generator = torch.Generator().manual_seed(seed)
    init_weights(model, generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return model


def write_model(
    folder: Path,
    *,
    seed: int = 1,
    names_tokenizer: bool = True,
    factor: float = 1.0,
    **changes: object,
) -> Path:
    """A run folder with one checkpoint, all weights times `factor`.

    `names_tokenizer`: whether it has the digest of its own.
    """
    model = fresh_model(seed, **changes)
    recipe = Recipe.model_validate({
        "name": "tiny", "model": model.config.model_dump(), "global_batch_size": 4,
        "data": {"max_seq_length": model.config.max_position_embeddings,
                 "max_predictions_per_seq": 3},
        "learning_rate": {"schedule": "linear", "peak": 1e-3, "warmup_steps": 1},
        "stages": [{"num_hidden_layers": model.config.num_hidden_layers, "steps": 5}],
    })  # fmt: skip
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "recipe.json").write_text(recipe.model_dump_json())
    path = folder / "tokenizer/tokenizer.json"
    tokenizer().save(str(path))
    state = TrainState(
        global_step=5, stage=0, num_hidden_layers=model.config.num_hidden_layers,
        loader={"samples_consumed": 20}, recipe_sha256=recipe_sha256(recipe),
        tokenizer_sha256=file_sha256(path) if names_tokenizer else "",
    )  # fmt: skip
    weights = {name: factor * parameter.detach() for name, parameter in model.named_parameters()}
    CheckpointManager(folder / "checkpoints").save("end", Snapshot(weights), state)
    return folder


def main_of(script: str, *words: object) -> int:
    """Run a command of launch/ in this process; its exit code."""
    spec = importlib.util.spec_from_file_location(f"launch_{Path(script).stem}", LAUNCH / script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *map(str, words)])
        code: int = module.main()
    return code


def swap_two_tokens(path: Path) -> None:
    """A tokenizer.json in which two words have each other's ids."""
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary[YES], vocabulary[NO] = vocabulary[NO], vocabulary[YES]
    path.write_text(json.dumps(content))


def text(generator: np.random.Generator, words: tuple[str, ...]) -> str:
    """Five words, these among them."""
    all_words = [*words, *generator.choice(FILLERS, 5 - len(words)).tolist()]
    return " ".join(generator.permutation(all_words).tolist())


def write_toy_glue(folder: Path, counts: Mapping[str, int] | None = None, seed: int = 0) -> Path:
    """SST-2 (which of two words?), MRPC (has either text the word?), STS-B (how often?)."""
    generator = np.random.default_rng(seed)
    for split, count in (counts or {"train": 128, "dev": 32, "test": 7}).items():
        sst, mrpc, sts = [], [], []
        for number in range(count):
            label = number % 2
            sst.append([text(generator, ((NO, YES)[label],)), str(label)])
            place = number // 2 % 2
            pair = [text(generator, (YES,) if label and place == one else (NO,)) for one in (0, 1)]
            mrpc.append([str(label), "1", "2", *pair])
            times = [int(generator.integers(0, 3)) for _ in pair]
            pair = [text(generator, (YES,) * each) for each in times]
            sts.append([str(number), *"abcdef", *pair, f"{sum(times) * 1.25:.3f}"])
        _write(folder, split, "SST-2", ["sentence", "label"], sst, label=1)
        _write(folder, split, "MRPC", ["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"],
               mrpc, label=0)  # fmt: skip
        head = ["index", "genre", "filename", "year", "old_index", "source1", "source2"]
        _write(folder, split, "STS-B", [*head, "sentence1", "sentence2", "score"], sts, label=9)
    return folder


def _write(folder: Path, split: str, task: str, head: list[str], rows: Rows, label: int) -> None:
    """Test files have an index first and no label."""
    table = [head, *rows]
    if split == "test":
        table = [[*row[:label], *row[label + 1 :]] for row in table]
        if head[0] != "index":
            numbers = ["index", *map(str, range(len(rows)))]
            table = [[number, *row] for number, row in zip(numbers, table, strict=True)]
    write_rows(folder / task / f"{split}.tsv", table)
