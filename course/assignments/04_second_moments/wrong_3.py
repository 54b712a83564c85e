"""Damps by a fixed number, and leaves the kept weights as they are.

Loses: 4c 4c* 4e 4e*
"""

import torch


def factor(H, damping):
    return torch.linalg.cholesky(
        H + damping * torch.eye(len(H), dtype=H.dtype)
    )


def best_kept(weight, mask, H):
    return weight * mask
