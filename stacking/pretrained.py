"""A run's checkpoint or a Hugging Face folder in; the model to go on from and its tokenizer out."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from data_prep.plain_files import read_plain
from stacking.checkpoint import Checkpoint, CheckpointManager
from stacking.config import BertConfig, Recipe
from stacking.config_loading import load_recipe
from stacking.errors import CheckpointError, ConfigError
from stacking.hf import load_pretrained, read_home
from stacking.hf_tokenizer import DIGEST_FIELD, TOKENIZER, content_sha256
from stacking.modeling import BertForPreTraining
from stacking.resume import state_for


@dataclass(frozen=True, eq=False)
class Pretrained:
    """What fine-tuning begins with."""

    origin: str
    """For people: the folder, and of a run the tag and step."""
    config: BertConfig
    weights: dict[str, Tensor]
    """fp32, by the names of BertForPreTraining's parameters."""
    tokenizer: Tokenizer
    tokenizer_sha256: str
    """Of tokenizer.json."""
    is_tokenizer_checked: bool
    """Whether the model names its tokenizer's digest, and it is this one."""

    @cached_property
    def digest(self) -> str:
        """A sha256 of the weights and the tokenizer."""
        found = hashlib.sha256(self.tokenizer_sha256.encode())
        for name in sorted(self.weights):
            found.update(name.encode())
            found.update(self.weights[name].contiguous().numpy().tobytes())
        return found.hexdigest()

    def notes(self) -> list[str]:
        """What is to be told about it, a line each."""
        if self.is_tokenizer_checked:
            return []
        return [
            f"{self.origin}: does not say which tokenizer it was trained with: that this one is it "
            "was not checked"
        ]


def find_checkpoint(run_dir: Path, tag: str | None) -> Checkpoint:
    """The named checkpoint, or the furthest; CheckpointError where there is none."""
    if not (run_dir / "recipe.json").is_file():
        raise CheckpointError(f"{run_dir}: no recipe.json, this is not a run folder")
    manager = CheckpointManager(run_dir / "checkpoints")
    checkpoint = manager.load(tag) if tag is not None else manager.latest()
    if checkpoint is None:
        raise CheckpointError(f"{manager.folder}: no committed checkpoint yet; train first")
    return checkpoint


def checkpoint_model(checkpoint: Checkpoint, recipe: Recipe) -> BertForPreTraining:
    """The model of a checkpoint, strictly: each weight that the recipe names, and no other."""
    with torch.device("meta"):
        model = BertForPreTraining(recipe.stage_model(state_for(checkpoint, recipe).stage))
    try:
        model.load_state_dict(checkpoint.weights(), assign=True)
    except RuntimeError as error:
        raise CheckpointError(f"{checkpoint.folder}: not this recipe's model: {error}") from error
    return model


def load(folder: Path, tag: str | None = None, tokenizer: Path | None = None) -> Pretrained:
    """A run folder, at `tag` or its furthest checkpoint, or a Hugging Face folder.

    `tokenizer`: a tokenizer.json instead of the folder's own, which a run on foreign shards lacks.
    UserError where there is no model, no tokenizer, or another one than the model was trained with:
    a vocabulary shifted by two tokens would train, and nobody would notice.
    """
    if (folder / "recipe.json").is_file():
        recipe = load_recipe(folder / "recipe.json")
        checkpoint = find_checkpoint(folder, tag)
        model = checkpoint_model(checkpoint, recipe)
        origin = f"{folder}, {checkpoint.tag} (step {checkpoint.state.global_step:,})"
        digest, own = checkpoint.state.tokenizer_sha256, folder / "tokenizer" / TOKENIZER
    else:
        if tag is not None:
            raise ConfigError(f"--tag: got {tag}, but {folder} is no run folder, which has tags")
        digest = str(read_home(folder)[1].get(DIGEST_FIELD) or "")
        model, _ = load_pretrained(folder, keeps_pooler=True)
        origin, own = str(folder), folder / TOKENIZER
    content = _read_tokenizer(tokenizer or own)
    found = require_tokenizer(content, digest, tokenizer or own, folder)
    weights = {name: p.detach().float() for name, p in model.named_parameters()}
    return Pretrained(
        origin, model.config, weights, _tokenizer(content, tokenizer or own, model.config), found,
        bool(digest),
    )  # fmt: skip


def require_tokenizer(content: bytes, digest: str, path: Path, folder: Path) -> str:
    """The sha256 of a tokenizer.json; ConfigError if the model in `folder` says another one.

    `digest` is what it says, "" if nothing: the sha256 of the file, as a run says it, or of its
    content, as an export says it, which transformers may have saved again in another layout.
    """
    found = hashlib.sha256(content).hexdigest()
    if digest and digest not in (found, _content_sha256(content)):
        raise ConfigError(
            f"{path}: is not the tokenizer that {folder} was trained with, by its sha256 (got "
            f"{found[:12]}, the model says {digest[:12]}); give that one"
        )
    return found


def _content_sha256(content: bytes) -> str:
    try:
        return content_sha256(content)
    except (ValueError, RecursionError):  # also what is not UTF-8, or nested without end
        return ""


def _read_tokenizer(path: Path) -> bytes:
    try:
        return read_plain(path)
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read: {error.strerror}; give the tokenizer.json of the "
            "pre-training with --tokenizer"
        ) from error


def parse_tokenizer(content: bytes, path: Path) -> Tokenizer:
    """Of a tokenizer.json; ConfigError if it is none."""
    try:
        return Tokenizer.from_str(content.decode())
    except Exception as error:  # `tokenizers` raises Exception itself: the boundary of a library
        raise ConfigError(f"{path}: not a tokenizer.json: {error}") from error


def _tokenizer(content: bytes, path: Path, config: BertConfig) -> Tokenizer:
    tokenizer = parse_tokenizer(content, path)
    largest = max(tokenizer.get_vocab().values(), default=-1)  # no token: `special_ids` tells
    if largest >= config.vocab_size:
        raise ConfigError(
            f"{path}: has ids up to {largest}, but the model's vocabulary {config.vocab_size}; "
            "give the tokenizer of the pre-training"
        )
    return tokenizer
