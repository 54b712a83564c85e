"""Tables to reproduce, one JSON file each; installed as ``slr.specs``."""
