"""The tokenizer of a Hugging Face folder: tokenizer.json in, what AutoTokenizer reads out.

A model's vocabulary may be padded to a round number; the rows behind the tokenizer's last id stand
for nothing, and `trim_vocabulary` leaves them out.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from stacking.config import BertConfig
from stacking.errors import CheckpointError, ConfigError

TOKENIZER = "tokenizer.json"
DIGEST_FIELD = "tokenizer_sha256"
"""Of an export's config.json: `content_sha256` of the tokenizer.json that its model reads."""
# BERT's names first; the others are those of byte-level vocabularies such as RoBERTa's.
SPECIAL_TOKENS = {
    "unk_token": ("[UNK]", "<unk>"),
    "sep_token": ("[SEP]", "</s>", "<sep>"),
    "pad_token": ("[PAD]", "<pad>"),
    "cls_token": ("[CLS]", "<s>", "<cls>"),
    "mask_token": ("[MASK]", "<mask>"),
}


@dataclass(frozen=True)
class RunTokenizer:
    """A tokenizer.json as it was read.

    Attributes:
        content: the JSON object.
        ids: id of each token.
        special: role -> token, as transformers names the roles.
    """

    content: dict[str, object]
    ids: dict[str, int]
    special: dict[str, str]

    @property
    def num_ids(self) -> int:
        """Rows that a model needs for it."""
        return 1 + max(self.ids.values())


def read_tokenizer(source: Path, config: BertConfig) -> RunTokenizer:
    """The tokenizer in folder `source`; ConfigError where it is not one for a model of `config`."""
    path = source / TOKENIZER
    if not path.is_file():
        raise CheckpointError(f"export: {path} is missing; give the folder of the run's tokenizer")
    content = json.loads(path.read_text(encoding="utf-8"))
    ids = {entry["content"]: entry["id"] for entry in content.get("added_tokens", [])}
    ids |= content["model"]["vocab"]
    special = {
        role: next((name for name in names if name in ids), names[0])
        for role, names in SPECIAL_TOKENS.items()
    }
    _check_vocabulary(ids, special, config, path)
    return RunTokenizer(content, ids, special)


def write_tokenizer(
    source: RunTokenizer, folder: Path, config: BertConfig, *, has_segments: bool
) -> None:
    """Write tokenizer.json and vocab.txt, and what AutoTokenizer needs to pick them up.

    The generic fast class is named, because the class that transformers would guess from the
    architecture (ESM: amino acids) is another tokenizer.
    """
    tokenizer = source.content | {"padding": None, "truncation": None}
    if tokenizer.get("post_processor") is None:
        tokenizer["post_processor"] = _bert_template(source.ids, source.special)
    _write_json(folder / TOKENIZER, tokenizer)
    model = tokenizer["model"]
    assert isinstance(model, dict), "read_tokenizer has read its vocabulary"
    names = ["input_ids", "token_type_ids", "attention_mask"]
    if not has_segments:
        names.remove("token_type_ids")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.max_position_embeddings,
        "model_input_names": names,
        "clean_up_tokenization_spaces": model["type"] == "WordPiece",
        **source.special,
    }
    _write_json(folder / "tokenizer_config.json", settings)
    _write_json(folder / "special_tokens_map.json", source.special)
    vocabulary = sorted(model["vocab"].items(), key=lambda item: item[1])
    lines = "".join(f"{token}\n" for token, _ in vocabulary)
    (folder / "vocab.txt").write_text(lines, encoding="utf-8")


def content_sha256(tokenizer: bytes) -> str:
    """A digest of what a tokenizer.json says, however it is laid out.

    transformers writes a folder's tokenizer.json anew, in another layout and with its last padding
    and truncation, which are the caller's. ValueError where it is no JSON object.
    """
    content = json.loads(tokenizer)
    if not isinstance(content, dict):
        raise ValueError("not a JSON object")
    said = {name: content[name] for name in content.keys() - {"padding", "truncation"}}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _check_vocabulary(
    ids: dict[str, int], special: dict[str, str], config: BertConfig, path: Path
) -> None:
    faults = [f"{path}: no token {token}" for token in special.values() if token not in ids]
    largest = max(ids.values())
    if largest >= config.vocab_size:
        faults.append(
            f"{path}: largest id {largest}, but model.vocab_size is {config.vocab_size}; "
            "give the tokenizer that the model was trained with"
        )
    pad = special["pad_token"]
    if ids.get(pad, config.pad_token_id) != config.pad_token_id:
        faults.append(
            f"{path}: {pad} is {ids[pad]}, but model.pad_token_id is {config.pad_token_id}"
        )
    if faults:
        raise ConfigError(faults)


def _bert_template(ids: dict[str, int], names: dict[str, str]) -> dict[str, object]:
    """`[CLS] A [SEP]` and `[CLS] A [SEP] B [SEP]` in the format of the tokenizers library."""
    cls, sep = names["cls_token"], names["sep_token"]

    def special(token: str, segment: int) -> dict[str, object]:
        return {"SpecialToken": {"id": token, "type_id": segment}}

    first: dict[str, object] = {"Sequence": {"id": "A", "type_id": 0}}
    second = {"Sequence": {"id": "B", "type_id": 1}}
    single: list[dict[str, object]] = [special(cls, 0), first, special(sep, 0)]
    tokens = {t: {"id": t, "ids": [ids[t]], "tokens": [t]} for t in (cls, sep)}
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, second, special(sep, 1)],
        "special_tokens": tokens,
    }


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
