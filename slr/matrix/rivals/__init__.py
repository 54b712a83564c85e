"""RIVALS: other papers' one-shot methods for W ≈ S + B A, to compare with, a module each.

Repairs like those of :mod:`slr.matrix.steps`, which lists them.  Imports only ``slr.matrix``.
"""

from slr.matrix.rivals.basil import ThreeBASiL
from slr.matrix.rivals.hassle import HASSLEFree
from slr.matrix.rivals.oats import OATS
from slr.matrix.rivals.slim import SLiM

__all__ = ["OATS", "HASSLEFree", "SLiM", "ThreeBASiL"]
