"""Seconds of an optimizer step on N ranks, by arithmetic alone: RankWork and Cluster in.

    step = forward + backward + update + waiting

    forward, backward   FLOPs of one rank / its rate
    update              UPDATE_BYTES x the parameters that one rank updates / its memory's bandwidth
    waiting             communication that no computation hides

A ring of N ranks moves B bytes in N - 1 steps of B / N each (Patarasuk and Yuan 2009, "Bandwidth
optimal all-reduce algorithms", J. Parallel Distrib. Comput. 69). On M nodes, M - 1 of the steps
cross the network; as in NCCL's own model (src/graph/tuning.cc, ring) latencies add up, and all
bytes pass the slower of the two:

    ring(B) = k ((N - M) link latency + (M - 1) network latency) + (N - 1) / N B / bandwidth

if B is sent in k buckets. A reduce-scatter or an all-gather is one ring, an all-reduce is two.

What is sent in one step, in passes of one ring each; micro steps are 1 unless gradients accumulate.
Rajbhandari et al. 2020 (ZeRO), section 7, count 2, 2, 2 and 3 passes; DeepSpeed 0.19.8 sends more
at ZeRO 1 and 2, where by default a bucket is all-reduced though each rank keeps a part of it:

    ZeRO   gradients                       weights
    0      2                               0
    1      2 (1: reduced to its owner)     1 after the update
    2      the same in every micro step    1 after the update
    3      1 in every micro step           2 in every micro step: forward, backward

With `overlap_comm` gradients travel during the backward pass of the micro step that reduces them,
but the last of k buckets is full only when that ends: min(gradients, backward) (k - 1) / k is
hidden. ZeRO 3's weights are fetched one layer ahead likewise, with k layers. Nothing else is.

Left out: imbalance between ranks, the input, evaluation, saving, offloading, that small batches
reach a lower rate, and NCCL's trees, which need fewer hops than its rings on many nodes.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from stacking.config_base import Frozen
from stacking.config_faults import fault_lines
from stacking.config_loading import read_json_object
from stacking.errors import ConfigError

UPDATE_BYTES = 60
"""Read and written for one parameter of 16 bits in DeepSpeed's update: gradients into a bucket 4,
flattened 4, to fp32 6, their norm 4, clipping 8, AdamW 16 + 12, the new weight to 16 bits 6."""

# Data sheets of NVIDIA: dense 16-bit TFLOP/s, GB/s of memory, GB/s of NVLink one way.
DEVICES = {
    "v100": (125, 900, 150),
    "a100": (312, 2039, 300),
    "h100": (989, 3350, 450),
}
DEFAULT_DEVICE = "h100"
UTILISATION = 0.45  # of 16-bit peak; BERT-Large reaches 0.29 to 0.52 in public runs
NETWORK_GBITS = 400.0  # of one node, one way
_REACHED = 0.8  # of what memory, links and network promise
_LINK_LATENCY, _NETWORK_LATENCY = 3.4e-6, 9.6e-6  # NCCL, src/graph/tuning.cc: ring, Simple


class Cluster(Frozen):
    """What one rank computes in a second, and how fast ranks reach each other."""

    name: str = Field(description="For reports.")
    flops_per_second: float = Field(
        gt=0, description="FLOPs a second that one rank reaches in forward and backward."
    )
    memory_bytes_per_second: float = Field(
        gt=0, description="Bytes a second that one rank's optimizer reads and writes."
    )
    ranks_per_node: int = Field(ge=1, description="Ranks, such as GPUs, of one node.")
    link_bytes_per_second: float = Field(
        gt=0, description="From one rank to another on its node, one way."
    )
    link_latency_seconds: float = Field(ge=0, description="Of one message inside a node.")
    network_bytes_per_second: float = Field(
        gt=0, description="From one node to the others, of all its ranks together, one way."
    )
    network_latency_seconds: float = Field(ge=0, description="Of one message between nodes.")


@dataclass(frozen=True)
class RankWork:
    """What one of `ranks` ranks does in one optimizer step."""

    ranks: int
    forward_flops: float  # of this rank, in all micro steps
    backward_flops: float
    micro_steps: int
    num_parameters: int
    num_trained: int
    num_layers: int
    zero_stage: Literal[0, 1, 2, 3]
    bytes_per_weight: Literal[2, 4]  # as sent, gradients too
    bucket_elements: int
    overlaps: bool  # DeepSpeed's overlap_comm, on a device where it has an effect: no CPU
    reduces_to_owner: bool = False  # use_multi_rank_bucket_allreduce false


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step."""

    forward: float
    backward: float
    update: float
    communication: float
    waiting: float
    """The part of `communication` that nothing hides."""

    @property
    def total(self) -> float:
        """Of the step."""
        return self.forward + self.backward + self.update + self.waiting

    @property
    def waiting_share(self) -> float:
        """Of the step, spent on communication alone."""
        return self.waiting / self.total


def load_cluster(
    device: str | None,
    ranks_per_node: int | None = None,
    utilisation: float | None = None,
    network_gbits: float | None = None,
) -> Cluster:
    """One of DEVICES, or a .json file of a Cluster's fields; None: the default.

    ConfigError lists every fault, in the words of launch/plan.py.
    """
    device = DEFAULT_DEVICE if device is None else device
    if not device.endswith(".json"):
        return _assumed(
            device,
            8 if ranks_per_node is None else ranks_per_node,
            UTILISATION if utilisation is None else utilisation,
            NETWORK_GBITS if network_gbits is None else network_gbits,
        )
    if (ranks_per_node, utilisation, network_gbits) != (None, None, None):
        raise ConfigError(
            f"--device {device}: the file says all of it; allowed: no --gpus-per-node, "
            "--utilisation or --network-gbits beside it"
        )
    try:
        return Cluster.model_validate(read_json_object(Path(device)))
    except ValidationError as error:
        raise ConfigError(fault_lines(error, Cluster, prefix=f"{device}: ")) from None


def _assumed(device: str, ranks_per_node: int, utilisation: float, network_gbits: float) -> Cluster:
    faults = []
    if device not in DEVICES:
        allowed = f"{', '.join(DEVICES)}, or a .json file of measured numbers"
        faults.append(f"--device: got {device!r}; allowed: {allowed}")
    if ranks_per_node < 1:
        faults.append(f"--gpus-per-node: got {ranks_per_node}; allowed: 1 or more")
    if not 0 < utilisation <= 1:
        faults.append(f"--utilisation: got {utilisation}; allowed: more than 0, at most 1")
    if not 0 < network_gbits < math.inf:
        faults.append(f"--network-gbits: got {network_gbits}; allowed: more than 0")
    if faults:
        raise ConfigError(faults)
    teraflops, memory, link = DEVICES[device]
    return Cluster(
        name=f"{device}, assumed",
        flops_per_second=utilisation * teraflops * 1e12,
        memory_bytes_per_second=_REACHED * memory * 1e9,
        ranks_per_node=ranks_per_node,
        link_bytes_per_second=_REACHED * link * 1e9,
        link_latency_seconds=_LINK_LATENCY,
        network_bytes_per_second=_REACHED * network_gbits / 8 * 1e9,
        network_latency_seconds=_NETWORK_LATENCY,
    )


def ring_seconds(cluster: Cluster, ranks: int, size: float, messages: int = 1) -> float:
    """One reduce-scatter or all-gather of `size` bytes in `messages` parts."""
    nodes = math.ceil(ranks / cluster.ranks_per_node)
    bandwidth = cluster.link_bytes_per_second
    if nodes > 1:
        bandwidth = min(bandwidth, cluster.network_bytes_per_second)
    latency = (ranks - nodes) * cluster.link_latency_seconds
    latency += (nodes - 1) * cluster.network_latency_seconds
    return messages * latency + (ranks - 1) / ranks * size / bandwidth


def sent_bytes(work: RankWork) -> float:
    """Bytes that one rank sends in one optimizer step, in a flat ring of all ranks."""
    gradients, weights = _passes(work)
    share = (work.ranks - 1) / work.ranks
    of_weights = weights * (work.num_parameters if work.zero_stage == 3 else work.num_trained)
    return share * work.bytes_per_weight * (gradients * work.num_trained + of_weights)


def step_time(work: RankWork, cluster: Cluster) -> StepTime:
    """Predict one optimizer step; the formulas are this module's first docstring."""
    forward = work.forward_flops / cluster.flops_per_second
    backward = work.backward_flops / cluster.flops_per_second
    owners = work.ranks if work.zero_stage else 1
    update = UPDATE_BYTES * work.num_trained / owners / cluster.memory_bytes_per_second
    gradients, weights = _communication(work, cluster)
    hidden = _hidden(work, forward, backward, gradients, weights) if work.overlaps else 0.0
    communication = gradients + weights
    return StepTime(forward, backward, update, communication, communication - hidden)


def _passes(work: RankWork) -> tuple[int, int]:
    """Rings in one optimizer step of all gradients, and of all weights."""
    reduction = 1 if work.zero_stage == 3 or (work.zero_stage and work.reduces_to_owner) else 2
    reductions = reduction * (work.micro_steps if work.zero_stage >= 2 else 1)
    gathers = {0: 0, 1: 1, 2: 1, 3: 2 * work.micro_steps}[work.zero_stage]
    return reductions, gathers


def _communication(work: RankWork, cluster: Cluster) -> tuple[float, float]:
    """Seconds in which gradients, and weights, travel."""
    gradients, weights = _passes(work)
    trained = work.bytes_per_weight * work.num_trained
    whole = work.bytes_per_weight * work.num_parameters
    fetched = (whole, work.num_layers) if work.zero_stage == 3 else (trained, 1)
    return (
        gradients * ring_seconds(cluster, work.ranks, trained, _buckets(work)),
        weights * ring_seconds(cluster, work.ranks, *fetched),
    )


def _hidden(
    work: RankWork, forward: float, backward: float, gradients: float, weights: float
) -> float:
    """Seconds of communication behind computation; see the module's docstring."""
    reducing = backward if work.zero_stage >= 2 else backward / work.micro_steps
    fetched = 0.0
    if work.zero_stage == 3:
        but_first = (work.num_layers - 1) / work.num_layers
        behind_backward = but_first * min(weights / 2, backward)
        fetched = but_first * min(weights / 2, forward) + behind_backward
        reducing -= behind_backward
    if work.zero_stage == 0:
        return 0.0  # DeepSpeed reduces after the backward pass
    buckets = _buckets(work)
    return fetched + min(gradients, reducing) * (buckets - 1) / buckets


def _buckets(work: RankWork) -> int:
    return max(1, math.ceil(work.num_trained / work.bucket_elements))
