"""The embedded model: a small LLaMA that was really trained, inside the package.

``slr/tiny/model`` is a normal Hugging Face checkpoint (bfloat16 safetensors and a
byte-level BPE tokenizer); ``slr/tiny/README.md`` is its model card and
:mod:`examples.train_tiny` the program that made it.
"""

from pathlib import Path

__all__ = ["path"]


def path() -> Path:
    """Folder of the embedded model's checkpoint, for ``from_pretrained``.

    >>> (path() / "config.json").is_file()
    True
    """
    return Path(__file__).parent / "model"
