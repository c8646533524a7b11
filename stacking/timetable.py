"""What a run does after which optimizer step, besides training: pure arithmetic of its recipe."""

from dataclasses import dataclass

from stacking.branches import branch_steps
from stacking.config import Recipe
from stacking.schedule import stage_start


@dataclass(frozen=True)
class Due:
    """What comes after one step."""

    tag: str  # of a checkpoint made there
    saves: bool
    evaluates: bool


class Timetable:
    """Of one recipe."""

    def __init__(self, recipe: Recipe) -> None:
        """Steps at which stages end and branches leave are known from now on."""
        self._recipe = recipe
        self._branch_steps = branch_steps(recipe)
        stages = recipe.stages
        self._stage_ends = {stage_start(index + 1, stages) for index in range(len(stages))}

    def after(self, global_step: int) -> Due:
        """`global_step` optimizer steps are done."""
        recipe, leaves = self._recipe, global_step in self._branch_steps
        ends = global_step in self._stage_ends
        return Due(
            tag=f"{'branch' if leaves else 'step'}_{global_step:08d}",
            saves=leaves or global_step % recipe.checkpoint.every_steps == 0,
            evaluates=leaves or ends or global_step % recipe.evaluation.every_steps == 0,
        )
