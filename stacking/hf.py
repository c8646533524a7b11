"""To and from Hugging Face folders: a folder counts only after transformers gave our logits.

`save_pretrained` writes into a temporary folder beside the target, loads it with transformers,
offline, compares logits and only then renames it. `load_pretrained` reads the five homes of
hf_homes.py, also encoder-only ones.
"""

import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)
from transformers.utils import logging as hf_logging

from stacking.config import BertConfig
from stacking.errors import CheckpointError, ConfigError
from stacking.hf_homes import (
    ESM,
    HOMES,
    ROBERTA_PRE,
    ROFORMER,
    Home,
    choose_home,
    from_home,
    to_home,
)
from stacking.hf_tokenizer import write_tokenizer
from stacking.modeling import BertForPreTraining, init_weights

logger = logging.getLogger(__name__)

AnyAuto = type[
    AutoModel
    | AutoModelForMaskedLM
    | AutoModelForPreTraining
    | AutoModelForQuestionAnswering
    | AutoModelForSequenceClassification
    | AutoModelForTokenClassification
]

MAX_LOGIT_DIFFERENCE = 1e-4
"""fp32; two correct implementations differ by rounding only, about 1e-6 at unit-size logits."""

EXPORTED_FILES = {
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
}
SHARED_FIELDS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "max_position_embeddings",
    "initializer_range",
    "layer_norm_eps",
    "pad_token_id",
)
"""Fields that every home has under our name."""


@dataclass(frozen=True)
class ExportReport:
    """What was written: class to load it with, proof that it is our model, what was left out."""

    architecture: str
    max_logit_difference: float
    folder: Path
    notes: tuple[str, ...]


def save_pretrained(
    model: BertForPreTraining, config: BertConfig, folder: Path, tokenizer_dir: Path | None = None
) -> ExportReport:
    """Write `model` as a folder that transformers' Auto classes load; ConfigError if none can.

    An earlier export at `folder` is replaced, anything else there is refused.
    """
    home = choose_home(config)
    _require_replaceable(folder)
    partial = folder.with_name(folder.name + ".incomplete")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file(to_home(model, home), partial / "model.safetensors", metadata={"format": "pt"})
    if tokenizer_dir is not None:
        write_tokenizer(tokenizer_dir, partial, config, has_segments=home is not ESM)
    text = json.dumps(home_config(config, home), indent=2) + "\n"
    (partial / "config.json").write_text(text, encoding="utf-8")
    difference = verify(model, config, partial)
    if not difference < MAX_LOGIT_DIFFERENCE:
        raise CheckpointError(
            f"export: logits of {partial} differ by {difference:.3g} from the model's, allowed is "
            f"{MAX_LOGIT_DIFFERENCE}; the folder stays for inspection, {folder} is untouched"
        )
    replace_folder(folder, partial)
    return ExportReport(home.architecture(config), difference, folder, tuple(_notes(config, home)))


def verify(
    model: BertForPreTraining, config: BertConfig, folder: Path, input_ids: Tensor | None = None
) -> float:
    """Largest fp32 logit difference between `model` and `folder` loaded with transformers.

    Args:
        model: Ours; left in the mode and dtype that it has.
        config: Its config.
        folder: A folder written by `save_pretrained`.
        input_ids: [B,S], padded on the right only; None: random ids with padding and segments.

    Returns:
        Maximum over real tokens of the MLM logits, and over the next-sentence logits.
    """
    home = choose_home(config)
    theirs, missing = _load_transformers(folder, home, with_nsp=home.holds_nsp(config))
    if missing:
        raise CheckpointError(f"export: {folder} lacks {', '.join(sorted(missing))}")
    ids = random_ids(config) if input_ids is None else input_ids
    mask = ids != config.pad_token_id
    segments = (torch.arange(ids.shape[1]) >= ids.shape[1] // 2).long().expand_as(ids).contiguous()
    inputs = {"input_ids": ids, "attention_mask": mask.long()}
    if config.type_vocab_size > 1:
        inputs["token_type_ids"] = segments
    reference = BertForPreTraining(config).eval()
    reference.load_state_dict({name: tensor.float() for name, tensor in model.state_dict().items()})
    with torch.no_grad():
        ours = reference(ids, inputs.get("token_type_ids"), mask)
        outputs = theirs(**inputs)
    logits = outputs.prediction_logits if home.holds_nsp(config) else outputs.logits
    differences = [(ours["prediction_logits"] - logits)[mask].abs().max()]
    if home.holds_nsp(config):
        nsp = ours["seq_relationship_logits"] - outputs.seq_relationship_logits
        differences.append(nsp.abs().max())
    return float(torch.stack(differences).max())


def load_pretrained(folder: Path) -> tuple[BertForPreTraining, BertConfig]:
    """Read a folder of one of the five homes in fp32; heads that it lacks are drawn and logged."""
    home, fields = read_home(folder)
    theirs, missing = _load_transformers(folder, home, with_nsp=True)
    weights = {name: tensor.detach() for name, tensor in theirs.state_dict().items()}
    has_nsp = home.pre_training_class is not None and not any(
        "seq_relationship" in name or "pooler" in name for name in missing
    )
    config = our_config(fields, home, has_nsp)
    if config.tie_word_embeddings:
        require_tied(weights, home, folder)
    elif biases := {name for name in missing if name.endswith("decoder.bias")}:
        # Before release 5, transformers wrote the bias of an untied decoder under one name only.
        missing, weights = missing - biases, {n: t for n, t in weights.items() if n not in biases}
    model = BertForPreTraining(config)
    model.load_state_dict(from_home(weights, config, home))
    _draw_missing(model, missing, folder)
    return model, config


def home_config(config: BertConfig, home: Home) -> dict[str, object]:
    """config.json of `home`."""
    fields: dict[str, object] = {
        "architectures": [home.architecture(config)],
        "model_type": home.model_type,
        **{name: getattr(config, name) for name in SHARED_FIELDS},
        "intermediate_size": config.inner_size(0),
        "bos_token_id": None,
        "eos_token_id": None,
        "tie_word_embeddings": config.tie_word_embeddings,
        "dtype": "float32",
    }
    if home is not ESM:
        fields["type_vocab_size"] = config.type_vocab_size or 2
    if home is ROFORMER:
        fields |= {"embedding_size": config.hidden_size, "rotary_value": False}
    if home is ROBERTA_PRE:
        offset = config.pad_token_id + 1
        fields["max_position_embeddings"] = config.max_position_embeddings + offset
    if home is ESM:
        fields |= {
            "position_embedding_type": "rotary",
            "emb_layer_norm_before": config.embedding_layer_norm,
            "token_dropout": False,
        }
    return fields


def read_home(folder: Path) -> tuple[Home, dict[str, object]]:
    """Home and config.json fields, defaults filled in; ConfigError where we cannot represent it."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: no config.json, this is not a Hugging Face folder")
    known = ", ".join(home.model_type for home in HOMES)
    try:
        with _quiet_transformers():
            fields = AutoConfig.from_pretrained(folder, local_files_only=True).to_dict()
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{folder}/config.json: transformers cannot read it, readable are models of type "
            f"{known}: {str(error).splitlines()[0]}"
        ) from error
    home = next((home for home in HOMES if home.model_type == fields["model_type"]), None)
    if home is None:
        raise ConfigError(f"{folder}: model_type={fields['model_type']}, readable are {known}")
    needed: dict[str, tuple[object, ...]] = {
        "is_decoder": (False, None),
        "position_embedding_type": ("rotary",) if home is ESM else ("absolute", None),
        "hidden_act": ("gelu", "gelu_new", "relu", None),
        "rotary_value": (False, None),
        "embedding_size": (fields["hidden_size"], None),
        "token_dropout": (False, None),
        "tie_word_embeddings": (True, False, None),
    }
    faults = [
        f"{folder}/config.json: {key}={fields.get(key)}, readable: {', '.join(map(str, allowed))}"
        for key, allowed in needed.items()
        if fields.get(key) not in allowed
    ]
    if faults:
        raise ConfigError(faults)
    return home, fields


def _load_transformers(
    folder: Path, home: Home, with_nsp: bool
) -> tuple[PreTrainedModel, set[str]]:
    """(fp32 model in eval mode, names that the file lacks and transformers drew at random)."""
    pre_training = with_nsp and home.pre_training_class is not None
    auto: AnyAuto = AutoModelForPreTraining if pre_training else AutoModelForMaskedLM
    model, missing, _ = load_transformers(folder, auto)
    return model, missing


def load_transformers(folder: Path, auto: AnyAuto) -> tuple[PreTrainedModel, set[str], set[str]]:
    """(fp32 model in eval mode, names that only the model has, names that only the file has)."""
    try:
        with _quiet_transformers(), torch.random.fork_rng(devices=[]):
            model, info = auto.from_pretrained(
                folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
            )
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: transformers cannot load it: {error}") from error
    return model.eval(), set(info["missing_keys"]), set(info["unexpected_keys"])


def our_config(fields: dict[str, object], home: Home, has_nsp: bool) -> BertConfig:
    """BertConfig of a folder with these config.json fields."""
    same = set(BertConfig.model_fields) & set(fields)
    values = {name: fields[name] for name in same if fields[name] is not None}
    values |= {
        "position": "rotary" if home.requires["position"] == ("rotary",) else "learned",
        "layer_norm": home.requires["layer_norm"][0],
        "embedding_layer_norm": "embeddings.layer_norm" in home.outer_names,
        "num_nsp_labels": 2 if has_nsp else 0,
    }
    if home is ESM:
        values["embedding_layer_norm"] = bool(fields["emb_layer_norm_before"])
        values["type_vocab_size"] = 0
    config = BertConfig.model_validate(values)
    if home is ROBERTA_PRE:
        longest = config.max_position_embeddings - config.pad_token_id - 1
        config = config.model_copy(update={"max_position_embeddings": longest})
    return config


def require_tied(weights: dict[str, Tensor], home: Home, folder: Path) -> None:
    """Refuse a decoder that is not the word embedding where config.json says that it is."""
    decoder = next((weights[name] for name in weights if name.endswith(".decoder.weight")), None)
    words = weights[f"{home.prefix}embeddings.word_embeddings.weight"]
    if decoder is not None and not torch.equal(decoder, words):
        raise ConfigError(
            f"{folder}: the MLM decoder differs from the word embedding, but config.json says "
            "tie_word_embeddings: true; set it to false"
        )


def _draw_missing(model: BertForPreTraining, missing: set[str], folder: Path) -> None:
    """Draw heads that the folder lacks, and say so; anything else that is missing is an error."""
    heads = {name for name in missing if name.startswith(("cls.", "lm_head.")) or "pooler" in name}
    ignored = {name for name in missing if "contact_head" in name or "embed_positions" in name}
    if not any(
        name.endswith((".transform.dense.weight", "lm_head.dense.weight")) for name in heads
    ):
        heads -= {name for name in missing if name.endswith("decoder.weight")}
    if missing - heads - ignored:
        raise CheckpointError(f"{folder} lacks {', '.join(sorted(missing - heads - ignored))}")
    if any("predictions" in name or "lm_head" in name for name in heads):
        fresh = BertForPreTraining(model.config)
        init_weights(fresh, torch.Generator().manual_seed(0))
        model.mlm_head.load_state_dict(fresh.mlm_head.state_dict())
        logger.warning("%s has no MLM head: it starts at BERT's initialisation, untrained", folder)


def random_ids(config: BertConfig, longest: int = 64) -> Tensor:
    """[3,S] ids with right padding in the last two rows; S <= 64 keeps the check to a second."""
    length = min(config.max_position_embeddings, longest)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, config.vocab_size, (3, length), generator=generator)
    ids[ids == config.pad_token_id] = (config.pad_token_id + 1) % config.vocab_size
    for row, kept in ((1, length * 2 // 3), (2, 1)):
        ids[row, kept:] = config.pad_token_id
    return ids


def _notes(config: BertConfig, home: Home) -> Iterator[str]:
    """What the folder holds otherwise than the model did, without a change of its MLM logits."""
    if config.num_nsp_labels and not home.holds_nsp(config):
        yield (
            f"next-sentence head dropped: {home.model_type} has no place for num_nsp_labels="
            f"{config.num_nsp_labels}, pooler={str(config.pooler).lower()}"
        )
    if config.position == "sinusoidal":
        yield "sinusoidal positions are written as a table, as if they were learned"
    if not config.layer_norm_affine:
        yield "plain LayerNorms are written with weight 1 and bias 0"
    if not config.mlm_bias:
        yield "the MLM output bias is written as 0"
    if not config.type_vocab_size and home is not ESM:
        yield "the segment table is written as 0"


def _require_replaceable(folder: Path) -> None:
    if folder.is_dir():
        foreign = sorted({path.name for path in folder.iterdir()} - EXPORTED_FILES)
        if foreign:
            raise ConfigError(
                f"--out {folder}: holds {', '.join(foreign[:3])}, which no export wrote; "
                "give a new folder"
            )
    elif folder.exists():
        raise ConfigError(f"--out {folder}: is a file; give a folder")


def replace_folder(folder: Path, partial: Path) -> None:
    """Put `partial` in the place of `folder`; at no moment is there a half-written `folder`."""
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without its progress bars and loading tables: what matters of them, we say ourselves."""
    verbosity, had_bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity(logging.ERROR)
    hf_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if had_bars:
            hf_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
