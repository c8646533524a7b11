"""data_prep.pipeline: the same bytes for any worker count, splits by document, safe restarts."""

import json
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest

from data_prep import pipeline
from data_prep.errors import DataError, ShardError
from data_prep.pipeline import prepare_shards
from data_prep.settings import PrepareSettings
from data_prep.shard_format import check_folder, load_token_counts
from data_prep.tokenizer import load_tokenizer

WORDS = ["the", "old", "house", "stands", "near", "a", "river", "while", "many", "birds", "sing"]


def _corpus(path: Path, num_documents: int = 410, start: int = 0) -> Path:
    generator = np.random.default_rng(start)
    with path.open("w") as stream:
        for i in range(start, start + num_documents):
            sentences = [
                " ".join(generator.choice(WORDS, 9)).capitalize() + f" {i}." for _ in range(5)
            ]
            stream.write(json.dumps({"text": " ".join(sentences)}) + "\n")
    return path


def _settings(folder: Path, **changes: object) -> PrepareSettings:
    corpus = folder / "corpus.jsonl"
    if not corpus.exists():
        _corpus(corpus)
    base = PrepareSettings(inputs=(corpus,), out=folder / "out", vocab_size=150, max_seq_length=24)
    return replace(base, **changes)  # type: ignore[arg-type]


def _bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("pairs", ["none", "nsp"])
def test_bytes_do_not_depend_on_the_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pairs: str
) -> None:
    monkeypatch.setattr(pipeline, "CHUNK_CHARACTERS", 9_000)
    settings = _settings(tmp_path, pairs=pairs, rows_per_shard=400)
    prepare_shards(settings)
    prepare_shards(replace(settings, out=tmp_path / "two", workers=2))
    assert _bytes(tmp_path / "out") == _bytes(tmp_path / "two")
    assert check_folder(tmp_path / "out") == []


def test_every_200th_document_is_held_out(tmp_path: Path) -> None:
    settings = _settings(tmp_path)
    report = prepare_shards(settings)
    assert report.manifest.num_documents == {"training": 408, "validation": 2}
    tokenizer = load_tokenizer(tmp_path / "out")
    with h5py.File(tmp_path / "out/validation_00000.hdf5") as file:
        text = tokenizer.tokenizer.decode_batch(file["input_ids"][:].tolist())
    digits = " ".join(text).replace(" ", "")
    assert "199." in digits
    assert "399." in digits


def test_held_out_text_is_never_trained_on(tmp_path: Path) -> None:
    both = _corpus(tmp_path / "valid.jsonl", 30)
    corpus = _corpus(tmp_path / "corpus.jsonl", 300)
    settings = _settings(tmp_path, inputs=(both, corpus), validation=(both,))
    report = prepare_shards(settings)
    assert report.funnel is not None
    assert report.manifest.num_documents["validation"] == 30
    assert report.funnel.duplicate >= 30
    assert report.manifest.num_documents["training"] + 30 == report.funnel.documents_kept


def test_token_counts_are_those_of_the_training_rows(tmp_path: Path) -> None:
    prepare_shards(_settings(tmp_path, static_masks=True))
    counts = load_token_counts(tmp_path / "out")
    assert counts is not None
    prepare_shards(_settings(tmp_path, out=tmp_path / "plain"))
    with h5py.File(tmp_path / "plain/training_00000.hdf5") as file:
        expected = np.bincount(file["input_ids"][:].ravel(), minlength=len(counts))
    expected[[0, 2, 3, 4]] = 0
    np.testing.assert_array_equal(counts, expected)
    assert check_folder(tmp_path / "out") == []


def test_finished_folder_is_left_alone_and_other_settings_refused(tmp_path: Path) -> None:
    settings = _settings(tmp_path)
    assert prepare_shards(settings).funnel is not None
    before = _bytes(tmp_path / "out")
    assert "already done" in prepare_shards(replace(settings, workers=2)).text()
    with pytest.raises(ShardError, match="other settings .seed: 1 there, 3 asked"):
        prepare_shards(replace(settings, seed=3))
    with (tmp_path / "corpus.jsonl").open("a") as stream:
        stream.write('{"text": "More."}\n')
    with pytest.raises(ShardError, match=r"other settings .inputs: .*corpus\.jsonl"):
        prepare_shards(settings)
    assert _bytes(tmp_path / "out") == before


def test_interrupted_folder_is_redone_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = _settings(tmp_path)
    prepare_shards(settings)
    whole = _bytes(tmp_path / "out")
    (tmp_path / "out/manifest.json").unlink()
    (tmp_path / "out/training_00000.hdf5").write_bytes(b"half")
    (tmp_path / "out/.in_progress").touch()
    prepare_shards(settings)
    assert _bytes(tmp_path / "out") == whole


def test_loaded_tokenizer_gives_the_same_shards_as_the_trained_one(tmp_path: Path) -> None:
    first = prepare_shards(_settings(tmp_path)).manifest
    settings = _settings(tmp_path, out=tmp_path / "b", tokenizer=tmp_path / "out/vocab.txt")
    second = prepare_shards(settings).manifest
    assert second.training == first.training
    assert second.tokenizer_sha256 == first.tokenizer_sha256


def test_chunks_keep_order_and_never_leave_one_document_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pipeline, "CHUNK_CHARACTERS", 10)
    texts = [("training", letter * 5) for letter in "abcdefg"]
    chunks = list(pipeline._chunks(iter(texts)))  # type: ignore[arg-type]
    assert [index for _, index, _ in chunks] == list(range(len(chunks)))
    assert [text[0] for _, _, chunk in chunks for text in chunk] == list("abcdefg")
    assert min(len(chunk) for _, _, chunk in chunks) >= 2
    assert len(chunks) == 3


def test_too_few_documents_ask_for_validation_files(tmp_path: Path) -> None:
    _corpus(tmp_path / "corpus.jsonl", 7)
    with pytest.raises(DataError, match="every 200th document.*only 7: .*--validation"):
        prepare_shards(_settings(tmp_path))
    assert list((tmp_path / "out").iterdir()) == []


def test_impossible_settings_are_listed_together(tmp_path: Path) -> None:
    settings = _settings(tmp_path, max_seq_length=4, workers=0, masked_lm_prob=1.5)
    with pytest.raises(DataError, match="max-seq-length 4.*workers 0.*masked-lm-prob 1.5"):
        prepare_shards(settings)


def test_padding_share_of_the_shipped_corpus_is_below_5_percent(tmp_path: Path) -> None:
    sample = Path(pipeline.__file__).parent / "sample"
    inputs = (sample / "wiki_intros_valid.cc-by-sa-4.0.jsonl.xz",)
    held_out = (sample / "austen_valid.public-domain.jsonl.xz",)
    settings = _settings(
        tmp_path, inputs=inputs, validation=held_out, vocab_size=2000, max_seq_length=128
    )
    assert prepare_shards(settings).manifest.statistics["training_padding_share"] < 0.05
