"""data_prep.masking: BERT's proportions, and masks that depend on (seed, epoch, sample) alone."""

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.masking import (
    IGNORED,
    IntArray,
    MaskingPolicy,
    mask_tokens,
    restore_originals,
    splitmix64,
    static_mask_is_real,
)

SPECIAL = {"pad": 0, "unk": 7, "cls": 101, "sep": 102, "mask": 103}  # not contiguous, as in BERT's
VOCAB = 211
CONTINUES = np.arange(VOCAB) % 3 == 2


def _policy(
    max_predictions: int = 9, prob: float = 0.15, whole_word: bool = False
) -> MaskingPolicy:
    return MaskingPolicy(
        vocab_size=VOCAB,
        special_token_ids=SPECIAL,
        masked_lm_prob=prob,
        max_predictions_per_seq=max_predictions,
        is_continuation=CONTINUES if whole_word else None,
    )


def _rows(lengths: list[int], width: int, seed: int = 0) -> IntArray:
    """Rows [CLS] words [SEP] of the given real lengths, [B, width]."""
    ids = np.random.default_rng(seed).integers(104, VOCAB, (len(lengths), width))
    for row, length in zip(ids, lengths, strict=True):
        row[0], row[length - 1], row[length:] = SPECIAL["cls"], SPECIAL["sep"], SPECIAL["pad"]
    return ids


LENGTHS = st.lists(st.integers(3, 61), min_size=1, max_size=9)


@given(LENGTHS, st.integers(0, 1 << 62), st.booleans())
def test_masks_are_ascending_restorable_and_never_special(
    lengths: list[int], seed: int, whole_word: bool
) -> None:
    ids = _rows(lengths, 61)
    indices = np.arange(len(lengths)) + 1000
    policy = _policy(whole_word=whole_word)
    masked = mask_tokens(ids, policy, seed=seed, epoch=3, sample_indices=indices)
    is_real = masked.masked_lm_ids != IGNORED
    np.testing.assert_array_equal(is_real, static_mask_is_real(masked.masked_lm_positions))
    static = np.where(is_real, masked.masked_lm_ids, 0)
    restored = restore_originals(masked.input_ids, masked.masked_lm_positions, static)
    np.testing.assert_array_equal(restored, ids)
    for row, positions, real in zip(ids, masked.masked_lm_positions, is_real, strict=True):
        assert (np.diff(positions[real]) > 0).all()
        assert not np.isin(row[positions[real]], [0, 101, 102]).any()
    changed = masked.input_ids[masked.input_ids != ids]
    assert not np.isin(changed, [0, 7, 101, 102]).any()
    assert (masked.masked_lm_positions[~is_real] == 0).all()


@given(LENGTHS, st.booleans(), st.randoms(use_true_random=False))
def test_masks_do_not_depend_on_the_batch(
    lengths: list[int], whole_word: bool, shuffler: random.Random
) -> None:
    ids, policy = _rows(lengths, 61), _policy(whole_word=whole_word)
    indices = np.arange(len(lengths)) * 977
    epochs = np.arange(len(lengths)) % 2
    whole = mask_tokens(ids, policy, seed=5, epoch=epochs, sample_indices=indices)
    order = list(range(len(lengths)))
    shuffler.shuffle(order)
    for i in order:
        alone = mask_tokens(
            ids[[i]], policy, seed=5, epoch=int(epochs[i]), sample_indices=indices[[i]]
        )
        np.testing.assert_array_equal(alone.input_ids[0], whole.input_ids[i])
        np.testing.assert_array_equal(alone.masked_lm_positions[0], whole.masked_lm_positions[i])


@pytest.mark.parametrize("other", [{"seed": 2}, {"epoch": 1}, {"sample_indices": np.arange(1, 6)}])
def test_seed_epoch_and_sample_each_change_the_masks(other: dict[str, int]) -> None:
    ids = np.repeat(_rows([61], 61), 5, axis=0)
    base = {"seed": 1, "epoch": 0, "sample_indices": np.arange(5)}
    first = mask_tokens(ids, _policy(), **base)  # type: ignore[arg-type]
    second = mask_tokens(ids, _policy(), **(base | other))  # type: ignore[arg-type]
    assert (first.masked_lm_positions != second.masked_lm_positions).any(axis=1).all() or (
        "sample_indices" in other
        and (first.masked_lm_positions[1:] == second.masked_lm_positions[:-1]).all()
    )


@pytest.mark.parametrize(
    ("length", "expected"), [(3, 1), (4, 1), (10, 2), (17, 3), (40, 6), (61, 9), (70, 9)]
)
def test_count_follows_google_bert(length: int, expected: int) -> None:
    # round(0.15 * 10) = round(1.5) = 2: Python and numpy round half to even; at most P = 9.
    ids = _rows([length], 70)
    masked = mask_tokens(ids, _policy(9), seed=0, epoch=0, sample_indices=np.array([0]))
    assert (
        (masked.masked_lm_ids != IGNORED).sum() == expected == min(9, max(1, round(length * 0.15)))
    )


def test_row_without_candidates_has_no_masks() -> None:
    ids = np.array([[101, 102, 0, 0, 0]])
    masked = mask_tokens(ids, _policy(), seed=0, epoch=0, sample_indices=np.array([4]))
    np.testing.assert_array_equal(masked.input_ids, ids)
    assert (masked.masked_lm_ids == IGNORED).all()


def test_proportions_are_80_10_10_and_positions_uniform() -> None:
    ids = _rows([66] * 3000, 66)
    masked = mask_tokens(ids, _policy(10), seed=11, epoch=0, sample_indices=np.arange(3000))
    rows, slots = np.nonzero(masked.masked_lm_ids != IGNORED)
    positions = masked.masked_lm_positions[rows, slots]
    shown = masked.input_ids[rows, positions]
    originals = masked.masked_lm_ids[rows, slots]
    assert len(rows) == 30_000
    # Standard deviations are 0.0023 and 0.0017; a random id equals the original once in 206.
    assert abs(np.mean(shown == 103) - 0.8) < 0.01
    assert abs(np.mean(shown == originals) - (0.1 + 0.1 / 206)) < 0.008
    random_ids = shown[(shown != 103) & (shown != originals)]
    assert len(np.unique(random_ids)) == 206
    per_position = np.bincount(positions, minlength=66)[1:65]  # 469 expected at each of 64 places
    assert abs(per_position - 30_000 / 64).max() < 6 * np.sqrt(30_000 / 64)


def test_whole_words_are_masked_together() -> None:
    ids = _rows([61] * 40, 61, seed=3)
    masked = mask_tokens(
        ids, _policy(9, whole_word=True), seed=1, epoch=0, sample_indices=np.arange(40)
    )
    for row, positions, targets in zip(
        ids, masked.masked_lm_positions, masked.masked_lm_ids, strict=True
    ):
        chosen = set(positions[targets != IGNORED].tolist())
        for position in range(2, 60):
            if CONTINUES[row[position]]:
                assert (position in chosen) == (position - 1 in chosen)
    # Words here have 1.5 pieces on average; a skipped word leaves a place free now and then.
    assert 8.5 < (masked.masked_lm_ids != IGNORED).sum(axis=1).mean() <= 9


def test_static_sentinel_is_the_first_zero() -> None:
    positions = np.array([[3, 5, 0, 0], [0, 0, 0, 0], [1, 2, 4, 6]])
    assert static_mask_is_real(positions).sum(axis=1).tolist() == [2, 0, 4]
    ids = np.full((3, 7), 103)
    restored = restore_originals(ids, positions, np.arange(104, 116).reshape(3, 4))
    assert restored[0].tolist() == [103, 103, 103, 104, 103, 105, 103]
    assert restored[1].tolist() == [103] * 7


def test_splitmix64_equals_the_published_sequence() -> None:
    """First outputs for seed 1234567, the test values of Rosetta Code."""
    state = np.array([1234567], np.uint64)
    step = np.array([0x9E3779B97F4A7C15], np.uint64)
    got = [int(splitmix64(state + np.uint64(i) * step)[0]) for i in range(3)]
    assert got == [6457827717110365317, 3203168211198807973, 9817491932198370423]
