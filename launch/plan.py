"""What a recipe will cost and what growing can save, before anything runs: sizes, FLOPs, memory.

example:
  python launch/plan.py --recipe launch/recipes/stackingbert_base.json
  python launch/plan.py --recipe my.json --deepspeed_config deepspeed_configs/zero2_fp16.json \\
      --world-size 8
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

from rich.console import Console

from stacking.config_loading import load_recipe
from stacking.deepspeed_config import load_deepspeed_config
from stacking.errors import ConfigError, UserError
from stacking.stage_plan import RecipePlan, plan_recipe
from stacking.stage_plan_table import plan_json, show_plan

WIDTH = 100  # columns, where the output is no terminal


def main() -> int:
    """0 done, 2 the user's mistake."""
    arguments = parse_arguments()
    try:
        result = plan(arguments)
    except UserError as error:
        print(json.dumps({"error": str(error)}) if arguments.json else f"error: {error}",
              file=sys.stderr)  # fmt: skip
        return 2
    if arguments.json:
        print(json.dumps(plan_json(result)))
    else:
        width, _ = shutil.get_terminal_size((WIDTH, 50))
        show_plan(result, Console(width=width, highlight=False))
    return 0


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="plan.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--recipe", type=Path, required=True, metavar="R.json", help="what would be trained")
    add("--set", action="append", default=[], metavar="KEY=VALUE",
        help="change one recipe value, such as stages.0.steps=500; repeatable")  # fmt: skip
    add("--deepspeed_config", type=Path, default=None, metavar="C.json",
        help="how it would run: shows the memory that this file's ZeRO stage, precision and micro "
        "batch need (default: fp16_fused_adam)")  # fmt: skip
    add("--world-size", type=int, default=1, metavar="N", help="number of GPUs (default: 1)")
    add("--json", action="store_true", help="print the plan as one JSON line")
    return parser.parse_args()


def plan(arguments: argparse.Namespace) -> RecipePlan:
    """Load, check and compute; ConfigError lists every fault."""
    if arguments.world_size < 1:
        raise ConfigError(f"--world-size: got {arguments.world_size}; allowed: 1 or more")
    recipe = load_recipe(arguments.recipe, arguments.set)
    engine = load_deepspeed_config(arguments.deepspeed_config)
    return plan_recipe(recipe, engine, world_size=arguments.world_size)


if __name__ == "__main__":
    sys.exit(main())
