"""How to train the scales of a block: options, and whether they fit it.

For :mod:`slr.methods.induction`, which says what they mean.  Book: chapter 16.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn

from slr.matrix.patterns import Pattern, Unstructured, parse
from slr.methods.induction.families import dense_linears
from slr.methods.induction.scales import PLACES, ROWS

__all__ = ["Induction", "check_pattern"]


@dataclass(frozen=True)
class Induction:
    """How to train scales.

    Args:
        pattern: that the block is to be pruned to, or its name: ``"2:4"``, ``"0.5"``.
        start: α of the start s_j = ‖X_j‖^α, 0 ≤ α ≤ 1: 0 scales nothing, 1 makes magnitude Wanda.
        output: weight of the output loss; 0 trains on the spectral loss alone.
        spectral: λ, weight of the spectral loss.
        epochs: passes over the calibration windows; 0 keeps the start.
        rate: of Adam, falling linearly to 0; about the change of log₂ s in a step.
        temperature: of the sigmoid, in powers of 2 of score over threshold.
        powers_of_two: round the scales found, so that they are absorbed without rounding.
        fixed: names of scales that stay 1; :data:`ROWS` for a pruner that compares rows.

    Raises:
        ValueError: an option out of range.

    >>> Induction(start=2)
    Traceback (most recent call last):
    ValueError: start is 2; it must be from 0 to 1
    """

    pattern: str | Pattern = "2:4"
    start: float = 1.0
    output: float = 1.0
    spectral: float = 0.1
    epochs: int = 3
    rate: float = 0.01
    temperature: float = 0.3
    powers_of_two: bool = False
    fixed: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not parse(self.pattern).density:
            raise ValueError(f"pattern {self.pattern} keeps nothing; there is no mask to train for")
        if not 0 <= self.start <= 1:
            raise ValueError(f"start is {self.start}; it must be from 0 to 1")
        for name in ("output", "spectral", "epochs"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 0 or more")
        for name in ("rate", "temperature"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")
        for name in self.fixed:
            if name not in PLACES:
                raise ValueError(f"fixed names {name!r}; it may name {', '.join(PLACES)}")
        if self.epochs and not self.output and not self.spectral:
            raise ValueError("output and spectral are both 0; there is nothing to train on")

    @classmethod
    def before(cls, prune: str, pattern: str | Pattern) -> Induction:
        """Options for a pruner: scales that change rows stay 1 if it compares rows.

        Args:
            prune: one of :data:`slr.matrix.steps.PRUNERS`.
            pattern: as above.

        >>> Induction.before("sparsegpt", "0.5").fixed, Induction.before("wanda", "0.5").fixed
        (('hidden', 'value', 'rotary'), ())
        """
        found = parse(pattern)
        across = isinstance(found, Unstructured) and (
            found.group == "matrix" or prune == "sparsegpt"
        )
        return cls(pattern, fixed=ROWS if across else ())

    def weighed(self, losses: tuple[float, float]) -> float:
        """Sum of output and spectral loss by their weights."""
        return self.output * losses[0] + self.spectral * losses[1]


def check_pattern(block: nn.Module, options: Induction) -> None:
    """Raise ValueError unless `block` can be scaled and its linears pruned to the pattern.

    Cost: none; the weights need not be there.

    >>> import slr
    >>> check_pattern(slr.load("tiny").model.layers[0], Induction("1:5"))
    Traceback (most recent call last):
    ValueError: pattern 1:5 does not divide the 256 inputs of self_attn.q_proj
    """
    pattern = parse(options.pattern)
    for name, layer in dense_linears(block).items():
        if layer.in_features % getattr(pattern, "m", 1):
            raise ValueError(
                f"pattern {pattern} does not divide the {layer.in_features} inputs of {name}"
            )
