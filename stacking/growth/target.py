"""The size to grow to: a model's configuration and what should change in, the grown one's out."""

import difflib
from collections.abc import Mapping

from pydantic import ValidationError

from stacking.config import BertConfig
from stacking.config_base import BETWEEN_FIELDS
from stacking.config_faults import fault_lines
from stacking.errors import ConfigError

GROWABLE = (
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
)
"""What grows in a Hugging Face folder, too: the sizes that config.json of every home has."""

# A folder says these itself: by the heads that it holds, or because they change no output.
_FOLDERS_OWN = {
    "num_nsp_labels",
    "pooler",
    "mlm_bias",
    "tie_word_embeddings",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "initializer_range",
}


def resolve_target(
    source: BertConfig, target: BertConfig | Mapping[str, object]
) -> tuple[BertConfig, list[str]]:
    """(configuration to grow to, what was decided on the way, a line each).

    A BertConfig is taken as it is; a mapping holds the fields that change. There, heads that are
    not mentioned grow along with hidden_size, so that the head size stays. Raises ConfigError with
    all faults.
    """
    if isinstance(target, BertConfig):
        return target, []
    changes, notes, faults = dict(target), [], []
    size = changes.get("hidden_size", source.hidden_size)
    heads, head_size = source.num_attention_heads, source.hidden_size // source.num_attention_heads
    grows_wider = type(size) is int and 0 < size != source.hidden_size
    if grows_wider and type(size) is int and "num_attention_heads" not in changes:
        if size < source.hidden_size:
            faults.append(
                f"hidden_size: got {size} after {source.hidden_size}; allowed: at least "
                f"{source.hidden_size}, because a model cannot shrink"
            )
        elif size % head_size:
            faults.append(
                f"hidden_size: got {size} with heads of {head_size}; allowed: a multiple of the "
                f"head size, such as {2 * source.hidden_size}, because heads keep their size"
            )
        else:
            changes["num_attention_heads"] = size // head_size
            notes.append(
                f"num_attention_heads grows along from {heads} to {size // head_size}: heads keep "
                f"their size of {head_size}"
            )
    if grows_wider and "intermediate_size" not in changes:
        notes.append(
            f"intermediate_size stays {source.intermediate_size}; to change it, give it as well"
        )
    if faults:
        changes.pop("hidden_size")  # or the heads would be counted as a second fault
    try:
        config = BertConfig.model_validate(source.model_dump() | changes)
    except ValidationError as error:
        raise ConfigError(faults + _lines(error)) from error
    if faults:
        raise ConfigError(faults)
    return config, notes


def folder_changes(
    source: BertConfig, target: BertConfig | Mapping[str, object]
) -> dict[str, object]:
    """The fields of a Hugging Face folder's model that should change."""
    if not isinstance(target, BertConfig):
        return dict(target)
    ours, theirs = source.model_dump(), target.model_dump()
    return {
        key: value
        for key, value in theirs.items()
        if value != ours[key] and key not in _FOLDERS_OWN
    }


def unknown_size_faults(names: Mapping[str, object]) -> list[str]:
    """A line for each name that is no size that grows in a folder, with the nearest that is."""
    faults = []
    for name in names:
        if name in GROWABLE:
            continue
        close = difflib.get_close_matches(name, GROWABLE, n=1, cutoff=0.5)
        what = "cannot change" if name in BertConfig.model_fields else "unknown key"
        hint = f"did you mean {close[0]}? " if close else ""
        faults.append(f"{name}: {what}; {hint}Allowed: {', '.join(GROWABLE)}")
    return faults


def _lines(error: ValidationError) -> list[str]:
    between = [
        line
        for item in error.errors(include_url=False)
        if item["type"] == BETWEEN_FIELDS
        for line in str(item["msg"]).splitlines()
    ]
    return fault_lines(error, BertConfig) + between
