"""Parameter groups: weight decay, age and novelty apart, frozen parameters in none."""

import copy
from collections.abc import Iterable, Mapping

import pytest
import torch
from torch import Tensor, nn

from stacking.config import OptimizerConfig
from stacking.parameter_groups import ParameterGroup, parameter_groups
from stacking.snapshot import MOMENTS, Snapshot


def model() -> nn.Module:
    """Matrices 0.weight and 2.weight, vectors 0.bias, 1.weight, 1.bias, 2.bias."""
    return nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Linear(5, 2))


DECAYING = OptimizerConfig(weight_decay=0.3)
OLD = 5000  # steps, after which 1 - 0.999^steps is 1


def snapshot(of: nn.Module, steps: Mapping[str, int], new: Iterable[str] = ()) -> Snapshot:
    weights = {name: p.detach() for name, p in of.named_parameters()}
    moments = {key: {name: torch.zeros_like(weights[name]) for name in steps} for key in MOMENTS}
    found = Snapshot(weights, moments if steps else {}, dict(steps), frozenset(new))
    assert not found.faults()
    return found


def groups_of(
    steps: Mapping[str, int], new: Iterable[str] = (), optimizer: OptimizerConfig = DECAYING
) -> list[ParameterGroup]:
    return parameter_groups(model(), optimizer, snapshot(model(), steps, new))


def test_matrices_decay_and_biases_and_norms_do_not() -> None:
    decayed, plain = groups_of({})
    assert (decayed.weight_decay, decayed.names) == (0.3, ("0.weight", "2.weight"))
    assert (plain.weight_decay, plain.names) == (0.0, ("0.bias", "1.weight", "1.bias", "2.bias"))


def test_decay_all_is_one_group_as_in_2019() -> None:
    (group,) = groups_of({}, optimizer=OptimizerConfig(weight_decay=0.3, decay_all=True))
    assert group.weight_decay == 0.3
    assert len(group.names) == 6


def test_each_age_is_apart_and_new_ones_from_fresh_ones() -> None:
    steps = {"0.weight": 500, "0.bias": 500, "1.weight": 7}
    groups = groups_of(steps, new=["2.weight"])
    ages = [(g.weight_decay, g.optimizer_steps, g.is_new, g.names) for g in groups]
    assert ages == [
        (0.3, 500, False, ("0.weight",)),
        (0.3, 0, True, ("2.weight",)),
        (0.0, 500, False, ("0.bias",)),
        (0.0, 7, False, ("1.weight",)),
        (0.0, 0, False, ("1.bias", "2.bias")),
    ]


def test_the_order_does_not_depend_on_that_of_the_history() -> None:
    steps = {"0.weight": 500, "1.weight": 7, "2.bias": 9}
    assert groups_of(steps) == groups_of(dict(reversed(steps.items())))


def test_frozen_parameters_are_in_no_group_and_no_group_is_empty() -> None:
    frozen = model()
    for name, parameter in frozen.named_parameters():
        parameter.requires_grad = name == "0.weight"
    steps = dict.fromkeys(dict(frozen.named_parameters()), 4)
    (group,) = parameter_groups(frozen, OptimizerConfig(), snapshot(frozen, steps))
    assert group.names == ("0.weight",)
    given = group.for_optimizer(frozen)
    assert given["params"] == [frozen.get_parameter("0.weight")]
    assert set(given) == {"params", "weight_decay"}


def test_a_snapshot_that_contradicts_itself_says_how() -> None:
    weights = {"a": torch.ones(3), "b": torch.ones(2)}
    good = {key: {"a": torch.zeros(3)} for key in MOMENTS}
    cases: list[tuple[Snapshot, str]] = [
        (Snapshot(weights, good, {"a": 2, "b": 1}), "b: has either exp_avg or a step count"),
        (Snapshot(weights, good, {}), "a: has either exp_avg_sq or a step count"),
        (Snapshot(weights, good, {"a": 0}), "a: got 0 optimizer steps; allowed: 1 or more"),
        (Snapshot(weights, {"exp_avg": good["exp_avg"]}, {"a": 2}), "a: has either exp_avg_sq"),
        (Snapshot(weights, good | {"mean": {}}, {"a": 2}), "got 'mean'; allowed: exp_avg and"),
        (Snapshot({"a": torch.ones(4)}, good, {"a": 2}), r"a: exp_avg has shape [3], the weight"),
        (Snapshot({"b": torch.ones(4)}, good, {"a": 2}), "a: 2 optimizer steps, but no weight"),
        (Snapshot(weights, new_names=frozenset({"c"})), "c: new, but no weight"),
    ]
    for snapshot_, message in cases:
        assert message in "\n".join(snapshot_.faults())
    assert Snapshot(weights, good, {"a": 2}, frozenset({"b"})).faults() == []


def step_of_the_last(shares_count: bool) -> Tensor:
    """The first way of a fresh parameter beside an old one, in one group or in two."""
    torch.manual_seed(5)
    trained = copy.deepcopy(model())
    start = trained.get_parameter("2.weight").detach().clone()
    old = {"0.weight": OLD}
    groups = parameter_groups(trained, OptimizerConfig(weight_decay=0), snapshot(trained, old))
    adam = torch.optim.AdamW([group.for_optimizer(trained) for group in groups], lr=1e-3)
    for group, given in zip(groups, adam.param_groups, strict=True):
        for parameter in given["params"]:
            count = OLD if shares_count else group.optimizer_steps
            zeros = {key: torch.zeros_like(parameter) for key in MOMENTS}
            adam.state[parameter] = {"step": torch.tensor(float(count)), **zeros}
    trained(torch.randn(11, 3)).square().sum().backward()
    adam.step()
    return (trained.get_parameter("2.weight").detach() - start).abs()


def test_a_fresh_parameter_with_an_old_count_would_leap_and_ours_steps() -> None:
    # (1 - b1) / sqrt(1 - b2) = 3.16 at the defaults of torch, 0.9 and 0.999.
    assert float(step_of_the_last(shares_count=True).mean()) > 3.1e-3
    assert float(step_of_the_last(shares_count=False).mean()) == pytest.approx(1e-3, rel=1e-3)
