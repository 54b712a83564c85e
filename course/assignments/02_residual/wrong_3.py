"""Shuffles whole rows, which changes no singular value: none is ever above.

Loses: 2d 2d*
"""

import torch


def above_noise(L, generator):
    shuffled = L[torch.randperm(len(L), generator=generator)]
    edge = torch.linalg.matrix_norm(shuffled, 2) * (1 + 1e-5)
    return int((torch.linalg.svdvals(L) > edge).sum())
