"""What happens to weights and moments between two stages of a recipe.

A switch inside the running process, one in a new process, and `launch/plan.py` all ask here.
"""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from stacking import distributed
from stacking.config import Learned, Recipe
from stacking.growth.learned import LearnedGrowth
from stacking.growth.moments import carry_moments
from stacking.growth.plan import Operators, before_learning, plan_growth
from stacking.growth.width_similarity import duplicate_similarity
from stacking.snapshot import Snapshot

CPU = torch.device("cpu")

LearningBatches = Callable[[Learned], Iterable[Mapping[str, Tensor]]]
"""Batches to learn a growth map on, as keyword arguments of BertForPreTraining.forward."""


class StageGrowth:
    """The growth on entry of one stage."""

    def __init__(self, recipe: Recipe, to_stage: int) -> None:
        """Plan the growth from stage `to_stage - 1`; GrowthError where it is illegal."""
        self.stage = recipe.stages[to_stage]
        self.source, self.target = recipe.stage_model(to_stage - 1), recipe.stage_model(to_stage)
        is_learned = self.stage.learned is not None
        self._middle = before_learning(self.source, self.target) if is_learned else self.target
        self.plan = plan_growth(self.source, self._middle, Operators.of(self.stage))
        self._seed = recipe.seed + to_stage

    @property
    def name(self) -> str:
        """The operators, as in reports."""
        if not self.stage.learned:
            return self.plan.name
        return "learned" if not self.plan.moves else f"{self.plan.name} + learned"

    @property
    def tolerance(self) -> float | None:
        """How far fp32 logits may move, relative to the largest; None: the function may change."""
        return None if self.stage.learned else self.plan.tolerance()

    @property
    def changes(self) -> dict[str, tuple[object, object]]:
        """The fields of the model that differ: before and after."""
        before, after = self.source.model_dump(), self.target.model_dump()
        return {key: (before[key], after[key]) for key in before if before[key] != after[key]}

    def apply(
        self,
        old: Snapshot | None,
        batches: LearningBatches | None = None,
        device: torch.device = CPU,
    ) -> Snapshot | None:
        """The state that the new stage begins with, on the main rank; None elsewhere. Collective.

        `old`: the main rank's; deterministic in its arguments. Learned growth draws on `batches`
        and computes on `device`, this rank's own.
        """
        grown = distributed.only_on_main(lambda: self._grow(old))
        if self.stage.learned is None:
            return grown
        assert batches is not None, "learned growth needs batches"
        learned = self._learn(grown, batches(self.stage.learned), self.stage.learned, device)
        return None if grown is None else Snapshot(learned, loss_scaler=grown.loss_scaler)

    def _grow(self, old: Snapshot | None) -> Snapshot:
        """The moves of the plan; the loss scale goes on, or fp16 would skip steps."""
        assert old is not None, "the main rank has no state to grow"
        weights = self.plan.grow(old.weights, seed=self._seed)
        if self.stage.learned is not None:
            return Snapshot(weights, loss_scaler=old.loss_scaler)
        carried = carry_moments(
            self.plan, old.weights, old.moments, old.optimizer_steps, self.stage.moments
        )
        return Snapshot(
            weights,
            carried.moments,
            carried.optimizer_steps,
            carried.new_names,
            old.loss_scaler,
        )

    def _learn(
        self,
        grown: Snapshot | None,
        batches: Iterable[Mapping[str, Tensor]],
        learned: Learned,
        device: torch.device,
    ) -> dict[str, Tensor]:
        """The main rank's learned weights; nothing elsewhere."""
        # One exchange a step: ranks that wait for minutes would take the main rank for dead.
        weights = {} if grown is None else grown.weights
        feed = iter(batches)
        learner = distributed.only_on_main(lambda: self._learner(weights, learned, device))
        for _ in range(learned.steps):
            distributed.only_on_main(lambda: learner and learner.step(next(feed)))
        return distributed.only_on_main(lambda: learner.result() if learner else {}) or {}

    def _learner(
        self, weights: Mapping[str, Tensor], learned: Learned, device: torch.device
    ) -> LearnedGrowth:
        return LearnedGrowth(
            weights,
            self._middle,
            self.target,
            device=device,
            learning_rate=learned.learning_rate,
            seed=self._seed,
        )

    def similarity(self, weights: Mapping[str, Tensor]) -> dict[str, float]:
        """Mean cosine between copies of the units that this growth duplicated, by kind of unit.

        1: the copies are locked and the width is wasted. Of the grown model, at any later step;
        empty where nothing was duplicated. See stacking/growth/width_similarity.py.
        """
        found: dict[str, float] = {}
        for plan in self.plan.width_plans():
            for kind, cosine in duplicate_similarity(weights, plan).items():
                found[kind] = max(cosine, found.get(kind, -1.0))
        return found
