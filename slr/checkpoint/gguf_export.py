"""A compressed folder for llama.cpp: S as a base model, B and A as a LoRA adapter, in GGUF.

``base.gguf`` holds S as a dense matrix whose zeros are exact in every type that is offered, and
``adapter.gguf`` B and A, so that llama.cpp computes S x + B (A x).  Both are written tensor by
tensor by the ``gguf`` package and appear whole.

llama.cpp rotates neighbouring channels (2i, 2i + 1) of a head where transformers rotates channels
(i, i + d/2): rows of the query and key projections, of their biases and of their B are reordered.

Book: the page on the format.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slr.checkpoint.exported import gguf_readme
from slr.checkpoint.folder import load_tokenizer
from slr.checkpoint.gguf_file import Entry, write_file
from slr.checkpoint.gguf_vocabulary import write_vocabulary
from slr.checkpoint.journal import Journal
from slr.checkpoint.sizes import check_space
from slr.layer.linear import SLRLinear
from slr.matrix.checks import check_choice
from slr.model.stream import Stream

__all__ = ["OUTTYPES", "interleave", "outtype_of", "write"]

OUTTYPES = ("f32", "bf16", "f16", "q8_0", "q4_0")
FAMILIES = ("llama",)
BASE, ADAPTER = "base.gguf", "adapter.gguf"
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
ROPES = ("default", "linear", "llama3")  # whose frequencies depend on no length


def outtype_of(outtype: str | None, dtype: torch.dtype) -> str:
    """The type of the weights, as llama.cpp's converter names them.

    Args:
        outtype: one of :data:`OUTTYPES`, in any case; when ``None`` ``"f16"``, or ``"f32"`` for a
            model of 32 bits.
        dtype: of the model.

    Raises:
        ValueError: it is none of them.
    """
    if outtype is None:
        return "f16" if dtype.itemsize == 2 else "f32"
    check_choice("outtype", outtype.lower(), OUTTYPES)
    return outtype.lower()


def interleave(value: Tensor, heads: int) -> Tensor:
    """Rows of a query or key projection in llama.cpp's order: i and i + d/2 become neighbours.

    Args:
        value: (heads · d, …).
        heads: of the projection.

    >>> interleave(torch.arange(8), 2)
    tensor([0, 2, 1, 3, 4, 6, 5, 7])
    """
    halves = value.unflatten(0, (heads, 2, -1))
    return halves.transpose(1, 2).flatten(0, 2)


def write(stream: Stream, out: Path, outtype: str | None, key: dict) -> Path:
    """Write ``base.gguf`` and, if there are low-rank parts, ``adapter.gguf``.

    Args:
        stream: a compressed folder.
        out: folder to make.
        outtype: of matrices; see :func:`outtype_of`.  Where ``q8_0`` or ``q4_0`` is asked,
            embedding and head get ``q8_0``, and matrices whose rows are no multiple of 32 long
            ``f16``.  Vectors are always ``f32``; factors ``f32`` if `outtype` is, else ``f16``.
        key: what decides the result, see :class:`~slr.checkpoint.journal.Journal`.

    Returns:
        `out`.

    Raises:
        ValueError: a model type other than :data:`FAMILIES`, an unknown type, a tokenizer or a
            rotary embedding that llama.cpp does not have, or a value that its type cannot hold.
        ImportError: the package ``gguf`` is missing.

    Memory: a block or the embedding, and for the time of its conversion its copy.
    """
    _needs_gguf()
    config = stream.config
    _check(config)
    outtype = outtype_of(outtype, stream.dtype)
    base, pairs = _plan(stream, outtype), _pairs(stream, outtype)
    need = sum(entry.nbytes for entry in base)
    need += sum(entry.nbytes for pair in pairs.values() for entry in pair)
    check_space(need, out)
    tokenizer = load_tokenizer(stream.folder)
    with Journal(out, {**key, "outtype": outtype}) as journal:
        if BASE not in journal:
            about: Any = stream.about

            def describe(writer: Any) -> None:
                writer.add_type("model")
                name = Path(about["source"] or stream.folder).name
                _hyperparameters(writer, stream, name, outtype)
                write_vocabulary(writer, tokenizer, config.vocab_size)

            values = _values(stream)
            journal.add_file(BASE, lambda at: write_file(at, base, values, describe))
        if pairs and ADAPTER not in journal:
            ranks = {a.shape[0] for a, _ in pairs.values()}

            def adapt(writer: Any) -> None:
                writer.add_type("adapter")
                writer.add_string("adapter.type", "lora")
                # llama.cpp scales by alpha / rank of each pair, and by nothing if alpha is 0.
                writer.add_float32("adapter.lora.alpha", ranks.pop() if len(ranks) == 1 else 0.0)

            entries = [entry for pair in pairs.values() for entry in pair]
            factors = _factors(stream, pairs)
            journal.add_file(ADAPTER, lambda at: write_file(at, entries, factors, adapt))
        journal.add_text("README.md", gguf_readme(outtype, bool(pairs)))
        return journal.finish()


def _needs_gguf() -> None:
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise ImportError("writing GGUF files needs the package gguf: pip install gguf") from None


def _check(config: Any) -> None:
    """Raise ValueError unless llama.cpp computes what a configuration says."""
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"model type {config.model_type!r} cannot be written as GGUF yet; it must be "
            f"{' or '.join(FAMILIES)} (--to peft and --to dense write every type)"
        )
    if config.hidden_act != "silu":
        raise ValueError(f"hidden_act {config.hidden_act!r} is not llama.cpp's; it must be 'silu'")
    rope = (config.rope_parameters or {}).get("rope_type", "default")
    if rope not in ROPES:
        raise ValueError(f"rope_type {rope!r} is not supported; it must be {', '.join(ROPES)}")


def _heads(config: Any) -> dict[str, int]:
    """Heads of the projections whose rows are reordered, by their names in GGUF."""
    return {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}


def _rope_factors(stream: Stream) -> Tensor | None:
    """What rotary frequencies are divided by (d/2,), if not all by 1.

    Raises:
        ValueError: not every channel of a head is rotated.
    """
    config: Any = stream.config
    rotary: Any = stream.model.get_submodule("model.rotary_emb")
    found, d = rotary.inv_freq.double(), config.head_dim
    if 2 * len(found) != d:
        raise ValueError(
            f"{2 * len(found)} of the {d} channels of a head are rotated; it must be all"
        )
    plain = config.rope_parameters["rope_theta"] ** -(torch.arange(0, d, 2).double() / d)
    factors = plain / found.cpu()
    return None if torch.allclose(factors, torch.ones_like(factors), rtol=1e-5) else factors.float()


def _hyperparameters(writer: Any, stream: Stream, name: str, outtype: str) -> None:
    from gguf import GGML_QUANT_VERSION, LlamaFileType

    config: Any = stream.config
    kinds = {"f32": "ALL_F32"}
    writer.add_name(name)
    writer.add_file_type(LlamaFileType[kinds.get(outtype, f"MOSTLY_{outtype.upper()}")])
    if outtype.startswith("q"):
        writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _modules(block: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules with weights, by their names in GGUF."""
    for inner, module in block.named_modules():
        if inner in NAMES:
            yield NAMES[inner], module


def _outside(stream: Stream, last: bool) -> Iterator[tuple[str, str, nn.Module]]:
    """Name here, name in GGUF and module before the blocks, or after them."""
    for name, module in stream.outside().items():
        if f"{name}.weight" in stream.tied or name not in NAMES:
            continue
        if (NAMES[name] != "token_embd") == last:
            yield name, NAMES[name], module


def _kind(name: str, shape: tuple[int, ...], outtype: str) -> str:
    """GGUF's name of the type of one tensor."""
    if len(shape) == 1:
        return "F32"
    if not outtype.startswith("q"):
        return outtype.upper()
    if shape[-1] % 32:
        return "F16"
    return "Q8_0" if name.startswith(("token_embd", "output.")) else outtype.upper()


def _plan(stream: Stream, outtype: str) -> list[Entry]:
    """Every tensor of the base, in the order of :func:`_values`."""
    shapes: list[tuple[str, tuple[int, ...]]] = []

    def add(name: str, module: nn.Module) -> None:
        if isinstance(module, SLRLinear):
            shapes.append((f"{name}.weight", (module.out_features, module.in_features)))
        else:
            shapes.append((f"{name}.weight", tuple(module.get_parameter("weight").shape)))
        bias = getattr(module, "bias", None)
        if bias is not None:
            shapes.append((f"{name}.bias", tuple(bias.shape)))

    for _, name, module in _outside(stream, last=False):
        add(name, module)
    factors = _rope_factors(stream)
    if factors is not None:
        shapes.append(("rope_freqs.weight", tuple(factors.shape)))
    for i, block in enumerate(stream.blocks):
        for name, module in _modules(block):
            add(f"blk.{i}.{name}", module)
    for _, name, module in _outside(stream, last=True):
        add(name, module)
    return [Entry(name, shape, _kind(name, shape, outtype)) for name, shape in shapes]


def _values(stream: Stream) -> Iterator[Tensor]:
    """The tensors of the base, block by block."""
    heads = _heads(stream.config)

    def parts(name: str, module: Any) -> Iterator[Tensor]:
        for value in (module.weight, getattr(module, "bias", None)):
            if value is not None:
                yield interleave(value, heads[name]) if name in heads else value

    def outside(last: bool) -> Iterator[Tensor]:
        for full, name, module in _outside(stream, last):
            stream.fill(full, module)
            yield from parts(name, module)
            stream.empty(module)

    yield from outside(last=False)
    factors = _rope_factors(stream)
    if factors is not None:
        yield factors
    for _, _, block in stream.filled():
        for name, module in _modules(block):
            yield from parts(name, module)
    yield from outside(last=True)


def _pairs(stream: Stream, outtype: str) -> dict[str, tuple[Entry, Entry]]:
    """The entries of A and B, by the name of the layer here."""
    assert stream.about is not None
    kind, found = "F32" if outtype == "f32" else "F16", {}
    inside = f"{stream.blocks_name}."
    for full, layer in stream.about["layers"].items():
        if layer["rank"]:
            number, _, inner = full.removeprefix(inside).partition(".")
            name, (m, n), k = f"blk.{number}.{NAMES[inner]}.weight", layer["shape"], layer["rank"]
            found[full] = (
                Entry(f"{name}.lora_a", (k, n), kind),
                Entry(f"{name}.lora_b", (m, k), kind),
            )
    return found


def _factors(stream: Stream, pairs: dict[str, tuple[Entry, Entry]]) -> Iterator[Tensor]:
    """A and B of one layer after the other."""
    heads = _heads(stream.config)
    for full in pairs:
        yield stream.factor(full, "A")
        name, B = NAMES[full.split(".", 3)[3]], stream.factor(full, "B")
        yield interleave(B, heads[name]) if name in heads else B
