"""stacking.stage_switch: the probe holds growth to its promise, as the recipe says."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from stacking.config import BertConfig, Recipe
from stacking.dataset import MaskedLMBatch
from stacking.errors import UserError
from stacking.growth.depth import DEPTH_OPERATORS
from stacking.modeling import BertForPreTraining, init_weights
from stacking.snapshot import Snapshot
from stacking.stage_growth import StageGrowth
from stacking.stage_switch import Probe, SwitchReport, switch_stage

MODEL = BertConfig(
    vocab_size=61,
    hidden_size=16,
    num_hidden_layers=4,
    num_attention_heads=2,
    intermediate_size=32,
    max_position_embeddings=16,
)


def _recipe(depth: str, broken_promise: str = "refuse") -> Recipe:
    stages = [
        {"num_hidden_layers": 2, "steps": 3},
        {"num_hidden_layers": 4, "steps": 3, "depth": depth, "broken_promise": broken_promise},
    ]
    return Recipe.model_validate(
        {
            "name": "x",
            "model": MODEL.model_dump(),
            "data": {"max_seq_length": 16, "max_predictions_per_seq": 2},
            "stages": stages,
            "learning_rate": {"schedule": "linear", "peak": 1e-3},
        }
    )


def _weights(config: BertConfig) -> dict[str, torch.Tensor]:
    model = BertForPreTraining(config)
    generator = torch.Generator().manual_seed(1)
    init_weights(model, generator)
    return {
        name: tensor.detach() + 0.1 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in model.named_parameters()
    }


def _batch() -> MaskedLMBatch:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(5, 61, (3, 12), generator=generator)
    positions = torch.tensor([[1, 4], [2, 7], [3, 9]])
    return MaskedLMBatch(
        ids,
        torch.zeros_like(ids),
        torch.ones_like(ids, dtype=torch.bool),
        positions,
        torch.gather(ids, 1, positions),
        torch.tensor([0, 1, 0]),
        torch.arange(3).numpy(),
        6,
        36,
    )


def _switch(recipe: Recipe, batch: MaskedLMBatch | None = None) -> SwitchReport:
    old = Snapshot(_weights(recipe.stage_model(0)))
    build: Callable[..., None] = lambda snapshot: None  # noqa: E731 - the engine is not the point
    probe = Probe(_batch() if batch is None else batch, torch.device("cpu"))
    return switch_stage(recipe, 1, lambda report: old, build, probe)[1]  # type: ignore[arg-type]


@pytest.mark.parametrize("depth", sorted(DEPTH_OPERATORS))
def test_every_depth_operator_keeps_what_it_promises(depth: str) -> None:
    report = _switch(_recipe(depth))
    promise = StageGrowth(_recipe(depth), 1).tolerance
    assert report.promised_tolerance == promise
    assert (promise is not None) == (depth == "identity_exact")
    if promise is None:
        assert report.relative_logit_difference > 1e-3
    else:
        assert report.relative_logit_difference <= promise
        assert report.loss_after == pytest.approx(report.loss_before, rel=1e-5)
    assert report.warning == ""


@pytest.mark.parametrize("labels", [0, 1, 2])
def test_the_losses_are_those_that_the_model_computes_in_training(labels: int) -> None:
    recipe = _recipe("stack")
    model_config = recipe.model.model_copy(update={"num_nsp_labels": labels})
    recipe = recipe.model_copy(update={"model": model_config})
    batch = _batch()
    batch.masked_lm_ids[1, 1] = -100  # a padded position
    batch = replace(
        batch, num_masked=5, next_sentence_labels=batch.next_sentence_labels if labels else None
    )
    model = BertForPreTraining(recipe.stage_model(0)).eval()
    model.load_state_dict(_weights(recipe.stage_model(0)))
    sums = model(**batch.inputs())
    expected = sums["mlm_loss_sum"].item() / 5
    expected += sums["nsp_loss_sum"].item() / 3 if labels else 0.0
    report = _switch(recipe, batch)
    assert report.loss_before == pytest.approx(expected, rel=1e-6)
    assert report.loss_after != report.loss_before


def test_a_broken_promise_is_refused_or_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StageGrowth, "tolerance", 1e-5)
    with pytest.raises(UserError, match="promises to keep the function.*broken_promise"):
        _switch(_recipe("stack"))
    report = _switch(_recipe("stack", "warn"))
    assert "promises to keep the function to 1e-05, but the logits moved by" in report.warning


def test_the_promise_is_kept_to_the_last_tenth(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = _switch(_recipe("stack")).relative_logit_difference
    monkeypatch.setattr(StageGrowth, "tolerance", 1.1 * measured)
    assert _switch(_recipe("stack")).warning == ""
    monkeypatch.setattr(StageGrowth, "tolerance", 0.9 * measured)
    with pytest.raises(UserError, match="promises to keep the function"):
        _switch(_recipe("stack"))


def test_a_stage_of_the_same_model_promises_everything() -> None:
    recipe = _recipe("stack")
    longer = recipe.model_copy(update={"stages": (*recipe.stages, recipe.stages[1])})
    assert StageGrowth(longer, 2).tolerance == 0.0
    assert StageGrowth(longer, 2).name == "nothing"


def test_the_report_says_what_grew_and_how_alike_the_copies_are() -> None:
    recipe = _recipe("stack")
    narrow = recipe.stages[0].model_copy(update={"intermediate_size": 16})
    report = _switch(recipe.model_copy(update={"stages": (narrow, recipe.stages[1])}))
    assert report.operator == "ffn tile + depth stack"
    assert report.summary == "num_hidden_layers 2 -> 4, intermediate_size 16 -> 32"
    assert report.duplicate_similarity == {"ffn": pytest.approx(1.0)}
    assert report.promised_tolerance is None  # the depth's copies change the function


def test_the_probe_says_how_large_the_hidden_states_of_both_models_are() -> None:
    recipe, batch = _recipe("identity_exact"), _batch()
    batch.attention_mask[1, 7:] = False
    report = _switch(recipe, batch)
    for stage, sizes in ((0, report.residual_rms_before), (1, report.residual_rms_after)):
        config = recipe.stage_model(stage)
        assert len(sizes) == config.num_hidden_layers + 1
        if stage == 0:
            model = BertForPreTraining(config).eval()
            model.load_state_dict(_weights(config))
            outputs = model(batch.input_ids, attention_mask=batch.attention_mask)
            last = outputs["last_hidden_state"][batch.attention_mask]
            assert sizes[-1] == pytest.approx(float(last.detach().square().mean().sqrt()))
    # The function is kept, and so is what goes in and what comes out.
    ends = [[sizes[0], sizes[-1]] for sizes in (report.residual_rms_before,
                                                report.residual_rms_after)]  # fmt: skip
    assert ends[0] == pytest.approx(ends[1], rel=1e-5)
