"""stacking.growth.moments: what Adam knows of each number after growth, held to a plain Adam."""

import math

import pytest
import torch
from torch import Tensor

from stacking.config import BertConfig
from stacking.growth.contract import parameter_shapes
from stacking.growth.moments import Carried, Policy, carry_moments
from stacking.growth.plan import GrowthPlan, Operators, plan_growth
from stacking.snapshot import Snapshot

SMALL = BertConfig(
    vocab_size=23,
    hidden_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=6,
    max_position_embeddings=7,
)
DEEP = SMALL.model_copy(update={"num_hidden_layers": 5})
WIDE = SMALL.model_copy(update={"intermediate_size": 12})
BOTH = DEEP.model_copy(update={"intermediate_size": 12})
LR, EPS, BETAS = 1e-2, 1e-8, (0.9, 0.999)


def state(seed: int) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """Random weights, and moments whose squares are positive."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {
        key: {name: torch.randn(shape, generator=generator)
              for name, shape in parameter_shapes(SMALL).items()}
        for key in ("weight", "exp_avg", "exp_avg_sq")
    }  # fmt: skip
    squares = {name: tensor.square() + 0.01 for name, tensor in drawn["exp_avg_sq"].items()}
    return drawn["weight"], {"exp_avg": drawn["exp_avg"], "exp_avg_sq": squares}


def grown(
    target: BertConfig, policy: Policy, steps: int = 400, operators: Operators | None = None
) -> tuple[GrowthPlan, dict[str, dict[str, Tensor]], dict[str, int], frozenset[str]]:
    plan = plan_growth(SMALL, target, operators or Operators())
    weights, moments = state(3)
    carried = carry_moments(plan, weights, moments, dict.fromkeys(weights, steps), policy)
    return plan, carried.moments, carried.optimizer_steps, carried.new_names


def layer(name: str) -> int | None:
    return int(name.split(".")[2]) if name.startswith("encoder.layers.") else None


@pytest.mark.parametrize("target", [DEEP, WIDE, BOTH])
def test_reset_forgets_everything(target: BertConfig) -> None:
    _, moments, steps, _ = grown(target, "reset")
    assert moments == {}
    assert steps == {}


@pytest.mark.parametrize("policy", ["reset", "keep", "grow", "seed_v"])
def test_only_whole_layers_are_new(policy: Policy) -> None:
    new_names = grown(BOTH, policy)[3]
    assert new_names == {name for name in parameter_shapes(BOTH) if (layer(name) or 0) >= 2}
    assert grown(WIDE, policy)[3] == frozenset()


def test_keep_leaves_old_layers_as_they_were_and_new_ones_without_history() -> None:
    _, moments, steps, _ = grown(DEEP, "keep")
    _, before = state(3)
    old = {name for name in parameter_shapes(DEEP) if (layer(name) or 0) < 2}
    assert steps == dict.fromkeys(old, 400)
    for key in ("exp_avg", "exp_avg_sq"):
        assert moments[key].keys() == old
        for name in old:
            assert torch.equal(moments[key][name], before[key][name])


def test_grow_gives_each_copy_the_moments_of_its_origin() -> None:
    _, moments, steps, _ = grown(DEEP, "grow")
    _, before = state(3)
    assert steps == dict.fromkeys(parameter_shapes(DEEP), 400)
    for name in parameter_shapes(DEEP):
        index = layer(name)
        origin = name if index is None else name.replace(f".{index}.", f".{index % 2}.", 1)
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(moments[key][name], before[key][origin])


def test_seed_v_gives_copies_the_second_moment_alone() -> None:
    _, moments, steps, new_names = grown(DEEP, "seed_v")
    assert steps == dict.fromkeys(parameter_shapes(DEEP), 400)
    for name in new_names:
        assert not moments["exp_avg"][name].any()
        assert (moments["exp_avg_sq"][name] > 0).all()


@pytest.mark.parametrize("policy", ["keep", "seed_v"])
@pytest.mark.parametrize("ffn", ["tile", "split", "zero"])
def test_inside_a_widened_tensor_no_number_starts_without_a_second_moment(
    policy: Policy, ffn: str
) -> None:
    plan, moments, steps, _ = grown(WIDE, policy, operators=Operators(ffn=ffn))
    assert set(steps.values()) == {400}
    ones = {name: torch.ones(shape) for name, shape in parameter_shapes(SMALL).items()}
    is_old = plan.grow(ones, kind="is_old")
    for name in steps:
        assert (moments["exp_avg_sq"][name] > 0).all()
        assert torch.equal(moments["exp_avg"][name] != 0, is_old[name] == 1)
    name = "encoder.layers.0.feed_forward.inner.weight"
    rows = moments["exp_avg_sq"][name]
    if ffn == "zero":  # no origin: the mean of the numbers that have one
        torch.testing.assert_close(rows[6:], rows[:6].mean().expand(6, 8))
    if ffn == "tile":
        assert torch.equal(rows[6:], rows[:6])


def test_what_was_frozen_has_no_history() -> None:
    plan = plan_growth(SMALL, DEEP, Operators())
    weights, moments = state(3)
    kept = {key: {n: t for n, t in named.items() if (layer(n) or 0) == 1}
            for key, named in moments.items()}  # fmt: skip
    counts = dict.fromkeys(kept["exp_avg"], 70)
    carried = carry_moments(plan, weights, kept, counts, "grow")
    expected = {n for n in parameter_shapes(DEEP) if layer(n) in (1, 3)}
    assert carried.moments["exp_avg"].keys() == carried.optimizer_steps.keys() == expected
    assert set(carried.optimizer_steps.values()) == {70}


def test_each_layer_takes_the_count_of_its_origin() -> None:
    plan = plan_growth(SMALL, DEEP, Operators())
    weights, moments = state(3)
    counts = {name: 900 if layer(name) == 0 else 70 for name in weights}
    carried = carry_moments(plan, weights, moments, counts, "grow")
    for name, count in carried.optimizer_steps.items():
        index = layer(name)
        assert count == (900 if index is not None and index % 2 == 0 else 70)


def adam_steps(
    gradients: list[Tensor], mean: Tensor, square: Tensor, count: int
) -> tuple[list[Tensor], Tensor, Tensor]:
    """The updates of a hand-written Adam (Kingma and Ba 2015, algorithm 1)."""
    updates = []
    for gradient in gradients:
        count += 1
        mean = BETAS[0] * mean + (1 - BETAS[0]) * gradient
        square = BETAS[1] * square + (1 - BETAS[1]) * gradient.square()
        corrected = mean / (1 - BETAS[0] ** count)
        updates.append(LR * corrected / ((square / (1 - BETAS[1] ** count)).sqrt() + EPS))
    return updates, mean, square


def test_the_trap_that_cohorts_avoid() -> None:
    """Fresh moments with an old count: up to 6.5 times the rate; with their own count never."""
    gradients = [torch.ones(1)] * 100
    zero = torch.zeros(1)
    shared, own = (adam_steps(gradients, zero, zero, count)[0] for count in (100_000, 0))
    assert max(float(update) / LR for update in shared) == pytest.approx(6.5, abs=0.1)
    assert max(float(update) / LR for update in own) == pytest.approx(1.0, abs=1e-5)
    # Seeded with the second moment of such gradients, the old count does no harm either.
    seeded = adam_steps(gradients, zero, torch.ones(1), 100_000)[0]
    assert max(float(update) / LR for update in seeded) <= 1.0 + 1e-5


def test_grown_moments_go_on_like_the_small_models_where_growth_is_exact() -> None:
    """FFN tile without noise: the small model's gradient mapped on, Adam's update is the mapped
    one in every tensor whose factor is 1, and the count makes no difference."""
    plan, moments, steps, _ = grown(WIDE, "grow", operators=Operators(ffn="split"))
    _, before = state(3)
    name = "embeddings.word_embeddings.weight"
    gradient = torch.randn(23, 8, generator=torch.Generator().manual_seed(1))
    ours = adam_steps([gradient] * 3, moments["exp_avg"][name], moments["exp_avg_sq"][name],
                      steps[name])[0]  # fmt: skip
    theirs = adam_steps([gradient] * 3, before["exp_avg"][name], before["exp_avg_sq"][name], 400)[0]
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their)
    assert math.isfinite(float(ours[0].sum()))


def test_a_tensor_of_two_origins_takes_the_larger_count() -> None:
    """AKI fills layer 0's further units from layer 1: their second moments are warm, too."""
    plan = plan_growth(SMALL, WIDE, Operators(ffn="aki"))
    weights, moments = state(3)
    for counts in ((900, 70), (70, 900)):
        steps = {name: counts[layer(name) or 0] for name in weights}
        carried = carry_moments(plan, weights, moments, steps, "grow")
        inner = "encoder.layers.{}.feed_forward.inner.weight"
        assert carried.optimizer_steps[inner.format(0)] == 900
        assert carried.optimizer_steps[inner.format(1)] == counts[1]


MUONS = [name for name, shape in parameter_shapes(SMALL).items()
         if layer(name) is not None and len(shape) == 2]  # fmt: skip


def with_muon(policy: Policy, target: BertConfig) -> tuple[GrowthPlan, Carried]:
    """Muon's matrices and Adam's rest, grown together."""
    plan = plan_growth(SMALL, target, Operators())
    weights, moments = state(3)
    mixed = {key: {n: t for n, t in named.items() if n not in MUONS}
             for key, named in moments.items()}  # fmt: skip
    mixed["momentum_buffer"] = {name: moments["exp_avg"][name] for name in MUONS}
    steps = dict.fromkeys(weights, 400)
    return plan, carry_moments(plan, weights, mixed, steps, policy)


@pytest.mark.parametrize("target", [DEEP, WIDE, BOTH])
@pytest.mark.parametrize("policy", ["reset", "keep", "grow", "seed_v"])
def test_muons_momentum_grows_as_adams_first_moment(policy: Policy, target: BertConfig) -> None:
    found = with_muon(policy, target)[1]
    adams = grown(target, policy)
    if policy == "reset":
        assert found.moments == {}
        assert found.optimizer_steps == {}
        return
    momenta = found.moments["momentum_buffer"]
    expected = {n for n in adams[1]["exp_avg"] if n.rsplit(".", 1)[-1] == "weight" and
                layer(n) is not None and len(parameter_shapes(target)[n]) == 2}  # fmt: skip
    if policy == "seed_v":  # where there is no second moment nothing is left to seed
        expected = {name for name in expected if name not in found.new_names}
    assert momenta.keys() == expected
    assert all(torch.equal(momenta[name], adams[1]["exp_avg"][name]) for name in expected)
    assert momenta.keys().isdisjoint(found.moments["exp_avg"])
    assert found.optimizer_steps.keys() == momenta.keys() | found.moments["exp_avg_sq"].keys()
    assert found.new_names == adams[3]
    zeros = {name: torch.zeros(shape) for name, shape in parameter_shapes(target).items()}
    grown_state = Snapshot(zeros, found.moments, found.optimizer_steps, found.new_names)
    assert grown_state.faults() == []
