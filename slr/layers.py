"""Compress one linear layer, and the linear layers of one decoder block, by a recipe.

Book: chapter 5.
"""

from __future__ import annotations

import time
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from slr import ranks
from slr.calibrate import BlockInputs, observe
from slr.filled import row_blocks
from slr.linear import SLRLinear
from slr.metric import Diagonal, Gram, Metric
from slr.patterns import parse
from slr.pcp import pcp_repair
from slr.prune import prune
from slr.recipe import Recipe
from slr.refine import Refined, refine, svd_repair
from slr.statistics import GramStatistic, NormStatistic

__all__ = ["LayerReport", "compress_block", "compress_layer"]


class LayerReport(NamedTuple):
    """What was done to one layer.

    `error` and `pruned_error` are ‖W - S - B A‖_F / ‖W‖_F after and before the repair;
    `output_error` is ‖(W - S - B A) X‖_F / ‖W X‖_F on the calibration text, if the recipe needed
    the second moments of X; `rank` is 0 without a repair; `kept` counts the entries of S;
    `seconds` is wall time.
    """

    name: str
    shape: tuple[int, int]
    pattern: str | None
    rank: int
    kept: int
    bias: bool
    pruned_error: float
    error: float
    output_error: float | None
    seconds: float

    def stored(self) -> dict:
        """All but name and time, which would make equal results differ."""
        return {k: v for k, v in self._asdict().items() if k not in ("name", "seconds")}


def compress_layer(
    weight: Tensor,
    recipe: Recipe,
    *,
    norm: Tensor | None = None,
    gram: Tensor | None = None,
    seed: int = 0,
) -> Refined:
    """Prune and repair one matrix by a recipe (whose `rank` is definite).

    Args:
        weight: (m, n).
        recipe: what to do.
        norm: ‖X[j]‖₂ of each input (n,), for a recipe whose ``statistic`` is not ``None``.
        gram: second moments of the inputs (n, n), if it is ``GramStatistic``.
        seed: for a random mask and the solver's start.

    Returns:
        S, B, A and the mask; without repair the factors have rank 0 and the trace is empty.
    """
    generator = torch.Generator(weight.device).manual_seed(seed)
    pattern = parse(recipe.pattern, recipe.group)
    mask, kept = prune(
        weight, recipe.prune, pattern, activation_norm=norm, gram=gram, generator=generator
    )
    if recipe.refine == "none":
        (m, n), trace = weight.shape, ()
        return Refined(kept, weight.new_zeros(m, 0), weight.new_zeros(0, n), trace, mask)
    assert recipe.rank is not None
    metric: Metric | None = None
    if recipe.refine == "diagonal" and norm is not None:
        metric = Diagonal(norm)
    elif recipe.refine in ("activations", "eora") and gram is not None:
        metric = Gram(gram)
    if recipe.refine == "pcp":
        # As the paper's toolkit weighs S: by the sum of one column, not of all n of them.
        balance = 1 / (weight.shape[1] * max(weight.shape) ** 0.5)
        return pcp_repair(weight, mask, recipe.rank, balance=balance, tolerance=1e-3)
    if recipe.refine in ("svd", "eora"):
        return svd_repair(weight, mask, recipe.rank, metric, sparse=kept)
    return refine(
        weight, mask, recipe.rank, metric=metric,
        iterations=recipe.iterations, schedule=recipe.schedule, tolerance=recipe.tolerance,
        generator=generator,
        update_mask=pattern if recipe.update_mask else None,
    )  # fmt: skip


@torch.no_grad()
def compress_block(
    name: str,
    block: nn.Module,
    index: int,
    plan: dict[str, Recipe],
    inputs: BlockInputs | None = None,
    *,
    seed: int = 0,
    bar: tqdm | None = None,
) -> list[LayerReport]:
    """Compress one decoder block in place: each linear in `plan` becomes `SLRLinear`.

    Args:
        name: of the block in its model.
        block: its weights are on the device to compute on.
        index: its number.
        plan: resolved recipe by name within the block.
        inputs: of this block, if a recipe needs data.
        seed: of the first layer; the others count on.
        bar: to advance.

    Returns:
        One :class:`LayerReport` for each layer.
    """
    linears = {k: m for k, m in block.named_modules() if isinstance(m, nn.Linear) and k in plan}
    known: dict[str, _Known] = {}
    needs = [recipe.statistic for recipe in plan.values()]
    kind = GramStatistic if GramStatistic in needs else NormStatistic
    if inputs is not None and any(needs):
        with observe(linears, kind) as statistics:
            inputs.run(index, block, keep=False)
        known = _known(statistics)
    reports = []
    for number, (inner, linear) in enumerate(linears.items()):
        started, recipe = time.perf_counter(), plan[inner]
        owner = number % ranks.world()
        refined: Refined | None = None
        errors: tuple[float, float, float | None] = (0.0, 0.0, None)
        if ranks.rank() == owner:
            norm, gram = known.pop(inner, _Known(None, None))
            try:
                refined = compress_layer(
                    linear.weight.data, recipe, norm=norm, gram=gram, seed=seed + number
                )
            except ValueError as error:
                raise ValueError(f"{name}.{inner}: {error}") from None
            errors = _errors(linear.weight.data, refined, gram)
        if ranks.world() > 1:
            refined, errors = ranks.share(linear.weight, recipe.rank or 0, refined, errors, owner)
        assert refined is not None
        pattern = parse(recipe.pattern, recipe.group)
        bias = None if linear.bias is None else linear.bias.data
        layer = SLRLinear.from_refined(refined, bias, pattern=pattern)
        block.set_submodule(inner, layer)
        seconds = time.perf_counter() - started
        reports.append(
            LayerReport(
                f"{name}.{inner}",
                (layer.out_features, layer.in_features),
                recipe.pattern,
                layer.rank,
                layer.values.numel(),
                bias is not None,
                *errors,
                seconds,
            )
        )
        if bar is not None:
            bar.update()
    return reports


class _Known(NamedTuple):
    """Of a layer's inputs: ‖X[j]‖₂ and the second moments, in float32."""

    norm: Tensor | None
    gram: Tensor | None


def _known(statistics: dict[str, NormStatistic | GramStatistic]) -> dict[str, _Known]:
    """What is known of each layer's inputs, over all ranks; empties `statistics`.

    The sums, in float64 and as large as a layer's weight or larger, are let go one by one.
    """
    found: dict[str, _Known] = {}
    sharing = {id(s): s for s in statistics.values()}
    names = {key: [n for n, s in statistics.items() if id(s) == key] for key in sharing}
    statistics.clear()
    for key in list(sharing):
        statistic = sharing.pop(key)
        ranks.all_reduce(statistic)
        gram = statistic.gram() if isinstance(statistic, GramStatistic) else None
        found |= dict.fromkeys(names[key], _Known(statistic.norm(), gram))
    return found


def _errors(
    weight: Tensor, refined: Refined, gram: Tensor | None
) -> tuple[float, float, float | None]:
    """Relative error pruned and repaired, and of the outputs, of what is stored."""
    whole = pruned = rest = signal = noise = 0.0
    for rows in row_blocks(weight):
        W = weight[rows].float()
        E = W - refined.sparse[rows].float()
        E -= refined.B[rows].float() @ refined.A.float()
        whole += float(W.square().sum(dtype=torch.float64))
        pruned += float((W * ~refined.mask[rows]).square().sum(dtype=torch.float64))
        rest += float(E.square().sum(dtype=torch.float64))
        if gram is not None:
            signal += float(((W @ gram) * W).sum(dtype=torch.float64))
            noise += float(((E @ gram) * E).sum(dtype=torch.float64))
    size = max(whole, 1e-300)
    output = None if gram is None else (max(0.0, noise) / max(signal, 1e-300)) ** 0.5
    return (pruned / size) ** 0.5, (rest / size) ** 0.5, output
