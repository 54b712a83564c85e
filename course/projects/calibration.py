"""Baseline of the project *Which text, and how much of it?*: three texts, two amounts."""

import slr
from course.projects import main, tiny, windows


def baseline(small: bool = False) -> list[dict]:
    """Perplexity after Wanda and refinement on activations, by calibration text and amount."""
    text = windows("validation", 1 if small else 4)
    tokenizer = slr.load_tokenizer("tiny")
    rows = [{"text": "no data", "tokens": 0, "perplexity": found(text, "magnitude", "weights")}]
    amounts = (2,) if small else (4, 16)
    for source in ("embedded",) if small else ("embedded", "general"):
        for count in amounts:
            seen = slr.data.calibration(source, tokenizer, 128, count)
            ppl = found(text, "wanda", "activations", seen)
            rows.append({"text": source, "tokens": seen.numel(), "perplexity": ppl})
    return rows


def found(text, prune: str, refine: str, seen=None) -> float:
    """Perplexity of the embedded model at 2:4 with rank 8."""
    model = tiny()
    recipe = slr.Recipe(prune=prune, pattern="2:4", refine=refine, rank=8, iterations=5)
    slr.compress_model(model, recipe, seen)
    return slr.perplexity(model, text)


if __name__ == "__main__":
    main(baseline)
