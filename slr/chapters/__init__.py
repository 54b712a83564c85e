"""THE BOOK: what only chapters use, figures and local tasks.

Imports any floor; no floor imports it.
"""
