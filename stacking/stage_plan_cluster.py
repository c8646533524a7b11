"""A recipe on many ranks: seconds of each stage's step and hours of the run (cluster_time.py).

Twice: with the recipe's global batch shared by ever more ranks, and with as many sequences for each
rank as the fewest ranks have, where the batch grows with the ranks and steps get fewer. Whether so
large a batch trains as well is not asked here.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from rich.console import Console
from rich.markup import escape

from stacking.cluster_time import Cluster, RankWork, StepTime, step_time
from stacking.config import Recipe
from stacking.config_loading import JsonObject
from stacking.cost import forward_flops
from stacking.deepspeed_config import DeepSpeedConfig, ResolvedEngine
from stacking.deepspeed_schema import ZeroOptimization
from stacking.errors import ConfigError
from stacking.stage_plan import ZERO_STAGES, PlannedStage, RecipePlan, plan_recipe
from stacking.stage_plan_table import table_of

_ASSUMED = (
    "A model, not a measurement: data sheets, and an assumed share of what they promise. "
    "Imbalance, input, saving, and the lower rate of small batches are left out."
)
_MEASURED = (
    "A model of measured parts, not a measurement of so many ranks. Imbalance, input, saving, and "
    "the lower rate of small batches are left out."
)


@dataclass(frozen=True)
class ScaledStage:
    """One stage on all ranks together."""

    sequences_per_rank: int
    time: StepTime
    one_rank: float
    """Seconds of the same step on one rank, which accumulates what the others would do."""
    steps: float  # fewer than the recipe's, where the batch has grown

    @property
    def seconds(self) -> float:
        """Of the whole stage."""
        return self.steps * self.time.total


@dataclass(frozen=True)
class ScaledRun:
    """All stages on `ranks` ranks; no stages where `fault` says why that is not possible."""

    ranks: int
    global_batch_size: int
    stages: tuple[ScaledStage, ...]
    fault: str = ""

    @property
    def seconds(self) -> float:
        """Of all steps; no switch, evaluation or save."""
        return sum(stage.seconds for stage in self.stages)

    @property
    def waiting_share(self) -> float:
        """Of that time, spent on communication alone."""
        return sum(stage.steps * stage.time.waiting for stage in self.stages) / self.seconds

    @property
    def efficiency(self) -> float:
        """The time of one rank over that of all ranks together."""
        alone = sum(stage.steps * stage.one_rank for stage in self.stages)
        return alone / self.ranks / self.seconds


@dataclass(frozen=True)
class ClusterPlan:
    """The same recipe on several numbers of ranks."""

    cluster: Cluster
    same_batch: tuple[ScaledRun, ...]
    growing_batch: tuple[ScaledRun, ...]  # none where only one number of ranks was asked for


def plan_cluster(
    recipe: Recipe, engine: DeepSpeedConfig, cluster: Cluster, nodes: Sequence[int]
) -> ClusterPlan:
    """Plan on `nodes` nodes each; ConfigError where a number of them is none."""
    if not nodes or min(nodes) < 1:
        got = " ".join(map(str, nodes)) or "nothing"
        raise ConfigError(f"--nodes: got {got}; allowed: numbers of 1 or more")
    counts = sorted({number * cluster.ranks_per_node for number in nodes})
    same = tuple(_run(recipe, recipe, engine, cluster, ranks) for ranks in counts)
    each = max(1, recipe.global_batch_size // counts[0])
    grown = tuple(
        _run(recipe, recipe.model_copy(update={"global_batch_size": each * ranks}), engine,
             cluster, ranks)
        for ranks in counts if len(counts) > 1
    )  # fmt: skip
    return ClusterPlan(cluster, same, grown)


def _run(
    recipe: Recipe, scaled: Recipe, engine: DeepSpeedConfig, cluster: Cluster, ranks: int
) -> ScaledRun:
    """`scaled`: the recipe with the batch that the ranks share; as many sequences as `recipe`."""
    batch = scaled.global_batch_size
    try:
        plan = plan_recipe(scaled, engine, world_size=ranks)
    except ConfigError as error:
        return ScaledRun(ranks, batch, (), fault="; ".join(error.faults))
    fewer = recipe.global_batch_size / batch
    stages = (
        _stage(plan, stage, resolved, cluster, fewer)
        for stage, resolved in zip(plan.stages, plan.engines, strict=True)
    )
    return ScaledRun(ranks, batch, tuple(stages))


def _stage(
    plan: RecipePlan, stage: PlannedStage, engine: ResolvedEngine, cluster: Cluster, fewer: float
) -> ScaledStage:
    batch, ranks = plan.recipe.global_batch_size, plan.world_size
    zero = ZeroOptimization.model_validate(engine.deepspeed.get("zero_optimization", {}))
    forward = forward_flops(
        stage.model, batch, stage.data.max_seq_length, stage.data.max_predictions_per_seq
    )
    work = RankWork(
        ranks=ranks,
        forward_flops=forward / ranks,
        backward_flops=(stage.step_flops - forward) / ranks,
        micro_steps=engine.gradient_accumulation_steps,
        num_parameters=stage.num_parameters,
        num_trained=stage.num_trained,
        num_layers=stage.model.num_hidden_layers,
        zero_stage=ZERO_STAGES[engine.zero_stage],
        bytes_per_weight=2 if engine.precision in ("fp16", "bf16") else 4,
        bucket_elements=zero.reduce_bucket_size,
        overlaps=_overlaps(zero),
        reduces_to_owner=not zero.use_multi_rank_bucket_allreduce,
    )
    alone = replace(
        work,
        ranks=1,
        forward_flops=float(forward),
        backward_flops=float(stage.step_flops - forward),
        micro_steps=work.micro_steps * ranks,
    )
    seconds = step_time(alone, cluster).total
    return ScaledStage(batch // ranks, step_time(work, cluster), seconds, fewer * stage.steps)


def _overlaps(zero: ZeroOptimization) -> bool:
    """What the JSON says; DeepSpeed's default is true at ZeRO 3 alone."""
    return zero.overlap_comm if "overlap_comm" in zero.model_fields_set else zero.stage == 3


def show_cluster_plan(plan: ClusterPlan, console: Console) -> None:
    """Print both tables and what they rest on."""
    cluster = plan.cluster
    link, network = cluster.link_bytes_per_second / 1e9, cluster.network_bytes_per_second / 1e9
    console.print(
        f"\n[bold]Time on {escape(cluster.name)}[/]: {cluster.flops_per_second / 1e12:,.4g} "
        f"TFLOP/s a rank, {cluster.ranks_per_node} ranks a node, {link:,.4g} GB/s between them, "
        f"{network:,.4g} GB/s between nodes"
    )
    for title, runs in (
        ("The recipe's global batch, shared", plan.same_batch),
        ("The same batch for each rank, fewer steps", plan.growing_batch),
    ):
        if runs:
            console.print(f"\n[bold]{title}[/]")
            _show_runs(runs, console)
    console.print(_ASSUMED if cluster.name.endswith("assumed") else _MEASURED)


def _show_runs(runs: Sequence[ScaledRun], console: Console) -> None:
    columns = ("ranks", "stage", "sequences a rank", "ms a step", "waiting", "efficiency", "hours")
    table = table_of(columns)
    for run in runs:
        for number, stage in enumerate(run.stages, 1):
            time = stage.time
            table.add_row(
                f"{run.ranks:,}" if number == 1 else "",
                str(number),
                f"{stage.sequences_per_rank:,}",
                f"{1e3 * time.total:,.2f}",
                f"{100 * time.waiting_share:.1f} %",
                f"{100 * stage.one_rank / run.ranks / time.total:.1f} %",
                f"{stage.seconds / 3600:,.3g}",
            )
        if len(run.stages) > 1:
            table.add_row(
                *("", "all", "", ""),
                f"{100 * run.waiting_share:.1f} %",
                f"{100 * run.efficiency:.1f} %",
                f"{run.seconds / 3600:,.3g}",
            )
    console.print(table)
    for run in runs:
        if run.fault:
            console.print(f"{run.ranks:,} ranks: not possible: {escape(run.fault)}")


def cluster_json(plan: ClusterPlan) -> JsonObject:
    """The same as plain values, in seconds and shares of 1."""
    return {
        "cluster": plan.cluster.model_dump(mode="json"),
        "same_batch": [_run_json(run) for run in plan.same_batch],
        "growing_batch": [_run_json(run) for run in plan.growing_batch],
    }


def _run_json(run: ScaledRun) -> JsonObject:
    known: JsonObject = {"ranks": run.ranks, "global_batch_size": run.global_batch_size}
    if run.fault:
        return known | {"fault": run.fault}
    stages = [
        asdict(stage.time) | {
            "total": stage.time.total,
            "sequences_per_rank": stage.sequences_per_rank,
            "steps": stage.steps,
            "efficiency": stage.one_rank / run.ranks / stage.time.total,
        }
        for stage in run.stages
    ]  # fmt: skip
    return known | {
        "seconds": run.seconds,
        "waiting_share": run.waiting_share,
        "efficiency": run.efficiency,
        "stages": stages,
    }
