"""Stages of ``benchmarks/gpu.py`` that compare a GPU with the CPU; one runs as a process.

python benchmarks/_gpu_checks.py kernels|backends|graphs|refinement|tuning [--dry]
"""

import copy
import tempfile
from functools import partial
from pathlib import Path

import torch
from _gpu_stage import EPS, Run, SkipCheck, distance, main, within
from refine import weight_of
from torch import Tensor, nn

import slr
from slr.checkpoint.folder import load_tokenizer
from slr.layer.backends import choose, machine
from slr.layer.few import few_tokens
from slr.layer.linear import SLRLinear
from slr.matrix.metric import Diagonal, Gram
from slr.model import data

SIXTEEN = (torch.float16, torch.bfloat16)
NEAR = 2e-3  # of an error, between two devices: another start of the solver changes half of it
CHOSEN = 1e-2  # the same where a mask is chosen: one rounding can change the rest of it
PERPLEXITY = 0.02


def name_of(dtype: torch.dtype) -> str:
    """Without ``torch.``."""
    return str(dtype).removeprefix("torch.")


def layer_of(m: int, n: int, rank: int, dtype: torch.dtype, bias: bool = True) -> SLRLinear:
    """A random 2:4 layer on the CPU."""
    W = torch.randn(m, n) / n**0.5
    mask = slr.patterns.parse("2:4").select(W.abs())
    B, A = torch.randn(m, rank) / max(rank, 1) ** 0.5, torch.randn(rank, n) / n**0.5
    b = torch.randn(m) if bias else None
    return SLRLinear(W * mask, B, A, b, mask=mask, pattern="2:4").to(dtype)


# ---- kernels: our own, called directly


def kernels(run: Run) -> None:
    """Few tokens by Triton against exact products, over shapes, dtypes, tokens, ranks and bias."""
    cases = [
        (4096, 4096, 128, True), (4096, 4096, 0, False), (11008, 4096, 128, False),
        (4096, 11008, 128, True), (129, 516, 100, True), (1000, 1028, 16, False),
        (40, 36, 1, True), (1, 4, 0, True), (256, 512, 256, False),
    ]  # fmt: skip
    if run.dry:
        cases = [(40, 64, 5, True), (17, 36, 0, False), (16, 128, 20, False)]
    for m, n, rank, bias in cases:
        for dtype in SIXTEEN:
            run.check(
                f"{m}x{n} rank {rank} {name_of(dtype)}{' bias' if bias else ''}",
                partial(kernel, run, m, n, rank, bias, dtype),
            )


def kernel(run: Run, m: int, n: int, rank: int, bias: bool, dtype: torch.dtype) -> dict:
    """One shape with several numbers of tokens."""
    where = machine(torch.device(run.device))
    try:
        choose((m, n), dtype, where, 1, backend="triton")
    except ValueError as reason:
        raise SkipCheck(str(reason)) from None
    layer = layer_of(m, n, rank, dtype, bias).requires_grad_(False)
    tokens = [1, 2, 17] if run.dry else [1, 2, 5, 16, 17, 33]
    x = torch.randn(max(tokens), n).to(dtype)
    S, B, A = layer.weight.double(), layer.B.double(), layer.A.double()
    wide, b = x.double(), layer.bias.double() if bias else torch.zeros(m).double()
    exact = wide @ S.T + wide @ A.T @ B.T + b
    size = wide.abs() @ S.abs().T + wide.abs() @ A.abs().T @ B.abs().T + b.abs()
    parts = (layer.values, layer.bitmask, None, layer.B, layer.A, layer.bias)
    there = [None if part is None else part.to(run.device) for part in parts]
    errors = {}
    for count in tokens:
        y = few_tokens(x[:count].to(run.device), *there, True, "triton")
        assert y.dtype == dtype, f"y is {y.dtype}"
        over = (y.cpu().double() - exact[:count]).abs() / (1e-6 + 2 * EPS[dtype] * size[:count])
        within(f"{count} tokens, worst entry over its bound", float(over.max()), 1.0)
        whole = distance(y, exact[:count]) / EPS[dtype]
        errors[str(count)] = within(f"{count} tokens, error in roundings", whole, 2.0)
    return {"error in roundings, by tokens": errors}


# ---- backends: a layer by each way, and its gradients


def backends(run: Run) -> None:
    """Forward and gradients of a layer by each backend against the CPU in float64."""
    shapes = [(1024, 2048), (4096, 11008), (100, 260)]
    dtypes = [*SIXTEEN, torch.float32]
    if run.dry:
        shapes, dtypes = [(32, 64), (20, 36)], [torch.float16, torch.float32]
    for m, n in shapes:
        for dtype in dtypes:
            layer = layer_of(m, n, 16, dtype)
            truth: dict[int, dict[str, Tensor]] = {}
            for backend in ("auto", "dense", "triton", "cutlass", "cusparselt"):
                run.check(
                    f"{backend} {m}x{n} {name_of(dtype)}",
                    partial(by_backend, run, backend, layer, truth),
                )


def outputs(layer: SLRLinear, x: Tensor, weight: Tensor) -> dict[str, Tensor]:
    """y, and the gradients of ⟨y, weight⟩ by x and all parameters."""
    x = x.detach().clone().requires_grad_()
    layer.zero_grad()
    y = layer(x)
    (y * weight).sum().backward()
    found = {"y": y.detach(), "x": x.grad}
    return found | {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}


def by_backend(run: Run, backend: str, layer: SLRLinear, truth: dict) -> dict:
    """One backend, with frozen values and with trained ones, for some numbers of tokens."""
    tokens, dtype = ([1, 20] if run.dry else [1, 16, 100]), layer.values.dtype
    g = torch.Generator().manual_seed(1)
    x = torch.randn(max(tokens), layer.in_features, generator=g).to(dtype)
    weight = torch.randn(max(tokens), layer.out_features, generator=g).to(dtype)
    if not truth:
        wide = copy.deepcopy(layer).double()
        truth |= {t: outputs(wide, x[:t].double(), weight[:t].double()) for t in tokens}
    mine = copy.deepcopy(layer).use_("dense").to(run.device)  # so that nothing else is prepared
    try:
        mine.use_(backend)
    except ValueError as reason:
        raise SkipCheck(str(reason)) from None
    bound = {torch.float32: 64 * EPS[torch.float32]}.get(dtype, 8 * EPS[dtype])
    errors: dict[str, float] = {}
    used = []
    for trained in (False, True):
        mine.values.requires_grad_(trained)
        for t in tokens:
            there = x[:t].to(run.device)
            used.append(f"{t}: {mine._backend(there, mine.values)}{', trained' * trained}")
            for part, value in outputs(mine, there, weight[:t].to(run.device)).items():
                what = f"{part}, {t} tokens{', values trained' if trained else ''}"
                error = within(what, distance(value, truth[t][part]), bound)
                errors[part] = max(errors.get(part, 0.0), error)
    return {"errors": errors, "used, by tokens": used, "values shared": mine.shared}


# ---- graphs: captured, replayed and compiled


def graphs(run: Run) -> None:
    """CUDA graphs and ``torch.compile`` of layers against eager calls."""
    m, n, rank = (32, 64, 4) if run.dry else (4096, 4096, 128)
    for tokens in [1, 20] if run.dry else [1, 16, 512]:
        for dtype in SIXTEEN[1:] if run.dry else SIXTEEN:
            about = {"tokens": tokens, "dtype": name_of(dtype)}
            layers = layer_of(m, n, rank, dtype), nn.SiLU(), layer_of(n, m, rank, dtype)
            model = nn.Sequential(*layers).requires_grad_(False).to(run.device)
            x = torch.randn(2, tokens, n, device=run.device).to(dtype)
            run.check("graph", partial(captured, run, model, x), **about)
            if dtype is torch.float16:
                continue
            modes = ["aot_eager"] if run.dry else ["default", "reduce-overhead"]
            for mode in modes:
                call = partial(compiled, model, x, mode)
                run.check("compile", call, **about, mode=mode)
            run.check("compile, gradients", partial(trained, model, x, modes[0]), **about)


@torch.no_grad()
def captured(run: Run, model: nn.Module, x: Tensor) -> dict:
    """A graph captured with one x and replayed with another."""
    if run.device != "cuda":
        raise SkipCheck("CUDA graphs need a CUDA device")
    first, other = x
    room, side = first.clone(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            model(room)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = model(room)
    room.copy_(other)
    graph.replay()
    torch.cuda.synchronize()
    return same(y, model(other))


def same(y: Tensor, eager: Tensor) -> dict:
    """Equal, or as good as."""
    allowed = 2 * EPS[eager.dtype]
    error = within("against eager", distance(y, eager), allowed)
    return {"equal": torch.equal(y, eager), "error": error}


def compiled_of(model: nn.Module, mode: str):
    """Without a graph break; ``aot_eager`` needs no compiler."""
    torch._dynamo.reset()
    options = {"backend": mode} if mode == "aot_eager" else {"mode": mode}
    return torch.compile(model, fullgraph=True, **options)


@torch.no_grad()
def compiled(model: nn.Module, x: Tensor, mode: str) -> dict:
    """Called several times, so that graphs of its own are recorded and replayed."""
    call = compiled_of(model, mode)
    for _ in range(3):
        call(x[0])
    return same(call(x[1]).clone(), model(x[1]))


def trained(model: nn.Module, x: Tensor, mode: str) -> dict:
    """Gradients of all parameters, compiled and eager."""
    mine = copy.deepcopy(model).requires_grad_(True)
    found = []
    for call in (mine, compiled_of(mine, mode)):
        mine.zero_grad()
        call(x[0]).float().square().mean().backward()
        found.append({name: p.grad.clone() for name, p in mine.named_parameters()})
    allowed = 8 * EPS[x.dtype]
    errors = [within(k, distance(found[1][k], v), allowed) for k, v in found[0].items()]
    return {"gradients": len(errors), "error": max(errors)}


# ---- refinement: the errors of one matrix


def refinement(run: Run) -> None:
    """Pruning and repairs of one matrix on both devices: the same errors, and true ones."""
    sizes = ["1024x1024:32", "1408x512:16"]
    if run.dry:
        sizes = ["160x144:3"]
    for size in sizes:
        shape, k = size.split(":")
        m, n = map(int, shape.split("x"))
        W, X = weight_of(m, n), torch.randn(2 * n, n) * torch.rand(n).add(0.1)
        H = (X.T @ X) / len(X)
        mask = slr.prune(W, "magnitude", "2:4").mask
        for name, (metric, near, call) in repairs(int(k), 8 if run.dry else 50).items():
            M = {"weights": torch.eye(n), "channels": H.diagonal().diag(), "outputs": H}[metric]
            made = partial(repaired, run, call, near, W, mask, H, M)
            run.check(f"{name} {size}", made)


def repairs(k: int, T: int) -> dict:
    """Ways to repair W on a mask, given H: what their error is of, how near, and a function."""

    def gram(**options):
        return lambda W, P, H: slr.refine(W, P, k, iterations=T, metric=Gram(H), **options)

    def weights(iterations=T, **options):
        return lambda W, P, H: slr.refine(W, P, k, iterations=iterations, **options)

    def channels(W, P, H):
        return slr.refine(W, P, k, iterations=T, metric=Diagonal(H.diagonal().sqrt()))

    return {
        "svd": ("weights", NEAR, lambda W, P, H: slr.svd_repair(W, P, k)),
        "eora": ("outputs", NEAR, lambda W, P, H: slr.svd_repair(W, P, k, Gram(H))),
        "paper": ("weights", NEAR, weights()),
        "paper, float32": ("weights", NEAR, weights(search_dtype=torch.float32)),
        "paper, exact": ("weights", NEAR, weights(solver="exact", iterations=max(4, T // 10))),
        "constant": ("weights", NEAR, weights(schedule="constant")),
        "accelerated": ("weights", NEAR, weights(schedule="accelerated")),
        "diagonal": ("channels", NEAR, channels),
        "gram": ("outputs", NEAR, gram()),
        "gram, mask by score": ("outputs", CHOSEN, gram(update_mask="2:4")),
        "gram, mask by admm": ("outputs", CHOSEN, gram(update_mask="2:4", search="admm")),
    }


def repaired(run: Run, call, near: float, W: Tensor, mask: Tensor, H: Tensor, M: Tensor) -> dict:
    """One repair on the CPU and on the device, and whether its error is what it says."""
    here = call(W, mask, H)
    there = call(W.to(run.device), mask.to(run.device), H.to(run.device))
    kept, chosen = there.sparse.cpu(), there.mask.cpu()
    assert not kept[~chosen].any(), "the sparse part is not zero off its mask"
    assert slr.patterns.parse("2:4").verify(chosen), "the mask is not 2:4"
    E = W.double() - kept.double() - there.B.cpu().double() @ there.A.cpu().double()
    true = float((E @ M.double() * E).sum().sqrt())
    off, apart = abs(there.error / true - 1), abs(there.error / here.error - 1)
    within("its error, against that of its parts", off, 1e-4)
    within("its error, against the CPU's", apart, near)
    return {"error": there.error, "on the CPU": here.error, "apart": apart}


# ---- tuning: a whole small model


def tuning(run: Run) -> None:
    """The embedded model compressed on both devices, with and without tuning: its perplexity."""
    folder, (seqlen, limit, samples) = slr.tiny.path(), (64, 4, 9) if run.dry else (128, 64, 16)
    tokenizer = load_tokenizer(folder)
    windows = data.windows(data.corpus("validation"), tokenizer, seqlen, limit)
    calibration = data.windows(data.corpus("calibration"), tokenizer, seqlen, samples)
    options = {"rank": 8, "iterations": 4, "skip": ["model.layers.[!0].*"]} if run.dry else {}
    recipes = {
        "magnitude, weights": slr.Recipe("magnitude", refine="weights", **options),
        "the default, tuned": slr.Recipe(**options, tune=2),
        "sparsegpt, outputs": slr.Recipe("sparsegpt", refine="activations", **options),
        "the default": slr.Recipe(**options),
    }
    for name, recipe in list(recipes.items())[: 2 if run.dry else None]:
        read = calibration if recipe.needs_data else None
        run.check(name, partial(tuned, run, recipe, read, windows))


def tuned(run: Run, recipe: slr.Recipe, calibration: Tensor | None, windows: Tensor) -> dict:
    """Compressed on either device; perplexities on the CPU, and of the second on the device."""
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for device in ("cpu", run.device):
            name = "CPU" if not found else "device"
            out = Path(scratch) / name
            slr.compress(slr.tiny.path(), recipe, out=out, device=device, calibration=calibration)
            found[name] = slr.perplexity(out, windows)
        narrow = {"device": run.device, "dtype": torch.bfloat16}
        found["device, bfloat16 there"] = slr.perplexity(out, windows, **narrow)
    for name, value in found.items():
        within(f"perplexity, {name}", abs(value / found["CPU"] - 1), PERPLEXITY)
    return {"perplexity": found}


if __name__ == "__main__":
    stages = {f.__name__: f for f in (kernels, backends, graphs, refinement, tuning)}
    raise SystemExit(main(stages))
