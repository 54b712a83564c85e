"""MEASURING: perplexity, comparison with the source, agreement, tasks, published tables.

Imports ``checkpoint`` and below.
"""
