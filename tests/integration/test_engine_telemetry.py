"""What an engine tells of a step and an evaluation, on two ranks under every ZeRO stage."""

import functools
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from engines import CASES, OPTIMIZER, STILL, batch, fresh_weights, settings, state_of
from ranks import run_on_ranks

from stacking import distributed, engine
from stacking.engine import TrainEngine
from stacking.modeling import BertForPreTraining
from stacking.snapshot import Snapshot

NEW = frozenset(name for name in fresh_weights(STILL) if name.startswith("encoder.layers.1."))
RELATIVE = {"fp32": 1e-4, "bf16": 0.03, "bf16_fp32": 0.03}
MICRO_STEPS = 2
Case = tuple[int, str]
QUICK = ((0, "fp32"), (3, "bf16"), (1, "bf16_fp32"))
"""The gradients lie in other places in each; ZeRO 1 to 3 in fp32 are slow tests."""


def weights() -> dict[str, torch.Tensor]:
    """With noise, so that no LayerNorm leaves hidden states of size 1."""
    generator = torch.Generator().manual_seed(4)
    return {
        name: value + 0.3 * torch.randn(value.shape, generator=generator)
        for name, value in fresh_weights(STILL).items()
    }


@dataclass(frozen=True)
class Told:
    """What one engine told on one rank, step by step."""

    norms: list[dict[str, float]]
    grad_norms: list[float]
    residual_rms: list[float]
    weights: dict[str, np.ndarray]  # that it evaluated


def told(zero_stage: int, precision: str) -> Told:
    """Two steps of two micro batches, of which the second is logged, and one evaluation."""
    resolved = replace(settings(zero_stage, precision), log_every=2)
    resolved.deepspeed["gradient_accumulation_steps"] = MICRO_STEPS
    resolved.deepspeed["train_batch_size"] = 3 * MICRO_STEPS * distributed.world_size()
    snapshot = Snapshot(weights(), new_names=NEW)
    built = TrainEngine(STILL, OPTIMIZER, resolved, snapshot)  # type: ignore[arg-type]
    norms, grad_norms = [], []
    counts = torch.tensor([6.0, 3.0]) * MICRO_STEPS * distributed.world_size()
    for step in range(2):
        given = [batch(MICRO_STEPS * step + micro) for micro in range(MICRO_STEPS)]
        built.train_step(given, learning_rate=0.0, counts=counts, seed=step)
        norms.append(built.cohort_grad_norms)
        grad_norms.append(built.grad_norm or 0.0)
    built.evaluate(iter([batch(9), batch(10)]))
    evaluated = {name: value.numpy() for name, value in state_of(built).weights.items()}
    answer = Told(norms, grad_norms, built.residual_rms, evaluated)
    built.destroy()
    return answer


def tell_all(cases: tuple[Case, ...]) -> dict[Case, Told]:
    """In one process group."""
    engine.start()
    found = {case: told(*case) for case in cases}
    distributed.shut_down()
    return found


@functools.cache
def tell_on_ranks(cases: tuple[Case, ...]) -> list[dict[Case, Told]]:
    """By rank."""
    return run_on_ranks(tell_all, 2, cases)  # type: ignore[return-value]


def answers(case: Case) -> list[Told]:
    """By rank."""
    cases = QUICK if case in QUICK else tuple(case for case in CASES if case not in QUICK)
    return [answer[case] for answer in tell_on_ranks(cases)]


each_case = pytest.mark.parametrize(
    "case",
    [pytest.param(c, id=f"{c}", marks=() if c in QUICK else pytest.mark.slow) for c in CASES],
)


def expected_norms(step: int) -> dict[str, float]:
    """One fp32 model on one process, on what both ranks trained on."""
    model = BertForPreTraining(STILL)
    model.load_state_dict(weights())
    for micro in range(MICRO_STEPS):
        for rank in range(2):
            given = batch(MICRO_STEPS * step + micro, rank).inputs()
            sums = model(**given)
            loss = sums["mlm_loss_sum"] / 24
            if "nsp_loss_sum" in sums:
                loss = loss + sums["nsp_loss_sum"] / 12
            loss.backward()
    found = {}
    for label, is_new in (("grad_norm_old", False), ("grad_norm_new", True)):
        gradients = [p.grad.flatten() for name, p in model.named_parameters()
                     if p.grad is not None and (name in NEW) == is_new]  # fmt: skip
        found[label] = float(torch.cat(gradients).norm())
    return found


@each_case
def test_gradients_of_old_and_new_parameters_are_measured_apart(
    case: Case,
) -> None:
    expected = expected_norms(1)
    assert expected["grad_norm_old"] > 1.05 * expected["grad_norm_new"]  # or they could be swapped
    for answer in answers(case):
        not_logged, logged = answer.norms
        assert not_logged == {}
        assert logged == pytest.approx(expected, rel=RELATIVE[case[1]])
        total = sum(norm**2 for norm in logged.values()) ** 0.5
        assert total == pytest.approx(answer.grad_norms[1], rel=RELATIVE[case[1]])


@each_case
def test_an_evaluation_says_how_large_the_hidden_states_of_its_first_batch_are(
    case: Case,
) -> None:
    main, other = answers(case)
    assert other.residual_rms == []
    model = BertForPreTraining(STILL).eval()
    model.load_state_dict({name: torch.from_numpy(w) for name, w in main.weights.items()})
    seen: list[torch.Tensor] = []
    model.embeddings.register_forward_hook(lambda m, args, out: seen.append(out))
    for layer in model.encoder.layers:
        layer.register_forward_hook(lambda m, args, out: seen.append(out[0]))
    given = batch(9, rank=0)
    model(given.input_ids, given.token_type_ids)
    read = torch.cat([torch.zeros(3, 1, dtype=torch.int64), given.masked_lm_positions], dim=1)
    seen[-1] = seen[-1].gather(1, read[..., None].expand(-1, -1, STILL.hidden_size))
    sizes = [float(states.detach().square().mean().sqrt()) for states in seen]
    assert len({round(size, 2) for size in sizes}) == 3
    assert main.residual_rms == pytest.approx(sizes, rel=RELATIVE[case[1]])
