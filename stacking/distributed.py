"""Who this process is: rank, world, barriers and agreement. The only reader of the environment."""

import os
import socket

import torch
from torch import distributed

# What a launcher leaves behind when it has told this process its rank.
_RANK_VARIABLES = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID")


def prepare_environment() -> None:
    """Make `python launch/pretrain.py` without a launcher a world of one rank.

    Must run before DeepSpeed initialises: it would otherwise look for MPI, which need not exist.
    """
    if any(name in os.environ for name in _RANK_VARIABLES):
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(
        RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_SIZE="1",
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip


def limit_cpu_threads() -> None:
    """Share the cores among this host's ranks unless OMP_NUM_THREADS says otherwise.

    Two processes that each spin on all cores slow each other several times.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(max(1, (cores or 1) // local_world_size()))


def rank() -> int:
    """This process's rank, 0-based; from the launcher before the group exists."""
    if distributed.is_initialized():
        return distributed.get_rank()
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of ranks."""
    if distributed.is_initialized():
        return distributed.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """This process's rank on its host: which of the host's devices is its own."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    """Number of ranks on this host."""
    return int(os.environ.get("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1")))


def is_main() -> bool:
    """Whether this rank writes files and talks to the user."""
    return rank() == 0


def barrier() -> None:
    """Wait for all ranks."""
    if distributed.is_initialized():
        distributed.barrier()


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Sum `values` over all ranks, in place; no host synchronisation on a GPU."""
    if distributed.is_initialized():
        distributed.all_reduce(values)
    return values


def all_ranks_agree(claim: bool, device: torch.device) -> bool:
    """Whether the claim holds on every rank; the answer is the same everywhere."""
    holds = torch.tensor([1 if claim else 0], device=device)
    if distributed.is_initialized():
        distributed.all_reduce(holds, op=distributed.ReduceOp.MIN)
    return bool(holds.item())


def shut_down() -> None:
    """Destroy the process group: gloo jobs abort at random at exit without it."""
    if distributed.is_initialized():
        distributed.destroy_process_group()
