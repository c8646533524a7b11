"""A Hugging Face folder in, the weights of a recipe's first stage out, or all that is in the way.

Sizes and form must be the recipe's. Heads are taken where both have them; rows of the vocabulary
that the folder lacks are padding. What the folder does not have is as a new run has it.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Set
from pathlib import Path

import torch
from torch import Tensor

from data_prep.plain_files import read_plain
from data_prep.shard_format import VOCABULARY, load_vocabulary, vocabulary_sha256
from stacking.config import BertConfig, Recipe
from stacking.config_stage import MODEL_FIELDS
from stacking.errors import ConfigError
from stacking.growth.target import GROWABLE
from stacking.hf import load_with_heads, read_home
from stacking.hf_tokenizer import DIGEST_FIELD, TOKENIZER
from stacking.hf_vocabulary import ROWS_BY_ID
from stacking.modeling import BertForPreTraining, init_weights
from stacking.pretrained import parse_tokenizer, require_tokenizer
from stacking.run_data import RunData
from stacking.run_start import FirstWeights

_RECIPES_OWN = {"hidden_dropout_prob", "attention_probs_dropout_prob", "initializer_range",
                "vocab_size"}  # fmt: skip
_OF_HEADS = {"mlm_bias", "tie_word_embeddings", "num_nsp_labels", "pooler"}
_PARTS = {"mlm_head": "MLM head", "nsp_head.pooler": "pooler",
          "nsp_head.classifier": "next-sentence classifier"}  # fmt: skip


def first_weights(folder: Path, recipe: Recipe, data: RunData) -> FirstWeights:
    """What a run of `recipe` begins with; ConfigError with all that does not fit."""
    if (folder / "recipe.json").is_file():
        raise ConfigError(
            f"--start-from {folder}: is a run folder; allowed: a Hugging Face folder, which "
            "launch/export.py makes of it; to go on from one of its steps: --branch-from RUN@STEP"
        )
    _, fields = read_home(folder)
    model, drawn = load_with_heads(folder, keeps_pooler=True)
    faults = list(_model_faults(recipe, model.config, drawn))
    if faults:
        faults.append(_advice(recipe, model.config, folder))
    faults += _vocabulary_faults(model.config, data)
    words = _words(folder, str(fields.get(DIGEST_FIELD) or ""))
    of_data = data.manifest.tokenizer_sha256 if data.manifest else _words(data.folder)
    if words and of_data and words != of_data:
        faults.append(
            f"tokenizer: that of the folder has another vocabulary than the data in "
            f"{data.folder} (sha256 {words[:12]}, the data's {of_data[:12]}): the same ids would "
            "be other words; prepare the data with --tokenizer and the folder's"
        )
    if faults:
        raise ConfigError([f"--start-from {folder}: {fault}" for fault in faults])
    found = {name: p.detach() for name, p in model.named_parameters()
             if not any(name.startswith(f"{part}.") for part in drawn)}  # fmt: skip
    notes = list(_notes(recipe.stage_model(0), model.config, found))
    if not (words and of_data):
        silent = data.folder if words else folder
        notes.append(f"its tokenizer was not compared with that of the data: {silent} has none")
    return FirstWeights(_completed(recipe, found), _sha256(found), tuple(notes))


def _model_faults(recipe: Recipe, theirs: BertConfig, drawn: Set[str]) -> Iterator[str]:
    """Fields in which the first stage is another model, with what would make it the folder's."""
    ours = recipe.stage_model(0)
    compared = set(BertConfig.model_fields) - _RECIPES_OWN - _OF_HEADS
    if ours.position != "learned" or theirs.position != "learned":
        compared.remove("max_position_embeddings")  # of no table
    if "mlm_head" not in drawn:
        compared |= {"mlm_bias", "tie_word_embeddings"}
    if ours.num_nsp_labels and theirs.num_nsp_labels and "nsp_head.classifier" not in drawn:
        compared |= {"num_nsp_labels", "pooler"}
    mine, their = _comparable(ours), _comparable(theirs)
    for name in BertConfig.model_fields:
        if name in compared and mine[name] != their[name]:
            yield (
                f"{name}: {_show(mine[name])} in the recipe's first stage, {_show(their[name])} in "
                f"the folder; {_settings(recipe, name, their[name])}"
            )
    if ours.vocab_size < theirs.vocab_size:
        yield (
            f"vocab_size: {ours.vocab_size} in the recipe, {theirs.vocab_size} in the folder; "
            f"allowed: as many or more; --set model.vocab_size={theirs.vocab_size}"
        )


def _comparable(config: BertConfig) -> dict[str, object]:
    """Fields by name; inner sizes in the one form that tells them."""
    sizes = {config.inner_size(layer) for layer in range(config.num_hidden_layers)}
    is_even = len(sizes) == 1
    return config.model_dump() | {
        "intermediate_size": sizes.pop() if is_even else None,
        "layer_intermediate_sizes": () if is_even else config.layer_intermediate_sizes,
    }


def _show(value: object) -> str:
    return "one a layer" if value is None else json.dumps(value)


def _settings(recipe: Recipe, name: str, value: object) -> str:
    """The --set words for a field of the first stage."""
    stage = recipe.stages[0]
    if name == "max_position_embeddings" and value == getattr(recipe.model, name):
        return "--set stages.0.max_seq_length=null"
    is_stated = name in MODEL_FIELDS and getattr(stage, name) is not None
    places = ["stages.0"] if is_stated else []
    if not is_stated or len(recipe.stages) == 1:
        places.append("model")
    if value is None:  # told by the sizes of the layers
        return f"state layer_intermediate_sizes in {' and '.join(places)}"
    words = json.dumps(value, separators=(",", ":"))
    return " ".join(f"--set {place}.{name}={words}" for place in places)


def _advice(recipe: Recipe, theirs: BertConfig, folder: Path) -> str:
    """What to do about all of them."""
    ours = recipe.stage_model(0)
    larger = [f"{name}={getattr(ours, name)}" for name in GROWABLE
              if getattr(ours, name) > getattr(theirs, name)]  # fmt: skip
    grow = ("" if not larger else f", or grow the folder before: launch/grow.py --model {folder} "
            f"--to {' '.join(larger)} --out NEW_DIR")  # fmt: skip
    return f"the first stage must be the folder's model: change the recipe as said{grow}"


def _vocabulary_faults(theirs: BertConfig, data: RunData) -> Iterator[str]:
    manifest = data.manifest
    if manifest is not None and manifest.vocab_size > theirs.vocab_size:
        yield (
            f"vocab_size: {theirs.vocab_size} in the folder, but the data in {data.folder} have "
            f"{manifest.vocab_size} pieces; prepare them with --tokenizer and the folder's"
        )


def _notes(ours: BertConfig, theirs: BertConfig, found: Mapping[str, Tensor]) -> Iterator[str]:
    """Parts that only one of the two has."""
    with torch.device("meta"):
        names = {name for name, _ in BertForPreTraining(ours).named_parameters()}

    def parts(of: Set[str], lacking: Set[str]) -> str:
        return ", ".join(
            text for part, text in _PARTS.items()
            if any(n.startswith(f"{part}.") for n in of)
            and not any(n.startswith(f"{part}.") for n in lacking)
        )  # fmt: skip

    if fresh := parts(names, found.keys()):
        yield f"the folder has no {fresh}: BERT's initialisation"
    if left := parts(found.keys(), names):
        yield f"left out, as the recipe has none: {left}"
    if (rows := ours.vocab_size - theirs.vocab_size) > 0:
        yield (
            f"the last {rows} of {ours.vocab_size} rows of the vocabulary, which the folder lacks: "
            "BERT's initialisation"
        )


def _completed(recipe: Recipe, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`found` in a new run's model: by the recipe's seed where nothing was found."""
    model = BertForPreTraining(recipe.stage_model(0))
    init_weights(model, torch.Generator().manual_seed(recipe.seed))
    weights = {}
    for name, parameter in model.named_parameters():
        fresh = parameter.detach()
        theirs = found.get(name, fresh)
        if name in ROWS_BY_ID and len(theirs) < len(fresh):
            fresh[: len(theirs)] = theirs
            theirs = fresh
        assert theirs.shape == fresh.shape, name
        weights[name] = theirs
    return weights


def _sha256(weights: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].contiguous().numpy().tobytes())
    return digest.hexdigest()


def _words(folder: Path, digest: str = "") -> str:
    """A sha256 of the folder's vocabulary, as a manifest names it; "" where it has none.

    ConfigError if its tokenizer is not the one that its model says, by `digest`.
    """
    path = folder / TOKENIZER
    if path.is_file():
        content = read_plain(path)
        require_tokenizer(content, digest, path, folder)
        return _sha256_of_words(content, path)
    if not (folder / VOCABULARY).is_file():
        return ""
    return vocabulary_sha256(load_vocabulary(folder))


def _sha256_of_words(content: bytes, path: Path) -> str:
    """Of a tokenizer.json; ConfigError if it is none."""
    vocabulary = parse_tokenizer(content, path).get_vocab()
    model = json.loads(content)["model"]
    # Older versions of the library join the two of a merge with a space.
    pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in model.get("merges", ()))
    merges = [(first, second) for first, second in pairs] if model.get("type") == "BPE" else None
    return vocabulary_sha256(sorted(vocabulary, key=vocabulary.__getitem__), merges)
