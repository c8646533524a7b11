"""Who this process is: rank, world, barriers and agreement. The only reader of the environment."""

import ctypes
import importlib
import os
import re
import socket
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar, cast

import torch
from torch import distributed

from stacking import launchers
from stacking.errors import UserError, everybodys, is_users

_Result = TypeVar("_Result")

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # glibc's malloc.h

_PORT = 29500  # on which the ranks meet; torch's default
_MPI_FIX = (
    "start them by the mpirun for which mpi4py was built, or build it for this one "
    "(MPICC=mpicc.mpich pip install --force-reinstall --no-cache-dir --no-binary mpi4py mpi4py)"
)


def prepare_memory() -> None:
    """Let torch ask for huge pages, unless the environment says otherwise.

    Torch reads this when it allocates its first tensor: call it before.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def keep_freed_memory() -> None:
    """Let glibc keep what is freed, unless the environment has an opinion: for training on a CPU.

    A step allocates and frees large tensors all the time. The system gives and takes them page by
    page, which takes longer than the arithmetic (docs/performance.md). See `release_memory`.
    """
    is_chosen = (
        any(name.startswith("MALLOC_") for name in os.environ)
        or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
        or "LD_PRELOAD" in os.environ
    )
    c_library = ctypes.CDLL(None)
    if hasattr(c_library, "gnu_get_libc_version") and not is_chosen:
        c_library.mallopt(_M_MMAP_MAX, 0)
        c_library.mallopt(_M_TRIM_THRESHOLD, -1)  # at no size


def release_memory() -> None:
    """Give the system back what the process has freed."""
    c_library = ctypes.CDLL(None)
    if hasattr(c_library, "malloc_trim"):
        c_library.malloc_trim(0)


def prepare_environment() -> None:
    """Make srun's tasks the ranks, and a process without a launcher a world of one rank.

    Must run before DeepSpeed initialises: it would otherwise look for MPI, which need not exist.
    """
    os.environ.update(launchers.from_srun(os.environ))
    if "RANK" in os.environ or launchers.is_mpis(os.environ):
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(
        RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_SIZE="1",
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip


def require_its_mpi() -> None:
    """Initialise MPI, where mpirun started this process: mpi4py must see all ranks of it.

    One that was built for another MPI sees a world of one rank; as many jobs would train at once
    into one folder. UserError on all ranks.
    """
    if not launchers.is_mpis(os.environ):
        return
    started = f"mpirun started {world_size()} ranks, which find each other by mpi4py"
    # A rank that Open MPI's own mpirun did not start is alone; it would fork a daemon of its own,
    # and those of several ranks trip over each other now and then (MPI_INIT fails).
    os.environ.setdefault("OMPI_MCA_ess_singleton_isolated", "1")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # mpi4py's own guess, once a rank
            mpi = importlib.import_module("mpi4py.MPI")
    except (ImportError, RuntimeError) as error:
        raise everybodys(UserError(f"{started}: {error}; {_MPI_FIX}")) from error
    found = mpi.COMM_WORLD.Get_size()
    if found != world_size():
        library = re.split("[,\n]", mpi.Get_library_version())[0].replace("\t", " ")
        wrong = f"but it sees {found}, as it was built for another MPI ({library})"
        raise everybodys(UserError(f"{started}, {wrong}; {_MPI_FIX}"))


@contextmanager
def meeting_of_ranks(after: float = 60.0) -> Iterator[None]:
    """Say, once a host, that the ranks have not all met in the block after so many seconds.

    UserError where torch says that they cannot meet: nothing has begun, and it is no bug.
    """

    def address() -> str:
        return f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"

    def tell() -> None:
        print(
            f"rank {rank()} has waited for {after:.0f} s for all {world_size()} ranks to meet at "
            f"{address()}; has one of them ended, or does a firewall keep them apart?",
            file=sys.stderr, flush=True,
        )  # fmt: skip

    timer = threading.Timer(after, tell)
    timer.daemon = True
    if local_rank() == 0 and world_size() > 1:
        timer.start()
    try:
        yield
    except RuntimeError as error:
        said = str(error).partition("\n")[0]
        raise UserError(
            f"rank {rank()} could not meet the others at {address()}: {said}\n"
            "docs/cluster.md lists what such messages mean; launch/doctor.py looks for the causes"
        ) from error
    finally:
        timer.cancel()


def share_cores(processes: int) -> None:
    """Give processes that are started from here equal shares of the cores, unless OMP_NUM_THREADS
    is set.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, _cores() // processes)))


def take_device(number: int) -> None:
    """Make the GPU of this number, counted round, the only one that this process sees.

    Before CUDA is first used; without a GPU nothing happens.
    """
    asked = os.environ.get("CUDA_VISIBLE_DEVICES")
    known = range(torch.cuda.device_count()) if asked is None else asked.split(",")
    devices = [str(device) for device in known if str(device)]
    if devices:
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[number % len(devices)]


def limit_cpu_threads() -> None:
    """Share the cores among this host's ranks unless OMP_NUM_THREADS says otherwise.

    Two processes that each spin on all cores slow each other several times.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, _cores() // local_world_size()))


def _cores() -> int:
    """That this process may use."""
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return found or 1


def environment() -> dict[str, str]:
    """A copy of all variables, for what is started from here."""
    return dict(os.environ)


def rank() -> int:
    """This process's rank, 0-based; from the launcher before the group exists."""
    if distributed.is_initialized():
        return distributed.get_rank()
    return launchers.number(os.environ, launchers.RANK, 0)


def world_size() -> int:
    """Number of ranks."""
    if distributed.is_initialized():
        return distributed.get_world_size()
    return launchers.number(os.environ, launchers.WORLD_SIZE, 1)


def local_rank() -> int:
    """This process's rank on its host: which of the host's devices is its own."""
    return launchers.number(os.environ, launchers.LOCAL_RANK, 0)


def local_world_size() -> int:
    """Number of ranks on this host."""
    return launchers.number(os.environ, launchers.LOCAL_SIZE, 1)


def has_terminal_of_mpi() -> bool:
    """Whether a terminal may be one that Open MPI gives its ranks, wherever their output goes."""
    return "OMPI_COMM_WORLD_RANK" in os.environ


def is_main() -> bool:
    """Whether this rank writes files and talks to the user."""
    return rank() == 0


def tells(error: Exception, *, have_met: bool) -> bool:
    """Whether this rank tells the user of a mistake.

    One that all ranks share is told once, one of a rank by it; before they meet, once a host.
    """
    is_shared = getattr(error, "is_everybodys", False)
    return is_main() or (not is_shared if have_met else local_rank() == 0)


def barrier() -> None:
    """Wait for all ranks."""
    if distributed.is_initialized():
        distributed.barrier()


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Sum `values` over all ranks, in place; no host synchronisation on a GPU."""
    if distributed.is_initialized():
        distributed.all_reduce(values)
    return values


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A small CPU tensor on `device`; the host does not wait for the copy."""
    source = tensor.pin_memory() if device.type == "cuda" else tensor
    return source.to(device, non_blocking=True)


def all_ranks_agree(claim: bool, device: torch.device) -> bool:
    """Whether the claim holds on every rank; the answer is the same everywhere."""
    holds = torch.tensor([1 if claim else 0], device=device)
    if distributed.is_initialized():
        distributed.all_reduce(holds, op=distributed.ReduceOp.MIN)
    return bool(holds.item())


def together(step: Callable[[], _Result]) -> _Result:
    """Do `step` on every rank; if a user's mistake shows on any, raise it on all of them.

    A fault that only one host sees, such as a missing mount, is named with it. Collective.
    """
    result, fault = None, ""
    try:
        result = step()
    except (UserError, OSError) as error:
        if not is_users(error):
            raise
        fault = str(error)
    faults = gather_objects(fault)
    seen = list(dict.fromkeys(text for text in faults if text))
    if not seen:
        return cast(_Result, result)
    if len(seen) == 1 and all(faults):
        raise everybodys(UserError(seen[0]))
    names = gather_objects(rank_name())
    told = "\n".join(f"on {names[rank]}: {text}" for rank, text in enumerate(faults) if text)
    raise everybodys(UserError(told))


def on_main(step: Callable[[], _Result]) -> _Result:
    """Do `step` on the main rank alone; its result, or its fault, is everybody's. Collective."""
    found: list[_Result | str | None] = [None, ""]
    if is_main():
        try:
            found[0] = step()
        except (UserError, OSError) as error:
            if not is_users(error):
                raise
            found[1] = str(error)
    if distributed.is_initialized():
        distributed.broadcast_object_list(found, src=0)
    if found[1]:
        raise everybodys(UserError(str(found[1])))
    return cast(_Result, found[0])


def only_on_main(step: Callable[[], _Result]) -> _Result | None:
    """Do `step` on the main rank alone, which keeps the result; a fault is everybody's. Collective.

    Others get None. Nothing of the result is sent, however large it is.
    """
    kept: list[_Result] = []

    def keep() -> None:
        kept.append(step())

    on_main(keep)
    return kept[0] if kept else None


def from_main(tensor: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    """The main rank's `tensor` on every rank, with the shape, type and device of `like`.

    Other ranks may give None. The device must be of the kind that the process group works on.
    Collective.
    """
    received = torch.empty_like(like) if tensor is None else tensor.to(like, copy=True)
    if distributed.is_initialized():
        distributed.broadcast(received, src=0)
    return received


def gather_objects(value: _Result) -> list[_Result]:
    """Every rank's small `value`, by rank, everywhere. Collective."""
    found: list[_Result] = [value] * world_size()
    if distributed.is_initialized():
        distributed.all_gather_object(found, value)
    return found


def gather_on_main(value: _Result) -> list[_Result] | None:
    """Every rank's `value`, by rank, on the main rank; None elsewhere. Collective."""
    found: list[_Result] | None = [value] * world_size() if is_main() else None
    if distributed.is_initialized():
        distributed.gather_object(value, found, dst=0)
    return found


def gather_tensors(tensor: torch.Tensor, received: list[torch.Tensor]) -> None:
    """Every rank's `tensor` into the main rank's `received`, by rank; empty elsewhere. Collective.

    All have one shape, and a device of the kind that the process group works on.
    """
    if distributed.is_initialized():
        distributed.gather(tensor, received if is_main() else None, dst=0)
    else:
        received[0].copy_(tensor)


def has_group() -> bool:
    """Whether the ranks have met."""
    return distributed.is_initialized()


def shut_down() -> None:
    """Destroy the process group: gloo jobs abort at random at exit without it."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


def master_address() -> str:
    """The host on which all ranks meet, as the launcher named it; "" where it named none."""
    return os.environ.get("MASTER_ADDR", "")


def master_port() -> int:
    """The port on which all ranks meet; MPI, which names none, leaves it to MASTER_PORT."""
    return int(os.environ.get("MASTER_PORT", _PORT))


def rank_name() -> str:
    """This process for a message: "rank 3 (host node7, pid 4242)"."""
    return f"rank {rank()} (host {socket.gethostname()}, pid {os.getpid()})"
