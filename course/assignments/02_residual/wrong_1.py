"""Shares of the singular values themselves, not of their squares.

Loses: 2c 2c*
"""

import torch


def captured(L):
    values = torch.linalg.svdvals(L)
    return values.cumsum(0) / values.sum()
