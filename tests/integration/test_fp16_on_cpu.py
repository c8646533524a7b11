"""fp16 on a CPU, where tiny models run: the loss scale over rebuilds, overflows, and its floor.

DeepSpeed refuses fp16 where oneDNN has no fast kernels for it; the tests tell it otherwise.
"""

from dataclasses import dataclass, replace

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from engines import OPTIMIZER, STILL, Settings, fresh_weights, settings, state_of, train
from ranks import run_on_ranks

from stacking import distributed, engine
from stacking.engine import TrainEngine
from stacking.errors import NonFiniteError
from stacking.snapshot import LossScaler, Snapshot

ZERO_STAGES = (1, 2, 3)
RATE = 1e-3


def fp16(zero_stage: int, **numbers: float) -> Settings:
    """Settings with these numbers in the JSON's fp16 block."""
    made = settings(zero_stage, "fp16")
    return replace(made, deepspeed=made.deepspeed | {"fp16": {"enabled": True, **numbers}})


def build(made: Settings, snapshot: Snapshot | None) -> TrainEngine:
    return TrainEngine(STILL, OPTIMIZER, made, snapshot)  # type: ignore[arg-type]


def fresh() -> Snapshot:
    return Snapshot(fresh_weights(STILL))


@dataclass(frozen=True)
class Found:
    """What one rank saw under one ZeRO stage."""

    first_scale: float | None
    overflow_scales: list[float]  # after each step from a scale of 2**32
    moved: list[bool]  # whether each of these steps changed a weight
    skipped: int
    is_same: bool  # a run with rebuilds and one without
    scalers: list[LossScaler | None]  # of both at the end
    losses: tuple[list[float], list[float]]
    floor: str  # the fault's text
    scale_at_floor: list[float | None]
    kept_at_floor: bool
    fixed: str


def overflows(zero_stage: int) -> tuple[list[float], list[bool], int]:
    """From 2**32 every step overflows until the scale has fallen far enough."""
    trained = build(fp16(zero_stage, initial_scale_power=32, hysteresis=1), fresh())
    scales, moved = [], []
    before = state_of(trained)
    for step in range(24):
        train(trained, range(step, step + 1), RATE)
        after = state_of(trained)
        scales.append(trained.loss_scale or 0.0)
        moved.append(any(not torch.equal(after.weights[n], w) for n, w in before.weights.items()))
        before = after
    skipped = trained.skipped_steps
    trained.destroy()
    return scales, moved, skipped


def interrupted(zero_stage: int, stops: set[int]) -> tuple[list[float], Snapshot]:
    """Losses of 16 steps and the end, with a rebuild before each of `stops`.

    The scale falls at every overflow from the second on, and grows after three good steps.
    """
    made = fp16(zero_stage, initial_scale_power=26, hysteresis=2, loss_scale_window=3)
    trained, losses = build(made, fresh()), []
    for step in range(16):
        if step in stops:
            middle = trained.snapshot()
            trained.destroy()
            trained = build(made, middle)
        losses += train(trained, range(step, step + 1), RATE)
    end = state_of(trained)
    trained.destroy()
    return losses, end


def at_the_floor(zero_stage: int) -> tuple[str, list[float | None], bool]:
    """What is said when the lowest scale overflows, too; the scales; whether weights stayed."""
    numbers = {"initial_scale_power": 32, "hysteresis": 1, "min_loss_scale": 2.0**30}
    trained = build(fp16(zero_stage, **numbers), fresh())
    text, scales = "", []
    for step in range(5):
        try:
            train(trained, range(step, step + 1), RATE)
        except NonFiniteError as error:
            text = str(error)
            break
        finally:
            scales.append(trained.loss_scale)
    weights = state_of(trained).weights
    is_kept = all(torch.equal(weights[name], w) for name, w in fresh().weights.items())
    trained.destroy()
    return text, scales, is_kept


def with_a_fixed_scale(zero_stage: int) -> str:
    """What an overflow at a static scale ends in."""
    trained = build(fp16(zero_stage, loss_scale=2.0**32), fresh())
    try:
        train(trained, range(1), RATE)
    except NonFiniteError as error:
        return str(error)
    finally:
        trained.destroy()
    return ""


def find(zero_stage: int) -> Found:
    plain = build(fp16(zero_stage), fresh())
    first_scale = plain.loss_scale
    plain.destroy()
    scales, moved, skipped = overflows(zero_stage)
    whole, whole_end = interrupted(zero_stage, set())
    parts, parts_end = interrupted(zero_stage, {1, 2, 5, 6, 11})
    floor, at_floor, is_kept = at_the_floor(zero_stage)
    return Found(
        first_scale=first_scale,
        overflow_scales=scales,
        moved=moved,
        skipped=skipped,
        is_same=all(torch.equal(parts_end.weights[n], w) for n, w in whole_end.weights.items()),
        scalers=[whole_end.loss_scaler, parts_end.loss_scaler],
        losses=(whole, parts),
        floor=floor,
        scale_at_floor=at_floor,
        kept_at_floor=is_kept,
        fixed=with_a_fixed_scale(zero_stage),
    )


def find_all(zero_stages: tuple[int, ...]) -> dict[int, Found]:
    """In one process group."""
    type(get_accelerator()).is_fp16_supported = lambda self: True
    engine.start()
    found = {zero_stage: find(zero_stage) for zero_stage in zero_stages}
    distributed.shut_down()
    return found


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(stages, marks=pytest.mark.slow, id=name)
        for name, stages in (("zero3", (3,)), ("1-2", (1, 2)))
    ],
)
def answers(request: pytest.FixtureRequest) -> list[Found]:
    """Of two ranks and these ZeRO stages."""
    by_rank = run_on_ranks(find_all, 2, request.param)
    return [found for answer in by_rank for found in answer.values()]  # type: ignore[attr-defined]


def test_the_scale_starts_at_two_to_the_sixteen(answers: list[Found]) -> None:
    assert {found.first_scale for found in answers} == {2.0**16}


def test_an_overflow_skips_the_step_halves_the_scale_and_is_counted(answers: list[Found]) -> None:
    for found in answers:
        before, after = [2.0**32, *found.overflow_scales], found.overflow_scales
        for moved, old, new in zip(found.moved, before, after, strict=False):
            assert new == (old if moved else old / 2)
        assert found.skipped == found.moved.count(False)
        assert not any(found.moved[:3])
        assert any(found.moved)


def test_scale_and_counters_go_on_over_rebuilds_bit_for_bit(answers: list[Found]) -> None:
    for found in answers:
        whole, parts = found.scalers
        assert parts == whole
        assert whole is not None
        assert whole.steps == 16
        assert whole.skipped_steps >= 2
        assert found.losses[1] == found.losses[0]
        assert found.is_same


def test_an_overflow_at_the_floor_is_fatal_and_changes_nothing(answers: list[Found]) -> None:
    for found in answers:
        assert "smallest loss scale" in found.floor
        assert "fp16.min_loss_scale" in found.floor
        assert found.scale_at_floor == [2.0**31, 2.0**30, 2.0**30]
        assert found.kept_at_floor


def test_an_overflow_at_a_fixed_scale_says_what_to_set(answers: list[Found]) -> None:
    for found in answers:
        assert "fixed loss scale 4.29497e+09" in found.fixed
        assert "fp16.loss_scale" in found.fixed
