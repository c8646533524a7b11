"""stacking/stage_plan_cluster.py: a recipe on many ranks, in tables and JSON; refusals."""

from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from stacking.cluster_time import Cluster, load_cluster
from stacking.config_loading import JsonObject, load_recipe
from stacking.deepspeed_checks import check_document
from stacking.deepspeed_config import load_deepspeed_config
from stacking.errors import ConfigError
from stacking.stage_plan import plan_recipe
from stacking.stage_plan_cluster import ClusterPlan, cluster_json, plan_cluster, show_cluster_plan

ROOT = Path(__file__).resolve().parents[2]
SLOW = load_cluster("a100").model_copy(
    update={"link_bytes_per_second": 1e9, "link_latency_seconds": 0.0}
)


def planned(
    name: str,
    *changes: str,
    nodes: tuple[int, ...] = (1, 8, 128),
    engine: str = "fp16_fused_adam",
    cluster: Cluster | None = None,
) -> ClusterPlan:
    recipe = load_recipe(ROOT / "launch" / "recipes" / f"{name}.json", changes)
    config = load_deepspeed_config(ROOT / "deepspeed_configs" / f"{engine}.json")
    return plan_cluster(recipe, config, cluster or load_cluster("a100"), nodes)


def text_of(plan: ClusterPlan) -> str:
    console = Console(file=StringIO(), width=100, highlight=False)
    show_cluster_plan(plan, console)
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def test_each_stage_is_predicted_for_each_number_of_ranks() -> None:
    plan = planned("mslt_base", "global_batch_size=1024")
    assert [run.ranks for run in plan.same_batch] == [8, 64, 1024]
    assert [len(run.stages) for run in plan.same_batch] == [5, 5, 5]
    assert [run.stages[0].sequences_per_rank for run in plan.same_batch] == [128, 16, 1]
    assert [run.stages[0].sequences_per_rank for run in plan.growing_batch] == [128, 128, 128]
    assert [run.global_batch_size for run in plan.growing_batch] == [1024, 8192, 131_072]
    text = text_of(plan)
    for word in ("a100, assumed", "140.4 TFLOP/s", "1,024", "not a measurement", "40 GB/s"):
        assert word in text


def test_seconds_are_flops_over_the_rate_where_nothing_is_sent() -> None:
    alone = load_cluster("a100", 1)
    plan = planned("stackingbert_base", nodes=(1,), cluster=alone)
    (run,) = plan.same_batch
    recipe = load_recipe(ROOT / "launch" / "recipes" / "stackingbert_base.json")
    flops = plan_recipe(recipe, load_deepspeed_config(), world_size=1).flops
    computing = sum(
        stage.steps * (stage.time.forward + stage.time.backward) for stage in run.stages
    )
    assert computing == pytest.approx(flops / alone.flops_per_second, rel=1e-9)
    assert run.seconds > computing
    assert (run.efficiency, run.waiting_share) == (1.0, 0.0)
    assert plan.growing_batch == ()


def test_the_growing_batch_sees_as_many_sequences_in_fewer_steps() -> None:
    plan = planned("stackingbert_base", nodes=(1, 2))
    few, many = plan.growing_batch
    assert few == plan.same_batch[0]
    assert [stage.steps for stage in many.stages] == [25_000, 35_000, 140_000]
    assert many.seconds < few.seconds < 2.5 * many.seconds


def test_larger_zero_stages_and_more_ranks_wait_longer() -> None:
    runs = planned("bert_large", "global_batch_size=1024").same_batch
    assert runs[0].efficiency > runs[1].efficiency > runs[2].efficiency
    assert runs[0].waiting_share < runs[1].waiting_share < runs[2].waiting_share


def test_overlap_hides_some_of_what_is_sent_in_buckets_smaller_than_the_model() -> None:
    (plain,) = planned("bert_large", nodes=(1,)).same_batch
    (hidden,) = planned("bert_large", nodes=(1,), engine="zero2_fp16").same_batch
    before, after = plain.stages[0].time, hidden.stages[0].time
    assert before.waiting == before.communication
    assert after.waiting < 0.5 * after.communication


def test_what_is_sent_is_what_the_json_says() -> None:
    def seconds(document: JsonObject) -> float:
        engine = check_document(document, source="x.json", prefix="")
        recipe = load_recipe(ROOT / "launch" / "recipes" / "bert_base.json")
        (run,) = plan_cluster(recipe, engine, SLOW, (1,)).same_batch
        return run.stages[0].time.waiting

    def document(stage: int, precision: str = "bf16", **zero: object) -> JsonObject:
        found: JsonObject = {"zero_optimization": {"stage": stage, **zero}}
        return found if precision == "fp32" else found | {precision: {"enabled": True}}

    assert seconds(document(1, "fp32")) == pytest.approx(2 * seconds(document(1)))
    to_owner = document(1, use_multi_rank_bucket_allreduce=False)
    assert seconds(to_owner) == pytest.approx(2 / 3 * seconds(document(1)))
    # DeepSpeed's default of overlap_comm: true at ZeRO 3, false below.
    for stage in (2, 3):
        silent = document(stage, reduce_bucket_size=10**7)
        said, otherwise = (
            document(stage, reduce_bucket_size=10**7, overlap_comm=overlaps)
            for overlaps in (stage == 3, stage != 3)
        )
        assert seconds(silent) == seconds(said) != seconds(otherwise)


def test_a_frozen_stage_sends_only_what_trains() -> None:
    stages = planned("mslt_base", nodes=(1,)).same_batch[0].stages
    assert stages[3].time.communication < 0.25 * stages[4].time.communication
    assert stages[3].time.backward < 0.35 * stages[4].time.backward
    assert stages[3].time.forward == stages[4].time.forward


def test_a_batch_that_so_many_ranks_cannot_share_is_said_so() -> None:
    plan = planned("stackingbert_base")
    assert [bool(run.fault) for run in plan.same_batch] == [False, False, True]
    assert not any(run.fault for run in plan.growing_batch)
    assert "1,024 ranks: not possible: fp16_fused_adam.json: the recipe's" in text_of(plan)
    values = cluster_json(plan)
    assert isinstance(values["same_batch"], list)
    assert "fault" in values["same_batch"][2]
    assert values["same_batch"][1]["stages"][0]["sequences_per_rank"] == 5


def test_json_has_the_same_numbers() -> None:
    plan = planned("mslt_base", nodes=(1, 8))
    values = cluster_json(plan)
    assert values["cluster"] == plan.cluster.model_dump()
    run, row = plan.same_batch[1], values["same_batch"][1]  # type: ignore[index]
    assert (row["ranks"], row["seconds"], row["efficiency"]) == (64, run.seconds, run.efficiency)
    last = row["stages"][4]
    assert (
        last["total"]
        == run.stages[4].time.total
        == pytest.approx(last["forward"] + last["backward"] + last["update"] + last["waiting"])
    )


@pytest.mark.parametrize("nodes", [(), (0,), (8, -1)])
def test_no_nodes_are_refused(nodes: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="--nodes: got"):
        planned("demo", nodes=nodes)


def test_measured_numbers_are_not_called_assumed() -> None:
    measured = load_cluster("v100").model_copy(update={"name": "two cores"})
    text = text_of(planned("demo", nodes=(1,), cluster=measured))
    assert "Time on two cores" in text
    assert "measured parts" in text
    plan = planned("demo", nodes=(1,))
    assert "data sheets" in text_of(replace(plan, growing_batch=()))
