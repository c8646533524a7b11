"""stacking/hf_card.py: what a card says, what it leaves open, and that names stay names."""

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import metadata_load
from markdown_it import MarkdownIt

from data_prep.shard_format import Manifest, ShardEntry, write_manifest
from stacking.checkpoint import CheckpointManager, TrainState
from stacking.config import Recipe
from stacking.config_loading import resolved_json
from stacking.errors import ConfigError
from stacking.hf import ExportReport
from stacking.hf_card import card, plain
from stacking.hf_card_facts import RunFacts, run_facts
from stacking.hf_side_files import CARD, require_replaceable, sealed
from stacking.modeling import BertForPreTraining, init_weights
from stacking.snapshot import Snapshot

ROOT = Path(__file__).resolve().parents[2]
HOSTILE = "a|b`c`\n# d <b>*e*_f_ [g](h) \u202e ~~i~~ &amp; $j$"
STAGES: list[dict[str, object]] = [
    {"num_hidden_layers": 1, "steps": 4, "intermediate_size": 12},
    {"num_hidden_layers": 2, "steps": 6, "intermediate_size": 12, "moments": "keep",
     "depth": "interleave", "freeze": {"layers": 1}},
    {"num_hidden_layers": 2, "steps": 5, "ffn": "split"},
]  # fmt: skip


def recipe_of(**changes: object) -> Recipe:
    return Recipe.model_validate({
        "name": "tiny", "description": "small",
        "model": {"vocab_size": 37, "hidden_size": 12, "num_hidden_layers": 2,
                  "num_attention_heads": 3, "intermediate_size": 24, "num_nsp_labels": 0,
                  "max_position_embeddings": 16, "pooler": False},
        "data": {"max_seq_length": 16, "max_predictions_per_seq": 3}, "global_batch_size": 8,
        "learning_rate": {"schedule": "wsd", "peak": 2e-3, "warmup_steps": 2, "decay_steps": 3},
        "stages": STAGES, **changes,
    })  # fmt: skip


def write_metrics(run_dir: Path) -> None:
    start = {
        "event": "run_start", "name": "tiny", "total_steps": 15, "world_size": 2, "device": "cpu",
        "precision": "bf16", "unigram_loss": 6.5, "versions": "2.1, 0.19, 0.1",
        "stages": [{"num_hidden_layers": s["num_hidden_layers"], "steps": s["steps"],
                    "num_parameters": 9, "num_trained": 9} for s in STAGES],
    }  # fmt: skip
    rows: list[dict[str, object]] = [start]
    for step, stage, loss in ((4, 0, 5.5), (8, 1, 5.25), (10, 1, 5.125), (15, 2, 4.75)):
        rows.append({
            "event": "evaluation", "global_step": step, "stage": stage, "val_mlm_loss": loss,
            "val_mlm_accuracy": 0.1, "elapsed_seconds": 1.0,
        })  # fmt: skip
    for step, stage in ((4, 1), (10, 2)):
        rows.append({"event": "stage_switch", "global_step": step, "to_stage": stage,
                     "changes": {}, "operator": f"grown {stage}", "moments": "keep",
                     "loss_before": 5.5, "loss_after": 5.75, "max_logit_difference": 1.0,
                     "seconds": 1.0})  # fmt: skip
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (run_dir / "metrics.jsonl").write_text(lines)


def manifest_of(*names: str) -> Manifest:
    return Manifest(
        format_version=1, dialect="unmasked", max_seq_length=16, max_predictions_per_seq=0,
        vocab_size=37, tokenizer_sha256="ab" * 32, has_next_sentence_labels=False, seed=1,
        special_token_ids={"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4},
        num_documents={"training": 1234, "validation": 56},
        settings={"inputs": [[name, "cd" * 32] for name in names], "tokenizer_kind": "wordpiece",
                  "validation": [["held_out.txt", "ef" * 32]]},
        statistics={"training_tokens": 98765, "validation_tokens": 4321},
        training=(ShardEntry("training_00000.hdf5", 777, "12" * 32),),
        validation=(ShardEntry("validation_00000.hdf5", 66, "34" * 32),),
    )  # fmt: skip


def write_run(run_dir: Path, recipe: Recipe, *, whole: bool = True) -> None:
    """A run whose tags are stage2_begin, step_00000008 and stage3_end."""
    run_dir.mkdir()
    (run_dir / "recipe.json").write_text(resolved_json(recipe))
    if whole:
        engines = [{"optimizer": {"type": kind}} for kind in ("AdamW", "Lamb", "Muon")]
        (run_dir / "deepspeed.json").write_text(json.dumps({"stages": engines}))
        write_metrics(run_dir)
        write_manifest(run_dir, manifest_of("corpus.jsonl.xz"))
    manager = CheckpointManager(run_dir / "checkpoints")
    for tag, step, stage in (
        ("stage2_begin", 4, 1),
        ("step_00000008", 8, 1),
        ("stage3_end", 15, 2),
    ):
        model = BertForPreTraining(recipe.stage_model(stage))
        init_weights(model, torch.Generator().manual_seed(1))
        state = TrainState(
            global_step=step, stage=stage, num_hidden_layers=2, recipe_sha256="", tokens=step * 128,
            loader={"samples_consumed": step * 8},
        )  # fmt: skip
        manager.save(
            tag, Snapshot({n: t.contiguous() for n, t in model.state_dict().items()}), state
        )


def facts_of(run_dir: Path, tag: str, license_text: str | None = None) -> RunFacts:
    checkpoint = CheckpointManager(run_dir / "checkpoints").load(tag)
    return run_facts(run_dir, checkpoint, license_text, ())


def report_of(recipe: Recipe, **changes: object) -> ExportReport:
    report = ExportReport("BertForMaskedLM", 1.24e-6, Path("out"), (), recipe.model, False, True)
    return replace(report, **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("card") / "run"
    write_run(path, recipe_of())
    return path


def tables(text: str) -> list[list[list[str]]]:
    """Cells as a reader sees them."""
    found: list[list[list[str]]] = []
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        if token.type == "table_open":
            found.append([])
        elif token.type == "tr_open":
            found[-1].append([])
        elif token.type == "inline" and found and token.level >= 3:
            found[-1][-1].append("".join(
                child.content for child in token.children or () if child.type != "softbreak"
            ))  # fmt: skip
    return found


def cells(text: str) -> dict[str, list[str]]:
    """Rows of all tables by their first cell."""
    return {row[0]: row[1:] for one in tables(text) for row in one if row}


def test_a_card_tells_recipe_data_and_losses_of_the_exported_step(run_dir: Path) -> None:
    facts = facts_of(run_dir, "stage3_end", "CC BY-SA 4.0")
    text = card(facts, report_of(facts.recipe, notes=("3 rows left out",)))
    found = cells(text)
    assert found["checkpoint"] == ["stage3_end: step 15 of 15"]
    assert found["optimizer"][0].startswith("Muon, betas 0.9 and 0.999")
    assert found["learning rate"] == [
        "wsd, peak 0.002, warm-up 2 steps, decay in the last 3, end 0"
    ]
    assert found["trained with"] == ["torch 2.1, deepspeed 0.19, progressive-bert-trainer 0.1"]
    assert found["precision"] == ["bf16"]
    assert found["1"][:2] == ["4 of 4", "1 x 12"]
    assert found["2"] == ["6 of 6", "2 x 12", "3", "12", "16", "1 of 2 layers frozen",
                          "depth interleave", "keep"]  # fmt: skip
    assert found["3"][-2:] == ["ffn split", "reset"]
    assert found["documents"] == ["1,234", "56"]
    assert found["tokens"] == ["98,765", "4,321"]
    assert found["corpus.jsonl.xz"] == ["training", "cd" * 32]
    assert found["held_out.txt"] == ["held out", "ef" * 32]
    assert found["predicting word frequencies (unigrams)"][0] == "6.500"
    assert found["held-out masked tokens, step 15"] == ["4.750", "10.00 %"]
    assert found["4"] == ["2", "grown 1", "5.500", "5.750"]
    assert found["10"] == ["3", "grown 2", "5.500", "5.750"]
    assert "Licence of the data: CC BY-SA 4.0." in text
    assert "1.2e-06" in text
    assert "- 3 rows left out" in text
    assert "grown from 1 over 2 layers" in text


def test_a_card_of_an_earlier_step_knows_nothing_of_later_ones(run_dir: Path) -> None:
    facts = facts_of(run_dir, "step_00000008")
    found = cells(card(facts, report_of(facts.recipe)))
    assert found["optimizer"][0].startswith("Lamb")
    assert (found["2"][0], found["3"][0]) == ("4 of 6", "not reached")
    assert found["held-out masked tokens, step 8"][0] == "5.250"
    assert "10" not in found
    at_switch = card(replace(facts, state=facts_of(run_dir, "stage2_begin").state), report_of(
        facts.recipe))  # fmt: skip
    assert "This stage was not evaluated up to the exported step." in at_switch
    assert cells(at_switch)["2"][0] == "0 of 6"


def test_a_card_tells_the_weights_that_the_run_began_with(run_dir: Path) -> None:
    """By name: where they lay on the machine that trained is nobody's business."""
    facts = facts_of(run_dir, "stage3_end")
    text = card(facts, report_of(facts.recipe))
    assert "pre-trained from random weights as" in text
    assert cells(text)["began from"] == ["random weights"]
    path = run_dir / "metrics.jsonl"
    first, _, others = path.read_text().partition("\n")
    start = {"start_from": "/home/me/other|bert", "start_sha256": "ab" * 32}
    path.write_text(json.dumps({**json.loads(first), **start}) + "\n" + others)
    facts = facts_of(run_dir, "stage3_end")
    text = card(facts, report_of(facts.recipe))
    assert "random weights" not in text
    assert "/home/me" not in text
    assert r"pre-trained from the weights of other\|bert as" in text
    assert cells(text)["began from"] == [f"the weights of other|bert, sha256 {'ab' * 32}"]
    assert cells(text)["1"][-2] == "the weights of other|bert"


def test_what_the_run_did_not_keep_is_said(tmp_path: Path) -> None:
    write_run(tmp_path / "run", recipe_of(), whole=False)
    facts = facts_of(tmp_path / "run", "stage3_end")
    text = card(facts, report_of(facts.recipe))
    assert "has no manifest of its data" in text
    assert "so its losses are not known" in text
    assert "Licence of the data: not stated." in text
    assert cells(text)["trained with"] == ["not known"]
    assert cells(text)["began from"] == ["not known"]
    assert "wide, pre-trained as a masked language model" in text
    assert cells(text)["optimizer"][0].startswith("optimizer not known")
    for name in ("metrics.jsonl", "manifest.json", "deepspeed.json"):
        (tmp_path / "run" / name).write_text('{"event": ')
    assert card(facts_of(tmp_path / "run", "stage3_end"), report_of(facts.recipe)) == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, {"license": "unknown"}),
        ("CC BY-SA 4.0", {"license": "cc-by-sa-4.0"}),
        ("mit", {"license": "mit"}),
        ('ours: "see\nbelow" #x', {"license": "other", "license_name": "ours-see-below-x"}),
        ("\u6761\u6b3e", {"license": "other", "license_name": "other"}),
    ],
)
def test_the_head_is_yaml_that_the_hub_reads(
    text: str | None, expected: dict[str, str], run_dir: Path, tmp_path: Path
) -> None:
    facts = replace(facts_of(run_dir, "stage3_end", text), languages=("no", "en"))
    (tmp_path / CARD).write_text(card(facts, report_of(facts.recipe, needs_code=True)))
    assert metadata_load(tmp_path / CARD) == {
        **expected, "language": ["no", "en"], "library_name": "transformers",
        "pipeline_tag": "fill-mask",
        "tags": ["bert", "masked-lm", "pre-training", "progressive-training", "custom_code"],
    }  # fmt: skip
    unknown = card(replace(facts, languages=()), report_of(facts.recipe))
    (tmp_path / CARD).write_text(unknown)
    assert (metadata_load(tmp_path / CARD) or {})["language"] == ["und"]


@pytest.mark.parametrize("name", [HOSTILE, "- x", "1. y", "=== z", "+ w", "<!-- v", "\\| u"])
def test_names_stay_names(name: str, tmp_path: Path) -> None:
    """Everywhere that one may stand: no cell, heading, emphasis or HTML comes of it."""
    write_run(tmp_path / "run", recipe_of(name=name, description=name))
    write_manifest(tmp_path / "run", manifest_of(name))
    facts = replace(facts_of(tmp_path / "run", "stage3_end", name), tag=name, optimizer=name)
    text = card(facts, report_of(facts.recipe, notes=(name,)))
    seen = " ".join("".join(c if c.isprintable() else " " for c in name).split())
    files = next(table for table in tables(text) if table[0][0] == "file")
    assert [len(row) for row in files] == [3, 3, 3]
    assert files[1][0] == seen
    body = text.split("---\n", 2)[2]
    tokens = MarkdownIt("commonmark").enable("table").parse(body)
    kinds = {c.type for t in tokens if t.type == "inline" for c in t.children or ()}
    assert kinds <= {"text", "code_inline", "softbreak"}
    assert sum(t.type == "heading_open" for t in tokens) == 7
    assert sum(t.type == "html_block" for t in tokens) == 1  # the last line
    assert tokens[1].children is not None
    assert "".join(c.content for c in tokens[1].children) == seen
    assert not [t for t in tokens if t.type in ("ordered_list_open", "blockquote_open")]
    assert sum(t.type == "bullet_list_open" for t in tokens) == 1  # the notes


def test_plain_text_of_numbers_is_left_alone() -> None:
    assert plain("AdamW, 2.13 of 3") == "AdamW, 2.13 of 3"
    assert plain(math.pi) == "3\\.141592653589793"


@pytest.mark.parametrize(
    ("license_text", "languages", "message"),
    [
        ("  \n", (), "--data-license: got no text"),
        (None, ("English", "en"), "--language English: allowed: codes of two or three letters"),
    ],
)
def test_what_no_card_can_say_is_refused(
    license_text: str | None, languages: tuple[str, ...], message: str, run_dir: Path
) -> None:
    checkpoint = CheckpointManager(run_dir / "checkpoints").load("stage3_end")
    with pytest.raises(ConfigError, match=message):
        run_facts(run_dir, checkpoint, license_text, languages)


def test_many_files_are_counted_and_foreign_shards_have_their_sizes(run_dir: Path) -> None:
    facts = facts_of(run_dir, "stage3_end")
    many = manifest_of(*(f"part_{i}" for i in range(250)))
    text = card(replace(facts, manifest=many), report_of(facts.recipe))
    assert "And 51 more, which the run's manifest.json lists." in text
    converted = replace(many, settings={"inputs": [["theirs.hdf5", 4096]]}, statistics={})
    found = cells(card(replace(facts, manifest=converted), report_of(facts.recipe)))
    assert found["theirs.hdf5"] == ["training", "4096 bytes"]
    assert found["tokens"] == ["not known", "not known"]
    bare = replace(many, settings={})
    found = cells(card(replace(facts, manifest=bare), report_of(facts.recipe)))
    assert found["training_00000.hdf5"] == ["shard", "12" * 32]


def test_a_card_that_somebody_edited_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / CARD).write_text(sealed("text\n"))
    require_replaceable(tmp_path)
    for changed in (sealed("text\n").replace("text", "texts"), "text\n", sealed("text\n") + "more"):
        (tmp_path / CARD).write_text(changed)
        with pytest.raises(ConfigError, match=r"its README.md is not as an export wrote it"):
            require_replaceable(tmp_path)


def export(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "launch/export.py", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"embedding_scale": True}])
def test_the_cards_code_runs(options: dict[str, object], tmp_path: Path) -> None:
    """A whole export by the command, then the block as it stands, in that folder, without us."""
    model = recipe_of().model.model_dump() | options
    write_run(tmp_path / "run", recipe_of(model=model))
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "this", "is", "the", "of", "it", "."]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = {"model": {"type": "WordPiece", "unk_token": "[UNK]", "vocab": vocabulary,
                           "continuing_subword_prefix": "##", "max_input_chars_per_word": 100},
                 "pre_tokenizer": {"type": "BertPreTokenizer"}, "version": "1.0",
                 "added_tokens": []}  # fmt: skip
    (tmp_path / "run/tokenizer").mkdir()
    (tmp_path / "run/tokenizer/tokenizer.json").write_text(json.dumps(tokenizer))
    done = export(tmp_path / "run", "--out", tmp_path / "hf", "--data-license", "mit",
                  "--language", "en")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "note: 26 rows of the vocabulary left out" in done.stdout
    assert "hint" not in done.stdout
    text = (tmp_path / "hf" / CARD).read_text()
    assert cells(text)["vocabulary"] == ["11"]
    block = re.findall(r"```python\n(.+?)```", text, re.S)[0]
    assert ("trust_remote_code=True" in block) == bool(options)
    guard = "import sys\nsys.modules['stacking'] = sys.modules['data_prep'] = None\n"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    ran = subprocess.run([sys.executable, "-c", guard + block], cwd=tmp_path / "hf",
                         env=environment, stdin=subprocess.DEVNULL, capture_output=True,
                         text=True, check=False)  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip()
    (tmp_path / "hf" / CARD).write_text(text + "mine\n")
    again = export(tmp_path / "run", "--out", tmp_path / "hf")
    assert again.returncode == 2
    assert "keep it elsewhere" in again.stderr


@pytest.mark.slow
def test_the_code_of_a_card_without_tokenizer_runs(tmp_path: Path) -> None:
    write_run(tmp_path / "run", recipe_of())
    done = export(tmp_path / "run", "--out", tmp_path / "hf", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["hints"]
    block = re.findall(r"```python\n(.+?)```", (tmp_path / "hf" / CARD).read_text(), re.S)[0]
    ran = subprocess.run([sys.executable, "-c", block], cwd=tmp_path / "hf", capture_output=True,
                         text=True, check=False)  # fmt: skip
    assert ran.returncode == 0, ran.stderr
