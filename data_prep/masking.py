"""Token ids in, masked ids and targets out: BERT's 80/10/10 as a pure function of (seed, epoch,
sample, position).

Every random number is a 64-bit hash of those four, so a row's masks never depend on the batch, rank
or file it is read in. Shapes: B rows, S tokens, P masked positions, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]
HashArray = npt.NDArray[np.uint64]

IGNORED = -100  # torch's cross_entropy ignore_index: the padding of masked_lm_ids
MASK_SHARE = 0.8  # Devlin et al. 2019, section 3.1: 80 % [MASK], 10 % random, 10 % kept
RANDOM_SHARE = 0.1

# splitmix64 (Steele, Lea and Flood 2014): the Weyl increment and the two multipliers of its
# finaliser.
_WEYL = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLY_1 = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLY_2 = np.uint64(0x94D049BB133111EB)
# Arbitrary distinct constants: three independent random numbers of one position.
_KIND_STREAM = np.uint64(0xA5A5A5A5A5A5A5A5)
_TOKEN_STREAM = np.uint64(0x5A5A5A5A5A5A5A5A)
_NEVER = np.uint64(0xFFFFFFFFFFFFFFFF)


@dataclass(frozen=True, kw_only=True, eq=False)
class MaskingPolicy:
    """What may be masked, how much of it and with what."""

    vocab_size: int
    special_token_ids: Mapping[str, int]
    masked_lm_prob: float = 0.15
    max_predictions_per_seq: int = 20
    is_continuation: BoolArray | None = None
    """[V], true for "##" pieces: whole words are masked together. None: pieces are masked alone."""

    @cached_property
    def ordinary_ids(self) -> IntArray:
        """Ids that may stand in for a token: all but the special ones."""
        special = np.array(sorted(self.special_token_ids.values()), dtype=np.int64)
        return np.setdiff1d(np.arange(self.vocab_size, dtype=np.int64), special)


@dataclass(frozen=True, eq=False)
class MaskedTokens:
    """Masked rows: input_ids [B, S], ascending positions [B, P] (0-padded), original ids [B, P]
    (-100-padded).
    """

    input_ids: IntArray
    masked_lm_positions: IntArray
    masked_lm_ids: IntArray


def mask_tokens(
    input_ids: IntArray,
    policy: MaskingPolicy,
    *,
    seed: int,
    epoch: int | IntArray,
    sample_indices: IntArray,
) -> MaskedTokens:
    """Mask rows [B, S]; `sample_indices` [B] and `epoch` (one, or one a row) name the row for the
    hash.
    """
    keys = _position_keys(seed, epoch, sample_indices, input_ids.shape[1])  # [B, S]
    special = policy.special_token_ids
    is_candidate = (
        (input_ids != special["pad"])
        & (input_ids != special["cls"])
        & (input_ids != special["sep"])
    )
    counts = _num_to_predict(input_ids, is_candidate, policy)  # [B]
    if policy.is_continuation is None:
        chosen = _choose_tokens(keys, is_candidate, counts)
    else:
        chosen = _choose_words(keys, is_candidate, counts, policy.is_continuation[input_ids])
    rows, columns = np.nonzero(chosen)  # row-major: positions ascend within a row
    first_of_row = np.concatenate([[0], np.cumsum(chosen.sum(axis=1))])[:-1]
    slots = np.arange(rows.size) - first_of_row[rows]
    originals = input_ids[rows, columns]
    shape = (input_ids.shape[0], policy.max_predictions_per_seq)
    positions, ids = np.zeros(shape, np.int64), np.full(shape, IGNORED, np.int64)
    positions[rows, slots], ids[rows, slots] = columns, originals
    masked = input_ids.copy()
    masked[rows, columns] = _replacements(keys[rows, columns], originals, policy)
    return MaskedTokens(masked, positions, ids)


def static_mask_is_real(positions: IntArray) -> BoolArray:
    """Say which of NVIDIA's static masked_lm_positions [B, P] are real: those before the first 0
    (always [CLS]).
    """
    return np.logical_and.accumulate(positions != 0, axis=1)


def restore_originals(input_ids: IntArray, positions: IntArray, ids: IntArray) -> IntArray:
    """Undo static masks: put `ids` [B, P] back at `positions` [B, P] of the masked rows [B, S]."""
    rows, slots = np.nonzero(static_mask_is_real(positions))
    restored = input_ids.copy()
    restored[rows, positions[rows, slots]] = ids[rows, slots]
    return restored


def splitmix64(values: HashArray) -> HashArray:
    """Hash 64-bit numbers to 64 well-mixed bits, element by element."""
    mixed = values + _WEYL
    shifted = mixed >> np.uint64(30)
    mixed ^= shifted
    mixed *= _MULTIPLY_1
    np.right_shift(mixed, np.uint64(27), out=shifted)
    mixed ^= shifted
    mixed *= _MULTIPLY_2
    np.right_shift(mixed, np.uint64(31), out=shifted)
    mixed ^= shifted
    return mixed


def hash_chain(*parts: int | IntArray) -> HashArray:
    """Hash a tuple of integers (arrays are broadcast) to 64 bits: h(...h(h(a) ^ b)... ^ z), at
    least 1-d.
    """
    state: HashArray = np.zeros(1, np.uint64)
    for part in parts:
        # At least 1-d: numpy warns about the wanted overflow of 0-d arrays only.
        state = splitmix64(state ^ np.atleast_1d(np.asarray(part, np.int64)).astype(np.uint64))
    return state


def _position_keys(
    seed: int, epoch: int | IntArray, sample_indices: IntArray, length: int
) -> HashArray:
    """One hash a position, [B, S]: splitmix64's own sequence started at the row's hash."""
    row = hash_chain(seed, epoch, sample_indices)
    return splitmix64(row[:, None] + np.arange(length, dtype=np.uint64)[None, :] * _WEYL)


def _num_to_predict(
    input_ids: IntArray, is_candidate: BoolArray, policy: MaskingPolicy
) -> IntArray:
    """min(P, max(1, round(prob * length))), length counting [CLS] and [SEP], as Google's BERT does;
    never above the candidates.
    """
    length = (input_ids != policy.special_token_ids["pad"]).sum(axis=1)
    wanted = np.maximum(1, np.rint(length * policy.masked_lm_prob).astype(np.int64))
    most = np.minimum(policy.max_predictions_per_seq, is_candidate.sum(axis=1))
    return np.asarray(np.minimum(wanted, most), np.int64)


def _choose_tokens(keys: HashArray, is_candidate: BoolArray, counts: IntArray) -> BoolArray:
    """Choose the `counts` candidates with the smallest keys in each row; [B, S]."""
    # Sorted values, not their order: numpy sorts 64-bit numbers with vector instructions.
    ascending = np.sort(np.where(is_candidate, keys, _NEVER), axis=1)
    last = np.take_along_axis(ascending, np.maximum(counts - 1, 0)[:, None], axis=1)  # [B, 1]
    return is_candidate & (keys <= last) & (counts > 0)[:, None]


def _choose_words(
    keys: HashArray, is_candidate: BoolArray, counts: IntArray, continues: BoolArray
) -> BoolArray:
    """Choose words in the order of their first piece's key, skipping any that would exceed `counts`
    (BERT's rule); [B, S].
    """
    num_rows, length = keys.shape
    previous = np.zeros_like(is_candidate)
    previous[:, 1:] = is_candidate[:, :-1]
    is_start = is_candidate & ~(continues & previous)
    start_of = np.maximum.accumulate(np.where(is_start, np.arange(length), 0), axis=1)  # [B, S]
    rows, columns = np.nonzero(is_candidate)
    word_length = np.zeros((num_rows, length), np.int64)
    np.add.at(word_length, (rows, start_of[rows, columns]), 1)
    order = np.argsort(np.where(is_start, keys, _NEVER), axis=1)
    is_taken = np.zeros((num_rows, length), np.bool_)
    filled = np.zeros(num_rows, np.int64)
    every_row = np.arange(num_rows)
    for rank in range(int(is_start.sum(axis=1).max(initial=0))):
        start = order[:, rank]
        size = word_length[every_row, start]
        fits = (size > 0) & (filled + size <= counts)
        is_taken[every_row[fits], start[fits]] = True
        filled += np.where(fits, size, 0)
        if np.all(filled >= counts):
            break
    return is_candidate & np.take_along_axis(is_taken, start_of, axis=1)


def _replacements(keys: HashArray, originals: IntArray, policy: MaskingPolicy) -> IntArray:
    """What stands at the chosen positions: [MASK], a random ordinary id, or the original; all flat
    [num_masked].
    """
    # The top 53 bits as a float in [0, 1).
    kind = (splitmix64(keys ^ _KIND_STREAM) >> np.uint64(11)) * 2.0**-53
    ordinary = policy.ordinary_ids
    # Modulo bias is below V / 2^64.
    random = ordinary[
        (splitmix64(keys ^ _TOKEN_STREAM) % np.uint64(ordinary.size)).astype(np.int64)
    ]
    replaced = np.where(kind < MASK_SHARE + RANDOM_SHARE, random, originals)
    return np.where(kind < MASK_SHARE, policy.special_token_ids["mask"], replaced)
