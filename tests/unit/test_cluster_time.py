"""stacking/cluster_time.py: an example by hand, limits, what each ZeRO stage sends, refusals."""

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest

from stacking.cluster_time import (
    UPDATE_BYTES,
    Cluster,
    RankWork,
    load_cluster,
    ring_seconds,
    sent_bytes,
    step_time,
)
from stacking.errors import ConfigError

CLUSTER = Cluster(
    name="by hand",
    flops_per_second=1e9,
    memory_bytes_per_second=6e6,
    ranks_per_node=4,
    link_bytes_per_second=2e6,
    link_latency_seconds=1e-3,
    network_bytes_per_second=1e6,
    network_latency_seconds=1e-2,
)
WORK = RankWork(
    ranks=8,
    forward_flops=1e9,
    backward_flops=2e9,
    micro_steps=1,
    num_parameters=300_000,
    num_trained=200_000,
    num_layers=5,
    zero_stage=1,
    bytes_per_weight=2,
    bucket_elements=60_000,
    overlaps=False,
)
ZeroStage = Literal[0, 1, 2, 3]
ZEROS: tuple[ZeroStage, ...] = (0, 1, 2, 3)


def every_work() -> Iterator[RankWork]:
    for zero in ZEROS:
        for overlaps in (False, True):
            for micro_steps in (1, 3):
                yield replace(WORK, zero_stage=zero, overlaps=overlaps, micro_steps=micro_steps)


def test_a_step_of_eight_ranks_on_two_nodes_by_hand() -> None:
    # A ring of 400 kB: 6 steps inside nodes and 1 between them, 7/8 of it at 1 MB/s.
    latency = 6 * 1e-3 + 1 * 1e-2
    assert ring_seconds(CLUSTER, 8, 400_000) == pytest.approx(latency + 0.35)
    assert ring_seconds(CLUSTER, 8, 400_000, 4) == pytest.approx(4 * latency + 0.35)
    # Two rings of gradients in 4 buckets, one of weights; an eighth of the update.
    time = step_time(WORK, CLUSTER)
    assert (time.forward, time.backward) == (1.0, 2.0)
    assert time.update == pytest.approx(UPDATE_BYTES * 25_000 / 6e6)
    assert time.communication == pytest.approx(9 * latency + 3 * 0.35)
    assert time.waiting == time.communication
    assert time.total == pytest.approx(3 + time.update + time.waiting)
    assert time.waiting_share == pytest.approx(time.waiting / time.total)
    # With overlap three of the four buckets travel behind the backward pass.
    hidden = (8 * latency + 0.7) * 3 / 4
    overlapped = step_time(replace(WORK, overlaps=True), CLUSTER)
    assert overlapped.waiting == pytest.approx(time.waiting - hidden)


def test_what_overlap_hides_is_behind_the_micro_steps_that_reduce() -> None:
    """Gradients: a ring of 4 buckets, 4 x 16 ms + 350 ms. Weights: 5 layers, 5 x 16 + 525 ms."""
    often = replace(WORK, micro_steps=10, overlaps=True)  # a backward pass of 0.2 s each
    first, second = (step_time(replace(often, zero_stage=zero), CLUSTER) for zero in ZEROS[1:3])
    assert first.communication - first.waiting == pytest.approx(3 / 4 * 0.2)
    assert second.communication - second.waiting == pytest.approx(3 / 4 * 2.0)
    # ZeRO 3: layers fetched ahead in both passes, gradients behind what is left of the backward.
    third = replace(WORK, zero_stage=3, backward_flops=0.6e9, overlaps=True)
    time = step_time(third, CLUSTER)
    assert time.communication == pytest.approx(0.414 + 2 * 0.605)
    fetched = 4 / 5 * 0.605, 4 / 5 * 0.6
    hidden = sum(fetched) + 3 / 4 * (0.6 - fetched[1])
    assert time.communication - time.waiting == pytest.approx(hidden)


def test_inside_one_node_the_network_does_not_count() -> None:
    assert ring_seconds(CLUSTER, 4, 400_000) == pytest.approx(3e-3 + 0.15)
    assert ring_seconds(CLUSTER, 5, 0) == pytest.approx(3e-3 + 1e-2)


def test_one_rank_sends_nothing_and_waits_for_nothing() -> None:
    for work in every_work():
        time = step_time(replace(work, ranks=1), CLUSTER)
        assert (time.communication, time.waiting) == (0.0, 0.0)
        assert sent_bytes(replace(work, ranks=1)) == 0


def test_without_latency_and_with_endless_bandwidth_scaling_is_perfect() -> None:
    free = CLUSTER.model_copy(
        update={
            "link_bytes_per_second": math.inf,
            "network_bytes_per_second": math.inf,
            "link_latency_seconds": 0.0,
            "network_latency_seconds": 0.0,
        }
    )
    for work in every_work():
        times = [step_time(replace(work, ranks=ranks), free) for ranks in (1, 8, 1024)]
        assert [time.waiting for time in times] == [0, 0, 0]
        assert len({time.forward + time.backward for time in times}) == 1
        parted = [times[0].update / ranks for ranks in (1, 8, 1024)]
        assert [time.update for time in times] == (
            pytest.approx(parted) if work.zero_stage else [times[0].update] * 3
        )


def test_more_ranks_never_make_a_step_of_the_same_local_batch_shorter_than_its_computation() -> (
    None
):
    for work in every_work():
        times = [step_time(replace(work, ranks=ranks), CLUSTER) for ranks in (1, 2, 4, 8, 64, 1024)]
        for before, after in zip(times, times[1:], strict=False):
            assert after.communication > before.communication
            assert after.waiting > before.waiting
        for time in times:
            assert time.total >= 3.0
            assert time.waiting <= time.communication


@pytest.mark.parametrize(
    ("zero", "gradients", "weights"), [(0, 2, 0), (1, 2, 1), (2, 2, 1), (3, 1, 2)]
)
def test_each_zero_stage_sends_what_it_sends(zero: ZeroStage, gradients: int, weights: int) -> None:
    work = replace(WORK, zero_stage=zero)
    fetched = work.num_parameters if zero == 3 else work.num_trained
    assert sent_bytes(work) == 7 / 8 * 2 * (gradients * work.num_trained + weights * fetched)
    # From ZeRO 2 on every micro step reduces; at 3 each fetches the weights twice.
    three = replace(work, micro_steps=3)
    often = (3 if zero >= 2 else 1, 3 if zero == 3 else 1)
    assert sent_bytes(three) == 7 / 8 * 2 * (
        often[0] * gradients * work.num_trained + often[1] * weights * fetched
    )


def test_reduced_to_its_owner_a_gradient_travels_once() -> None:
    both = replace(WORK, reduces_to_owner=True)
    assert sent_bytes(both) == sent_bytes(WORK) * 2 / 3
    assert sent_bytes(replace(both, zero_stage=0)) == sent_bytes(replace(WORK, zero_stage=0))


def test_one_bucket_hides_nothing_and_zero_0_never_does() -> None:
    one = replace(WORK, bucket_elements=200_000)
    assert step_time(replace(one, overlaps=True), CLUSTER) == step_time(one, CLUSTER)
    plain = replace(WORK, zero_stage=0)
    assert step_time(replace(plain, overlaps=True), CLUSTER) == step_time(plain, CLUSTER)


def test_the_devices_are_data_sheets_and_what_is_assumed_of_them() -> None:
    cluster = load_cluster("a100", 4, 0.5, 200.0)
    assert cluster.flops_per_second == 156e12
    assert cluster.link_bytes_per_second == pytest.approx(240e9)
    assert cluster.network_bytes_per_second == pytest.approx(20e9)
    assert load_cluster(None) == load_cluster("h100", 8, 0.45, 400.0)


def test_a_file_of_measured_numbers_is_a_cluster(tmp_path: Path) -> None:
    path = tmp_path / "here.json"
    path.write_text(CLUSTER.model_dump_json())
    assert load_cluster(str(path)) == CLUSTER
    with pytest.raises(ConfigError, match="no --gpus-per-node"):
        load_cluster(str(path), 8)
    path.write_text(json.dumps(CLUSTER.model_dump() | {"flops_per_second": 0, "nodes": 3}))
    with pytest.raises(ConfigError) as error:
        load_cluster(str(path))
    assert len(error.value.faults) == 2
    assert "flops_per_second: got 0" in str(error.value)
    assert "nodes: unknown key" in str(error.value)


def test_what_cannot_be_a_cluster_is_refused_all_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        load_cluster("b300", 0, 1.5, math.nan)
    starts = [fault.split(":")[0] for fault in error.value.faults]
    assert starts == ["--device", "--gpus-per-node", "--utilisation", "--network-gbits"]
    assert "allowed: v100, a100, h100, or a .json file" in error.value.faults[0]
