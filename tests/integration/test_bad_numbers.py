"""A loss or gradient that is no number stops all ranks before the update, and is kept."""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from engines import CASES, STILL, batch, build, fresh_weights, state_of, train
from launching import ROOT, pretrain, rows
from ranks import run_on_ranks
from safetensors.torch import load_file

from stacking import distributed, engine
from stacking.checkpoint import Checkpoint
from stacking.engine import TrainEngine
from stacking.errors import NonFiniteError
from stacking.snapshot import Snapshot

COUNTS = torch.tensor([12.0, 6.0])
UNTIED = STILL.model_copy(update={"tie_word_embeddings": False})
WORDS, BAD_ID = "embeddings.word_embeddings.weight", 52  # an id of the bad sequence alone


@dataclass(frozen=True)
class Answer:
    """What one rank saw of one fault."""

    message: str
    is_unchanged: bool
    micro_losses: list[float]


def step_with(trained: TrainEngine, bad_rank: int, counts: torch.Tensor) -> str:
    """A step in which `bad_rank` reads the bad word; what the fault says."""
    ids = batch(5).input_ids.clamp(max=BAD_ID - 1)
    if distributed.rank() == bad_rank:
        ids[1, 2] = BAD_ID
    given = replace(batch(5), input_ids=ids)
    try:
        trained.train_step([given], learning_rate=1e-2, counts=counts, seed=1)
    except NonFiniteError as fault:
        return str(fault)
    return ""


def faulty(zero_stage: int, precision: str, kind: str) -> Answer:
    """Two good steps, then a bad one: of the loss on rank 1 alone, or of the gradient alone."""
    trained = build(zero_stage, precision, Snapshot(fresh_weights(UNTIED)), UNTIED)
    train(trained, range(2))
    before = state_of(trained)
    if kind == "loss":
        trained.destroy()
        poisoned = {**before.weights, WORDS: before.weights[WORDS].clone()}
        poisoned[WORDS][BAD_ID] = torch.inf
        before = replace(before, weights=poisoned)
        trained = build(zero_stage, precision, before, UNTIED)
        message = step_with(trained, 1, COUNTS)
    else:  # losses are sums; what divides them makes the gradient infinite
        message = step_with(trained, -1, torch.tensor([1e-40, 1e-40]))
    after = state_of(trained)
    is_unchanged = is_equal(before.weights, after.weights) and all(
        is_equal(before.moments[key], after.moments[key]) for key in before.moments
    )
    found = Answer(message, is_unchanged, trained.micro_losses)
    trained.destroy()
    return found


def is_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


def faulty_everywhere() -> dict[tuple[int, str, str], Answer]:
    engine.start()
    found = {(*case, kind): faulty(*case, kind) for case in CASES for kind in ("loss", "gradient")}
    distributed.shut_down()
    return found


@pytest.fixture(scope="module")
def answers() -> list[dict[tuple[int, str, str], Answer]]:
    """By rank."""
    return run_on_ranks(faulty_everywhere, 2)  # type: ignore[return-value]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_infinite_loss_on_one_rank_stops_both_before_the_update(
    case: tuple[int, str], answers: list[dict[tuple[int, str, str], Answer]]
) -> None:
    for rank, answer in enumerate(answers):
        found = answer[(*case, "loss")]
        assert "the loss is not finite" in found.message
        assert found.is_unchanged
        assert [math.isfinite(loss) for loss in found.micro_losses] == [rank == 0]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_infinite_gradient_stops_both_before_the_update(
    case: tuple[int, str], answers: list[dict[tuple[int, str, str], Answer]]
) -> None:
    for answer in answers:
        found = answer[(*case, "gradient")]
        assert "the gradient norm is not finite" in found.message
        assert found.is_unchanged
        assert all(math.isfinite(loss) for loss in found.micro_losses)


def test_a_run_that_diverges_keeps_the_step_for_an_autopsy(tiny_data: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    config = ROOT / "deepspeed_configs" / "cpu_fp32.json"
    # A rate times decay of 10,000 multiplies every matrix by that in each step.
    changes = ["model.vocab_size=400", "model.type_vocab_size=2", "learning_rate.peak=100",
               "optimizer.weight_decay=100", "stages.0.steps=60",
               "checkpoint.every_steps=1"]  # fmt: skip
    command: list[object] = [
        "--recipe", ROOT / "launch" / "recipes" / "tiny_test.json", "--data", tiny_data,
        "--run-dir", run_dir, "--deepspeed_config", config,
        *(word for change in changes for word in ("--set", change)),
    ]  # fmt: skip
    done = pretrain(2, *command)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    [folder] = (run_dir / "autopsy").iterdir()
    report = json.loads((folder / "report.json").read_text())
    step = report["step"]
    assert f"step {step}: " in done.stderr
    assert folder.name == f"step_{step:08d}"
    assert str(folder) in done.stderr
    assert f"step_{step - 1:08d}" in {path.name for path in (run_dir / "checkpoints").iterdir()}
    assert max(int(str(row["global_step"])) for row in rows(run_dir, "save")) == step - 1
    samples = [index for rank in report["ranks"] for micro in rank
               for index in micro["sample_indices"]]  # fmt: skip
    assert len(samples) == 12
    assert any(str(index) in done.stderr for index in samples)
    kept = Checkpoint(folder)
    kept.verify()
    assert kept.state.global_step == step - 1
    batches = load_file(folder / "batches.safetensors")
    assert batches["rank1/micro0/input_ids"].shape[1] == 32
