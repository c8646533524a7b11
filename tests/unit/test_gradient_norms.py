"""stacking.gradient_norms: where the norms are told, and where they are not.

tests/integration/test_engine_telemetry.py holds them against a plain model under every ZeRO stage.
"""

from types import SimpleNamespace

import pytest
import torch

from stacking.gradient_norms import CohortNorms
from stacking.parameter_groups import ParameterGroup

OLD = ParameterGroup(0.01, 7, False, ("old",))
NEW = ParameterGroup(0.01, 0, True, ("new",))
NEW_BIASES = ParameterGroup(0.0, 0, True, ("bias",))
GRADIENTS = {
    0: [torch.tensor([3.0, 0.0]), torch.tensor([4.0])],
    1: [torch.full((2, 2), 6.0)],
    2: [torch.tensor([5.0])],
}


def engine(**wrapper: object) -> SimpleNamespace:
    return SimpleNamespace(optimizer=SimpleNamespace(**wrapper), device=torch.device("cpu"))


def test_groups_of_one_age_are_taken_together_and_the_loss_scale_taken_out() -> None:
    norms = CohortNorms(engine(averaged_gradients=GRADIENTS), [OLD, NEW, NEW_BIASES])
    assert norms.is_known
    assert norms.measure(1.0).tolist() == [5.0, 13.0]
    assert norms.measure(4.0).tolist() == [1.25, 3.25]


def test_parts_of_a_group_at_zero_3_count_for_it() -> None:
    owners = {0: 0, 1: 1, 2: 0}
    parted = engine(averaged_gradients=GRADIENTS, sub_group_to_group_id=owners)
    assert CohortNorms(parted, [OLD, NEW]).measure(1.0).tolist() == pytest.approx([50**0.5, 12.0])


def test_a_rank_without_any_of_a_group_adds_nothing() -> None:
    norms = CohortNorms(engine(averaged_gradients={0: GRADIENTS[0], 1: []}), [OLD, NEW])
    assert norms.measure(1.0).tolist() == [5.0, 0.0]


@pytest.mark.parametrize(
    ("groups", "wrapper"),
    [
        ([OLD], {}),
        ([NEW, NEW_BIASES], {}),
        ([OLD, ParameterGroup(0.01, 0, True, ("matrix",), muon_columns=8)], {}),
        ([OLD, NEW], {"cpu_offload": True}),
        ([OLD, NEW], {"offload_optimizer": True}),
    ],
)
def test_what_cannot_be_known_is_not_told(
    groups: list[ParameterGroup], wrapper: dict[str, object]
) -> None:
    assert not CohortNorms(engine(**wrapper), groups).is_known
