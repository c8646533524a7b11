"""stacking.dataset and its parts: one global order for any world size, masks by sample, resume."""

import json
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from data_prep.masking import MaskingPolicy, mask_tokens
from data_prep.shard_format import Manifest, ShardEntry, file_sha256, write_manifest
from stacking import sample_order
from stacking.config import BertConfig, DataConfig
from stacking.dataset import (
    MaskedLMBatch,
    PretrainingLoader,
    check_compatible,
    load_token_counts,
    open_shards,
    validation_batches,
)
from stacking.errors import ConfigError, ShardError
from stacking.sample_order import SampleOrder

SPECIAL = {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4}
VOCAB, LENGTH, SEED = 60, 11, 9
ROWS_PER_FILE = (7, 6, 6)
NUM_ROWS = sum(ROWS_PER_FILE)
DATA = DataConfig(max_seq_length=LENGTH, max_predictions_per_seq=3)
STATIC = DataConfig(max_seq_length=LENGTH, max_predictions_per_seq=3, masking="static")


def _ids() -> "np.ndarray[tuple[int, ...], np.dtype[np.int64]]":
    """All rows [N, S]; the second token tells the row."""
    ids = np.random.default_rng(0).integers(5, VOCAB, (NUM_ROWS, LENGTH))
    ids[:, 0], ids[:, 1], ids[:, -1] = 2, np.arange(NUM_ROWS) + 10, 3
    ids[::3, -2:] = [3, 0]
    return ids


def _policy() -> MaskingPolicy:
    return MaskingPolicy(vocab_size=VOCAB, special_token_ids=SPECIAL, max_predictions_per_seq=3)


def _folder(
    path: Path, *, static: bool = False, labels: bool = True, manifest: bool = True
) -> Path:
    """Write the rows in three files of either dialect, as both splits."""
    path.mkdir()
    ids = _ids()
    arrays = {"input_ids": ids, "segment_ids": np.tile(np.arange(LENGTH) > 5, (NUM_ROWS, 1))}
    if labels:
        arrays["next_sentence_labels"] = np.arange(NUM_ROWS) % 2
    if static:
        masked = mask_tokens(ids, _policy(), seed=77, epoch=0, sample_indices=np.arange(NUM_ROWS))
        arrays |= {"input_ids": masked.input_ids, "input_mask": ids != 0}
        arrays["masked_lm_positions"] = masked.masked_lm_positions
        arrays["masked_lm_ids"] = np.maximum(masked.masked_lm_ids, 0)
    starts = np.cumsum([0, *ROWS_PER_FILE])
    for split in ("training", "validation"):
        for index, (start, stop) in enumerate(zip(starts, starts[1:], strict=False)):
            with h5py.File(path / f"{split}_{index:05d}.hdf5", "w") as file:
                for name, array in arrays.items():
                    dtype = "u2" if name == "input_ids" and not static else "i4"
                    file.create_dataset(
                        name,
                        data=array[start:stop].astype(dtype),
                        compression="gzip" if static else None,
                    )
    if manifest:
        _manifest(path, static, labels)
    return path


def _manifest(path: Path, static: bool, labels: bool) -> None:
    pieces = [f"##p{i}" if i % 4 == 3 else f"p{i}" for i in range(VOCAB)]
    (path / "vocab.txt").write_text("\n".join(pieces) + "\n")
    entries = {
        split: tuple(
            ShardEntry(file.name, n, file_sha256(file))
            for n, file in zip(ROWS_PER_FILE, sorted(path.glob(f"{split}_*.hdf5")), strict=True)
        )
        for split in ("training", "validation")
    }
    write_manifest(
        path,
        Manifest(
            format_version=1,
            dialect="nvidia" if static else "unmasked",
            max_seq_length=LENGTH,
            max_predictions_per_seq=3 if static else 0,
            vocab_size=VOCAB,
            tokenizer_sha256=file_sha256(path / "vocab.txt"),
            special_token_ids=SPECIAL,
            has_next_sentence_labels=labels,
            seed=1,
            num_documents={},
            training=entries["training"],
            validation=entries["validation"],
        ),
    )


def _loader(
    path: Path,
    data: DataConfig = DATA,
    *,
    micro: int = 2,
    rank: int = 0,
    world: int = 1,
    batch: int = 8,
    pin_memory: bool = False,
) -> PretrainingLoader:
    return PretrainingLoader(
        open_shards(path, "training"),
        data,
        seed=SEED,
        global_batch_size=batch,
        micro_batch_size=micro,
        rank=rank,
        world_size=world,
        pin_memory=pin_memory,
    )


def _steps(loader: PretrainingLoader, count: int) -> list[list[MaskedLMBatch]]:
    with loader:
        return [next(loader) for _ in range(count)]


def _indices(step: Sequence[MaskedLMBatch]) -> list[int]:
    return [int(i) for batch in step for i in batch.sample_indices]


def _restored(batch: MaskedLMBatch) -> torch.Tensor:
    """Put the targets back, [B, S]."""
    ids = batch.input_ids.clone()
    rows, slots = torch.nonzero(batch.masked_lm_ids != -100, as_tuple=True)
    ids[rows, batch.masked_lm_positions[rows, slots]] = batch.masked_lm_ids[rows, slots]
    return ids


@pytest.mark.parametrize("static", [False, True])
def test_batches_hold_the_rows_they_name(tmp_path: Path, static: bool) -> None:
    path = _folder(tmp_path / "d", static=static)
    all_ids = torch.from_numpy(_ids())
    for step in _steps(_loader(path), 5):
        assert len(step) == 4
        for batch in step:
            assert batch.input_ids.shape == batch.token_type_ids.shape == (2, LENGTH)
            assert batch.masked_lm_positions.shape == batch.masked_lm_ids.shape == (2, 3)
            expected = all_ids[torch.from_numpy(batch.sample_indices)]
            assert torch.equal(_restored(batch), expected)
            assert torch.equal(batch.attention_mask, expected != 0)
            assert batch.attention_mask.dtype == torch.bool
            assert batch.token_type_ids[0].tolist() == [0] * 6 + [1] * 5
            labels = batch.next_sentence_labels
            assert labels is not None
            assert labels.tolist() == [i % 2 for i in batch.sample_indices.tolist()]
            assert batch.num_masked == int((batch.masked_lm_ids != -100).sum()) > 0
            assert batch.num_real_tokens == int((expected != 0).sum())


def test_every_epoch_holds_every_row_once_across_batch_borders(tmp_path: Path) -> None:
    steps = _steps(_loader(_folder(tmp_path / "d")), NUM_ROWS)  # 19 steps of 8 are 8 epochs
    rows = [i for step in steps for i in _indices(step)]
    epochs = [rows[i : i + NUM_ROWS] for i in range(0, len(rows), NUM_ROWS)]
    assert len(epochs) == 8
    assert all(sorted(epoch) == list(range(NUM_ROWS)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 8


def test_rows_and_masks_do_not_depend_on_ranks_or_micro_batches(tmp_path: Path) -> None:
    path = _folder(tmp_path / "d")
    alone = _steps(_loader(path, micro=8), 4)
    ranks = [_steps(_loader(path, micro=2, rank=r, world=2), 4) for r in range(2)]
    for step in range(4):
        whole = alone[step][0]
        parts = [batch for rank in ranks for batch in rank[step]]
        assert _indices(parts) == _indices([whole])
        assert torch.equal(torch.cat([b.input_ids for b in parts]), whole.input_ids)
        assert torch.equal(torch.cat([b.masked_lm_ids for b in parts]), whole.masked_lm_ids)


def test_masks_differ_between_epochs_and_static_ones_do_not(tmp_path: Path) -> None:
    for static, data in ((False, DATA), (True, DATA), (True, STATIC)):
        path = _folder(tmp_path / f"{static}{data.masking}", static=static)
        shown: dict[int, set[tuple[int, ...]]] = {i: set() for i in range(NUM_ROWS)}
        for batch in (b for step in _steps(_loader(path, data), NUM_ROWS) for b in step):
            for index, ids in zip(batch.sample_indices.tolist(), batch.input_ids, strict=True):
                shown[index].add(tuple(ids.tolist()))
        kinds = [len(rows) for rows in shown.values()]
        assert max(kinds) == 1 if data.masking == "static" else min(kinds) > 1


def test_dynamic_masks_over_static_shards_equal_those_over_unmasked_ones(tmp_path: Path) -> None:
    plain = _steps(_loader(_folder(tmp_path / "a")), 3)
    redrawn = _steps(_loader(_folder(tmp_path / "b", static=True)), 3)
    for one, other in zip(sum(plain, []), sum(redrawn, []), strict=True):
        assert torch.equal(one.input_ids, other.input_ids)
        assert torch.equal(one.masked_lm_positions, other.masked_lm_positions)


def test_resume_continues_with_the_same_batches_at_another_world_size(tmp_path: Path) -> None:
    path = _folder(tmp_path / "d")
    expected = _steps(_loader(path, micro=4), 6)
    first = _loader(path, micro=4)
    _steps(first, 3)
    state = json.loads(json.dumps(first.state_dict()))
    assert state["samples_consumed"] == 24
    ranks = []
    for rank in range(2):
        loader = _loader(path, micro=1, rank=rank, world=2)
        next(loader)
        loader.load_state_dict(state)
        ranks.append(_steps(loader, 3))
    for step in range(3):
        parts = ranks[0][step] + ranks[1][step]
        whole = expected[3 + step]
        assert _indices(parts) == _indices(whole)
        assert torch.equal(
            torch.cat([b.input_ids for b in parts]), torch.cat([b.input_ids for b in whole])
        )


def test_resume_with_other_data_or_batch_size_is_refused(tmp_path: Path) -> None:
    loader = _loader(_folder(tmp_path / "d"))
    state = loader.state_dict()
    with pytest.raises(ShardError, match="made with seed 4, here it is 9"):
        loader.load_state_dict(state | {"seed": 4})
    with pytest.raises(ShardError, match="num_rows 20, here it is 19"):
        loader.load_state_dict(state | {"num_rows": 20})
    with pytest.raises(ConfigError, match="12 samples consumed is no multiple"):
        loader.load_state_dict(state | {"samples_consumed": 12})


def test_sample_hash_is_that_of_the_global_batch(tmp_path: Path) -> None:
    path = _folder(tmp_path / "d")
    hashes = [_loader(path, micro=1, rank=r, world=4).sample_hash(5) for r in range(4)]
    assert len(set(hashes)) == 1
    assert len({_loader(path).sample_hash(step) for step in range(30)}) == 30


def test_uneven_batch_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="8 is not a multiple of micro batch 3 x 1 ranks"):
        _loader(_folder(tmp_path / "d"), micro=3)


def test_reader_failure_reaches_the_consumer_and_threads_end(tmp_path: Path) -> None:
    path = _folder(tmp_path / "d", static=True)
    before = threading.active_count()
    loader = _loader(path)
    for shard in path.glob("training_*.hdf5"):
        shard.write_bytes(b"gone")
    for _ in range(2):
        with pytest.raises(ShardError, match="training_00000.hdf5: its sha256 is not"):
            next(loader)
    loader.close()
    with _loader(_folder(tmp_path / "e")) as other:
        next(other)
        assert threading.active_count() == before + 1
    assert threading.active_count() == before


@pytest.mark.parametrize(("world", "size"), [(1, 4), (2, 4), (3, 5), (4, 50)])
def test_validation_is_disjoint_equal_and_complete(tmp_path: Path, world: int, size: int) -> None:
    shards = open_shards(_folder(tmp_path / "d"), "validation")
    ranks = [
        list(
            validation_batches(
                shards, DATA, seed=3, max_sequences=13, batch_size=size, rank=r, world_size=world
            )
        )
        for r in range(world)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    assert len({b.input_ids.shape for batches in ranks for b in batches}) == 1
    rows = sorted(i for batches in ranks for i in _indices(batches) if i >= 0)
    assert rows == sorted(set(rows))
    assert rows == [i * NUM_ROWS // 13 for i in range(13)]
    for batch in (b for batches in ranks for b in batches):
        filler = torch.from_numpy(batch.sample_indices) < 0
        assert (batch.input_ids[filler] == 0).all()
        assert (batch.masked_lm_ids[filler] == -100).all()
        assert batch.next_sentence_labels is not None
        assert (batch.next_sentence_labels[filler] == -100).all()
        assert batch.attention_mask.any(dim=1).all()
        assert batch.num_real_tokens == int(batch.attention_mask[~filler].sum())


def test_validation_masks_are_fixed_for_any_world_size(tmp_path: Path) -> None:
    shards = open_shards(_folder(tmp_path / "d"), "validation")

    def rows(world: int) -> Iterator[tuple[int, list[int]]]:
        for rank in range(world):
            for batch in validation_batches(
                shards, DATA, seed=3, max_sequences=99, batch_size=2, rank=rank, world_size=world
            ):
                yield from zip(batch.sample_indices.tolist(), batch.input_ids.tolist(), strict=True)

    one, three = ({i: ids for i, ids in rows(world) if i >= 0} for world in (1, 3))
    assert one == three
    assert len(one) == NUM_ROWS


def test_folder_without_manifest_is_read_as_it_is(tmp_path: Path) -> None:
    path = _folder(tmp_path / "d", static=True, manifest=False)
    batch = _steps(_loader(path, STATIC), 1)[0][0]
    assert torch.equal(_restored(batch), torch.from_numpy(_ids()[batch.sample_indices]))
    with pytest.raises(ShardError, match='"dynamic", but without a manifest.json'):
        _loader(path, DATA)
    shards = open_shards(path, "training")
    loader = PretrainingLoader(
        shards, STATIC, seed=1, global_batch_size=19, micro_batch_size=19, model_vocab_size=40
    )
    with (
        loader,
        pytest.raises(
            ShardError, match=r"training_0000\d.hdf5: dataset input_ids holds 4\d in row"
        ),
    ):
        next(loader)


def test_whole_words_are_taken_from_the_vocabulary(tmp_path: Path) -> None:
    path = _folder(tmp_path / "d")
    data = DATA.model_copy(update={"whole_word": True})
    for batch in (b for step in _steps(_loader(path, data), 9) for b in step):
        for row, positions, targets in zip(
            _restored(batch), batch.masked_lm_positions, batch.masked_lm_ids, strict=True
        ):
            chosen = set(positions[targets != -100].tolist())
            words = [
                i for i in range(2, LENGTH) if row[i] > 4 and row[i] % 4 == 3 and row[i - 1] > 4
            ]
            assert all((i in chosen) == (i - 1 in chosen) for i in words)
    for text, message in (
        ("\n".join(["##"] + ["a"] * (VOCAB - 1)), r"vocab\.txt: is not the manifest's"),
        ("\n".join(["a"] * VOCAB), r"vocab\.txt: whole-word masking needs"),
        ("a\nb", r"does not fit vocab\.txt: the vocabulary has 60 pieces, not 2"),
    ):
        (path / "vocab.txt").write_text(text + "\n")
        with pytest.raises(ShardError, match=message):
            _loader(path, data)


def test_incompatibilities_are_reported_together(tmp_path: Path) -> None:
    shards = open_shards(_folder(tmp_path / "d", static=True, labels=False), "training")
    config = BertConfig(vocab_size=50, max_position_embeddings=10, num_nsp_labels=2, pad_token_id=1)
    data = STATIC.model_copy(update={"max_seq_length": 12, "max_predictions_per_seq": 2})
    with pytest.raises(ShardError) as caught:
        check_compatible(shards, config, data)
    for message in (
        "vocabulary has 60 pieces, model.vocab_size is 50",
        "sequences have 11 tokens, data.max_seq_length is 12",
        "up to 3 positions, data.max_predictions_per_seq is 2",
        "no sentence pairs",
        "exceeds model.max_position_embeddings 10",
        "[PAD] is 0 in the shards, model.pad_token_id is 1",
    ):
        assert message in str(caught.value)
    pairs = open_shards(_folder(tmp_path / "e"), "training")
    with pytest.raises(ShardError, match=r"type_vocab_size is 0") as caught:
        check_compatible(pairs, BertConfig(vocab_size=60, type_vocab_size=0), STATIC)
    assert 'data.masking is "static", but the shards are unmasked' in str(caught.value)
    check_compatible(pairs, BertConfig(vocab_size=64), DATA)


def test_missing_unfinished_and_contradicted_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="no such folder; make it with"):
        open_shards(tmp_path / "x", "training")
    (tmp_path / "y").mkdir()
    with pytest.raises(ShardError, match="holds no validation shards"):
        open_shards(tmp_path / "y", "validation")
    (tmp_path / "y/.in_progress").touch()
    with pytest.raises(ShardError, match="was not finished"):
        open_shards(tmp_path / "y", "training")
    path = _folder(tmp_path / "d")
    with h5py.File(path / "training_00001.hdf5", "w") as file:
        for name in ("input_ids", "segment_ids", "next_sentence_labels"):
            shape = (5,) if name == "next_sentence_labels" else (5, LENGTH)
            file.create_dataset(name, data=np.ones(shape, "i1"))
    with pytest.raises(ShardError, match=r"00001.hdf5: dataset input_ids is \[5, 11\]; the manif"):
        open_shards(path, "training")
    (path / "training_00001.hdf5").unlink()
    with pytest.raises(ShardError, match=r"training_00001.hdf5: not a readable HDF5 file"):
        open_shards(path, "training")
    assert load_token_counts(path) is None


def test_batch_moves_to_a_device(tmp_path: Path) -> None:
    batch = _steps(_loader(_folder(tmp_path / "d", labels=False)), 1)[0][0]
    moved = batch.to("meta")
    assert moved.next_sentence_labels is None
    tensors = [value for value in vars(moved).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 5
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert moved.num_masked == batch.num_masked
    assert asdict(batch)["num_real_tokens"] == batch.num_real_tokens


@pytest.mark.parametrize("num_rows", [1, 5, 8, 23, 96, 101])
def test_order_is_a_permutation_in_blocks_and_groups(
    num_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample_order, "BLOCK_ROWS", 5)
    monkeypatch.setattr(sample_order, "GROUP_BLOCKS", 3)
    order = SampleOrder(num_rows, 7)
    rows, epochs = order.locate(np.arange(3 * num_rows))
    for epoch in range(3):
        of_epoch = rows[epochs == epoch]
        assert sorted(of_epoch.tolist()) == list(range(num_rows))
        blocks = [len(set((of_epoch[i : i + 5] // 5).tolist())) for i in range(0, num_rows, 5)]
        assert max(blocks) <= 6  # a window of five rows lies in at most two groups of three blocks
    positions = np.random.default_rng(1).permutation(3 * num_rows)
    again, _ = SampleOrder(num_rows, 7).locate(positions)
    np.testing.assert_array_equal(again, rows[positions])
    if num_rows > 8:
        other, _ = SampleOrder(num_rows, 8).locate(np.arange(3 * num_rows))
        assert not np.array_equal(other, rows)


def test_order_of_a_billion_rows_costs_little_memory() -> None:
    order = SampleOrder(1_000_000_007, 1)
    rows, epochs = order.locate(np.array([0, 999_999_999, 1_000_000_007]))
    assert epochs.tolist() == [0, 0, 1]
    assert len(set(rows.tolist())) == 3
    assert sum(group.nbytes for group in order._groups.values()) <= 2 * 8 * 65_536


@pytest.mark.parametrize("labels", [True, False])
def test_the_reader_thread_pins_every_tensor_where_asked(
    tmp_path: Path, labels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned: dict[int, str] = {}
    kept: list[torch.Tensor] = []

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.clone())
        pinned[id(kept[-1])] = threading.current_thread().name
        return kept[-1]

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    path = _folder(tmp_path / "d", labels=labels)
    ours, plain = _steps(_loader(path, pin_memory=True), 2), _steps(_loader(path), 2)
    assert set(pinned.values()) == {"shard-reader"}
    for batch, other in zip(sum(ours, []), sum(plain, []), strict=True):
        mine, theirs = batch.inputs(), other.inputs()
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
        tensors = {*mine.values(), batch.attention_mask}
        assert all(id(tensor) in pinned for tensor in tensors)
        assert not {id(tensor) for tensor in theirs.values()} & pinned.keys()
        assert batch.num_masked == other.num_masked
