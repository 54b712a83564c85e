"""ONE FOLDER in, one folder out: reading, the journal, compressing, exporting, cards and sizes.

Imports ``methods`` and below.
"""
