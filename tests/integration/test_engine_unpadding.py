"""An engine that leaves padding out trains as one that computes it, on two ranks under ZeRO."""

from dataclasses import dataclass, replace

import pytest
import torch
from engines import OPTIMIZER, STILL, batch, fresh_weights, settings
from ranks import run_on_ranks

from stacking import distributed, engine
from stacking.dataset import MaskedLMBatch
from stacking.engine import TrainEngine
from stacking.snapshot import Snapshot

CASES = [(0, "fp32"), (1, "fp32"), (3, "fp32"), (1, "bf16_fp32")]
MOST_DIFFERENCE = {"fp32": 2e-5, "bf16_fp32": 0.02}
LENGTHS = [[7, 2, 1], [3, 7, 7], [7, 7, 7], [1, 1, 1]]  # of steps in turn; one has no padding


@dataclass(frozen=True)
class Trained:
    """What one engine did."""

    losses: list[float]
    evaluated: list[float]
    layouts: list[bool]  # whether each forward had one


def padded(step: int) -> MaskedLMBatch:
    """The batch of engines.py, its rows cut; rank 1 has the lengths of another step."""
    whole = batch(step)
    lengths = torch.tensor(LENGTHS[(step + distributed.rank()) % len(LENGTHS)])
    mask = torch.arange(7) < lengths[:, None]
    is_real = whole.masked_lm_positions < lengths[:, None]
    return replace(
        whole,
        input_ids=whole.input_ids.masked_fill(~mask, 0),
        attention_mask=mask,
        masked_lm_positions=whole.masked_lm_positions.where(is_real, 0),
        masked_lm_ids=whole.masked_lm_ids.where(is_real, -100),
        num_masked=int(is_real.sum()),
        num_real_tokens=int(lengths.sum()),
    )


def trained(zero_stage: int, precision: str, *, unpads: bool) -> Trained:
    resolved = replace(settings(zero_stage, precision), unpads=unpads)
    built = TrainEngine(STILL, OPTIMIZER, resolved, Snapshot(fresh_weights(STILL)))  # type: ignore[arg-type]
    layouts: list[bool] = []
    built._engine.module.register_forward_pre_hook(
        lambda module, args, kwargs: layouts.append(kwargs.get("layout") is not None),
        with_kwargs=True,
    )
    losses = []
    for step in range(6):
        given = padded(step)
        counts = torch.tensor([float(given.num_masked), 3.0])
        counts = distributed.sum_over_ranks(counts).clamp(min=1)
        sums = built.train_step([given], learning_rate=1e-2, counts=counts, seed=step)
        losses.append(float(distributed.sum_over_ranks(sums.clone())[:2].sum() / counts.sum()))
    evaluated = built.evaluate(iter([padded(9)]))[:2].tolist()
    built.destroy()
    return Trained(losses, evaluated, layouts)


def train_all() -> dict[tuple[int, str], tuple[Trained, Trained]]:
    """Without and with, in one process group."""
    engine.start()
    found = {case: (trained(*case, unpads=False), trained(*case, unpads=True)) for case in CASES}
    distributed.shut_down()
    return found


@pytest.fixture(scope="module")
def answers() -> list[dict[tuple[int, str], tuple[Trained, Trained]]]:
    """By rank."""
    return run_on_ranks(train_all, 2)  # type: ignore[return-value]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_losses_are_those_of_the_padded_engine(
    case: tuple[int, str], answers: list[dict[tuple[int, str], tuple[Trained, Trained]]]
) -> None:
    for rank, answer in enumerate(answers):
        with_padding, without = answer[case]
        most = MOST_DIFFERENCE[case[1]]
        assert without.losses == pytest.approx(with_padding.losses, abs=most)
        assert without.evaluated == pytest.approx(with_padding.evaluated, rel=most * 5)
        assert not any(with_padding.layouts)
        full = [(step + rank) % len(LENGTHS) == 2 for step in (*range(6), 9)]
        assert without.layouts == [not is_full for is_full in full]
