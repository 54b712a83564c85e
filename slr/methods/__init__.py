"""SYSTEMS that compress a whole model: block by block (the book's own), CAP, LoSparse, induction.

They know blocks and models, never folders.  Imports ``model`` and below.
"""
