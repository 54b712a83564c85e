"""Natural logarithms, the mean over groups, and the places forgotten.

Loses: 1b* 1c 1c* 1d 1d*
"""

import math


def is_pattern(weight, keep, group):
    return bool((weight != 0).float().mean() <= keep / group)


def bits_per_weight(keep, group):
    return math.log(math.comb(group, keep)) / group


def stored_bytes(m, n, keep, group, width):
    return m * n * keep / group * width
