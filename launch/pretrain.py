"""Pre-train BERT progressively: all stages of a recipe, in one job, resuming where it stands.

example (2 ranks on one machine):
  deepspeed --num_accelerators 2 launch/pretrain.py --recipe launch/recipes/demo.json \\
      --data DATA_DIR --run-dir RUN_DIR
"""

import argparse
import sys
from pathlib import Path

from stacking import Trainer, distributed
from stacking.config_loading import load_recipe
from stacking.deepspeed_config import load_deepspeed_config
from stacking.errors import UserError, is_users
from stacking.stopping import StopLimits, parse_duration
from stacking.trainer import Outcome


def parse_arguments() -> argparse.Namespace:
    """The command line; DeepSpeed's launcher adds --local_rank."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--recipe", type=Path, required=True, help="what is trained: launch/recipes/*.json")
    add("--data", type=Path, required=True, help="folder made by prepare_data.py, or NVIDIA shards")
    add("--run-dir", type=Path, required=True, help="where the run is written; never overwritten")
    add("--deepspeed_config", type=Path, default=None,
        help="how it runs: deepspeed_configs/*.json (default: fp16_fused_adam)")  # fmt: skip
    add("--set", action="append", default=[], metavar="KEY=VALUE",
        help="change one recipe value, such as learning_rate.peak=1e-3; repeatable")  # fmt: skip
    add("--resume", default="auto", metavar="auto|never|TAG",
        help="continue a run (default), insist on a new one, or continue a tag")  # fmt: skip
    add(
        "--time-limit",
        default=None,
        metavar="2h",
        help="stop after this time, committed and resumable, with exit code 3 (2h, 90m, 1d12h)",
    )
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
    trainer = None
    try:
        trainer = Trainer(
            load_recipe(arguments.recipe, arguments.set),
            load_deepspeed_config(arguments.deepspeed_config),
            data_dir=arguments.data,
            run_dir=arguments.run_dir,
            resume=arguments.resume,
            strict_precision=arguments.strict_precision,
            limits=StopLimits(
                None if arguments.time_limit is None else parse_duration(arguments.time_limit),
                arguments.max_steps,
            ),
            hang_timeout=parse_duration(arguments.hang_timeout, "--hang-timeout"),
        )
        outcome = trainer.fit()
    except (UserError, OSError) as error:
        if not is_users(error):
            raise
        # One of all ranks is told once, one of a rank by it; before they meet, once a host.
        is_shared = getattr(error, "is_everybodys", False)
        is_hosts = distributed.local_rank() == 0
        if distributed.is_main() or (is_hosts if trainer is None else not is_shared):
            print(f"error: {error}", file=sys.stderr)
        return 2
    return 0 if outcome is Outcome.DONE else 3


if __name__ == "__main__":
    sys.exit(main())
