"""What a JSON asks of the layers, and what becomes of it where nothing can be compiled."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from stacking import distributed, engine_options
from stacking.config import BertConfig, Recipe
from stacking.deepspeed_checks import check_document
from stacking.deepspeed_config import Accelerator, ResolvedEngine, resolve
from stacking.deepspeed_schema import Compile
from stacking.errors import ConfigError
from stacking.modeling import BertForPreTraining

CPU = Accelerator("cpu", supports_fp16=False, supports_bf16=True, fused_adam=False)
DEVICE = torch.device("cpu")
RECIPE = Recipe.model_validate(
    {
        "name": "odd",
        "model": {"vocab_size": 97, "hidden_size": 24, "num_attention_heads": 3,
                  "num_hidden_layers": 3},
        "global_batch_size": 6,
        "stages": [
            {"num_hidden_layers": 2, "steps": 7},
            {"num_hidden_layers": 3, "steps": 7,
             "deepspeed": {"activation_checkpointing": {"enabled": True, "interval": 2}}},
        ],
    }
)  # fmt: skip


def resolved(document: dict[str, object], stage: int = 0) -> ResolvedEngine:
    config = check_document(document, source="engine.json", prefix="")
    return resolve(
        config, RECIPE, world_size=1, accelerator=CPU, strict_precision=False, stage=stage
    )


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A machine whose programs are out of reach."""
    for name in ("CXX", "CC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    engine_options.compile_fault.cache_clear()
    yield
    engine_options.compile_fault.cache_clear()


def test_both_options_are_ours_and_deepspeed_never_sees_them() -> None:
    asked = {
        "activation_checkpointing": {"enabled": True, "interval": 3},
        "compile": {"enabled": True, "backend": "aot_eager", "dynamic": True},
    }
    engine = resolved(asked)
    assert not engine.deepspeed.keys() & asked.keys()
    assert engine.checkpoint_interval == 3
    assert engine.compile == Compile(enabled=True, backend="aot_eager", dynamic=True)


@pytest.mark.parametrize("enabled", [{}, {"enabled": False}])
def test_neither_is_on_unless_enabled(enabled: dict[str, object]) -> None:
    engine = resolved({"activation_checkpointing": enabled, "compile": enabled})
    assert (engine.checkpoint_interval, engine.compile) == (0, None)


def test_a_stage_may_checkpoint_for_itself() -> None:
    assert [resolved({}, stage).checkpoint_interval for stage in (0, 1)] == [0, 2]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_compiling_is_refused_at_zero_3_alone(stage: int) -> None:
    document: dict[str, object] = {
        "zero_optimization": {"stage": stage},
        "activation_checkpointing": {"enabled": True},
    }
    assert resolved(document).compile is None
    document["compile"] = {"enabled": True}
    if stage < 3:
        assert resolved(document).compile is not None
        return
    with pytest.raises(ConfigError, match=r"compile\.enabled: got true at ZeRO stage 3; allowed"):
        resolved(document)


def test_a_model_computes_as_asked_and_otherwise_as_ever() -> None:
    config = BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=2, num_attention_heads=2)
    model = BertForPreTraining(config)
    engine_options.apply(model, resolved({}))
    assert model.encoder.checkpoint_interval == 0
    assert not any("forward" in vars(layer) for layer in model.encoder.layers)
    block = {"enabled": True, "backend": "eager"}
    asked = resolved({"activation_checkpointing": {"enabled": True}, "compile": block})
    engine_options.apply(model, asked)
    assert model.encoder.checkpoint_interval == 1
    assert all("forward" in vars(layer) for layer in model.encoder.layers)


def test_where_there_is_no_compiler_layers_run_uncompiled_and_one_line_says_so(
    no_compiler: None,
) -> None:
    stages = [resolved({"compile": {"enabled": True}}, stage) for stage in (0, 1)]
    settled = engine_options.settle(stages, DEVICE)
    assert [stage.compile for stage in settled] == [None, None]
    (line,) = {notice for stage in settled for notice in stage.notices}
    assert "\n" not in line
    assert line.startswith("compile asked, but inductor cannot (")
    assert "compiler" in line
    assert line.endswith(": layers run uncompiled")
    assert settled[1] == replace(stages[1], compile=None, notices=(line,))


def test_what_needs_no_compiler_is_kept(no_compiler: None) -> None:
    stages = [resolved({"compile": {"enabled": True, "backend": "aot_eager"}}), resolved({})]
    assert engine_options.settle(stages, DEVICE) == stages


def test_one_rank_that_cannot_compile_decides_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "all_ranks_agree", lambda claim, device: False)
    stage = resolved({"compile": {"enabled": True, "backend": "eager"}})
    (settled,) = engine_options.settle([stage], DEVICE)
    assert settled.compile is None
    assert settled.notices == (
        "compile asked, but another rank cannot compile: layers run uncompiled",
    )


@pytest.mark.slow
def test_inductor_compiles_where_there_is_a_compiler() -> None:
    stage = resolved({"compile": {"enabled": True}})
    assert engine_options.settle([stage], DEVICE) == [stage]
