"""Build and destroy a DeepSpeed engine; fp32 weights and Adam moments in and out.

With engine_module and engine_teardown the only importer of deepspeed, 0.19.8.
`tests/unit/test_engine.py` names every private DeepSpeed attribute used here and fails when a
release moves one.
"""

import copy
import functools
import math
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from datetime import timedelta

import torch
from torch import Tensor, nn
from torch.utils import cpp_extension

from stacking import __version__, distributed, engine_options
from stacking.batch import Batch
from stacking.client_optimizers import optimizer_maker, plain_kernels
from stacking.config import BertConfig, Freeze, OptimizerConfig
from stacking.deepspeed_config import Accelerator, ResolvedEngine
from stacking.engine_log import log_to, prints_to_log
from stacking.engine_module import ModelMaker, blueprint, build_module, zero_stage
from stacking.engine_teardown import collect, tear_down
from stacking.errors import ConfigError, NonFiniteError
from stacking.freezing import apply_freeze
from stacking.gradient_norms import CohortNorms
from stacking.loss_scaling import LossScaling
from stacking.modeling import BertForPreTraining
from stacking.optimizer_state import OptimizerState
from stacking.parameter_groups import check_history, parameter_groups
from stacking.residuals import recorded
from stacking.snapshot import Snapshot
from stacking.unpadding import can_unpad, find_layout

try:
    import deepspeed
    from deepspeed.accelerator import get_accelerator
    from deepspeed.git_version_info import installed_ops
except ImportError:  # `from stacking import grow` works without it; start() says what to install
    deepspeed = None


def start(hang_timeout: float = 0.0) -> Accelerator:
    """Join the process group and say what this machine can do.

    A collective may take 40 minutes, or twice `hang_timeout` seconds, as others wait in one while
    the main rank grows a model. Ranks that hang are found by rank_watch.py, sooner and by name.

    Raises ConfigError where DeepSpeed is not installed.
    """
    if deepspeed is None:
        raise ConfigError("DeepSpeed is not installed; training needs it: pip install deepspeed")
    distributed.prepare_memory()
    distributed.prepare_environment()
    distributed.require_its_mpi()
    log_to(None)
    # DeepSpeed compiles a shared-memory op on the CPU that only inference_all_reduce uses: 48 s,
    # and fatal without a compiler. tests/unit/test_engine.py tells when the hook is gone.
    vars(sys.modules["deepspeed.comm.torch"])["build_shm_op"] = lambda: None
    timeout = max(timedelta(minutes=40), timedelta(seconds=2 * hang_timeout))
    with distributed.meeting_of_ranks():
        port = distributed.master_port()  # where MPI knows the ranks alone
        deepspeed.init_distributed(verbose=False, timeout=timeout, distributed_port=port)
    kind = get_accelerator().device_name()
    get_accelerator().set_device(distributed.local_rank())
    if kind == "cpu":
        distributed.limit_cpu_threads()
        distributed.keep_freed_memory()
    return Accelerator(
        kind="cuda" if kind == "cuda" else "cpu",
        supports_fp16=get_accelerator().is_fp16_supported(),
        supports_bf16=get_accelerator().is_bf16_supported(),
        fused_adam=kind == "cuda" and _has_kernel("fused_adam"),
        fused_lamb=kind == "cuda" and _has_kernel("fused_lamb"),
    )


def _has_kernel(name: str) -> bool:
    """Whether DeepSpeed's kernel is built in, or a CUDA toolkit is here to build it."""
    return bool(installed_ops.get(name)) or cpp_extension.CUDA_HOME is not None


def versions() -> str:
    """Of what every rank must have the same of."""
    return f"{torch.__version__}, {deepspeed.__version__}, {__version__}"


def current_device() -> torch.device:
    """This rank's device."""
    return torch.device(get_accelerator().current_device_name())


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device or the host had no memory left; of the host's torch only says so."""
    texts = ("can't allocate memory", "Cannot allocate memory")
    is_hosts = isinstance(error, RuntimeError) and any(text in str(error) for text in texts)
    return is_hosts or isinstance(error, MemoryError | torch.OutOfMemoryError)


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
        snapshot: Snapshot | None,
        freeze: Freeze | None = None,
        make_model: ModelMaker = BertForPreTraining,
    ) -> None:
        """Build a fresh module and engine that hold `snapshot`, the main rank's. Collective.

        Other ranks' snapshot is not looked at and may be None: each gets one tensor at a time and
        keeps what its ZeRO stage gives it. What `freeze` names has no master, no moments and no
        gradients to reduce. A history that `snapshot` has of it ends here.
        """
        known = distributed.on_main(lambda: _checked(snapshot).without_tensors())
        given = snapshot if distributed.is_main() and snapshot is not None else known
        self.config = config
        self._zero_stage = zero_stage(resolved.deepspeed)
        shapes = blueprint(make_model, config)
        apply_freeze(shapes, freeze)
        self._client = resolved.client_optimizer
        self._unpads = resolved.unpads and resolved.compile is None and can_unpad(config)
        with_muon = self._client is not None and self._client.kind == "muon"
        self._loss_names = shapes.loss_names
        self._sum_names = (*shapes.loss_names, *shapes.count_names)
        self._groups = parameter_groups(shapes, optimizer, known, with_muon=with_muon)
        distributed.on_main(lambda: check_history(self._groups, given))
        self._new_names = known.new_names
        model = build_module(
            make_model, config, given.weights, resolved.deepspeed, current_device(),
            resolved.apex_layer_norm,
        )  # fmt: skip
        apply_freeze(model, freeze)
        still = [name for name, p in model.named_parameters() if not p.requires_grad]
        # They cannot change; the module's own copies may have 16 bits. The main rank keeps them.
        mine = still if distributed.is_main() else []
        self._frozen = {name: given.weights[name].clone() for name in mine}
        with prints_to_log():
            self._engine, _, _, _ = deepspeed.initialize(
                model=model,
                optimizer=optimizer_maker(self._client),
                model_parameters=[group.for_optimizer(model) for group in self._groups],
                config=copy.deepcopy(resolved.deepspeed),  # DeepSpeed keeps and edits it
            )
        engine_options.apply(model, resolved)
        OptimizerState(self._engine, self._groups).write(given)
        self._scaling = LossScaling(self._engine)
        self._scaling.write(known.loss_scaler)
        self._grad_norm: float | Tensor | None = None  # read by the host when it is asked for
        self._log_every = resolved.log_every
        self._cohort_norms = CohortNorms(self._engine, self._groups)
        self._by_cohort: Tensor | None = None
        self._residuals: list[Tensor] = []
        self._losses = torch.zeros(0)

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
        batches: Sequence[Batch],
        *,
        learning_rate: float,
        new_learning_rate: float | None = None,
        counts: Tensor,
        seed: int,
    ) -> Tensor:
        """One optimizer update from this rank's micro batches.

        `new_learning_rate`: of the parameters that came with the stage; None: `learning_rate` too.
        `counts`, one for each loss of the model: what it sums over, in this step and over *all*
        ranks (to pre-train [2]: masked tokens, sequences). What is minimised is the sum of the
        means, whatever the number of ranks and micro batches. Returns this rank's detached sums, of
        losses and what is counted (to pre-train [3]: MLM loss, NSP loss, correct predictions).
        """
        new_rate = learning_rate if new_learning_rate is None else new_learning_rate
        for group, ours in zip(self._engine.optimizer.param_groups, self._groups, strict=True):
            group["lr"] = ours.rate_factor * (new_rate if ours.is_new else learning_rate)
        # DeepSpeed divides by the accumulation steps and averages over ranks: undone here.
        share = len(batches) * distributed.world_size()
        found: list[Tensor] = []
        self._engine.train()
        for micro_step, batch in enumerate(batches):
            torch.manual_seed(_mix(seed, micro_step, distributed.rank()))  # dropout
            sums = self._forward(batch)
            parts = [
                sums[name] * (share / count)
                for name, count in zip(self._loss_names, counts, strict=True)
                if name in sums
            ]
            loss = functools.reduce(torch.add, parts)
            with plain_kernels(self._client):
                self._engine.backward(loss)
            found.append(self._totals(sums))
            if micro_step == len(batches) - 1:
                self._losses = torch.stack(found)[:, : len(self._loss_names)].sum(dim=1)
                self._check_losses()
            self._update()
        return torch.stack(found).sum(dim=0)

    def _check_losses(self) -> None:
        """NonFiniteError on every rank if a micro batch's loss of any is no finite number.

        The wait for the device costs nothing: DeepSpeed's step begins with one, for the norm.
        """
        bad = (~self._losses.isfinite()).any().float()
        if distributed.sum_over_ranks(bad).item():
            raise NonFiniteError("the loss is not finite")

    def _update(self) -> None:
        """DeepSpeed's step after a micro batch; NonFiniteError, and no update, where it must not.

        fp16 overflow is no fault while the loss scale can fall: the step is skipped and counted.
        """
        scale, skipped = self._scaling.scale, self._engine.skipped_steps
        is_boundary = self._engine.is_gradient_accumulation_boundary()
        if is_boundary and self._zero_stage == 0:
            self._check_plain_gradients()
        if is_boundary:
            # A step that is not logged pays nothing for it.
            is_logged = (self._engine.global_steps + 1) % self._log_every == 0
            is_measured = is_logged and self._cohort_norms.is_known
            self._by_cohort = self._cohort_norms.measure(scale or 1.0) if is_measured else None
        with plain_kernels(self._client):
            self._engine.step()
        if self._engine.skipped_steps > skipped:
            self._scaling.check(scale)
        if is_boundary and self._zero_stage > 0:
            self._grad_norm = self._engine.get_global_grad_norm()

    def _check_plain_gradients(self) -> None:
        """The norm that DeepSpeed does not report at stage 0; NonFiniteError if it is no number."""
        gradients = [p.grad for p in self._engine.module.parameters() if p.grad is not None]
        norm = float(nn.utils.get_total_norm(gradients))
        self._grad_norm = norm
        if not math.isfinite(norm):
            raise NonFiniteError("the gradient norm is not finite")

    @torch.no_grad()
    def evaluate(self, batches: Iterator[Batch]) -> Tensor:
        """Sums over all ranks: those of `train_step`, then the counts of the losses.

        To pre-train [5]: MLM loss, NSP loss, correct, masked tokens, sequences. On the main rank
        its first batch leaves `residual_rms`.
        """
        self._engine.eval()
        size = len(self._sum_names) + len(self._loss_names)
        totals = torch.zeros(size, dtype=torch.float64, device=self.device)
        with self._recorded_on_main() as self._residuals:
            for batch in batches:
                sums = self._totals(self._forward(batch))
                counts = torch.tensor(batch.loss_counts, device=self.device)
                totals += torch.cat([sums, counts])
        return distributed.sum_over_ranks(totals)

    @torch.no_grad()
    def logits(self, batch: Batch) -> Tensor:
        """What the model answers to a batch without labels, in fp32, on its device. Collective."""
        self._engine.eval()
        return self._forward(batch)["logits"].float()

    def _recorded_on_main(self) -> AbstractContextManager[list[Tensor]]:
        return recorded(self._engine.module) if distributed.is_main() else nullcontext([])

    def _forward(self, batch: Batch) -> dict[str, Tensor]:
        layout = find_layout(batch.attention_mask) if self._unpads and batch.is_padded else None
        given = {} if layout is None else {"layout": layout.to(self.device)}
        sums: dict[str, Tensor] = self._engine(**batch.to(self.device).inputs(), **given)
        return sums

    def _totals(self, sums: Mapping[str, Tensor]) -> Tensor:
        """Detached, in the order of their names; 0 where the batch has no such loss."""
        first = sums[self._sum_names[0]].detach()
        none = torch.zeros_like(first)
        found = [sums[name].detach() if name in sums else none for name in self._sum_names]
        return torch.stack([value.to(first.dtype) for value in found])

    @property
    def skipped_steps(self) -> int:
        """Updates that fp16 overflow made DeepSpeed skip, in the whole run."""
        return int(self._engine.skipped_steps)

    @property
    def loss_scale(self) -> float | None:
        """Dynamic fp16 loss scale; None in other precisions."""
        return self._scaling.scale

    @property
    def micro_losses(self) -> list[float]:
        """This rank's sums of all losses (nats) of the last step's micro batches."""
        return [float(loss) for loss in self._losses]

    @property
    def grad_norm(self) -> float | None:
        """Global gradient norm of the last step, before clipping."""
        return None if self._grad_norm is None else float(self._grad_norm)

    @property
    def cohort_grad_norms(self) -> dict[str, float]:
        """`grad_norm_old` and `grad_norm_new` of the last step, before clipping.

        Of the parameters that the stage found and of those that came with it; together they make
        `grad_norm`. Empty where the step was no `log_every`-th, or nobody knows them; see
        CohortNorms.
        """
        if self._by_cohort is None:
            return {}
        return dict(zip(("grad_norm_old", "grad_norm_new"), self._by_cohort.tolist(), strict=True))

    @property
    def residual_rms(self) -> list[float]:
        """Of the last evaluation, main rank: the hidden states' size after embeddings and layers.

        See residuals.recorded.
        """
        return [float(size) for size in self._residuals]

    def replica_digest(self) -> int | None:
        """A checksum of the weights that every rank holds whole; None where ZeRO-3 parts them."""
        if self._zero_stage == 3:
            return None
        total = torch.zeros((), dtype=torch.int64, device=self.device)
        for number, parameter in enumerate(self._engine.module.parameters(), start=1):
            kind = torch.int16 if parameter.element_size() == 2 else torch.int32
            total += number * parameter.detach().view(kind).sum(dtype=torch.int64)
        return int(total)

    def write_monitor(self, events: Sequence[tuple[str, float, int]]) -> None:
        """Send (name, value, global_step) to DeepSpeed's TensorBoard, W&B or CSV monitors.

        A disk that is full ends them, not the run, which keeps its own record.
        """
        monitor = self._engine.monitor
        if monitor.enabled:
            try:
                monitor.write_events(list(events))
            except OSError as fault:
                monitor.enabled = False
                warnings.warn(f"the monitors write no more: {fault}", stacklevel=2)

    def snapshot(self) -> Snapshot | None:
        """Full fp32 weights and moments on the main rank's CPU; None elsewhere. Collective.

        No rank but the main one ever holds more than one whole tensor.
        """
        trained = OptimizerState(self._engine, self._groups).read()
        if trained is None:
            return None
        return replace(
            trained,
            weights=trained.weights | self._frozen,
            new_names=self._new_names,
            loss_scaler=self._scaling.read(),
        )

    def destroy(self) -> None:
        """Tear the engine down so that nothing holds its memory. Collective; call once."""
        tear_down(self._engine)
        del self._engine, self._scaling
        collect()
        distributed.barrier()


def _checked(snapshot: Snapshot | None) -> Snapshot:
    assert snapshot is not None, "the main rank needs a state to build an engine from"
    faults = snapshot.faults()
    assert not faults, faults
    return snapshot


def _mix(seed: int, micro_step: int, rank: int) -> int:
    """A distinct dropout seed for each (step seed, micro step, rank)."""
    return (seed * 1_000_003 + micro_step * 8_191 + rank) % 2**63
