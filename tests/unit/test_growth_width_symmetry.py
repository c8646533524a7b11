"""Whether the copies of duplicated units come apart in training, and stay locked where nothing
sets them apart.
"""

import pytest
import torch
from torch import Tensor

from stacking.config import BertConfig
from stacking.growth import Operators, plan_growth
from stacking.growth.width import WidthOperator, WidthPlan, cyclic_units, units_with_fresh
from stacking.growth.width_ffn import FfnAki, FfnSplit, FfnTile
from stacking.growth.width_hidden import HiddenAki, HiddenDuplicate, HiddenFpi, HiddenUneven
from stacking.growth.width_similarity import duplicate_similarity
from stacking.modeling import BertForPreTraining, init_weights

Weights = dict[str, Tensor]

CONFIG = BertConfig(
    vocab_size=37,
    hidden_size=12,
    num_hidden_layers=2,
    num_attention_heads=3,
    intermediate_size=20,
    max_position_embeddings=11,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)
LENGTH = 7
INNER = "encoder.layers.0.feed_forward.inner.weight"


def with_inner(size: int) -> BertConfig:
    return CONFIG.model_copy(update={"intermediate_size": size})


def with_heads(heads: int) -> BertConfig:
    return CONFIG.model_copy(update={"num_attention_heads": heads, "hidden_size": 4 * heads})


def fresh_weights(config: BertConfig) -> Weights:
    model = BertForPreTraining(config).double()
    init_weights(model, torch.Generator().manual_seed(9))
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def grown(operator: WidthOperator, weights: Weights, target: BertConfig) -> Weights:
    return operator.grow(
        weights,
        CONFIG,
        target,
        fresh=fresh_weights(target),
        generator=torch.Generator().manual_seed(5),
    )


def train(config: BertConfig, weights: Weights, steps: int) -> Weights:
    """Masked words of a periodic language, plain AdamW from empty moments, no dropout."""
    model = BertForPreTraining(config).double().train()
    model.load_state_dict(weights)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.98), weight_decay=0.01)
    generator = torch.Generator().manual_seed(7)
    positions = torch.tensor([[2, 5]]).expand(8, 2)
    for _ in range(steps):
        start = torch.randint(0, 8, (8, 1), generator=generator)
        ids = 5 + (start + 3 * torch.arange(LENGTH)) % 32
        labels = ids.gather(1, positions)
        losses = model(
            ids.scatter(1, positions, 4),
            masked_lm_positions=positions,
            masked_lm_ids=labels,
            next_sentence_labels=start[:, 0] % 2,
        )
        loss = losses["mlm_loss_sum"] / labels.numel() + losses["nsp_loss_sum"] / 8
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.fixture(scope="module")
def trained() -> Weights:
    """A small model that has learned something before it grows."""
    return train(CONFIG, fresh_weights(CONFIG), 50)


def similarity_after(
    trained: Weights, operator: WidthOperator, target: BertConfig
) -> tuple[dict[str, float], dict[str, float]]:
    """duplicate_similarity right after growth and 50 steps later."""
    large = grown(operator, trained, target)
    plan = operator.plan(CONFIG, target)
    before = duplicate_similarity(large, plan)
    return before, duplicate_similarity(train(target, large, 50), plan)


def test_without_noise_copies_stay_locked(trained: Weights) -> None:
    for operator, target in [
        (FfnTile(noise=0.0), with_inner(40)),
        (HiddenDuplicate(noise=0.0), with_heads(6)),
    ]:
        assert operator.contract(CONFIG).symmetry == "asymmetric optimizer state only"
        before, after = similarity_after(trained, operator, target)
        assert before == pytest.approx(dict.fromkeys(before, 1.0), abs=1e-12)
        assert after == pytest.approx(dict.fromkeys(after, 1.0), abs=1e-9)


@pytest.mark.parametrize(
    ("operator", "bounds"),
    [
        (FfnTile(), {"ffn": 0.96}),
        (FfnTile(noise=1.0), {"ffn": 0.92}),
        (FfnSplit(), {"ffn": 0.99}),
        (FfnSplit(alpha=0.75), {"ffn": 0.975}),
        (FfnAki(), {"ffn": 0.94}),
    ],
    ids=str,
)
def test_ffn_copies_come_apart(
    trained: Weights, operator: WidthOperator, bounds: dict[str, float]
) -> None:
    before, after = similarity_after(trained, operator, with_inner(40))
    if not isinstance(operator, FfnAki):
        assert before == pytest.approx({"ffn": 1.0}, abs=1e-12)
    assert after["ffn"] < bounds["ffn"]


@pytest.mark.parametrize(
    ("operator", "heads", "bounds"),
    [
        (HiddenDuplicate(), 6, {"embeddings": 0.999, "heads": 0.85, "hidden": 0.98}),
        (HiddenDuplicate(heads="zero"), 6, {"embeddings": 0.999, "hidden": 0.985}),
        (HiddenUneven(), 6, {"embeddings": 0.99, "heads": 0.98, "hidden": 0.99, "mlm_head": 0.9}),
        (HiddenFpi(), 4, {"embeddings": 0.999, "heads": 0.9, "hidden": 0.98}),
        (HiddenAki(), 6, {"embeddings": 0.999, "heads": 0.85, "hidden": 0.98, "mlm_head": 0.97}),
    ],
    ids=str,
)
def test_hidden_copies_come_apart(
    trained: Weights,
    operator: WidthOperator,
    heads: int,
    bounds: dict[str, float],
) -> None:
    before, after = similarity_after(trained, operator, with_heads(heads))
    assert before["embeddings"] == pytest.approx(1.0, abs=1e-12)
    for key, bound in bounds.items():
        assert after[key] < bound, key


@pytest.mark.parametrize(
    ("operators", "bounds"),
    [
        (
            Operators("stack"),
            {"embeddings": 0.999, "heads": 0.9, "hidden": 0.95, "ffn": 0.97},
        ),
        (
            Operators("identity_exact", heads="zero"),
            {"embeddings": 0.999, "hidden": 0.97, "ffn": 0.97},
        ),
        (
            Operators("identity_exact", hidden="uneven", ffn="split"),
            {"embeddings": 0.995, "heads": 0.99, "hidden": 0.99, "ffn": 0.99, "mlm_head": 0.95},
        ),
    ],
    ids=str,
)
def test_copies_come_apart_where_hidden_inner_width_and_depth_grow_together(
    trained: Weights, operators: Operators, bounds: dict[str, float]
) -> None:
    changes = {"intermediate_size": 40, "num_hidden_layers": 4}
    target = with_heads(6).model_copy(update=changes)
    plan = plan_growth(CONFIG, target, operators)
    large = plan.grow(trained, seed=5)
    before, after = (
        {key: value for width in plan.width_plans()
         for key, value in duplicate_similarity(tensors, width).items()}
        for tensors in (large, train(target, large, 50))
    )  # fmt: skip
    for key in ("embeddings", "ffn"):  # the noise is not on what these are read off
        assert before[key] == pytest.approx(1.0, abs=1e-12)
    assert set(bounds) <= set(after)
    for key, bound in bounds.items():
        assert after[key] < bound, (key, after)


def test_only_layers_that_hold_copies_are_compared() -> None:
    """Of four layers two are fresh: their rows are no copies, whatever they look like."""
    target = with_inner(40).model_copy(update={"num_hidden_layers": 4})
    for depth, layers in (("identity_exact", {0, 1}), ("stack", {0, 1, 2, 3})):
        (width,) = plan_growth(CONFIG, target, Operators(depth, ffn="split")).width_plans()
        assert set(width.inner) == layers
    target = with_heads(6).model_copy(update={"num_hidden_layers": 4})
    plan = plan_growth(CONFIG, target, Operators("identity_exact", hidden="uneven"))
    grown = plan.grow(fresh_weights(CONFIG), seed=5)
    (width,) = plan.width_plans()
    assert width.new_layers == {2, 3}
    assert duplicate_similarity(grown, width)["hidden"] == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize(
    ("operator", "least"),
    [(HiddenDuplicate(noise=0.0), 0.0), (HiddenDuplicate(), 0.1), (HiddenUneven(), 0.1)],
    ids=str,
)
def test_hidden_values_are_equal_copies_at_first_and_differ_after_training(
    trained: Weights, operator: WidthOperator, least: float
) -> None:
    target = with_heads(6)
    large = grown(operator, trained, target)
    for tensors, lowest, highest in [
        (large, 0.0, 1e-14),
        (train(target, large, 50), least, 1.0 if least else 1e-12),
    ]:
        model = BertForPreTraining(target).double()
        model.load_state_dict(tensors)
        with torch.no_grad():
            hidden = model(5 + torch.arange(21).view(3, LENGTH))["last_hidden_state"]
        first, second = hidden[..., :12], hidden[..., 12:]
        assert lowest <= ((first - second).norm() / hidden.norm()).item() <= highest


def test_similarity_is_the_mean_cosine_with_the_first_copy() -> None:
    plan = WidthPlan(inner={0: cyclic_units(2, 5)})
    rows = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0], [2.0, 0.0], [0.0, 1.0]])
    assert duplicate_similarity({INNER: rows}, plan) == {"ffn": pytest.approx(1 / 3)}


def test_fresh_units_have_no_similarity() -> None:
    plan = WidthPlan(inner={0: units_with_fresh(2, 4)})
    assert duplicate_similarity({INNER: torch.ones(4, 3)}, plan) == {}


def test_without_noise_the_last_layer_of_aki_stays_locked_and_one_such_layer_is_seen(
    trained: Weights,
) -> None:
    """The last layer has no next one to copy: the others come apart and must not hide it."""
    plan_of, target = FfnAki(noise=0.0), with_inner(40)
    before, after = similarity_after(trained, plan_of, target)
    assert before["ffn"] == pytest.approx(1.0, abs=1e-12)
    assert after["ffn"] == pytest.approx(1.0, abs=1e-9)
