"""What must be the same on every rank is compared before anything is built on it."""

from collections.abc import Mapping, Sequence

from stacking.distributed import gather_objects, rank_name
from stacking.errors import UserError, everybodys

_NAMED = 4  # ranks of a dissenting group that are named with host and pid


SAME_FILES = "give all hosts the same files and packages"


def require_equal(values: Mapping[str, str], advice: str = SAME_FILES) -> None:
    """Refuse to go on where ranks hold different values. Collective: all give the same keys.

    Args:
        values: what -> a short text of it, such as {"the recipe": digest[:12]}.
        advice: what to do where they differ.

    Raises:
        UserError: on all ranks the same, naming each thing that differs, its values and the ranks
            that hold them: one host has another checkout, environment or data folder.
    """
    names = gather_objects(rank_name())
    faults = []
    for what, value in values.items():
        found = gather_objects(value)
        if len(set(found)) > 1:
            faults.append(f"{what}: {_groups(found, names)}")
    if faults:
        raise everybodys(UserError(f"the ranks do not agree; {advice}: {'; '.join(faults)}"))


def _groups(found: Sequence[str], names: Sequence[str]) -> str:
    """ "rank 2 (host b, pid 7) has 12ab, ranks 0, 1 and 3 have 77cd": the few first, named."""
    holders: dict[str, list[int]] = {}
    for rank, value in enumerate(found):
        holders.setdefault(value, []).append(rank)
    groups = sorted(holders.items(), key=lambda group: len(group[1]))
    told = []
    for place, (value, ranks) in enumerate(groups):
        is_last_and_larger = place == len(groups) - 1 and len(ranks) > len(groups[0][1])
        if len(ranks) <= _NAMED and not is_last_and_larger:
            who = listed([names[rank] for rank in ranks])
        else:
            who = ("ranks " if len(ranks) > 1 else "rank ") + listed(stretches(ranks))
        told.append(f"{who} {'has' if len(ranks) == 1 else 'have'} {value or 'nothing'}")
    return ", ".join(told)


def listed(words: Sequence[str]) -> str:
    """ "a, b and c"."""
    return " and ".join(part for part in (", ".join(words[:-1]), words[-1]) if part)


def stretches(ranks: Sequence[int]) -> list[str]:
    """Ascending numbers with long stretches shortened: ["0-6", "8"]; two neighbours stay two."""
    found: list[list[int]] = []
    for rank in ranks:
        if found and rank == found[-1][-1] + 1:
            found[-1].append(rank)
        else:
            found.append([rank])
    texts = []
    for run in found:
        texts += [f"{run[0]}-{run[-1]}"] if len(run) > 2 else [str(rank) for rank in run]
    return texts
