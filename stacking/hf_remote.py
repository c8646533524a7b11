"""Folders whose class is this project's own: its code goes along, and comes back without running.

The code is stacking/remote_code; transformers runs it where a reader says `trust_remote_code=True`.
"""

import json
import shutil
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file

from data_prep.plain_files import read_plain
from stacking.config import BertConfig
from stacking.errors import CheckpointError
from stacking.hf_homes import REMOTE, Weights, to_home
from stacking.modeling import BertForPreTraining

CODE = Path(__file__).with_name("remote_code")
CONFIGURATION, MODELING = "configuration_progressive_bert", "modeling_progressive_bert"
CODE_FILES = (f"{CONFIGURATION}.py", f"{MODELING}.py")
_CLASSES = {
    "AutoConfig": f"{CONFIGURATION}.ProgressiveBertConfig",
    "AutoModel": f"{MODELING}.ProgressiveBertModel",
    "AutoModelForPreTraining": f"{MODELING}.ProgressiveBertForPreTraining",
    "AutoModelForMaskedLM": f"{MODELING}.ProgressiveBertForPreTraining",
    "AutoModelForSequenceClassification": f"{MODELING}.ProgressiveBertForSequenceClassification",
}


def write_code(folder: Path) -> None:
    """Copy the classes into `folder`."""
    for name in CODE_FILES:
        shutil.copyfile(CODE / name, folder / name)


def remote_fields(config: BertConfig) -> dict[str, object]:
    """config.json: our own fields, and where the classes are."""
    own = config.model_dump(mode="json", exclude={"pooling", "pooling_size"})
    return {
        "architectures": [REMOTE.masked_lm_class],
        "model_type": REMOTE.model_type,
        "auto_map": _CLASSES,
        **own,
        "dtype": "float32",
    }


def own_fields(folder: Path) -> dict[str, object] | None:
    """config.json where it names our class; None where it does not, or cannot be read."""
    try:
        fields = json.loads(read_plain(folder / "config.json"))
    except (OSError, ValueError, RecursionError):
        return None
    is_ours = isinstance(fields, dict) and fields.get("model_type") == REMOTE.model_type
    return fields if is_ours else None


def read_remote(folder: Path, config: BertConfig) -> tuple[Weights, set[str]]:
    """(weights under the class's names, those names that the files lack, which are zero).

    Nothing of the folder is run. CheckpointError where a file cannot be read or a size is not that
    of `config`.
    """
    expected = to_home(BertForPreTraining(config), REMOTE)
    found: Weights = {}
    try:
        for path in sorted(folder.glob("model*.safetensors")):
            found |= load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: its weights cannot be read: {error}") from error
    if not found:
        raise CheckpointError(f"{folder}: no model.safetensors")
    wrong = [
        f"{name} is {list(found[name].shape)}, not {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name in found and found[name].shape != tensor.shape
    ]
    if wrong:
        raise CheckpointError(f"{folder}: not the sizes of its config.json: {'; '.join(wrong[:3])}")
    return expected | found, set(expected) - set(found)
