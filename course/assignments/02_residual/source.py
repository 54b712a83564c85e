"""Assignment 2, the residual: the model answer and the tests."""

# %% [markdown]
# # Assignment 2. The residual and its spectrum
#
# *After chapter 4. 20 points, about two hours.* Pruning leaves a residual
# $L = W - S$. How much of it can a matrix of rank $k$ bring back, and is
# that more than it would bring back of noise?

# %%
import torch

import slr

# %% [markdown]
# **2a.** The best approximation of rank $k$, as two factors.


# %% question 2a
def truncate(L, k):
    """B (m, k) and A (k, n), with B A the nearest matrix of rank k to L."""
    # BEGIN SOLUTION
    U, s, Vt = torch.linalg.svd(L, full_matrices=False)
    return U[:, :k] * s[:k], Vt[:k]
    # END SOLUTION


# %% test 2a, 2 points
B, A = truncate(torch.diag(torch.tensor([3.0, 2.0, 1.0])), 2)
assert B.shape == (3, 2) and A.shape == (2, 3)
expected = torch.diag(torch.tensor([3.0, 2.0, 0.0]))
assert torch.allclose(B @ A, expected, atol=1e-5)

# %% hidden test 2a, 2 points
L = torch.randn(20, 30, dtype=torch.float64)
tail = torch.linalg.svdvals(L)[5:].norm()
B, A = truncate(L, 5)
assert B.shape == (20, 5) and A.shape == (5, 30)
assert torch.allclose((L - B @ A).norm(), tail), "Eckart and Young"

# %% [markdown]
# **2b.** The one-shot repair: the kept weights stay as they are, the
# low-rank part stands in for what was cut off.


# %% question 2b
def one_shot(weight, mask, k):
    """S (m, n), zero off the mask, and B, A of rank k."""
    # BEGIN SOLUTION
    S = weight * mask
    return (S, *truncate(weight - S, k))
    # END SOLUTION


# %% test 2b, 2 points
weight = torch.tensor([[5.0, 1.0], [1.0, 5.0]])
S, B, A = one_shot(weight, weight == 5, 1)
assert torch.equal(S, torch.diag(torch.tensor([5.0, 5.0])))
assert abs((weight - S - B @ A).norm().item() - 1) < 1e-5

# %% hidden test 2b, 3 points
weight = torch.randn(24, 16, dtype=torch.float64)
mask = slr.prune(weight, "magnitude", "2:4").mask
S, B, A = one_shot(weight, mask, 3)
assert torch.equal(S, weight * mask), "kept weights do not move"
theirs = slr.svd_repair(weight, mask, 3)
assert abs((weight - S - B @ A).norm().item() - theirs.error) < 1e-6

# %% [markdown]
# **2c.** Energy is the *squared* Frobenius norm. Which share of it do the
# first $k$ singular directions hold, for every $k$?


# %% question 2c
def captured(L):
    """Shares (min(m, n),), from the first direction alone to all of them."""
    # BEGIN SOLUTION
    energy = torch.linalg.svdvals(L).square()
    return energy.cumsum(0) / energy.sum()
    # END SOLUTION


# %% test 2c, 2 points
shares = captured(torch.diag(torch.tensor([2.0, 1.0, 1.0])))
assert torch.allclose(shares, torch.tensor([4 / 6, 5 / 6, 1.0]))

# %% hidden test 2c, 2 points
L = torch.randn(30, 12)
shares = captured(L)
assert shares.shape == (12,) and bool((shares.diff() > 0).all())
B, A = truncate(L, 4)
left = (L - B @ A).square().sum() / L.square().sum()
assert torch.allclose(1 - shares[3], left, atol=1e-5)

# %% [markdown]
# **2d.** A control. Shuffle *all* entries of $L$: its distribution stays,
# its structure goes. How many singular values of $L$ are above the largest
# one of a shuffled copy?


# %% question 2d
def above_noise(L, generator):
    """The number of singular values above the largest of L, shuffled."""
    # BEGIN SOLUTION
    order = torch.randperm(L.numel(), generator=generator)
    shuffled = L.flatten()[order].view(L.shape)
    edge = torch.linalg.matrix_norm(shuffled, 2)
    return int((torch.linalg.svdvals(L) > edge).sum())
    # END SOLUTION


# %% test 2d, 2 points
draw = torch.Generator().manual_seed(1)
low = torch.randn(60, 3, generator=draw) @ torch.randn(3, 50, generator=draw)
noise = torch.randn(60, 50, generator=draw)
assert above_noise(low + noise, draw) == 3

# %% hidden test 2d, 3 points
draw = torch.Generator().manual_seed(2)
noise = torch.randn(80, 80, generator=draw)
assert above_noise(noise, draw) <= 2, "noise has no structure"
loud = noise.clone()
loud[5] *= 6
assert above_noise(loud, draw) == 1, "one loud row is one direction"
before = loud.clone()
above_noise(loud, draw)
assert torch.equal(loud, before), "the argument is left as it was"

# %% [markdown]
# **2e.** Rank or density? With $f \cdot mn$ more numbers one may store
# factors of rank $f mn / (m + n)$, rounded down, or prune less. Return the
# two errors $\lVert W - \ldots \rVert_F$ for magnitude masks, first that of
# the rank. `slr.prune` takes the fraction to prune.


# %% question 2e
def rank_or_density(weight, sparsity, f):
    """(error with factors, error with more entries)."""
    # BEGIN SOLUTION
    m, n = weight.shape
    mask = slr.prune(weight, "magnitude", sparsity).mask
    S, B, A = one_shot(weight, mask, int(f * m * n / (m + n)))
    fuller = slr.prune(weight, "magnitude", sparsity - f).weight
    return (weight - S - B @ A).norm().item(), (weight - fuller).norm().item()
    # END SOLUTION


# %% test 2e, 1 point
by_rank, by_density = rank_or_density(torch.randn(60, 60), 0.5, 0.1)
assert 0 < by_density < by_rank

# %% hidden test 2e, 1 point
weight = torch.randn(64, 64, dtype=torch.float64)
mask = slr.prune(weight, "magnitude", 0.5).mask
by_rank, by_density = rank_or_density(weight, 0.5, 0.25)
assert abs(by_rank - slr.svd_repair(weight, mask, 8).error) < 1e-6
rest = weight - slr.prune(weight, "magnitude", 0.25).weight
assert abs(by_density - rest.norm()) < 1e-6
