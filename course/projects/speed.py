"""Baseline of the project *Where does the time go?*: one layer, dense and compressed."""

from time import perf_counter

import torch

import slr
from course.projects import main


def milliseconds(call, repeats: int) -> float:
    """The best of some: what disturbs a measurement only makes it longer."""
    call()
    times = []
    for _ in range(repeats):
        start = perf_counter()
        call()
        times.append(perf_counter() - start)
    return 1e3 * min(times)


@torch.inference_mode()
def baseline(small: bool = False) -> list[dict]:
    """Milliseconds of y = W x, of S x + B (A x) and of its low-rank part, for some tokens."""
    size, rank, repeats = (256, 8, 2) if small else (2048, 64, 10)
    weight = torch.randn(size, size)
    mask = slr.prune(weight, "magnitude", "2:4").mask
    refined = slr.refine(weight, mask, rank, iterations=1)
    layer = slr.SLRLinear.from_refined(refined, pattern="2:4").eval()
    account = slr.matrix_account
    share = account((size, size), "2:4", rank, storage="2:4").bytes / account((size, size)).bytes
    rows = []
    for tokens in (1, 16, 256):
        x = torch.randn(tokens, size)
        dense = milliseconds(lambda x=x: x @ weight.T, repeats)
        sparse = milliseconds(lambda x=x: layer(x), repeats)
        low = milliseconds(lambda x=x: (x @ refined.A.T) @ refined.B.T, repeats)
        rows.append(
            {
                "tokens": tokens,
                "dense ms": dense,
                "S + BA ms": sparse,
                "BA ms": low,
                "bytes of dense": share,
                "time of dense": sparse / dense,
            }
        )
    return rows


if __name__ == "__main__":
    main(baseline)
