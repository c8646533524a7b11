"""What would run: the recipe and the DeepSpeed JSON, on the ranks and the data that there are."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from stacking.config import Recipe
from stacking.config_loading import load_recipe
from stacking.deepspeed_config import (
    Accelerator,
    DeepSpeedConfig,
    ResolvedEngine,
    load_deepspeed_config,
    place_monitors,
    resolve_stages,
)
from stacking.doctor_findings import Finding, config_fails, counted, fail, listed, ok, warn
from stacking.errors import ConfigError, ShardError
from stacking.growth.legality import recipe_faults
from stacking.run_data import RunData

_CPU_FIX = "name a JSON for CPUs: --deepspeed_config deepspeed_configs/cpu_bf16.json"
_NOTICE_FIX = "nothing, or say so in the DeepSpeed JSON (deepspeed_configs/README.md)"


@dataclass
class Plan:
    """The recipe and the JSON, as far as they can be read."""

    recipe: Recipe | None = None
    engine: DeepSpeedConfig | None = None
    findings: list[Finding] = field(default_factory=list)


def read_plan(recipe: Path | None, overrides: Sequence[str], engine: Path | None) -> Plan:
    """Read both; every fault of both is a finding."""
    plan = Plan()
    try:
        plan.engine = load_deepspeed_config(engine)
        plan.findings.append(ok("deepspeed_config", f"{plan.engine.source}: nothing refused, "
                                "nothing that DeepSpeed would ignore"))  # fmt: skip
    except ConfigError as error:
        fix = "see deepspeed_configs/README.md"
        plan.findings += config_fails("deepspeed_config", error, fix)
    if recipe is None:
        return plan
    try:
        plan.recipe = load_recipe(recipe, overrides)
        if faults := recipe_faults(plan.recipe):
            raise ConfigError(faults)
    except ConfigError as error:
        plan.findings += config_fails("recipe", error, "see launch/recipes/README.md")
        return plan
    stages = counted(len(plan.recipe.stages), "stage")
    text = f"{plan.recipe.name}: {stages}, its growth is possible"
    plan.findings.append(ok("recipe", text))
    return plan


def fit_findings(recipe: Recipe, folder: Path) -> list[Finding]:
    """Whether the data that are here are such as the recipe wants, in the words of a run."""
    try:
        RunData(recipe, folder)
    except (ShardError, OSError) as error:
        return [fail("data", str(error), "mend the recipe, or prepare data for it "
                     "(launch/prepare_data.py)")]  # fmt: skip
    return [ok("data", f"{folder}: fits the recipe")]


def batch_findings(
    plan: Plan, world_size: int, accelerator: Accelerator, run_dir: Path | None
) -> list[Finding]:
    """The batch and the precision on so many ranks of such devices."""
    if plan.recipe is None or plan.engine is None:
        return []
    try:
        engines = resolve_stages(
            plan.engine, plan.recipe, world_size=world_size, accelerator=accelerator,
            strict_precision=False,
        )  # fmt: skip
        for engine in engines:
            place_monitors(engine, run_dir or Path())
    except ConfigError as error:
        return config_fails("batch", error, "see deepspeed_configs/README.md")
    batches = dict.fromkeys(
        f"{engine.micro_batch_size} x accumulation {engine.gradient_accumulation_steps} x "
        f"{counted(world_size, 'rank')} = {plan.recipe.global_batch_size}"
        for engine in engines
    )
    return [ok("batch", f"micro batch {listed(batches)}"), *_notices(engines, accelerator)]


def _notices(engines: Sequence[ResolvedEngine], accelerator: Accelerator) -> list[Finding]:
    precisions = list(dict.fromkeys(engine.precision for engine in engines))
    lines = list(dict.fromkeys(line for engine in engines for line in engine.notices))
    found = [
        warn("precision", line, _CPU_FIX) if line.startswith(("fp16", "bf16")) else
        warn("engine", line, _NOTICE_FIX) for line in lines
    ]  # fmt: skip
    if any(finding.check == "precision" for finding in found):
        return found
    device = "the CPU" if accelerator.kind == "cpu" else "the GPUs"
    return [ok("precision", f"{listed(precisions)} on {device}"), *found]
