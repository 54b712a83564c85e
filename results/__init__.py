"""Numbers, published and measured, and what to measure; installed as ``slr.results``."""
