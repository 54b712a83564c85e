"""The faults that ``benchmarks/mutate_book.py`` plants: what is taught, and how to get it wrong.

Each is a change of the source of one module that someone might make by mistake and that leaves a
program which runs.  The chapters are those that teach what is spoilt: each of them has to notice.
"""

from dataclasses import dataclass

__all__ = ["FAULTS", "Fault"]


@dataclass(frozen=True)
class Fault:
    """One way to be wrong.

    Attributes:
        name: what is wrong.
        chapters: numbers of those that teach it.
        file: of the module, in ``slr``.
        changes: exact old text, which is there once, and new text.
    """

    name: str
    chapters: tuple[int, ...]
    file: str
    changes: tuple[tuple[str, str], ...]

    def planted(self, source: str) -> str:
        """The module with the fault.

        Raises:
            ValueError: an old text is not there exactly once.
        """
        for old, new in self.changes:
            if source.count(old) != 1:
                raise ValueError(
                    f"{self.name}: {old!r} is {source.count(old)} times in {self.file}"
                )
            source = source.replace(old, new)
        return source


def fault(name: str, chapters: tuple[int, ...], file: str, *changes: tuple[str, str]) -> Fault:
    """A fault from its changes one after the other."""
    return Fault(name, chapters, file, changes)


MASKS = [
    fault("magnitude keeps the smallest", (1,), "matrix/pruning.py",
          ("scores = weight.abs()", "scores = -weight.abs()")),
    fault("a mask of scores shifted by one column", (1, 3), "matrix/pruning.py",
          ("mask = pattern.chosen(scores)", "mask = pattern.chosen(scores).roll(1, 1)")),
    fault("n:m keeps the smallest", (2,), "matrix/patterns.py",
          ("kept = beaten < self.n", "kept = beaten >= self.m - self.n")),
    fault("an n:m mask shifted by one column", (2,), "matrix/patterns.py",
          ("kept.T.reshape(scores.shape)", "kept.T.reshape(scores.shape).roll(1, 1)")),
    fault("all ties of a threshold are kept", (2,), "matrix/patterns.py",
          ("equal & (equal.cumsum(1, dtype=torch.int32) > left)", "equal")),
    fault("a fraction of entries in floating point", (2,), "matrix/patterns.py",
          ("math.floor(Fraction(repr(float(self.sparsity))) * count)",
           "math.floor(self.sparsity * count)")),
    fault("Wanda without the norms", (3,), "matrix/pruning.py",
          ("scores = scores / unit_of(scores) * (norm / unit_of(norm))",
           "scores = scores / unit_of(scores)")),
    fault("SparseGPT without its update", (3,), "matrix/pruning.py",
          ("block[:, i:] -= torch.outer(errors[:, i], u[i, i:])", "pass"),
          ("W[:, right:] -= errors @ U[left:right, right:]", "pass")),
    fault("SparseGPT's update stops at a block of columns", (3,), "matrix/pruning.py",
          ("W[:, right:] -= errors @ U[left:right, right:]", "pass")),
    fault("dead inputs keep their weights", (3,), "matrix/pruning.py", ("W[:, dead] = 0", "pass")),
    fault("second moments not divided by the tokens", (3, 8), "matrix/statistics.py",
          ("self.total.float().div_(self.tokens).triu_()", "self.total.float().triu_()")),
    fault("the first token of each batch is left out", (3, 8), "matrix/statistics.py",
          ("        rows = self._rows(x)\n        for low",
           "        rows = self._rows(x)[1:]\n        for low")),
]  # fmt: skip

COUNTS = [
    fault("2:4 without the bytes of its places", (1,), "model/account.py",
          ("stored = m * n * (width / 2 + 1 / 8)", "stored = m * n * width / 2")),
    fault("a bitmask that takes no bytes", (2,), "model/account.py",
          ("stored = kept * width + m * n / 8", "stored = kept * width")),
    fault("one factor is counted, not both", (1, 12), "model/account.py",
          ("factors = rank * (m + n)", "factors = rank * m")),
    fault("a mask of codes that takes no bytes", (18, 19), "matrix/accounting.py",
          ("(mask if kept < m * n else 0)", "0")),
    fault("scales of groups that take no bytes", (18, 19), "matrix/accounting.py",
          ("_planes(kept, grid.bits) + 2 * groups", "_planes(kept, grid.bits)")),
    fault("bits packed highest first", (2, 17), "layer/bits.py",
          ('np.packbits(mask.cpu().numpy(), bitorder="little")', "np.packbits(mask.cpu().numpy())"),
          ('np.unpackbits(bits.numpy(), count=count, bitorder="little")',
           "np.unpackbits(bits.numpy(), count=count)")),
    fault("the two places of a 2:4 group exchanged", (17,), "layer/sparse24.py",
          ("CODES = [p[0] | p[1] << 2", "CODES = [p[1] | p[0] << 2")),
]  # fmt: skip

LOW_RANK = [
    fault("factors exchanged: B from V and A from U", (4,), "matrix/lowrank.py",
          ("return self.U * self.s.unsqueeze(-2), self.V.mT",
           "return self.V * self.s.unsqueeze(-2), self.U.mT")),
    fault("factors without the singular values", (4, 5), "matrix/lowrank.py",
          ("return self.U * self.s.unsqueeze(-2), self.V.mT", "return self.U, self.V.mT")),
    fault("the largest entry for the Frobenius norm", (4, 5), "matrix/metric.py",
          ("return float(E.double().norm())", "return float(E.double().abs().max())")),
    fault("a repair of one rank less", (4,), "matrix/oneshot.py",
          ("truncated_svd(rest * scale, rank)", "truncated_svd(rest * scale, max(1, rank - 1))")),
    fault("S is not corrected for B A", (5,), "matrix/refinement.py",
          ("return weight[..., rows, :] - last[0][..., rows, :] @ last[1]",
           "return weight[..., rows, :]")),
    fault("constant rank instead of the ramp", (5, 6), "matrix/refinement.py",
          ("rank if iterations == 1 else 1 + (rank - 1) * t // last for", "rank for")),
    fault("a ramp that arrives early", (5, 6), "matrix/refinement.py",
          ("1 + (rank - 1) * t // last for", "min(rank, 1 + rank * t // last) for")),
    fault("momentum with every schedule", (5, 6), "matrix/refinement.py",
          ('if schedule != "accelerated" or previous is None:', "if previous is None:")),
    fault("accelerated without momentum", (7,), "matrix/refinement.py",
          ("beta = (theta - 1) / following", "beta = 0.0")),
    fault("the tail by its largest singular value", (6,), "matrix/filled.py",
          ("float(every.s[..., rank:].double().norm())",
           "float(every.s[..., rank:].double().max())")),
    fault("each power step starts from a random subspace", (7,), "matrix/filled.py",
          ("V = self.V.to(self.filled.dtype)", "V = self._random().to(self.filled.dtype)")),
    fault("the search in bfloat16 is never left", (7,), "matrix/filled.py",
          ("if step:\n                self.filled = self.fine", "pass"),
          ("if share < CLOSE:\n            self.filled = self.fine", "pass")),
    fault("Ritz vectors V not divided by the singular values", (7,), "matrix/lowrank.py",
          ("V = Z @ (rotation * _inverse(s, kept).unsqueeze(-2)).to(Y.dtype)",
           "V = Z @ rotation.to(Y.dtype)")),
    fault("pursuit shrinks entries by λ, not λ over the penalty", (6, 15), "matrix/pcp.py",
          ("W - L + dual / penalty, lam / penalty", "W - L + dual / penalty, lam")),
    fault("robust PCA with 1/max(m, n) for λ", (15,), "matrix/pcp.py",
          ("lam = 1 / max(weight.shape) ** 0.5", "lam = 1 / max(weight.shape)")),
]  # fmt: skip

OUTPUTS = [
    fault("the factor of H transposed", (8,), "matrix/gram.py",
          ("U = torch.linalg.svd(rest @ factor,", "U = torch.linalg.svd(rest @ factor.T,")),
    fault("the error of the outputs without its root", (8,), "matrix/metric.py",
          ("* E).sum(dtype=torch.float64).clamp_min(0).sqrt())",
           "* E).sum(dtype=torch.float64).clamp_min(0))")),
    fault("H is never damped", (8,), "matrix/metric.py",
          ("H.diagonal().add_(self.damping * H.diagonal().mean())", "pass")),
    fault("the diagonal metric squared", (8,), "matrix/assembly.py",
          ("scale = metric.scale.to(like.device, like.dtype)",
           "scale = metric.scale.to(like.device, like.dtype).square()")),
    fault("ADMM forgets what it owes", (8,), "matrix/admm.py",
          ("u = target.sub_(D)", "u = target.sub_(D).zero_()")),
    fault("an aim without its ridge", (9,), "matrix/gram.py",
          ("H.diagonal().add_(RIDGE * H.diagonal().mean())",
           "H.diagonal().add_(1e-4 * H.diagonal().mean())")),
    fault("an aim away from what is lacking", (9,), "matrix/gram.py",
          ("(weight.float() + shift)", "(weight.float() - shift)")),
    fault("what is lacking not divided by the tokens", (9,), "matrix/statistics.py",
          ("(self.total / max(1, self.tokens)).float()", "self.total.float()")),
]  # fmt: skip

MODELS = [
    fault("the mean of the windows' perplexities", (1, 12), "model/losses.py",
          ("mean = float(losses.mean())", "mean = math.log(float(losses.exp().mean()))")),
    fault("the loss of half of each window", (1, 12), "model/losses.py",
          ("return torch.cat(found).view(len(ids), -1).mean(1)",
           "return torch.cat(found).view(len(ids), -1)[:, : ids.shape[1] // 2].mean(1)")),
    fault("the first windows instead of a spread", (1,), "model/data.py",
          ("return windows[[(i * count + first) // limit for i in range(limit)]]",
           "return windows[:limit]")),
    fault("blocks calibrated on what dense ones put out", (9,), "model/blocks.py",
          ('        yield index, f"{name}.{index}", block\n        for each in inputs:\n'
           "            if each is not None:\n                each.advance(index, block)\n",
           "        import copy\n\n        dense = copy.deepcopy(block)\n"
           '        yield index, f"{name}.{index}", block\n        for each in inputs:\n'
           "            if each is not None:\n                each.advance(index, dense)\n")),
    fault("the last block is left out of a stream", (10,), "model/calibrate.py",
          ("if self.to_end or index + 1 <", "if index + 1 <")),
    fault("a resumed run skips the reports of finished blocks", (10,), "checkpoint/compression.py",
          ("reports += done(name)\n                bar", "bar")),
    fault("a journal believes its files", (10,), "checkpoint/journal.py",
          (' and sha256(self.folder / name) == entry["sha256"]', "")),
    fault("digests are not compared", (10,), "checkpoint/digests.py",
          ("if sha256(there[name]) != listed[name]:", "if not there[name].is_file():")),
    fault("masks of the published table exchanged", (11, 12), "evaluate/tables.py",
          ('rows[f"{mask}/{repair}"] = row',
           'rows[f"{spec.masks[1 - spec.masks.index(mask)]}/{repair}"] = row')),
    fault("the group of a pattern is forgotten", (12,), "model/recipe.py",
          ("parse(pattern, group)", "parse(pattern)")),
    fault("an interval of two unpaired means", (11, 12), "chapters/measured.py",
          ("low, high = bootstrap(lower - upper)",
           "one, two = bootstrap(lower), bootstrap(upper)\n"
           "    low, high = one[0] - two[1], one[1] - two[0]")),
    fault("a ratio the wrong way round", (11,), "chapters/measured.py",
          ("return math.exp(lower.mean() - upper.mean())",
           "return math.exp(upper.mean() - lower.mean())")),
    fault("the losses of the other text", (11,), "chapters/measured.py",
          ('told = told if text is None else told.get("also", {}).get(text, {})', "")),
    fault("positions of padded questions not moved", (13,), "chapters/choices.py",
          ("(seen.cumsum(1) - 1).clamp(min=0)", "torch.arange(longest).expand_as(seen)")),
    fault("padding of questions is looked at", (13,), "chapters/choices.py",
          ("run(contexts, seen, (seen", "run(contexts, torch.ones_like(seen), (seen")),
    fault("padding of choices is scored", (13,), "chapters/choices.py",
          ("found.double().masked_fill(~real.to(found.device), 0.0)", "found.double()")),
    fault("KL from the compressed model", (13,), "evaluate/agree.py",
          ("(log_p.exp() * (log_p - log_q)).sum(-1)", "(log_q.exp() * (log_q - log_p)).sum(-1)")),
    fault("a bootstrap without replacement", (13,), "evaluate/agree.py",
          ("drawn = torch.randint(n, (resamples, n), generator=generator, device=device)",
           "drawn = torch.arange(n).expand(resamples, n)")),
    fault("an interval of 90% for one of 95%", (13,), "evaluate/agree.py",
          ("[(1 - level) / 2, (1 + level) / 2]", "[1 - level, level]")),
]  # fmt: skip

SYSTEMS = [
    fault("importance without smoothing", (14,), "methods/losparse/pruner.py",
          ("mean = self.beta1 * old + (1 - self.beta1) * now", "mean = now")),
    fault("importance without the gradient", (14,), "methods/losparse/pruner.py",
          ("(S.float() * (0 if grad is None else grad.float())).abs()", "S.float().abs()")),
    fault("a linear schedule of rows", (14,), "methods/losparse/pruner.py",
          ("(1 - min(max(done, 0.0), 1.0)) ** 3", "(1 - min(max(done, 0.0), 1.0))")),
    fault("the layer without U V x", (14,), "methods/losparse/linear.py",
          ("y = linear(linear(x, self.V), self.U, self.bias)",
           "y = linear(0 * linear(x, self.V), self.U, self.bias)")),
    fault("one row more than the budget", (14,), "methods/losparse/pruner.py",
          ("sizes[order].cumsum(0) <= budget", "sizes[order].cumsum(0) <= budget + sizes[order]")),
    fault("the plain projection on the budget", (15,), "methods/cap/policy.py",
          ("(c * (v - middle).clamp(0, 1))", "(c * (v - middle * c).clamp(0, 1))"),
          ("return (v - high).clamp(0, 1)", "return (v - high * c).clamp(0, 1)")),
    fault("CAP learns without a baseline", (15,), "methods/cap/policy.py",
          ("advantage = 0.0 if delta is None else loss - delta", "advantage = loss")),
    fault("CAP spends one unit too many", (15,), "methods/cap/policy.py",
          ("min(c[i], left // u[i] * u[i])", "min(c[i], -(-left // u[i]) * u[i])")),
    fault("CAP's greedy order not for a parameter", (15,), "methods/cap/pool.py",
          ("torch.cat([c.energy for c in self.found.values()]) / self.costs",
           "torch.cat([c.energy for c in self.found.values()])")),
    fault("a refit without B A", (15,), "methods/cap/robust_pca.py",
          ("return (weight.to(B.dtype) - B @ A) * mask, B, A, mask",
           "return weight.to(B.dtype) * mask, B, A, mask")),
    fault("induction without compensation in the norms", (16,), "methods/induction/scales.py",
          ("norm.weight.double(), (-logs[place]).exp2(), biases",
           "norm.weight.double(), None, biases")),
    fault("queries are scaled as keys are", (16,), "methods/induction/scales.py",
          ("spread(block, turning), -turning", "spread(block, -turning), -turning")),
    fault("scales by the squares of the norms", (16,), "methods/induction/loss.py",
          ("logs[name] = power / 2 * heard.log2()", "logs[name] = power * heard.log2()")),
    fault("a threshold at the least that is kept", (16,), "methods/induction/loss.py",
          ("(groups - (least + most) / 2) / temperature", "(groups - least) / temperature")),
]  # fmt: skip

LAYERS = [
    fault("few tokens without B A x", (17,), "layer/native.py",
          ("x.numel() // n, m, n, k,", "x.numel() // n, m, n, 0,")),
    fault("many tokens without B A x", (17,), "layer/linear.py",
          ("        if self.rank:\n            y.addmm_(linear(flat, A), B.T.to(y.dtype))\n", "")),
    fault("the GPU kernel without B A x", (17,), "layer/kernels.py",
          ("RANK=padded, SLAB=slab", "RANK=0, SLAB=slab")),
    fault("many tokens by blocks of rows without S x", (17,), "layer/product.py",
          ("torch.mm(x, S.T, out=y[:, some])", "torch.mm(x, 0 * S.T, out=y[:, some])")),
    fault("a backend that cannot be used is taken", (17,), "layer/backends.py",
          ("if problem:\n        raise ValueError(f\"backend",
           "if problem == backend:\n        raise ValueError(f\"backend")),
    fault("a card without units for 2:4 is given them", (17,), "layer/backends.py",
          ("FIRST = (8, 0)  #", "FIRST = (7, 0)  #")),
    fault("a grid that need not hold zero", (18,), "matrix/rounding.py",
          ("low, high = low.clamp_max(0), high.clamp_min(0)", "pass")),
    fault("scales rounded to the nearest bfloat16", (18,), "matrix/rounding.py",
          ("torch.where(stored.float() < exact, bits + 1, bits)", "bits")),
    fault("rounding without feedback", (18,), "matrix/codes.py",
          ("block[i + 1 :].addr_(u[i, i + 1 :], errors[i], alpha=-1)", "pass"),
          ("T[right:].addmm_(U[left:right, right:].T, errors, alpha=-1)", "pass")),
    fault("feedback stops at a block of columns", (18,), "matrix/codes.py",
          ("T[right:].addmm_(U[left:right, right:].T, errors, alpha=-1)", "pass")),
    fault("descent does not see what it has moved", (18,), "matrix/codes.py",
          ("image.addmm_(H[:, left:right], moved, alpha=-1)", "pass")),
    fault("the alternation starts at S alone", (18,), "matrix/alternation.py",
          ("[_Path(none), _Path(sides.low_rank(work, None))]", "[_Path(none)]")),
    fault("S does not make up for rounded factors", (18,), "matrix/alternation.py",
          ("rounded = sides.settled(work - low.B @ low.A, rounded)", "pass")),
    fault("symmetric grids, as of factors, of half the range", (18,), "matrix/rounding.py",
          ("torch.maximum(high, -low) * 2 / (most - least)",
           "torch.maximum(high, -low) / (most - least)")),
    fault("the layer of codes without B A x", (18,), "layer/by_codes.py",
          ("(x, S, B, A, self.bias)", "(x, S, 0 * B, A, self.bias)")),
    fault("a league by the bytes of the whole model", (19,), "evaluate/league.py",
          ('bits = 8 * told["in_layers"]', 'bits = 8 * told["bytes"]')),
    fault("of two of equal size the worse one on the frontier", (19,), "evaluate/league.py",
          ("key=lambda p: (p.bits, value[p])", "key=lambda p: (p.bits, -value[p])")),
    fault("distillation with the divergence turned round", (19,), "model/distillation.py",
          ("log_q.sub_(log_p).mul_(q)", "(log_p - log_q).mul_(log_p.exp())")),
]  # fmt: skip

FAULTS = [*MASKS, *COUNTS, *LOW_RANK, *OUTPUTS, *MODELS, *SYSTEMS, *LAYERS]
