"""Depths in; out, the seconds of an optimizer step of each on this machine, on random batches.

The only part of planning that needs DeepSpeed: one process, one engine after the other.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from statistics import median

import torch

from stacking import distributed, engine, engine_options
from stacking.batch import MaskedLMBatch
from stacking.config import BertConfig, DataConfig, Recipe, Stage
from stacking.deepspeed_config import DeepSpeedConfig, ResolvedEngine, resolve_stages
from stacking.engine import TrainEngine
from stacking.errors import UserError
from stacking.modeling import BertForPreTraining, init_weights
from stacking.snapshot import Snapshot

WARM_STEPS = 2
FEWEST_STEPS, ENOUGH_SECONDS = 5, 10.0  # of each depth: the median of so many, or for so long
MOST_STEPS = 100
_MONITORS = ("tensorboard", "wandb", "csv_monitor", "comet")


def step_seconds(
    recipe: Recipe, depths: Sequence[int], settings: DeepSpeedConfig
) -> dict[int, float]:
    """Median seconds of a step of `recipe.model` at each depth; the recipe's stages do not count.

    Joins a process group and leaves it. UserError where the JSON or the model cannot run here.
    """
    stages = tuple(Stage(num_hidden_layers=depth, steps=1) for depth in depths)
    recipe = recipe.model_copy(update={"stages": stages})
    accelerator = engine.start()
    try:
        resolved = resolve_stages(
            settings,
            recipe,
            world_size=distributed.world_size(),
            accelerator=accelerator,
            strict_precision=False,
        )
        resolved = engine_options.settle(resolved, engine.current_device())
        return {
            depth: _seconds(recipe, stage, resolved[stage]) for stage, depth in enumerate(depths)
        }
    except (MemoryError, RuntimeError) as error:
        if engine.is_out_of_memory(error):
            raise UserError(
                "--measure: not enough memory for a step here; give a DeepSpeed JSON with a "
                "smaller train_micro_batch_size_per_gpu, or pilots that were trained elsewhere"
            ) from error
        raise
    finally:
        distributed.shut_down()


def _seconds(recipe: Recipe, stage: int, resolved: ResolvedEngine) -> float:
    model, data = recipe.stage_model(stage), recipe.stage_data(stage)
    module = BertForPreTraining(model)
    init_weights(module, torch.Generator().manual_seed(recipe.seed))
    first = Snapshot({name: p.detach() for name, p in module.named_parameters()})
    silent = {k: v for k, v in resolved.deepspeed.items() if k not in _MONITORS}
    built = TrainEngine(model, recipe.optimizer, replace(resolved, deepspeed=silent), first)
    batches = [
        random_batch(model, data, resolved.micro_batch_size, seed)
        for seed in range(resolved.gradient_accumulation_steps)
    ]
    sizes = [[float(batch.num_masked), float(len(batch.input_ids))] for batch in batches]
    counts = torch.tensor(sizes).sum(dim=0).to(built.device)
    times: list[float] = []
    while len(times) < WARM_STEPS + FEWEST_STEPS or (
        sum(times) < ENOUGH_SECONDS and len(times) < MOST_STEPS
    ):
        engine.synchronize()
        began = time.perf_counter()
        built.train_step(batches, learning_rate=1e-5, counts=counts, seed=len(times))
        engine.synchronize()
        times.append(time.perf_counter() - began)
    built.destroy()
    return median(times[WARM_STEPS:])


def random_batch(model: BertConfig, data: DataConfig, sequences: int, seed: int) -> MaskedLMBatch:
    """A micro batch [sequences, S] without padding, with P masked positions a sequence."""
    generator = torch.Generator().manual_seed(seed)
    shape = sequences, data.max_seq_length
    ids = torch.randint(model.vocab_size, shape, generator=generator)
    return MaskedLMBatch.whole(ids, data.max_predictions_per_seq)
