"""What would keep a job from running, before it is started: this machine, or all of a hostfile.

Hosts are asked by ssh, all at once: names, code, packages, data, devices, ports, the shared run
folder, free disk. Files and variables are checked as DeepSpeed's launcher reads them. It takes a
minute at most.

example:
  python launch/doctor.py --hostfile hostfile --recipe recipe.json --data data --run-dir runs/first
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

from rich.console import Console

from stacking.commands import STARTS_ANEW, exit_code
from stacking.doctor import DEFAULT_PORT, Request, examine
from stacking.doctor_table import examination_json, show_examination

WIDTH = 100  # columns, where the output is no terminal


def main() -> int:
    """0 nothing stands in the way, 2 something does, 3 stopped by Ctrl-C."""
    given = parse_arguments()
    return exit_code(lambda: run(given), as_json=given.json, stopped=STARTS_ANEW)


def run(given: argparse.Namespace) -> int:
    """Ask, and show what was found; 2 if something stands in the way."""
    seen = examine(
        Request(
            given.hostfile,
            given.recipe,
            tuple(given.set),
            given.deepspeed_config,
            given.data,
            given.run_dir,
            given.ssh_port,
            given.num_gpus,
            given.master_addr,
            given.master_port,
        )  # fmt: skip
    )
    if given.json:
        print(json.dumps(examination_json(seen)))
    else:
        width = shutil.get_terminal_size((WIDTH, 50)).columns
        show_examination(seen, Console(width=width, highlight=False))
    return 2 if seen.count("fail") else 0


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="doctor.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--hostfile", "-H", type=Path, metavar="FILE",
        help="lines HOST slots=N, as for the launcher")  # fmt: skip
    add("--recipe", type=Path, metavar="R.json", help="what would be trained")
    add("--set", action="append", default=[], metavar="KEY=VALUE",
        help="change one recipe value; repeatable")  # fmt: skip
    add("--deepspeed_config", type=Path, metavar="C.json",
        help="how it would run (default: fp16_fused_adam)")  # fmt: skip
    add("--data", type=Path, metavar="DIR", help="its data, compared on all hosts")
    add("--run-dir", type=Path, metavar="DIR", help="where the run would be written")
    add("--json", action="store_true", help="print all as one JSON line")
    launcher = parser.add_argument_group("as they would be given to the launcher").add_argument
    launcher("--num-gpus", "--num_gpus", "--num_accelerators", type=number, metavar="N",
             help="ranks on each host")  # fmt: skip
    launcher("--ssh-port", "--ssh_port", type=number, metavar="N",
             help="(default: the ssh config's)")  # fmt: skip
    launcher("--master-addr", "--master_addr", default="", metavar="IP",
             help="(default: the first host's first)")  # fmt: skip
    launcher("--master-port", "--master_port", type=number, default=DEFAULT_PORT, metavar="N",
             help="(default: %(default)s)")  # fmt: skip
    return parser.parse_args()


def number(text: str) -> int:
    """A port, or as many ranks; ArgumentTypeError otherwise."""
    if not (text.isdecimal() and len(text) <= 5 and 1 <= int(text) <= 65535):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to 65535")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
