"""The model card of a compressed folder."""

from __future__ import annotations

from slr.checkpoint.sizes import Summary

__all__ = ["card"]

_CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [slr, sparse, low-rank, compressed]
{base}---

# {title}, compressed to sparse + low rank

Every linear layer W of the decoder blocks is stored as S + B A: S sparse, B A of low rank.
Made by `slr` from {source}.

```python
import slr  # makes the format known to transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("this folder")
tokenizer = AutoTokenizer.from_pretrained("this folder")
```

Without `import slr` it does not load, and says so.

## Recipe

| option | value |
| --- | --- |
{recipe}

{calibration}

## Sizes and errors

Weights on disk: {before:,.1f} MB before, {after:,.1f} MB now ({ratio:.3f} of it).
Parameters in the compressed layers: {dense:,} before, {nonzero:,} now.
Errors are ‖W - S - B A‖ / ‖W‖, mean over the layers of a kind; output errors are those of the
layer's outputs on the calibration text.

| layers | number | rank | error, pruned only | error | output error |
| --- | --- | --- | --- | --- | --- |
{layers}
"""


def card(about: dict, before: int, after: int) -> str:
    """Markdown.

    Args:
        about: what the folder says of itself.
        before: bytes of the source's weights.
        after: bytes of its own.
    """
    source, found = about["source"], Summary.of(about["layers"])
    on_hub = source.count("/") == 1 and not source.startswith((".", "/", "~"))
    recipe = "\n".join(
        f"| {k} | {v} |" for k, v in about["recipe"].items() if v not in (None, [], {})
    )
    text = about["calibration"]
    told = "No calibration text was needed."
    if text is not None:
        told = (
            f"Calibrated on {text['windows']} windows of {text['seqlen']} tokens of {text['text']}."
        )
    rows = [
        f"| {kind} | {row['number']} | {', '.join(map(str, row['ranks']))} "
        f"| {row['pruned_error']:.4f} | {row['error']:.4f} "
        f"| {'' if row['output_error'] is None else format(row['output_error'], '.4f')} |"
        for kind, row in found.kinds.items()
    ]
    title = source.rstrip("/").rpartition("/")[2] or source
    return _CARD.format(
        base=f"base_model: {source}\n" if on_hub else "", title=title, source=f"`{title}`",
        recipe=recipe, calibration=told, before=before / 1e6, after=after / 1e6,
        ratio=after / before, dense=found.dense, nonzero=found.kept, layers="\n".join(rows),
    )  # fmt: skip
