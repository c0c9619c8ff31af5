"""Whether draws follow a stated distribution."""

import torch


def p_value(counts, expected, draws):
    """Of Pearson's chi-square test; cells expected fewer than five times are pooled.

    Args:
        counts: A `Counter` of what was drawn.
        expected: The probability of everything that may be drawn.
        draws: How many there were. 0 is returned if something else was drawn.
    """
    rare = {place for place, p in expected.items() if p * draws < 5}
    cells = [(counts[place], p * draws) for place, p in expected.items() if place not in rare]
    if rare:
        cells.append((sum(counts[p] for p in rare), sum(expected[p] for p in rare) * draws))
    if sum(count for count, _ in cells) < draws:
        return 0.0
    if len(cells) == 1:
        return 1.0
    statistic = sum((count - mean) ** 2 / mean for count, mean in cells)
    half = torch.tensor([(len(cells) - 1) / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(*half))
