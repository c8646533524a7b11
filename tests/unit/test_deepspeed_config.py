"""What a recipe and a device make of a DeepSpeed JSON: numbers, precision, batches, overrides."""

import copy
import json
from pathlib import Path

import pytest
import torch

from stacking.config import Recipe
from stacking.config_loading import load_recipe
from stacking.deepspeed_config import (
    Accelerator,
    ClientOptimizer,
    DeepSpeedConfig,
    ResolvedEngine,
    default_config_path,
    load_deepspeed_config,
    place_monitors,
    resolve,
    resolve_stages,
)
from stacking.errors import ConfigError

CPU = Accelerator("cpu", supports_fp16=False, supports_bf16=True, fused_adam=False)
CUDA = Accelerator("cuda", supports_fp16=True, supports_bf16=True, fused_adam=True, fused_lamb=True)
OLD_CUDA = Accelerator("cuda", supports_fp16=True, supports_bf16=False, fused_adam=False)
OLD_CPU = Accelerator("cpu", supports_fp16=False, supports_bf16=False, fused_adam=False)
NEW_CPU = Accelerator("cpu", supports_fp16=True, supports_bf16=True, fused_adam=False)

GOOD: dict[str, object] = {"fp16": {"enabled": True}, "zero_optimization": {"stage": 1}}


def recipe(global_batch_size: int = 24, **deepspeed: object) -> Recipe:
    """Two stages; `deepspeed` overrides keys in the second."""
    model = {"vocab_size": 97, "hidden_size": 24, "num_attention_heads": 3, "num_hidden_layers": 5}
    stages = [
        {"num_hidden_layers": 2, "steps": 7},
        {"num_hidden_layers": 5, "steps": 9, "deepspeed": deepspeed},
    ]
    return Recipe.model_validate(
        {
            "name": "odd",
            "model": model,
            "global_batch_size": global_batch_size,
            "optimizer": {"betas": [0.8, 0.97], "eps": 1e-7, "weight_decay": 0.03},
            "stages": stages,
        }
    )


def write(folder: Path, document: object) -> Path:
    path = folder / "engine.json"
    path.write_text(json.dumps(document))
    return path


def resolved(
    folder: Path,
    document: object,
    accelerator: Accelerator = CPU,
    *,
    world_size: int = 2,
    strict: bool = False,
    stage: int = 0,
    using: Recipe | None = None,
) -> ResolvedEngine:
    return resolve(
        load_deepspeed_config(write(folder, document)),
        using or recipe(),
        world_size=world_size,
        accelerator=accelerator,
        strict_precision=strict,
        stage=stage,
    )


def test_the_default_json_is_found_and_has_fp16_and_fused_adam() -> None:
    assert default_config_path().name == "fp16_fused_adam.json"
    config = load_deepspeed_config(None)
    assert config.settings.fp16.enabled
    assert not config.settings.optimizer.params.torch_adam


def test_every_number_is_written_out_for_deepspeed(tmp_path: Path) -> None:
    document = {
        **GOOD,
        "train_micro_batch_size_per_gpu": 3,
        "gradient_clipping": "auto",
        "apex": {"fused_layer_norm": True},
    }
    engine = resolved(tmp_path, document, CUDA)
    assert engine.deepspeed == {
        "fp16": {"enabled": True},
        "zero_optimization": {"stage": 1},
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": 0.0, "betas": [0.8, 0.97], "eps": 1e-7, "weight_decay": 0.03},
        },
        "train_batch_size": 24,
        "train_micro_batch_size_per_gpu": 3,
        "gradient_accumulation_steps": 4,
        "gradient_clipping": 1.0,
    }
    assert (engine.precision, engine.zero_stage, engine.apex_layer_norm) == ("fp16", 1, True)
    assert (engine.micro_batch_size, engine.gradient_accumulation_steps) == (3, 4)
    assert engine.notices == ()


def test_resolving_does_not_change_the_loaded_json(tmp_path: Path) -> None:
    config = load_deepspeed_config(write(tmp_path, GOOD))
    before = copy.deepcopy(config.document)
    engines = resolve_stages(
        config, recipe(), world_size=2, accelerator=CPU, strict_precision=False
    )
    zero = engines[0].deepspeed["zero_optimization"]
    assert isinstance(zero, dict)
    zero["stage"] = 3
    assert config.document == before
    assert engines[1].deepspeed["zero_optimization"] == {"stage": 1}


@pytest.mark.parametrize("cpu", [CPU, NEW_CPU])
def test_fp16_becomes_bf16_on_every_cpu_and_says_so(cpu: Accelerator, tmp_path: Path) -> None:
    document = {
        **GOOD,
        "fp16": {"enabled": True, "initial_scale_power": 8},
        "communication_data_type": "fp16",
        "data_types": {"grad_accum_dtype": "fp16"},
    }
    engine = resolved(tmp_path, document, cpu)
    assert engine.precision == "bf16"
    assert engine.deepspeed["bf16"] == {"enabled": True}
    assert "fp16" not in json.dumps(engine.deepspeed)
    assert engine.notices == (
        "fp16 asked, which is for GPUs: running bf16; --strict-precision refuses instead",
    )
    assert resolved(tmp_path, document, OLD_CPU).precision == "fp32"


def test_torch_has_no_fp16_layer_norm_on_a_cpu_for_a_constant_row() -> None:
    """Why fp16 is for GPUs; when this fails, what is left is that bf16 is faster on a CPU."""
    norm = torch.nn.LayerNorm(8, eps=1e-12).half()
    norm(torch.zeros(2, 8, dtype=torch.float16)).sum().backward()
    assert norm.weight.grad is not None
    assert norm.weight.grad.isnan().all()


def test_bf16_in_place_of_fp16_adds_up_gradients_in_fp32_at_zero_1(tmp_path: Path) -> None:
    fp32 = {"grad_accum_dtype": "fp32"}
    assert resolved(tmp_path, GOOD).deepspeed["data_types"] == fp32
    for document, device in (
        (GOOD | {"zero_optimization": {"stage": 2}}, CPU), (GOOD, OLD_CPU), (GOOD, CUDA),
    ):  # fmt: skip
        assert "data_types" not in resolved(tmp_path, document, device).deepspeed
    asked = {"data_types": {"grad_accum_dtype": "bf16"}}
    assert resolved(tmp_path, GOOD | asked).deepspeed["data_types"] == asked["data_types"]


def test_unpadding_is_ours_and_not_deepspeeds(tmp_path: Path) -> None:
    assert resolved(tmp_path, GOOD).unpads
    engine = resolved(tmp_path, GOOD | {"unpadding": {"enabled": False}})
    assert not engine.unpads
    assert "unpadding" not in engine.deepspeed


def test_strict_precision_refuses_another_precision(tmp_path: Path) -> None:
    for cpu in (CPU, NEW_CPU):
        with pytest.raises(ConfigError, match="fp16, which is for GPUs: .*allowed here: bf16"):
            resolved(tmp_path, GOOD, cpu, strict=True)
    bf16 = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}}
    with pytest.raises(ConfigError, match="bf16, which this CPU has no .*allowed here: fp32"):
        resolved(tmp_path, bf16, OLD_CPU, strict=True)
    assert resolved(tmp_path, GOOD, CUDA, strict=True).precision == "fp16"


def test_a_gpu_never_runs_another_precision_than_asked(tmp_path: Path) -> None:
    document = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}}
    with pytest.raises(ConfigError, match="bf16: this GPU has no bf16 arithmetic; allowed: fp16"):
        resolved(tmp_path, document, OLD_CUDA)


def test_autocast_and_fp32_may_run_without_zero(tmp_path: Path) -> None:
    assert resolved(tmp_path, {}).precision == "fp32"
    autocast = {"torch_autocast": {"enabled": True}}
    assert resolved(tmp_path, autocast).precision == "bf16_autocast"
    assert resolved(tmp_path, autocast, OLD_CPU).precision == "fp32"


def test_adam_is_torchs_fused_adamw_on_a_cpu_and_fusedadam_on_a_gpu(tmp_path: Path) -> None:
    document = {**GOOD, "optimizer": {"type": "Adam"}}
    on_cpu, on_gpu = resolved(tmp_path, document), resolved(tmp_path, document, CUDA)
    numbers = {"lr": 0.0, "betas": [0.8, 0.97], "eps": 1e-7, "weight_decay": 0.03}
    torch_adam = {**numbers, "torch_adam": True, "fused": True}
    assert on_cpu.deepspeed["optimizer"] == {"type": "AdamW", "params": torch_adam}
    assert on_gpu.deepspeed["optimizer"] == {"type": "AdamW", "params": numbers}
    assert len(on_cpu.notices) == 1  # the precision only
    assert "torch's fused AdamW" in on_cpu.debug_notices[0]
    no_compiler = resolved(tmp_path, document, OLD_CUDA)
    assert no_compiler.deepspeed["optimizer"] == {"type": "AdamW", "params": torch_adam}
    assert "FusedAdam cannot be built here" in no_compiler.notices[0]


def test_lamb_runs_on_a_gpu_without_zero_only(tmp_path: Path) -> None:
    document = {"optimizer": {"type": "Lamb", "params": {"max_coeff": 5.0}}}
    with pytest.raises(ConfigError, match="got 'Lamb', which is for GPUs only; allowed: AdamW"):
        resolved(tmp_path, document)
    with pytest.raises(ConfigError, match="got 'Lamb', whose kernel .* cannot build here"):
        resolved(tmp_path, document, OLD_CUDA)
    engine = resolved(tmp_path, document, CUDA)
    block = engine.deepspeed["optimizer"]
    assert isinstance(block, dict)
    assert block["type"] == "Lamb"
    assert block["params"]["max_coeff"] == 5.0
    assert "torch_adam" not in block["params"]
    assert engine.client_optimizer is None


def test_apexes_lamb_is_made_by_the_trainer_and_needs_no_nvcc(tmp_path: Path) -> None:
    document = {"optimizer": {"type": "Lamb"}, "apex": {"fused_lamb": True}}
    with pytest.raises(ConfigError, match="got 'Lamb', which is for GPUs only"):
        resolved(tmp_path, document)
    engine = resolved(tmp_path, document, OLD_CUDA)
    assert "optimizer" not in engine.deepspeed
    numbers = {"lr": 0.0, "betas": [0.8, 0.97], "eps": 1e-7}
    assert engine.client_optimizer == ClientOptimizer("apex_lamb", numbers)
    assert engine.deepspeed["gradient_clipping"] == 1.0  # before apex sees the gradients


def on_one_rank(config: DeepSpeedConfig, given: Recipe) -> list[ResolvedEngine]:
    """All stages on the CPU."""
    return resolve_stages(config, given, world_size=1, accelerator=CPU, strict_precision=False)


def without_clipping(given: Recipe) -> Recipe:
    update = {"optimizer": given.optimizer.model_copy(update={"max_grad_norm": 0.0})}
    return given.model_copy(update=update)


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_muon_is_made_by_the_trainer_with_the_recipes_numbers(
    tmp_path: Path, zero_stage: int
) -> None:
    params = {"ns_method": "standard"}
    document = {
        "optimizer": {"type": "Muon", "params": params},
        "zero_optimization": {"stage": zero_stage},
    }
    still = without_clipping(recipe())
    on_cpu = resolved(tmp_path, document, using=still)
    numbers = {"lr": 0.0, "betas": [0.8, 0.97], "eps": 1e-7, "momentum": 0.95, **params}
    assert on_cpu.client_optimizer == ClientOptimizer("muon", numbers, torch_adam=True)
    assert "optimizer" not in on_cpu.deepspeed
    zero = on_cpu.deepspeed["zero_optimization"]
    assert zero == {"stage": zero_stage, **({"reduce_scatter": False} if zero_stage == 3 else {})}
    on_gpu = resolved(tmp_path, document, CUDA, using=still).client_optimizer
    assert on_gpu == ClientOptimizer("muon", numbers, torch_adam=False)
    no_compiler = resolved(tmp_path, document, OLD_CUDA, using=still)
    assert "FusedAdam cannot be built" in no_compiler.notices[0]


def test_muon_does_not_clip(tmp_path: Path) -> None:
    document = {"optimizer": {"type": "Muon"}, "zero_optimization": {"stage": 1}}
    with pytest.raises(ConfigError, match=r"max_grad_norm 1\.0; allowed: 0, because under ZeRO"):
        resolved(tmp_path, document)


@pytest.mark.parametrize("first", ["AdamW", "Muon"])
def test_a_history_does_not_pass_from_one_kind_of_optimizer_to_another(
    tmp_path: Path, first: str
) -> None:
    second = "Muon" if first == "AdamW" else "AdamW"
    document = {"optimizer": {"type": first}, "zero_optimization": {"stage": 1}}
    changed = without_clipping(recipe(optimizer={"type": second}))
    config = load_deepspeed_config(write(tmp_path, document))
    assert len(on_one_rank(config, changed)) == 2
    stages = (changed.stages[0], changed.stages[1].model_copy(update={"moments": "keep"}))
    kept = changed.model_copy(update={"stages": stages})
    with pytest.raises(ConfigError, match=rf"stages\.1\.moments: got 'keep' where .* '{second}'"):
        on_one_rank(config, kept)


def test_what_only_helps_a_gpu_is_dropped_on_a_cpu_with_a_notice(tmp_path: Path) -> None:
    offload = {"device": "cpu"}
    zero = {"stage": 3, "offload_optimizer": offload, "offload_param": offload}
    document = {**GOOD, "zero_optimization": zero, "apex": {"fused_layer_norm": True}}
    engine = resolved(tmp_path, document)
    assert engine.deepspeed["zero_optimization"] == {"stage": 3}
    assert not engine.apex_layer_norm
    assert [notice.split(" ")[0] for notice in engine.notices[1:]] == [
        "offload_optimizer",
        "offload_param",
        "apex.fused_layer_norm",
    ]
    assert resolved(tmp_path, document, CUDA).deepspeed["zero_optimization"] == zero


def test_quantized_zero_needs_a_gpu(tmp_path: Path) -> None:
    zero = {"stage": 3, "zero_quantized_weights": True}
    with pytest.raises(ConfigError, match="zero_quantized_weights: got true, which needs CUDA"):
        resolved(tmp_path, {**GOOD, "zero_optimization": zero})


def test_hierarchical_partitioning_needs_equal_groups(tmp_path: Path) -> None:
    document = {**GOOD, "zero_optimization": {"stage": 3, "zero_hpz_partition_size": 4}}
    for world_size in (1, 2, 3, 4, 8, 12):  # fewer than 4 are one group
        resolved(tmp_path, document, world_size=world_size)
    with pytest.raises(ConfigError, match="got 4 with a world of 6 ranks; allowed: 1, 2, 3 or 6"):
        resolved(tmp_path, document, world_size=6)


@pytest.mark.parametrize(
    ("global_batch", "world_size", "micro"), [(24, 2, 12), (96, 1, 32), (58, 2, 29), (74, 2, 1)]
)
def test_the_default_micro_batch_is_the_largest_divisor_up_to_32(
    tmp_path: Path, global_batch: int, world_size: int, micro: int
) -> None:
    engine = resolved(tmp_path, GOOD, world_size=world_size, using=recipe(global_batch))
    assert engine.micro_batch_size == micro
    assert micro * world_size * engine.gradient_accumulation_steps == global_batch
    document = {**GOOD, "train_micro_batch_size_per_gpu": "auto"}
    again = resolved(tmp_path, document, world_size=world_size, using=recipe(global_batch))
    assert again == engine


def test_ranks_that_do_not_divide_the_batch_are_refused_with_numbers_that_do(
    tmp_path: Path,
) -> None:
    with pytest.raises(
        ConfigError,
        match="global_batch_size 24 cannot be shared equally by a world of 5 ranks; "
        "allowed: 1, 2, 3, 4, 6 or 8 ranks, or global_batch_size 20 or 25",
    ):
        resolved(tmp_path, GOOD, world_size=5)


def test_a_micro_batch_that_does_not_divide_is_refused_with_those_that_do(tmp_path: Path) -> None:
    document = {**GOOD, "train_micro_batch_size_per_gpu": 5}
    with pytest.raises(
        ConfigError,
        match="got 5, but global_batch_size 24 over a world of 2 ranks is 12 sequences each; "
        "allowed: 1, 2, 3, 4, 6 or 12",
    ):
        resolved(tmp_path, document)


def test_a_stage_overrides_keys_for_itself_alone(tmp_path: Path) -> None:
    config = load_deepspeed_config(write(tmp_path, GOOD))
    using = recipe(train_micro_batch_size_per_gpu=4, zero_optimization={"overlap_comm": True})
    first, second = resolve_stages(
        config, using, world_size=2, accelerator=CUDA, strict_precision=True
    )
    assert (first.micro_batch_size, second.micro_batch_size) == (12, 4)
    assert first.deepspeed["zero_optimization"] == {"stage": 1}
    assert second.deepspeed["zero_optimization"] == {"stage": 1, "overlap_comm": True}


def test_a_stages_override_is_checked_like_the_file(tmp_path: Path) -> None:
    using = recipe(train_batch_size=48, fp16={"enabeld": True}, elasticity={})
    with pytest.raises(ConfigError) as caught:
        resolved(tmp_path, GOOD, stage=1, using=using)
    keys = [fault.split(": ")[0] for fault in caught.value.faults]
    assert keys == [
        "stages.1.deepspeed.train_batch_size",
        "stages.1.deepspeed.elasticity",
        "stages.1.deepspeed.fp16.enabeld",
    ]


def test_faults_of_all_stages_are_reported_together_and_once(tmp_path: Path) -> None:
    config = load_deepspeed_config(write(tmp_path, GOOD))
    using = recipe(train_micro_batch_size_per_gpu=7)
    with pytest.raises(ConfigError) as caught:
        resolve_stages(config, using, world_size=2, accelerator=CPU, strict_precision=True)
    assert len(caught.value.faults) == 2
    assert "fp16, which is for GPUs" in caught.value.faults[0]
    assert "micro_batch_size_per_gpu: got 7" in caught.value.faults[1]


def test_monitors_write_into_the_run_folder_unless_told_otherwise(tmp_path: Path) -> None:
    monitors = {
        "tensorboard": {"enabled": True},
        "csv_monitor": {"enabled": True, "output_path": "elsewhere", "job_name": "mine"},
    }
    engine = place_monitors(resolved(tmp_path, {**GOOD, **monitors}), tmp_path / "run")
    expected = {"enabled": True, "output_path": str(tmp_path / "run"), "job_name": "tensorboard"}
    assert engine.deepspeed["tensorboard"] == expected
    assert engine.deepspeed["csv_monitor"] == monitors["csv_monitor"]
    off = place_monitors(resolved(tmp_path, {**GOOD, "tensorboard": {}}), tmp_path)
    assert off.deepspeed["tensorboard"] == {}


def test_rows_are_logged_as_often_as_deepspeed_prints(tmp_path: Path) -> None:
    assert resolved(tmp_path, {**GOOD, "steps_per_print": 7}).log_every == 7
    assert resolved(tmp_path, GOOD).log_every == 10


def test_a_monitor_without_its_package_is_refused(tmp_path: Path) -> None:
    recipe = load_recipe(Path(__file__).parents[2] / "launch" / "recipes" / "tiny_test.json")
    path = tmp_path / "wandb.json"
    path.write_text('{"wandb": {"enabled": true}, "bf16": {"enabled": true}, '
                    '"zero_optimization": {"stage": 1}}')  # fmt: skip
    (resolved, *_) = resolve_stages(
        load_deepspeed_config(path), recipe, world_size=1,
        accelerator=Accelerator("cpu", supports_fp16=False, supports_bf16=True, fused_adam=False),
        strict_precision=False,
    )  # fmt: skip
    with pytest.raises(ConfigError, match="pip install wandb"):
        place_monitors(resolved, tmp_path)
