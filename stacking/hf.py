"""To and from Hugging Face folders: a folder counts only after transformers gave our logits.

`save_pretrained` writes into a temporary folder beside the target, loads it with transformers,
offline, compares logits and only then renames it. `load_pretrained` reads the five homes of
hf_homes.py, also encoder-only ones, and our own class without running its code.
"""

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import ValidationError
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
from stacking.config_faults import fault_lines
from stacking.errors import CheckpointError, ConfigError
from stacking.hf_homes import (
    ESM,
    HOMES,
    REMOTE,
    ROBERTA_PRE,
    ROFORMER,
    Home,
    choose_home,
    from_home,
    nearest_homes,
    to_home,
)
from stacking.hf_remote import own_fields, read_remote, remote_fields, write_code
from stacking.hf_side_files import CARD, replace_folder, require_replaceable
from stacking.hf_tokenizer import (
    DIGEST_FIELD,
    TOKENIZER,
    content_sha256,
    read_tokenizer,
    write_tokenizer,
)
from stacking.hf_vocabulary import trim_vocabulary
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
    """What was written, and the proof that it is our model.

    Attributes:
        architecture: the class to load it with.
        max_logit_difference: between transformers' logits and ours, in fp32.
        folder: where it is.
        notes: what is otherwise than in the model, without a change of the logits that it has.
        config: of what was written: its vocabulary may be smaller than the model's.
        needs_code: whether the class lies in the folder, so that readers have to trust it.
        has_tokenizer: whether a tokenizer lies beside it.
    """

    architecture: str
    max_logit_difference: float
    folder: Path
    notes: tuple[str, ...]
    config: BertConfig
    needs_code: bool
    has_tokenizer: bool


def save_pretrained(
    model: BertForPreTraining,
    config: BertConfig,
    folder: Path,
    tokenizer_dir: Path | None = None,
    card: Callable[[ExportReport], str] | None = None,
) -> ExportReport:
    """Write `model` as a folder that transformers' Auto classes load; ConfigError if none can.

    With a tokenizer, rows of the vocabulary that it has no ids for are left out. `card` makes the
    README.md. An earlier export at `folder` is replaced, anything else there is refused.
    """
    home = choose_home(config)
    require_replaceable(folder)
    tokenizer = None if tokenizer_dir is None else read_tokenizer(tokenizer_dir, config)
    kept = model if tokenizer is None else trim_vocabulary(model, tokenizer.num_ids)
    partial = folder.with_name(folder.name + ".incomplete")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(
            f"--out: {folder} cannot be written: {error.strerror}; give another folder"
        ) from error
    save_file(to_home(kept, home), partial / "model.safetensors", metadata={"format": "pt"})
    if tokenizer is not None:
        has_segments = home is not ESM and (home is not REMOTE or config.type_vocab_size > 0)
        write_tokenizer(tokenizer, partial, config, has_segments=has_segments)
    if home is REMOTE:
        write_code(partial)
    fields = home_config(kept.config, home) | _digest_field(partial)
    text = json.dumps(fields, indent=2) + "\n"
    (partial / "config.json").write_text(text, encoding="utf-8")
    difference = verify(model, config, partial)
    if not difference < MAX_LOGIT_DIFFERENCE:
        raise CheckpointError(
            f"export: logits of {partial} differ by {difference:.3g} from the model's, allowed is "
            f"{MAX_LOGIT_DIFFERENCE}; the folder stays for inspection, {folder} is untouched"
        )
    notes = tuple(_notes(config, kept.config, home))
    report = ExportReport(
        home.architecture(config), difference, folder, notes, kept.config, home is REMOTE,
        tokenizer is not None,
    )  # fmt: skip
    if card is not None:
        (partial / CARD).write_text(card(report), encoding="utf-8")
    replace_folder(folder, partial)
    return report


def _digest_field(folder: Path) -> dict[str, object]:
    path = folder / TOKENIZER
    return {DIGEST_FIELD: content_sha256(path.read_bytes())} if path.is_file() else {}


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
        Maximum over real tokens of the MLM logits of the ids that `folder` has, and over the
        next-sentence logits.
    """
    home = choose_home(config)
    theirs, missing = _load_transformers(folder, home, with_nsp=home.holds_nsp(config))
    if missing:
        raise CheckpointError(f"export: {folder} lacks {', '.join(sorted(missing))}")
    size = int(theirs.config.vocab_size)
    known = config.model_copy(update={"vocab_size": size})
    ids = random_ids(known) if input_ids is None else input_ids
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
    is_bert = home.holds_nsp(config) and home is not REMOTE
    logits = outputs.prediction_logits if is_bert else outputs.logits
    differences = [(ours["prediction_logits"][..., :size] - logits)[mask].abs().max()]
    if home.holds_nsp(config):
        nsp = ours["seq_relationship_logits"] - outputs.seq_relationship_logits
        differences.append(nsp.abs().max())
    return float(torch.stack(differences).max())


def load_pretrained(
    folder: Path, *, keeps_pooler: bool = False
) -> tuple[BertForPreTraining, BertConfig]:
    """Read a folder of one of our homes in fp32; heads that it lacks are drawn and logged.

    A pooler without a next-sentence head, as encoders have it, counts as lacking too, unless
    `keeps_pooler`: then the head is drawn.
    """
    model, drawn = load_with_heads(folder, keeps_pooler=keeps_pooler)
    if "mlm_head" in drawn:
        logger.warning("%s has no MLM head: it starts at BERT's initialisation, untrained", folder)
    return model, model.config


def load_with_heads(
    folder: Path, *, keeps_pooler: bool = False
) -> tuple[BertForPreTraining, frozenset[str]]:
    """The model as `load_pretrained` reads it, and which modules of it the folder lacks."""
    home, fields = read_home(folder)
    if home is REMOTE:
        weights, missing = read_remote(folder, our_config(fields, home, has_nsp=True))
    else:
        theirs, missing = _load_transformers(folder, home, with_nsp=True)
        weights = {name: tensor.detach() for name, tensor in theirs.state_dict().items()}
    has_nsp = home.pre_training_class is not None and not any(
        ("seq_relationship" in name and not keeps_pooler) or "pooler" in name for name in missing
    )
    config = our_config(fields, home, has_nsp)
    if config.tie_word_embeddings:
        require_tied(weights, home, folder)
    elif home is not REMOTE:
        # Before release 5, transformers wrote the bias of an untied decoder under one name only.
        biases = {name for name in missing if name.endswith("decoder.bias")}
        missing, weights = missing - biases, {n: t for n, t in weights.items() if n not in biases}
    model = BertForPreTraining(config)
    model.load_state_dict(from_home(weights, config, home))
    return model, _draw_missing(model, missing, folder)


def home_config(config: BertConfig, home: Home) -> dict[str, object]:
    """config.json of `home`."""
    if home is REMOTE:
        return remote_fields(config)
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
    if (own := own_fields(folder)) is not None:
        return REMOTE, own
    known = ", ".join(home.model_type for home in (*HOMES, REMOTE))
    try:
        with _quiet_transformers():  # Foreign code never runs, and nobody is asked whether it may.
            fields = AutoConfig.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            ).to_dict()
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
    model, missing, _ = load_transformers(folder, auto, runs_code=home is REMOTE)
    return model, missing


def load_transformers(
    folder: Path, auto: AnyAuto, *, runs_code: bool = False
) -> tuple[PreTrainedModel, set[str], set[str]]:
    """(fp32 model in eval mode, names that only the model has, names that only the file has).

    `runs_code`: the folder was written here, with our own class.
    """
    try:
        with _quiet_transformers(), torch.random.fork_rng(devices=[]):
            model, info = auto.from_pretrained(
                folder,
                dtype=torch.float32,
                local_files_only=True,
                output_loading_info=True,
                trust_remote_code=runs_code,
            )
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: transformers cannot load it: {error}") from error
    return model.eval(), set(info["missing_keys"]), set(info["unexpected_keys"])


def our_config(fields: dict[str, object], home: Home, has_nsp: bool) -> BertConfig:
    """BertConfig of a folder with these config.json fields; ConfigError if no BERT has them."""
    same = set(BertConfig.model_fields) & set(fields)
    values = {name: fields[name] for name in same if fields[name] is not None}
    if home is REMOTE:
        return _checked(values if has_nsp else values | {"num_nsp_labels": 0})
    values |= {
        "position": "rotary" if home.requires["position"] == ("rotary",) else "learned",
        "layer_norm": home.requires["layer_norm"][0],
        "embedding_layer_norm": "embeddings.layer_norm" in home.outer_names,
        "num_nsp_labels": 2 if has_nsp else 0,
    }
    if home is ESM:
        values["embedding_layer_norm"] = bool(fields["emb_layer_norm_before"])
        values["type_vocab_size"] = 0
    config = _checked(values)
    if home is ROBERTA_PRE:
        longest = config.max_position_embeddings - config.pad_token_id - 1
        config = config.model_copy(update={"max_position_embeddings": longest})
    return config


def _checked(values: dict[str, object]) -> BertConfig:
    try:
        return BertConfig.model_validate(values)
    except ValidationError as error:
        lines = fault_lines(error, BertConfig) or [str(e["msg"]) for e in error.errors()]
        raise ConfigError([f"config.json: {line}" for line in lines]) from error


def require_tied(weights: dict[str, Tensor], home: Home, folder: Path) -> None:
    """Refuse a decoder that is not the word embedding where config.json says that it is."""
    decoder = next((weights[name] for name in weights if name.endswith(".decoder.weight")), None)
    words = weights[f"{home.prefix}embeddings.word_embeddings.weight"]
    if decoder is not None and not torch.equal(decoder, words):
        raise ConfigError(
            f"{folder}: the MLM decoder differs from the word embedding, but config.json says "
            "tie_word_embeddings: true; set it to false"
        )


def _draw_missing(model: BertForPreTraining, missing: set[str], folder: Path) -> frozenset[str]:
    """Draw heads that the folder lacks; anything else that is missing is an error."""
    beginnings = ("cls.", "lm_head.", "mlm_head.", "seq_relationship.")
    heads = {name for name in missing if name.startswith(beginnings) or "pooler" in name}
    ignored = {name for name in missing if "contact_head" in name or "embed_positions" in name}
    if not any(
        name.endswith((".transform.dense.weight", "lm_head.dense.weight")) for name in heads
    ):
        heads -= {name for name in missing if name.endswith("decoder.weight")}
    if missing - heads - ignored:
        raise CheckpointError(f"{folder} lacks {', '.join(sorted(missing - heads - ignored))}")
    # With a seed of ours: transformers draws others in each process, and the model would not be
    # the same when fine-tuning goes on.
    fresh = BertForPreTraining(model.config)
    init_weights(fresh, torch.Generator().manual_seed(0))
    drawn = set()
    if any("predictions" in name or "lm_head" in name for name in heads):
        model.mlm_head.load_state_dict(fresh.mlm_head.state_dict())
        drawn.add("mlm_head")
    if any("seq_relationship" in name for name in heads) and model.nsp_head is not None:
        assert fresh.nsp_head is not None
        model.nsp_head.classifier.load_state_dict(fresh.nsp_head.classifier.state_dict())
        drawn.add("nsp_head.classifier")
    return frozenset(drawn)


def random_ids(config: BertConfig, longest: int = 64) -> Tensor:
    """[3,S] ids with right padding in the last two rows; S <= 64 keeps the check to a second."""
    length = min(config.max_position_embeddings, longest)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, config.vocab_size, (3, length), generator=generator)
    ids[ids == config.pad_token_id] = (config.pad_token_id + 1) % config.vocab_size
    for row, kept in ((1, length * 2 // 3), (2, 1)):
        ids[row, kept:] = config.pad_token_id
    return ids


def _notes(config: BertConfig, kept: BertConfig, home: Home) -> Iterator[str]:
    """What the folder holds otherwise than the model did, without a change of its MLM logits."""
    if (left_out := config.vocab_size - kept.vocab_size) > 0:
        yield (
            f"{left_out} rows of the vocabulary left out: model.vocab_size is {config.vocab_size}, "
            f"the tokenizer has {kept.vocab_size} ids"
        )
    if home is REMOTE:
        yield (
            f"no class of transformers holds this model ({'; '.join(nearest_homes(config))}): its "
            "own lies in the folder; load it with trust_remote_code=True"
        )
        return
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
