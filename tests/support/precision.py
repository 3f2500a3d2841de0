"""The three-way criterion for functions of hidden states: float64 is the truth, ours is never worse than naive."""

import torch

from support.divergences import naive
from support.oracles import TwoHeads

# Ours and naive round the same products and then differently: over any three seeds their errors have a ratio of 0 to
# 1.21, which is luck (as with klft's functions on logits); a row's rounded log-sum-exp alone would make it 2.
NOISE = 1.25


def error(found, truth):
    return (found.double() - truth).square().mean().sqrt().item()


def assert_never_worse(ours, plain, truth, noise=NOISE):
    for mine, other, true in zip(ours, plain, truth, strict=True):
        size = true.square().mean().sqrt().item()
        # One rounding of the result itself is not an error of the method.
        assert error(mine, true) <= noise * error(other, true) + torch.finfo(mine.dtype).eps * size


def pooled(runs):
    """Values and gradients of several seeds as one: a single one's error is mostly that of a few rounded sums."""
    return [torch.cat([x.flatten() for x in parts]) for parts in zip(*runs, strict=True)]


def near_heads(tokens, vocab, dim, spread, dtype, seed=0, **options):
    """Two heads over the same hidden states, rounded to dtype; logits of standard deviation 2."""
    gen = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, dim, generator=gen, dtype=torch.float64)
    weight, move = (2 / dim**0.5 * torch.randn(vocab, dim, generator=gen, dtype=torch.float64) for _ in range(2))
    ids, ref = torch.randint(vocab, (tokens,), generator=gen), weight + spread / 2 * move
    return TwoHeads(hidden, weight, None, hidden, ref, None, ids, options=options, ref_options=options).to(dtype)


def several(spread, dtype, **options):
    """A few seeds of it, and the same numbers in float64."""
    return [
        (two, two.to(torch.float64)) for two in (near_heads(64, 256, 16, spread, dtype, i, **options) for i in range(3))
    ]


def plain(two, name, *params):
    """As people write it: the logits in the models' precision, then the plain formula in fp32."""

    def fn(hidden, weight):
        logits, ref_logits = two.logits(hidden, weight).float(), two.ref_logits.float()
        if name == "entropy":
            lp = torch.log_softmax(logits, -1)
            return -(lp.exp() * lp).sum(-1)
        return naive(name, logits, ref_logits, *params)

    return fn
