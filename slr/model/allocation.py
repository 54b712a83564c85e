"""How much each layer keeps, at the same total: sparsity by block, or rank by layer.

Both ways look once at the dense model and say what they found as overrides of a recipe, so that
whatever takes a recipe takes them, and anybody can read and change them before.

Book: chapter 19.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from slr.matrix.checks import check_choice
from slr.matrix.patterns import Unstructured
from slr.matrix.rounding import as_grid
from slr.matrix.statistics import NormStatistic
from slr.model import distributed
from slr.model.calibrate import BlockInputs, observe
from slr.model.recipe import Recipe

__all__ = ["WAYS", "by_energy", "by_outliers", "check_way", "outliers", "spread_over"]

WAYS = ("owl", "energy")
ABOVE = 5.0  # times the mean score: what OWL calls an outlier
SPREAD = 0.08  # half of what the blocks' sparsities may differ by
DIGITS = 4  # of a sparsity


def outliers(scores: Sequence[Tensor], above: float = ABOVE) -> float:
    """Share of a block's scores that are more than `above` times their mean.

    Args:
        scores: ``|W| · ‖X‖`` of each layer, (m, n).
        above: M of the paper.

    Source: Yin et al. 2024 (OWL, arXiv:2310.05175), section 3.2.

    >>> outliers([torch.tensor([[0.1, 0.1, 0.1]]), torch.tensor([[0.1, 0.1, 5.0]])])
    0.16666666666666666
    """
    count = sum(score.numel() for score in scores)
    mean = sum(float(score.sum(dtype=torch.float64)) for score in scores) / count
    return sum(int((score > above * mean).sum()) for score in scores) / count


def by_outliers(shares: Sequence[float], sparsity: float, spread: float = SPREAD) -> list[float]:
    """Sparsity of each block: the more outliers, the less is pruned; the mean is as asked for.

    Args:
        shares: :func:`outliers` of each block.
        sparsity: mean of them, above 0 and below 1.
        spread: λ of the paper: the most and the least differ by twice as much, or by what there is
            room for.

    Source: as :func:`outliers`, section 3.3; scaled as its authors' code does.

    >>> by_outliers([0.01, 0.02, 0.03], 0.5)
    [0.58, 0.5, 0.42]
    """
    low, high = min(shares), max(shares)
    if low == high:
        return [sparsity] * len(shares)
    spread = min(spread, sparsity / 2, (1 - sparsity) / 2)
    kept = [2 * spread * (share - low) / (high - low) for share in shares]
    middle = sum(kept) / len(kept)
    return [round(sparsity - (each - middle), DIGITS) for each in kept]


def by_energy(spectra: Sequence[Tensor], costs: Sequence[int], rank: int) -> list[int]:
    """Rank of each layer: what lowers the sum of squared relative errors most for each number.

    Args:
        spectra: squared singular values of what each layer lacks, descending, over its own energy.
        costs: numbers that one rank of a layer takes, m + n.
        rank: that all together take as much as, if each has it.

    Returns:
        One or more for each layer; not more numbers in all than `rank` for each would be.

    >>> by_energy([torch.tensor([4.0, 3.0, 0.1]), torch.tensor([1.0, 0.5, 0.1])], [10, 10], 2)
    [2, 2]
    >>> by_energy([torch.tensor([4.0, 3.0, 2.0]), torch.tensor([1.0, 0.5, 0.1])], [10, 10], 2)
    [3, 1]
    """
    left = (rank - 1) * sum(costs)
    ranks = [1] * len(spectra)
    gains = [
        (float(value) / cost, -i, layer)
        for layer, (spectrum, cost) in enumerate(zip(spectra, costs, strict=True))
        for i, value in enumerate(spectrum[1:].tolist())
    ]
    closed: set[int] = set()  # a layer whose next rank did not fit
    for _, _, layer in sorted(gains, reverse=True):
        if layer in closed:
            continue
        if costs[layer] > left:
            closed.add(layer)
            continue
        ranks[layer] += 1
        left -= costs[layer]
    return ranks


def check_way(by: str, recipe: Recipe) -> None:
    """Raise ValueError if there is no such way, or nothing in the recipe that it could move."""
    check_choice("by", by, WAYS)
    pattern = recipe.pattern
    if by == "owl" and not (isinstance(pattern, Unstructured) and 0 < pattern.density < 1):
        raise ValueError(
            f"by='owl' moves sparsity between blocks, and pattern {pattern} fixes it; give a "
            "fraction to prune, as 0.5"
        )
    if by == "owl" and not recipe.needs_data:
        raise ValueError(
            f"by='owl' looks at a calibration text, and {recipe!r} reads none; give prune='wanda'"
        )
    if by == "energy" and not recipe.resolved(1 << 20).rank:
        raise ValueError(f"by='energy' moves rank between layers, and {recipe!r} has none")


@torch.no_grad()
def spread_over(
    blocks: Iterable[tuple[int, str, nn.Module]],
    plan: Sequence[dict[str, Recipe]],
    recipe: Recipe,
    by: str,
    inputs: BlockInputs | None,
) -> Recipe:
    """The recipe with an override for each block or layer.

    Args:
        blocks: number, name and module of each, dense and filled while it is used.
        plan: recipe of each layer of each block, by its name within the block.
        recipe: resolved; its own overrides count after those that are found here.
        by: ``"owl"`` or ``"energy"``, see :func:`check_way`.
        inputs: of the first block, for a recipe that needs data.

    Cost: a run of the dense model over the inputs; with ``"energy"`` the eigenvalues of a matrix
        of min(m, n) for each layer besides.
    """
    shares: dict[str, float] = {}
    spectra: dict[str, Tensor] = {}
    costs: list[int] = []
    for index, name, block in blocks:
        linears = {k: m for k, m in block.named_modules() if k in plan[index]}
        assert all(isinstance(m, nn.Linear) for m in linears.values())
        norms = _norms(linears, index, block, inputs)
        if by == "owl" and linears:
            scores = [m.weight.abs().float() * norms[k] for k, m in linears.items()]
            shares[f"{name}.*"] = outliers(scores)
            continue
        for inner, linear in linears.items():
            weight: Tensor = linear.weight.detach().float()
            spectra[f"{name}.{inner}"] = _lacking(weight, plan[index][inner], norms.get(inner))
            costs.append(sum(weight.shape))
    found: dict[str, dict] = {}
    if by == "owl":
        pattern = recipe.pattern
        assert isinstance(pattern, Unstructured)
        each = by_outliers(list(shares.values()), pattern.sparsity)
        made = (str(Unstructured(sparsity, pattern.group)) for sparsity in each)
        found = {name: {"pattern": told} for name, told in zip(shares, made, strict=True)}
    else:
        assert recipe.rank is not None
        ranks = by_energy(list(spectra.values()), costs, recipe.rank)
        found = {name: {"rank": k} for name, k in zip(spectra, ranks, strict=True)}
    told = recipe.as_dict()
    return Recipe.from_dict({**told, "overrides": {**found, **recipe.overrides}})


def _norms(
    linears: dict[str, nn.Linear], index: int, block: nn.Module, inputs: BlockInputs | None
) -> dict[str, Tensor]:
    """Norms of the input channels of layers, while the inputs go on to the next block."""
    if inputs is None:
        return {}
    if not linears:
        inputs.run(index, block, keep=True)
        return {}
    with observe(linears, NormStatistic) as seen:
        inputs.run(index, block, keep=True)
    for statistic in dict.fromkeys(seen.values()):
        distributed.all_reduce(statistic)
    return {name: seen[name].norm().to(linears[name].weight.device) for name in seen}


def _lacking(weight: Tensor, recipe: Recipe, norm: Tensor | None) -> Tensor:
    """Squared singular values, descending, of what pruning or rounding takes, over W's energy.

    Columns count by the norm of their inputs, if that is known: then it is of the outputs, as if
    the channels of the inputs did not go together.
    """
    scale = torch.ones_like(weight[0]) if norm is None else norm
    if recipe.pattern.density == 1:
        grid = as_grid(recipe.refine.options()["values"])
        assert grid is not None
        lacking = weight - grid.nearest(weight)
    else:
        mask = recipe.pattern.select(weight.abs() * scale)
        lacking = weight.masked_fill(mask, 0.0)
    lacking = (lacking * scale).double()
    if lacking.shape[0] > lacking.shape[1]:
        lacking = lacking.T
    values = torch.linalg.eigvalsh(lacking @ lacking.T).flip(0).clamp_min(0.0)
    return values / (weight * scale).double().square().sum().clamp_min(torch.finfo().tiny)
