"""A budget shared out: one size for each of many, so that they cost least and together take no more than there is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def share_out(costs: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], budget: int) -> list[int]:
    """For each row the column taken, so that the sum of their costs is least and that of their sizes is in the budget.

    Exact, by dynamic programming over what is used of the budget: of two ways to fill the first rows, the one that uses
    more and costs as much is forgotten. Of equal sums the one that uses least is taken.

    Args:
        costs: of every row (a layer, say) what each of its columns costs.
        sizes: the same of what they take, at least 0.
        budget: at least the sum of the rows' smallest sizes.
    """
    ways: list[tuple[int, float, Any]] = [(0, 0.0, None)]  # used, cost, and (column, the columns before it)
    for row, taken in zip(costs, sizes):
        longer = [
            (used + size, cost + row[column], (column, chain))
            for used, cost, chain in ways
            for column, size in enumerate(taken)
            if used + size <= budget
        ]
        longer.sort(key=lambda way: way[:2])
        ways = []
        for way in longer:
            if not ways or way[1] < ways[-1][1]:
                ways.append(way)
    chosen: list[int] = []
    chain = min(ways, key=lambda way: way[1])[2]
    while chain is not None:
        column, chain = chain
        chosen.append(column)
    return chosen[::-1]
