"""What a recipe will cost and what growing can save, before anything runs: sizes, FLOPs, memory.

With --suggest: which stages to train in a budget, by short pilot runs, and why.

example:
  python launch/plan.py --recipe launch/recipes/stackingbert_base.json
  python launch/plan.py --recipe my.json --world-size 8 --nodes 1 8 --device a100
  python launch/plan.py --recipe my.json --suggest --budget 2h --pilot runs/pilot_* --out best.json
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

from rich.console import Console

from stacking.cluster_time import load_cluster
from stacking.commands import STARTS_ANEW, exit_code
from stacking.config_loading import JsonObject, load_recipe
from stacking.deepspeed_config import load_deepspeed_config
from stacking.stage_plan import plan_recipe
from stacking.stage_plan_advice import show_suggestion, suggestion_json
from stacking.stage_plan_cluster import cluster_json, plan_cluster, show_cluster_plan
from stacking.stage_plan_request import Request, answer, refuse_idle
from stacking.stage_plan_table import plan_json, show_plan

WIDTH = 100  # columns, where the output is no terminal
ABOUT = {"nodes": ("device", "gpus_per_node", "utilisation", "network_gbits"),
         "suggest": ("budget", "pilot", "measure", "tolerance", "out")}  # fmt: skip


def main() -> int:
    """0 done, 2 the user's mistake, 3 stopped by Ctrl-C."""
    arguments = parse_arguments()
    return exit_code(lambda: run(arguments), as_json=arguments.json, stopped=STARTS_ANEW)


def run(arguments: argparse.Namespace) -> int:
    """Plan and print; 0."""
    width = shutil.get_terminal_size((WIDTH, 50)).columns
    values = plan(arguments, Console(width=width, highlight=False, quiet=arguments.json))
    if arguments.json:
        print(json.dumps(values))
    return 0


def plan(given: argparse.Namespace, console: Console) -> JsonObject:
    """Load, check, compute and print; ConfigError lists every fault."""
    refuse_idle(vars(given), ABOUT)
    recipe = load_recipe(given.recipe, given.set)
    engine = load_deepspeed_config(given.deepspeed_config)
    cluster, pilots = ([getattr(given, name) for name in names] for names in ABOUT.values())
    if given.suggest:
        found = answer(recipe, engine, Request(*pilots), world_size=given.world_size)
        show_suggestion(found, console)
        return suggestion_json(found)
    result, times = plan_recipe(recipe, engine, world_size=given.world_size), None
    if given.nodes:
        times = plan_cluster(recipe, engine, load_cluster(*cluster), given.nodes)
    show_plan(result, console)
    if times:
        show_cluster_plan(times, console)
    return plan_json(result) | ({"cluster": cluster_json(times)} if times else {})


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="plan.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--recipe", type=Path, required=True, metavar="R.json", help="what would be trained")
    add("--set", action="append", default=[], metavar="KEY=VALUE",
        help="change one recipe value, such as stages.0.steps=500; repeatable")  # fmt: skip
    add("--deepspeed_config", type=Path, metavar="C.json", help="how it would run: ZeRO stage, "
        "precision and micro batch decide the memory (default: fp16_fused_adam)")  # fmt: skip
    add("--world-size", type=int, default=1, metavar="N", help="number of GPUs (default: 1)")
    add("--json", action="store_true", help="print the plan as one JSON line")
    cluster = parser.add_argument_group("time on a cluster, by a model of it").add_argument
    cluster("--nodes", type=int, nargs="+", metavar="N", help="predict the time on so many")
    cluster("--device", metavar="D", help="v100, a100 or h100 by its data sheet (default: h100), "
            "or measured numbers: a .json file of benchmarks/scaling.py")  # fmt: skip
    cluster("--gpus-per-node", type=int, metavar="N", help="assumed, as the others (default: 8)")
    cluster("--utilisation", type=float, metavar="U", help="share of the peak rate (default: 0.45)")
    cluster("--network-gbits", type=float, metavar="G", help="Gbit/s of a node (default: 400)")
    pilots = parser.add_argument_group("which stages to train, by pilot runs").add_argument
    pilots("--suggest", action="store_true", help="propose stages, or say why there are none")
    pilots("--budget", metavar="2h", help="time for steps and stage switches (2h, 90m, 1d12h)")
    pilots("--pilot", type=Path, nargs="+", metavar="RUN", help="short runs: scratch, small, grown")
    pilots("--measure", type=int, nargs="+", metavar="LAYERS", help="depths to time here, too")
    pilots("--tolerance", type=float, metavar="NATS", help="lag of a mixed model (default: 0.02)")
    pilots("--out", type=Path, metavar="NEW.json", help="write the proposed recipe here")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
