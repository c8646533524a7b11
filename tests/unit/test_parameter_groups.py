"""Parameter groups: weight decay, age and novelty apart, frozen parameters in none."""

import copy
from collections.abc import Iterable, Mapping

import pytest
import torch
from torch import Tensor, nn

from stacking.config import BertConfig, OptimizerConfig
from stacking.errors import ConfigError
from stacking.modeling import BertForPreTraining
from stacking.parameter_groups import ParameterGroup, check_history, parameter_groups
from stacking.snapshot import MOMENTS, MOMENTUM, Snapshot


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
        (
            Snapshot(weights, good | {"mean": {}}, {"a": 2}),
            "got 'mean'; allowed: exp_avg and exp_avg_sq, or",
        ),
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


def bert_groups(new: Iterable[str] = ()) -> list[ParameterGroup]:
    """Those of a BERT of H 6 and F 10, of which layer 0 has a history."""
    config = BertConfig(
        vocab_size=11, hidden_size=6, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=10, max_position_embeddings=5,
    )  # fmt: skip
    with torch.device("meta"):
        bert = BertForPreTraining(config)
    steps = {name: 8 for name, _ in bert.named_parameters() if name.startswith("encoder.layers.0")}
    known = Snapshot({}, {}, steps, frozenset(new))
    return parameter_groups(bert, DECAYING, known, with_muon=True)


def test_muon_updates_the_matrices_of_the_layers_by_their_columns() -> None:
    groups = bert_groups()
    muon = [(g.muon_columns, g.optimizer_steps, g.names) for g in groups if g.muon_columns]
    inner = "encoder.layers.{}.feed_forward.output.weight"
    wide = [f"encoder.layers.{{}}.{n}.weight" for n in
            ("attention.qkv", "attention.output", "feed_forward.inner")]  # fmt: skip
    assert muon == [
        (6, 8, tuple(name.format(0) for name in wide)),
        (10, 8, (inner.format(0),)),
        (6, 0, tuple(name.format(1) for name in wide)),
        (10, 0, (inner.format(1),)),
    ]
    adams = {name for group in groups if not group.muon_columns for name in group.names}
    assert {"embeddings.word_embeddings.weight", "mlm_head.dense.weight", "nsp_head.pooler.weight",
            "encoder.layers.0.attention.qkv.bias"} <= adams  # fmt: skip
    assert {group.moments for group in groups} == {MOMENTS, (MOMENTUM,)}
    assert all(group.weight_decay == 0.3 for group in groups if group.muon_columns)


@pytest.mark.parametrize("shape", [(36, 12), (12, 12), (12, 48)])
def test_one_peak_suits_muon_and_adam(shape: tuple[int, int]) -> None:
    """torch's own factor, of which DeepSpeed has put the part of the rows on its update."""
    group = ParameterGroup(0.3, 0, False, ("a",), muon_columns=shape[1])
    by_deepspeed = max(1.0, shape[0] / shape[1]) ** 0.5
    matched = torch.optim._muon._adjust_lr(1.0, "match_rms_adamw", torch.Size(shape))
    assert group.rate_factor * by_deepspeed == pytest.approx(matched)
    holder = nn.Module()
    holder.a = nn.Parameter(torch.ones(shape))
    given = group.for_optimizer(holder)
    assert given["use_muon"] is True
    assert isinstance(given["weight_decay"], float)
    assert given["weight_decay"] * group.rate_factor == pytest.approx(0.3)  # rate times decay
    assert ParameterGroup(0.3, 0, False, ("a",)).rate_factor == 1.0


def test_a_history_of_muon_is_whole_or_a_fault() -> None:
    weights = {"a": torch.ones(3, 2), "b": torch.ones(2)}
    momentum = {MOMENTUM: {"a": torch.zeros(3, 2)}}
    adam = {key: {"b": torch.zeros(2)} for key in MOMENTS}
    assert Snapshot(weights, momentum, {"a": 4}).faults() == []
    assert Snapshot(weights, momentum | adam, {"a": 4, "b": 4}).faults() == []
    cases = [
        (Snapshot(weights, momentum, {}), "a: has either momentum_buffer or a step count"),
        (Snapshot(weights, momentum, {"a": 1, "b": 1}), "b: has either exp_avg or a step count"),
        (Snapshot(weights, momentum | {k: {"a": torch.zeros(3, 2)} for k in MOMENTS}, {"a": 1}),
         "a: has both exp_avg and momentum_buffer"),
        (Snapshot({"a": torch.ones(2, 3)}, momentum, {"a": 1}), "a: momentum_buffer has shape"),
    ]  # fmt: skip
    for found, message in cases:
        assert message in "\n".join(found.faults())


def test_the_history_of_another_optimizer_is_refused() -> None:
    ours = [
        ParameterGroup(0.3, 4, False, ("a",), muon_columns=2),
        ParameterGroup(0, 4, False, ("b",)),
    ]
    weights = {"a": torch.ones(3, 2), "b": torch.ones(2)}
    steps = {"a": 4, "b": 4}
    of_adam = {key: {name: torch.zeros_like(w) for name, w in weights.items()} for key in MOMENTS}
    of_muon = {MOMENTUM: {"a": weights["a"]}} | {key: {"b": weights["b"]} for key in MOMENTS}
    check_history(ours, Snapshot(weights, of_muon, steps))
    check_history(ours, Snapshot(weights))
    with pytest.raises(ConfigError, match=r"got 'Muon', but .* Adam's history of 1 parameters \(a"):
        check_history(ours, Snapshot(weights, of_adam, steps))
    plain = [ParameterGroup(0.3, 4, False, ("a", "b"))]
    check_history(plain, Snapshot(weights, of_adam, steps))
    with pytest.raises(ConfigError, match="got 'AdamW', but .* Muon's history"):
        check_history(plain, Snapshot(weights, of_muon, steps))
