"""A tokenizer in GGUF's form: byte-level BPE, as llama.cpp's ``gpt2`` vocabulary.

llama.cpp knows how a text is cut into words before the merges by a name alone
(``tokenizer.ggml.pre``), so a tokenizer that cuts in no way that is named here is refused: with
another name its ids would be others for some texts, silently.

Book: the page on the format.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from transformers import PreTrainedTokenizerBase

__all__ = ["write_vocabulary"]

# The regular expression of Llama 3's tokenizer.json.
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
KNOWN = "GPT-2's, SmolLM's (single digits first) and Llama 3's"


def write_vocabulary(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, size: int) -> None:
    """Add tokens, merges, special tokens and chat template to a GGUF file's metadata.

    Args:
        writer: of a base model.
        tokenizer: byte-level BPE of the ``tokenizers`` package.
        size: rows of the embedding; ids without a token get a placeholder.

    Raises:
        ValueError: another kind of tokenizer, or an id beyond `size`.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(
            f"tokenizer {type(tokenizer).__name__} has no tokenizer.json; --to gguf writes "
            "byte-level BPE of such a file"
        )
    raw = json.loads(backend.to_str())
    pre = _pre(raw)
    tokens, types = _tokens(raw, size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    merges = raw["model"]["merges"]
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    for name, add in (
        ("bos", writer.add_bos_token_id), ("eos", writer.add_eos_token_id),
        ("unk", writer.add_unk_token_id), ("pad", writer.add_pad_token_id),
    ):  # fmt: skip
        number = getattr(tokenizer, f"{name}_token_id", None)
        if number is not None:
            add(int(number))
    around = tokenizer("a").input_ids
    writer.add_add_bos_token(len(around) > 1 and around[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(len(around) > 1 and around[-1] == tokenizer.eos_token_id)
    writer.add_add_space_prefix(False)
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, str):
        writer.add_chat_template(template)


def _pre(raw: dict) -> str:
    """llama.cpp's name of the way in which a tokenizer.json cuts a text into words.

    Raises:
        ValueError: it is none of :data:`KNOWN`, or no byte-level BPE.
    """
    model, cut = raw["model"], raw.get("pre_tokenizer") or {}
    if model["type"] != "BPE" or model.get("byte_fallback") or raw.get("normalizer"):
        kind = "BPE with a normalizer or byte fallback" if model["type"] == "BPE" else model["type"]
        raise ValueError(f"tokenizer of kind {kind} is not supported; it must be byte-level BPE")
    steps: list[dict[str, Any]] = cut.get("pretokenizers", [cut])
    kinds = [step.get("type") for step in steps]
    last = steps[-1]
    if kinds[-1:] == ["ByteLevel"] and not last.get("add_prefix_space"):
        own, merged = last.get("use_regex", True), bool(model.get("ignore_merges"))
        if kinds == ["ByteLevel"] and own and not merged:
            return "gpt-2"
        digits = kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits")
        if digits and own and not merged:
            return "smollm"
        split = kinds == ["Split", "ByteLevel"] and steps[0].get("behavior") == "Isolated"
        if split and steps[0]["pattern"].get("Regex") == LLAMA_3 and not own and merged:
            return "llama-bpe"
    raise ValueError(
        f"tokenizer with pre-tokenizer {', '.join(map(str, kinds))} has no name that is known to "
        f"llama.cpp and to slr; it must be {KNOWN}"
    )


def _tokens(raw: dict, size: int) -> tuple[list[str], list[int]]:
    """Token and GGUF's token type of every id.

    Raises:
        ValueError: an id beyond `size`.
    """
    from gguf import TokenType

    found = {number: (token, TokenType.NORMAL) for token, number in raw["model"]["vocab"].items()}
    for added in raw["added_tokens"]:
        kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        found[added["id"]] = (added["content"], kind)
    if max(found) >= size:
        raise ValueError(f"tokenizer has the id {max(found)}; the embedding has {size} rows")
    every = [found.get(i, (f"[PAD{i}]", TokenType.UNUSED)) for i in range(size)]
    return [token for token, _ in every], [int(kind) for _, kind in every]
