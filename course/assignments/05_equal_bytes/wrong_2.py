"""Neither scales nor places of the entries are counted.

Loses: 5b 5b* 5c*
"""


def bits_rounded(bits, group):
    return bits


def bits_sparse(shape, rank):
    m, n = shape
    return 16 / 2 + 16 * rank * (m + n) / (m * n)
