"""One clear error for what windows and seeds cannot be."""

from slr.matrix.checks import check_integer

__all__ = ["check_seed", "check_seqlen"]


def check_seed(seed: object) -> None:
    """Raise unless `seed` is an integer that generators take, with some more beside it.

    >>> check_seed(2**70)
    Traceback (most recent call last):
    ValueError: seed is 1180591620717411303424; it must be from -2^62 to 2^62
    """
    check_integer("seed", seed)
    if not -(2**62) <= seed <= 2**62:  # type: ignore[operator]
        raise ValueError(f"seed is {seed}; it must be from -2^62 to 2^62")


def check_seqlen(seqlen: object) -> None:
    """Raise unless `seqlen` is an integer of 2 or more: the first token is only ever context.

    >>> check_seqlen(0)
    Traceback (most recent call last):
    ValueError: seqlen is 0; a window needs at least 2 tokens
    """
    check_integer("seqlen", seqlen)
    if seqlen < 2:  # type: ignore[operator]
        raise ValueError(f"seqlen is {seqlen}; a window needs at least 2 tokens")
