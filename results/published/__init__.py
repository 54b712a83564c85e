"""Published numbers with their sources, one JSON file a model; installed as ``slr.published``."""
