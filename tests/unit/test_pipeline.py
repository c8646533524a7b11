"""data_prep.pipeline: the same bytes for any worker count, splits by document, safe restarts."""

import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import psutil
import pytest

from data_prep import pipeline, row_step
from data_prep.errors import DataError, ShardError
from data_prep.progress import Steps
from data_prep.report.report import PrepareReport
from data_prep.settings import PrepareSettings
from data_prep.shard_check import check_folder
from data_prep.shard_format import Manifest, load_token_counts
from data_prep.sources import blocks, reading
from data_prep.tokens.tokenizer import load_tokenizer
from data_prep.workers import Workers

ROOT = Path(__file__).resolve().parents[2]
WORDS = ["the", "old", "house", "stands", "near", "a", "river", "while", "many", "birds", "sing"]


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many blocks and chunks from little text."""
    monkeypatch.setattr(reading, "BLOCK_BYTES", 9_000)
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 9_000)
    monkeypatch.setattr(row_step, "CHUNK_BYTES", 9_000)


def _corpus(path: Path, num_documents: int = 410, start: int = 0) -> Path:
    generator = np.random.default_rng(start)
    with path.open("w") as stream:
        for i in range(start, start + num_documents):
            sentences = [
                " ".join(generator.choice(WORDS, 9)).capitalize() + f" {i}." for _ in range(5)
            ]
            stream.write(json.dumps({"text": " ".join(sentences)}) + "\n")
    return path


def _settings(folder: Path, **changes: Any) -> PrepareSettings:
    corpus = folder / "corpus.jsonl"
    if not corpus.exists():
        _corpus(corpus)
    base = PrepareSettings(
        inputs=(corpus,),
        out=folder / "out",
        vocab_size=150,
        max_seq_length=24,
        workers=1,
        no_page=True,
    )
    return replace(base, **changes)


def _prepare(settings: PrepareSettings) -> PrepareReport:
    report = pipeline.prepare_shards(settings)
    assert report is not None
    return report


def _manifest(settings: PrepareSettings) -> Manifest:
    manifest = _prepare(settings).manifest
    assert manifest is not None
    return manifest


def _bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("pairs", ["none", "nsp"])
@pytest.mark.usefixtures("small_blocks")
def test_bytes_do_not_depend_on_the_workers(tmp_path: Path, pairs: str) -> None:
    settings = _settings(tmp_path, pairs=pairs, rows_per_shard=400, dedup="paragraph")
    _prepare(settings)
    _prepare(replace(settings, out=tmp_path / "two", workers=2))
    assert _bytes(tmp_path / "out") == _bytes(tmp_path / "two")
    assert len(list((tmp_path / "out").glob("training*"))) > 2
    assert check_folder(tmp_path / "out") == []


def test_every_200th_document_is_held_out(tmp_path: Path) -> None:
    manifest = _manifest(_settings(tmp_path))
    assert manifest.num_documents == {"training": 408, "validation": 2}
    tokenizer = load_tokenizer(tmp_path / "out")
    with h5py.File(tmp_path / "out/validation_00000.hdf5") as file:
        text = tokenizer.tokenizer.decode_batch(file["input_ids"][:].tolist())
    digits = " ".join(text).replace(" ", "")
    assert "199." in digits
    assert "399." in digits


@pytest.mark.usefixtures("small_blocks")
def test_blocks_change_the_order_of_rows_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which documents are held out, and what is a duplicate, is a matter of the corpus."""
    settings = _settings(tmp_path, inputs=(_corpus(tmp_path / "corpus.jsonl"),) * 2)
    small = _manifest(settings)
    monkeypatch.undo()
    large = _manifest(replace(settings, out=tmp_path / "large"))
    assert small.num_documents == large.num_documents == {"training": 408, "validation": 2}
    assert small.statistics["training_tokens"] == large.statistics["training_tokens"]


def test_held_out_text_is_never_trained_on(tmp_path: Path) -> None:
    both = _corpus(tmp_path / "valid.jsonl", 30)
    corpus = _corpus(tmp_path / "corpus.jsonl", 300)
    report = _prepare(_settings(tmp_path, inputs=(both, corpus), validation=(both,)))
    assert report.manifest is not None
    assert report.manifest.num_documents["validation"] == 30
    assert report.funnel.counts["duplicate_document"].documents >= 30
    assert report.manifest.num_documents["training"] + 30 == report.funnel.kept.documents


def test_the_funnel_adds_up(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    _corpus(corpus)
    with corpus.open("a") as stream:
        stream.write('{"text": "Once. Twice.\\nOnce. Twice."}\n{"text": " "}\n')
    report = _prepare(_settings(tmp_path, dedup="paragraph", near_dedup=0.9))
    kept = report.funnel.kept
    assert report.manifest is not None
    assert sum(report.manifest.num_documents.values()) == kept.documents
    assert report.funnel.counts["duplicate_paragraph"].paragraphs >= 1
    assert kept.documents <= 411
    assert "kept" in report.text()
    json.dumps(report.as_dict())


def test_token_counts_are_those_of_the_training_rows(tmp_path: Path) -> None:
    _prepare(_settings(tmp_path, static_masks=True))
    counts = load_token_counts(tmp_path / "out")
    assert counts is not None
    _prepare(_settings(tmp_path, out=tmp_path / "plain"))
    with h5py.File(tmp_path / "plain/training_00000.hdf5") as file:
        expected = np.bincount(file["input_ids"][:].ravel(), minlength=len(counts))
    expected[[0, 2, 3, 4]] = 0
    np.testing.assert_array_equal(counts, expected)
    assert check_folder(tmp_path / "out") == []


def test_dupe_factor_repeats_the_text_under_other_masks(tmp_path: Path) -> None:
    once = _manifest(_settings(tmp_path, static_masks=True, out=tmp_path / "once"))
    thrice = _manifest(_settings(tmp_path, static_masks=True, dupe_factor=3))
    rows = [sum(entry.rows for entry in manifest.training) for manifest in (once, thrice)]
    assert rows[1] == 3 * rows[0]
    with h5py.File(tmp_path / "out/training_00000.hdf5") as file:
        masked = file["input_ids"][:]
    assert len(np.unique(masked, axis=0)) > 1.5 * rows[0]


def test_whole_words_are_masked_together(tmp_path: Path) -> None:
    settings = _settings(tmp_path, static_masks=True, whole_word=True, vocab_size=66)
    _prepare(settings)
    tokenizer = load_tokenizer(tmp_path / "out")
    continues = np.array(tokenizer.is_continuation)
    with h5py.File(tmp_path / "out/training_00000.hdf5") as file:
        positions, ids = file["masked_lm_positions"][:], file["masked_lm_ids"][:]
    followed = 0
    for row, words in zip(positions, ids, strict=True):
        taken = {p for p in row.tolist() if p}
        for position, word in zip(row.tolist(), words.tolist(), strict=True):
            if position and continues[word]:
                assert position - 1 in taken
                followed += 1
    assert followed > 100


def test_finished_folder_is_left_alone_and_other_settings_refused(tmp_path: Path) -> None:
    settings = _settings(tmp_path)
    assert not _prepare(settings).is_old
    before = _bytes(tmp_path / "out")
    assert "already done" in _prepare(replace(settings, workers=2)).text()
    with pytest.raises(ShardError, match="other settings .seed: 1 there, 3 asked"):
        _prepare(replace(settings, seed=3))
    with (tmp_path / "corpus.jsonl").open("a") as stream:
        stream.write('{"text": "More."}\n')
    with pytest.raises(ShardError, match=r"other settings .inputs: .*corpus\.jsonl"):
        _prepare(settings)
    assert _bytes(tmp_path / "out") == before


@pytest.mark.usefixtures("small_blocks")
def test_a_failed_run_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = _settings(tmp_path, rows_per_shard=300)
    _prepare(settings)
    whole = _bytes(tmp_path / "out")
    again = replace(settings, out=tmp_path / "again")
    # Fails at the last step; then nothing before it may be done again.
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "shard_job", _fail)
        with pytest.raises(DataError, match="disk full"):
            _prepare(again)
    assert not (tmp_path / "again/manifest.json").exists()
    monkeypatch.setattr(pipeline, "clean_job", _fail)
    monkeypatch.setattr(row_step, "documents_of", _fail)
    monkeypatch.setattr(pipeline, "train_tokenizer", lambda *_, **__: load_tokenizer(settings.out))
    _prepare(again)
    assert _bytes(tmp_path / "again") == whole


def _fail(*_: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("damaged", ["clean/000001.npz", "rows/training_000001.rows"])
@pytest.mark.usefixtures("small_blocks")
def test_damaged_intermediate_files_are_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damaged: str
) -> None:
    settings = _settings(tmp_path, rows_per_shard=300)
    _prepare(settings)
    again = replace(settings, out=tmp_path / "again")
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "shard_job", _fail)
        with pytest.raises(DataError, match="disk full"):
            _prepare(again)
    path = tmp_path / "again/.work" / damaged
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)
    _prepare(again)
    assert _bytes(tmp_path / "again") == _bytes(tmp_path / "out")


def test_what_another_run_left_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "shard_job", _fail)
        with pytest.raises(DataError, match="disk full"):
            _prepare(_settings(tmp_path, seed=9))
    _prepare(_settings(tmp_path))
    _prepare(_settings(tmp_path, out=tmp_path / "other"))
    assert _bytes(tmp_path / "out") == _bytes(tmp_path / "other")


@pytest.mark.parametrize(
    "shares",
    [
        pytest.param((0.6,), id="once"),
        pytest.param((0.3, 0.5, 0.7, random.uniform(0.3, 1.0)), marks=pytest.mark.slow, id="often"),
    ],
)
def test_killed_at_any_moment_it_ends_with_the_same_bytes(
    shares: tuple[float, ...], tmp_path: Path
) -> None:
    corpus = _corpus(tmp_path / "corpus.jsonl", 30_000)
    sizes = ("--vocab-size", "150", "--max-seq-length", "32", "--rows-per-shard", "9000")
    command = [
        sys.executable, str(ROOT / "launch/prepare_data.py"), "shards", str(corpus), "--no-page",
        "--pairs", "nsp", "--workers", "2", *sizes, "--out",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    start = time.perf_counter()
    subprocess.run([*command, str(tmp_path / "whole")], env=environment, check=True, timeout=300)
    duration = time.perf_counter() - start
    killed = 0
    for share in shares:
        process = subprocess.Popen([*command, str(tmp_path / "killed")], env=environment)
        time.sleep(share * duration)
        killed += process.poll() is None
        workers = _children(process)
        process.send_signal(signal.SIGKILL)
        process.wait()
        _, alive = psutil.wait_procs(workers, timeout=10)
        assert not alive, "workers outlive their parent"
    assert killed, "none of the runs was killed before its end"
    subprocess.run([*command, str(tmp_path / "killed")], env=environment, check=True, timeout=300)
    assert _digest(tmp_path / "killed") == _digest(tmp_path / "whole")
    assert check_folder(tmp_path / "killed") == []


def _children(process: "subprocess.Popen[bytes]") -> list[psutil.Process]:
    try:
        return list(psutil.Process(process.pid).children(recursive=True))
    except psutil.NoSuchProcess:
        return []


def _digest(folder: Path) -> dict[str, str]:
    return {name: hashlib.sha256(content).hexdigest() for name, content in _bytes(folder).items()}


def test_loaded_tokenizer_gives_the_same_shards_as_the_trained_one(tmp_path: Path) -> None:
    first = _manifest(_settings(tmp_path))
    settings = _settings(
        tmp_path, out=tmp_path / "b", tokenizer=tmp_path / "out/vocab.txt", vocab_size=8192
    )
    second = _manifest(settings)
    assert second.training == first.training
    assert second.tokenizer_sha256 == first.tokenizer_sha256


@pytest.mark.usefixtures("small_blocks")
def test_a_lonely_document_joins_the_chunk_before(tmp_path: Path) -> None:
    corpus = _corpus(tmp_path / "corpus.jsonl", 100)
    held_out = _corpus(tmp_path / "valid.jsonl", 2, start=500)
    with corpus.open("a") as stream:  # a block of its own
        stream.write(json.dumps({"text": "The end of the old house. " * 500}) + "\n")
    settings = _settings(tmp_path, pairs="nsp", validation=(held_out,), dedup="none")
    run = pipeline._Run(settings, {}, *_one_worker(settings))
    chunks = list(row_step.chunks_of(run._clean(is_continued=False)))
    training = [chunk for chunk in chunks if chunk.split == "training"]
    assert [chunk.index for chunk in training] == list(range(len(training)))
    assert len(training) >= 2
    assert min(sum(block.num_documents for block in chunk.blocks) for chunk in chunks) >= 2


def _one_worker(settings: PrepareSettings) -> tuple[Any, Any]:
    settings.out.mkdir()
    return Workers(None, 1), Steps(is_live=False)


def test_of_a_small_corpus_the_last_document_is_held_out(tmp_path: Path) -> None:
    _corpus(tmp_path / "corpus.jsonl", 7)
    settings = _settings(tmp_path, pairs="nsp", vocab_size=90)
    report = _prepare(settings)
    assert report.manifest is not None
    assert report.manifest.num_documents == {"training": 6, "validation": 1}
    assert "only one validation document" in report.text()
    assert check_folder(settings.out) == []


def test_one_document_asks_for_validation_files(tmp_path: Path) -> None:
    _corpus(tmp_path / "corpus.jsonl", 1)
    with pytest.raises(DataError, match="only one document.*--validation.*--documents"):
        _prepare(_settings(tmp_path))
    assert not (tmp_path / "out/manifest.json").exists()


def test_when_nothing_is_left_the_first_skip_is_named(tmp_path: Path) -> None:
    (tmp_path / "corpus.jsonl").write_text("not json\n")
    with pytest.raises(DataError, match=r"no text: .*skipped: .*corpus\.jsonl:1: not a JSON"):
        _prepare(_settings(tmp_path, skip_bad=True))


def test_scripts_get_a_funnel_that_adds_up(tmp_path: Path) -> None:
    corpus = _corpus(tmp_path / "corpus.jsonl")
    with corpus.open("a") as stream:
        stream.write('not json\n{"text": " "}\n')
    funnel = _prepare(_settings(tmp_path, skip_bad=True)).as_dict()["funnel"]
    documents = {rule: counts["documents"] for rule, counts in funnel.items()}
    assert documents["read"] == 412
    assert documents.pop("read") == sum(documents.values())


def test_a_damaged_shard_is_not_called_done(tmp_path: Path) -> None:
    settings = _settings(tmp_path)
    _prepare(settings)
    os.truncate(settings.out / "training_00000.hdf5", 3000)
    with pytest.raises(ShardError, match=r"training_00000\.hdf5 is gone or damaged"):
        _prepare(settings)


def test_impossible_settings_are_listed_together(tmp_path: Path) -> None:
    settings = _settings(tmp_path, max_seq_length=4, workers=1, masked_lm_prob=1.5, dupe_factor=2)
    with pytest.raises(DataError, match="max-seq-length 4.*masked-lm-prob 1.5.*dupe-factor"):
        _prepare(settings)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"whole_word": True}, "--whole-word: has an effect only with --static-masks"),
        ({"masked_lm_prob": 0.2}, "--masked-lm-prob: .* --static-masks"),
        ({"short_seq_prob": 0.2, "pairs": "lines"}, "--short-seq-prob: .* --pairs nsp or sop"),
        ({"tokenizer": Path("v.txt")}, "--vocab-size: .* no --tokenizer"),
    ],
)
def test_flags_without_effect_are_refused(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(DataError, match=words):
        _prepare(_settings(tmp_path, **changes))


def test_padding_share_of_the_shipped_corpus_is_below_5_percent(tmp_path: Path) -> None:
    sample = Path(pipeline.__file__).parent / "sample"
    inputs = (sample / "wiki_intros_valid.cc-by-sa-4.0.jsonl.xz",)
    held_out = (sample / "austen_valid.public-domain.jsonl.xz",)
    settings = _settings(
        tmp_path, inputs=inputs, validation=held_out, vocab_size=2000, max_seq_length=128
    )
    assert _manifest(settings).statistics["training_padding_share"] < 0.05


@pytest.mark.usefixtures("small_blocks")
def test_rows_of_all_documents_are_mixed(tmp_path: Path) -> None:
    """A shuffle over the corpus, not inside its chunks."""
    _prepare(_settings(tmp_path, rows_per_shard=100))
    tokenizer = load_tokenizer(tmp_path / "out")
    with h5py.File(tmp_path / "out/training_00000.hdf5") as file:
        texts = tokenizer.tokenizer.decode_batch(file["input_ids"][:].tolist())
    numbers = [int(word) for text in texts for word in re.findall(r"\d{3}", text.replace(" ", ""))]
    assert min(numbers) < 180
    assert max(numbers) > 350
    assert numbers != sorted(numbers)
