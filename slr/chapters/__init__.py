"""THE BOOK: what only chapters use, figures, local tasks and recorded results.

Imports any floor; no floor imports it.
"""
