"""Counts and moments through optimizers that count as DeepSpeed's FusedAdam and both LAMBs do.

The kernels themselves need a GPU. What is imitated here, their bookkeeping, is guarded in
test_engine.py, apex's in tests/gpu.
"""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from stacking.config import OptimizerConfig
from stacking.optimizer_state import OptimizerState
from stacking.parameter_groups import parameter_groups
from stacking.snapshot import MOMENTS, Snapshot

OPTIMIZER = OptimizerConfig(betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
OLD, STEPS, RATE = 500, 5, 1e-2


class CountsInTheLast(torch.optim.Optimizer):
    """AdamW of which only a group's last parameter counts; all of them step by that count."""

    def __init__(self, groups: list[dict[str, object]]) -> None:
        super().__init__(groups, {"lr": RATE, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        beta1, beta2 = OPTIMIZER.betas
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["step"] = 0
                    state |= {key: torch.zeros_like(p) for key in MOMENTS}
            state["step"] += 1
            for p in group["params"]:
                mean, square = (self.state[p][key] for key in MOMENTS)
                mean.lerp_(p.grad, 1 - beta1)
                square.lerp_(p.grad.square(), 1 - beta2)
                mean_hat = mean / (1 - beta1 ** state["step"])
                square_hat = square / (1 - beta2 ** state["step"])
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(group["lr"] * mean_hat / (square_hat.sqrt() + OPTIMIZER.eps))


class CountsByParameter(CountsInTheLast):
    """The same update with DeepSpeed's FusedLamb's state: a number for each parameter."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for p in (p for group in self.param_groups for p in group["params"]):
            if not self.state[p]:
                self.state[p] = {"step": 0, **{key: torch.zeros_like(p) for key in MOMENTS}}
        counts = {p: state["step"] for p, state in self.state.items()}
        super().step()
        for p, count in counts.items():
            self.state[p]["step"] = count + 1


class CountsInTheGroup(CountsInTheLast):
    """The same update with apex's FusedLAMB's state: a count for each group, in the group."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for p in group["params"]:
                if not self.state[p]:
                    self.state[p] = {key: torch.zeros_like(p) for key in MOMENTS}
            self.state[group["params"][-1]]["step"] = group["step"] - 1
        super().step()
        for state in self.state.values():
            state.pop("step", None)


CountsInTheGroup.__module__ = "apex.optimizers.fused_lamb"  # by which it is known


def start() -> Snapshot:
    """Layer 0 is old, layer 1 fresh; two parameters of each share a group."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    steps = {name: OLD for name in weights if not name.startswith("1.")}
    moments = {key: {n: 0.1 + torch.rand_like(weights[n]) for n in steps} for key in MOMENTS}
    return Snapshot(weights, moments, steps)


def trained(snapshot: Snapshot, kind: type[CountsInTheLast] | None) -> Snapshot:
    """A few steps from `snapshot`, and a rebuild between, as when a run is resumed."""
    for part in (range(STEPS), range(STEPS, 2 * STEPS)):
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2))
        model.load_state_dict(snapshot.weights)
        groups = parameter_groups(model, OPTIMIZER, snapshot)
        given = [group.for_optimizer(model) for group in groups]
        adam: torch.optim.Optimizer
        if kind is None:  # torch's has a count for each parameter
            adam = torch.optim.AdamW(given, lr=RATE, betas=OPTIMIZER.betas, eps=OPTIMIZER.eps)
        else:
            adam = kind(given)
        engine = SimpleNamespace(module=model, optimizer=adam, device=torch.device("cpu"))
        state = OptimizerState(engine, groups)
        state.write(snapshot)
        for step in part:
            inputs = torch.randn(7, 3, generator=torch.Generator().manual_seed(step))
            adam.zero_grad()
            model(inputs).square().sum().backward()
            adam.step()
        found = state.read()
        assert found is not None
        snapshot = found
    return snapshot


def largest_difference(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    return max(float((first[name] - second[name]).abs().max()) for name in first)


@pytest.mark.parametrize("kind", [CountsInTheLast, CountsByParameter, CountsInTheGroup])
def test_a_count_is_found_wherever_an_optimizer_keeps_it(kind: type[CountsInTheLast]) -> None:
    begun = start()
    ours, expected = trained(begun, kind), trained(begun, None)
    assert ours.optimizer_steps == expected.optimizer_steps
    assert ours.optimizer_steps == {
        name: 2 * STEPS + begun.optimizer_steps.get(name, 0) for name in begun.weights
    }
    assert largest_difference(ours.weights, expected.weights) < 1e-6
    for key in MOMENTS:
        assert largest_difference(ours.moments[key], expected.moments[key]) < 1e-5


def test_what_has_not_stepped_has_no_history() -> None:
    begun = start()
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    groups = parameter_groups(model, OPTIMIZER, begun)
    adam = CountsInTheLast([group.for_optimizer(model) for group in groups])
    state = OptimizerState(SimpleNamespace(module=model, optimizer=adam, device="cpu"), groups)
    state.write(begun)
    found = state.read()
    assert found is not None
    assert found.optimizer_steps == begun.optimizer_steps
    for key in MOMENTS:
        assert found.moments[key].keys() == begun.optimizer_steps.keys()
        assert largest_difference(found.moments[key], begun.moments[key]) == 0
