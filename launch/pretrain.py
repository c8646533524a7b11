"""Pre-train BERT progressively: all stages of a recipe, in one job, resuming where it stands.

example (2 ranks on one machine):
  deepspeed --num_accelerators 2 launch/pretrain.py --recipe launch/recipes/demo.json \\
      --data DATA_DIR --run-dir RUN_DIR

A recipe's branches follow in RUN_DIR/branches, each a run of its own.
"""

import argparse
import sys
from pathlib import Path

from stacking import Trainer, distributed
from stacking.config_loading import load_recipe
from stacking.deepspeed_config import load_deepspeed_config
from stacking.errors import UserError, is_users
from stacking.run_branch import Trunk
from stacking.run_start import Start
from stacking.stopping import Outcome, StopLimits, parse_duration
from stacking.study import Run, Study


def parse_arguments() -> argparse.Namespace:
    """The command line; DeepSpeed's launcher adds --local_rank."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--recipe", type=Path, required=True, help="what is trained: launch/recipes/*.json")
    add("--data", type=Path, required=True, help="folder made by prepare_data.py, or NVIDIA shards")
    add("--stage-data", type=Path, default=None, metavar="DIR",
        help="copy shards to this folder on each node's own disk, read them there")  # fmt: skip
    add("--run-dir", type=Path, required=True, help="where the run is written; never overwritten")
    add("--deepspeed_config", type=Path, default=None,
        help="how it runs: deepspeed_configs/*.json (default: fp16_fused_adam)")  # fmt: skip
    add("--set", action="append", default=[], metavar="KEY=VALUE",
        help="change one recipe value, such as learning_rate.peak=1e-3; repeatable")  # fmt: skip
    add("--resume", default="auto", metavar="auto|never|TAG",
        help="continue a run (default), insist on a new one, or continue a tag")  # fmt: skip
    add("--branch-from", default=None, metavar="RUN@STEP",
        help="begin a new run at a saved step of another one, whose steps until there must be "
        "those of this recipe; nothing is copied but its metrics")  # fmt: skip
    add("--start-from", type=Start.at, default=None, metavar="HF_DIR",
        help="begin a new run with the weights of any BERT of the first stage's size")  # fmt: skip
    add("--time-limit", default=None, metavar="2h",
        help="stop after this time (1d12h, 90m), committed and resumable, code 3")  # fmt: skip
    add("--max-steps", type=int, default=None, metavar="N",
        help="stop likewise when the whole run has done N optimizer steps")  # fmt: skip
    add("--hang-timeout", default="5m", metavar="5m",
        help="end all ranks, with exit code 4, when none has got on for so long")  # fmt: skip
    add("--strict-precision", action="store_true",
        help="refuse to run in another precision than the JSON's")  # fmt: skip
    add("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    """0 done, 1 our bug, 2 the user's mistake, 3 stopped early and resumable, 4 a rank was lost."""
    arguments = parse_arguments()
    study = None
    try:
        trunk = None if arguments.branch_from is None else Trunk.parse(arguments.branch_from)
        recipe = load_recipe(arguments.recipe, arguments.set)
        run = Run(recipe, arguments.run_dir, trunk, arguments.start_from)
        seconds = None if arguments.time_limit is None else parse_duration(arguments.time_limit)
        limits = StopLimits(seconds, arguments.max_steps)
        hang_timeout = parse_duration(arguments.hang_timeout, "--hang-timeout")
        study = Study(run, lambda run, limits: trainer_of(run, limits, hang_timeout, arguments))
        return 0 if study.fit(limits, hang_timeout) is Outcome.DONE else 3
    except (UserError, OSError) as error:
        if not is_users(error):
            raise
        if distributed.tells(error, have_met=study is not None):
            print(f"error: {error}", file=sys.stderr)
        return 2


def trainer_of(
    run: Run, limits: StopLimits, hang_timeout: float, arguments: argparse.Namespace
) -> Trainer:
    """Of one run; ConfigError where its growth is not possible."""
    return Trainer(
        run.recipe,
        load_deepspeed_config(arguments.deepspeed_config),
        data_dir=arguments.data,
        stage_data=arguments.stage_data,
        run_dir=run.folder,
        resume=arguments.resume,
        branch_from=run.trunk,
        start_from=run.start,
        strict_precision=arguments.strict_precision,
        limits=limits,
        hang_timeout=hang_timeout,
    )


if __name__ == "__main__":
    sys.exit(main())
