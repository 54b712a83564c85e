"""Baseline of the project *Learn it back*: Adam on the factors B and A of a compressed model."""

import torch
from torch.nn.functional import cross_entropy

import slr
from course.projects import main, tiny, windows

RATE, BATCH = 5e-4, 4


def factors(model) -> list[torch.nn.Parameter]:
    """B and A of every compressed layer; all else is frozen."""
    model.requires_grad_(False)
    found = [p for m in model.modules() if isinstance(m, slr.SLRLinear) for p in (m.B, m.A)]
    for parameter in found:
        parameter.requires_grad_(True)
    return found


def loss(model, ids: torch.Tensor) -> torch.Tensor:
    """Mean loss of the next token."""
    logits = model(input_ids=ids).logits[:, :-1]
    return cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def train(model, text: torch.Tensor, steps: int) -> None:
    """Adam on random windows, in place."""
    optimizer = torch.optim.Adam(factors(model), lr=RATE)
    draw = torch.Generator().manual_seed(0)
    for _ in range(steps):
        ids = text[torch.randint(len(text), (BATCH,), generator=draw)]
        optimizer.zero_grad()
        loss(model, ids).backward()
        optimizer.step()


def baseline(small: bool = False) -> list[dict]:
    """Perplexity of the dense model, after compression, and after some steps."""
    text, seen = windows("validation", 1 if small else 4), windows("calibration", 256, 128)
    rows = [{"model": "dense", "steps": 0, "perplexity": slr.perplexity(tiny(), text)}]
    model = tiny()
    recipe = slr.Recipe(
        prune="magnitude", pattern="2:4", refine="weights", rank=8, iterations=3 if small else 10
    )
    slr.compress_model(model, recipe)
    at = 0
    for steps in (0, 2) if small else (0, 10, 30):
        train(model, seen, steps - at)
        at = steps
        found = slr.perplexity(model, text)
        rows.append({"model": "2:4 + rank 8", "steps": steps, "perplexity": found})
    return rows


if __name__ == "__main__":
    main(baseline)
