"""What the folders that other programs read say of themselves: README.md of each form."""

from __future__ import annotations

__all__ = ["BASE", "gguf_readme", "peft_readme"]

# In adapter_config.json, where a name is expected: one that is no name on the hub and no folder.
BASE = "the base is the folder above the adapter: see its README.md"

_PEFT = """\
# Base and LoRA adapter

Written by `slr export --to peft`.  This folder is a dense checkpoint whose linear layers hold S,
zeros included; `adapter` is a LoRA adapter with the factors, so that PEFT computes S x + B (A x).
`slr` is not needed:

```python
from pathlib import Path

from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = Path("this folder")
base = AutoModelForCausalLM.from_pretrained(folder)
model = PeftModel.from_pretrained(base, folder / "adapter", autocast_adapter_dtype=False)
tokenizer = AutoTokenizer.from_pretrained(folder)
```

- Load the base first, as above.  `adapter_config.json` names none: a relative path there would be
  looked up in the working directory, and what is not found there on the hub.
- `autocast_adapter_dtype=False`: by default PEFT computes 16-bit adapters in float32, which moves
  the logits of a bfloat16 model.
- Do not merge the adapter, as `merge_and_unload` does: S would no longer be sparse.
- vLLM takes adapters of rank up to 16 unless told otherwise.  The largest rank here is {rank}:

```bash
vllm serve "this folder" --enable-lora --max-lora-rank {served} \\
  --lora-modules lr="this folder/adapter"   # and ask for the model lr
```
"""

_GGUF = """\
# Base and LoRA adapter for llama.cpp

Written by `slr export --to gguf`.

| file | content |
| --- | --- |
| `base.gguf` | S, zeros included, matrices as {kind}; tokenizer and chat template |
{adapter}
{usage}
"""

_WITH = """\
Load both, with scale 1:

```bash
llama-cli -m base.gguf --lora adapter.gguf
```

Without the adapter the base is the sparse part alone, which is worse.  Do not merge the two: S
would no longer be sparse.  If layers differ in rank, `adapter.lora.alpha` is 0, by which llama.cpp
scales nothing; any other value it would divide by the rank of each layer."""

_WITHOUT = """\
The model has no low-rank part, so there is no adapter:

```bash
llama-cli -m base.gguf
```"""

SERVED = (8, 16, 32, 64, 128, 256, 320, 512)  # ranks that vLLM makes room for


def peft_readme(rank: int) -> str:
    """README.md of a base with an adapter for PEFT.

    Args:
        rank: the largest.
    """
    return _PEFT.format(rank=rank, served=next((r for r in SERVED if r >= rank), rank))


def gguf_readme(outtype: str, adapted: bool) -> str:
    """README.md of a base, with an adapter or not, for llama.cpp.

    Args:
        outtype: of the matrices.
        adapted: whether there is an adapter.
    """
    row = "| `adapter.gguf` | B and A of every layer that has them, a LoRA of scale 1 |\n"
    return _GGUF.format(
        kind=outtype.upper(), adapter=row if adapted else "", usage=_WITH if adapted else _WITHOUT
    )
