"""Whether each stage of a recipe costs what its FLOPs say: predicted beside measured step times.

    python benchmarks/stages.py [--recipes stackingbert_small mslt_small compoundgrow_small]
        [--set KEY=VALUE ...] [--batch 32] [--threads 2] [--rounds 5]

All stages of a recipe have an engine each, and take turns on random batches of their own shape: one
process, ZeRO 1. Times are medians of steps, as a share of the last stage's; two predictions stand
beside them:

    FLOPs       those of stacking/cost.py alone
    and bytes   FLOPs / rate + elements x a + trained parameters x b

Elements are what anything but a matrix product writes in the forward pass, about 8 H + 2 F for each
row of a layer, 6 H more if queries and keys are rotated, and 6 V for each prediction; the backward
pass of what trains writes twice as many.
`a` is one number for all recipes of the run, fitted to their stages; `b` is the measured time of
the optimizer's update for each parameter. Ends with one JSON line.

The engine keeps freed memory (distributed.keep_freed_memory). With glibc as it is, deep stages take
longer than any arithmetic says: MALLOC_TRIM_THRESHOLD_=131072 in the environment shows it.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from on_ranks import first_state, on_ranks, random_batch, resolved

from stacking import distributed, engine
from stacking.config import OptimizerConfig, Recipe
from stacking.config_loading import load_recipe
from stacking.cost import pooled_length, trained_parameters, training_flops
from stacking.engine import TrainEngine

RECIPES = Path(__file__).resolve().parents[1] / "launch" / "recipes"


def main() -> None:
    """Measure each recipe; print the tables and the JSON line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = ["stackingbert_small", "mslt_small", "compoundgrow_small"]
    parser.add_argument("--recipes", nargs="+", default=names)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--batch", type=int, default=None, help="default: the recipe's")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="about, of each stage's turn")
    arguments = parser.parse_args()
    found = on_ranks(_measure_all, 1, arguments, arguments.threads)
    costs = {
        name: [
            _cost(_recipe(name, arguments), *seconds, index) for index, seconds in enumerate(all_)
        ]
        for name, all_ in found.items()
    }
    flops_an_element = _fitted(list(costs.values()))
    results = {}
    print(f"an element written costs as much as {flops_an_element:.0f} FLOPs")
    for name, stages in costs.items():
        print(f"{name}, {_recipe(name, arguments).global_batch_size} sequences")
        results[name] = _report(stages, flops_an_element)
    print(json.dumps({"benchmark": "stages", **vars(arguments), "results": results,
                      "flops_an_element": flops_an_element}))  # fmt: skip


@dataclass(frozen=True)
class Cost:
    """A stage: what a step of it takes, measured and by arithmetic."""

    form: str
    seconds: float
    update: float  # seconds
    flops: float
    elements: float
    trained: float


def _cost(recipe: Recipe, seconds: float, update: float, index: int) -> Cost:
    stage, model, data = recipe.stages[index], recipe.stage_model(index), recipe.stage_data(index)
    batch, masked = recipe.global_batch_size, data.max_predictions_per_seq
    frozen = stage.freeze.layers if stage.freeze else 0
    rows = pooled_length(model, data.max_seq_length, masked)
    elements = 3 * masked * 6 * model.vocab_size
    for layer in range(model.num_hidden_layers):
        width = (14 if model.position == "rotary" else 8) * model.hidden_size
        width += 2 * model.inner_size(layer)
        elements += (1 if layer < frozen else 3) * rows * width
    return Cost(
        _form(recipe, index), seconds, update,
        training_flops(model, batch, data.max_seq_length, masked, freeze=stage.freeze),
        batch * elements, trained_parameters(model, stage.freeze),
    )  # fmt: skip


def _shares(stages: Sequence[Cost], flops_an_element: float) -> list[float]:
    """Predicted seconds over the last stage's."""
    last = stages[-1]
    a_parameter = sum(stage.update for stage in stages) / sum(stage.trained for stage in stages)
    works = [stage.flops + flops_an_element * stage.elements for stage in stages]
    rate = works[-1] / (last.seconds - a_parameter * last.trained)
    return [
        (work / rate + a_parameter * stage.trained) / last.seconds
        for work, stage in zip(works, stages, strict=True)
    ]


def _fitted(recipes: Sequence[Sequence[Cost]]) -> float:
    """FLOPs in the time of one element: the least squared relative errors of all stages' shares."""

    def error(flops_an_element: float) -> float:
        return sum(
            (share * stages[-1].seconds / stage.seconds - 1) ** 2
            for stages in recipes
            for share, stage in zip(_shares(stages, flops_an_element), stages, strict=True)
        )

    return min((float(number) for number in range(0, 2001, 5)), key=error)


def _report(stages: Sequence[Cost], flops_an_element: float) -> list[dict[str, Any]]:
    """Print one recipe; its rows for JSON."""
    print(f"  {'stage':<42}{'ms':>8}{'update':>8}{'measured':>10}{'FLOPs':>8}{'off':>8}"
          f"{'and bytes':>11}{'off':>8}")  # fmt: skip
    rows = []
    for stage, better in zip(stages, _shares(stages, flops_an_element), strict=True):
        measured, by_flops = stage.seconds / stages[-1].seconds, stage.flops / stages[-1].flops
        rows.append({**asdict(stage), "measured": measured, "by_flops": by_flops,
                     "by_flops_and_bytes": better})  # fmt: skip
        print(f"  {stage.form:<42}{1e3 * stage.seconds:>8.1f}{1e3 * stage.update:>8.1f}"
              f"{measured:>10.3f}{by_flops:>8.3f}{by_flops / measured - 1:>+8.1%}"
              f"{better:>11.3f}{better / measured - 1:>+8.1%}")  # fmt: skip
    return rows


def _form(recipe: Recipe, index: int) -> str:
    model, freeze = recipe.stage_model(index), recipe.stages[index].freeze
    parts = [f"{index + 1}: {model.num_hidden_layers} x {model.hidden_size}"]
    parts += [f"inner {model.inner_size(0)}", f"S={recipe.stage_data(index).max_seq_length}"]
    parts += [f"{model.pooling} pool"] if model.pooling != "none" else []
    parts += [f"{freeze.layers} frozen"] if freeze else []
    return ", ".join(parts)


def _recipe(name: str, arguments: argparse.Namespace) -> Recipe:
    batch = [] if arguments.batch is None else [f"global_batch_size={arguments.batch}"]
    return load_recipe(RECIPES / f"{name}.json", [*arguments.set, *batch])


def _measure_all(arguments: argparse.Namespace) -> dict[str, list[tuple[float, float]]]:
    engine.start()
    found = {name: _measure(_recipe(name, arguments), arguments) for name in arguments.recipes}
    distributed.shut_down()
    return found


def _measure(recipe: Recipe, arguments: argparse.Namespace) -> list[tuple[float, float]]:
    """Of each stage: median seconds of a step, and of the optimizer's update in it."""
    settings = resolved(1, arguments.precision, recipe.global_batch_size)
    stages = []
    for index, stage in enumerate(recipe.stages):
        model = recipe.stage_model(index)
        built = TrainEngine(model, OptimizerConfig(), settings, first_state(model), stage.freeze)
        stages.append((built, _stepper(built, recipe, index)))
    counts = [_steps_in(arguments.seconds, step) for _, step in stages]
    found: list[list[tuple[float, float]]] = [[] for _ in stages]
    for _ in range(arguments.rounds):
        for (_, step), count, times in zip(stages, counts, found, strict=True):
            times += [step() for _ in range(count)]
    for built, _ in stages:
        built.destroy()
    return [
        (statistics.median(whole for whole, _ in times), statistics.median(u for _, u in times))
        for times in found
    ]


def _stepper(built: TrainEngine, recipe: Recipe, index: int) -> Callable[[], tuple[float, float]]:
    """One step on the same random batch: seconds of all of it, and of the update."""
    data = recipe.stage_data(index)
    batch = random_batch(
        recipe.stage_model(index), recipe.global_batch_size, data.max_seq_length, index,
        data.max_predictions_per_seq,
    )  # fmt: skip
    counts = torch.tensor([float(batch.num_masked), float(len(batch.input_ids))])
    update, updating = built._engine.step, [0.0]

    def timed_update() -> None:
        began = time.perf_counter()
        update()
        updating[0] = time.perf_counter() - began

    built._engine.step = timed_update

    def step() -> tuple[float, float]:
        began = time.perf_counter()
        built.train_step([batch], learning_rate=1e-4, counts=counts, seed=1)
        return time.perf_counter() - began, updating[0]

    return step


def _steps_in(seconds: float, step: Callable[[], tuple[float, float]]) -> int:
    """About how many steps take so long, after two warm ones."""
    step(), step()
    return max(1, round(seconds / step()[0]))


if __name__ == "__main__":
    main()
