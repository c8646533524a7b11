"""What a seed does to every recipe alike: it draws evaluation masks and orders the samples."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

LEAST_FREEDOM = 2.0  # degrees that must be left: with 1 an interval of Student's t is 25 deviations


def seed_effects(
    samples: Sequence[Sequence[tuple[int, float]]], families: Sequence[int]
) -> dict[int, float]:
    """By seed, what it adds to a loss, whatever the recipe; all together 0 [nats].

    Least squares of loss = recipe + seed + rest, over recipes of several seeds; those of one family
    weigh together as one. Empty where the runs cannot tell: seeds that no chain of recipes links,
    or so few recipes that too little would be left to know the rest by.

    Args:
        samples: (seed, loss) of each recipe's runs.
        families: A number for each recipe, the same for those of one trunk.
    """
    used = [(sample, family) for sample, family in zip(samples, families, strict=True)
            if len({seed for seed, _ in sample}) > 1]  # fmt: skip
    seeds = sorted({seed for sample, _ in used for seed, _ in sample})
    members = Counter(family for _, family in used)
    freedom = sum((len(sample) - 1) / members[family] for sample, family in used)
    if freedom - (len(seeds) - 1) < LEAST_FREEDOM:
        return {}
    rows, losses, weights = [], [], []
    for recipe, (sample, family) in enumerate(used):
        for seed, loss in sample:
            row = np.zeros(len(used) + len(seeds))
            row[[recipe, len(used) + seeds.index(seed)]] = 1.0
            rows.append(row)
            losses.append(loss)
            weights.append(members[family] ** -0.5)
    design, scale = np.array(rows), np.array(weights)
    if np.linalg.matrix_rank(design) < design.shape[1] - 1:
        return {}
    solution = np.linalg.lstsq(design * scale[:, None], np.array(losses) * scale, rcond=None)[0]
    effects = solution[len(used) :]
    return dict(zip(seeds, (effects - effects.mean()).tolist(), strict=True))
