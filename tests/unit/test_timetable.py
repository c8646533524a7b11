"""What a run does after which step."""

from stacking.branches import branch_runs
from stacking.config import Recipe
from stacking.timetable import Due, Timetable

RECIPE = Recipe.model_validate({
    "name": "a", "global_batch_size": 4,
    "model": {"vocab_size": 37, "hidden_size": 12, "num_hidden_layers": 2,
              "num_attention_heads": 3, "intermediate_size": 20},
    "learning_rate": {"schedule": "wsd", "warmup_steps": 1, "decay_steps": 2},
    "stages": [{"num_hidden_layers": 1, "steps": 5}, {"num_hidden_layers": 2, "steps": 6}],
    "evaluation": {"every_steps": 4}, "checkpoint": {"every_steps": 3}, "branches": [0.8],
})  # fmt: skip


def test_each_step_has_what_the_recipe_says() -> None:
    (branch,) = branch_runs(RECIPE)
    assert branch.at == 7
    table = Timetable(RECIPE)
    dues = {step: table.after(step) for step in range(1, 12)}
    assert [step for step, due in dues.items() if due.saves] == [3, 6, 7, 9]
    # 5 and 11 end stages, at 7 a branch leaves.
    assert [step for step, due in dues.items() if due.evaluates] == [4, 5, 7, 8, 11]
    assert dues[7] == Due("branch_00000007", saves=True, evaluates=True)
    assert dues[6].tag == "step_00000006"
