"""ONE MODEL, loaded or streamed: recipe, text, the walk over its blocks, transformers, processes.

Imports ``matrix`` and ``layer``.
"""
