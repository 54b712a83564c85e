"""The model card of a compressed folder."""

from __future__ import annotations

import math
from pathlib import Path

from slr.checkpoint.named import BASES
from slr.checkpoint.sizes import Summary, shown
from slr.model.plain import PLAIN

__all__ = ["FAR", "beaten", "card", "far"]

FAR = 1.5  # times the dense perplexity

_CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [slr, sparse, low-rank, compressed]
{base}---

# {title}, sparse + low rank

Every linear layer W of the decoder blocks is stored as S + B A: S sparse, B A of low rank.
Made by `slr` from {source}.{converted}

{measured}

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
Parameters in the compressed layers: {dense:,} before, {nonzero:,} now; {bits:.2f} bits a weight,
where plain int8 takes 8 and plain int4 by groups of 32 takes 4.6.
Errors are ‖W - S - B A‖ / ‖W‖, mean over the layers of a kind; output errors are those of the
layer's outputs on the calibration text.

| layers | number | rank | error, pruned only | error | output error |
| --- | --- | --- | --- | --- | --- |
{layers}
"""


def card(about: dict, before: int, after: int, converted: str | None = None) -> str:
    """Markdown.

    Args:
        about: what the folder says of itself.
        before: bytes of the source's weights.
        after: bytes of its own.
        converted: a sentence about a source that was converted.
    """
    source, found = about["source"], Summary.of(about["layers"])
    recipe = "\n".join(
        f"| {k} | {v} |" for k, v in about["recipe"].items() if v not in (None, [], {})
    )
    text = about["calibration"]
    told = "No calibration text was needed."
    if text is not None:
        told = (
            f"Calibrated on {text['windows']} windows of {text['seqlen']} tokens of {text['text']}."
        )
    tuned = about.get("tuned")
    if tuned is not None:
        told += (
            f"\n\nThen tuned as a whole, {tuned['passes']} passes: divergence (Kullback-Leibler) "
            f"from the dense model on held-out windows {tuned['divergence'][0]:.4f} before, "
            f"{min(v for v in tuned['divergence'] if v is not None):.4f} after, in nats a token."
        )
    rows = [
        f"| {kind} | {row['number']} | {', '.join(map(str, row['ranks']))} "
        f"| {shown(row['pruned_error'])} | {shown(row['error'])} | {shown(row['output_error'])} |"
        for kind, row in found.kinds.items()
    ]
    base = _base(source)
    title = (base or source).rstrip("/").rpartition("/")[2] or source
    return _CARD.format(
        base=f"base_model: {base}\n" if base else "", title=title, source=f"`{base or title}`",
        converted=f" {converted}" if converted else "",
        measured=_measured(about.get("measured"), found.bits), bits=found.bits,
        recipe=recipe, calibration=told, before=before / 1e6, after=after / 1e6,
        ratio=after / before, dense=found.dense, nonzero=found.kept, layers="\n".join(rows),
    )  # fmt: skip


def _base(source: str) -> str | None:
    """What a source is called on the hub, if it is there."""
    if source in BASES:
        return BASES[source]
    on_hub = source.count("/") == 1 and not source.startswith((".", "/", "~"))
    return source if on_hub and not Path(source).exists() else None


def _measured(told: dict | None, bits: float) -> str:
    """What was measured on held-out text, as a table, and the sample."""
    if told is None:
        return "How good it is was not measured here."
    values = told["perplexity"]
    parts = [
        f"Perplexity on {told['windows']} held-out windows of {told['seqlen']} tokens "
        f"({told['text']}), lower is better:",
        "| " + " | ".join(values) + " |\n" + "| --- " * len(values) + "|\n| "
        + " | ".join("not finite" if v is None else f"{v:.2f}" for v in values.values())
        + " |",
    ]  # fmt: skip
    warning = far(told)
    if warning:
        parts.append(f"**{warning}**")
    rival = beaten(told, bits)
    if rival:
        parts.append(rival)
    if told["sample"] is not None:
        rows = [f"> {k}: {' '.join(text.split())}" for k, text in told["sample"].items()]
        parts.append("How both go on from the same words:\n\n" + "\n>\n".join(rows))
    return "\n\n".join(parts)


def beaten(told: dict, bits: float) -> str | None:
    """A sentence if the dense model, only rounded, is as good at no more bytes.

    Args:
        told: what was measured.
        bits: of a weight of the compressed layers.

    >>> print(beaten({"perplexity": {"result": 30.0, "plain int8": 20.0}}, 9.0))
    Plain int8, 8 bits a weight, has perplexity 20.00 on the same text, where this has 30.00 at \
9.0: if bytes are what counts, round instead, or take codes and a low-rank part (--preset int4).
    """
    values = told["perplexity"]
    result = values["result"]
    for name, grid in reversed(PLAIN.items()):
        value = values.get(name)
        if value is None or grid.bits_per_weight > bits or (result or math.inf) < value:
            continue
        return (
            f"{name.capitalize()}, {grid.bits_per_weight:.3g} bits a weight, has perplexity "
            f"{value:.2f} on the same text, where this has "
            f"{'none' if result is None else format(result, '.2f')} at {bits:.1f}: if bytes are "
            "what counts, round instead, or take codes and a low-rank part (--preset int4)."
        )
    return None


def far(told: dict) -> str | None:
    """A warning if a result is far from dense: its perplexity :data:`FAR` times as high.

    >>> far({"perplexity": {"dense": 20.0, "result": 24.0}}) is None
    True
    """
    dense, result = told["perplexity"]["dense"], told["perplexity"]["result"]
    if dense is None:
        return "The dense model has no finite perplexity: its weights may be broken."
    if result is not None and result <= FAR * dense:
        return None
    times = "not finite" if result is None else f"{result / dense:.1f} times the dense model's"
    return (
        f"The result's perplexity is {times}: text from it "
        "will be noticeably worse. Prune less (--pattern 4:8 or 0.4), repair with a higher rank "
        "(--rank-ratio), calibrate on more text like your own (--calibration FILE --samples 128), "
        "or leave sensitive layers dense (--skip '*.down_proj')."
    )
