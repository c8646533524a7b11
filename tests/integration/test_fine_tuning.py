"""Whole fine-tunings: equal to a plain loop with transformers' class; toy tasks learned by heart.

Training runs in processes of its own; the commands that train nothing run in this one.
"""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fine_tuned import fresh_model, main_of, write_model, write_toy_glue
from glue_sets import FILES, write_rows
from launching import LAUNCH, ROOT, alone, environment, of_session, script
from ranks import run_on_ranks
from torch import Tensor
from transformers import BertConfig as TheirConfig
from transformers import BertForSequenceClassification as Theirs

from stacking.config import BertConfig
from stacking.deepspeed_config import load_deepspeed_config
from stacking.fine_tuning import FineTuner, Rows, Setting, initial_weights
from stacking.fine_tuning_batch import LabelledBatch
from stacking.fine_tuning_models import BertForSequenceClassification
from stacking.hf import home_config
from stacking.hf_homes import BERT, to_home
from stacking.layers import LayerNormFactory
from stacking.pretrained import Pretrained

FP32 = ROOT / "deepspeed_configs/cpu_fp32.json"
QUICK = [
    "--deepspeed_config",
    FP32,
    "--learning-rate",
    3e-3,
    "--batch-size",
    8,
    "--epochs",
    12,
    "--dropout",
    0,
]

# -- a whole fine-tuning beside a plain loop ---------------------------------------------------

SETTING = Setting(num_epochs=2, batch_size=4, learning_rate=2e-3, warmup_share=0.25, dropout=0.0)
NUM_ROWS, SEED = 23, 5  # the last batch of an epoch has three rows


@dataclass(frozen=True)
class Numbers:
    """Random rows of random lengths with labels of three classes."""

    ids: np.ndarray[Any, np.dtype[np.int64]]
    lengths_: Rows
    labels: Rows

    @classmethod
    def draw(cls, config: BertConfig) -> "Numbers":
        generator = np.random.default_rng(0)
        lengths = generator.integers(2, 14, NUM_ROWS)
        ids = generator.integers(1, config.vocab_size, (NUM_ROWS, 14))
        return cls(np.where(np.arange(14) < lengths[:, None], ids, 0), lengths,
                   generator.integers(0, 3, NUM_ROWS))  # fmt: skip

    def __len__(self) -> int:
        return NUM_ROWS

    def lengths(self) -> Rows:
        return self.lengths_

    def labelled_batch(self, rows: Rows) -> LabelledBatch:
        width = int(self.lengths_[rows].max())
        mask = np.arange(width) < self.lengths_[rows][:, None]
        segments = (np.arange(width) >= 3) & mask
        return LabelledBatch.of_rows(
            self.ids[rows, :width], segments.astype(np.int8), mask.astype(np.int8),
            self.labels[rows],
        )  # fmt: skip


def start_of(seed: int = 1) -> tuple[Any, Pretrained]:
    model = fresh_model(seed, num_hidden_layers=2)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return model, Pretrained("", model.config, weights, None, "", False)  # type: ignore[arg-type]


MAKE = partial(BertForSequenceClassification, kind="classes", num_logits=3)


@dataclass(frozen=True)
class Trained:
    """What a fine-tuning came to; numpy, since tensors do not outlive the process that sends them.

    Attributes:
        weights: in the end.
        logits: of all rows.
        losses: of each update.
        dropouts: of hidden states and of attention, in the model that was trained.
    """

    weights: dict[str, np.ndarray[Any, np.dtype[np.float32]]]
    logits: np.ndarray[Any, np.dtype[np.float32]]
    losses: list[float]
    dropouts: tuple[float, float]


def by_engine(setting: Setting = SETTING) -> Trained:
    _, start = start_of()
    rows = Numbers.draw(start.config)
    losses: list[float] = []
    configs: list[BertConfig] = []

    def make(config: BertConfig, layer_norm: LayerNormFactory) -> BertForSequenceClassification:
        configs.append(config)
        return MAKE(config, layer_norm)

    with FineTuner(
        start, make, setting, load_deepspeed_config(FP32), num_rows=NUM_ROWS, seed=SEED
    ) as tuner:
        tuner.train(lambda _: rows, lambda done, total, loss: losses.append(loss))
        logits = np.zeros((NUM_ROWS, 3), np.float32)
        for numbers, found in tuner.predict(rows):
            logits[numbers] = found
        snapshot = tuner._engine.snapshot()
    assert snapshot is not None
    weights = {name: weight.numpy() for name, weight in snapshot.weights.items()}
    last = configs[-1]
    dropouts = last.hidden_dropout_prob, last.attention_probs_dropout_prob
    return Trained(weights, logits, losses, dropouts)


def by_hand() -> Trained:
    """The same with transformers' class, torch's AdamW and no line of ours but the batches."""
    pretrained, _ = start_of()
    model: torch.nn.Module = Theirs(
        TheirConfig.from_dict({**home_config(pretrained.config, BERT), "num_labels": 3})
    )
    given = {n: t for n, t in to_home(pretrained, BERT).items() if n.startswith("bert.")}
    missing, unexpected = model.load_state_dict(given, strict=False)
    assert missing == ["classifier.weight", "classifier.bias"]
    assert not unexpected
    for name in missing:
        torch.nn.init.zeros_(model.get_parameter(name))
    rows = Numbers.draw(pretrained.config)
    steps, warm = 12, 3
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=0.0, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.01
    )
    schedule = [*((step + 1) / warm for step in range(warm)),
                *((steps - step) / (steps - warm) for step in range(warm, steps))]  # fmt: skip
    losses: list[float] = []
    for epoch in range(2):
        order = np.random.default_rng((SEED, epoch)).permutation(NUM_ROWS)
        for begin in range(0, NUM_ROWS, 4):
            batch = rows.labelled_batch(order[begin : begin + 4])
            for group in optimizer.param_groups:
                group["lr"] = 2e-3 * schedule[len(losses)]
            loss = model(batch.input_ids, batch.attention_mask.long(), batch.token_type_ids,
                         labels=batch.labels).loss  # fmt: skip
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    model.eval()
    whole = rows.labelled_batch(np.arange(NUM_ROWS))
    with torch.no_grad():
        logits = model(whole.input_ids, whole.attention_mask.long(), whole.token_type_ids).logits
    weights = {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}
    return Trained(weights, logits.numpy(), losses, (0.0, 0.0))


def renamed(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Ours under transformers' names."""
    model, _ = start_of()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if (own := name.removeprefix("nsp_head.")) in weights and "classifier" not in own:
                parameter.copy_(weights[own])
    heads = {name: weights[name] for name in ("classifier.weight", "classifier.bias")}
    return to_home(model, BERT) | heads


@dataclass(frozen=True)
class Told:
    """What one process did: the fine-tuning above, and launch/glue.py on toy tasks."""

    folder: Path
    by_engine: Trained
    dropped: Trained
    """With dropout, of a model that was pre-trained without."""
    code: int


def train_words(folder: Path, *more: object) -> list[object]:
    return ["train", folder / "run", folder / "glue", "--out", folder / "out", *QUICK, *more]


def do_both(folder: Path) -> Told:
    dropped = by_engine(replace(SETTING, dropout=0.3))
    return Told(folder, by_engine(), dropped, main_of("glue.py", *train_words(folder)))


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Told:
    folder = tmp_path_factory.mktemp("toy")
    write_model(folder / "run")
    write_toy_glue(folder / "glue")
    write_rows(folder / "glue/WNLI/dev.tsv", FILES["WNLI/dev.tsv"])
    (answer,) = run_on_ranks(do_both, 1, folder)
    assert isinstance(answer, Told)
    return answer


def test_a_fine_tuning_is_that_of_a_plain_loop_with_transformers_class(told: Told) -> None:
    found, expected = told.by_engine, by_hand()
    assert len(found.losses) == 12
    assert found.losses[0] == pytest.approx(math.log(3))  # heads at zero
    assert found.losses == pytest.approx(expected.losses, abs=1e-5)
    np.testing.assert_allclose(found.logits, expected.logits, atol=1e-5, rtol=1e-5)
    named = renamed({name: torch.from_numpy(weight) for name, weight in found.weights.items()})
    _, start = start_of()
    before = renamed(initial_weights(MAKE, start))
    for name, weight in expected.weights.items():
        np.testing.assert_allclose(named[name].numpy(), weight, atol=1e-5, err_msg=name)
        assert not torch.equal(named[name], before[name]), name


def test_dropout_is_the_settings_whatever_the_pre_training_had(told: Told) -> None:
    found, plain = told.dropped, told.by_engine
    assert found.losses[0] == pytest.approx(math.log(3))  # heads at zero
    differences = np.abs(np.array(found.losses) - np.array(plain.losses))
    assert (found.dropouts, plain.dropouts) == ((0.3, 0.3), (0.0, 0.0))
    assert differences[2:].max() > 1e-2
    assert differences.max() < 1  # nothing else is different


# -- GLUE --------------------------------------------------------------------------------------


def test_toy_tasks_are_learned(told: Told, capsys: pytest.CaptureFixture[str]) -> None:
    assert told.code == 0
    out = told.folder / "out/seed_1"
    files = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    tasks = ("SST-2", "MRPC", "STS-B")
    assert files == {
        "dev/WNLI.tsv",
        *(f"{task}.json" for task in tasks),
        *(f"{split}/{task}.tsv" for split in ("dev", "test") for task in tasks),
    }
    results = {task: json.loads((out / f"{task}.json").read_text()) for task in tasks}
    scores = {task: result["scores"] for task, result in results.items()}
    assert scores["SST-2"] == {"accuracy": 100.0}
    assert scores["MRPC"] == {"f1": 100.0, "accuracy": 100.0}
    assert min(scores["STS-B"].values()) > 95
    assert results["SST-2"]["precision"] == "fp32"
    assert results["SST-2"]["conditions"]["setting"]["learning_rate"] == 3e-3
    assert main_of("glue.py", "score", told.folder / "glue", out / "dev", "--json") == 0
    scored = json.loads(capsys.readouterr().out)["scores"]
    assert scored.pop("WNLI") == {"accuracy": 50.0}
    assert scored == {task: pytest.approx(own, abs=1e-4) for task, own in scores.items()}


def test_submissions_have_the_official_form(told: Told) -> None:
    out = told.folder / "out/seed_1/test"
    for task, allowed in (("SST-2", {"0", "1"}), ("MRPC", {"0", "1"})):
        head, *rows = [line.split("\t") for line in (out / f"{task}.tsv").read_text().splitlines()]
        assert head == ["index", "prediction"]
        assert [row[0] for row in rows] == [str(number) for number in range(7)]
        assert {row[1] for row in rows} == allowed
        # The toy's labels alternate, also those of the test file.
        assert [row[1] for row in rows] == [str(number % 2) for number in range(7)]
    rows = [line.split("\t") for line in (out / "STS-B.tsv").read_text().splitlines()[1:]]
    assert all(0 <= float(row[1]) <= 5 for row in rows)
    assert len({row[1] for row in rows}) > 2


def test_a_second_call_trains_nothing(told: Told, capsys: pytest.CaptureFixture[str]) -> None:
    results = [*(told.folder / "out/seed_1").glob("*.json")]
    before = {path: path.stat().st_mtime_ns for path in results}
    for more in ([], ["--processes", 3]):
        assert main_of("glue.py", *train_words(told.folder, "--json", *more)) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["tasks"]["SST-2"] == {"mean": 100.0, "half_width": None, "num_seeds": 1}
        assert found["skipped"]["WNLI"].startswith("is not trained")
        assert len(found["skipped"]) == 8
    assert {path: path.stat().st_mtime_ns for path in results} == before
    assert main_of("glue.py", *train_words(told.folder, "--learning-rate", 1e-3)) == 2
    assert "SST-2.json: is of another setting; give another --out" in capsys.readouterr().err
    (told.folder / "other").mkdir(exist_ok=True)
    other = write_model(told.folder / f"other/{os.getpid()}", seed=2)
    words = train_words(told.folder)
    assert main_of("glue.py", "train", other, *words[2:]) == 2
    assert "SST-2.json: is of another model; " in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in results} == before


def start_glue(folder: Path, *more: object) -> "subprocess.Popen[str]":
    """launch/glue.py train in a session of its own."""
    words = [str(word) for word in train_words(folder, *more)]
    return subprocess.Popen(
        [sys.executable, str(LAUNCH / "glue.py"), *words], env=environment(), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def wait_for(path: Path, process: "subprocess.Popen[str]", seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    write_model(tmp_path / "run")
    write_toy_glue(tmp_path / "glue")
    return tmp_path


@pytest.mark.slow
def test_a_killed_job_leaves_no_result_and_the_same_command_finishes(toy: Path) -> None:
    more = ["--tasks", "SST-2", "MRPC", "--epochs", 40]
    process = start_glue(toy, *more)
    first, second = (toy / f"out/seed_1/{task}.json" for task in ("SST-2", "MRPC"))
    wait_for(first, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not second.exists()
    before = first.stat().st_mtime_ns
    done = script("glue.py", *train_words(toy, *more))
    assert done.returncode == 0, done.stderr
    assert first.stat().st_mtime_ns == before
    assert json.loads(second.read_text())["scores"] == {"f1": 100.0, "accuracy": 100.0}
    assert "2 of 2" in done.stderr


@pytest.mark.slow
def test_ctrl_c_leaves_no_process_and_the_same_command_finishes(toy: Path) -> None:
    more = ["--tasks", "SST-2", "--seeds", 3, "--processes", 2]
    process = start_glue(toy, *more, "--epochs", 60)
    wait_for(toy / "out/seed_1/SST-2.json", process)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal sends it
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 3, errors
    assert errors.splitlines()[-1] == "error: stopped; the same command goes on from here"
    assert "Traceback" not in errors
    assert output == ""
    assert not of_session(process.pid)


@pytest.mark.slow
def test_two_processes_give_the_scores_of_one(toy: Path) -> None:
    more = ["--tasks", "SST-2", "STS-B", "--seeds", 2, "--epochs", 3]
    alone_ = script("glue.py", *train_words(toy, *more, "--json"))
    assert alone_.returncode == 0, alone_.stderr
    (toy / "out").rename(toy / "one")
    both = alone(
        [
            sys.executable,
            str(LAUNCH / "glue.py"),
            *map(str, train_words(toy, *more, "--json", "--processes", 2)),
        ]
    )
    assert both.returncode == 0, both.stderr
    results = [json.loads(done.stdout) for done in (alone_, both)]
    assert results[0]["tasks"] == results[1]["tasks"]
    assert [one["scores"] for one in results[0]["seeds"]] == [
        one["scores"] for one in results[1]["seeds"]
    ]  # fmt: skip
    for path in (toy / "one").rglob("*.tsv"):
        assert path.read_bytes() == (toy / "out" / path.relative_to(toy / "one")).read_bytes()
    seeds = [(toy / f"out/seed_{seed}/test/STS-B.tsv").read_bytes() for seed in (1, 2)]
    assert seeds[0] != seeds[1]
    assert "Traceback" not in both.stderr


@pytest.mark.slow
def test_a_loss_that_is_no_number_is_one_message(toy: Path) -> None:
    write_model(toy / "bad", factor=1e30)
    words = train_words(toy)
    done = script("glue.py", "train", toy / "bad", *words[2:], "--tasks", "SST-2")
    assert done.returncode == 2, done.stderr
    assert "error: SST-2 seed 1: step 1 of " in done.stderr
    assert "; try a smaller learning rate than 0.003" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (toy / "out/seed_1/SST-2.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", [
    "cpu_bf16", "zero2_fp16", "zero3_fp16", "zero3_offload_fp16", "multi_node_fp16",
    "multi_node_zero3_fp16",
])  # fmt: skip
def test_every_engine_of_pre_training_fine_tunes(name: str, toy: Path) -> None:
    path = ROOT / f"deepspeed_configs/{name}.json"
    done = script("glue.py", *train_words(toy, "--tasks", "SST-2", "--deepspeed_config", path))
    assert done.returncode == 0, done.stderr
    assert json.loads((toy / "out/seed_1/SST-2.json").read_text())["scores"]["accuracy"] > 95
