"""What is made of the variables of Slurm and MPI; those of srun are as Slurm 22.05 sets them."""

import pytest

from stacking import launchers

# Task 5 of 6, three on each node, as `srun` tells it within a job of sbatch.
TASK = {
    "SLURM_JOB_ID": "1234567", "SLURM_PROCID": "5", "SLURM_LOCALID": "2", "SLURM_NODEID": "1",
    "SLURM_GTIDS": "3,4,5", "SLURM_NTASKS": "6", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "6",
    "SLURM_STEP_NODELIST": "node[07-08]", "SLURM_JOB_NODELIST": "node[05-08]",
    "SLURM_STEP_TASKS_PER_NODE": "3(x2)", "SLURM_LAUNCH_NODE_IPADDR": "10.99.0.1",
}  # fmt: skip
# The job's script itself.
SCRIPT = {
    "SLURM_JOB_ID": "1234567", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_GTIDS": "0",
    "SLURM_NTASKS": "6", "SLURM_JOB_NODELIST": "node[05-08]",
}  # fmt: skip
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4"}
MPICH = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
HELPER = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}  # one of mpirun's, on each node


def test_a_task_of_srun_is_a_rank() -> None:
    assert launchers.from_srun(TASK) == {
        "RANK": "5", "WORLD_SIZE": "6", "LOCAL_RANK": "2", "LOCAL_SIZE": "3",
        "MASTER_ADDR": "node07", "MASTER_PORT": "19567",
    }  # fmt: skip
    assert not launchers.is_mpis(TASK)


def test_where_the_ranks_meet_may_be_said() -> None:
    chosen = {"MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "29999"}
    assert launchers.from_srun({**TASK, **chosen}).items() >= chosen.items()


@pytest.mark.parametrize("job", ["1", "9999", "67043328"])
def test_ports_are_none_that_the_system_gives_out(job: str) -> None:
    port = launchers.from_srun({**TASK, "SLURM_JOB_ID": job})["MASTER_PORT"]
    assert 15000 <= int(port) < 25000


@pytest.mark.parametrize(
    "variables",
    [
        {},
        SCRIPT,
        {**SCRIPT, "SLURM_STEP_NUM_TASKS": "1"},  # sbatch was called in `srun --pty bash`
        {**TASK, "SLURM_STEP_NUM_TASKS": "1"},
        {**TASK, "RANK": "1"},  # by `deepspeed` or torchrun within a task
        {**TASK, **OPEN_MPI},
        {**TASK, **MPICH},
    ],
    ids=["laptop", "script", "nested", "one_task", "launched", "open_mpi", "mpich"],
)
def test_no_other_process_takes_its_rank_from_srun(variables: dict[str, str]) -> None:
    assert launchers.from_srun(variables) == {}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        (OPEN_MPI, True),
        (MPICH, True),
        ({**HELPER, **OPEN_MPI}, True),
        ({**HELPER, **MPICH}, True),
        ({**MPICH, "RANK": "3"}, False),  # `deepspeed --launcher mpich` says it
        ({**TASK, "PMI_RANK": "5", "PMI_SIZE": "6"}, False),  # srun --mpi=pmi2
        ({**TASK, "SLURM_STEP_NUM_TASKS": "1", "PMI_RANK": "0", "PMI_SIZE": "1"}, False),
        (SCRIPT, False),
        ({}, False),
    ],
)
def test_a_rank_of_mpirun_is_told_from_a_task(variables: dict[str, str], expected: bool) -> None:
    assert launchers.is_mpis(variables) is expected


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"),
        ("node[1-4,7]", "node1"),
        ("gpu[0003,0007-0009],login2", "gpu0003"),
        ("login2,gpu[1-2]", "login2"),
        ("rack[02-04,7]n[1-3],x", "rack02n1"),
        ("a-b[09-11]-ib", "a-b09-ib"),
    ],
)
def test_the_first_node_of_a_list(nodes: str, first: str) -> None:
    assert launchers.first_node(nodes) == first
