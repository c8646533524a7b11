"""Is a recipe's growth possible, and does it make sense? A recipe in, every fault out, by field."""

from stacking.config import BertConfig, DataConfig, Learned, Recipe, Stage
from stacking.growth.depth import DEPTH_OPERATORS
from stacking.growth.learned import learned_faults
from stacking.growth.plan import (
    GrowthPlan,
    Operators,
    before_learning,
    growth_faults,
    plan_growth,
)


def recipe_faults(recipe: Recipe) -> list[str]:
    """Every illegal growth of a recipe, as "stages.2.depth: got ..."; no engine, no weights."""
    faults = []
    for index, stage in enumerate(recipe.stages):
        found = _pooling_faults(recipe.stage_model(index), recipe.stage_data(index))
        found += _entry_faults(recipe, index) if index else _first_stage_faults(stage)
        faults += [f"stages.{index}.{fault}" for fault in found]
    return faults


def _pooling_faults(model: BertConfig, data: DataConfig) -> list[str]:
    """A window as long as the sequence; one over all tokens but [CLS] is coarse, but a pool."""
    if model.pooling == "none" or model.pooling_size < data.max_seq_length:
        return []
    return [
        f"pooling_size: got {model.pooling_size} with sequences of {data.max_seq_length} tokens; "
        f"allowed: 2 to {data.max_seq_length - 1}, because [CLS] stays outside the pool"
    ]


def _first_stage_faults(stage: Stage) -> list[str]:
    """What asks for a model before the first."""
    if stage.learned is None:
        return []
    return [
        f"learned: got {stage.learned.steps} steps in the first stage, where nothing grows; "
        "allowed: from the second stage on"
    ]


def _entry_faults(recipe: Recipe, index: int) -> list[str]:
    """The growth on entry of stage `index` > 0, by the names of the stage's own fields."""
    stage, operators = recipe.stages[index], Operators.of(recipe.stages[index])
    source, target = recipe.stage_model(index - 1), recipe.stage_model(index)
    if stage.learned:
        middle = before_learning(source, target)
        faults = growth_faults(source, middle, operators) or learned_faults(middle, target)
        faults += _learned_stage_faults(stage, stage.learned, recipe.global_batch_size)
    else:
        faults = growth_faults(source, target, operators)
        if not faults:
            plan = plan_growth(source, target, operators)
            faults = _rewarm_faults(stage, plan) + _frozen_faults(stage, plan)
    # A stage states no positions: they follow from its sequences.
    return [fault.replace("max_position_embeddings:", "max_seq_length:", 1) for fault in faults]


def _learned_stage_faults(stage: Stage, learned: Learned, global_batch_size: int) -> list[str]:
    """What needs old numbers, of which a map that mixes all layers leaves none; large batches."""
    faults = []
    if learned.batch_size > global_batch_size:
        faults.append(
            f"learned.batch_size: got {learned.batch_size}; allowed: at most global_batch_size, "
            f"{global_batch_size}: one rank computes it at once"
        )
    if stage.moments != "reset":
        faults.append(
            f"moments: got {stage.moments!r} with a learned map, which mixes all layers, so that "
            "no number has a history; allowed: 'reset'"
        )
    if stage.rewarm and stage.rewarm.parameters == "new":
        faults.append(
            "rewarm.parameters: got 'new' with a learned map, after which all parameters are; "
            "allowed: 'all'"
        )
    return faults


def _rewarm_faults(stage: Stage, plan: GrowthPlan) -> list[str]:
    """Only depth and an untied decoder bring whole parameters; width makes old ones larger."""
    if stage.rewarm is None or stage.rewarm.parameters != "new":
        return []
    if any(move.dimension in ("decoder", "depth") for move in plan.moves):
        return []
    return [
        f"rewarm.parameters: got 'new' where no parameter is wholly new (growth: {plan.name}); "
        "allowed: 'all', or a growth in depth or by an untied decoder"
    ]


def _frozen_faults(stage: Stage, plan: GrowthPlan) -> list[str]:
    """What has just been drawn at random must not be frozen: it would never learn anything."""
    if stage.freeze is None:
        return []
    sizes = plan.source.num_hidden_layers, plan.target.num_hidden_layers
    layers = DEPTH_OPERATORS[stage.depth].layers(*sizes)
    frozen = [new for new, old in enumerate(layers[: stage.freeze.layers]) if old is None]
    faults = []
    if frozen:
        faults.append(
            f"freeze.layers: got {stage.freeze.layers}, but depth {stage.depth!r} draws layer "
            f"{frozen[0]} (from 0) at random; allowed: 1 to {frozen[0]}, or a depth that copies"
        )
    if stage.positions == "fresh" and any(move.dimension == "positions" for move in plan.moves):
        faults.append(
            "positions: got 'fresh' in a stage that freezes the embeddings, so that the new "
            "positions stay random; allowed: 'tile' or 'interpolate', or no freeze"
        )
    return faults
