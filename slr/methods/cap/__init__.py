"""CAP: compression with global rank and sparsity optimisation (ICLR 2026).

Stage 1 (:mod:`slr.methods.cap.robust_pca`, :mod:`slr.methods.cap.pool`): robust PCA of every
matrix gives singular triplets and sparse entries as candidates.  Stage 2
(:mod:`slr.methods.cap.policy`): one Bernoulli policy over the candidates of all matrices is learned
under a budget of parameters for the whole model, from forward passes alone; the most probable are
kept, as S and B = U√Σ, A = √ΣVᵀ.  Two choices from the same candidates that look at no data are
there to compare with.

What the public text leaves open, and what is chosen here:

- the relative scaling of triplets and entries: groups of equal cost, see ``cap_candidates``;
- the metric of the projection and ε: see ``cap_policy``;
- where to start: at the uniform allocation, softened, so that what is gained was learned;
- the loss: of a batch less the dense model's on that batch, which takes away most of how batches
  differ, and which no choice can change;
- the entries' values: those of robust PCA.  ``refit=True`` goes beyond the paper: kept entries
  are W - B A, which costs no parameter and is exact there.

On the embedded model the candidates of the paper's λ are poor, see ``cap_candidates``: a magnitude
mask of the same size did better than every choice that was tried (``benchmarks/cap.py``).
``refit=True`` and a smaller ``balance_ratio`` mend most of that.

Book: part IV.
"""

from slr.methods.cap.allocation import METHODS, allocate, excess_loss, place
from slr.methods.cap.policy import Policy, choose, learn, project, soften
from slr.methods.cap.pool import Pool, block_candidates, pack, propose, unpack
from slr.methods.cap.robust_pca import Candidates, candidates
from slr.methods.cap.system import CAP

__all__ = [
    "CAP", "METHODS", "Candidates", "Policy", "Pool", "allocate", "block_candidates",
    "candidates", "choose", "excess_loss", "learn", "pack", "place", "project", "propose",
    "soften", "unpack",
]  # fmt: skip
