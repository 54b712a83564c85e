"""One decoder block: prune and repair each of its linear layers by its recipe.

Book: chapter 5.
"""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from slr.layer.linear import SLRLinear
from slr.layer.rounded import layer_of
from slr.matrix.assembly import unit_of
from slr.matrix.filled import row_blocks
from slr.matrix.metric import relative
from slr.matrix.pruners import Known, Magnitude
from slr.matrix.result import Refined
from slr.matrix.statistics import GramStatistic, NormStatistic
from slr.matrix.steps import Compressed, prune_and_repair
from slr.model import distributed
from slr.model.calibrate import BlockInputs, observe
from slr.model.format import grids
from slr.model.heldout import HeldOut
from slr.model.recipe import Recipe
from slr.model.streams import look, stages
from slr.model.tuning import tune_block

__all__ = [
    "Errors", "LayerReport", "compress_block", "compress_layer", "measure", "report",
]  # fmt: skip


class Errors(NamedTuple):
    """Relative errors of one layer; see :class:`LayerReport`."""

    pruned_error: float
    error: float
    output_error: float | None


class LayerReport(NamedTuple):
    """What was done to one layer.

    `error` is ‖W - S - B A‖_F / ‖W‖_F and `pruned_error` the same of what pruning left, weights
    that it moved included;
    `output_error` is ‖(W - S - B A) X‖_F / ‖W X‖_F on the calibration text, if the recipe needed
    the second moments of X, and with ``asymmetric`` what was aimed at stands for W; `rank` is 0
    without a repair; `kept` counts the entries of S; `grid` and `factors` are those of values and
    factors that are codes; `seconds` is wall time.
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
    grid: str | None = None
    factors: str | None = None
    seconds: float = 0.0

    def stored(self) -> dict:
        """All but name and time, which would make equal results differ."""
        told = {k: v for k, v in self._asdict().items() if k not in ("name", "seconds")}
        return {k: v for k, v in told.items() if v is not None or k not in ("grid", "factors")}


def compress_layer(
    weight: Tensor, recipe: Recipe, *, known: Known | None = None, seed: int = 0,
    name: str = "the layer",
) -> Compressed:  # fmt: skip
    """Prune and repair one matrix by a recipe (whose `rank` is definite).

    Args:
        weight: (m, n).
        recipe: what to do.
        known: norms and second moments of the layer's inputs, as ``recipe.statistic`` says.  If
            they are all zero, weights are kept by magnitude and repaired as if all inputs were
            alike, and a warning names the layer.
        seed: for a random mask and the solver's start.
        name: of the layer.

    Returns:
        S, B, A and the mask, and what pruning left; without repair the factors have rank 0.

    Raises:
        ValueError: what the steps say, of the weight or of what is known.
    """
    generator = torch.Generator(weight.device).manual_seed(seed)
    pruner = recipe.prune
    if known is not None and known.silent:
        warnings.warn(
            f"{name}: its inputs are all zero on the calibration text; its weights are kept by "
            "magnitude",
            stacklevel=2,
        )
        pruner, known = Magnitude() if pruner.needs else pruner, known.alike()
    return prune_and_repair(weight, pruner, recipe.pattern, recipe.refine, known, generator)


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
    held: HeldOut | None = None,
    tune: int = 0,
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
        held: held-out windows, taken through the block as it was, as pruning left it, and as it is
            now.
        tune: passes of :func:`slr.model.tuning.tune_block` afterwards, which `inputs` is for.

    Returns:
        One :class:`LayerReport` for each layer.
    """
    linears = {k: m for k, m in block.named_modules() if isinstance(m, nn.Linear) and k in plan}
    numbers = {inner: number for number, inner in enumerate(linears)}
    beside = inputs is not None and inputs.dense is not None
    dense = copy.deepcopy(block) if beside else block
    reports: dict[str, LayerReport] = {}
    layers: dict[str, SLRLinear] = {}
    pruned: dict[str, Tensor] = {}
    for known in _looks(index, block, dense, linears, plan, inputs):
        made = {}
        for inner in list(known):
            started = time.perf_counter()
            full, recipe, linear = f"{name}.{inner}", plan[inner], linears[inner]
            refined, errors, left = _shared(
                full, linear, recipe, known.pop(inner), seed + numbers[inner], numbers[inner]
            )
            bias = None if linear.bias is None else linear.bias.data
            layer = layer_of(refined, bias, pattern=recipe.pattern)
            made[inner] = layer
            if held is None and not beside:
                block.set_submodule(inner, layer)
            elif held is not None and left is not None:
                pruned[inner] = left
            reports[inner] = report(full, layer, errors, time.perf_counter() - started)
            if bar is not None:
                bar.update()
        layers |= made
        if beside:
            _put(block, made)
    if held is not None:  # the block is wanted in three forms
        held.advance("dense", index, dense)
        held.plain(index, dense)
        held.pruned(index, dense, pruned)
        _put(block, layers)
    if tune and inputs is not None:
        tune_block(block, index, inputs, tune)
        reports = {k: _tuned(told, block, dense, k) for k, told in reports.items()}
    if held is not None:
        held.advance("result", index, block)
    return [reports[inner] for inner in linears]


def _put(block: nn.Module, layers: dict[str, SLRLinear]) -> None:
    for inner, layer in layers.items():
        block.set_submodule(inner, layer)


def _tuned(told: LayerReport, block: nn.Module, dense: nn.Module, inner: str) -> LayerReport:
    """The report of a layer after it was tuned: the block's outputs were, not the layer's."""
    layer, weight = block.get_submodule(inner), dense.get_parameter(f"{inner}.weight").float()
    assert isinstance(layer, SLRLinear)
    error = relative(float((weight - layer.dense().float()).norm()), float(weight.norm()))
    return told._replace(error=error, output_error=None)


def report(name: str, layer: SLRLinear, errors: Errors, seconds: float) -> LayerReport:
    """The report of a layer, from itself and its errors."""
    shape, pattern, codes = (layer.out_features, layer.in_features), layer.pattern, grids(layer)
    return LayerReport(
        name, shape, None if pattern is None else str(pattern), layer.rank, layer.kept,
        layer.bias is not None, *errors, codes.get("grid"), codes.get("factors"), seconds,
    )  # fmt: skip


def _looks(
    index: int, block: nn.Module, dense: nn.Module, linears: dict[str, nn.Linear],
    plan: dict[str, Recipe], inputs: BlockInputs | None,
) -> Iterator[dict[str, Known | None]]:  # fmt: skip
    """What the layers' recipes need to know, of those that are to be compressed next."""
    if not any(recipe.asymmetric for recipe in plan.values()):
        known = _look(index, block, linears, plan, inputs)
        yield {inner: known.pop(inner, None) for inner in linears}
        if inputs is not None:
            inputs.advance_dense(index, dense)
        return
    assert inputs is not None
    wanted = [s for s in stages(dense, index, inputs) if set(s.names) & set(linears)]
    for stage in wanted:
        known = look(stage, block, dense, index, inputs, last=stage is wanted[-1])
        yield {inner: known[inner] for inner in stage.names if inner in linears}
    if not wanted:
        inputs.advance_dense(index, dense)


def _look(
    index: int, block: nn.Module, linears: dict[str, nn.Linear], plan: dict[str, Recipe],
    inputs: BlockInputs | None,
) -> dict[str, Known]:  # fmt: skip
    """Run the block to learn what its layers' recipes need."""
    needs = [recipe.statistic for recipe in plan.values()]
    if inputs is None or not any(needs):
        return {}
    kind = GramStatistic if GramStatistic in needs else NormStatistic
    watched = {k: m for k, m in linears.items() if plan[k].statistic is not None}
    with observe(watched, kind) as statistics:
        inputs.run(index, block, keep=False)
    return _known(statistics)


def _shared(
    name: str, linear: nn.Linear, recipe: Recipe, known: Known | None, seed: int, number: int
) -> tuple[Refined, Errors, Tensor | None]:
    """One matrix, compressed by the process whose turn it is; and what pruning left, there."""
    owner = number % distributed.world()
    refined, errors, left = None, None, None
    if distributed.rank() == owner:
        try:
            made = compress_layer(linear.weight.data, recipe, known=known, seed=seed, name=name)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        refined, errors = made.refined, measure(linear.weight.data, made, known)
        left = made.pruned.weight
    if distributed.world() > 1:
        width = recipe.rank or 0
        refined, errors = distributed.share(linear.weight, width, refined, errors, owner)
    assert refined is not None
    assert errors is not None
    return refined, Errors(*errors), left


def _known(statistics: dict[str, NormStatistic | GramStatistic]) -> dict[str, Known]:
    """What is known of each layer's inputs, over all ranks; empties `statistics`.

    The sums, in float64 and as large as a layer's weight or larger, are let go one by one.
    """
    found: dict[str, Known] = {}
    sharing = {id(s): s for s in statistics.values()}
    names = {key: [n for n, s in statistics.items() if id(s) == key] for key in sharing}
    statistics.clear()
    for key in list(sharing):
        statistic = sharing.pop(key)
        distributed.all_reduce(statistic)
        gram = statistic.gram() if isinstance(statistic, GramStatistic) else None
        found |= dict.fromkeys(names[key], Known(statistic.norm(), gram))
    return found


def measure(weight: Tensor, made: Compressed, known: Known | None = None) -> Errors:
    """The errors of one matrix, of what is stored.

    Args:
        weight: W, (m, n).
        made: S + B A, what pruning left, and what was aimed at.
        known: with ``gram``, for the error of the outputs.

    Cost: a few passes; with ``gram`` 4 m n² FLOPs.
    """
    refined, gram = made.refined, None if known is None else known.gram
    unit, loud = unit_of(weight), 1.0  # squares stay in range; the shares have no unit
    if gram is not None:
        loud = 2.0 ** (math.log2(unit_of(gram)) // 2)
    whole = pruned = rest = signal = noise = 0.0
    for rows in row_blocks(weight):
        W = weight[rows].float() / unit
        E = W - refined.sparse[rows].float() / unit
        E -= (refined.B[rows].float() / unit) @ refined.A.float()
        left = W - made.pruned.weight[rows].float() / unit
        whole += float(W.square().sum(dtype=torch.float64))
        pruned += float(left.square().sum(dtype=torch.float64))
        rest += float(E.square().sum(dtype=torch.float64))
        if gram is not None:
            T = made.target[rows].float() / unit
            E += T - W
            T, E = T / loud, E / loud
            signal += float(((T @ gram) * T).sum(dtype=torch.float64))
            noise += float(((E @ gram) * E).sum(dtype=torch.float64))
    output = None if gram is None else relative(max(0.0, noise), signal) ** 0.5
    return Errors(relative(pruned, whole) ** 0.5, relative(rest, whole) ** 0.5, output)
