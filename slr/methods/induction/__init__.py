"""Sparsity induction: rescale a decoder block so that it prunes better, and change no output.

The scales, where they are absorbed and what they share: :mod:`slr.methods.induction.scales`.

**What a scale can change.**  Inside a pruned block scales cancel as they do in the dense one: all
they can change is the mask (and a repair).  Wanda's mask they cannot: column j has the score
\\|W_ij s_j\\| ‖X_j / s_j‖, the unscaled one, if norms are taken after scaling, and a row's scale is
common to all that it compares.  SparseGPT's score is invariant to columns but for its damping; for
a fraction, not for n:m, it compares across rows.  Magnitude masks change, and so does every repair
that weighs the entries of W alike.  With s_j = ‖X_j‖ magnitude *is* Wanda; to train s from there is
to train a Wanda whose norms were taken before the scaling.

**What a shift can change.**  Wanda's mask too: its score becomes \\|W_ij\\| ‖X_j + δ_j‖.  And what
is pruned is missed less, for the bias has the mean of it.  OPT has shifts in three places, LLaMA at
most in one (:mod:`slr.methods.induction.scales`).

**Where it does harm.**  A pruner that compares rows (SparseGPT for a fraction, a group of
``"matrix"``) takes the rows of up and v that were divided for unimportant: SparseGPT at 50% then
nearly doubles the embedded model's perplexity.  Keep those scales 1: ``fixed=ROWS``,
or :meth:`Induction.before`.

**What public text leaves open, and our choice.**  *Start*: s_j = ‖X_j‖^α.  *Gradient*: of magnitude
masks; hard going forward, a sigmoid of log₂(score / threshold) going back, the threshold
differentiable too.  *Output loss*: squared error of the pruned block's output over that of
leaving the block out.  *Spectral loss*, times λ: log of the stable rank ‖Z‖_F²/‖Z‖₂², the mean over
the four scaled inputs Z = X/s, ‖·‖₂ by power iteration on ZᵀZ (a norm alone would only shrink with
s); so the p of a Schatten norm does not occur.  *Shifts*: start at 0, are trained on the output
loss, as magnitude prunes, and do not count in Z.  *Inputs*: any; :func:`induce` gives a block those
of the dense model, a pipeline that prunes block by block those that the pruned blocks before it
make.  *Which epoch*: the best, the start included.

Source: *Sparsity Induction for Accurate Post-Training Pruning of Large Language Models*, 2026
(arXiv 2602.21652).  Book: chapter 16.
"""

from slr.methods.induction.options import Induction, check_pattern
from slr.methods.induction.scales import ROWS, Scales, absorb
from slr.methods.induction.training import Trained, induce, induce_block, train_scales

__all__ = [
    "ROWS", "Induction", "Scales", "Trained", "absorb", "check_pattern", "induce", "induce_block",
    "train_scales",
]  # fmt: skip
