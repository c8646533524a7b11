"""A recipe in; out, by arithmetic alone, what each stage costs and what growing can save.

No engine, no process group, no model in memory. Illegal growth is refused with every reason at
once. FLOPs are those of stacking/cost.py; "scratch" is the model at full size, trained whole on
sequences of full length for as many steps as all stages have together.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from stacking.branches import branch_runs
from stacking.config import BertConfig, DataConfig, Freeze, Recipe, Stage
from stacking.cost import (
    StateBytes,
    memory_bytes,
    num_parameters,
    trained_parameters,
    training_flops,
)
from stacking.deepspeed_config import (
    Accelerator,
    DeepSpeedConfig,
    ResolvedEngine,
    resolve_stages,
)
from stacking.errors import ConfigError
from stacking.growth.legality import recipe_faults
from stacking.growth.plan import Operators, before_learning, plan_growth
from stacking.schedule import base_rate, learning_rate, stage_start

ZeroStage = Literal[0, 1, 2, 3]
ZERO_STAGES: tuple[ZeroStage, ...] = get_args(ZeroStage)
LOWEST_CEILING = 1.1
"""Below this the best case lies in the range of no gain that Kaddour et al. 2023 (No Train No
Gain) measured for stacking, 1.0 to 1.1."""
ANY_GPU = Accelerator("cuda", supports_fp16=True, supports_bf16=True, fused_adam=True)
"""Plans are for a machine that runs each precision as the JSON asks for it."""


_IN_WORDS = {"ffn": "inner width", "hidden": "hidden size"}
_NEEDS = {
    "depth": "depth",
    "ffn": "inner width",
    "hidden": "hidden size",
    "heads": "hidden size",
    "positions": "positions",
    "moments": "model",
    "broken_promise": "model",
}
"""What must grow into a stage for its choice to matter."""


@dataclass(frozen=True)
class Entry:
    """How a stage's model comes from the one before."""

    operators: str  # such as "ffn tile + depth stack"
    tolerance: float | None  # of fp32 logits, relative to the largest; None: may change them
    grows: bool  # False where only training or the sequences change


@dataclass(frozen=True)
class PlannedStage:
    """One stage; FLOPs are of forward and backward, for the whole global batch."""

    model: BertConfig
    data: DataConfig
    steps: int
    first_step: int
    freeze: Freeze | None
    entry: Entry | None  # None: the first stage, random weights
    num_parameters: int
    num_trained: int
    step_flops: int
    entry_flops: int  # of learning the growth map (LiGO); 0 for every other operator
    rates: tuple[float, float]  # of the first and the last step, without re-warming

    @property
    def flops(self) -> int:
        """Of all steps, with those on the growth map."""
        return self.steps * self.step_flops + self.entry_flops

    @property
    def layer_units(self) -> int:
        """Steps x (1 a layer forward + 2 a trained layer backward): the count of papers."""
        layers = self.model.num_hidden_layers
        return self.steps * (layers + 2 * (layers - self.num_frozen_layers))

    @property
    def num_frozen_layers(self) -> int:
        """Bottom layers that run forward only."""
        return self.freeze.layers if self.freeze else 0

    def memory(self, zero_stage: ZeroStage, world_size: int, engine: ResolvedEngine) -> StateBytes:
        """What one rank holds all the time; autocast keeps its weights in fp32."""
        bits: Literal[16, 32] = 16 if engine.precision in ("fp16", "bf16") else 32
        return memory_bytes(
            self.model,
            zero_stage=zero_stage,
            world_size=world_size,
            bits=bits,
            adds_up_fp32=engine.precision == "bf16" and engine.adds_up_fp32,
            freeze=self.freeze,
        )


@dataclass(frozen=True)
class RecipePlan:
    """All stages beside training from scratch."""

    recipe: Recipe
    world_size: int
    engine_file: str
    engines: tuple[ResolvedEngine, ...]  # one a stage
    stages: tuple[PlannedStage, ...]
    scratch: PlannedStage

    @property
    def flops(self) -> int:
        """Of all stages."""
        return sum(stage.flops for stage in self.stages)

    @property
    def ceiling(self) -> float:
        """t0 / t, if time went by FLOPs: scratch over growing, for equally many steps."""
        return self.scratch.flops / self.flops

    @property
    def layers_ceiling(self) -> float:
        """The same by layers alone, without embeddings, heads and lengths."""
        return self.scratch.layer_units / sum(stage.layer_units for stage in self.stages)

    @property
    def largest(self) -> int:
        """Index of the stage with most to hold: parameters, and 3 more numbers a trained one."""
        sizes = [stage.num_parameters + 3 * stage.num_trained for stage in self.stages]
        return max(range(len(sizes)), key=lambda index: sizes[index])

    def memory(self) -> dict[ZeroStage, StateBytes]:
        """Of the largest stage on one rank, for each ZeRO stage, in the JSON's precision."""
        stage, engine = self.stages[self.largest], self.engines[self.largest]
        return {zero: stage.memory(zero, self.world_size, engine) for zero in ZERO_STAGES}

    @property
    def branches(self) -> tuple[int, int]:
        """How many runs the recipe branches into, and their FLOPs, without the steps they share."""
        return _branch_cost(self.recipe)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is legal and yet seldom wise, one line each."""
        return (
            *_decay_warnings(self.recipe, self.stages),
            *_ceiling_warnings(self),
            *_idle_warnings(self.recipe),
        )


def plan_recipe(recipe: Recipe, engine: DeepSpeedConfig, *, world_size: int) -> RecipePlan:
    """Plan all stages. ConfigError lists every illegal growth, and what the JSON cannot run."""
    if world_size < 1:
        raise ConfigError(f"--world-size: got {world_size}; allowed: 1 or more")
    faults = recipe_faults(recipe)
    engines: list[ResolvedEngine] = []
    try:
        engines = resolve_stages(
            engine, recipe, world_size=world_size, accelerator=ANY_GPU, strict_precision=True
        )
    except ConfigError as error:
        faults += error.faults
    if faults:
        raise ConfigError(faults)
    stages = tuple(_planned(recipe, index) for index in range(len(recipe.stages)))
    return RecipePlan(recipe, world_size, engine.source, tuple(engines), stages, _scratch(recipe))


def _planned(recipe: Recipe, index: int) -> PlannedStage:
    stage, first = recipe.stages[index], stage_start(index, recipe.stages)
    model, data, freeze = recipe.stage_model(index), recipe.stage_data(index), stage.freeze
    batch, length, predictions = (
        recipe.global_batch_size, data.max_seq_length, data.max_predictions_per_seq,
    )  # fmt: skip
    entry_flops = 0
    if index and stage.learned:
        examples = stage.learned.steps * stage.learned.batch_size
        entry_flops = training_flops(model, examples, length, predictions)
    return PlannedStage(
        model=model,
        data=data,
        steps=stage.steps,
        first_step=first,
        freeze=freeze,
        entry=_entry(recipe, index) if index else None,
        num_parameters=num_parameters(model),
        num_trained=trained_parameters(model, freeze),
        step_flops=training_flops(model, batch, length, predictions, freeze=freeze),
        entry_flops=entry_flops,
        rates=(base_rate(recipe, first), base_rate(recipe, first + stage.steps - 1)),
    )


def _branch_cost(recipe: Recipe) -> tuple[int, int]:
    count = flops = 0
    for run in branch_runs(recipe):
        stages = [_planned(run.recipe, index) for index in range(len(run.recipe.stages))]
        for stage in stages:
            shared = min(max(0, run.at - stage.first_step), stage.steps)
            flops += (stage.steps - shared) * stage.step_flops
            flops += stage.entry_flops if stage.first_step >= run.at else 0
        more, theirs = _branch_cost(run.recipe)
        count, flops = count + 1 + more, flops + theirs
    return count, flops


def _scratch(recipe: Recipe) -> PlannedStage:
    """The full model for all steps."""
    model, data = recipe.model, recipe.data
    size = num_parameters(model)
    flops = training_flops(
        model, recipe.global_batch_size, data.max_seq_length, data.max_predictions_per_seq
    )
    steps, rate = recipe.total_steps, recipe.learning_rate
    ends = (learning_rate(0, rate, steps), learning_rate(steps - 1, rate, steps))
    return PlannedStage(model, data, steps, 0, None, None, size, size, flops, 0, ends)


def _entry(recipe: Recipe, index: int) -> Entry:
    stage, target = recipe.stages[index], recipe.stage_model(index)
    source, operators = recipe.stage_model(index - 1), Operators.of(stage)
    learned = []
    if stage.learned:
        steps, target = stage.learned.steps, before_learning(source, target)
        learned = [f"learned map ({steps:,} steps)"]
    growth = plan_growth(source, target, operators)
    names = [move.name for move in growth.moves] + learned
    if names:
        return Entry(" + ".join(names), None if learned else growth.tolerance(), grows=True)
    differs = recipe.stage_data(index) != recipe.stage_data(index - 1)
    return Entry("nothing but sequences" if differs else "nothing grows", 0.0, grows=False)


def _decay_warnings(recipe: Recipe, stages: Sequence[PlannedStage]) -> list[str]:
    if recipe.learning_rate.scope == "stage":
        return []  # asked for: each stage starts anew
    places = [
        f"stage {number} (step {stage.first_step:,}, {stage.rates[0]:.2g})"
        for number, stage in enumerate(stages, 1)
        if stage.entry and stage.entry.grows and _decays_at(recipe, stage)
    ]
    if not places:
        return []
    return [
        f"the learning rate, at most {recipe.learning_rate.peak:.2g}, is decaying at the switch to "
        f"{', '.join(places)}; grown models recover best while it is constant: use schedule 'wsd' "
        "and switch before its decay"
    ]


def _idle_warnings(recipe: Recipe) -> list[str]:
    """Choices on entry that have no effect, as their dimension does not grow there."""
    warnings = []
    for index, stage in enumerate(recipe.stages):
        grows = _growing_dimensions(recipe, index)
        for name, needs in _NEEDS.items():
            chosen = getattr(stage, name)
            if chosen != Stage.model_fields[name].default and needs not in grows:
                why = f"no {needs} grows there" if index else "nothing grows into the first stage"
                warnings.append(f"stages.{index}.{name}: {chosen!r} has no effect: {why}")
    return warnings


def _growing_dimensions(recipe: Recipe, index: int) -> set[str]:
    """What operators grow on entry; "model" if there is a stage before."""
    if index == 0:
        return set()
    stage = recipe.stages[index]
    source, target = recipe.stage_model(index - 1), recipe.stage_model(index)
    if stage.learned:
        target = before_learning(source, target)
    moves = plan_growth(source, target, Operators.of(stage)).moves
    return {"model"} | {_IN_WORDS.get(move.dimension, move.dimension) for move in moves}


def _ceiling_warnings(plan: RecipePlan) -> list[str]:
    if len(plan.stages) == 1 or plan.ceiling >= LOWEST_CEILING:
        return []
    return [
        f"the ceiling is {plan.ceiling:.2f}x, below {LOWEST_CEILING}x, and no run reaches its "
        "ceiling; grow later, or from a smaller model"
    ]


def _decays_at(recipe: Recipe, stage: PlannedStage) -> bool:
    """Whether the rate falls into the stage's first step, or out of it."""
    first = stage.first_step
    before, here, after = (base_rate(recipe, step) for step in (first - 1, first, first + 1))
    return before > here or here > after
