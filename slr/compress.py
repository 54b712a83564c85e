"""Compress a model: one layer, one decoder block, a loaded model, a checkpoint folder of any size.

Every linear layer of every decoder block is pruned and repaired; embeddings, norms and the
output head stay as they are.  A checkpoint is streamed: no more than one block, its calibration
inputs and its result are in memory, and every finished block is safe on disk.

Book: chapter 2.
"""

from __future__ import annotations

import fnmatch
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from slr import plugin, ranks
from slr.calibrate import BlockInputs, first_inputs, observe
from slr.filled import row_blocks
from slr.linear import SLRLinear
from slr.metric import Diagonal, Gram, Metric
from slr.patterns import parse
from slr.prune import prune
from slr.recipe import Recipe
from slr.refine import Refined, refine, svd_repair
from slr.statistics import GramStatistic, NormStatistic
from slr.stream import Stream, blocks_name, decoder_blocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from slr.journal import Journal

__all__ = [
    "LayerReport",
    "compress",
    "compress_block",
    "compress_layer",
    "compress_model",
    "pruned_source",
]

Statistic = NormStatistic | GramStatistic


class LayerReport(NamedTuple):
    """What was done to one layer.

    `error` and `pruned_error` are ‖W - S - B A‖_F / ‖W‖_F after and before the repair;
    `output_error` is ‖(W - S - B A) X‖_F / ‖W X‖_F on the calibration text, if the recipe needed
    the second moments of X; `rank` is 0 without a repair; `kept` counts the entries of S;
    `seconds` is wall time.
    """

    name: str
    shape: tuple[int, int]
    pattern: str
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
    weight: Tensor, recipe: Recipe, statistic: Statistic | None = None, seed: int = 0
) -> Refined:
    """Prune and repair one matrix by a recipe (whose `rank` is definite).

    Args:
        weight: (m, n).
        recipe: what to do.
        statistic: of the layer's inputs, of the kind that ``recipe.statistic`` names.
        seed: for a random mask and the solver's start.

    Returns:
        S, B, A and the mask; without repair the factors have rank 0 and the trace is empty.
    """
    generator = torch.Generator(weight.device).manual_seed(seed)
    pattern = parse(recipe.pattern, recipe.group)
    gram = statistic.gram() if isinstance(statistic, GramStatistic) else None
    norm = None if statistic is None else statistic.norm()
    mask, kept = prune(
        weight, recipe.prune, pattern, activation_norm=norm, gram=gram, generator=generator
    )
    if recipe.refine == "none":
        (m, n), trace = weight.shape, ()
        return Refined(kept, weight.new_zeros(m, 0), weight.new_zeros(0, n), trace, mask)
    assert recipe.rank is not None
    if recipe.refine == "svd":
        return svd_repair(weight, mask, recipe.rank, sparse=kept)
    metric: Metric | None = None
    if recipe.refine == "diagonal" and norm is not None:
        metric = Diagonal(norm)
    elif recipe.refine == "activations" and gram is not None:
        metric = Gram(gram)
    return refine(
        weight, mask, recipe.rank, metric=metric,
        iterations=recipe.iterations, schedule=recipe.schedule, generator=generator,
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
    statistics: dict[str, Statistic] = {}
    needs = [recipe.statistic for recipe in plan.values()]
    kind = GramStatistic if GramStatistic in needs else NormStatistic
    if inputs is not None and any(needs):
        with observe(linears, kind) as statistics:
            inputs.run(index, block, keep=False)
        for statistic in {id(s): s for s in statistics.values()}.values():
            ranks.all_reduce(statistic)
    reports = []
    for number, (inner, linear) in enumerate(linears.items()):
        started, recipe = time.perf_counter(), plan[inner]
        owner = number % ranks.world()
        refined: Refined | None = None
        errors: tuple[float, float, float | None] = (0.0, 0.0, None)
        if ranks.rank() == owner:
            found = statistics.get(inner)
            try:
                refined = compress_layer(linear.weight.data, recipe, found, seed + number)
            except ValueError as error:
                raise ValueError(f"{name}.{inner}: {error}") from None
            errors = _errors(linear.weight.data, refined, found)
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
                int(layer.mask.sum()),
                bias is not None,
                *errors,
                seconds,
            )
        )
        if bar is not None:
            bar.update()
    return reports


def _errors(
    weight: Tensor, refined: Refined, statistic: Statistic | None
) -> tuple[float, float, float | None]:
    """Relative error pruned and repaired, and of the outputs, of what is stored."""
    whole = pruned = rest = signal = noise = 0.0
    gram = statistic.gram() if isinstance(statistic, GramStatistic) else None
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


def _plan(model: nn.Module, recipe: Recipe, hidden_size: int) -> list[dict[str, Recipe]]:
    """Recipe of each linear of each block, all checked.

    Raises:
        ValueError: a layer that pattern or rank does not fit, nothing to do, or names in the
            recipe that fit no layer.
    """
    prefix, names = blocks_name(model), []
    plan: list[dict[str, Recipe]] = []
    for index, block in enumerate(decoder_blocks(model)):
        plan.append({})
        for inner, linear in block.named_modules():
            if isinstance(linear, SLRLinear):
                raise ValueError("the model is compressed already; give its dense source")
            if not isinstance(linear, nn.Linear):
                continue
            name = f"{prefix}.{index}.{inner}"
            names.append(name)
            mine = recipe.layer(name, hidden_size)
            if mine is None:
                continue
            (m, n), pattern = linear.weight.shape, parse(mine.pattern, mine.group)
            where = f"{name} of shape {(m, n)}"
            if mine.rank is not None and mine.rank > min(m, n):
                raise ValueError(f"rank {mine.rank} is above {min(m, n)}, the most for {where}")
            if n % getattr(pattern, "m", 1):
                raise ValueError(f"pattern {pattern} does not divide the inputs of {where}")
            plan[-1][inner] = mine
    if not any(plan):
        raise ValueError(f"of {len(names)} linear layers, the recipe leaves none to compress")
    for given in (*recipe.skip, *recipe.overrides):
        if not fnmatch.filter(names, given):
            raise ValueError(f"{given!r} in the recipe fits no layer; {names[0]!r} is one")
    return plan


@torch.no_grad()
def compress_model(
    model: PreTrainedModel,
    recipe: Recipe,
    windows: Tensor | None = None,
    *,
    progress: bool = False,
) -> list[LayerReport]:
    """Compress a loaded model in place.

    Args:
        model: a decoder, in any float dtype, on any one device.
        recipe: what to do.
        windows: calibration token windows (count, seqlen), for a recipe that needs data.
        progress: show a bar over the layers on standard error.

    Returns:
        One :class:`LayerReport` for each layer, in the order of the model.

    Raises:
        ValueError: no such structure, missing calibration windows, or a layer that the pattern
            or rank does not fit (all layers are checked before any is changed).
    """
    hidden_size = model.config.get_text_config().hidden_size
    recipe = recipe.resolved(hidden_size)
    plan = _plan(model, recipe, hidden_size)
    if recipe.statistic is not None and windows is None:
        raise ValueError(
            f"prune={recipe.prune!r} with refine={recipe.refine!r} needs calibration windows"
        )
    inputs = None
    if recipe.statistic is not None and windows is not None:
        inputs = first_inputs(model, ranks.mine(windows))
    prefix = blocks_name(model)
    reports: list[LayerReport] = []
    with _bar(plan, progress) as bar:
        for index, block in enumerate(decoder_blocks(model)):
            seed = recipe.seed + len(reports)
            reports += compress_block(
                f"{prefix}.{index}", block, index, plan[index], inputs, seed=seed, bar=bar
            )
            if inputs is not None and index + 1 < len(plan):
                inputs.run(index, block, keep=True)
    plugin.adopt(model, about(None, recipe, None, reports))
    return reports


@contextmanager
def _bar(plan: list[dict[str, Recipe]], progress: bool) -> Iterator[tqdm]:
    total = sum(map(len, plan))
    hide = not progress or ranks.rank() > 0
    with tqdm(total=total, desc="compress", unit="layer", disable=hide) as bar:
        yield bar


def about(
    source: str | None, recipe: Recipe, calibration: dict | None, reports: list[LayerReport]
) -> dict:
    """What a compressed folder says of itself."""
    return {
        "source": source,
        "recipe": recipe.as_dict(),
        "calibration": calibration,
        "layers": {report.name: report.stored() for report in reports},
    }


@torch.no_grad()
def pruned_source(dense: PreTrainedModel, compressed: PreTrainedModel) -> None:
    """Prune `dense` in place with the masks of a model compressed from it, and repair nothing.

    Gives the model that a repair has to beat, from a saved checkpoint and its source alone.
    """
    for name, layer in compressed.named_modules():
        if isinstance(layer, SLRLinear):
            dense.get_parameter(f"{name}.weight").mul_(layer.mask)


def compress(
    model: str | Path,
    out: str | Path,
    recipe: Recipe | None = None,
    *,
    calibration: str = "embedded",
    device: str = "cpu",
    progress: bool = False,
    resume: bool = True,
) -> list[LayerReport]:
    """Compress a checkpoint into another folder, one decoder block at a time.

    Args:
        model: ``"tiny"``, the folder of a Hugging Face checkpoint, or its name on the hub.
        out: folder to make; it must not exist, or be empty.  Until it is complete it is called
            ``OUT.partial``.
        recipe: defaults to ``Recipe()``.
        calibration: ``"embedded"``, ``"wikitext2"``, ``"c4"`` or a text file, read only if the
            recipe needs data.
        device: where to compute.
        progress: show a bar on standard error.
        resume: go on with what a run that was stopped left; ``False`` starts over.

    Returns:
        One :class:`LayerReport` for each layer.

    Raises:
        ValueError: anything in the arguments that does not fit, before anything is written.
        OSError: no space left; what is done is kept.
    """
    from slr import checkpoint
    from slr.journal import Journal

    ranks.start(device)
    source = checkpoint.resolve(model)
    stream = Stream(source, device)
    hidden_size = stream.config.hidden_size
    recipe = (recipe or Recipe()).resolved(hidden_size)
    plan = _plan(stream.model, recipe, hidden_size)
    windows, text = None, None
    if recipe.statistic is not None:
        windows, text = checkpoint.calibration_windows(source, recipe, calibration)
    key = {
        "source": {"name": str(model), **checkpoint.fingerprint(source)},
        "recipe": recipe.as_dict(),
        "calibration": text,
    }
    checkpoint.check_space(stream, plan, out)
    with ranks.first(Journal(out, key, resume)) as journal:
        inputs = None
        if windows is not None:
            for name, module in stream.outside().items():
                stream.fill(name, module)
            inputs = first_inputs(stream.model, ranks.mine(windows), folder=journal.folder)
            for module in stream.outside().values():
                stream.empty(module)
        reports = _blocks(stream, plan, recipe, inputs, journal, progress)
        if ranks.rank() == 0:
            notes = about(str(model), recipe, text, reports)
            checkpoint.complete(stream, journal, notes)
    ranks.barrier()
    return reports


def _blocks(
    stream: Stream,
    plan: list[dict[str, Recipe]],
    recipe: Recipe,
    inputs: BlockInputs | None,
    journal: Journal,
    progress: bool,
) -> list[LayerReport]:
    """Compress block after block, or take it from the journal."""
    reports: list[LayerReport] = []
    with _bar(plan, progress) as bar:
        for index in range(len(plan)):
            name, block = stream.block(index)
            file = shard_name(index, len(plan) + 1)
            last = index + 1 == len(plan)
            if file in journal:
                before = [LayerReport(**notes) for notes in journal.entries[file]["notes"]]
                reports += before
                bar.update(len(plan[index]))
                if inputs is None or last:
                    continue
                _take(stream, name, block, journal, file, before)
            else:
                stream.fill(name, block)
                seed = recipe.seed + len(reports)
                made = compress_block(name, block, index, plan[index], inputs, seed=seed, bar=bar)
                reports += made
                if ranks.rank() == 0:
                    tensors = plugin.state_dict(block)
                    notes = [report._asdict() for report in made]
                    journal.add(file, {f"{name}.{k}": v for k, v in tensors.items()}, notes)
            if inputs is not None and not last:
                inputs.run(index, block, keep=True)
            stream.empty(block)
    return reports


def _take(
    stream: Stream, name: str, block: nn.Module, journal: Journal, file: str,
    reports: list[LayerReport],
) -> None:  # fmt: skip
    """Fill a block from a finished file."""
    from safetensors.torch import load_file

    layers = {r.name.removeprefix(f"{name}."): r.stored() for r in reports}
    plugin.place(block, layers, stream.dtype)
    tensors = load_file(journal.folder / file)
    stream.put(block, tensors, {full.removeprefix(f"{name}."): full for full in tensors})


def shard_name(index: int, total: int) -> str:
    """File of one block: ``model-00001-of-00007.safetensors``.

    >>> shard_name(0, 7)
    'model-00001-of-00007.safetensors'
    """
    return f"model-{index + 1:05d}-of-{total:05d}.safetensors"
