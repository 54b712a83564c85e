"""Assignment 1, masks and N:M patterns: the model answer and the tests."""

# %% [markdown]
# # Assignment 1. Masks and patterns
#
# *After chapter 2. 20 points, about two hours.* Fill in each function. The
# tests that you see are silent when they pass; others, of the same things,
# are run when it is graded. Masks are boolean, `True` = kept, of
# shape (m, n) = (outputs, inputs). Use torch only: `slr.prune` would be the
# answer, so that the tests compare with it.

# %%
import math

import torch

import slr

# %% [markdown]
# **1a.** In an N:M pattern each group of M *neighbouring inputs of a row*
# keeps exactly N entries. Write the mask that keeps the N largest scores of
# each group. Of equal scores any may be kept, but never more than N.


# %% question 1a
def group_mask(scores, keep, group):
    """Mask (m, n) that keeps `keep` of every `group` along the inputs."""
    # BEGIN SOLUTION
    m, n = scores.shape
    groups = scores.reshape(m, n // group, group)
    best = groups.topk(keep, dim=-1).indices
    mask = torch.zeros_like(groups, dtype=torch.bool)
    return mask.scatter(-1, best, True).reshape(m, n)
    # END SOLUTION


# %% test 1a, 2 points
scores = torch.tensor([[4.0, 1.0, 3.0, 2.0], [1.0, 2.0, 3.0, 4.0]])
expected = [[True, False, True, False], [False, False, True, True]]
assert group_mask(scores, 2, 4).tolist() == expected

# %% hidden test 1a, 3 points
weight = torch.randn(12, 24)
for keep, group in ((2, 4), (1, 2), (4, 8), (3, 6)):
    mask = group_mask(weight.abs(), keep, group)
    theirs = slr.prune(weight, "magnitude", f"{keep}:{group}").mask
    assert torch.equal(mask, theirs), f"{keep}:{group} of random weights"
mask = group_mask(torch.ones(6, 8), 2, 4)
assert (mask.view(6, 2, 4).sum(-1) == 2).all(), "equal scores"

# %% [markdown]
# **1b.** A file claims to hold an N:M matrix. Is it one? At most N entries
# of a group may differ from zero; fewer may.


# %% question 1b
def is_pattern(weight, keep, group):
    """Whether no group along the inputs has more than `keep` non-zeros."""
    # BEGIN SOLUTION
    m, n = weight.shape
    counts = (weight != 0).reshape(m, n // group, group).sum(-1)
    return bool((counts <= keep).all())
    # END SOLUTION


# %% test 1b, 1 point
assert is_pattern(torch.tensor([[0.0, 3.0, 0.0, -1.0]]), 2, 4)
assert not is_pattern(torch.tensor([[2.0, 3.0, 0.0, -1.0]]), 2, 4)

# %% hidden test 1b, 3 points
assert is_pattern(torch.zeros(4, 8), 2, 4), "fewer are allowed"
uneven = torch.tensor([[1.0, 1, 1, 0, 1, 0, 0, 0]])
assert not is_pattern(uneven, 2, 4), "every group counts, not their mean"
assert is_pattern(uneven, 4, 8), "the same as one group of eight"
columns = torch.zeros(4, 4)
columns[:, 0] = 1
assert is_pattern(columns, 1, 4) and not is_pattern(columns.T, 1, 4)

# %% [markdown]
# **1c.** How much freedom does a pattern leave? Give the bits a weight that
# it takes to name one of all masks of the pattern, if no bit is wasted.


# %% question 1c
def bits_per_weight(keep, group):
    """Base-2 logarithm of the number of masks, divided by the weights."""
    # BEGIN SOLUTION
    return math.log2(math.comb(group, keep)) / group
    # END SOLUTION


# %% test 1c, 1 point
assert abs(bits_per_weight(1, 2) - 0.5) < 1e-9

# %% hidden test 1c, 3 points
assert abs(bits_per_weight(2, 4) - 0.6462406) < 1e-6
assert bits_per_weight(4, 4) == 0
assert 0.99 < bits_per_weight(512, 1024) < 1

# %% [markdown]
# **1d.** Bytes of an N:M matrix of shape (m, n): every kept value takes
# `width` bytes, and a whole number of *bits* for its place in the group.


# %% question 1d
def stored_bytes(m, n, keep, group, width):
    """Bytes of values and places."""
    # BEGIN SOLUTION
    kept = m * n * keep / group
    place = math.ceil(math.log2(group))
    return kept * (width + place / 8)
    # END SOLUTION


# %% test 1d, 1 point
assert stored_bytes(4, 8, 2, 4, 2) == 36

# %% hidden test 1d, 2 points
account = slr.matrix_account((4096, 11008), "2:4", storage="2:4")
assert stored_bytes(4096, 11008, 2, 4, 2) == account.bytes
assert stored_bytes(6, 6, 1, 3, 4) == 12 * 4.25, "two bits for three places"

# %% [markdown]
# **1e.** Which pattern costs least? Return the share of the squared norm
# that a mask cuts off, and the name of the pattern that cuts off least by
# magnitude. Use your `group_mask`.


# %% question 1e
def lost(weight, mask):
    """Share of the squared Frobenius norm that is not kept."""
    # BEGIN SOLUTION
    energy = weight.square()
    return float((energy * ~mask).sum() / energy.sum())
    # END SOLUTION


# %% question 1e
def cheapest(weight, patterns):
    """The (keep, group) of a list of them that loses least."""

    # BEGIN SOLUTION
    def price(pattern):
        return lost(weight, group_mask(weight.abs(), *pattern))

    return min(patterns, key=price)
    # END SOLUTION


# %% test 1e, 2 points
row = torch.tensor([[3.0, 4.0, 0.0, 0.0]])
assert abs(lost(row, row == 4) - 9 / 25) < 1e-6
assert cheapest(row, [(1, 2), (2, 4)]) == (2, 4)

# %% hidden test 1e, 2 points
model = slr.load("tiny", dtype=torch.float32)
weight = model.model.layers[0].mlp.up_proj.weight.data
assert cheapest(weight, [(1, 2), (2, 4), (4, 8), (8, 16)]) == (8, 16)
assert 0 < lost(weight, group_mask(weight.abs(), 2, 4)) < 0.2
