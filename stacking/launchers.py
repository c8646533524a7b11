"""What a cluster's launcher tells a process of its place, in the variables that torch reads.

Pure functions of the environment. A task of Slurm's srun is told all that torch needs; a rank of
MPI's mpirun only its number, and mpi4py finds the rest.
"""

import re
from collections.abc import Mapping

# By torch and DeepSpeed, Open MPI, MPICH and Intel, Slurm: the first that is there counts, as
# mpirun within a job of Slurm inherits what srun told its helpers.
RANK = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID")
WORLD_SIZE = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")
LOCAL_RANK = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID")
LOCAL_SIZE = (
    "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS",
)  # fmt: skip
_FIRST_PORT, _PORTS = 15000, 10000  # below those that systems give out by themselves


def number(variables: Mapping[str, str], names: tuple[str, ...], otherwise: int) -> int:
    """Of the first of `names` that is there."""
    return int(next((variables[name] for name in names if name in variables), otherwise))


def is_mpis(variables: Mapping[str, str]) -> bool:
    """Whether mpirun started this process, and nobody told torch its rank.

    In a job of Slurm mpirun's helpers are tasks of srun. `srun --mpi=pmi2` numbers its tasks as
    MPICH does its ranks: as many ranks as tasks are the tasks.
    """
    tasks = variables.get("SLURM_STEP_NUM_TASKS")
    is_pmis = "PMI_RANK" in variables and variables.get("PMI_SIZE") != tasks
    return "RANK" not in variables and ("OMPI_COMM_WORLD_RANK" in variables or is_pmis)


def from_srun(variables: Mapping[str, str]) -> dict[str, str]:
    """Torch's variables of one of several tasks of srun; none for any other process.

    A job script is no task, though it has a SLURM_PROCID. The ranks meet on the step's first node,
    where rank 0 is, on a port that goes by the job's number; MASTER_ADDR and MASTER_PORT say
    otherwise.
    """
    is_alone = variables.get("SLURM_STEP_NUM_TASKS", "1") == "1"
    if "RANK" in variables or is_mpis(variables) or is_alone:
        return {}
    port = _FIRST_PORT + int(variables["SLURM_JOB_ID"]) % _PORTS
    return {
        "RANK": variables["SLURM_PROCID"],
        "WORLD_SIZE": variables["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": variables["SLURM_LOCALID"],
        "LOCAL_SIZE": str(len(variables["SLURM_GTIDS"].split(","))),  # of the tasks on this node
        "MASTER_ADDR": variables.get("MASTER_ADDR", first_node(variables["SLURM_STEP_NODELIST"])),
        "MASTER_PORT": variables.get("MASTER_PORT", str(port)),
    }


def first_node(nodes: str) -> str:
    """Of a list as Slurm writes it: "rack[02-04,7]n[1-3],login" -> "rack02n1"."""
    return re.sub(r"\[(\w+)[^]]*\]", r"\1", nodes).split(",")[0]
