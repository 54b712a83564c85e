"""Assignment 5, a model at equal bytes: the model answer and the tests."""

# %% [markdown]
# # Assignment 5. At equal bytes
#
# *After chapter 9. 20 points, about three hours.* A compressed model is worth
# what the best other use of its bytes is not. The other use here is plain
# rounding: every weight as a whole number of few bits, times a scale that a
# group of neighbouring inputs shares. You write that, count bits a weight
# for both, and compare them on the embedded model.

# %%
import torch

import slr

# %% [markdown]
# **5a.** Round to `bits` bits: in each group of inputs of a row, the scale is
# the largest magnitude divided by $2^{b-1} - 1$, the weights become the
# nearest multiples of it. A group of zeros stays zero.


# %% question 5a
def rounded(weight, bits, group):
    """The matrix (m, n) of rounded values; group divides n."""
    # BEGIN SOLUTION
    m, n = weight.shape
    groups = weight.view(m, n // group, group)
    most = 2 ** (bits - 1) - 1
    scale = groups.abs().amax(-1, keepdim=True) / most
    scale = torch.where(scale > 0, scale, 1.0)
    return ((groups / scale).round() * scale).view(m, n)
    # END SOLUTION


# %% test 5a, 2 points
row = torch.tensor([[7.0, 3.2, 0.1, -6.9, 70.0, 32.0, 0.0, 0.0]])
expected = torch.tensor([[7.0, 3.0, 0.0, -7.0, 70.0, 30.0, 0.0, 0.0]])
assert torch.allclose(rounded(row, 4, 4), expected)

# %% hidden test 5a, 3 points
weight = torch.randn(16, 64) * torch.logspace(-2, 2, 16)[:, None]
for bits in (3, 4, 8):
    found = rounded(weight, bits, 32)
    step = weight.view(16, 2, 32).abs().amax(-1) / (2 ** (bits - 1) - 1)
    off = (weight - found).view(16, 2, 32).abs().amax(-1)
    assert bool((off <= 0.5001 * step).all()), "half a step at most"
assert not rounded(torch.zeros(2, 32), 4, 32).any(), "zeros"
assert torch.equal(rounded(found, 8, 32), found), "twice is once"

# %% [markdown]
# **5b.** Bits a weight. Rounded: each group also stores its scale, in 16
# bits. Sparse + low rank at 2:4: half of the values in 16 bits, two bits
# for the place of each, and two factors of rank $k$ in 16 bits.


# %% question 5b
def bits_rounded(bits, group):
    """Bits a weight, scales included."""
    # BEGIN SOLUTION
    return bits + 16 / group
    # END SOLUTION


# %% question 5b
def bits_sparse(shape, rank):
    """Bits a weight of S + B A at 2:4."""
    # BEGIN SOLUTION
    m, n = shape
    return 16 / 2 + 2 / 2 + 16 * rank * (m + n) / (m * n)
    # END SOLUTION


# %% test 5b, 1 point
assert bits_rounded(4, 32) == 4.5
assert bits_sparse((64, 64), 0) == 9

# %% hidden test 5b, 3 points
for shape, rank in (((256, 704), 8), ((4096, 4096), 128)):
    account = slr.matrix_account(shape, "2:4", rank, storage="2:4")
    bits = 8 * account.bytes / (shape[0] * shape[1])
    assert abs(bits_sparse(shape, rank) - bits) < 1e-9
assert bits_rounded(8, 64) == 8.25

# %% [markdown]
# **5c.** The fair opponent of a budget of bits a weight: the finest rounding,
# 2 to 8 bits, that does not take more. `None` if even 2 bits take more.


# %% question 5c
def opponent(budget, group):
    """The number of bits."""
    # BEGIN SOLUTION
    fits = [b for b in range(2, 9) if bits_rounded(b, group) <= budget]
    return max(fits, default=None)
    # END SOLUTION


# %% test 5c, 1 point
assert opponent(4.6, 32) == 4

# %% hidden test 5c, 2 points
assert opponent(4.5, 32) == 4, "as many bits are allowed"
assert opponent(4.4, 32) == 3, "the scales count"
assert opponent(2.4, 32) is None and opponent(100, 32) == 8

# %% [markdown]
# **5d.** Round a whole model: every linear layer of its decoder blocks, and
# nothing else. Embedding, norms and output head stay as they are.


# %% question 5d
def round_model(model, bits, group):
    """The same model, its blocks' linear layers rounded in place."""
    # BEGIN SOLUTION
    for module in model.model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            weight = module.weight.data
            module.weight.data = rounded(weight, bits, group)
    return model
    # END SOLUTION


# %% test 5d, 2 points
model = round_model(slr.load("tiny", dtype=torch.float32), 4, 32)
weight = model.model.layers[1].mlp.down_proj.weight.data
assert torch.allclose(rounded(weight, 4, 32), weight, atol=1e-6)

# %% hidden test 5d, 2 points
dense = slr.load("tiny", dtype=torch.float32)
model = round_model(slr.load("tiny", dtype=torch.float32), 3, 32)
for (name, before), after in zip(
    dense.named_parameters(), model.parameters(), strict=True
):
    inside = name.startswith("model.layers.") and "norm" not in name
    assert torch.equal(before, after) != inside, name

# %% [markdown]
# **5e.** Compare. For the token windows given, return perplexities of the
# dense model, of 2:4 with rank 8 refined (`slr.compress_model` with
# `prune="magnitude"`, `refine="weights"`, 10 iterations), of its fair
# opponent by 5c in groups of 32, and of 4 bits in groups of 32. For the
# budget take the layer with the *fewest* bits a weight, so that nobody can
# say that the opponent had more. Then write two sentences: which would you
# ship, and what speaks for the other?


# %% question 5e
def compare(windows):
    """{"dense": …, "2:4 + 8": …, "opponent": …, "4 bits": …}."""

    # BEGIN SOLUTION
    def fresh():
        return slr.load("tiny", dtype=torch.float32)

    recipe = slr.Recipe(
        prune="magnitude",
        pattern="2:4",
        refine="weights",
        rank=8,
        iterations=10,
    )
    sparse = fresh()
    reports = slr.compress_model(sparse, recipe)
    fewest = min(bits_sparse(report.shape, 8) for report in reports)
    models = {
        "dense": fresh(),
        "2:4 + 8": sparse,
        "opponent": round_model(fresh(), opponent(fewest, 32), 32),
        "4 bits": round_model(fresh(), 4, 32),
    }
    return {name: slr.perplexity(m, windows) for name, m in models.items()}
    # END SOLUTION


# %% test 5e, 2 points
tokenizer = slr.load_tokenizer("tiny")
text = slr.data.corpus("validation")
windows = slr.data.windows(text, tokenizer, seqlen=128, limit=4)
found = compare(windows)
assert set(found) == {"dense", "2:4 + 8", "opponent", "4 bits"}
assert found["dense"] < found["2:4 + 8"]

# %% hidden test 5e, 2 points
tokenizer = slr.load_tokenizer("tiny")
text = slr.data.corpus("validation")
windows = slr.data.windows(text, tokenizer, seqlen=128, limit=4)
found = compare(windows)
dense = slr.perplexity(slr.load("tiny", dtype=torch.float32), windows)
assert abs(found["dense"] - dense) < 1e-3 * dense
assert abs(found["opponent"] / dense - 1) < 0.01, "eight bits: nearly dense"
assert found["opponent"] < found["4 bits"] < found["2:4 + 8"]
