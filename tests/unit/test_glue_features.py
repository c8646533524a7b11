"""Rows of GLUE: by hand, against the tokenizers library, and what no length may break."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from squad_sets import CLS, ODD_WORDS, PAD, SEP, tokenizer
from tokenizers import Tokenizer, models
from tokenizers.processors import TemplateProcessing

from stacking.errors import ConfigError
from stacking.glue_data import GlueExample
from stacking.glue_features import (
    GlueBatch,
    GlueFeatures,
    glue_features,
    symmetric_swaps,
    truncated,
)
from stacking.glue_tasks import BY_NAME

TOKENIZER = tokenizer()
RTE, COLA, STS_B = BY_NAME["RTE"], BY_NAME["CoLA"], BY_NAME["STS-B"]
LAMP, MILL = "The lamp is lit at dusk", "the mill is large"  # 6 and 4 tokens

texts = st.lists(st.sampled_from(ODD_WORDS), max_size=9).map(" ".join)
pairs = st.lists(st.tuples(texts, texts), min_size=1, max_size=5)


def pair(first: str, second: str | None, label: float | None = 1.0) -> GlueExample:
    return GlueExample(0, first, second, label)


def rows(batch: GlueBatch) -> list[str]:
    """The tokens of each row, padding left out."""
    return [
        " ".join(str(TOKENIZER.id_to_token(one)) for one in ids[: mask.sum()])
        for ids, mask in zip(batch.input_ids.tolist(), batch.input_mask, strict=True)
    ]


def made(examples: list[tuple[str, str]], max_seq_length: int) -> GlueFeatures:
    return glue_features([pair(*one) for one in examples], RTE, TOKENIZER, max_seq_length)


def test_pairs_by_hand() -> None:
    batch = made([(LAMP, MILL), (MILL, "")], 12).batch([0, 1])
    assert rows(batch) == [
        "[CLS] the lamp is lit at [SEP] the mill is large [SEP]",
        "[CLS] the mill is large [SEP] [SEP]",
    ]
    assert batch.segment_ids[0].tolist() == [0] * 7 + [1] * 5
    assert batch.segment_ids[1].tolist() == [0] * 6 + [1] + [0] * 5
    assert batch.input_mask[1].tolist() == [1] * 7 + [0] * 5
    assert batch.input_ids[1, 7:].tolist() == [PAD] * 5
    assert batch.input_ids.dtype == np.int32
    assert batch.targets is not None
    assert batch.targets.tolist() == [1, 1]


def test_single_sentences_by_hand() -> None:
    features = glue_features([pair(LAMP, None), pair(MILL, None, 0)], COLA, TOKENIZER, 7)
    assert features.spans.shape == (2, 1, 2)
    assert rows(features.batch([1])) == ["[CLS] the mill is large [SEP]"]
    batch = features.batch([1, 0])
    assert rows(batch)[1] == "[CLS] the lamp is lit at [SEP]"
    assert not batch.segment_ids.any()
    assert batch.targets is not None
    assert batch.targets.dtype == np.float32
    assert batch.targets.tolist() == [0.0, 1.0]


def test_targets() -> None:
    scores = [pair("the", "mill", score) for score in (0.0, 3.0, 5.0)]
    found = glue_features(scores, STS_B, TOKENIZER, 9).targets
    assert found is not None
    assert found.tolist() == [-1.5, 0.0, 1.0]
    classes = made([(LAMP, MILL)], 12).targets
    assert classes is not None
    assert classes.dtype == np.int64
    test = glue_features([pair("the", "mill", None)], STS_B, TOKENIZER, 9)
    assert test.targets is None
    assert test.batch([0]).targets is None


@given(pairs, st.integers(5, 24))
def test_rows_are_the_tokenizers_own(examples: list[tuple[str, str]], max_seq_length: int) -> None:
    """Where nothing is cut."""
    library = Tokenizer.from_str(TOKENIZER.to_str())
    library.encode_special_tokens = True
    library.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)],
    )  # type: ignore[no-untyped-call, unused-ignore]
    features = made(examples, max_seq_length)
    for row, one in enumerate(examples):
        expected = library.encode(*one)
        batch = features.batch([row])
        if len(expected.ids) <= max_seq_length:
            assert batch.input_ids[0].tolist() == expected.ids
            assert batch.segment_ids[0].tolist() == expected.type_ids
        assert features.lengths()[row] == batch.input_mask.sum()


@given(pairs, st.integers(5, 24), st.integers(0, 9))
def test_truncation_never_exceeds_the_length_and_keeps_both(
    examples: list[tuple[str, str]], max_seq_length: int, seed: int
) -> None:
    features = made(examples, max_seq_length)
    swaps = symmetric_swaps(len(examples), np.random.default_rng(seed))
    for some in (features, features.swapped(swaps)):
        batch = some.batch(range(len(examples)))
        assert batch.input_ids.shape[1] == some.lengths().max() <= max_seq_length
        for row, spans in enumerate(some.spans):
            ids = batch.input_ids[row, : batch.input_mask[row].sum()].tolist()
            assert (ids[0], ids[-1], ids.count(SEP)) == (CLS, SEP, 2)
            kept = ids.index(SEP) - 1, len(ids) - ids.index(SEP) - 2
            for (begin, end), length in zip(spans, kept, strict=True):
                assert min(1, end - begin) <= length <= end - begin


@given(pairs, st.integers(5, 24), st.integers(0, 9))
def test_a_swap_is_an_involution(
    examples: list[tuple[str, str]], max_seq_length: int, seed: int
) -> None:
    features = made(examples, max_seq_length)
    swaps = symmetric_swaps(len(examples), np.random.default_rng(seed))
    once = features.swapped(swaps)
    assert np.array_equal(once.swapped(swaps).spans, features.spans)
    by_hand = [(b, a) if swap else (a, b) for (a, b), swap in zip(examples, swaps, strict=True)]
    expected = made(by_hand, max_seq_length).batch(range(len(examples)))
    found = once.batch(range(len(examples)))
    assert np.array_equal(found.input_ids, expected.input_ids)
    assert np.array_equal(found.segment_ids, expected.segment_ids)


def test_swaps_are_seeded_and_about_a_half() -> None:
    swaps = symmetric_swaps(4000, np.random.default_rng([7, 1]))
    assert 1800 < swaps.sum() < 2200
    assert np.array_equal(swaps, symmetric_swaps(4000, np.random.default_rng([7, 1])))
    assert not np.array_equal(swaps, symmetric_swaps(4000, np.random.default_rng([7, 2])))


def original(first: int, second: int, room: int) -> list[int]:
    """_truncate_seq_pair of the original BERT: a token at a time, of the longer one."""
    while first + second > room:
        if first > second:
            first -= 1
        else:
            second -= 1
    return [first, second]


@given(st.integers(0, 40), st.integers(0, 40), st.integers(2, 60))
def test_truncation_is_the_original_berts(first: int, second: int, room: int) -> None:
    assert truncated([first, second], room) == original(first, second, room)
    assert truncated([first], room) == [min(first, room)]


def test_a_length_without_room_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_seq_length: got 4; allowed: at least 5"):
        made([(LAMP, MILL)], 4)
    with pytest.raises(ConfigError, match="at least 3, a token of each sentence of CoLA and 2"):
        glue_features([pair(LAMP, None)], COLA, TOKENIZER, 2)


def test_a_tokenizer_without_special_tokens_is_refused() -> None:
    bare = Tokenizer(models.WordLevel({"a": 0, "[PAD]": 1}, unk_token="a"))
    with pytest.raises(ConfigError, match=r"no token \[CLS\]"):
        glue_features([pair("a", "a")], RTE, bare, 9)


def test_texts_that_spell_special_tokens_are_text() -> None:
    assert SEP not in made([("[SEP] the", "[PAD]")], 24).token_ids
