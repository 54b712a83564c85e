"""Programs that measure and print tables: ``python benchmarks/NAME.py``, or ``slr bench NAME``."""
