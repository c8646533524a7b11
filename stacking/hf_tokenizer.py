"""The tokenizer of a Hugging Face folder: tokenizer.json in, what AutoTokenizer reads out."""

import json
from pathlib import Path

from stacking.config import BertConfig
from stacking.errors import CheckpointError, ConfigError

SPECIAL_TOKENS = {
    "unk_token": "[UNK]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "cls_token": "[CLS]",
    "mask_token": "[MASK]",
}


def write_tokenizer(source: Path, folder: Path, config: BertConfig, *, has_segments: bool) -> None:
    """Copy tokenizer.json and vocab.txt of `source`, and what AutoTokenizer needs to pick them up.

    The generic fast class is named, because the class that transformers would guess from the
    architecture (ESM: amino acids) is another tokenizer.
    """
    path = source / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(f"export: {path} is missing; give the folder of the run's tokenizer")
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    ids = {entry["content"]: entry["id"] for entry in tokenizer.get("added_tokens", [])}
    ids |= {token: tokenizer["model"]["vocab"][token] for token in SPECIAL_TOKENS.values()
            if token in tokenizer["model"]["vocab"]}  # fmt: skip
    _check_vocabulary(tokenizer["model"]["vocab"], ids, config, path)
    tokenizer |= {"padding": None, "truncation": None}
    if tokenizer.get("post_processor") is None:
        tokenizer["post_processor"] = _bert_template(ids)
    _write_json(folder / "tokenizer.json", tokenizer)
    names = ["input_ids", "token_type_ids", "attention_mask"]
    if not has_segments:
        names.remove("token_type_ids")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.max_position_embeddings,
        "model_input_names": names,
        "clean_up_tokenization_spaces": True,
        **SPECIAL_TOKENS,
    }
    _write_json(folder / "tokenizer_config.json", settings)
    _write_json(folder / "special_tokens_map.json", SPECIAL_TOKENS)
    vocabulary = sorted(tokenizer["model"]["vocab"].items(), key=lambda item: item[1])
    lines = "".join(f"{token}\n" for token, _ in vocabulary)
    (folder / "vocab.txt").write_text(lines, encoding="utf-8")


def _check_vocabulary(
    vocabulary: dict[str, int], ids: dict[str, int], config: BertConfig, path: Path
) -> None:
    faults = [f"{path}: no token {token}" for token in SPECIAL_TOKENS.values() if token not in ids]
    largest = max(vocabulary.values())
    if largest >= config.vocab_size:
        faults.append(
            f"{path}: largest id {largest}, but model.vocab_size is {config.vocab_size}; "
            "give the tokenizer that the model was trained with"
        )
    if ids.get("[PAD]", config.pad_token_id) != config.pad_token_id:
        faults.append(
            f"{path}: [PAD] is {ids['[PAD]']}, but model.pad_token_id is {config.pad_token_id}"
        )
    if faults:
        raise ConfigError(faults)


def _bert_template(ids: dict[str, int]) -> dict[str, object]:
    """`[CLS] A [SEP]` and `[CLS] A [SEP] B [SEP]` in the format of the tokenizers library."""

    def special(token: str, segment: int) -> dict[str, object]:
        return {"SpecialToken": {"id": token, "type_id": segment}}

    first: dict[str, object] = {"Sequence": {"id": "A", "type_id": 0}}
    second = {"Sequence": {"id": "B", "type_id": 1}}
    single: list[dict[str, object]] = [special("[CLS]", 0), first, special("[SEP]", 0)]
    tokens = {t: {"id": t, "ids": [ids[t]], "tokens": [t]} for t in ("[CLS]", "[SEP]")}
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, second, special("[SEP]", 1)],
        "special_tokens": tokens,
    }


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
