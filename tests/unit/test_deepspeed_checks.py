"""The DeepSpeed JSON by itself: what is refused, with which words, all at once."""

import contextlib
import copy
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stacking.config_loading import merge
from stacking.deepspeed_config import load_deepspeed_config
from stacking.deepspeed_schema import OWNED_BY_RECIPE, REFUSED, REMOVED, EngineSettings
from stacking.errors import ConfigError

ON = {"enabled": True}
GOOD: dict[str, object] = {"fp16": {"enabled": True}, "zero_optimization": {"stage": 1}}


def write(folder: Path, document: object) -> Path:
    path = folder / "engine.json"
    path.write_text(json.dumps(document))
    return path


def nested(path: str, value: object, start: dict[str, object] | None = None) -> dict[str, object]:
    """GOOD, or `start`, with `value` at a dotted path."""
    document = copy.deepcopy(GOOD if start is None else start)
    *parents, key = path.split(".")
    node = document
    for parent in parents:
        child = node.setdefault(parent, {})
        assert isinstance(child, dict)
        node = child
    node[key] = value
    return document


@pytest.mark.parametrize("path", OWNED_BY_RECIPE)
def test_keys_of_the_recipe_may_be_absent_or_auto_and_nothing_else(
    tmp_path: Path, path: str
) -> None:
    config = load_deepspeed_config(write(tmp_path, nested(path, "auto")))
    assert "auto" not in json.dumps(config.document)
    home = OWNED_BY_RECIPE[path].split(",")[0].split(";")[0]
    with pytest.raises(ConfigError, match=rf"{path}: got 0\.5; belongs in the recipe: {home}"):
        load_deepspeed_config(write(tmp_path, nested(path, 0.5)))


@pytest.mark.parametrize("path", REMOVED)
def test_keys_that_deepspeed_removed_are_refused_even_when_disabled(
    tmp_path: Path, path: str
) -> None:
    with pytest.raises(
        ConfigError, match=f"{path}: removed from DeepSpeed .*; allowed: absent; .+"
    ):
        load_deepspeed_config(write(tmp_path, nested(path, {"enabled": False})))


@pytest.mark.parametrize("path", REFUSED)
def test_keys_that_the_trainer_cannot_honour_are_refused_with_the_reason(
    tmp_path: Path, path: str
) -> None:
    with pytest.raises(ConfigError, match=f"{path}: not supported; allowed: absent; .+"):
        load_deepspeed_config(write(tmp_path, nested(path, {"enabled": False})))


BROKEN = [
    ("gradient_cliping", 1.0, "gradient_cliping: unknown key; did you mean 'gradient_clipping'"),
    ("fp16.enabld", True, r"fp16\.enabld: unknown key; did you mean 'enabled'"),
    ("optimizer.params.wait_decay", 1, "wait_decay: unknown key; did you mean 'weight_decay'"),
    ("optimizer.params.torchadam", True, r"unknown key; did you mean 'torch_adam'"),
    ("zero_optimization.zero_stage", 1, r"zero_optimization\.zero_stage: unknown key"),
    ("reduce_bucket_size", 9, r"it belongs in 'zero_optimization\.reduce_bucket_size'"),
    ("zero_optimization.stage", "auto", r'zero_optimization\.stage: got "auto"; allowed: a value'),
    (
        "gradient_cliping",
        "auto",
        r"gradient_cliping: unknown key; did you mean 'gradient_clipping'",
    ),
    ("fp16.enable", "auto", r"fp16\.enable: unknown key; did you mean 'enabled'"),
    ("zero_optimization.stage", "2", r"zero_optimization\.stage: got '2'; allowed: one of 0, 1, 2"),
    ("zero_optimization.stage", 4, r"zero_optimization\.stage: got 4; allowed: one of 0, 1, 2, 3"),
    (
        "zero_optimization.stage",
        0,
        r"stage: got 0 with fp16; allowed: 1, 2 or 3, because .*stage 1",
    ),
    ("zero_optimization.reduce_bucket_size", "5e8", "got '5e8'; allowed: an integer"),
    ("zero_optimization.offload_param", {"device": "cpu"}, "got device 'cpu' at stage 1"),
    ("zero_optimization.offload_optimizer", {"ratio": 0.5}, "ratio: got 0.5 at stage 1"),
    (
        "zero_optimization.offload_param",
        {"device": "nvme"},
        "'nvme'; allowed: one of 'none', 'cpu'",
    ),
    ("bf16.enabled", True, r"bf16\.enabled: got true, and fp16 too; allowed: one of fp16, bf16"),
    ("torch_autocast.enabled", True, r"torch_autocast\.enabled: got true, and fp16 too"),
    ("fp16", True, r"fp16: got true; allowed: an object with the keys enabled"),
    ("fp16.loss_scale", -1, r"fp16\.loss_scale: got -1; allowed: a number at least 0"),
    ("optimizer.type", "OneBitAdam", "got 'OneBitAdam'; allowed: one of 'Adam', 'AdamW', 'Lamb'"),
    ("optimizer.type", "Lamb", "got 'Lamb' at ZeRO stage 1; allowed: stage 0"),
    ("optimizer.params.adam_w_mode", False, r"adam_w_mode: got false; allowed: true"),
    ("optimizer.params.fused", True, "fused: not a parameter of AdamW without torch_adam"),
    ("optimizer.params.max_coeff", 2.0, "max_coeff: not a parameter of AdamW; allowed: absent"),
    ("train_micro_batch_size_per_gpu", 0, "train_micro_batch_size_per_gpu: got 0; allowed: an int"),
    ("data_types.grad_accum_dtype", "float", "got 'float'; allowed: one of 'fp32', 'fp16', 'bf16'"),
    ("apex.fused_lamb", True, r"apex\.fused_lamb: got true with optimizer\.type 'AdamW'"),
    ("apex.fused_lam", True, r"apex\.fused_lam: unknown key; did you mean 'fused_lamb'"),
    ("optimizer.params.ns_method", "gram", "ns_method: not a parameter of AdamW; allowed: absent"),
    ("zero_optimization.round_robin_gradients", True, "round_robin_gradients: got true; allowed"),
    ("zero_optimization.zero_hpz_partition_size", 8, "size: got 8 at ZeRO stage 1; allowed: 1, or"),
    ("zero_optimization.zero_quantized_weights", True, "got true at ZeRO stage 1; allowed: false"),
]


@pytest.mark.parametrize(
    ("path", "value", "message"), BROKEN, ids=[f"{p}={v}" for p, v, _ in BROKEN]
)
def test_a_broken_json_is_refused_with_file_path_value_and_what_is_allowed(
    tmp_path: Path, path: str, value: object, message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_deepspeed_config(write(tmp_path, nested(path, value)))
    assert all(fault.startswith("engine.json: ") for fault in caught.value.faults)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (
            {
                "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
                "optimizer": {"params": {"torch_adam": True}},
            },
            "torch_adam: got true with offload_optimizer",
        ),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
            "offload_optimizer: got device 'cpu' at stage 0",
        ),
        (
            {"zero_optimization": {"stage": 3}, "prescale_gradients": True},
            "prescale_gradients: got true at ZeRO stage 3",
        ),
        (
            {"zero_optimization": {"stage": 2}, "gradient_predivide_factor": 2},
            r"gradient_predivide_factor: got 2(\.0)? at ZeRO stage 2 .*allowed: 1\.0",
        ),
        (
            {"data_types": {"grad_accum_dtype": "bf16"}},
            "grad_accum_dtype: got 'bf16' at ZeRO stage 0",
        ),
        (
            {
                "zero_optimization": {
                    "stage": 3,
                    "zero_quantized_gradients": True,
                    "reduce_scatter": False,
                }
            },
            "zero_quantized_gradients: got true with reduce_scatter false",
        ),
    ],
)
def test_combinations_that_deepspeed_stops_at_are_refused(
    tmp_path: Path, document: object, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_deepspeed_config(write(tmp_path, document))


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["auto", "cpu", ""]),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from(["enabled", "stage", "params", "type"]), inner)
    ),
    max_leaves=4,
)
TOP_LEVEL = [*EngineSettings.model_fields, *OWNED_BY_RECIPE, "unheard_of"]


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from(TOP_LEVEL), JSON_VALUES, max_size=4))
def test_whatever_is_written_the_answer_is_settings_or_a_config_error(
    tmp_path: Path, document: dict[str, object]
) -> None:
    with contextlib.suppress(ConfigError):
        load_deepspeed_config(write(tmp_path, document))


def test_all_faults_are_reported_together(tmp_path: Path) -> None:
    document = {
        "amp": {},
        "train_batch_size": 64,
        "aio": {},
        "fp16": {"enabled": True, "scale": 1},
        "zero_optimization": {"stage": "auto"},
        "optimizer": {"type": 3},
    }
    with pytest.raises(ConfigError) as caught:
        load_deepspeed_config(write(tmp_path, document))
    keys = {fault.split(": ")[1] for fault in caught.value.faults}
    assert keys == {
        "amp",
        "train_batch_size",
        "aio",
        "fp16.scale",
        "zero_optimization.stage",
        "optimizer.type",
    }


MUON_AT_3 = {"optimizer": {"type": "Muon"}, "zero_optimization": {"stage": 3}}
NOT_WITH_MUON = [
    ("optimizer.params.max_coeff", 2.0, "max_coeff: not a parameter of Muon; allowed: absent"),
    ("optimizer.params.fused", True, "fused: not a parameter of Muon without torch_adam"),
    ("optimizer.params.momentum", 0.9, r"optimizer\.params\.momentum: unknown key"),
    ("optimizer.params.ns_method", "svd", "ns_method: got 'svd'; allowed: one of 'gram'"),
    ("zero_optimization.reduce_scatter", True, "reduce_scatter: got true with .*'Muon' at stage 3"),
    ("zero_optimization.zero_quantized_gradients", True, "zero_quantized_gradients: got true"),
    ("zero_optimization.offload_optimizer", {"device": "cpu"}, "offload_optimizer: got device"),
    ("zero_optimization.offload_param", {"device": "cpu"}, "offload_param: got device 'cpu' with"),
    ("apex.fused_lamb", True, r"fused_lamb: got true with optimizer\.type 'Muon'"),
]


@pytest.mark.parametrize(("path", "value", "message"), NOT_WITH_MUON)
def test_what_muon_cannot_do_is_refused(
    tmp_path: Path, path: str, value: object, message: str
) -> None:
    load_deepspeed_config(write(tmp_path, MUON_AT_3))
    with pytest.raises(ConfigError, match=message):
        load_deepspeed_config(write(tmp_path, merge(MUON_AT_3, nested(path, value, {}))))


def test_muon_compiled_layers_and_checkpointed_ones_are_two_of_three(tmp_path: Path) -> None:
    muon = {"optimizer": {"type": "Muon"}, "zero_optimization": {"stage": 1}}
    compiled, checkpointed = {"compile": ON}, {"activation_checkpointing": ON}
    for two in (muon | compiled, muon | checkpointed, compiled | checkpointed):
        load_deepspeed_config(write(tmp_path, two))
    with pytest.raises(ConfigError, match=r"compile\.enabled: got true with activation_check"):
        load_deepspeed_config(write(tmp_path, muon | compiled | checkpointed))


def test_apexes_lamb_takes_no_coefficients(tmp_path: Path) -> None:
    lamb = {"optimizer": {"type": "Lamb"}, "apex": {"fused_lamb": True}}
    load_deepspeed_config(write(tmp_path, lamb))
    broken = merge(lamb, {"optimizer": {"params": {"max_coeff": 3.0}}})
    with pytest.raises(ConfigError, match=r"max_coeff: not a parameter of Lamb with apex\.fused"):
        load_deepspeed_config(write(tmp_path, broken))


@pytest.mark.parametrize("name", ["torch.nn.Lineer", "antigravity", "os.system", ""])
def test_autocast_modules_that_deepspeed_would_import_blindly_are_refused(
    tmp_path: Path, name: str
) -> None:
    path = "torch_autocast.lower_precision_safe_modules"
    load_deepspeed_config(write(tmp_path, nested(path, ["torch.nn.Linear"])))
    with pytest.raises(ConfigError, match=rf"{path}\.0: got '{name}'; allowed: one of \"?'torch"):
        load_deepspeed_config(write(tmp_path, nested(path, [name])))
