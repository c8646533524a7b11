"""Recipes: what is refused, with which words, all at once; extends, overrides and the way back."""

import contextlib
import copy
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from stacking.config import BertConfig, Recipe
from stacking.config_loading import load_recipe, resolved_json
from stacking.errors import ConfigError

GOOD: dict[str, object] = {
    "name": "odd",
    "model": {
        "vocab_size": 97,
        "hidden_size": 24,
        "num_hidden_layers": 6,
        "num_attention_heads": 3,
        "intermediate_size": 40,
        "max_position_embeddings": 33,
    },
    "data": {"max_seq_length": 32, "max_predictions_per_seq": 5},
    "global_batch_size": 12,
    "learning_rate": {"schedule": "wsd", "peak": 0.002, "warmup_steps": 4, "decay_steps": 6},
    "stages": [
        {"num_hidden_layers": 2, "steps": 11},
        {"num_hidden_layers": 3, "steps": 7},
        {"num_hidden_layers": 6, "steps": 5, "depth": "interleave"},
    ],
}
PIECEWISE = '{"schedule": "piecewise", "peak": 0.5, "points": [[0, 0.25], [9, 0.5]]}'


def write(folder: Path, document: object, name: str = "recipe.json") -> Path:
    path = folder / name
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return path


def faults_of(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_recipe(path, overrides)
    return caught.value.faults


def test_a_good_recipe_loads_with_its_values_and_defaults(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, GOOD))
    assert recipe.total_steps == 23
    assert recipe.stage_model(1).num_hidden_layers == 3
    assert recipe.stage_model(1).hidden_size == 24
    assert recipe.optimizer.betas == (0.9, 0.999)


BROKEN = [
    ("model.hidden_size=25", r"model\.num_attention_heads: got 3 with hidden_size 25; .*1, 5, 25"),
    ("model.hidden_size=-24", r"model\.hidden_size: got -24; allowed: an integer greater than 0"),
    ("model.vocab_size=many", r"model\.vocab_size: got 'many'; allowed: an integer greater than 0"),
    ('model.vocab_size="97"', r"model\.vocab_size: got '97'; allowed: an integer"),
    ("model.hiden_size=24", r"model\.hiden_size: unknown key; did you mean 'hidden_size'"),
    ("model.max_seq_length=9", r"unknown key; it belongs in 'data\.max_seq_length'"),
    ("model.position=rope", r"got 'rope'; allowed: one of 'learned', 'sinusoidal', 'rotary'"),
    ("model.num_nsp_labels=3", r"model\.num_nsp_labels: got 3; allowed: one of 0, 1, 2"),
    ("model.num_nsp_labels=0", r"model\.pooler: got true with num_nsp_labels 0; allowed: false"),
    ("model.type_vocab_size=1", r"model\.type_vocab_size: got 1 .*allowed: at least 2"),
    ("model.pad_token_id=97", r"model\.pad_token_id: got 97 with vocab_size 97; allowed: 0 to 96"),
    (
        "model.num_hidden_layers=8",
        r"stages\.2\.num_hidden_layers: got 6; allowed: .*8, in the last",
    ),
    ("model=12", r"model: got 12; allowed: an object with the keys vocab_size, hidden_size"),
    ("data.max_seq_length=34", r"data\.max_seq_length: got 34; allowed: at most .*, 33"),
    (
        "data.max_predictions_per_seq=30",
        r"got 30 with max_seq_length 32; allowed: 1 to 29; .*needs 5",
    ),
    ('data={"masking": "static", "whole_word": true}', r"data\.whole_word: got true with masking"),
    ("optimizer.betas=[0.9, 1]", r"optimizer\.betas\.1: got 1; allowed: .*less than 1"),
    (
        "optimizer.betas=[0.9]",
        r"optimizer\.betas.*allowed: a list of 2|optimizer\.betas\.1: missing",
    ),
    ("optimizer.eps=true", r"optimizer\.eps: got true; allowed: a number greater than 0"),
    ("learning_rate.peak=1e999", r"learning_rate\.peak: got '1e999'; allowed: a number"),
    ("learning_rate.peak=101", r"learning_rate\.peak: got 101; allowed: .* at most 100"),
    ("stages.0.steps=1" + "0" * 400, r"stages\.0\.steps: got 10+\.\.\.; allowed: .*1099511627776"),
    ("stages." + "9" * 5000 + ".steps=1", r"stages: got '9+\.*; allowed: an index from 0 to 2"),
    (
        "model.type_vocab_size=16777217",
        r"type_vocab_size: got 16777217; allowed: .*16777216",
    ),
    (
        'model={"vocab_size": 97, "hidden_size": 131072, "num_hidden_layers": 4096, '
        '"num_attention_heads": 1}',
        r"hidden_size: got 131072 with 4096 layers, .* parameters; allowed: at most 1,099",
    ),
    ("learning_rate.decay_steps=0", r"learning_rate\.decay_steps: got 0; allowed: at least 1"),
    ("learning_rate.warmup_steps=18", r"warmup_steps: got 18, and decay_steps 6, of 23 steps"),
    ("learning_rate.scope=epoch", r"learning_rate\.scope: got 'epoch'; allowed: one of 'run'"),
    (
        'learning_rate={"scope": "stage", "warmup_steps": 7}',
        r"warmup_steps: got 7, and decay_steps 0, of 7 steps in stages\.1; .*at most 6",
    ),
    (
        'learning_rate={"scope": "stage", "total_steps": 30}',
        r"total_steps: got 30 with scope 'stage', .*allowed: absent, or scope 'run'",
    ),
    (
        'learning_rate={"scope": "stage", "schedule": "piecewise", "points": [[0, 1], [2, 3]]}',
        r"scope: got stage with schedule 'piecewise', .*'linear' or 'cosine' or",
    ),
    ("learning_rate.end=0.003", r"learning_rate\.end: got 0\.003; allowed: 0 to .*, 0\.002"),
    ("learning_rate.schedule=linear", r"decay_steps: got 6 with schedule 'linear', .*'wsd'"),
    ("learning_rate.points=[[0, 1], [2, 3]]", r"points: got .* with schedule 'wsd'.*'piecewise'"),
    ("learning_rate.total_steps=22", r"total_steps: got 22 while all stages have 23 steps"),
    ("learning_rate.schedule=step", r"got 'step'; allowed: one of 'linear', 'cosine'"),
    (
        "stages.1.num_hidden_layers=four",
        r"stages\.1\.num_hidden_layers: got 'four'; allowed: an int",
    ),
    ("stages.1.num_hidden_layers=1", r"stages\.1\.num_hidden_layers: got 1 after 2; .*only grows"),
    ('stages.0.freeze={"layers": 1}', r"stages\.0\.freeze: got 1 layers in the first stage"),
    ('stages.1.freeze={"layers": 3}', r"stages\.1\.freeze\.layers: got 3 of 3 .*allowed: 1 to 2"),
    ('stages.1.freeze={"layers": 0}', r"stages\.1\.freeze\.layers: got 0; .*greater than 0"),
    ('stages.0.rewarm={"steps": 3}', r"stages\.0\.rewarm: got a factor in the first stage"),
    ('stages.1.rewarm={"steps": 8}', r"stages\.1\.rewarm\.steps: got 8 in a stage of 7"),
    ("stages.1.rewarm={}", r"stages\.1\.rewarm: got steps 0, .*change nothing"),
    ("stages.0.max_seq_length=33", r"stages\.0\.max_seq_length: got 33; allowed: at most .* 32"),
    (
        "stages.0.max_seq_length=6",
        r"stages\.0\.max_predictions_per_seq: got \d+ with max_seq_length 6; allowed: 1 to 3",
    ),
    ("stages.2.max_seq_length=16", r"stages\.2\.max_seq_length: got 16; .*32, in the last stage"),
    ("stages.2.hidden_size=12", r"stages\.2\.hidden_size: got 12; .*24, in the last stage"),
    ("stages.0.hidden_size=20", r"stages\.0\.num_attention_heads: got 3 with hidden_size 20"),
    ("stages.0.pooling=mean", r"stages\.0\.pooling_size: got 1 with pooling 'mean'; .*2 or more"),
    ("stages.0.pooling_size=2", r"stages\.0\.pooling_size: got 2 with pooling 'none'"),
    ("stages.0.pooling_size=0", r"stages\.0\.pooling_size: got 0; .*greater than 0"),
    (
        "stages.1.shared_attention_layers=[0]",
        r"stages\.1\.shared_attention_layers: got \[0\] with 3 layers; .*from 1 to 2",
    ),
    (
        "stages.1.layer_intermediate_sizes=[8, 8]",
        r"stages\.1\.layer_intermediate_sizes: got 2 sizes; .*each of the 3 layers",
    ),
    ("stages.1.depth=zigzag", r"stages\.1\.depth: got 'zigzag'; allowed: one of 'stack'"),
    ("stages.0.steps=0", r"stages\.0\.steps: got 0; allowed: an integer greater than 0"),
    ("stages.0.steps=1.5", r"stages\.0\.steps: got 1\.5; allowed: an integer"),
    ("stages=[]", r"stages: got \[\]; allowed: a list of at least 1 of objects"),
    ('stages=[{"num_hidden_layers": 6}]', r"stages\.0\.steps: missing; allowed: an integer"),
    ("name=", r"name: got ''; allowed: a string that is not empty"),
    ("seed=null", r"seed: got null; allowed: an integer at least 0"),
    ("zzz=1", r"zzz: unknown key; known keys here: branches, checkpoint, data, "),
]


@pytest.mark.parametrize(("override", "message"), BROKEN, ids=[o for o, _ in BROKEN])
def test_a_broken_recipe_is_refused_with_path_value_and_what_is_allowed(
    tmp_path: Path, override: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe(write(tmp_path, GOOD), [override])


def test_rotary_positions_need_heads_of_even_size(tmp_path: Path) -> None:
    changes = ["model.position=rotary", "model.hidden_size=21"]
    with pytest.raises(ConfigError, match="got 3 with hidden_size 21, heads of 7; .*even size"):
        load_recipe(write(tmp_path, GOOD), changes)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("learning_rate.points=[[0, 0.5]]", "points: got steps \\[0\\]; allowed: at least 2"),
        ("learning_rate.points=[[9, 0.5], [9, 0.25]]", "got steps \\[9, 9\\].*strictly ascending"),
        ("learning_rate.points=[[-1, 0.5], [9, 0.25]]", r"points\.0\.0: got -1; .*at least 0"),
        ("learning_rate.peak=0.75", r"learning_rate\.peak: got 0\.75; allowed: 0\.5, the highest"),
        ("learning_rate.warmup_steps=2", "warmup_steps: got 2 with schedule 'piecewise'"),
    ],
)
def test_piecewise_rates_need_ascending_corners_and_say_their_peak(
    tmp_path: Path, override: str, message: str
) -> None:
    path = write(tmp_path, GOOD)
    assert load_recipe(path, [f"learning_rate={PIECEWISE}", "learning_rate.peak=0.5"])
    broken = {**GOOD, "learning_rate": json.loads(PIECEWISE)}
    with pytest.raises(ConfigError, match=message):
        load_recipe(write(tmp_path, broken), [override])


def test_all_faults_are_reported_together(tmp_path: Path) -> None:
    broken = copy.deepcopy(GOOD)
    broken["model"] = {"vocab_size": 97, "hidden_size": 25, "num_attention_heads": 3, "pool": True}
    broken["data"] = {"max_seq_length": 32, "max_predictions_per_seq": 31}
    broken["optimizer"] = {"eps": "tiny"}
    broken["stages"] = [{"num_hidden_layers": 12, "steps": 9}, {"num_hidden_layers": 3, "steps": 2}]
    faults = faults_of(write(tmp_path, broken), "stages.5.steps=1", "chekpoint.keep_last=2")
    starts = sorted(fault.split(":")[0] for fault in faults)
    assert starts == [
        "--set stages.5.steps=1",
        "chekpoint",
        "data.max_predictions_per_seq",
        "model.num_attention_heads",
        "model.pool",
        "optimizer.eps",
        "stages.1.num_hidden_layers",  # smaller than the stage before
        "stages.1.num_hidden_layers",  # not the full model's
    ]


def test_a_fault_of_one_kind_is_reported_once(tmp_path: Path) -> None:
    assert len(faults_of(write(tmp_path, GOOD), "model.hidden_size=25")) == 1


def test_the_message_counts_and_lists_the_faults(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(write(tmp_path, GOOD), ["seed=-1", "name=7"])
    lines = str(caught.value).splitlines()
    assert lines[0] == "2 faults in the configuration:"
    assert [line[:4] for line in lines[1:]] == ["  - ", "  - "]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"name": "x",\n "seed": 1,}', "line 2, column 1[0-2]: .*allowed: plain JSON"),
        ('{"name": "x", "seed": 1, "seed": 2}', "given twice in one object: 'seed'"),
        ('{"a": {"steps": 1, "steps": 1}, "b": 1, "b": 2}', "'steps', 'b'"),
        ('{"seed": NaN}', "got NaN, which is not a JSON number"),
        ("[1, 2]", r"got \[1, 2\]; allowed: one JSON object"),
        ("", "line 1, column 1"),
    ],
)
def test_a_file_that_is_no_json_object_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe(write(tmp_path, text))


def test_a_missing_file_names_the_nearest_one(tmp_path: Path) -> None:
    write(tmp_path, GOOD, "stacking_base.json")
    with pytest.raises(ConfigError, match=r"no such file; did you mean 'stacking_base\.json'"):
        load_recipe(tmp_path / "stackingbase.json")
    with pytest.raises(ConfigError, match="nor the folder"):
        load_recipe(tmp_path / "absent" / "recipe.json")


def test_a_folder_or_binary_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read as UTF-8 text"):
        load_recipe(tmp_path)
    (tmp_path / "x.json").write_bytes(b"\xff\x00\xfe")
    with pytest.raises(ConfigError, match="cannot be read as UTF-8 text"):
        load_recipe(tmp_path / "x.json")


def test_extends_merges_objects_and_replaces_lists_along_a_chain(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    write(tmp_path, GOOD, "a.json")
    middle = {"extends": "../a.json", "model": {"intermediate_size": 44}, "seed": 5}
    write(tmp_path / "deep", middle, "b.json")
    stages = [{"num_hidden_layers": 6, "steps": 30}]
    last = {"$schema": "s.json", "extends": "deep/b.json", "stages": stages, "seed": 9}
    recipe = load_recipe(write(tmp_path, last, "c.json"))
    assert (recipe.model.hidden_size, recipe.model.intermediate_size) == (24, 44)
    assert [stage.steps for stage in recipe.stages] == [30]
    assert recipe.seed == 9


def test_a_base_that_is_no_path_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, {"extends": "a\0.json"})
    with pytest.raises(ConfigError, match=r"extends: got .*; allowed: the path of a recipe"):
        load_recipe(path)


def test_extends_in_a_circle_or_to_nowhere_is_refused(tmp_path: Path) -> None:
    write(tmp_path, {"extends": "b.json"}, "a.json")
    write(tmp_path, {"extends": "a.json"}, "b.json")
    with pytest.raises(ConfigError, match=r"in a circle: a\.json -> b\.json -> a\.json"):
        load_recipe(tmp_path / "a.json")
    with pytest.raises(ConfigError, match=r"bb\.json: no such file; did you mean 'b\.json'"):
        load_recipe(write(tmp_path, {"extends": "bb.json"}, "c.json"))
    with pytest.raises(ConfigError, match="extends: got 7; allowed: the path of a recipe"):
        load_recipe(write(tmp_path, {"extends": 7}, "d.json"))


def test_overrides_are_json_or_else_text_and_reach_into_lists(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    recipe = load_recipe(
        path,
        [
            "stages.0.steps=5",
            "name=a=b",
            "evaluation.every_steps=17",  # a section that the file leaves out
            "optimizer.betas=[0.8, 0.95]",
            "stages.1.deepspeed.train_micro_batch_size_per_gpu=3",
        ],
    )
    assert [stage.steps for stage in recipe.stages] == [5, 7, 5]
    assert recipe.name == "a=b"
    assert recipe.evaluation.every_steps == 17
    assert recipe.optimizer.betas == (0.8, 0.95)
    assert recipe.stages[1].deepspeed == {"train_micro_batch_size_per_gpu": 3}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", r"--set seed: allowed: key\.path=value"),
        ("=3", r"--set =3: allowed: key\.path=value"),
        ("stages.3.steps=5", r"stages: got '3'; allowed: an index from 0 to 2"),
        ("stages.-1.steps=5", r"stages: got '-1'; allowed: an index from 0 to 2"),
        ("stages.last.steps=5", r"stages: got 'last'; allowed: an index from 0 to 2"),
        ("seed.low=5", r"seed: got \{.*allowed: an integer"),
        ("name.short=x", r"--set name\.short=x: name is 'odd', which has no keys"),
        ("learning_rate.peek=1", r"learning_rate\.peek: unknown key; did you mean 'peak'"),
    ],
)
def test_an_override_that_goes_nowhere_is_refused(
    tmp_path: Path, override: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe(write(tmp_path, GOOD), [override])


def test_a_refused_override_is_repeated_in_one_short_line(tmp_path: Path) -> None:
    brackets = "[" * 10_000 + "]" * 10_000
    (fault,) = faults_of(write(tmp_path, GOOD), f"stages.9.steps={brackets}")
    assert fault.startswith("--set stages.9.steps=[[[")
    assert len(fault) < 200


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=3)
    | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)
PATHS = [override.split("=")[0] for override, _ in BROKEN] + ["stages.1", "optimizer", "data"]


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(PATHS), JSON_VALUES, st.booleans())
def test_whatever_is_written_the_answer_is_a_recipe_or_a_config_error(
    tmp_path: Path, path: str, value: object, through_file: bool
) -> None:
    change = f"{path}={json.dumps(value)}"
    document = {**GOOD, path.split(".")[0]: value} if through_file else GOOD
    write(tmp_path, document, "fuzzed.json")
    with contextlib.suppress(ConfigError):
        load_recipe(tmp_path / "fuzzed.json", [] if through_file else [change])


def test_the_resolved_recipe_reads_back_as_itself(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, GOOD), [f"learning_rate={PIECEWISE}"])
    text = resolved_json(recipe)
    assert load_recipe(write(tmp_path, text, "resolved.json")) == recipe
    assert json.loads(text)["checkpoint"] == {"every_steps": 1000, "keep_last": 2}


def test_python_builds_the_same_recipe_and_the_same_refusals(tmp_path: Path) -> None:
    assert Recipe.model_validate(GOOD) == load_recipe(write(tmp_path, GOOD))
    with pytest.raises(ValidationError, match="num_attention_heads: got 5 with hidden_size 24"):
        BertConfig(vocab_size=97, hidden_size=24, num_attention_heads=5)
    with pytest.raises(ValidationError, match="in the last stage"):
        Recipe.model_validate({**GOOD, "stages": [{"num_hidden_layers": 2, "steps": 30}]})


def test_a_recipe_cannot_be_changed() -> None:
    recipe = Recipe.model_validate(GOOD)
    with pytest.raises(ValidationError, match="frozen"):
        recipe.seed = 3  # type: ignore[misc]


@pytest.mark.parametrize("field", ["hidden_size", "num_hidden_layers", "vocab_size"])
def test_an_absurd_size_is_a_typing_error(field: str) -> None:
    document = json.loads(json.dumps(GOOD))
    document["model"][field] = 3_000_000_000_000
    with pytest.raises(ValidationError, match="less than or equal"):
        Recipe.model_validate(document)
