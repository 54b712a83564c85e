"""LoSparse: U V + S, with whole rows of S pruned while the model is fine-tuned.

Each weight W (m, n) becomes U V + S: the low-rank part holds what neurons share, S what is one
neuron's own.  U and V are trained and never pruned; of S, the rows (output neurons) whose
smoothed sensitivity is lowest are removed on a cubic schedule, over all matrices at once.

    convert(model, rank_ratio=0.1)              # U V + S, by SVD: the same function as before
    optimizer = ...                             # after that, for the parameters are new
    pruner = Pruner(model, remaining=0.2, steps=1000, warmup=100, cooldown=300)
    for batch in batches:
        model(**batch).loss.backward()
        pruner.observe()                        # before the step: |S ∘ ∇S|
        optimizer.step()
        pruner.step()                           # after it: prune, and zero what was pruned
        optimizer.zero_grad()
    compact(model)                              # pruned rows leave
    save(model, "model.safetensors")            # or to_slr(model): this package's checkpoints

or ``Trainer(..., callbacks=[callback(pruner)])``, or :func:`train` for all of it on a causal
language model.  The published distillation is a second phase: the model that came out, compact
and perhaps from a file, learns from the dense one, and nothing is pruned any more
(:func:`teach`, :class:`Distillation`).  Two baselines take the same path: ``"itp"``, iterative
structured pruning of S = W, and ``"lowrank"``, U V alone.

What the public text leaves open, or its code does otherwise, and what is done here:

- A neuron is a **row** of W (out, in); the paper writes W the other way round.  Its score is the
  mean over its entries of Ī, or of Ī·Ū with the uncertainty term.
- The fraction p_t counts entries of S, as in the code: rows of any width compete by score alone.
- Pruned rows stay pruned.  In the paper's formula a row could return, though the sensitivity of
  a zero row is zero.  The code zeroes rows, every ``deltaT`` steps, and lets gradients and momentum
  move them again in between; then all rows compete anew: ``Pruner(..., regrow=10)``.
- Sensitivity is taken with the weights of its gradient; the code multiplies by those after the
  step, and so does `regrow` (before it a row just pruned would have none).  The code averages I
  over windows of ``deltaT``; here it is smoothed at every step.
- How the remaining ratio is shared between U V and S: ``rank_ratio`` is given.  Published scripts
  use 5% + 15% (MNLI) and 35% + 5% (XSum).
- The remaining ratio counts U, V and S over the replaced matrices; biases and row indices do not
  count (they do in bytes).

Gradients must be whole on each process: DDP is fine, sharded training (FSDP, ZeRO-3) is not.

Source: Li et al. 2023, "LoSparse" (ICML); uncertainty: Zhang et al. 2022, "PLATON".
Book: chapter 14.
"""

from slr.methods.losparse.distil import Distillation, distillation_loss
from slr.methods.losparse.fitting import fit, teach, train
from slr.methods.losparse.linear import (
    MODES,
    LoSparseLinear,
    account,
    convert,
    layers,
    remaining_ratio,
)
from slr.methods.losparse.pruner import Pruner, cubic, keep_rows
from slr.methods.losparse.system import LoSparse
from slr.methods.losparse.trained import callback, compact, load, save, to_slr

__all__ = [
    "MODES", "Distillation", "LoSparse", "LoSparseLinear", "Pruner", "account", "callback",
    "compact", "convert", "cubic", "distillation_loss", "fit", "keep_rows", "layers", "load",
    "remaining_ratio", "save", "teach", "to_slr", "train",
]  # fmt: skip
