"""Ranks of importance-guided LoRA (CFSP, arXiv 2409.13199): important blocks get more capacity."""

from __future__ import annotations

from collections.abc import Sequence

from cfsp.errors import InputError


def importance_ranks(importance: Sequence[float], mean_rank: int) -> tuple[int, ...]:
    """Integer ranks r_l proportional to importances I_l, with exactly the given mean and none below 1.

        r_l ~ L * mean_rank * I_l / sum(I),    sum(r) = L * mean_rank

    Blocks whose quota is below one get one, the others share the rest in proportion; fractions are rounded by
    largest remainder, ties to the earlier block.

    Args:
        importance: I_l of every block, not negative.
        mean_rank: 1 or more.

    Raises:
        InputError: No blocks, a negative or non-finite importance, or a mean rank below one.
    """
    if mean_rank < 1:
        raise InputError("out of range", field="rank", value=mean_rank, allowed="1 or more")
    if not importance or not all(0 <= value < float("inf") for value in importance):
        raise InputError(
            "importances must be finite and not negative", field="importance", value=tuple(importance)
        )
    count, total = len(importance), len(importance) * mean_rank
    weights = list(importance) if sum(importance) > 0 else [1.0] * count
    floored: set[int] = set()
    while True:
        free = [i for i in range(count) if i not in floored]
        left, weight = total - len(floored), sum(weights[i] for i in free)
        quotas = {i: left * weights[i] / weight for i in free}
        below = {i for i, quota in quotas.items() if quota < 1}
        if not below:
            break
        floored |= below
    ranks = [1 if i in floored else int(quotas[i]) for i in range(count)]
    by_remainder = sorted(quotas, key=lambda i: (-(quotas[i] - int(quotas[i])), i))
    for i in by_remainder[: total - sum(ranks)]:
        ranks[i] += 1
    return tuple(ranks)
