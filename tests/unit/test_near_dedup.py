"""near_dedup: near copies are found, the first of a group stays, others are let alone."""

import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data_prep.cleaning import near_dedup
from data_prep.cleaning.near_dedup import NearDuplicates, Signatures, signatures
from data_prep.errors import DataError

pytest.importorskip("datasketch", reason="near-duplicates need the package datasketch")

PERM = 64


def _texts(count: int, words: int = 120) -> list[str]:
    source = random.Random(4)
    vocabulary = [f"w{number}" for number in range(2000)]
    return [" ".join(source.choices(vocabulary, k=words)) for _ in range(count)]


def _changed(text: str, num_words: int, seed: int) -> str:
    source = random.Random(seed)
    words = text.split(" ")
    for index in source.sample(range(len(words)), num_words):
        words[index] = f"new{source.random()}"
    return " ".join(words)


def _flags(
    folder: Path, sketches: Signatures, threshold: float, block: int = 7, max_bytes: int = 1 << 20
) -> list[bool]:
    near = NearDuplicates(folder, threshold, sketches.shape[1], max_bytes)
    blocks = [sketches[start : start + block] for start in range(0, len(sketches), block)]
    for rows in blocks:
        near.add(rows)
    found = list(near.duplicates())
    assert [len(flags) for flags in found] == [len(rows) for rows in blocks]
    assert not folder.exists()
    return [bool(flag) for flags in found for flag in flags]


def test_signatures_estimate_the_share_of_common_word_runs() -> None:
    text = _texts(1, 400)[0]
    copy = _changed(text, 8, 1)

    def runs(of: str) -> set[tuple[str, ...]]:
        words = of.split(" ")
        return {tuple(words[i : i + 5]) for i in range(len(words) - 4)}

    share = len(runs(text) & runs(copy)) / len(runs(text) | runs(copy))
    one, two = signatures([text, copy], 512)
    assert abs(float((one == two).mean()) - share) < 0.07


def test_signatures_ignore_case_and_line_ends_and_tell_short_texts_apart() -> None:
    rows = signatures(["A b\nc d e f", "a B c D e f", "a b", "a b c", "", "a"], PERM)
    assert (rows[0] == rows[1]).all()
    assert len({row.tobytes() for row in rows}) == 5
    assert signatures([], PERM).shape == (0, PERM)


def test_signatures_of_long_texts_do_not_depend_on_the_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    texts = _texts(2, 50)
    whole = signatures(texts, PERM)
    monkeypatch.setattr(near_dedup, "_SHINGLES_A_BATCH", 7)
    assert np.array_equal(signatures(texts, PERM), whole)


def test_signatures_are_the_same_in_another_process() -> None:
    code = (
        "from data_prep.cleaning.near_dedup import signatures; "
        "print(signatures(['one two three four five six'], 4).tolist())"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONHASHSEED": "9"},
        cwd=Path(near_dedup.__file__).parents[1],
    )
    assert run.stdout.strip() == str(signatures(["one two three four five six"], 4).tolist())


@pytest.mark.parametrize("max_bytes", [2_000, 1 << 20])
def test_near_copies_are_flagged_and_first_ones_kept(tmp_path: Path, max_bytes: int) -> None:
    texts = _texts(60)
    copies = [_changed(texts[index], 1, index) for index in range(0, 60, 3)]
    sketches = signatures([*texts, *copies], PERM)
    flags = _flags(tmp_path / "own", sketches, 0.7, max_bytes=max_bytes)
    assert not any(flags[:60])
    assert sum(flags[60:]) == 20


def test_flags_do_not_depend_on_blocks_or_memory(tmp_path: Path) -> None:
    texts = _texts(20)
    texts += [_changed(text, 3, 8) for text in texts]
    sketches = signatures(texts, PERM)
    reference = _flags(tmp_path / "own", sketches, 0.6, block=40)
    assert 0 < sum(reference) < 21
    assert _flags(tmp_path / "own", sketches, 0.6, block=1) == reference
    assert _flags(tmp_path / "own", sketches, 0.6, block=9, max_bytes=2_000) == reference


def _rows(*differences: range) -> Signatures:
    """A row of ones for each range, other numbers at the range's places."""
    rows = np.ones((len(differences), PERM), np.uint32)
    for index, places in enumerate(differences):
        rows[index, list(places)] = 100 + index
    return rows


def test_the_threshold_is_a_share_of_equal_places(tmp_path: Path) -> None:
    rows = _rows(range(0), range(16))
    assert _flags(tmp_path / "own", rows, 0.75) == [False, True]
    assert _flags(tmp_path / "own", rows, 0.76) == [False, False]


def test_a_chain_of_near_copies_is_one_group(tmp_path: Path) -> None:
    # The second is alike with both others, which are not alike.
    rows = _rows(range(0, 16), range(0), range(48, 64))
    assert _flags(tmp_path / "own", rows, 0.7) == [False, True, True]
    assert _flags(tmp_path / "own", rows[[0, 2]], 0.7) == [False, False]


def test_copies_in_the_shadow_of_an_unlike_document_are_found(tmp_path: Path) -> None:
    # All share a band with the first, which is unlike them.
    rows = np.full((5, PERM), 5, np.uint32)
    rows[0, 16:] = 6
    rows[4] = 9
    assert _flags(tmp_path / "own", rows, 0.6) == [False, False, True, True, False]


def test_copies_in_the_shadow_of_others_in_every_band_are_found(tmp_path: Path) -> None:
    # Each band of the last two is also that of an earlier document, unlike in its other bands.
    probe = NearDuplicates(tmp_path / "probe", 0.6, PERM)
    probe.add(_rows(range(0)))
    bands = probe._band_ends
    probe.close()
    rows = np.full((len(bands) + 2, PERM), 5, np.uint32)
    for index, (start, end) in enumerate(bands):
        rows[index] = 100 + index
        rows[index, start:end] = 5
    flags = _flags(tmp_path / "own", rows, 0.6, block=99)
    assert flags == [False] * (len(bands) + 1) + [True]


def test_threshold_one_finds_equal_signatures(tmp_path: Path) -> None:
    rows = _rows(range(0), range(1), range(0))
    assert _flags(tmp_path / "own", rows, 1.0) == [False, False, True]


def test_groups_that_meet_late_become_one() -> None:
    parents = np.arange(7)
    near_dedup._unite(parents, np.array([[5, 6], [3, 4], [1, 2]]))
    near_dedup._unite(parents, np.array([[4, 6], [6, 2]]))
    assert parents.tolist() == [0, 1, 1, 1, 1, 1, 1]


def test_unused_it_does_nothing(tmp_path: Path) -> None:
    assert list(NearDuplicates(tmp_path / "own", 1.0, PERM).duplicates()) == []
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(DataError, match="need the package datasketch"):
        signatures(["a"], PERM)
    with pytest.raises(DataError, match="need the package datasketch"):
        NearDuplicates(tmp_path, 0.8, PERM).add(_rows(range(0)))
