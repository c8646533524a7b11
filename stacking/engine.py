"""Build and destroy a DeepSpeed engine; fp32 weights and Adam moments in and out.

The only importer of deepspeed. Facts behind each step: DeepSpeed 0.19.8.
`tests/unit/test_engine.py` names every private DeepSpeed attribute used here and fails when a
release moves one.
"""

import copy
import gc
import importlib
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import cpp_extension

from stacking import distributed, engine_options
from stacking.config import BertConfig, Freeze, OptimizerConfig
from stacking.dataset import MaskedLMBatch
from stacking.deepspeed_config import Accelerator, ResolvedEngine
from stacking.encoder import EncoderLayer
from stacking.errors import ConfigError
from stacking.freezing import apply_freeze
from stacking.modeling import BertForPreTraining
from stacking.optimizer_state import OptimizerState
from stacking.parameter_groups import parameter_groups
from stacking.snapshot import Snapshot

try:
    import deepspeed
    from deepspeed.accelerator import get_accelerator
    from deepspeed.git_version_info import installed_ops
    from deepspeed.runtime.zero import (
        parameter_offload,
        partition_parameters,
        partitioned_param_coordinator,
    )
except ImportError:  # `from stacking import grow` works without it; start() says what to install
    deepspeed = None


def start(timeout_minutes: float = 10.0) -> Accelerator:
    """Join the process group and say what this machine can do.

    Raises ConfigError where DeepSpeed is not installed.
    """
    if deepspeed is None:
        raise ConfigError("DeepSpeed is not installed; training needs it: pip install deepspeed")
    distributed.prepare_environment()
    log_to(None)
    # DeepSpeed compiles a shared-memory op on the CPU that only inference_all_reduce uses: 48 s,
    # and fatal without a compiler. tests/unit/test_engine.py tells when the hook is gone.
    vars(sys.modules["deepspeed.comm.torch"])["build_shm_op"] = lambda: None
    deepspeed.init_distributed(verbose=False, timeout=timedelta(minutes=timeout_minutes))
    kind = get_accelerator().device_name()
    get_accelerator().set_device(distributed.local_rank())
    if kind == "cpu":
        distributed.limit_cpu_threads()
    return Accelerator(
        kind="cuda" if kind == "cuda" else "cpu",
        supports_fp16=get_accelerator().is_fp16_supported(),
        supports_bf16=get_accelerator().is_bf16_supported(),
        fused_adam=kind == "cuda" and _has_fused_adam(),
    )


def _has_fused_adam() -> bool:
    """Whether DeepSpeed's FusedAdam kernel is built in, or a CUDA toolkit is here to build it."""
    return bool(installed_ops.get("fused_adam")) or cpp_extension.CUDA_HOME is not None


def current_device() -> torch.device:
    """This rank's device."""
    return torch.device(get_accelerator().current_device_name())


def synchronize() -> None:
    """Wait for the device: only where time is taken or numbers are read."""
    get_accelerator().synchronize()


class TrainEngine:
    """One stage's DeepSpeed engine: steps, evaluation, and fp32 state in and out."""

    def __init__(
        self,
        config: BertConfig,
        optimizer: OptimizerConfig,
        resolved: ResolvedEngine,
        snapshot: Snapshot,
        freeze: Freeze | None = None,
    ) -> None:
        """Build a fresh module and engine that hold `snapshot`. Collective.

        What `freeze` names has no master, no moments and no gradients to reduce. A history that
        `snapshot` has of it ends here.
        """
        faults = snapshot.faults()
        assert not faults, faults
        self.config = config
        model = BertForPreTraining(config, layer_norm=_layer_norm(resolved.apex_layer_norm))
        model.load_state_dict(snapshot.weights, strict=True)
        apply_freeze(model, freeze)
        still = {n: snapshot.weights[n] for n, p in model.named_parameters() if not p.requires_grad}
        # They cannot change; the module's own copies may have 16 bits. The main rank keeps them.
        self._frozen = still if distributed.is_main() else {}
        self._frozen_shapes = {name: weight.shape for name, weight in still.items()}
        self._new_names = snapshot.new_names
        self._groups = parameter_groups(model, optimizer, snapshot)
        if resolved.compile is not None:
            # ZeRO-3 then gathers a layer at a time, and none of its hooks is inside the graph.
            deepspeed.utils.set_z3_leaf_modules(model, [EncoderLayer])
        self._engine, _, _, _ = deepspeed.initialize(
            model=model,
            model_parameters=[group.for_optimizer(model) for group in self._groups],
            config=copy.deepcopy(resolved.deepspeed),  # DeepSpeed keeps and edits what it is given
        )
        engine_options.apply(model, resolved)
        OptimizerState(self._engine, self._groups).write(snapshot)
        if snapshot.loss_scale is not None and self._loss_scaler() is not None:
            self._loss_scaler().cur_scale = snapshot.loss_scale

    @property
    def device(self) -> torch.device:
        """Where batches must be."""
        return torch.device(self._engine.device)

    def restore_counters(self, global_step: int, global_batch_size: int) -> None:
        """Continue DeepSpeed's own counters: monitors use them as their x axis."""
        self._engine.global_steps = global_step
        self._engine.global_samples = global_step * global_batch_size

    def train_step(
        self,
        batches: Sequence[MaskedLMBatch],
        *,
        learning_rate: float,
        new_learning_rate: float | None = None,
        counts: Tensor,
        seed: int,
    ) -> Tensor:
        """One optimizer update from this rank's micro batches.

        `new_learning_rate`: of the parameters that came with the stage; None: `learning_rate` too.
        `counts` [2]: masked tokens and sequences of this step over *all* ranks; the loss is their
        mean, whatever the number of ranks and micro batches. Returns this rank's detached sums
        [3]: MLM loss, NSP loss, correct predictions.
        """
        new_rate = learning_rate if new_learning_rate is None else new_learning_rate
        for group, ours in zip(self._engine.optimizer.param_groups, self._groups, strict=True):
            group["lr"] = new_rate if ours.is_new else learning_rate
        # DeepSpeed divides by the accumulation steps and averages over ranks: undone here.
        share = len(batches) * distributed.world_size()
        totals = torch.zeros(3, device=self.device)
        self._engine.train()
        for micro_step, batch in enumerate(batches):
            torch.manual_seed(_mix(seed, micro_step, distributed.rank()))  # dropout
            sums = self._forward(batch)
            loss = sums["mlm_loss_sum"] * (share / counts[0])
            if "nsp_loss_sum" in sums:
                loss = loss + sums["nsp_loss_sum"] * (share / counts[1])
            self._engine.backward(loss)
            self._engine.step()
            totals += _totals(sums)
        return totals

    @torch.no_grad()
    def evaluate(self, batches: Iterator[MaskedLMBatch]) -> Tensor:
        """Sums over all ranks [5]: MLM loss, NSP loss, correct, masked tokens, sequences."""
        self._engine.eval()
        totals = torch.zeros(5, dtype=torch.float64, device=self.device)
        for batch in batches:
            totals[:3] += _totals(self._forward(batch))
            labels = batch.next_sentence_labels
            totals[4] += 0 if labels is None else int((labels >= 0).sum())
            totals[3] += batch.num_masked
        return distributed.sum_over_ranks(totals)

    def _forward(self, batch: MaskedLMBatch) -> dict[str, Tensor]:
        is_full = batch.num_real_tokens == batch.input_ids.numel()
        batch = batch.to(self.device)
        sums: dict[str, Tensor] = self._engine(
            input_ids=batch.input_ids,
            token_type_ids=batch.token_type_ids,
            attention_mask=None if is_full else batch.attention_mask,
            masked_lm_positions=batch.masked_lm_positions,
            masked_lm_ids=batch.masked_lm_ids,
            next_sentence_labels=batch.next_sentence_labels,
        )
        return sums

    @property
    def skipped_steps(self) -> int:
        """Updates that fp16 overflow made DeepSpeed skip, in this engine."""
        return int(self._engine.skipped_steps)

    @property
    def loss_scale(self) -> float | None:
        """Dynamic fp16 loss scale; None in other precisions."""
        return float(self._loss_scaler().cur_scale) if self._loss_scaler() is not None else None

    @property
    def grad_norm(self) -> float | None:
        """Global gradient norm of the last step, before clipping; synchronises."""
        norm = self._engine.get_global_grad_norm()
        return None if norm is None else float(norm)

    def write_monitor(self, events: Sequence[tuple[str, float, int]]) -> None:
        """Send (name, value, global_step) to DeepSpeed's TensorBoard, W&B or CSV monitors."""
        if self._engine.monitor.enabled:
            self._engine.monitor.write_events(list(events))

    def snapshot(self) -> Snapshot:
        """Full fp32 weights and moments on every rank's CPU, one tensor at a time. Collective."""
        trained = OptimizerState(self._engine, self._groups).read()
        frozen = distributed.tensors_of_main(self._frozen, self._frozen_shapes, self.device)
        return replace(
            trained,
            weights=trained.weights | frozen,
            new_names=self._new_names,
            loss_scale=self.loss_scale,
        )

    def _loss_scaler(self) -> Any:  # DeepSpeed ships no types
        if not self._engine.fp16_enabled():
            return None
        return getattr(self._engine.optimizer, "loss_scaler", None)

    def destroy(self) -> None:
        """Tear the engine down so that nothing holds its memory. Collective; call once."""
        engine, module = self._engine, self._engine.module
        del self._engine
        for name in ("module_forward_pre_hook", "module_forward_post_hook"):
            hook = getattr(engine, name, None)  # destroy() leaves them; they pin the engine
            if hook is not None:
                hook.remove()
        engine.destroy()
        _close_monitors(engine)
        for parameter in module.parameters():
            parameter.grad = None
        _release_zero3_globals(module)
        del engine, module
        gc.collect()
        get_accelerator().empty_cache()
        distributed.barrier()


def _layer_norm(use_apex: bool) -> Any:  # apex ships no types
    if not use_apex:
        return nn.LayerNorm
    try:  # optional, built from source by the user
        fused = importlib.import_module("apex.normalization").FusedLayerNorm
        fused(8)  # its CUDA extension is looked up only now
    except (ImportError, AttributeError, RuntimeError) as error:
        raise ConfigError(
            f"apex.fused_layer_norm: NVIDIA apex with its CUDA extensions is needed ({error}); "
            "build it from NVIDIA's source with --cpp_ext --cuda_ext (PyPI's 'apex' is another "
            "project), or set it to false"
        ) from error
    return fused


def _totals(sums: Mapping[str, Tensor]) -> Tensor:
    mlm = sums["mlm_loss_sum"].detach()
    nsp = sums["nsp_loss_sum"].detach() if "nsp_loss_sum" in sums else torch.zeros_like(mlm)
    return torch.stack([mlm, nsp, sums["mlm_correct"].to(mlm.dtype)])


def _mix(seed: int, micro_step: int, rank: int) -> int:
    """A distinct dropout seed for each (step seed, micro step, rank)."""
    return (seed * 1_000_003 + micro_step * 8_191 + rank) % 2**63


def log_to(log_file: Path | None) -> None:
    """Send DeepSpeed's and Python's warnings to the run's log file, on rank 0; else nowhere."""
    handler: logging.Handler = logging.NullHandler()
    if log_file is not None and distributed.is_main():
        handler = logging.FileHandler(log_file)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    logging.captureWarnings(True)
    for name in ("DeepSpeed", "py.warnings"):
        logger = logging.getLogger(name)
        for old in list(logger.handlers):
            logger.removeHandler(old)
        logger.addHandler(handler)
        logger.propagate = False
    logging.getLogger("DeepSpeed").setLevel(logging.INFO)


def _close_monitors(engine: Any) -> None:  # DeepSpeed ships no types
    """Close the TensorBoard writer, which engine.destroy() forgets."""
    monitor = getattr(getattr(engine, "monitor", None), "tb_monitor", None)
    writer = getattr(monitor, "summary_writer", None)
    if writer is not None:
        writer.close()


def _release_zero3_globals(module: nn.Module) -> None:
    """Forget what ZeRO-3 keeps in globals after engine.destroy() (DeepSpeed issue 7204)."""
    stack = parameter_offload.FWD_MODULE_STACK
    stack[:] = [entry for entry in stack if entry is not module]
    coordinator = partitioned_param_coordinator.PartitionedParameterCoordinator
    method = getattr(coordinator, "_PartitionedParameterCoordinator__params_to_release", None)
    cells = [cell.cell_contents for cell in getattr(method, "__closure__", None) or ()]
    for candidate in [method, *cells]:
        if hasattr(candidate, "cache_clear"):
            candidate.cache_clear()
    initialiser = partition_parameters.InsertPostInitMethodToModuleSubClasses
    if hasattr(initialiser, "linear_bk"):
        torch.nn.functional.linear = initialiser.linear_bk
