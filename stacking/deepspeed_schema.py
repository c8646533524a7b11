"""Which DeepSpeed keys this trainer takes, which it refuses and why. For DeepSpeed 0.19.8.

DeepSpeed ignores unknown top-level keys, knows no "auto" and stops at removed keys even when they
are disabled, so the whole document is checked here first. Fields without a description mean what
DeepSpeed's documentation says.
"""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from stacking.config_base import Frozen

# Keys that belong in the recipe -> where. "auto" is accepted there, as in other trainers' files.
OWNED_BY_RECIPE = {
    "train_batch_size": "global_batch_size",
    "gradient_accumulation_steps": "global_batch_size, from which it is derived",
    "gradient_clipping": "optimizer.max_grad_norm",
    "optimizer.params.lr": "learning_rate.peak",
    "optimizer.params.betas": "optimizer.betas",
    "optimizer.params.eps": "optimizer.eps",
    "optimizer.params.weight_decay": "optimizer.weight_decay",
    "optimizer.params.max_grad_norm": "optimizer.max_grad_norm",
    "scheduler": "learning_rate",
    "data_efficiency": "data and stages",
    "dataloader_drop_last": "data; every rank gets equally many batches by construction",
    "seed": "seed",
}

# Keys that stop DeepSpeed 0.19.8, even when disabled -> what to do instead.
REMOVED = {
    "amp": "use fp16, bf16 or torch_autocast",
    "compression_training": "train without it and compress the exported model",
    "curriculum_learning": "list stages in the recipe",
    "eigenvalue": "it only served quantize_training",
    "elasticity": "resume with another number of ranks instead: --resume auto",
    "graph_harvesting": "delete it",
    "nebula": "checkpoints go to the run folder",
    "progressive_layer_drop": "grow the depth with the recipe's stages",
    "quantize_training": "train without it and quantise the exported model",
    "sparse_attention": "delete it; attention here is fused and exact",
    "sparse_gradients": "delete it; the embedding's gradient is dense because it is tied",
    "zero_optimization.mics_shard_size": "use zero_hpz_partition_size",
    "zero_optimization.mics_hierarchical_params_gather": "use zero_hpz_partition_size",
    "zero_optimization.zeropp_loco_param": "use zero_quantized_gradients alone",
}

# Keys that DeepSpeed knows and this trainer cannot honour -> why.
REFUSED = {
    **{
        f"activation_checkpointing.{key}": "DeepSpeed applies it only to models that call its own "
        "functions; here torch checkpoints the layers: enabled and interval"
        for key in (
            "partition_activations",
            "contiguous_memory_optimization",
            "cpu_checkpointing",
            "number_checkpoints",
            "synchronize_checkpoint_boundary",
            "profile",
        )
    },
    "aio": "NVMe offload is not supported; offload to the cpu",
    "autotuning": "it restarts the script and ends the process between stages; "
    "tune each depth by hand with 'deepspeed' inside the recipe's stages",
    "checkpoint": "checkpoints are written by this trainer, see the recipe's checkpoint",
    **{
        f"compile.{key}": "DeepCompile makes one graph of one whole model, on a GPU only, which "
        "does not survive the change of model between stages; here torch compiles the layers"
        for key in (
            "deepcompile",
            "autoep_non_moe",
            "passes",
            "offload_activation",
            "offload_parameters",
            "offload_opt_states",
            "free_activation",
            "free_activation_threshold",
            "double_buffer",
            "symmetric_memory",
            "debug_log",
        )
    },
    "gradient_allreduce_op": "losses are divided by global counts, which needs the default, mean",
    "hybrid_engine": "it is for inference",
    "managed_gradient_accumulation": "the trainer calls the engine on every micro batch",
    "pipeline": "the trainer is data-parallel only",
    "sequence_parallel_size": "the trainer is data-parallel only",
    "tensor_parallel": "the trainer is data-parallel only",
    "bfloat16": "the key is bf16",
    "zero_optimization.cpu_offload": "use offload_optimizer {device: cpu}",
    "zero_optimization.cpu_offload_param": "use offload_param {device: cpu}",
    "zero_optimization.elastic_checkpoint": "checkpoints here load on any number of ranks",
    "zero_optimization.zenflow": "it delays updates, so resuming would not be exact",
}


def _whole(value: object) -> object:
    """Sizes are often written 5e8, which JSON reads as a float."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


_Count = Annotated[int, BeforeValidator(_whole), Field(ge=0)]
_Positive = Annotated[int, BeforeValidator(_whole), Field(gt=0)]
# DeepSpeed imports whatever is named here, and stops at what it does not find.
_Module = Literal[
    "torch.nn.Linear",
    "torch.nn.Embedding",
    "torch.nn.LayerNorm",
    "stacking.layers.ZeroLinear",
    "stacking.layers.ZeroEmbedding",
    "stacking.attention.FusedProjection",
]
_Dtype = Literal["fp32", "fp16", "bf16"]


class Fp16(Frozen):
    """fp16 with fp32 master weights and a dynamic (loss_scale 0) or static loss scale."""

    enabled: bool = False
    auto_cast: bool = False
    loss_scale: float = Field(default=0, ge=0, description="0: dynamic.")
    initial_scale_power: int = Field(default=16, ge=0, le=32, description="First scale: 2 ** this.")
    loss_scale_window: _Positive = 1000
    hysteresis: _Positive = 2
    consecutive_hysteresis: bool = False
    min_loss_scale: _Positive = 1


class Bf16(Frozen):
    """bf16 with fp32 master weights."""

    enabled: bool = False
    immediate_grad_update: bool = False
    check_grad_overflow: Literal[True] = Field(
        default=True, description="A gradient that is no number must not reach the weights."
    )


class TorchAutocast(Frozen):
    """fp32 weights, bf16 arithmetic where torch deems it safe."""

    enabled: bool = False
    dtype: Literal["bfloat16"] = "bfloat16"
    lower_precision_safe_modules: list[_Module] = Field(
        default_factory=list, description="Full class names; DeepSpeed's own list if absent."
    )


class DataTypes(Frozen):
    """Type in which gradients accumulate."""

    grad_accum_dtype: _Dtype = "fp32"


class OffloadOptimizer(Frozen):
    """Optimizer state and update on the CPU (ZeRO 1 to 3)."""

    device: Literal["none", "cpu"] = "none"
    pin_memory: bool = True
    buffer_count: _Positive = 4
    fast_init: bool = False
    ratio: float = Field(default=1.0, ge=0, le=1)
    cpuadam_cores_perc: float = Field(default=0.8, gt=0, le=1)


class OffloadParam(Frozen):
    """Parameters on the CPU (ZeRO 3)."""

    device: Literal["none", "cpu"] = "none"
    pin_memory: bool = True
    buffer_count: _Positive = 5
    buffer_size: _Positive = 10**8
    max_in_cpu: _Count = 10**9


class ZeroOptimization(Frozen):
    """Sharding of optimizer state (1), gradients (2) and parameters (3) over the ranks."""

    stage: Literal[0, 1, 2, 3] = 0
    contiguous_gradients: bool = True
    reduce_scatter: bool = True
    reduce_bucket_size: _Positive = 5 * 10**8
    use_multi_rank_bucket_allreduce: bool = True
    allgather_partitions: bool = True
    allgather_bucket_size: _Positive = 5 * 10**8
    overlap_comm: bool = False
    compute_grad_norm: Literal[True] = Field(
        default=True, description="The trainer logs the gradient norm."
    )
    round_robin_gradients: bool = False
    parameter_alignment: bool = False
    ignore_unused_parameters: bool = True
    offload_optimizer: OffloadOptimizer = Field(default_factory=OffloadOptimizer)
    offload_param: OffloadParam = Field(default_factory=OffloadParam)
    sub_group_size: _Positive = 10**9
    stage3_prefetch_bucket_size: _Count = 5 * 10**7
    stage3_param_persistence_threshold: _Count = 10**5
    stage3_model_persistence_threshold: _Count = 2**63 - 1
    stage3_max_live_parameters: _Count = 10**9
    stage3_max_reuse_distance: _Count = 10**9
    stage3_module_granularity_threshold: _Count = 0
    stage3_use_all_reduce_for_fetch_params: bool = False
    stage3_allgather_sequential: bool = False
    zero_hpz_partition_size: _Positive = 1
    zero_quantized_weights: bool = False
    zero_quantized_gradients: bool = False
    memory_efficient_linear: bool = True
    log_trace_cache_warnings: bool = False
    enable_sanity_checks: bool = False


class OptimizerParams(Frozen):
    """How the update is computed; its numbers are the recipe's."""

    adam_w_mode: Literal[True] = Field(default=True, description="Weight decay is decoupled.")
    torch_adam: bool = Field(default=False, description="torch.optim.AdamW, not FusedAdam.")
    ns_method: Literal["gram", "standard"] = Field(
        default="gram", description="Muon only: on which matrix Newton-Schulz iterates."
    )
    fused: bool = Field(default=True, description="torch_adam only: one kernel for all tensors.")
    max_coeff: float = Field(default=10.0, gt=0, description="Lamb only: largest trust ratio.")
    min_coeff: float = Field(default=0.01, gt=0, description="Lamb only: smallest trust ratio.")


class Optimizer(Frozen):
    """Which one: Adam and AdamW are the same here; Muon updates the layers' matrices alone."""

    type: Literal["Adam", "AdamW", "Lamb", "Muon"] = "AdamW"
    params: OptimizerParams = Field(default_factory=OptimizerParams)


class TensorBoard(Frozen):
    """DeepSpeed's TensorBoard monitor; output_path defaults to the run folder."""

    enabled: bool = False
    output_path: str = ""
    job_name: str = "DeepSpeedJobName"


class CsvMonitor(Frozen):
    """DeepSpeed's CSV monitor; output_path defaults to the run folder."""

    enabled: bool = False
    output_path: str = ""
    job_name: str = "DeepSpeedJobName"


class Wandb(Frozen):
    """DeepSpeed's Weights & Biases monitor."""

    enabled: bool = False
    group: str | None = None
    team: str | None = None
    project: str = "deepspeed"


class FlopsProfiler(Frozen):
    """DeepSpeed's profiler, once per engine."""

    enabled: bool = False
    recompute_fwd_factor: float = Field(default=0.0, ge=0)
    profile_step: _Positive = 1
    module_depth: int = Field(default=-1, ge=-1)
    top_modules: _Positive = 1
    detailed: bool = True
    output_file: str | None = None


class CommsLogger(Frozen):
    """DeepSpeed's log of collectives."""

    enabled: bool = False
    verbose: bool = False
    prof_all: bool = True
    debug: bool = False
    prof_ops: list[str] = Field(default_factory=list)


class Apex(Frozen):
    """Ours, not DeepSpeed's: which parts of NVIDIA apex to use where it is installed."""

    fused_layer_norm: bool = False
    fused_lamb: bool = Field(default=False, description="Its FusedLAMB where the type is Lamb.")


class ActivationCheckpointing(Frozen):
    """Ours, not DeepSpeed's: layers whose activations are computed again in the backward pass."""

    enabled: bool = False
    interval: _Positive = Field(
        default=1, description="Every interval-th layer that trains; 1: all of them."
    )


class Compile(Frozen):
    """Ours, not DeepSpeed's: torch.compile on the encoder layers, in training and evaluation."""

    enabled: bool = False
    backend: Literal["inductor", "aot_eager", "eager"] = Field(
        default="inductor", description="Only inductor is faster; the others are to find faults."
    )
    mode: Literal["default", "max-autotune-no-cudagraphs"] = Field(
        default="default", description="Of inductor: how long it looks for fast kernels."
    )
    dynamic: bool | None = Field(
        default=None,
        description="true: one graph for all sizes; false: one for each; "
        "null: for the first sizes, and one for all once they change.",
    )


class Unpadding(Frozen):
    """Ours, not DeepSpeed's: padding is not computed. Not together with `compile`."""

    enabled: bool = True


class EngineSettings(Frozen):
    """A whole DeepSpeed JSON: how the engine runs on given hardware."""

    train_micro_batch_size_per_gpu: _Positive | None = Field(
        default=None, description="Sequences per rank in one forward; absent: chosen, at most 32."
    )
    optimizer: Optimizer = Field(default_factory=Optimizer)
    fp16: Fp16 = Field(default_factory=Fp16)
    bf16: Bf16 = Field(default_factory=Bf16)
    torch_autocast: TorchAutocast = Field(default_factory=TorchAutocast)
    data_types: DataTypes = Field(default_factory=DataTypes)
    zero_optimization: ZeroOptimization = Field(default_factory=ZeroOptimization)
    zero_force_ds_cpu_optimizer: bool = True
    communication_data_type: _Dtype | None = None
    prescale_gradients: bool = False
    gradient_predivide_factor: float = Field(default=1.0, gt=0)
    steps_per_print: _Positive = Field(
        default=10, description="Optimizer steps between lines of metrics and of DeepSpeed's log."
    )
    wall_clock_breakdown: bool = False
    memory_breakdown: bool = False
    dump_state: bool = False
    disable_python_gc: bool = False
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    comms_logger: CommsLogger = Field(default_factory=CommsLogger)
    flops_profiler: FlopsProfiler = Field(default_factory=FlopsProfiler)
    tensorboard: TensorBoard = Field(default_factory=TensorBoard)
    csv_monitor: CsvMonitor = Field(default_factory=CsvMonitor)
    wandb: Wandb = Field(default_factory=Wandb)
    apex: Apex = Field(default_factory=Apex)
    activation_checkpointing: ActivationCheckpointing = Field(
        default_factory=ActivationCheckpointing
    )
    compile: Compile = Field(default_factory=Compile)
    unpadding: Unpadding = Field(default_factory=Unpadding)
