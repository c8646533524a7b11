"""A Hugging Face folder as it is: whatever class and heads it has, to our weights and back.

Names are those of the home's model with heads (`bert.encoder...`); a folder of the encoder alone
writes them without the prefix.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)

from stacking.config import BertConfig
from stacking.errors import CheckpointError, ConfigError
from stacking.growth.plan import GrowthPlan
from stacking.growth.width import WidthOperator
from stacking.hf import AnyAuto, load_transformers, require_tied
from stacking.hf_homes import BERT, HOMES, MEGATRON, REMOTE, Home, Weights, from_home, to_home
from stacking.modeling import BertForPreTraining

_POOLER = "pooler.dense."
_CONTACTS = "contact_head."
_HALF_FORMATS = {"F16": torch.float16, "BF16": torch.bfloat16}
_TASKS: dict[str, AnyAuto] = {
    "ForSequenceClassification": AutoModelForSequenceClassification,
    "ForTokenClassification": AutoModelForTokenClassification,
    "ForQuestionAnswering": AutoModelForQuestionAnswering,
}
_READERS = ("classifier.", "qa_outputs.")
"""Heads of those: one Linear on hidden states, or on the pooler's output."""


@dataclass(frozen=True)
class FolderWeights:
    """What transformers read from a folder.

    Attributes:
        model: in fp32 and eval mode.
        auto: the class that read it.
        home: its architecture.
        prefix: what the home's names have and this class's have not.
        missing: names of the class that the file lacks; transformers drew them.
    """

    model: PreTrainedModel
    auto: AnyAuto
    home: Home
    prefix: str
    missing: frozenset[str]

    def weights(self) -> Weights:
        """What the file holds, in fp32 under the home's names; tied weights under each name."""
        return {
            self.prefix + name: tensor.detach()
            for name, tensor in self.model.state_dict().items()
            if name not in self.missing
        }

    def count(self, weights: Weights) -> int:
        """How many trained numbers `weights`, of whatever size, are."""
        known = {self.prefix + name for name, _ in self.model.named_parameters()}
        return sum(t.numel() for name, t in weights.items() if name in known or ".layer." in name)


def read_folder(folder: Path, home: Home, architecture: str | None) -> FolderWeights:
    """Load with the class that takes all of the file; CheckpointError where none does."""
    auto = _auto_of(architecture, home)
    model, missing, unexpected = load_transformers(folder, auto)
    has_no_head = any(
        name.endswith(("transform.dense.weight", "lm_head.dense.weight")) for name in missing
    )
    if architecture is None and has_no_head:
        auto = AutoModel
        model, missing, unexpected = load_transformers(folder, auto)
    lacks = {name for name in missing if ".layer." in name or "embeddings." in name}
    lost = {name for name in unexpected if not name.endswith("position_ids")}
    if lacks or lost:
        what = f"lacks {', '.join(sorted(lacks)[:3])}" if lacks else (
            f"holds {', '.join(sorted(lost)[:3])}, which {type(model).__name__} has no place for"
        )  # fmt: skip
        raise CheckpointError(f"{folder}: the file {what}; it cannot be grown without loss")
    prefix = home.prefix if auto is AutoModel else ""
    read = FolderWeights(model, auto, home, prefix, frozenset(missing))
    if model.config.tie_word_embeddings:
        require_tied(read.weights(), home, folder)
    return read


def has_pooler(weights: Weights, home: Home) -> bool:
    """Whether there is a tanh(Linear) on the first token."""
    return f"{home.prefix}{_POOLER}weight" in weights


def to_ours(weights: Weights, config: BertConfig, home: Home) -> Weights:
    """State dict of BertForPreTraining(config); heads that `weights` lack are neutral."""
    bare = config
    if not home.holds_nsp(config):
        bare = config.model_copy(update={"num_nsp_labels": 0})
    empty = to_home(BertForPreTraining(bare), home)
    # A second name of the MLM bias: an empty one must not hide the file's.
    empty = {name: tensor for name, tensor in empty.items() if not name.endswith("decoder.bias")}
    state = from_home(empty | weights, bare, home)
    neutral = BertForPreTraining(config).state_dict()
    for kind in ("weight", "bias"):
        if has_pooler(weights, home):
            neutral[f"nsp_head.pooler.{kind}"] = weights[f"{home.prefix}{_POOLER}{kind}"]
    return neutral | state


def to_theirs(
    state: Weights, growth: GrowthPlan, home: Home, old: Weights
) -> tuple[Weights, list[str]]:
    """(the grown `state` under the home's names, with the heads that `old` has; notes)."""
    model = BertForPreTraining(growth.target)
    model.load_state_dict(state)
    grown = to_home(model, home)
    for kind in ("weight", "bias"):
        if has_pooler(old, home):
            grown[f"{home.prefix}{_POOLER}{kind}"] = state[f"nsp_head.pooler.{kind}"]
    grown = {name: t for name, t in grown.items() if ".layer." in name or name in old}
    grown |= {
        name: _widen_reader(tensor, growth) for name, tensor in old.items()
        if name.startswith(_READERS)
    }  # fmt: skip
    # Names of tied weights: their state dict has them, their file needs them once.
    left = [
        name for name in old
        if name not in grown and ".layer." not in name and ".decoder." not in name
    ]  # fmt: skip
    if left:
        raise CheckpointError(
            f"the file holds {', '.join(sorted(left)[:3])} without what they read; "
            "it cannot be grown without loss"
        )
    zeroed = any(_CONTACTS in name and bool(old[name].any()) for name in old)
    note = "contact_head is written as 0: it reads one number for each layer and head"
    return grown, [note] if zeroed else []


def architecture_of(folder: Path, home: Home) -> str | None:
    """The class that config.json names, None where it names none; ConfigError for other heads."""
    if home is REMOTE:
        raise ConfigError(
            f"{folder}/config.json: model_type={home.model_type}, whose class lies in the folder; "
            f"growable are {', '.join(home.model_type for home in HOMES)}; grow such a model from "
            "its run, as a stage of a recipe"
        )
    fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    named: list[str] = fields.get("architectures") or []
    growable = list(_growable_classes(home))
    if named and named[0] not in growable:
        raise ConfigError(
            f"{folder}/config.json: architectures={named[0]}, growable: {', '.join(growable)}; "
            f"save its encoder as {growable[0]}, grow that, and train the head anew"
        )
    return named[0] if named else None


def stored_dtype(folder: Path) -> torch.dtype:
    """fp16 or bf16 where all float weights of the folder are that, otherwise fp32."""
    found = set[torch.dtype]()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            kinds = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
        found |= {_HALF_FORMATS.get(kind, torch.float32) for kind in kinds if "F" in kind}
    if not found:
        for path in folder.glob("pytorch_model*.bin"):
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            found |= {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
    only = found.pop() if len(found) == 1 else torch.float32
    return only if only in _HALF_FORMATS.values() else torch.float32


def _auto_of(architecture: str | None, home: Home) -> AnyAuto:
    """The class with most heads, as files of a masked LM may hold a next-sentence head too."""
    if architecture == _encoder_class(home):
        return AutoModel
    for suffix, auto in _TASKS.items():
        if architecture is not None and architecture.endswith(suffix):
            return auto
    return AutoModelForPreTraining if home.pre_training_class else AutoModelForMaskedLM


def _growable_classes(home: Home) -> Iterable[str]:
    stem = home.masked_lm_class.removesuffix("ForMaskedLM")
    yield _encoder_class(home)
    yield home.masked_lm_class
    if home.pre_training_class is not None:
        yield from (home.pre_training_class, f"{stem}ForNextSentencePrediction")
    for task in _TASKS:
        # The other homes classify sequences with two layers and no pooler.
        if task != "ForSequenceClassification" or home in (BERT, MEGATRON):
            yield stem + task


def _encoder_class(home: Home) -> str:
    return home.masked_lm_class.replace("ForMaskedLM", "Model")


def _widen_reader(tensor: Tensor, growth: GrowthPlan) -> Tensor:
    """[labels,H] -> [labels,H']: each copy of a hidden number is read with its share; biases stay.

    The same rule as for every reader in stacking/growth/width.py.
    """
    for move in growth.moves:
        operator = move.operator
        if move.dimension == "hidden" and isinstance(operator, WidthOperator) and tensor.dim() == 2:
            units = operator.plan(move.source, move.target).units["hidden"]
            tensor = tensor[:, units.source] * units.share.to(tensor.dtype)
    return tensor.clone()
