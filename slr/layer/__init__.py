"""ONE LAYER: S + B A as it is stored, and as it is multiplied on a CPU or a GPU.

Imports ``matrix``.
"""
