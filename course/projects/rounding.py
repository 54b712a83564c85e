"""Baseline of the project *Sparse, low rank, and few bits*: a frontier of bits and perplexity."""

import slr
from course.projects import bits, linears, main, tiny, windows
from slr.matrix.rounding import Grid

GROUP = 32


def rounded(model, width: int):
    """The model with the linear layers of its blocks rounded, in place."""
    for _, layer in linears(model):
        layer.weight.data = Grid(width, GROUP).nearest(layer.weight.data)
    return model


def compressed(rank: int, iterations: int):
    """The model at 2:4 with a rank, and its bits a weight."""
    model = tiny()
    recipe = slr.Recipe(
        prune="magnitude", pattern="2:4", refine="weights", rank=rank, iterations=iterations
    )
    return model, bits(slr.compress_model(model, recipe))


def baseline(small: bool = False) -> list[dict]:
    """Bits a weight and perplexity of plain rounding and of 2:4 with low rank in 16 bits."""
    text = windows("validation", 1 if small else 4)
    rows = [{"model": "dense", "bits": 16.0, "perplexity": slr.perplexity(tiny(), text)}]
    for width in (8, 4) if small else (8, 6, 4, 3):
        found = slr.perplexity(rounded(tiny(), width), text)
        cost = Grid(width, GROUP).bits_per_weight
        rows.append({"model": f"int{width} by {GROUP}", "bits": cost, "perplexity": found})
    for rank in (8,) if small else (8, 32):
        model, cost = compressed(rank, 3 if small else 10)
        found = slr.perplexity(model, text)
        rows.append({"model": f"2:4 + rank {rank}", "bits": cost, "perplexity": found})
    return rows


if __name__ == "__main__":
    main(baseline)
