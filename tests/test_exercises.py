"""The checks of exercises: right answers other than the book's, and wrong ones that look right."""

import json
import math
from pathlib import Path

import pytest
import torch

import slr

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"


@pytest.fixture(scope="module")
def checks():
    """All names that the exercises of the chapters define, from `check_cache` on."""
    space = {"torch": torch, "slr": slr, "math": math}
    for path in sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb")):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            if "exercise" in cell["metadata"].get("tags", []):
                exec("".join(cell["source"]), space)
    return space


def cache(context, blocks, heads, dim, width):
    return 2 * context * blocks * heads * dim * width


def equal(size, blocks, heads, dim, width):
    return size / cache(1, blocks, heads, dim, width)


def spared(model, kind, sparsity, *, head=False, share=None, **changes):
    of = model if head else model.model.layers
    linears = {n: m for n, m in of.named_modules() if isinstance(m, torch.nn.Linear)}
    total = sum(m.weight.numel() for m in linears.values())
    others = sum(m.weight.numel() for n, m in linears.items() if kind not in n)
    options = {"prune": "magnitude", "refine": "none", "skip": [f"*.{kind}"], **changes}
    return slr.Recipe(pattern=str(sparsity * (share or total / others)), **options)


def algorithm_1(weight, mask, rank, iterations, *, ramp, polished=False):
    """(S, low) by Algorithm 1."""
    sparse = mask * weight
    for t in range(iterations + 1):
        r = 1 + (rank - 1) * t // (iterations - 1) if ramp and t < iterations else rank
        B, A = slr.matrix.lowrank.truncated_svd(weight - sparse, r).factors()
        if t < iterations or polished:
            sparse = mask * (weight - B @ A)
    return sparse, B @ A


def least(errors_of):
    """Chooses the damping with the least error among those of a function of the fit."""

    def choose(weight, mask, rank, X, levels):
        def error(level):
            fitted, judged = errors_of(X)
            metric = slr.Gram(fitted @ fitted.T / fitted.shape[1], damping=level)
            found = slr.refine(weight, mask, rank, iterations=20, metric=metric)
            return ((weight - found.dense()) @ judged).norm().item()

        return min(levels, key=error)

    return choose


def centred_error(E, X):
    centred = X - X.mean(1, keepdim=True)
    return slr.Gram(centred @ centred.T / X.shape[1]).error(E)


def kl(dense, other):
    p, q = dense.log_softmax(-1), other.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean()


def blocks_of_gram(X):
    H = X @ X.T / X.shape[1]
    return H * torch.block_diag(*[torch.ones(16, 16)] * (len(H) // 16))


RIGHT = {
    "cache": [cache, equal],
    "spare": [spared],
    "distance": [kl],
    "constant_rank": [lambda *given: algorithm_1(*given, ramp=False)],
    "enough": [lambda errors: len(errors) > 1 and errors[-1] > 0.998 * errors[-2]],
    "bias": [lambda E, X: -E @ X.mean(1), centred_error],
    "choice": [least(lambda X: (X[:, len(X[0]) // 5 :], X[:, : len(X[0]) // 5]))],
    "cheap_gram": [blocks_of_gram],
}
WRONG = {
    "two bytes a number": ("cache", lambda c, b, h, d, w: cache(c, b, h, d, 2), equal),
    "as many blocks as LLaMA-7B": ("cache", lambda c, b, h, d, w: cache(c, 32, h, d, w), equal),
    "heads of 128": ("cache", cache, lambda s, b, h, d, w: equal(s, b, h, 128, w)),
    "pruned at random": ("spare", lambda *given: spared(*given, prune="random")),
    "repaired": ("spare", lambda *given: spared(*given, refine="weights")),
    "the head counted in": ("spare", lambda *given: spared(*given, head=True)),
    "kinds counted, not weights": ("spare", lambda *given: spared(*given, share=7 / 6)),
    "no harder": ("spare", lambda *given: spared(*given, share=1)),
    "logits compared": ("distance", lambda a, b: (a - b).square().mean()),
    "angle of logits": ("distance", lambda a, b: 1 - torch.cosine_similarity(a, b, -1).mean()),
    "the ramp": ("constant_rank", lambda *given: algorithm_1(*given, ramp=True)),
    "the ramp, polished": ("constant_rank", lambda *g: algorithm_1(*g, ramp=True, polished=True)),
    "more iterations": ("constant_rank", lambda w, p, k, t: algorithm_1(w, p, k, 50, ramp=False)),
    "a fixed number": ("enough", lambda errors: len(errors) > 20),
    "a bound in numbers": (
        "enough",
        lambda errors: len(errors) > 1 and errors[-2] - errors[-1] < 0.01,
    ),
    "whether to go on": (
        "enough",
        lambda errors: len(errors) < 2 or errors[-1] < 0.998 * errors[-2],
    ),
    "the median": (
        "bias",
        lambda E, X: -(E @ X).median(1).values,
        lambda E, X: (E @ X - (E @ X).median(1).values[:, None]).norm().item() / len(X[0]) ** 0.5,
    ),
    "judged by what was fitted": ("choice", least(lambda X: (X, X))),
    "always the least damping": ("choice", lambda w, p, k, X, levels: min(levels)),
    "always the default": ("choice", lambda w, p, k, X, levels: 0.01),
    "always one": ("choice", lambda w, p, k, X, levels: 1.0),
    "always the most": ("choice", lambda w, p, k, X, levels: max(levels)),
    "the identity": ("cheap_gram", lambda X: torch.eye(len(X))),
    "the diagonal": ("cheap_gram", lambda X: (X @ X.T / len(X[0])).diagonal().diag()),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("check", RIGHT)
def test_right_answers_of_other_people_are_accepted(checks, check, seed):
    torch.manual_seed(seed)
    checks[f"check_{check}"](*RIGHT[check])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("answer", WRONG)
def test_wrong_answers_are_refused(checks, answer, seed):
    check, *functions = WRONG[answer]
    torch.manual_seed(seed)
    with pytest.raises(AssertionError):
        checks[f"check_{check}"](*functions)
