"""A recipe, and the loop over the decoder blocks of a model that applies it.

Every linear layer of every decoder block is pruned and repaired; embeddings, norms and the
output head stay as they are.  Book: chapter 2.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from slr.calibrate import decoder_blocks, first_inputs, observe
from slr.linear import SLRLinear
from slr.metric import Diagonal, Gram, Metric
from slr.patterns import parse
from slr.prune import METHODS, prune
from slr.refine import SCHEDULES, Refined, refine, svd_repair
from slr.statistics import GramStatistic, NormStatistic

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "REPAIRS",
    "LayerReport",
    "Recipe",
    "compress",
    "compress_layer",
    "compress_model",
    "pruned_source",
]

REPAIRS = ("weights", "diagonal", "activations", "svd", "none")


@dataclass(frozen=True)
class Recipe:
    """How to compress: everything that decides the result, besides model and calibration text.

    Args:
        prune: pruning method, see :data:`slr.prune.METHODS`.
        pattern: ``"2:4"``, or a fraction to prune such as ``"0.5"``.
        group: ``"row"`` or ``"matrix"``, for a fraction.
        refine: repair: Algorithm 1 on the ``"weights"`` (the paper, data-free), on weights
            scaled by activation norms (``"diagonal"``) or on the layer's outputs
            (``"activations"``); ``"svd"``, one shot; or ``"none"``.
        rank: rank of the low-rank part, the same for every layer; or
        rank_ratio: rank as a fraction of the hidden size, 1/32 by default (128 for 4096).
        iterations: of the refinement.
        schedule: of the refinement, ``"paper"`` or ``"accelerated"``.
        samples: calibration windows, for methods that look at data.
        seqlen: tokens in each; the model's longest context, 2048 at most, when ``None``.
        seed: for random masks and the solver's start.

    >>> Recipe(prune="wanda", pattern="2:4").resolved(hidden_size=4096).rank
    128
    >>> Recipe(pattern="3:2")
    Traceback (most recent call last):
    ValueError: pattern 3:2 would keep 3 of every 2; n:m needs 0 < n < m, as in 2:4
    """

    prune: str = "wanda"
    pattern: str = "2:4"
    group: str = "row"
    refine: str = "weights"
    rank: int | None = None
    rank_ratio: float | None = None
    iterations: int = 50
    schedule: str = "paper"
    samples: int = 128
    seqlen: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        parse(self.pattern, self.group)
        for name, known in (("prune", METHODS), ("refine", REPAIRS), ("schedule", SCHEDULES)):
            value = getattr(self, name)
            if value not in known:
                raise ValueError(
                    f"{name} {value!r} is unknown; it must be one of {', '.join(known)}"
                )
        if self.rank is not None and self.rank_ratio is not None:
            raise ValueError("rank and rank_ratio are both given; give one")
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"rank is {self.rank}; it must be at least 1 (or refine='none')")
        if self.rank_ratio is not None and not 0 < self.rank_ratio <= 1:
            raise ValueError(f"rank_ratio is {self.rank_ratio}; it must be above 0 and at most 1")
        for name in ("iterations", "samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")

    def resolved(self, hidden_size: int) -> Recipe:
        """The same recipe with a definite `rank` for a model of this hidden size."""
        if self.refine == "none":
            return replace(self, rank=None, rank_ratio=None)
        if self.rank is not None:
            return self
        ratio = 1 / 32 if self.rank_ratio is None else self.rank_ratio
        return replace(self, rank=max(1, int(ratio * hidden_size)), rank_ratio=None)

    @property
    def statistic(self) -> type[NormStatistic] | type[GramStatistic] | None:
        """What has to be known of each layer's inputs; ``None`` for a data-free recipe."""
        if self.prune == "sparsegpt" or self.refine == "activations":
            return GramStatistic
        return NormStatistic if self.prune == "wanda" or self.refine == "diagonal" else None

    def as_dict(self) -> dict:
        """Plain values, for JSON."""
        return asdict(self)


class LayerReport(NamedTuple):
    """What was done to one layer.

    `error` and `pruned_error` are ‖W - S - B A‖_F / ‖W‖_F after and before the repair; `rank`
    is 0 without one; `seconds` is wall time.
    """

    name: str
    shape: tuple[int, int]
    rank: int
    pruned_error: float
    error: float
    seconds: float


def compress_layer(
    weight: Tensor,
    recipe: Recipe,
    statistic: NormStatistic | GramStatistic | None = None,
    seed: int = 0,
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
    )  # fmt: skip


@torch.no_grad()
def compress_model(
    model: PreTrainedModel,
    recipe: Recipe,
    windows: Tensor | None = None,
    *,
    progress: bool = False,
) -> list[LayerReport]:
    """Compress a loaded model in place: each linear of a decoder block becomes `SLRLinear`.

    Args:
        model: a decoder of the LLaMA family, in any float dtype, on any one device.
        recipe: what to do.
        windows: calibration token windows (count, seqlen), for a recipe that needs data.
        progress: show a bar over the layers on standard error.

    Returns:
        One :class:`LayerReport` for each layer, in the order of the model.

    Raises:
        ValueError: no such structure, missing calibration windows, or a layer that the pattern
            or rank does not fit (all layers are checked before any is changed).
    """
    recipe = recipe.resolved(model.config.hidden_size)
    blocks = decoder_blocks(model)
    if recipe.statistic is not None and windows is None:
        raise ValueError(
            f"prune={recipe.prune!r} with refine={recipe.refine!r} needs calibration windows"
        )
    plan = [_linears(block) for block in blocks]
    _check_fit(plan, recipe)
    kind = None if windows is None else recipe.statistic
    inputs = None if kind is None or windows is None else first_inputs(model, windows)

    reports: list[LayerReport] = []
    bar = tqdm(total=sum(map(len, plan)), desc="compress", unit="layer", disable=not progress)
    for index, (block, linears) in enumerate(zip(blocks, plan, strict=True)):
        found: dict = {}
        if inputs is not None and kind is not None:
            with observe(linears, kind) as found:
                inputs.run(block, keep=False)
        for name, linear in linears.items():
            started = time.perf_counter()
            seed = recipe.seed + len(reports)
            refined = compress_layer(linear.weight.data, recipe, found.get(name), seed)
            bias = None if linear.bias is None else linear.bias.data
            pattern = parse(recipe.pattern, recipe.group)
            layer = SLRLinear.from_refined(refined, bias, pattern=pattern)
            block.set_submodule(name, layer)
            full = f"model.layers.{index}.{name}"
            reports.append(_report(full, linear.weight.data, layer, started))
            bar.update()
        if inputs is not None and index + 1 < len(blocks):
            inputs.run(block, keep=True)
    bar.close()
    return reports


@torch.no_grad()
def pruned_source(dense: PreTrainedModel, compressed: PreTrainedModel) -> None:
    """Prune `dense` in place with the masks of a model compressed from it, and repair nothing.

    Gives the model that a repair has to beat, from a saved checkpoint and its source alone.
    """
    for name, layer in compressed.named_modules():
        if isinstance(layer, SLRLinear):
            dense.get_parameter(f"{name}.weight").mul_(layer.mask)


def _linears(block: nn.Module) -> dict[str, nn.Linear]:
    found = {name: m for name, m in block.named_modules() if isinstance(m, nn.Linear)}
    if not found:
        raise ValueError("a decoder block has no nn.Linear; was the model compressed before?")
    return found


def _check_fit(plan: list[dict[str, nn.Linear]], recipe: Recipe) -> None:
    pattern = parse(recipe.pattern, recipe.group)
    group = getattr(pattern, "m", 1)
    for index, linears in enumerate(plan):
        for name, linear in linears.items():
            m, n = linear.weight.shape
            where = f"model.layers.{index}.{name} of shape {(m, n)}"
            if recipe.rank is not None and recipe.rank > min(m, n):
                raise ValueError(f"rank {recipe.rank} is above {min(m, n)}, the most for {where}")
            if n % group:
                raise ValueError(f"pattern {pattern} does not divide the inputs of {where}")


def _report(name: str, weight: Tensor, layer: SLRLinear, started: float) -> LayerReport:
    W = weight.double()
    size = W.norm().clamp_min(1e-300)
    after = W - layer.weight.double() - layer.B.double() @ layer.A.double()
    return LayerReport(
        name,
        (weight.shape[0], weight.shape[1]),
        layer.rank,
        float(W.masked_fill(layer.mask, 0).norm() / size),
        float(after.norm() / size),
        time.perf_counter() - started,
    )


def compress(
    model: str | Path,
    out: str | Path,
    recipe: Recipe | None = None,
    *,
    calibration: str = "embedded",
    device: str = "cpu",
    progress: bool = False,
) -> list[LayerReport]:
    """Compress a checkpoint folder into another one.

    Args:
        model: ``"tiny"`` or the folder of a Hugging Face checkpoint.
        out: folder to make; it must not exist, or be empty.
        recipe: defaults to ``Recipe()``.
        calibration: ``"embedded"`` or a text file, read only if the recipe needs data.
        device: where to compute.
        progress: show bars on standard error.

    Returns:
        One :class:`LayerReport` for each layer.

    Raises:
        ValueError: anything in the arguments that does not fit, before anything is written.
    """
    from slr import checkpoint, data

    recipe = recipe or Recipe()
    source = checkpoint.resolve(model)
    checkpoint.check_free(out)
    loaded = checkpoint.load(source)
    nn.Module.to(loaded, device)  # transformers' own `to` only guards quantised models
    recipe = recipe.resolved(loaded.config.hidden_size)
    windows = None
    if recipe.statistic is not None:
        text = data.load_text(calibration, "calibration")
        tokenizer = checkpoint.load_tokenizer(source)
        seqlen = recipe.seqlen or checkpoint.context(source)
        windows = data.windows(text, tokenizer, seqlen, recipe.samples)
    reports = compress_model(loaded, recipe, windows, progress=progress)
    about = {
        "source": str(model),
        "recipe": recipe.as_dict(),
        "calibration": None
        if windows is None
        else {"text": calibration, "windows": windows.shape[0], "seqlen": windows.shape[1]},
        "layers": [report._asdict() for report in reports],
    }
    nn.Module.to(loaded, "cpu")
    checkpoint.save(loaded, out, about=about, tokenizer_from=source)
    return reports
