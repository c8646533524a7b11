"""convert: shards of any lineage become ours with text and labels intact, and a wrong
vocabulary is refused.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import numpy.typing as npt
import pytest

from data_prep import isolated
from data_prep.errors import DataError, ShardError
from data_prep.foreign import dialects
from data_prep.foreign import rows as foreign_rows
from data_prep.foreign.convert import ConvertSettings, convert_folder
from data_prep.foreign.dialects import inspect_foreign, read_rows
from data_prep.foreign.rows import fit_rows
from data_prep.progress import Advance, Steps
from data_prep.shard_check import check_folder
from data_prep.shard_format import load_token_counts
from data_prep.tokens.tokenizer import from_tokens

Sequence = tuple[list[int], list[int], list[int], list[int], int]
Make = Callable[[int, int], list[Sequence]]
Write = Callable[[Path, str, list[Sequence]], Path]
Arrays = dict[str, npt.NDArray[np.int64]]
DIALECTS = ["nvidia", "academic-budget-bert", "mlperf", "mlperf-varlength", "mlperf-packed"]


@pytest.fixture
def settings(tmp_path: Path, foreign_vocabulary: list[str]) -> ConvertSettings:
    """Settings for `foreign` -> `out`, with the vocabulary of the sequences."""
    from_tokens(foreign_vocabulary).save(tmp_path / "vocabulary")
    return ConvertSettings(
        inputs=(tmp_path / "foreign",),
        out=tmp_path / "out",
        tokenizer=tmp_path / "vocabulary",
        rows_per_shard=30,
    )


def _write_folder(
    settings: ConvertSettings, make: Make, write: Write, dialect: str
) -> tuple[list[Sequence], list[Sequence]]:
    """Write two training files and a test file; return the sequences of both splits."""
    first, second, held_out = make(41, 1), make(36, 2), make(9, 3)
    folder = settings.inputs[0]
    write(folder / "train/part_2.hdf5", dialect, first)
    write(folder / "train/part_10.hdf5", dialect, second)
    write(folder / "eval/eval_all.hdf5", dialect, held_out)
    return first + second, held_out


def _read(out: Path, split: str) -> Arrays:
    parts: dict[str, list[npt.NDArray[np.int64]]] = {}
    for path in sorted(out.glob(f"{split}_*.hdf5")):
        with h5py.File(path) as file:
            for name in file:
                parts.setdefault(name, []).append(file[name][:].astype(np.int64))
    return {name: np.concatenate(arrays) for name, arrays in parts.items()}


def _originals(sequence: Sequence) -> list[int]:
    ids = list(sequence[0])
    for at, token in zip(sequence[2], sequence[3], strict=True):
        ids[at] = token
    return ids


def _texts(arrays: Arrays) -> list[tuple[int, ...]]:
    """Rows without padding."""
    return [tuple(int(token) for token in row if token) for row in arrays["input_ids"]]


@pytest.mark.parametrize("dialect", DIALECTS)
def test_originals_are_restored_from_every_dialect(
    settings: ConvertSettings, make_sequences: Make, write_foreign: Write, dialect: str
) -> None:
    training, held_out = _write_folder(settings, make_sequences, write_foreign, dialect)
    manifest = convert_folder(replace(settings, keep_order=True))
    arrays = _read(settings.out, "training")
    assert _texts(arrays) == [tuple(_originals(one)) for one in training]
    assert _texts(_read(settings.out, "validation")) == [tuple(_originals(o)) for o in held_out]
    for row, sequence in zip(arrays["segment_ids"], training, strict=True):
        assert row.tolist() == sequence[1] + [0] * (len(row) - len(sequence[1]))
    assert [entry.rows for entry in manifest.training] == [26, 26, 25]
    assert manifest.has_next_sentence_labels == (dialect != "academic-budget-bert")
    if manifest.has_next_sentence_labels:
        assert arrays["next_sentence_labels"].tolist() == [one[4] for one in training]
    assert check_folder(settings.out) == []


@pytest.mark.parametrize("dialect", DIALECTS)
def test_static_masks_are_kept_as_they_are(
    settings: ConvertSettings, make_sequences: Make, write_foreign: Write, dialect: str
) -> None:
    training, _ = _write_folder(settings, make_sequences, write_foreign, dialect)
    manifest = convert_folder(replace(settings, keep_order=True, dialect="nvidia"))
    assert manifest.dialect == "nvidia"
    found = []
    for path in sorted(settings.out.glob("training_*.hdf5")):
        with h5py.File(path) as file:
            types = {name: (file[name].dtype.str, file[name].compression) for name in file}
        assert types["input_ids"] == types["masked_lm_positions"] == ("<i4", "gzip")
        assert types["input_mask"] == types["next_sentence_labels"] == ("|i1", "gzip")
        for block in read_rows(inspect_foreign(path)):
            assert block.num_tokens is not None
            for row in range(len(block.rows)):
                tokens, masks = int(block.num_tokens[row]), int(block.num_masked[row])
                found.append(
                    (
                        block.input_ids[row, :tokens].tolist(),
                        block.segment_ids[row, :tokens].tolist(),
                        block.positions[row, :masks].tolist(),
                        block.masked_ids[row, :masks].tolist(),
                    )
                )
    assert found == [one[:4] for one in training]
    assert check_folder(settings.out) == []


def test_masks_are_drawn_anew_over_the_originals(
    settings: ConvertSettings, make_sequences: Make, write_foreign: Write
) -> None:
    _write_folder(settings, make_sequences, write_foreign, "nvidia")
    kept = replace(settings, keep_order=True, dialect="nvidia")
    convert_folder(kept)
    drawn = replace(kept, out=settings.out.parent / "b", remask=True, max_predictions_per_seq=3)
    manifest = convert_folder(drawn)
    assert manifest.max_predictions_per_seq == 3
    before, after = (
        next(read_rows(inspect_foreign(folder / "training_00000.hdf5")))
        for folder in (kept.out, drawn.out)
    )
    np.testing.assert_array_equal(before.restored(), after.restored())
    assert not np.array_equal(before.input_ids, after.input_ids)
    assert check_folder(drawn.out) == []


def test_shuffle_is_a_permutation_that_the_seed_and_nothing_else_decides(
    settings: ConvertSettings,
    make_sequences: Make,
    write_foreign: Write,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    training, _ = _write_folder(settings, make_sequences, write_foreign, "nvidia")
    convert_folder(settings)
    shuffled = _texts(_read(settings.out, "training"))
    expected = [tuple(_originals(one)) for one in training]
    assert shuffled != expected
    assert sorted(shuffled) == sorted(expected)
    other = settings.out.parent
    convert_folder(replace(settings, out=other / "seed", seed=2))
    assert _texts(_read(other / "seed", "training")) != shuffled
    monkeypatch.setattr(dialects, "_TOKENS_AT_ONCE", 100)
    monkeypatch.setattr("data_prep.foreign.row_spool._BUCKET_BYTES", 500)
    convert_folder(replace(settings, out=other / "blocks"))
    for path in settings.out.iterdir():
        assert (other / "blocks" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("labels", "is_inverted"), [("nvidia", 0), ("stackingbert", 1), ("megatron", 0)]
)
def test_label_polarity_is_converted_to_ours(
    settings: ConvertSettings,
    make_sequences: Make,
    write_foreign: Write,
    labels: foreign_rows.LabelPolarity,
    is_inverted: int,
) -> None:
    training, _ = _write_folder(settings, make_sequences, write_foreign, "mlperf")
    convert_folder(replace(settings, keep_order=True, labels=labels))
    expected = [one[4] ^ is_inverted for one in training]
    assert _read(settings.out, "training")["next_sentence_labels"].tolist() == expected


def test_token_counts_are_those_of_the_training_originals(
    settings: ConvertSettings, make_sequences: Make, write_foreign: Write
) -> None:
    training, _ = _write_folder(settings, make_sequences, write_foreign, "nvidia")
    expected = np.bincount([t for one in training for t in _originals(one)], minlength=100)
    expected[[0, 2, 3, 4]] = 0
    for dialect in ("unmasked", "nvidia"):
        out = settings.out.parent / dialect
        convert_folder(replace(settings, out=out, dialect=dialect))
        np.testing.assert_array_equal(load_token_counts(out), expected)


def test_longer_rows_are_refused_or_cut_as_bert_trims_pairs(
    settings: ConvertSettings, make_sequences: Make, write_foreign: Write
) -> None:
    _write_folder(settings, make_sequences, write_foreign, "mlperf-varlength")
    with pytest.raises(DataError, match=r"eval_all\.hdf5: row \d+ has \d+ tokens, more than"):
        convert_folder(replace(settings, max_seq_length=9))
    convert_folder(replace(settings, max_seq_length=9, truncate=True, dialect="nvidia"))
    assert check_folder(settings.out) == []
    assert _read(settings.out, "training")["input_ids"].shape[1] == 9


def test_cut_rows_keep_their_separators_and_masks() -> None:
    """[CLS] a1..a6 [SEP] b1 b2 b3 [SEP] to 9 tokens: the longer side loses its end."""
    ids = np.array([[2, 11, 12, 4, 14, 4, 16, 3, 21, 4, 23, 3, 0], [2, 5, 4, 3] + [0] * 9])
    block = dialects.RowBlock(
        rows=np.arange(2),
        input_ids=ids,
        segment_ids=np.array([[0] * 8 + [1] * 4 + [0], [0] * 13]),
        input_mask=None,
        num_tokens=np.array([12, 4]),
        positions=np.array([[3, 5, 9], [2, 0, 0]]),
        masked_ids=np.array([[13, 15, 22], [6, 0, 0]]),
        num_masked=np.array([3, 1]),
        labels=None,
    )
    cut = fit_rows(block, np.array([12, 4]), 9)
    assert cut.input_ids.tolist() == [[2, 11, 12, 4, 3, 21, 4, 23, 3], [2, 5, 4, 3, 0, 0, 0, 0, 0]]
    assert cut.segment_ids.tolist() == [[0] * 5 + [1] * 4, [0] * 9]
    assert cut.positions.tolist() == [[3, 6, 0], [2, 0, 0]]
    assert cut.masked_ids.tolist() == [[13, 22, 0], [6, 0, 0]]
    assert cut.num_masked.tolist() == [2, 1]
    wider = fit_rows(block, np.array([12, 4]), 15)
    assert wider.input_ids.tolist() == np.pad(ids, ((0, 0), (0, 2))).tolist()


def test_one_segment_rows_are_cut_at_their_end() -> None:
    block = dialects.RowBlock(
        rows=np.arange(1),
        input_ids=np.array([[2, *range(20, 30), 3]]),
        segment_ids=np.zeros((1, 12), np.int64),
        input_mask=None,
        num_tokens=np.array([12]),
        positions=np.zeros((1, 0), np.int64),
        masked_ids=np.zeros((1, 0), np.int64),
        num_masked=np.array([0]),
        labels=None,
    )
    assert fit_rows(block, np.array([12]), 8).input_ids.tolist() == [[2, *range(20, 26), 3]]


def test_rows_are_held_out_where_no_file_is_named_so(
    settings: ConvertSettings, make_sequences: Make, write_foreign: Write
) -> None:
    folder = settings.inputs[0]
    for index in range(3):
        write_foreign(folder / f"wiki_training_{index}.hdf5", "nvidia", make_sequences(40, index))
    few = convert_folder(replace(settings, out=settings.out / "../few"))
    assert sum(entry.rows for entry in few.validation) == 1  # of 120, at least one
    manifest = convert_folder(replace(settings, validation_share=0.1))
    assert [entry.rows for entry in manifest.validation] == [12]
    # A third of three files: whole files, since NVIDIA's repeat each document inside a file.
    files = convert_folder(
        replace(settings, validation_share=0.3, out=settings.out / "../b", keep_order=True)
    )
    assert [entry.rows for entry in files.validation] == [20, 20]
    texts = _texts(_read(settings.out / "../b", "validation"))
    assert texts == [tuple(_originals(one)) for one in make_sequences(40, 2)]


def test_roberta_shards_padded_with_zero_get_the_right_padding(
    settings: ConvertSettings, make_sequences: Make, write_foreign: Write
) -> None:
    """academic-budget-bert pads RoBERTa's ids with 0, which is <s> there, and [PAD] is 1."""
    tokens = ["[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]", *(f"w{i}" for i in range(95))]
    from_tokens(tokens).save(settings.tokenizer)
    swap = np.array([1, 3, 0, 2, *range(4, 100)])
    training, _ = _write_folder(settings, make_sequences, write_foreign, "academic-budget-bert")
    for path in settings.inputs[0].rglob("*.hdf5"):
        with h5py.File(path, "r+") as file:
            mask = file["input_mask"][:]
            ids = np.where(file["input_ids"][:] == 0, 9, file["input_ids"][:])
            file["input_ids"][:] = swap[ids] * mask
            originals = file["masked_lm_ids"][:]
            file["masked_lm_ids"][:] = swap[originals] * (originals != 0)
    assert check_folder(settings.inputs[0] / "train") == []
    convert_folder(replace(settings, keep_order=True))
    row = _read(settings.out, "training")["input_ids"][0].tolist()
    expected = [int(swap[token]) for token in _originals(training[0])]
    assert row == expected + [1] * (len(row) - len(expected))
    assert check_folder(settings.out) == []


def _spoil(path: Path, name: str, function: Callable[[npt.NDArray[np.int64]], object]) -> None:
    with h5py.File(path, "r+") as file:
        file[name][:] = function(file[name][:])


@pytest.mark.parametrize(
    ("name", "function", "message"),
    [
        ("input_ids", lambda a: np.where(a == 50, 101, a), "input_ids holds 101; .*another vocab"),
        ("masked_lm_ids", lambda a: np.where(a == 50, 200, a), "masked_lm_ids holds 200; .*anoth"),
        ("input_ids", lambda a: np.where(a == 2, 9, a), r"row 0: begins with 9, .*another vocab"),
        ("input_ids", lambda a: np.where(a == 4, 8, a), r"\[MASK\] \(4\) stands at .* 80 % expec"),
        ("masked_lm_positions", lambda a: a[:, ::-1], "masked_lm_positions.*prepare_data.py chec"),
    ],
)
def test_rows_of_another_vocabulary_or_damage_are_refused(
    settings: ConvertSettings,
    make_sequences: Make,
    write_foreign: Write,
    name: str,
    function: Callable[[npt.NDArray[np.int64]], object],
    message: str,
) -> None:
    _write_folder(settings, make_sequences, write_foreign, "nvidia")
    for path in settings.inputs[0].rglob("*.hdf5"):
        _spoil(path, name, function)
    with pytest.raises(DataError, match=message) as error:
        convert_folder(settings)
    assert "\n" not in str(error.value)
    assert list(settings.out.iterdir()) == []


def test_vocabulary_with_the_same_special_ids_is_refused_by_impossible_pieces(
    settings: ConvertSettings,
    make_sequences: Make,
    write_foreign: Write,
    foreign_vocabulary: list[str],
) -> None:
    """As bert-base-cased's shards read with the uncased vocabulary: every id is inside it."""
    training, _ = _write_folder(settings, make_sequences, write_foreign, "nvidia")
    assert sum(len(one[0]) for one in training) > 500
    special, words = foreign_vocabulary[:5], foreign_vocabulary[5:]
    unused = [f"[unused{i}]" for i in range(20)]
    from_tokens([*special, *unused, *words[: 95 - 20]]).save(settings.tokenizer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(foreign_rows, "_LEAST_TOKENS", 500)
        with pytest.raises(DataError, match="tokens are pieces that no text gives .*another voca"):
            convert_folder(settings)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_seq_length": 5, "seed": -1}, "--max-seq-length 5: .*; --seed -1: 0 to"),
        ({"remask": True}, "--remask: only with --dialect nvidia"),
        ({"max_predictions_per_seq": 3}, "only with --remask"),
        ({"truncate": True}, "--truncate: only with --max-seq-length"),
        ({"validation_share": 0.9}, "--validation-share 0.9: above 0, at most 0.5"),
        ({"rows_per_shard": 0, "masked_lm_prob": 1.5}, "--rows-per-shard 0.*--masked-lm-prob 1.5"),
    ],
)
def test_impossible_settings_are_refused_together(
    settings: ConvertSettings, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        convert_folder(replace(settings, **changes))  # type: ignore[arg-type]


def test_inputs_that_do_not_belong_together_are_refused(
    settings: ConvertSettings, make_sequences: Make, write_foreign: Write
) -> None:
    with pytest.raises(DataError, match="foreign: no such file or folder"):
        convert_folder(settings)
    folder = settings.inputs[0]
    folder.mkdir()
    with pytest.raises(DataError, match="foreign: no HDF5 file in it"):
        convert_folder(settings)
    write_foreign(folder / "test_0.hdf5", "nvidia", make_sequences(9, 1))
    with pytest.raises(DataError, match="all 1 files are named as test"):
        convert_folder(settings)
    write_foreign(folder / "train_0.hdf5", "academic-budget-bert", make_sequences(9, 1))
    with pytest.raises(ShardError, match=r"train_0\.hdf5: has no next_sentence_labels, but"):
        convert_folder(settings)
    (folder / "train_0.hdf5").write_bytes(b"")
    with pytest.raises(ShardError, match=r"train_0\.hdf5: not a readable HDF5 file"):
        convert_folder(settings)


def test_file_without_a_suffix_is_found_by_its_first_bytes(
    settings: ConvertSettings, make_sequences: Make, write_foreign: Write
) -> None:
    write_foreign(settings.inputs[0] / "output_00000", "mlperf-packed", make_sequences(40, 1))
    (settings.inputs[0] / "README").write_text("not a shard")
    manifest = convert_folder(replace(settings, validation_share=0.1))
    assert sum(entry.rows for entry in manifest.training + manifest.validation) == 40
    assert manifest.settings["source_dialects"] == ["mlperf-packed"]


def test_variable_rows_that_hang_the_library_are_one_line(
    settings: ConvertSettings,
    make_sequences: Make,
    write_foreign: Write,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _write_folder(settings, make_sequences, write_foreign, "mlperf-packed")
    monkeypatch.setattr(isolated, "_PATIENCE_SECONDS", 0.0)
    monkeypatch.setattr(isolated, "_LEAST_BYTES_A_SECOND", 1e12)
    with pytest.raises(ShardError, match="corrupt: the HDF5 library crashes or hangs"):
        convert_folder(settings)
    assert not settings.out.exists()


def test_finished_folder_is_left_alone_and_other_settings_refused(
    settings: ConvertSettings, make_sequences: Make, write_foreign: Write
) -> None:
    _write_folder(settings, make_sequences, write_foreign, "nvidia")
    first = convert_folder(settings)
    times = {path: path.stat().st_mtime_ns for path in settings.out.iterdir()}
    assert convert_folder(settings) == first
    with pytest.raises(ShardError, match="holds shards made with other settings"):
        convert_folder(replace(settings, seed=7))
    assert {path: path.stat().st_mtime_ns for path in settings.out.iterdir()} == times


def test_our_own_folder_can_be_converted_to_static_masks(
    settings: ConvertSettings, make_sequences: Make, write_foreign: Write
) -> None:
    _write_folder(settings, make_sequences, write_foreign, "nvidia")
    convert_folder(settings)
    again = replace(
        settings, inputs=(settings.out,), out=settings.out / "../static", dialect="nvidia"
    )
    with pytest.raises(DataError, match="has no static masks to keep; draw them with --remask"):
        convert_folder(again)
    convert_folder(replace(again, remask=True, keep_order=True))
    assert check_folder(again.out) == []
    block = next(read_rows(inspect_foreign(again.out / "training_00000.hdf5")))
    ours = _read(settings.out, "training")["input_ids"][:26]
    np.testing.assert_array_equal(block.restored(), ours)


def test_progress_ends_at_the_number_of_rows(
    settings: ConvertSettings, make_sequences: Make, write_foreign: Write
) -> None:
    _write_folder(settings, make_sequences, write_foreign, "mlperf-packed")
    steps = _Counter()
    manifest = convert_folder(settings, steps)
    rows = sum(entry.rows for entry in manifest.training + manifest.validation)
    # A packed row is several of ours.
    assert 0 < steps.done["reading"] == steps.totals["reading"] < steps.done["shards"] == rows


class _Counter(Steps):
    """Counts instead of drawing."""

    def __init__(self) -> None:
        super().__init__(is_live=False)
        self.done: dict[str, int] = {}
        self.totals: dict[str, int] = {}

    @contextmanager
    def step(self, name: str, total: int | None, unit: str = "MB") -> Iterator[Advance]:
        assert total is not None
        self.totals[name] = total
        yield lambda amount: self.done.update({name: self.done.get(name, 0) + amount})


def test_another_run_and_a_read_only_folder_are_refused(
    settings: ConvertSettings, make_sequences: Make, write_foreign: Write
) -> None:
    _write_folder(settings, make_sequences, write_foreign, "nvidia")
    settings.out.mkdir()
    (settings.out / "thesis.txt").touch()
    with pytest.raises(ShardError, match=r"not empty \(thesis\.txt\)"):
        convert_folder(settings)
    with pytest.raises(DataError, match="cannot be written"):
        convert_folder(replace(settings, out=settings.out / "thesis.txt/x"))
    assert os.listdir(settings.out) == ["thesis.txt"]
