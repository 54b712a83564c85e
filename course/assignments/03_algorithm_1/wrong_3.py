"""Measures the error on all entries, and the rate on the whole list.

Loses: 3d 3d* 3e*
"""


def completion_error(weight, mask, M):
    return (weight - M).norm().item()


def rate(distances):
    return (distances[-1] / distances[0]) ** (1 / (len(distances) - 1))
