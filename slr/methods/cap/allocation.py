"""Stage 2 of CAP on a loaded model: learn what to keep, and put it in place.

Book: chapter 15.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from slr.layer.linear import SLRLinear
from slr.matrix.metric import relative
from slr.matrix.result import Refined
from slr.methods.cap.policy import Policy, choose, learn, soften
from slr.methods.cap.pool import Pool, propose
from slr.methods.cap.robust_pca import Candidates
from slr.model import hf
from slr.model.block import Errors, LayerReport, report
from slr.model.blocks import in_mode
from slr.model.data import check_windows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["METHODS", "allocate", "excess_loss", "place"]

METHODS = ("learned", "uniform", "greedy")
WORSE = 0.05  # nats a token: more than a few batches may differ by


@torch.no_grad()
def allocate(
    model: PreTrainedModel,
    windows: Tensor | None = None,
    budget: float = 0.5,
    *,
    method: str = "learned",
    found: Mapping[str, Candidates] | None = None,
    steps: int = 200,
    batch: int = 4,
    prior: str = "uniform",
    width: float = 0.4,
    rate: float = 0.05,
    window: int = 5,
    epsilon: float = 0.05,
    refit: bool = False,
    generator: torch.Generator | None = None,
    losses: list[float] | None = None,
    **options,
) -> list[LayerReport]:
    """Compress a loaded model in place by CAP.

    Args:
        model: a dense decoder, in any float dtype, on any one device.
        windows: calibration token windows (count, seqlen), for ``"learned"``.
        budget: fraction of the parameters of all linear layers in decoder blocks to keep.
        method: ``"learned"``; or of the same candidates, one triplet at a time, ``"uniform"``
            (the same leading share of triplets and entries everywhere) or ``"greedy"`` (the
            largest squares for a parameter, over all matrices).
        found: candidates from :func:`propose`, by name; made now when ``None``.  If they are of
            some layers only, the others stay dense, and the budget is of these.
        steps: masks to try; 0 keeps the most probable of the start.
        batch: windows that each is tried on, in turn.
        prior: ``"uniform"`` or ``"greedy"``: what to start from.
        width: how soft the start is, see :func:`~slr.methods.cap.policy.soften`.
        rate, window, epsilon: of the :class:`Policy`.
        refit: set kept entries to W - B A (beyond the paper).
        generator: of the masks; seeded with 0 when ``None``.
        losses: if given, filled with the loss of each mask, see :func:`excess_loss`.
        options: of :func:`candidates`, to make them with: ``share``, ``balance_ratio``, ….

    Returns:
        One :class:`~slr.model.block.LayerReport` for each layer.  Without a pattern the kept
        parameters are exactly ``int(budget · parameters)``; with n:m at most that many.

    Raises:
        ValueError: an unknown method or prior, missing windows, a budget that cannot be met, a
            loss that diverges or is not finite, candidates of other layers, or a model without
            linear layers in decoder blocks.  The model is left as it was.

    Cost: stage 1, robust PCA of every matrix; then `steps` forward passes of a batch, each with
        the matrices built anew, 2 m n (rank) FLOPs; nothing is differentiated.  Memory: the model
        twice, and the candidates.
    Source: CAP, Zhou et al., ICLR 2026.
    """
    for name, value, known in (("method", method, METHODS), ("prior", prior, METHODS[1:])):
        if value not in known:
            raise ValueError(f"{name} {value!r} is unknown; it must be one of {', '.join(known)}")
    if method == "learned" and windows is None:
        raise ValueError("method 'learned' needs calibration windows")
    if found is not None and options:
        raise ValueError(f"{', '.join(options)} is for candidates, but found has them made already")
    started = time.perf_counter()
    pool = _pool(model, dict(propose(model, **options)) if found is None else found)
    spend = pool.budget(budget)
    if method == "learned" and windows is not None:
        check_windows(windows, model.config)
        start = soften(getattr(pool, prior)(), pool.costs, spend, width)
        policy = Policy(pool.costs, spend, start, rate=rate, window=window, epsilon=epsilon)
        loss = excess_loss(model, pool, windows, batch, refit)
        generator = generator or torch.Generator().manual_seed(0)
        learn(policy, lambda mask, step: loss(mask * pool.costs, step), steps, generator)
        priority = policy.probabilities
        choices = [choose(p, pool.costs, pool.units, spend) for p in (start, priority)]
        if steps:
            means = [sum(loss(c, k) for k in range(window)) / window for c in choices]
            _check_gain(means[0], means[1], rate)
        if losses is not None:
            losses += policy.losses
    else:
        pool = pool.finest()
        priority = getattr(pool, method)()
    amounts = choose(priority, pool.costs, pool.units, spend)
    recipe = {"method": f"CAP, {method}", "refine": "cap", "budget": budget, "refit": refit}
    recipe |= options
    if method == "learned":
        recipe |= {"steps": steps, "batch": batch, "prior": prior, "width": width, "rate": rate,
                   "window": window, "epsilon": epsilon}  # fmt: skip
    return place(model, pool, amounts, recipe, refit, started)


def _pool(model: nn.Module, found: Mapping[str, Candidates]) -> Pool:
    """Candidates in the order of the model; raise unless each is of a dense layer of its shape."""
    modules = dict(model.named_modules())
    for name, c in found.items():
        layer = modules.get(name)
        if not isinstance(layer, nn.Linear) or tuple(layer.weight.shape) != c.shape:
            raise ValueError(f"found has {name!r}, no dense layer of shape {c.shape} of the model")
    return Pool({name: found[name] for name in modules if name in found})


def _check_gain(before: float, after: float, rate: float) -> None:
    """Raise if the learned choice is clearly worse than what was to be improved."""
    if not after < before + WORSE:
        raise ValueError(
            f"the loss diverged: above the dense model's, it is {after:.4g} with the learned "
            f"choice and was {before:.4g} at the start; take a rate below {rate}, or more steps"
        )


def excess_loss(
    model: PreTrainedModel, pool: Pool, windows: Tensor, batch: int, refit: bool = False
) -> Callable[[Tensor, int], float]:
    """Loss of a choice from `pool`, above the dense model's, at a step.

    Args:
        model: dense; never modified.
        pool: its candidates.
        windows: (count, seqlen), of which step k takes the k-th `batch`, round and round.
        batch: windows at once.
        refit: as for :func:`allocate`.

    Returns:
        A function of amounts (int64 (p,), parameters kept of each group) and step: mean negative
        log-likelihood a token, in nats.

    Raises:
        ValueError: windows of a wrong shape, or a batch below 1.
    """
    if windows.ndim != 2 or windows.shape[1] < 2 or len(windows) == 0 or batch < 1:
        raise ValueError(
            f"windows have shape {tuple(windows.shape)} and batch is {batch}; they must be "
            "(count, seqlen) and at least 1"
        )
    batches, dense = windows.split(batch), dict[int, float]()
    weights = {name: _linear(model, name).weight.data for name in pool.found}

    def loss(amounts: Tensor, step: int) -> float:
        number = step % len(batches)
        ids = batches[number].to(model.device)
        if number not in dense:
            dense[number] = _likelihood(model, ids, {})
        built = {}
        for name, part in pool.split(amounts).items():
            W = weights[name]
            made = pool.found[name].dense(part, W if refit else None)
            built[f"{name}.weight"] = made.to(W.dtype)
        return _likelihood(model, ids, built) - dense[number]

    return loss


def _linear(model: nn.Module, name: str) -> nn.Linear:
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    return layer


@torch.no_grad()
def _likelihood(model: nn.Module, ids: Tensor, weights: dict[str, Tensor]) -> float:
    """Mean negative log-likelihood of all tokens but the first, with other weights."""
    options = {"input_ids": ids, "use_cache": False}
    with in_mode(model, False):
        logits = torch.func.functional_call(model, weights, kwargs=options).logits
    return float(nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1),
                                             ids[:, 1:].flatten()))  # fmt: skip


def place(
    model: PreTrainedModel,
    pool: Pool,
    amounts: Tensor,
    recipe: dict,
    refit: bool = False,
    started: float | None = None,
) -> list[LayerReport]:
    """Put the chosen parameters in place of the dense layers.

    Args:
        model: changed in place; it can be saved afterwards.
        pool: candidates of its layers.
        amounts: int64 (p,), from :func:`choose`.
        recipe: what to record of how they were chosen.
        refit: as for :func:`allocate`.
        started: when the work on the model began; seconds are shared among the layers.
    """
    made, reports = {}, []
    for name, part in pool.split(amounts).items():
        linear, c = _linear(model, name), pool.found[name]
        W, bias = linear.weight.data, None if linear.bias is None else linear.bias.data
        refined = c.refined(part, W, refit)
        made[name] = SLRLinear.from_refined(refined, bias, pattern=c.pattern).train(linear.training)
        reports.append(_report(name, W, made[name], refined))
    for name, layer in made.items():  # only now that nothing can fail
        model.set_submodule(name, layer)
    if started is not None:
        each = (time.perf_counter() - started) / len(reports)
        reports = [one._replace(seconds=each) for one in reports]
    hf.adopt(model, hf.notes(None, recipe, None, reports))
    return reports


def _report(name: str, W: Tensor, layer: SLRLinear, refined: Refined) -> LayerReport:
    """Of one layer; what it is without B A counts as pruned."""
    size, pruned = (float(E.norm()) for E in (W.float(), W.float() - refined.sparse.float()))
    errors = Errors(relative(pruned, size), relative(refined.error, size), None)
    return report(name, layer, errors, 0.0)
