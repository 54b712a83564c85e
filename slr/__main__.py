"""``python -m slr`` is the ``slr`` command."""

from slr.cli import main

if __name__ == "__main__":
    main()
