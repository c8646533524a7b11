"""What the engine relies on inside DeepSpeed, and which of DeepSpeed's defects still stand.

A failure here names what a new DeepSpeed release changed: mend or drop that work-around.
"""

import errno
import importlib
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from stacking import engine_module, engine_teardown
from stacking.config_loading import load_recipe
from stacking.deepspeed_config import Accelerator, load_deepspeed_config, resolve
from stacking.engine import TrainEngine
from stacking.errors import ConfigError

deepspeed = sys.modules["deepspeed"]
parameter_offload = sys.modules["deepspeed.runtime.zero.parameter_offload"]
partition_parameters = sys.modules["deepspeed.runtime.zero.partition_parameters"]
ROOT = Path(__file__).resolve().parents[2]
ENGINE_FILES = sorted((ROOT / "deepspeed_configs").glob("*.json"))
GPU = Accelerator("cuda", supports_fp16=True, supports_bf16=True, fused_adam=True)
coordinators = sys.modules["deepspeed.runtime.zero.partitioned_param_coordinator"]


def source_of(owner: object) -> str:
    return inspect.getsource(owner)  # type: ignore[arg-type]


def test_the_private_names_of_the_tear_down_exist() -> None:
    assert isinstance(parameter_offload.FWD_MODULE_STACK, list)
    coordinator = coordinators.PartitionedParameterCoordinator
    method = coordinator._PartitionedParameterCoordinator__params_to_release
    cells = [cell.cell_contents for cell in method.__closure__ or ()]
    assert any(hasattr(found, "cache_clear") for found in [method, *cells])
    patcher = source_of(partition_parameters)
    assert "InsertPostInitMethodToModuleSubClasses.linear_bk" in patcher
    created = source_of(deepspeed.DeepSpeedEngine)
    assert "self.module_forward_pre_hook = " in created
    assert "self.module_forward_post_hook = " in created


def test_the_private_names_of_the_flat_state_exist() -> None:
    modules = sys.modules
    stage12 = source_of(modules["deepspeed.runtime.zero.stage_1_and_2"])
    assert "self.single_partition_of_fp32_groups" in stage12
    assert "self._hp_optimizer_states_linked" in stage12
    assert "def _lazy_init_hp_params_optimizer_state" in stage12
    stage3 = source_of(modules["deepspeed.runtime.zero.stage3"])
    assert "self.fp32_partitioned_groups_flat" in stage3
    assert "self.sub_group_to_group_id[sub_group_idx] = " in stage3
    assert "._z3_optimizer = " in stage3
    for name in ("get_local_fp32_param", "set_local_hp_param"):
        assert f"def {name}" in stage3
    fragments = source_of(modules["deepspeed.utils.tensor_fragment"])
    assert "param.set_full_hp_param(" in fragments
    assert "def get_hp_fragment(self, optim_state_key=None)" in fragments
    assert "lp_fragment_address: fragment_address" in fragments
    assert "hasattr(param, '_hp_mapping')" in fragments
    partition = source_of(sys.modules["deepspeed.runtime.zero.partition_parameters"])
    assert "param.partition_numel = partition_numel" in partition


def test_the_private_names_of_the_gradients_exist() -> None:
    modules = sys.modules
    for stage, offloads in (("stage_1_and_2", "cpu_offload"), ("stage3", "offload_optimizer")):
        text = source_of(modules[f"deepspeed.runtime.zero.{stage}"])
        assert "self.get_grad_norm_direct(self.averaged_gradients[i]" in text
        assert f"self.{offloads} = " in text
    bf16 = source_of(modules["deepspeed.runtime.bf16_optimizer"])
    assert "non_expert_grads_for_norm.append(self.fp32_groups_gradients[i][j])" in bf16
    assert "self.global_steps += 1" in source_of(deepspeed.DeepSpeedEngine)


def test_one_optimizer_still_prints_about_memory() -> None:
    text = source_of(sys.modules["deepspeed.runtime.bf16_optimizer"])
    assert "see_memory_usage('begin bf16_optimizer', force=True)" in text, "drop prints_to_log"


def test_the_shared_memory_op_is_still_built_through_the_hook_that_we_replace() -> None:
    text = source_of(sys.modules["deepspeed.comm.torch"])
    assert "def build_shm_op()" in text
    assert len(re.findall(r"build_shm_op\(\)", text)) >= 2


@pytest.mark.parametrize(
    ("defect", "mended_by"),
    [
        ("destroy() leaves the engine's two hooks on the module", "module_forward_pre_hook"),
        ("destroy() leaves FWD_MODULE_STACK (issue 7204)", "FWD_MODULE_STACK"),
        ("destroy() leaves the TensorBoard writer open", "monitor"),
    ],
)
def test_a_defect_that_we_work_around_still_stands(defect: str, mended_by: str) -> None:
    text = source_of(deepspeed.DeepSpeedEngine.destroy)
    assert mended_by not in text, f"mended in DeepSpeed: {defect}; drop the work-around"


def test_moments_of_later_groups_are_still_linked_too_early() -> None:
    module = sys.modules["deepspeed.runtime.zero.stage_1_and_2"]
    step = source_of(module.DeepSpeedZeroOptimizer._optimizer_step)
    assert "_lazy_init_hp_params_optimizer_state" in step, "drop OptimizerState._link_moments"


def test_the_private_names_of_muon_exist() -> None:
    muon = importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    assert "self.aux_optimizer" in source_of(muon.MuonWithAuxAdam)
    stage12 = sys.modules["deepspeed.runtime.zero.stage_1_and_2"].DeepSpeedZeroOptimizer
    whole = "torch.zeros(sum(t.numel() for t in tensor_list)"  # OptimizerState._moment_shape
    assert whole in source_of(stage12._muon_momentum_buffer)
    assert "params_in_partition.append" in source_of(stage12)
    assert "self.param_to_partition_ids[i][param_id]" in source_of(stage12.average_tensor)
    assert "getattr(tensor_list[0], 'use_muon'" in source_of(stage12._is_muon_group)
    stage3 = sys.modules["deepspeed.runtime.zero.stage3"].DeepSpeedZeroOptimizer_Stage3
    assert "torch.zeros(num_elements" in source_of(stage3._create_momentum_buffer)
    assert "if self.use_muon and self.reduce_scatter" in source_of(stage3.__init__)


def test_muon_is_still_compiled_and_its_update_still_clipped() -> None:
    kernels = importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    text = source_of(kernels)
    assert "@compiler.compile()\ndef muon_update" in text, "drop client_optimizers.plain_kernels"
    assert "sqrt(rows / cols) if rows > cols" in text, "see ParameterGroup.rate_factor"
    stage12 = sys.modules["deepspeed.runtime.zero.stage_1_and_2"].DeepSpeedZeroOptimizer
    clip = source_of(stage12.step)
    assert "clip covers the orthogonalized gradient" in clip, "drop _clipping_faults"


def test_round_robin_gradients_still_link_the_wrong_parts_of_the_masters() -> None:
    """Offsets are handed over for padded parameters alone; see deepspeed_checks."""
    stage12 = sys.modules["deepspeed.runtime.zero.stage_1_and_2"].DeepSpeedZeroOptimizer
    link = source_of(stage12._link_all_hp_params)
    assert "if any(self.round_robin_bit16_padding[i])" in link, "allow round_robin_gradients"


def test_fused_lamb_still_counts_by_parameter() -> None:
    step = source_of(importlib.import_module("deepspeed.ops.lamb.fused_lamb").FusedLamb.step)
    assert "state['step'] += 1" in step
    assert "state['exp_avg_sq'] = " in step


def test_fused_adam_still_counts_in_the_last_parameter_of_a_group_alone() -> None:
    step = source_of(sys.modules["deepspeed.ops.adam.fused_adam"].FusedAdam.step)
    assert "assume same step across group" in step, "read OptimizerState._counts again"
    assert step.count("state['step'] += 1") == 3, "once for each type of a group, not by parameter"


def test_zero3_still_overruns_odd_sizes_in_set_full_hp_param() -> None:
    module = sys.modules["deepspeed.runtime.zero.stage3"]
    text = source_of(module.DeepSpeedZeroOptimizer_Stage3.set_full_hp_param)
    assert "fp32_opt_state_partition.numel() * my_rank" in text, "drop optimizer_state._write_full"


def test_the_group_of_hierarchical_partitioning_is_still_made_once_alone() -> None:
    groups = sys.modules["deepspeed.utils.groups"]
    assert hasattr(groups, "_ZERO_PARAM_INTRA_PARALLEL_GROUP")
    made = source_of(groups._create_zero_param_parallel_group)
    assert "assert _ZERO_PARAM_INTRA_PARALLEL_GROUP is None" in made, "drop _sharing_group"
    started = source_of(partition_parameters.Init.__init__)
    assert "self.zero_param_process_group is None" in started


@pytest.mark.parametrize("path", ENGINE_FILES, ids=lambda path: path.stem)
def test_deepspeed_itself_takes_every_json_of_ours(path: Path) -> None:
    recipe = load_recipe(ROOT / "launch" / "recipes" / "tiny_test.json")
    resolved = resolve(
        load_deepspeed_config(path), recipe, world_size=1, accelerator=GPU,
        strict_precision=True, stage=0,
    )  # fmt: skip
    parsed = sys.modules["deepspeed.runtime.config"].DeepSpeedConfig(resolved.deepspeed)
    zero = json.loads(path.read_text())["zero_optimization"]
    assert parsed.zero_config.stage == zero["stage"]
    assert parsed.zero_config.zero_hpz_partition_size == zero.get("zero_hpz_partition_size", 1)


def test_apex_that_is_not_there_is_a_clear_error() -> None:
    with pytest.raises(ConfigError, match="another project"):
        engine_module._layer_norm(True)


def test_without_deepspeed_training_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['deepspeed'] = None\n"
        "from stacking import BertConfig, BertForPreTraining, Recipe, Trainer, engine, grow\n"
        "from stacking.errors import ConfigError\n"
        "try: engine.start()\n"
        "except ConfigError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "pip install deepspeed" in done.stdout, done.stderr


class FullDisk:
    """Stands for DeepSpeed's monitors, and for TensorBoard's writer, on a disk without room."""

    enabled = True

    def __init__(self) -> None:
        self.calls = 0
        self.tb_monitor = SimpleNamespace(summary_writer=self)

    def write_events(self, events: list[tuple[str, float, int]]) -> None:
        self.calls += 1
        raise OSError(errno.ENOSPC, "No space left on device")

    def close(self) -> None:
        self.write_events([])


def test_a_full_disk_ends_the_monitors_and_not_the_run() -> None:
    built, disk = object.__new__(TrainEngine), FullDisk()
    built._engine = SimpleNamespace(monitor=disk)
    with pytest.warns(UserWarning, match="the monitors write no more: .*No space left"):
        built.write_monitor([("Train/loss", 1.0, 1)])
    built.write_monitor([("Train/loss", 1.0, 2)])
    assert disk.calls == 1
    engine_teardown._close_monitors(built._engine)
    assert disk.calls == 2
