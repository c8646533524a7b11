"""How far apart the outputs of two transformers models are, on real text and on random ids."""

from collections.abc import Collection, Iterable
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from stacking.config import BertConfig
from stacking.hf import random_ids

LONGEST_PROBE = 512
"""Tokens of the longest random row; attention's cost is quadratic."""

TEXTS = (
    "The river had risen over night, and by noon the lower road was under water.",
    "Growing a network keeps what the small one learned: nothing is thrown away!",
    "Who?",
    "In 1897, J. J. Thomson measured the charge-to-mass ratio of cathode rays; a decade later "
    "Robert Millikan found the charge itself, 1.592e-19 coulombs, with drops of oil.",
    "She said 'no', twice, and closed the door.",
    "naive cafe, zwei Strassen, 3 x 7 = 21",
)
"""Of different lengths, so that the batch is padded."""

_READS: dict[str, tuple[str, ...]] = {
    "last_hidden_state": (),
    "pooler_output": ("pooler",),
    "seq_relationship_logits": ("pooler", "seq_relationship"),
    "logits": ("predictions", "lm_head", "classifier", "qa_outputs"),
}
"""Outputs by the end of their name, and what they need besides the encoder; the first counts."""

Batch = dict[str, Tensor]


def probe_batches(folder: Path, config: BertConfig) -> list[Batch]:
    """Inputs for a model of `config`, padded on the right: TEXTS where `folder` has a tokenizer,
    random ids with padding and segments, and one random row over all positions.
    """
    ids = random_ids(config)
    long = random_ids(config, LONGEST_PROBE)[:1]
    return [*_text_batch(folder, config), *(_batch(rows, config) for rows in (ids, long))]


def largest_changes(
    before: PreTrainedModel,
    after: PreTrainedModel,
    batches: Iterable[Batch],
    missing: Collection[str],
) -> dict[str, float]:
    """For each output the largest |difference| over the largest |value| of `before`.

    Vectors that became wider, [..., H] to [..., H'], are compared copy by copy: number j with
    j mod H. Padding does not count, nor do the outputs of heads in `missing`.
    """
    difference: dict[str, Tensor] = {}
    largest: dict[str, Tensor] = {}
    for batch in batches:
        outputs = zip(
            _outputs(before, batch, missing), _outputs(after, batch, missing), strict=True
        )
        for (name, old), (_, new) in outputs:
            copies = torch.arange(new.shape[-1]) % old.shape[-1]
            zero = torch.zeros(())
            apart = (new - old[..., copies]).abs().max()
            difference[name] = torch.maximum(difference.get(name, zero), apart)
            largest[name] = torch.maximum(largest.get(name, zero), old.abs().max())
    return {name: float(difference[name] / largest[name]) for name in difference}


def _outputs(
    model: PreTrainedModel, batch: Batch, missing: Collection[str]
) -> list[tuple[str, Tensor]]:
    """(name, values without padding) of each output that the file's weights determine."""
    mask = batch["attention_mask"].bool()
    with torch.no_grad():
        outputs = {**model(**batch), **model.base_model(**batch)}
    found = []
    for name in sorted(outputs):
        value = outputs[name]
        parts = next((parts for end, parts in _READS.items() if name.endswith(end)), None)
        if parts is None or any(part in lacking for part in parts for lacking in missing):
            continue
        found.append((name, value[mask] if value.shape[:2] == mask.shape else value))
    return found


def _batch(ids: Tensor, config: BertConfig) -> Batch:
    """[B,S] ids with their mask and, where the model has them, two segments."""
    batch = {"input_ids": ids, "attention_mask": (ids != config.pad_token_id).long()}
    if config.type_vocab_size > 1:
        second = torch.arange(ids.shape[1]) >= ids.shape[1] // 2
        batch["token_type_ids"] = second.long().expand_as(ids).contiguous()
    return batch


def _text_batch(folder: Path, config: BertConfig) -> list[Batch]:
    """[TEXTS as one batch]; [] where the folder has no tokenizer, or that of another vocabulary."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.txt")):
        return []
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if tokenizer.pad_token_id != config.pad_token_id:
        return []
    encoded = tokenizer(
        list(TEXTS),
        padding=True,
        truncation=True,
        max_length=config.max_position_embeddings,
        padding_side="right",
        return_tensors="pt",
    )
    ids: Tensor = encoded["input_ids"]
    if int(ids.max()) >= config.vocab_size:
        return []
    return [_batch(ids, config)]
