"""srun where there is no Slurm: the job's tasks on this machine, with the variables they get.

Its exit code is srun's: the largest of the tasks', 128 and the signal for one that was killed.
"""

import os
import subprocess
import sys
from itertools import dropwhile


def variables(task: int, tasks: int) -> dict[str, str]:
    """What srun tells a task of a step on one node."""
    return {
        "SLURM_PROCID": str(task),
        "SLURM_LOCALID": str(task),
        "SLURM_NODEID": "0",
        "SLURM_NTASKS": str(tasks),
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": str(tasks),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_STEP_TASKS_PER_NODE": str(tasks),
        "SLURM_GTIDS": ",".join(map(str, range(tasks))),
    }


if __name__ == "__main__":
    command = list(dropwhile(lambda word: word.startswith("--"), sys.argv[1:]))
    tasks = int(os.environ["SLURM_NTASKS"])
    started = [
        subprocess.Popen(command, env={**os.environ, **variables(task, tasks)})
        for task in range(tasks)
    ]
    codes = [process.wait() for process in started]
    sys.exit(max(128 - code if code < 0 else code for code in codes))
