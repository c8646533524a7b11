"""The run folder: whether all hosts see one folder, and whether its checkpoints will fit."""

import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from stacking.branches import branch_runs
from stacking.config import Recipe
from stacking.cost import checkpoint_bytes
from stacking.doctor_findings import Finding, counted, fail, ok, warn
from stacking.doctor_hosts import Facts, RunDir
from stacking.schedule import stage_start

_SPARE = 1.1  # of the checkpoints' bytes: metrics, logs, a report
_MIB, _GIB = 2**20, 2**30


@contextmanager
def nonce_in(run_dir: Path | None) -> Iterator[tuple[Path | None, str]]:
    """A file of a new name in the run folder, or the nearest folder above that is there.

    Gives its path, and why there is none. It is gone afterwards.
    """
    if run_dir is None:
        yield None, ""
        return
    folder = run_dir
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    nonce = folder / f".doctor-{secrets.token_hex(8)}"
    try:
        nonce.write_text(nonce.name)
        complaint = ""
    except OSError as error:
        complaint = str(error)
    try:
        yield (None if complaint else nonce), complaint
    finally:
        with suppress(OSError):  # a full disk has an empty file of it; others have none
            nonce.unlink()


def shared_findings(
    run_dir: Path, nonce: Path | None, complaint: str, hosts: Mapping[str, Facts]
) -> list[Finding]:
    """Whether what is written here is seen on every host, and the first may write."""
    told = {host: facts.run_dir for host, facts in hosts.items() if facts.run_dir}
    found = []
    if nonce is None:
        found.append(fail("run-dir", f"{run_dir}: cannot be written from here: {complaint}",
                          "make it writable, free some space, or give another folder"))  # fmt: skip
    first = next(iter(hosts), "")
    for host, seen in told.items():
        if nonce is not None and not seen.sees_nonce:
            found.append(
                fail("run-dir", f"a file that this machine wrote to {nonce.parent} is not there",
                     "mount the same folder on every host: a run goes on from its checkpoints, "
                     "whichever host is first then", host)
            )  # fmt: skip
        if host == first and not seen.is_writable:
            found.append(fail("run-dir", f"{run_dir}: rank 0 may not write there",
                              "make it writable for your user on that host", host))  # fmt: skip
    if found or not told:
        return found
    if len(hosts) > 1:
        return [ok("run-dir", f"{run_dir}: shared by {counted(len(told), 'host')}")]
    return [ok("run-dir", f"{run_dir}: can be written")]


def disk_findings(run_dir: Path, recipe: Recipe, host: str, seen: RunDir) -> list[Finding]:
    """Free space against the checkpoints that the recipe will leave; rank 0 writes on `host`."""
    planned = planned_bytes(recipe)
    needed = max(0, planned - seen.held_bytes)
    held = f" beside {_size(seen.held_bytes)} there" if seen.held_bytes else ""
    found = f"{_size(seen.free_bytes)} free, the checkpoints need at most {_size(needed)}{held}"
    fix = (
        "free some space, give a folder on a larger disk, or lower checkpoint.keep_last "
        f"(now {recipe.checkpoint.keep_last})"
    )
    if seen.free_bytes < needed:
        return [fail("disk", found, fix, host)]
    if seen.free_bytes < needed * _SPARE:
        return [warn("disk", found, fix, host)]
    return [ok("disk", found, host)]


def planned_bytes(recipe: Recipe) -> int:
    """At most so much of checkpoints at a time, in all stages and branches."""
    return _kept_bytes(recipe, 0) + _largest(recipe)  # one more while it is written


def _kept_bytes(recipe: Recipe, since: int) -> int:
    """Tags that stay, made after step `since`: stage ends and begins, periodic, branches."""
    total = periodic = 0
    for index, stage in enumerate(recipe.stages):
        start = stage_start(index, recipe.stages)
        size = checkpoint_bytes(recipe.stage_model(index), stage.freeze)
        end = start + stage.steps
        total += size if end > since else 0
        total += size if index and start >= since else 0
        saves = max(0, (end - 1) // recipe.checkpoint.every_steps)
        if end > since:
            periodic = max(periodic, size * min(recipe.checkpoint.keep_last, saves))
    total += periodic
    for run in branch_runs(recipe):
        total += _largest(recipe) if run.at else 0  # the tag that it leaves from
        total += _kept_bytes(run.recipe, run.at)
    return total


def _largest(recipe: Recipe) -> int:
    return max(
        checkpoint_bytes(recipe.stage_model(index), stage.freeze)
        for index, stage in enumerate(recipe.stages)
    )


def _size(number: int) -> str:
    return f"{number / _GIB:,.1f} GiB" if number >= _GIB else f"{number / _MIB:,.1f} MiB"
