"""Memory of a process that trains on a CPU: huge pages on request, and kept for the next step."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest
from launching import environment

MODE = Path("/sys/kernel/mm/transparent_hugepage/enabled")
CHILD = """
from stacking import engine
engine.start()
import torch
held = torch.zeros(1 << 26)
text = open("/proc/self/smaps_rollup").read()
print(next(line.split()[1] for line in text.splitlines() if line.startswith("AnonHugePages")))
"""


FAULTS = """
from stacking import distributed, engine
engine.start()
import resource, torch
def fill(size=1 << 25):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(size)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
fill(5 << 23)  # leaves room for smaller ones, wherever it lay
kept = fill()
distributed.release_memory()
print(kept, fill())
"""

TOP = """
from stacking import engine
engine.start()
import ctypes
c = ctypes.CDLL(None)
c.malloc.restype = c.sbrk.restype = ctypes.c_void_p
c.malloc.argtypes = c.sbrk.argtypes = c.free.argtypes = [ctypes.c_size_t]
c.malloc_trim(0)
begin = c.sbrk(0)
c.free(c.malloc(3 << 30))  # nobody touches it
print(c.sbrk(0) - begin)
"""


def said_by(program: str, **variables: str) -> list[int]:
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment() | variables, text=True, timeout=120,
        capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [int(word) for word in done.stdout.splitlines()[-1].split()]


@pytest.mark.skipif(
    not MODE.exists() or "[madvise]" not in MODE.read_text(),
    reason="needs Linux's transparent huge pages in mode madvise",
)
def test_tensors_lie_in_huge_pages_unless_the_environment_says_no() -> None:
    tensor = (1 << 26) * 4 // 1024
    assert said_by(CHILD)[0] > tensor // 2
    assert said_by(CHILD, THP_MEM_ALLOC_ENABLE="0")[0] < tensor // 2


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_is_kept_until_it_is_released() -> None:
    small_pages = {"THP_MEM_ALLOC_ENABLE": "0"}
    pages = (1 << 25) * 4 // 4096
    kept, released = said_by(FAULTS, **small_pages)
    assert kept < pages // 10
    assert released > pages // 2
    for name, value in (
        ("MALLOC_MMAP_THRESHOLD_", "131072"),
        ("GLIBC_TUNABLES", "glibc.malloc.mmap_threshold=131072"),
    ):
        kept, _ = said_by(FAULTS, **small_pages, **{name: value})
        assert kept > pages // 2, "the user's choice"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_no_size_is_too_large_to_be_kept() -> None:
    assert said_by(TOP)[0] > 2**31
