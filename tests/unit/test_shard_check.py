"""data_prep.shard_check: each fault is named with file and row, sound files have none, and no
damage ends in a traceback.
"""

import json
import random
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import h5py
import numpy as np
import numpy.typing as npt
import pytest

from data_prep import isolated, shard_check
from data_prep.foreign.dialects import inspect_foreign
from data_prep.foreign.row_checks import KnownIds
from data_prep.instances import row_type
from data_prep.masking import MaskingPolicy
from data_prep.shard_check import check_folder, check_shard
from data_prep.shard_format import Manifest, write_manifest
from data_prep.shard_writer import ShardLayout, write_shard
from data_prep.tokens.tokenizer import from_tokens

Sequence = tuple[list[int], list[int], list[int], list[int], int]
Make = Callable[[int, int], list[Sequence]]
Write = Callable[[Path, str, list[Sequence]], Path]
DIALECTS = ["nvidia", "academic-budget-bert", "mlperf", "mlperf-varlength", "mlperf-packed"]
LENGTH = 19


@pytest.fixture(params=["unmasked", "nvidia"])
def finished(
    tmp_path: Path,
    request: pytest.FixtureRequest,
    make_sequences: Make,
    foreign_vocabulary: list[str],
) -> Path:
    """A finished folder of two training shards and one of validation."""
    tokenizer = from_tokens(foreign_vocabulary)
    tokenizer.save(tmp_path)
    is_static = request.param == "nvidia"
    policy = MaskingPolicy(
        vocab_size=100, special_token_ids=tokenizer.special_token_ids, max_predictions_per_seq=3
    )
    layout = ShardLayout(
        rows_per_shard=20,
        seed=1,
        pad_id=0,
        attributes={"format_version": 1, "tokenizer_sha256": tokenizer.sha256, "seed": 1},
        masking=policy if is_static else None,
    )
    rows = np.zeros(60, row_type(LENGTH, 100, True))
    for row, (ids, segments, positions, originals, label) in zip(
        rows, make_sequences(60, 2), strict=True
    ):
        row["input_ids"][: len(ids)] = ids
        row["input_ids"][positions] = originals
        row["segment_ids"][: len(ids)] = segments
        row["next_sentence_labels"] = label
    entries = [
        write_shard(tmp_path / name, rows[first : first + 20], first, layout)
        for name, first in (("training_00000.hdf5", 0), ("training_00001.hdf5", 20))
    ]
    validation = write_shard(tmp_path / "validation_00000.hdf5", rows[40:], 0, layout)
    np.save(tmp_path / "token_counts.npy", np.zeros(100, np.int64))
    manifest = Manifest(
        format_version=1,
        dialect="nvidia" if is_static else "unmasked",
        max_seq_length=LENGTH,
        max_predictions_per_seq=3 if is_static else 0,
        vocab_size=100,
        tokenizer_sha256=tokenizer.sha256,
        special_token_ids=tokenizer.special_token_ids,
        has_next_sentence_labels=True,
        seed=1,
        num_documents={"training": 2, "validation": 1},
        training=tuple(entries),
        validation=(validation,),
    )
    write_manifest(tmp_path, manifest)
    return tmp_path


def _change_manifest(folder: Path, **changes: object) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _poke(path: Path, name: str, at: tuple[int, ...], value: int) -> None:
    with h5py.File(path, "r+") as file:
        file[name][at] = value


def test_sound_folder_has_no_fault(finished: Path) -> None:
    assert check_folder(finished) == []


def test_manifest_that_disagrees_is_named(finished: Path) -> None:
    (finished / "validation_00007.hdf5").write_bytes(
        (finished / "validation_00000.hdf5").read_bytes()
    )
    entries = json.loads((finished / "manifest.json").read_text())["training"]
    entries[0]["rows"] = 23
    entries.append({"file": "training_00009.hdf5", "rows": 20, "sha256": ""})
    _change_manifest(finished, training=entries, max_seq_length=64)
    faults = "\n".join(check_folder(finished))
    for message in (
        "validation_00007.hdf5: not in the manifest",
        "training shards are not equal to within one row: [23, 20, 20]",
        "training_00009.hdf5: listed in the manifest, but missing",
        f"rows, S, P are (20, {LENGTH}, ",
        "the manifest says (23, 64, ",
    ):
        assert message in faults


def test_changed_file_and_vocabulary_are_named(finished: Path) -> None:
    with h5py.File(finished / "training_00001.hdf5", "r+") as file:
        file.attrs["tokenizer_sha256"] = "f" * 64
    (finished / "token_counts.npy").unlink()
    tokens = (finished / "vocab.txt").read_text().replace("w1\n", "w-one\n")
    (finished / "vocab.txt").write_text(tokens)
    faults = "\n".join(check_folder(finished))
    for message in (
        "training_00001.hdf5: its sha256 is not the manifest's",
        "training_00001.hdf5: made with another tokenizer (ffffffffffff..., the manifest says",
        "token_counts.npy: missing",
        "vocab.txt: not the vocabulary of the manifest",
    ):
        assert message in faults


def test_wrong_types_are_named(finished: Path) -> None:
    with h5py.File(finished / "training_00000.hdf5", "r+") as file:
        ids = file["input_ids"][:]
        del file["input_ids"], file["next_sentence_labels"]
        file["input_ids"] = ids.astype("i8")
    faults = "\n".join(check_folder(finished))
    assert "dataset input_ids is int64; a folder of dialect" in faults
    assert "dataset next_sentence_labels is missing; the manifest promises it" in faults


def test_unfinished_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / ".in_progress").touch()
    faults = check_folder(tmp_path)
    assert "not finished: a run is still writing here, or was killed" in faults[0]
    assert "holds no shard" in faults[1]
    assert check_folder(tmp_path / "x") == [f"{tmp_path / 'x'}: no such folder"]


def test_other_special_ids_than_the_vocabulary_are_named(finished: Path) -> None:
    special = {"pad": 0, "unk": 1, "cls": 3, "sep": 2, "mask": 400}
    _change_manifest(finished, special_token_ids=special)
    faults = "\n".join(check_folder(finished))
    assert "lie outside its vocabulary of 100" in faults
    assert "special ids are" in faults
    assert "row 0: begins with 2, not with [CLS] (3) (20 such rows)" in faults


@pytest.mark.parametrize("dialect", DIALECTS)
def test_sound_foreign_folder_has_no_fault(
    tmp_path: Path, make_sequences: Make, write_foreign: Write, dialect: str
) -> None:
    for index in range(2):
        write_foreign(tmp_path / f"part_{index}.hdf5", dialect, make_sequences(200, index))
    write_foreign(tmp_path / "eval/output_00000", "mlperf-varlength", make_sequences(9, 5))
    assert check_folder(tmp_path) == []
    with h5py.File(tmp_path / "part_1.hdf5", "r+") as file:
        spoiled = file["segment_ids"][3].copy()
        spoiled[1] = -2
        file["segment_ids"][3] = spoiled
    assert "part_1.hdf5: row 3: segment_ids holds -2" in check_folder(tmp_path)[0]


def test_folder_of_two_tokenizers_is_named_without_a_manifest(
    tmp_path: Path, make_sequences: Make, write_foreign: Write
) -> None:
    sequences = make_sequences(30, 0)
    write_foreign(tmp_path / "train_0.hdf5", "nvidia", sequences)
    other = [([90 if t == 2 else t for t in one[0]], *one[1:]) for one in sequences]
    write_foreign(tmp_path / "train_1.hdf5", "nvidia", other)
    write_foreign(tmp_path / "train_2.hdf5", "academic-budget-bert", sequences)
    faults = check_folder(tmp_path)
    assert [fault.split(": ", 1)[1].split(" here")[0] for fault in faults] == [
        "the id of [CLS] is 90",
        "the dialect is academic-budget-bert",
        "next_sentence_labels is missing",
    ]
    with h5py.File(tmp_path / "train_1.hdf5", "r+") as file:
        file.attrs["tokenizer_sha256"] = "abc"
    assert any("tokenizer_sha256 is abc here and None in" in one for one in check_folder(tmp_path))


def _nvidia(folder: Path, make: Make, write: Write) -> Path:
    """Forty rows; row 7 is [CLS] w w [MASK] w [SEP] w w [SEP] with one mask."""
    sequences = make(40, 6)
    sequences[7] = ([2, 20, 21, 4, 23, 3, 25, 26, 3], [0] * 6 + [1] * 3, [3], [22], 1)
    return write(folder / "train_0.hdf5", "nvidia", sequences)


@pytest.mark.parametrize(
    ("name", "at", "value", "message"),
    [
        ("input_ids", (7, 2), 100, "input_ids holds 100; allowed are 0 to 99"),
        ("input_ids", (7, 2), -1, "input_ids holds -1; allowed are 0 to 99"),
        ("masked_lm_ids", (7, 0), 120, "masked_lm_ids holds 120; allowed are 0 to 99"),
        ("segment_ids", (7, 7), 3, "segment_ids holds 3; allowed are 0 to 1"),
        ("segment_ids", (7, 7), 0, "segment_ids falls back to 0 inside the row"),
        ("next_sentence_labels", (7,), 2, "next_sentence_labels holds 2; allowed are 0 to 1"),
        ("input_mask", (7, 1), 5, "input_mask holds 5; allowed are 0 to 1"),
        ("input_mask", (7, 1), 0, "input_mask is not ones, then zeros"),
        ("input_mask", (7, 9), 1, r"input_mask is 1 at position 9, where input_ids holds 0 \(\[PA"),
        ("input_ids", (7, 12), 30, "input_mask is 0 at position 12, where input_ids holds 30"),
        ("input_ids", (7, 6), 0, "input_mask is 1 at position 6, where input_ids holds 0"),
        ("masked_lm_positions", (7, 0), 19, "masked_lm_positions holds 19; allowed are 0 to 18"),
        ("masked_lm_positions", (7, 0), 12, "points at 12, outside the row's 9 real tokens"),
        ("masked_lm_positions", (7, 0), 8, r"points at 8, the place of \[SEP\]"),
        ("masked_lm_positions", (7, 0), 5, r"points at 5, the place of \[SEP\]"),
        ("masked_lm_positions", (7, 1), 2, r"does not ascend, .*: \[3, 2, 0"),
        ("masked_lm_positions", (7, 3), 7, r"goes on after its first 0: \[3, 0, 0, 7"),
        ("masked_lm_positions", (7, 0), 0, "differ in number: 0 positions, 1 ids"),
        ("masked_lm_ids", (7, 0), 0, "differ in number: 1 positions, 0 ids"),
        ("masked_lm_ids", (7, 0), 3, "masked_lm_ids holds 3, a special token that is never mask"),
        ("input_ids", (7, 0), 40, r"begins with 40, not with \[CLS\] \(2\)"),
        ("input_ids", (7, 8), 40, r"ends with 40, not with \[SEP\] \(3\)"),
        ("input_mask", (7, slice(None)), 0, "the row holds no token"),
    ],
)  # fmt: skip
def test_each_fault_of_a_row_is_named_with_its_row(
    tmp_path: Path,
    make_sequences: Make,
    write_foreign: Write,
    name: str,
    at: tuple[int, ...],
    value: int,
    message: str,
) -> None:
    path = _nvidia(tmp_path, make_sequences, write_foreign)
    assert check_shard(path, 100) == []
    _poke(path, name, at, value)
    faults = check_shard(path, 100)
    assert any(fault.startswith(f"{path}: row 7: ") for fault in faults)
    assert any(re.search(message, fault) for fault in faults), faults


def test_equal_faults_are_one_line_with_their_number(
    tmp_path: Path, make_sequences: Make, write_foreign: Write
) -> None:
    path = _nvidia(tmp_path, make_sequences, write_foreign)
    for row in (9, 30, 31):
        _poke(path, "segment_ids", (row, 1), 7)
    assert f"{path}: row 9: segment_ids holds 7; allowed are 0 to 1 (3 such rows)" in check_shard(
        path
    )


def test_random_replacement_by_pad_is_no_fault(
    tmp_path: Path, make_sequences: Make, write_foreign: Write
) -> None:
    path = _nvidia(tmp_path, make_sequences, write_foreign)
    _poke(path, "input_ids", (7, 3), 0)
    assert check_shard(path, 100) == []


def test_masks_of_other_rows_are_told_by_the_place_of_mask(
    tmp_path: Path, make_sequences: Make, write_foreign: Write
) -> None:
    path = write_foreign(tmp_path / "train_0.hdf5", "nvidia", make_sequences(300, 8))
    with h5py.File(path, "r+") as file:
        file["input_ids"][:] = np.where(file["input_ids"][:] == 4, 40, file["input_ids"][:])
    assert any("[MASK] (4) stands at 0 of" in fault for fault in _file_faults(path))
    with h5py.File(path, "r+") as file:
        file["masked_lm_positions"][:] = 0
        file["masked_lm_ids"][:] = 0
        ids: npt.NDArray[np.int32] = file["input_ids"][:]
        file["input_ids"][:] = np.where(ids == 40, 4, ids)
    assert any("masks were lost" in fault for fault in _file_faults(path))


def _file_faults(path: Path) -> list[str]:
    """The faults of a file whose special ids are known."""
    ids = KnownIds(vocab_size=100, pad=0, cls=2, sep=3, mask=4)
    return shard_check._check_rows((inspect_foreign(path), ids))[0]


def test_damaged_files_end_in_one_line_faults(
    tmp_path: Path, make_sequences: Make, write_foreign: Write
) -> None:
    """Bytes flipped, files cut: fixed rows here; variable ones in the test of isolation."""
    generator = random.Random(5)
    path = tmp_path / "train_0.hdf5"
    for dialect in ("nvidia", "mlperf"):
        whole = write_foreign(path, dialect, make_sequences(25, 1)).read_bytes()
        num_faulty = 0
        for _ in range(150):
            damaged = bytearray(whole)
            for _ in range(generator.choice([1, 3, 20])):
                damaged[generator.randrange(len(damaged))] = generator.randrange(256)
            if generator.random() < 0.2:
                del damaged[generator.randrange(len(damaged)) :]
            path.write_bytes(damaged)
            faults = check_folder(tmp_path)
            assert all(fault.count("\n") == 0 and str(tmp_path) in fault for fault in faults)
            num_faulty += bool(faults)
        assert num_faulty > 30


def test_renamed_and_missing_datasets_end_in_one_fault(
    tmp_path: Path, make_sequences: Make, write_foreign: Write
) -> None:
    for dialect in DIALECTS:
        path = tmp_path / "train_0.hdf5"
        with h5py.File(write_foreign(path, dialect, make_sequences(9, 1))) as file:
            names = list(file)
        for name in names:
            write_foreign(path, dialect, make_sequences(9, 1))
            with h5py.File(path, "r+") as file:
                file.move(name, "colour")
            is_optional = name in ("input_mask", "next_sentence_labels")
            is_optional |= name == "packed_input_len"  # the file reads as unpacked: other faults
            faults = check_folder(tmp_path)
            assert is_optional or len(faults) == 1
            assert all("\n" not in fault for fault in faults)


def test_rows_that_hang_the_library_are_given_up(
    tmp_path: Path, make_sequences: Make, write_foreign: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_foreign(tmp_path / "part_0.hdf5", "mlperf-packed", make_sequences(9, 1))
    monkeypatch.setattr(isolated, "_PATIENCE_SECONDS", 0.0)
    monkeypatch.setattr(isolated, "_LEAST_BYTES_A_SECOND", 1e12)
    assert check_folder(tmp_path) == [
        f"{path}: corrupt: the HDF5 library crashes or hangs on its rows"
    ]


def test_broken_manifest_is_one_fault(finished: Path) -> None:
    manifest = asdict(replace(Manifest(**_content(finished)), dialect="other"))  # type: ignore[arg-type]
    (finished / "manifest.json").write_text(json.dumps(manifest))
    assert len(check_folder(finished)) == 1
    (finished / "manifest.json").write_text("[" * 100_000)
    assert "not a readable manifest" in check_folder(finished)[0]


def _content(folder: Path) -> dict[str, object]:
    content: dict[str, object] = json.loads((folder / "manifest.json").read_text())
    return content


def test_ids_outside_are_found_without_a_manifest_where_a_vocabulary_is_known(
    finished: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    (finished / "manifest.json").unlink()
    with h5py.File(finished / "training_00001.hdf5", "r+") as file:
        file["input_ids"][3, 4] = 30_000
    (fault,) = check_folder(finished)
    assert "training_00001.hdf5: row 3" in fault
    assert "30000" in fault
    elsewhere = tmp_path_factory.mktemp("vocabulary")
    for name in ("vocab.txt", "tokenizer.json"):
        (finished / name).rename(elsewhere / name)
    assert check_folder(finished) == []
    assert check_folder(finished, elsewhere / "vocab.txt") == [fault]
    assert "cannot be read" in check_folder(finished, elsewhere / "none.txt")[0]


def test_a_missing_tokenizer_is_named(finished: Path) -> None:
    (finished / "tokenizer.json").unlink()
    (fault,) = check_folder(finished)
    assert fault.startswith(f"{finished / 'tokenizer.json'}: missing")


def test_mixed_types_are_named_without_a_manifest(finished: Path) -> None:
    (finished / "manifest.json").unlink()
    with h5py.File(finished / "training_00001.hdf5", "r+") as file:
        ids = file["input_ids"][:]
        del file["input_ids"]
        file.create_dataset("input_ids", data=ids.astype("i8"))
    (fault,) = check_folder(finished)
    assert "the type of input_ids is int64 here" in fault
