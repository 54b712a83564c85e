"""A threshold for each group keeps all of equal scores.  The ties are hidden.

Loses: 1a*
"""


def group_mask(scores, keep, group):
    m, n = scores.shape
    groups = scores.reshape(m, n // group, group)
    least = groups.topk(keep, dim=-1).values[..., -1:]
    return (groups >= least).reshape(m, n)
