"""slr: language models as sparse + low rank, W ≈ S + B A.

One matrix: :func:`prune`, :func:`refine`, :func:`svd_repair`.  One layer: :class:`SLRLinear`.
One model: :func:`compress`, :func:`load`, :func:`perplexity`.  The book in this repository
derives and measures all of it.

The package has floors, each a folder that imports only lower ones: ``matrix``, ``layer``,
``model``, ``methods``, ``checkpoint``, ``evaluate``, and ``chapters`` for the book.
``import slr`` loads the first two, and torch; the others are imported when first used.
transformers is imported when a model is first touched, and then loads and saves compressed models
like any other.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from slr import tiny
from slr.layer.linear import SLRLinear
from slr.matrix import lowrank, patterns, pcp, statistics, steps
from slr.matrix.metric import Diagonal, Gram, Identity
from slr.matrix.patterns import NM, Unstructured
from slr.matrix.pruning import Pruned, prune
from slr.matrix.refinement import refine, svd_repair
from slr.matrix.result import Refined
from slr.matrix.rounding import Grid
from slr.matrix.statistics import GramStatistic, NormStatistic
from slr.model import hf

if TYPE_CHECKING:
    from slr.checkpoint.allocating import allocate
    from slr.checkpoint.compression import compress
    from slr.checkpoint.exporting import export
    from slr.checkpoint.folder import load, load_tokenizer
    from slr.checkpoint.sizes import checkpoint_account, model_account
    from slr.checkpoint.tuned import tune
    from slr.checkpoint.verification import verify
    from slr.evaluate.likelihood import perplexity
    from slr.layer.joint import compile_options
    from slr.methods.blockwise import compress_model
    from slr.methods.cap.system import CAP
    from slr.methods.losparse.system import LoSparse
    from slr.model import data
    from slr.model.account import matrix_account
    from slr.model.block import LayerReport
    from slr.model.calibrate import observe
    from slr.model.recipe import Recipe

__version__ = "0.1.0"

# Public names of the upper floors, and where they are.
LATER = {
    "CAP": "methods.cap.system",
    "LayerReport": "model.block",
    "LoSparse": "methods.losparse.system",
    "Recipe": "model.recipe",
    "allocate": "checkpoint.allocating",
    "checkpoint_account": "checkpoint.sizes",
    "compress": "checkpoint.compression",
    "compile_options": "layer.joint",
    "compress_model": "methods.blockwise",
    "export": "checkpoint.exporting",
    "load": "checkpoint.folder",
    "load_tokenizer": "checkpoint.folder",
    "matrix_account": "model.account",
    "model_account": "checkpoint.sizes",
    "observe": "model.calibrate",
    "perplexity": "evaluate.likelihood",
    "tune": "checkpoint.tuned",
    "verify": "checkpoint.verification",
}

hf.install()

__all__ = [
    "CAP",
    "NM",
    "Diagonal",
    "Gram",
    "GramStatistic",
    "Grid",
    "Identity",
    "LayerReport",
    "LoSparse",
    "NormStatistic",
    "Pruned",
    "Recipe",
    "Refined",
    "SLRLinear",
    "Unstructured",
    "allocate",
    "checkpoint_account",
    "compile_options",
    "compress",
    "compress_model",
    "data",
    "export",
    "load",
    "load_tokenizer",
    "lowrank",
    "matrix_account",
    "model_account",
    "observe",
    "patterns",
    "pcp",
    "perplexity",
    "prune",
    "refine",
    "statistics",
    "steps",
    "svd_repair",
    "tiny",
    "tune",
    "verify",
]


def __getattr__(name: str) -> Any:
    """A public name of an upper floor, imported when it is first asked for."""
    if name == "data":
        found = import_module("slr.model.data")
    elif name in LATER:
        found = getattr(import_module(f"slr.{LATER[name]}"), name)
    else:
        raise AttributeError(f"module 'slr' has no attribute {name!r}")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
