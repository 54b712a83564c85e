"""Baseline of the project *Rank where it helps*: equal ranks, and ranks by the spectrum."""

import heapq

import torch

import slr
from course.projects import linears, main, tiny, windows

RANK = 8


def greedy(spectra: dict[str, torch.Tensor], prices: dict[str, int], budget: int) -> dict[str, int]:
    """Ranks for a budget of numbers: the next where it removes most relative energy a number."""
    shares = {name: (s.square() / s.square().sum()).tolist() for name, s in spectra.items()}
    ranks = dict.fromkeys(spectra, 0)
    queue = [(-share[0] / prices[name], name) for name, share in shares.items()]
    heapq.heapify(queue)
    while queue:
        _, name = heapq.heappop(queue)
        if prices[name] > budget:
            continue
        budget -= prices[name]
        ranks[name] += 1
        if ranks[name] < len(shares[name]):
            heapq.heappush(queue, (-shares[name][ranks[name]] / prices[name], name))
    return ranks


def spectra(model) -> tuple[dict, dict]:
    """Singular values of what 2:4 by magnitude cuts off, and the numbers that a rank costs."""
    values, prices = {}, {}
    for name, layer in linears(model):
        weight = layer.weight.data
        rest = weight - slr.prune(weight, "magnitude", "2:4").weight
        values[name] = torch.linalg.svdvals(rest)
        prices[name] = sum(weight.shape)
    return values, prices


def baseline(small: bool = False) -> list[dict]:
    """Mean relative error and perplexity at the same number of stored numbers."""
    text = windows("validation", 1 if small else 4)
    values, prices = spectra(tiny())
    budget = RANK * sum(prices.values())
    plans = {"equal": dict.fromkeys(values, RANK), "by spectrum": greedy(values, prices, budget)}
    rows = []
    for plan, ranks in plans.items():
        some = {f"*{n}": {"rank": r} for n, r in ranks.items() if r}
        none = {f"*{n}": {"refine": "none"} for n, r in ranks.items() if not r}
        recipe = slr.Recipe(
            prune="magnitude", pattern="2:4", refine="weights", rank=RANK,
            iterations=3 if small else 10, overrides={**some, **none},
        )  # fmt: skip
        model = tiny()
        reports = slr.compress_model(model, recipe)
        rows.append(
            {
                "ranks": plan,
                "numbers": sum(r.rank * sum(r.shape) for r in reports),
                "least": min(ranks.values()),
                "most": max(ranks.values()),
                "error": sum(r.error for r in reports) / len(reports),
                "perplexity": slr.perplexity(model, text),
            }
        )
    return rows


if __name__ == "__main__":
    main(baseline)
