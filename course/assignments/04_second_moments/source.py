"""Assignment 4, the metric of the outputs: the model answer and the tests."""

# %% [markdown]
# # Assignment 4. Second moments
#
# *After chapter 8. 20 points, about three hours.* What should be small is
# the error of a layer's *outputs*, $E x$ with $E = W - S - BA$, on inputs
# like those of a calibration text. Its mean square needs only
# $H = \frac1N \sum x x^\top$. You write the metric, and the two steps of a
# repair in it. Inputs are $X$ of shape (n, tokens).

# %%
import torch

import slr

# %% [markdown]
# **4a.** The second moments of the inputs: the mean over tokens.


# %% question 4a
def second_moments(X):
    """H (n, n), symmetric."""
    # BEGIN SOLUTION
    return X @ X.T / X.shape[1]
    # END SOLUTION


# %% test 4a, 1 point
H = second_moments(torch.tensor([[1.0, 3.0], [0.0, 1.0]]))
assert torch.allclose(H, torch.tensor([[5.0, 1.5], [1.5, 0.5]]))

# %% hidden test 4a, 2 points
X = torch.randn(6, 200) + 1
statistic = slr.GramStatistic(6)
statistic.update(X.T)
H = second_moments(X)
assert torch.allclose(H, statistic.gram(), rtol=1e-4, atol=1e-4)
twice = second_moments(torch.cat([X, X], dim=1))
assert torch.allclose(H, twice, atol=1e-4), "more of the same text: the same"

# %% [markdown]
# **4b.** The root of the mean squared norm of $E x$, from $H$ alone.


# %% question 4b
def output_error(E, H):
    """A number; sqrt(tr(E H E'))."""
    # BEGIN SOLUTION
    return ((E @ H) * E).sum().clamp(min=0).sqrt().item()
    # END SOLUTION


# %% test 4b, 1 point
E = torch.tensor([[2.0, 0.0]])
assert abs(output_error(E, torch.eye(2)) - 2) < 1e-6

# %% hidden test 4b, 2 points
E = torch.randn(5, 6, dtype=torch.float64)
X = torch.randn(6, 300, dtype=torch.float64) * torch.arange(1, 7)[:, None]
mean = (E @ X).square().sum(0).mean().sqrt().item()
assert abs(output_error(E, X @ X.T / 300) - mean) < 1e-6 * mean

# %% [markdown]
# **4c.** Damping makes $H$ definite: add `damping` times the mean of its
# diagonal to the diagonal. Return the Cholesky factor, $C C^\top$ = the
# damped $H$, with $C$ lower triangular.


# %% question 4c
def factor(H, damping):
    """C (n, n), lower triangular."""
    # BEGIN SOLUTION
    level = damping * H.diagonal().mean()
    eye = torch.eye(len(H), dtype=H.dtype)
    return torch.linalg.cholesky(H + level * eye)
    # END SOLUTION


# %% test 4c, 1 point
C = factor(torch.diag(torch.tensor([3.0, 1.0])), 0.5)
assert torch.allclose(C, torch.diag(torch.tensor([2.0, 2**0.5])))

# %% hidden test 4c, 2 points
X = torch.randn(8, 3, dtype=torch.float64)  # fewer tokens than inputs
H = X @ X.T / 3
C = factor(H, 0.01)
level = 0.01 * H.diagonal().mean()
assert torch.equal(C, C.tril()), "lower triangular"
assert torch.allclose(C @ C.T, H + level * torch.eye(8).double())

# %% [markdown]
# **4d.** Given $L$, the $M$ of rank $k$ with the least output error of
# $L - M$. Since $\lVert E C \rVert_F$ is the output error, Eckart and Young
# apply to $L C$. Use your `factor`.


# %% question 4d
def best_low_rank(L, H, k, damping=0.01):
    """M (m, n) of rank k."""
    # BEGIN SOLUTION
    C = factor(H, damping)
    U, s, Vt = torch.linalg.svd(L @ C, full_matrices=False)
    turned = U[:, :k] * s[:k] @ Vt[:k]
    return torch.linalg.solve_triangular(C.T, turned.T, upper=True).T
    # END SOLUTION


# %% test 4d, 2 points
L = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
M = best_low_rank(L, torch.diag(torch.tensor([100.0, 1.0])), 1)
assert torch.allclose(M, torch.diag(torch.tensor([1.0, 0.0])), atol=1e-4)

# %% hidden test 4d, 4 points
mix = torch.randn(12, 12, dtype=torch.float64)
H = mix @ mix.T / 12
L = torch.randn(9, 12, dtype=torch.float64)
M = best_low_rank(L, H, 3)
assert torch.linalg.matrix_rank(M, rtol=1e-9) == 3
C = factor(H, 0.01)
least = torch.linalg.svdvals(L @ C)[3:].norm()
assert torch.allclose(((L - M) @ C).norm(), least), "Eckart and Young"

# %% [markdown]
# **4e.** Given $M = 0$: which $S$ on the mask is best? Each row is a least
# squares problem of its own. With $K$ the kept and $D$ the dropped inputs
# of a row $w$, its kept entries become $w_K + H_{KK}^{-1} H_{KD} w_D$.


# %% question 4e
def best_kept(weight, mask, H):
    """S (m, n), zero off the mask, with the least output error."""
    # BEGIN SOLUTION
    S = torch.zeros_like(weight)
    for i, (row, kept) in enumerate(zip(weight, mask, strict=True)):
        known = H[kept][:, ~kept] @ row[~kept]
        S[i, kept] = row[kept] + torch.linalg.solve(H[kept][:, kept], known)
    return S
    # END SOLUTION


# %% test 4e, 2 points
H = torch.tensor([[1.0, 0.5], [0.5, 1.0]])
S = best_kept(torch.tensor([[2.0, 1.0]]), torch.tensor([[True, False]]), H)
assert torch.allclose(S, torch.tensor([[2.5, 0.0]]))

# %% hidden test 4e, 3 points
mix = torch.randn(16, 16, dtype=torch.float64)
H, weight = mix @ mix.T / 16, torch.randn(10, 16, dtype=torch.float64)
mask = slr.prune(weight, "magnitude", "2:4").mask
S = best_kept(weight, mask, H)
assert not S[~mask].any(), "zero off the mask"
gradient = (S - weight) @ H
assert (gradient * mask).abs().max() < 1e-8, "a minimum"
assert torch.equal(best_kept(weight, mask | True, H), weight)
