"""ONE MATRIX: tensors in, tensors out.  Pruning, refinement, metrics, low rank, what it costs.

Imports torch and numpy, and nothing of slr.
"""
