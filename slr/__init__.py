"""slr: language models as sparse + low rank, W ≈ S + B A.

One matrix: :func:`prune`, :func:`refine`, :func:`svd_repair`.  One layer: :class:`SLRLinear`.
One model: :func:`compress`, :func:`load`, :func:`perplexity`.  The book in this repository
derives and measures all of it.

``import slr`` loads torch only; transformers is imported when a model is first touched, and
then loads and saves compressed models like any other.
"""

from slr import data, patterns, plugin, tiny
from slr.checkpoint import load, load_tokenizer
from slr.compress import compress, compress_model
from slr.evaluate import perplexity
from slr.layers import LayerReport
from slr.linear import SLRLinear
from slr.metric import Diagonal, Gram, Identity
from slr.prune import Pruned, prune
from slr.recipe import Recipe
from slr.refine import Refined, refine, svd_repair

__version__ = "0.1.0"

plugin.install()

__all__ = [
    "Diagonal",
    "Gram",
    "Identity",
    "LayerReport",
    "Pruned",
    "Recipe",
    "Refined",
    "SLRLinear",
    "compress",
    "compress_model",
    "data",
    "load",
    "load_tokenizer",
    "patterns",
    "perplexity",
    "prune",
    "refine",
    "svd_repair",
    "tiny",
]
