"""stacking.truncation: rows cut for a stage, against BERT's own loop; and what the loader does."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.masking import BoolArray, IntArray, MaskingPolicy, mask_tokens
from data_prep.shard_format import Manifest, ShardEntry, file_sha256, write_manifest
from stacking.config import BertConfig, DataConfig, Recipe, Stage
from stacking.dataset import (
    MaskedLMBatch,
    PretrainingLoader,
    check_compatible,
    open_shards,
    validation_batches,
)
from stacking.errors import ShardError
from stacking.truncation import SHORTEST_PAIR, cut_rows

PAD, CLS, SEP, VOCAB = 0, 2, 3, 60
SPECIAL = {"pad": PAD, "unk": 1, "cls": CLS, "sep": SEP, "mask": 4}


@dataclass(frozen=True)
class Row:
    """[CLS] A, a [SEP] or not, and for a pair B, a [SEP] or not."""

    a: tuple[int, ...]
    b: tuple[int, ...] | None
    sep_a: bool = True
    sep_b: bool = True

    @property
    def parts(self) -> tuple[list[int], list[int]]:
        """Token ids of both segments, special ones included."""
        first = [CLS, *self.a, *[SEP] * self.sep_a]
        return first, [] if self.b is None else [*self.b, *[SEP] * self.sep_b]


def reference(row: Row, length: int) -> tuple[list[int], list[int]]:
    """Ids and segments of the row in at most `length` tokens, by BERT's loop, token by token."""
    first, second = row.parts
    if len(first) + len(second) <= length:
        return first + second, [0] * len(first) + [1] * len(second)
    if row.b is None:
        kept = first[:length]
        if first[-1] == SEP:
            kept[-1] = SEP
        return kept, [0] * length
    tokens_a, tokens_b = list(row.a), list(row.b)
    # google-research/bert, run_classifier.py, _truncate_seq_pair
    while len(tokens_a) + len(tokens_b) > length - 1 - row.sep_a - row.sep_b:
        if len(tokens_a) > len(tokens_b):
            tokens_a.pop()
        else:
            tokens_b.pop()
    cut = Row(tuple(tokens_a), tuple(tokens_b), row.sep_a, row.sep_b)
    first, second = cut.parts
    return first + second, [0] * len(first) + [1] * len(second)


Arrays = tuple[IntArray, IntArray, BoolArray]


def arrays(rows: list[tuple[list[int], list[int]]], width: int) -> Arrays:
    """Padded ids, segments and attention, each [B, width]."""
    ids, segments = np.zeros((2, len(rows), width), np.int64)
    attention = np.zeros((len(rows), width), np.bool_)
    for index, (tokens, kinds) in enumerate(rows):
        ids[index, : len(tokens)], segments[index, : len(tokens)] = tokens, kinds
        attention[index, : len(tokens)] = True
    return ids, segments, attention


words = st.integers(5, VOCAB - 1)
texts = st.lists(words, min_size=1, max_size=13).map(tuple)
packed = st.lists(words | st.just(SEP), min_size=1, max_size=27).map(tuple)
pairs = st.builds(Row, texts, texts, st.booleans(), st.booleans())
documents = st.builds(Row, packed, st.none(), st.booleans())


@settings(deadline=None, max_examples=300)
@given(rows=st.lists(pairs | documents, min_size=1, max_size=6), length=st.integers(5, 31))
def test_rows_are_cut_as_berts_own_loop_cuts_them(rows: list[Row], length: int) -> None:
    whole = arrays([reference(row, 99) for row in rows], 31)
    before = [part.copy() for part in whole]
    cut = cut_rows(*whole, max_seq_length=length, sep_id=SEP)
    wanted = arrays([reference(row, length) for row in rows], length)
    for part, expected in zip(cut, wanted, strict=True):
        np.testing.assert_array_equal(part, expected)
    for part, expected in zip(whole, before, strict=True):
        np.testing.assert_array_equal(part, expected)


@settings(deadline=None)
@given(rows=st.lists(pairs, min_size=1, max_size=6), length=st.integers(SHORTEST_PAIR, 31))
def test_both_texts_of_a_pair_keep_a_token(rows: list[Row], length: int) -> None:
    whole = arrays([reference(row, 99) for row in rows], 31)
    ids, segments, attention = cut_rows(*whole, max_seq_length=length, sep_id=SEP)
    is_word = attention & (ids > SEP)
    assert np.all((is_word & (segments == 0)).any(axis=1))
    assert np.all((is_word & (segments == 1)).any(axis=1))
    assert np.all(ids[:, 0] == CLS)


def test_a_row_that_fits_is_untouched_even_in_its_padding() -> None:
    ids = np.array([[CLS, 9, SEP, 0, 0, 0], [CLS, 8, 7, SEP, 0, 0], [CLS, 5, 6, 7, 8, SEP]])
    segments = np.array([[0, 0, 0, 1, 1, 1], [0, 1, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0]])
    cut = cut_rows(ids, segments, ids != PAD, max_seq_length=4, sep_id=SEP)
    assert cut[0].tolist() == [[CLS, 9, SEP, 0], [CLS, 8, 7, SEP], [CLS, 5, 6, SEP]]
    assert cut[1].tolist() == [[0, 0, 0, 1], [0, 1, 0, 1], [0, 0, 0, 0]]
    assert cut[2].tolist() == [[True] * 3 + [False], [True] * 4, [True] * 4]


# ---- The loader ----

LENGTH, SHORT, SEED = 17, 8, 9
DATA = DataConfig(max_seq_length=LENGTH, max_predictions_per_seq=3)
STAGE = DATA.model_copy(update={"max_seq_length": SHORT})


def some_rows(with_pairs: bool) -> list[Row]:
    """Rows of 4 to 17 tokens; the second token tells the row."""
    generator = np.random.default_rng(3)
    rows = []
    for index in range(19):
        sizes = generator.integers(1, 8, 2)
        a, b = (tuple(generator.integers(5, VOCAB, n).tolist()) for n in sizes)
        a = (index + 10, *a[1:])
        rows.append(Row(a, b) if with_pairs else Row((*a, SEP, *b), None))
    return rows


def folder(path: Path, *, with_pairs: bool = True, static: bool = False) -> Path:
    """Write the rows as both splits."""
    path.mkdir()
    rows = some_rows(with_pairs)
    ids, segments, attention = arrays([reference(row, 99) for row in rows], LENGTH)
    fields: dict[str, np.ndarray[tuple[int, ...], np.dtype[np.generic]]]
    fields = {"input_ids": ids.astype("u2"), "segment_ids": segments.astype("i1")}
    if static:
        policy = MaskingPolicy(
            vocab_size=VOCAB, special_token_ids=SPECIAL, max_predictions_per_seq=3
        )
        masked = mask_tokens(ids, policy, seed=5, epoch=0, sample_indices=np.arange(len(rows)))
        fields |= {"input_ids": masked.input_ids, "input_mask": attention.astype("i1")}
        fields["masked_lm_positions"] = masked.masked_lm_positions
        fields["masked_lm_ids"] = np.maximum(masked.masked_lm_ids, 0)
    if with_pairs:
        fields["next_sentence_labels"] = (np.arange(len(rows)) % 2).astype("i1")
    for split in ("training", "validation"):
        with h5py.File(path / f"{split}_00000.hdf5", "w") as file:
            for name, array in fields.items():
                file.create_dataset(name, data=array)
    write_manifest(
        path,
        Manifest(
            format_version=1,
            dialect="nvidia" if static else "unmasked",
            max_seq_length=LENGTH,
            max_predictions_per_seq=3 if static else 0,
            vocab_size=VOCAB,
            tokenizer_sha256="ab",
            special_token_ids=SPECIAL,
            has_next_sentence_labels=with_pairs,
            seed=1,
            num_documents={},
            training=_entries(path, "training", len(rows)),
            validation=_entries(path, "validation", len(rows)),
        ),
    )
    return path


def _entries(path: Path, split: str, rows: int) -> tuple[ShardEntry, ...]:
    file = path / f"{split}_00000.hdf5"
    return (ShardEntry(file.name, rows, file_sha256(file)),)


def loader(
    path: Path, data: DataConfig = STAGE, micro: int = 8, rank: int = 0, world: int = 1
) -> PretrainingLoader:
    return PretrainingLoader(
        open_shards(path, "training"),
        data,
        seed=SEED,
        global_batch_size=8,
        micro_batch_size=micro,
        rank=rank,
        world_size=world,
    )


def batches(*args: object, steps: int = 5, **kwargs: object) -> Iterator[MaskedLMBatch]:
    with loader(*args, **kwargs) as made:  # type: ignore[arg-type]
        for _ in range(steps):
            yield from next(made)


def originals(batch: MaskedLMBatch) -> torch.Tensor:
    """[B, S] ids without masks."""
    ids = batch.input_ids.clone()
    rows, slots = torch.nonzero(batch.masked_lm_ids != -100, as_tuple=True)
    ids[rows, batch.masked_lm_positions[rows, slots]] = batch.masked_lm_ids[rows, slots]
    return ids


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("with_pairs", [False, True])
def test_batches_hold_cut_rows_and_masks_within_them(
    tmp_path: Path, static: bool, with_pairs: bool
) -> None:
    path = folder(tmp_path / "d", static=static, with_pairs=with_pairs)
    wanted = [reference(row, SHORT) for row in some_rows(with_pairs)]
    validation = validation_batches(
        open_shards(path, "validation"), STAGE, seed=SEED, max_sequences=19, batch_size=19
    )
    for batch in [*batches(path), *validation]:
        rows = batch.sample_indices
        ids, segments, attention = arrays([wanted[row] for row in rows], SHORT)
        assert torch.equal(originals(batch), torch.from_numpy(ids))
        assert torch.equal(batch.token_type_ids, torch.from_numpy(segments))
        assert torch.equal(batch.attention_mask, torch.from_numpy(attention))
        assert batch.num_real_tokens == attention.sum()
        assert not set(batch.masked_lm_ids.flatten().tolist()) & {PAD, CLS, SEP}
        assert batch.num_masked == (batch.masked_lm_ids != -100).sum() >= len(rows)
        if with_pairs:
            assert batch.next_sentence_labels is not None
            assert batch.next_sentence_labels.tolist() == (rows % 2).tolist()
        else:
            assert batch.next_sentence_labels is None


def test_masks_do_not_depend_on_ranks_nor_the_order_on_the_length(
    tmp_path: Path,
) -> None:
    path = folder(tmp_path / "d")
    one = list(batches(path))
    shares = [list(batches(path, micro=2, rank=rank, world=2)) for rank in range(2)]
    for step, batch in enumerate(one):
        parts = [part for share in shares for part in share[2 * step : 2 * step + 2]]
        for name in ("input_ids", "masked_lm_positions", "masked_lm_ids", "attention_mask"):
            assert torch.equal(getattr(batch, name), torch.cat([getattr(p, name) for p in parts]))
    whole = list(batches(path, DATA))
    for cut, full in zip(one, whole, strict=True):
        assert cut.sample_indices.tolist() == full.sample_indices.tolist()
        assert (cut.input_ids.shape[1], full.input_ids.shape[1]) == (SHORT, LENGTH)
    hashes = [
        [made.sample_hash(step) for step in range(9)] for made in (loader(path), loader(path, DATA))
    ]
    assert hashes[0] == hashes[1]


# ---- What is allowed ----

MODEL = BertConfig(vocab_size=VOCAB, max_position_embeddings=LENGTH)


def test_a_recipe_has_the_shards_length_and_its_stages_may_have_less(tmp_path: Path) -> None:
    shards = open_shards(folder(tmp_path / "d"), "training")
    recipe = Recipe(
        name="short first",
        model=MODEL,
        data=DATA,
        stages=(Stage(num_hidden_layers=2, steps=1, max_seq_length=SHORT),
                Stage(num_hidden_layers=12, steps=1)),
    )  # fmt: skip
    check_compatible(shards, recipe.model, recipe.data)
    for stage in range(2):
        check_compatible(shards, recipe.stage_model(stage), recipe.stage_data(stage), may_cut=True)
    with pytest.raises(ShardError, match=r"set it to 17; single stages may be shorter: set stages"):
        check_compatible(shards, MODEL, STAGE)
    longer = DATA.model_copy(update={"max_seq_length": LENGTH + 1})
    with pytest.raises(
        ShardError, match=r"have 17 tokens, data.max_seq_length is 18; set it to 17$"
    ):
        check_compatible(
            shards, MODEL.model_copy(update={"max_position_embeddings": 18}), longer, may_cut=True
        )
    model = MODEL.model_copy(update={"max_position_embeddings": 7})
    with pytest.raises(ShardError, match="exceeds model.max_position_embeddings 7"):
        check_compatible(shards, model, STAGE, may_cut=True)


def test_what_cannot_be_cut_is_refused(tmp_path: Path) -> None:
    tiny = DATA.model_copy(update={"max_seq_length": 4, "max_predictions_per_seq": 1})
    path = folder(tmp_path / "d")
    with pytest.raises(ShardError, match="cannot be cut to 4 tokens; give max_seq_length 5 or"):
        loader(path, tiny)
    alone = folder(tmp_path / "e", with_pairs=False)
    assert next(batches(alone, tiny)).input_ids.shape == (8, 4)
    static = STAGE.model_copy(update={"masking": "static"})
    with pytest.raises(ShardError, match="17 tokens cannot be cut to 8 with data.masking"):
        loader(folder(tmp_path / "f", static=True), static)
