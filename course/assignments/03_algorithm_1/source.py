"""Assignment 3, Algorithm 1: the model answer and the tests."""

# %% [markdown]
# # Assignment 3. Algorithm 1, and where it goes
#
# *After chapters 5 and 6. 20 points, about three hours.* You write the
# paper's algorithm from its two steps, check what it is said to do, and
# measure how fast it does it. `slr.refine` is what the tests compare with.

# %%
import math

import torch

import slr

# %% [markdown]
# **3a.** The ramp: the rank in iteration $t = 0, \dots, T - 1$ goes from 1
# to $k$, $r_t = 1 + \lfloor (k - 1)\, t / (T - 1) \rfloor$. With one
# iteration it is $[k]$.


# %% question 3a
def ramp(k, T):
    """The list of T ranks."""
    # BEGIN SOLUTION
    if T == 1:
        return [k]
    return [1 + (k - 1) * t // (T - 1) for t in range(T)]
    # END SOLUTION


# %% test 3a, 1 point
assert ramp(3, 5) == [1, 1, 2, 2, 3]

# %% hidden test 3a, 2 points
for k, T in ((1, 4), (8, 50), (7, 3), (5, 1)):
    assert ramp(k, T) == slr.matrix.refinement.ramp(k, T), (k, T)

# %% [markdown]
# **3b.** One iteration: given $S$, take the best rank-$r$ approximation of
# the residual, then the $S$ on the mask that is best for it.


# %% question 3b
def iteration(weight, mask, S, r):
    """The next S, zero off the mask."""
    # BEGIN SOLUTION
    U, s, Vt = torch.linalg.svd(weight - S, full_matrices=False)
    return mask * (weight - U[:, :r] * s[:r] @ Vt[:r])
    # END SOLUTION


# %% test 3b, 2 points
weight = torch.tensor([[9.0, 2.0, 1.0], [4.0, 4.0, 2.0], [4.0, 4.0, 8.0]])
mask, S = weight > 5, weight * (weight > 5)
for _ in range(60):
    S = iteration(weight, mask, S, 1)
assert torch.allclose(S.diagonal(), torch.tensor([7.0, 0.0, 6.0]), atol=1e-3)

# %% hidden test 3b, 3 points
weight = torch.randn(16, 24, dtype=torch.float64)
mask = slr.prune(weight, "magnitude", "2:4").mask
S = weight * mask
for r in (1, 3, 3):
    U, s, Vt = torch.linalg.svd(weight - S, full_matrices=False)
    literal = S + mask * (U[:, r:] * s[r:] @ Vt[r:])  # as the paper has it
    S = iteration(weight, mask, S, r)
    assert torch.allclose(S, literal) and not S[~mask].any()

# %% [markdown]
# **3c.** All of Algorithm 1: the ramp, and after the last iteration factors
# of rank $k$ of what is then left.


# %% question 3c
def algorithm_1(weight, mask, k, T):
    """S, B, A."""
    # BEGIN SOLUTION
    S = weight * mask
    for r in ramp(k, T):
        S = iteration(weight, mask, S, r)
    U, s, Vt = torch.linalg.svd(weight - S, full_matrices=False)
    return S, U[:, :k] * s[:k], Vt[:k]
    # END SOLUTION


# %% test 3c, 2 points
weight = torch.randn(20, 16, dtype=torch.float64)
mask = slr.prune(weight, "magnitude", "2:4").mask
S, B, A = algorithm_1(weight, mask, 3, 10)
error = (weight - S - B @ A).norm().item()
assert error < slr.svd_repair(weight, mask, 3).error

# %% hidden test 3c, 3 points
model = slr.load("tiny", dtype=torch.float64)
weight = model.model.layers[2].self_attn.v_proj.weight.data
mask = slr.prune(weight, "magnitude", "2:4").mask
S, B, A = algorithm_1(weight, mask, 4, 6)
theirs = slr.refine(weight, mask, 4, iterations=6, solver="exact")
assert (S - theirs.sparse).norm() < 1e-6 * S.norm(), "S"
low = theirs.B @ theirs.A
assert (B @ A - low).norm() < 1e-6 * low.norm(), "B A"

# %% [markdown]
# **3d.** Only pruned entries are matched. Write the error of a low-rank $M$
# with the best $S$ for it, *without* computing that $S$.


# %% question 3d
def completion_error(weight, mask, M):
    """The least Frobenius error that any S on the mask leaves with M."""
    # BEGIN SOLUTION
    return ((weight - M) * ~mask).norm().item()
    # END SOLUTION


# %% test 3d, 1 point
weight = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
mask = torch.eye(2).bool()
assert abs(completion_error(weight, mask, 0 * weight) - math.sqrt(13)) < 1e-6

# %% hidden test 3d, 2 points
weight, M = torch.randn(2, 9, 7, dtype=torch.float64)
mask = torch.rand(9, 7) > 0.5
best = (weight - mask * (weight - M) - M).norm().item()
assert abs(completion_error(weight, mask, M) - best) < 1e-9
changed = torch.where(mask, 100.0, weight)
same = completion_error(changed, mask, M)
assert abs(same - best) < 1e-9, "kept weights do not enter"

# %% [markdown]
# **3e.** Near its limit the iteration converges linearly: each distance is
# about a constant times the one before. Estimate that constant from a list
# of distances, of which the first ones do not count yet and the last ones
# may be rounding: use the middle third.


# %% question 3e
def rate(distances):
    """The factor of one step, by the middle third of the list."""
    # BEGIN SOLUTION
    first, last = len(distances) // 3, 2 * len(distances) // 3
    ratio = distances[last] / distances[first]
    return ratio ** (1 / (last - first))
    # END SOLUTION


# %% test 3e, 2 points
assert abs(rate([3 * 0.5**t for t in range(12)]) - 0.5) < 1e-9

# %% hidden test 3e, 2 points
weight = torch.tensor([[0.0, 2.0], [1.0, 4.0]], dtype=torch.float64)
mask = torch.tensor([[True, False], [False, False]])
S, distances = torch.zeros_like(weight), []
for _ in range(24):
    distances.append(abs(float(-S[0, 0]) - 2 / 4))
    S = iteration(weight, mask, S, 1)
assert abs(rate(distances) - 21 / 85) < 1e-3, "the rate of chapter 6"
noisy = [5.0, 5.0] + [0.8**t for t in range(2, 20)] + [1e-2] * 8
assert abs(rate(noisy) - 0.8) < 1e-6, "only the middle third counts"
