"""A RecipePlan in; what people and programs read out: rich tables, or one JSON object."""

from collections.abc import Collection, Sequence
from dataclasses import asdict

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from stacking.config_loading import JsonObject
from stacking.deepspeed_config import ResolvedEngine
from stacking.stage_plan import ZERO_STAGES, Entry, PlannedStage, RecipePlan

_PREFIXES = ("", "k", "M", "G", "T", "P", "E", "Z", "Y")


def show_plan(plan: RecipePlan, console: Console) -> None:
    """Print everything, in the console's width."""
    recipe, data = plan.recipe, plan.recipe.data
    console.print(
        f"[bold]{escape(recipe.name)}[/]: {recipe.total_steps:,} steps x "
        f"{recipe.global_batch_size:,} sequences x {data.max_seq_length:,} tokens (S), "
        f"{data.max_predictions_per_seq:,} of them predicted"
    )
    for title, table in (
        ("Stages", _sizes(plan)),
        ("Cost of forward and backward over the global batch; matrix products only", _costs(plan)),
        ("Ceiling: the full model for as many steps (t0) against this recipe (t)", _ceilings(plan)),
        (_memory_title(plan), _memory(plan)),
    ):
        console.print(f"\n[bold]{escape(title)}[/]")
        console.print(table)
    console.print(escape(_choice(plan)))
    count, flops = plan.branches
    if count:
        cost = f"{flops / 1e15:,.3g} PFLOP, without the steps that they share"
        console.print(f"\n{count} branches are trained besides: {cost}")
    if plan.warnings:
        console.print()
    for warning in plan.warnings:
        console.print(f"[yellow]warning[/]: {escape(warning)}")


def plan_json(plan: RecipePlan) -> JsonObject:
    """The same as plain values; bytes and FLOPs are whole numbers, shares are of 1."""
    return {
        "name": plan.recipe.name,
        "total_steps": plan.recipe.total_steps,
        "global_batch_size": plan.recipe.global_batch_size,
        "stages": [_stage_json(stage, plan.flops) for stage in plan.stages],
        "scratch": _stage_json(plan.scratch, plan.scratch.flops),
        "flops": plan.flops,
        "ceiling": _ratio_json(plan.ceiling),
        "ceiling_by_layers": _ratio_json(plan.layers_ceiling),
        "memory": _memory_json(plan),
        "branches": dict(zip(("count", "flops"), plan.branches, strict=True)),
        "warnings": list(plan.warnings),
    }


def _stage_json(stage: PlannedStage, total_flops: int) -> JsonObject:
    return {
        "steps": stage.steps,
        "first_step": stage.first_step,
        "model": stage.model.model_dump(mode="json"),
        "data": stage.data.model_dump(mode="json"),
        "frozen_layers": stage.num_frozen_layers,
        "growth": asdict(stage.entry) if stage.entry else None,
        "num_parameters": stage.num_parameters,
        "num_trained_parameters": stage.num_trained,
        "flops_per_step": stage.step_flops,
        "flops": stage.flops,
        "share": stage.flops / total_flops,
        "learning_rates": list(stage.rates),
    }


def _ratio_json(ratio: float) -> JsonObject:
    return {"ratio": ratio, "time_saved": 1 - 1 / ratio, "speed_up": ratio - 1}


def _memory_json(plan: RecipePlan) -> JsonObject:
    engine = plan.engines[plan.largest]
    return {
        "stage": plan.largest,
        "world_size": plan.world_size,
        "precision": engine.precision,
        "bytes_per_rank_by_zero_stage": {
            str(zero): asdict(held) | {"total": held.total} for zero, held in plan.memory().items()
        },
        "deepspeed_config": plan.engine_file,
        "zero_stage": engine.zero_stage,
        "micro_batch_size": engine.micro_batch_size,
        "gradient_accumulation_steps": engine.gradient_accumulation_steps,
        "in_host_memory": _offloaded(engine),
    }


def table_of(columns: Sequence[str], left: Collection[str] = ()) -> Table:
    """Numbers to the right and whole; the columns named in `left` to the left, wrapped."""
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for name in columns:
        is_text = name in left
        table.add_column(name, justify="left" if is_text else "right", no_wrap=not is_text)
    return table


def _sizes(plan: RecipePlan) -> Table:
    texts = ("form", "on entry", "function")
    table = table_of(("stage", "steps", "layers x hidden", "heads", "inner", *texts), left=texts)
    for number, stage in enumerate(plan.stages, 1):
        model = stage.model
        table.add_row(
            str(number),
            f"{stage.steps:,}",
            f"{model.num_hidden_layers} x {model.hidden_size:,}",
            str(model.num_attention_heads),
            _inner(stage),
            _form(stage),
            *_entry(stage.entry),
        )
    return table


def _inner(stage: PlannedStage) -> str:
    model = stage.model
    sizes = [model.inner_size(layer) for layer in range(model.num_hidden_layers)]
    low, high = min(sizes), max(sizes)
    return f"{low:,}" if low == high else f"{low:,}-{high:,}"


def _form(stage: PlannedStage) -> str:
    """Length, pooling, sharing, freezing: what makes a step cheaper besides size."""
    model = stage.model
    parts = [f"S={stage.data.max_seq_length}"]
    if model.pooling != "none":
        parts.append(f"{model.pooling} pool {model.pooling_size}")
    if model.shared_attention_layers:
        parts.append(f"attention shared in {len(model.shared_attention_layers)}")
    if stage.num_frozen_layers:
        parts.append(f"{stage.num_frozen_layers} frozen")
    if not model.tie_word_embeddings:
        parts.append("untied decoder")
    return ", ".join(parts)


def _entry(entry: Entry | None) -> tuple[str, str]:
    """What grows, and whether the function stays."""
    if entry is None:
        return "random weights", ""
    kept = "may change" if entry.tolerance is None else "kept"
    return entry.operators, f"{kept} to {entry.tolerance:.0e}" if entry.tolerance else kept


def _costs(plan: RecipePlan) -> Table:
    per_step, per_stage = _unit(plan.scratch.step_flops), _unit(plan.scratch.flops)
    units = (f"{per_step}FLOP/step", f"{per_stage}FLOP")
    table = table_of(
        ("stage", "parameters, M", "trained, M", *units, "share of FLOP"), left=("stage",)
    )

    def row(name: str, stage: PlannedStage, share: str) -> None:
        table.add_row(
            name,
            _scaled(stage.num_parameters, "M"),
            _scaled(stage.num_trained, "M"),
            _scaled(stage.step_flops, per_step),
            _scaled(stage.flops, per_stage),
            share,
        )

    for number, stage in enumerate(plan.stages, 1):
        row(str(number), stage, f"{100 * stage.flops / plan.flops:.1f} %")
    table.add_row("all stages", "", "", "", _scaled(plan.flops, per_stage), "100.0 %")
    row("full model", plan.scratch, "")
    return table


def _ceilings(plan: RecipePlan) -> Table:
    columns = ("t0/t", "time saved, 1 - t/t0", "speed-up, t0/t - 1")
    table = table_of(("counting", *columns), left=("counting",))
    for name, ratio in (("FLOP", plan.ceiling), ("layers alone", plan.layers_ceiling)):
        saved, faster = 100 * (1 - 1 / ratio), 100 * (ratio - 1)
        table.add_row(name, f"{ratio:.2f}x", f"{saved:.1f} %", f"{faster:.1f} %")
    return table


def _memory_title(plan: RecipePlan) -> str:
    precision = plan.engines[plan.largest].precision
    of = "the one rank" if plan.world_size == 1 else f"each of {plan.world_size:,} ranks"
    return f"Memory of {of}, stage {plan.largest + 1} in {precision}, without activations"


def _memory(plan: RecipePlan) -> Table:
    """A row for each ZeRO stage."""
    held = plan.memory()
    size, unit = _binary_unit(max(one.total for one in held.values()))
    names = ("weights", "gradients", "fp32 masters", "moments")
    table = table_of(("ZeRO", *names, f"total, {unit}"))
    for zero, one in held.items():
        numbers = (one.weights, one.gradients, one.masters, one.moments, one.total)
        table.add_row(str(zero), *(f"{number / size:,.2f}" for number in numbers))
    return table


def _choice(plan: RecipePlan) -> str:
    """What the JSON itself comes to."""
    engine, held = plan.engines[plan.largest], plan.memory()
    total = held[ZERO_STAGES[engine.zero_stage]].total
    size, unit = _binary_unit(max(one.total for one in held.values()))
    away = [f", {name} in host memory" for name in _offloaded(engine)]
    return (
        f"{plan.engine_file}: ZeRO {engine.zero_stage}, {total / size:,.2f} {unit} a rank"
        f"{''.join(away)}; micro batch {engine.micro_batch_size} x accumulation "
        f"{engine.gradient_accumulation_steps} x {plan.world_size} "
        f"rank{'s' if plan.world_size > 1 else ''} = {plan.recipe.global_batch_size}"
    )


def _offloaded(engine: ResolvedEngine) -> list[str]:
    """What the JSON keeps in the host's memory instead of the device's."""
    zero = engine.deepspeed.get("zero_optimization")
    blocks = {"optimizer": "offload_optimizer", "weights": "offload_param"}
    return [
        name
        for name, key in blocks.items()
        if isinstance(zero, dict) and (zero.get(key) or {}).get("device") == "cpu"
    ]


def _binary_unit(largest: int) -> tuple[int, str]:
    """The largest unit that is no larger than `largest`, in bytes, and its name."""
    units = {"GiB": 1024**3, "MiB": 1024**2, "KiB": 1024}
    name = next((name for name, size in units.items() if largest >= size), "KiB")
    return units[name], name


def _unit(largest: int) -> str:
    """The SI prefix in which `largest` has one to three digits before the point."""
    power = 0
    while largest >= 1000 ** (power + 1) and power < len(_PREFIXES) - 1:
        power += 1
    return _PREFIXES[power]


def _scaled(number: int, prefix: str) -> str:
    return f"{number / 1000 ** _PREFIXES.index(prefix):,.2f}"
