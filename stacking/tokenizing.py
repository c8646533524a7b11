"""Texts in, token ids out, as fine-tuning wants them: without special tokens, padding or cuts."""

from collections.abc import Iterator, Sequence

from tokenizers import Encoding, Tokenizer

from stacking.errors import ConfigError
from stacking.hf_tokenizer import SPECIAL_TOKENS

_TEXTS_A_CALL = 1024  # sent to the tokenizer at once; each takes some 100 bytes a token meanwhile


def encodings(texts: Sequence[str], tokenizer: Tokenizer) -> Iterator[Encoding]:
    """The tokens of each text; its own padding, truncation and template are not used.

    A text that spells a special token, such as "[SEP]", is text.
    """
    plain = Tokenizer.from_str(tokenizer.to_str())
    plain.no_padding()
    plain.no_truncation()
    plain.encode_special_tokens = True
    for begin in range(0, len(texts), _TEXTS_A_CALL):
        chunk = list(texts[begin : begin + _TEXTS_A_CALL])
        yield from plain.encode_batch(chunk, add_special_tokens=False)


def special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """Ids of [PAD], [CLS] and [SEP] under whatever name; ConfigError if one is missing."""
    ids, faults = {}, []
    for role in ("pad_token", "cls_token", "sep_token"):
        found = [tokenizer.token_to_id(name) for name in SPECIAL_TOKENS[role]]
        known = [number for number in found if number is not None]
        if known:
            ids[role] = known[0]
        else:
            faults.append(f"the tokenizer has no token {' or '.join(SPECIAL_TOKENS[role])}")
    if faults:
        raise ConfigError(faults)
    return ids
