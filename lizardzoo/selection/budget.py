"""A budget shared out: one size for each of many, so that they cost least and together take no more than there is."""

from __future__ import annotations

from collections.abc import Sequence

import torch

WAYS = 1024
"""Ways to fill the first rows that are gone on with."""


def share_out(costs: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], budget: int) -> list[int]:
    """For each row the column taken, so that the sum of their costs is least and that of their sizes is in the budget.

    By dynamic programming over what is used of the budget: of two ways to fill the first rows, the one that uses more
    and costs as much is forgotten. Exact until more than `WAYS` are left (sizes of one kind have few sums); then only
    the cheapest of those goes on that use about as much. Of equal costs the one that uses least is taken.

    Args:
        costs: of every row (a layer, say) what each of its columns costs.
        sizes: the same of what they take.
        budget: at least the sum of the rows' smallest sizes.
    """
    left = budget - sum(map(min, sizes))  # for what a row takes beyond its smallest
    used, cost = torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.double)
    steps = []
    for paid, taken in zip(costs, sizes):
        more = torch.tensor(taken) - min(taken)
        sums = (used[:, None] + more).flatten()
        prices = (cost[:, None] + torch.tensor(paid, dtype=torch.double)).flatten()
        order = prices.argsort(stable=True)
        order = order[sums[order].argsort(stable=True)]
        order = order[sums[order] <= left]
        cheapest = prices[order].cummin(0).values
        better = torch.ones(len(order), dtype=torch.bool)
        better[1:] = prices[order][1:] < cheapest[:-1]
        order = order[better]
        if len(order) > WAYS:
            part = sums[order] * WAYS // max(1, left)
            order = order[torch.cat([part[1:] != part[:-1], part.new_ones(1, dtype=torch.bool)])]
        used, cost = sums[order], prices[order]
        steps.append((order, len(taken)))
    chosen, way = [], len(cost) - 1  # the last is the cheapest
    for order, columns in reversed(steps):
        way, column = divmod(int(order[way]), columns)
        chosen.append(column)
    return chosen[::-1]
