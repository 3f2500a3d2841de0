"""The laws of every divergence, on models that hypothesis makes up: dense, in tiles without logits, and sharded.

Hidden states are the logits and the head is the identity, so that all three sums see the same numbers; words that a
model cannot say have a bias of -inf. Run as a script, this file is what each of three processes does.
"""

import math
import sys

import conftest  # noqa: F401 - also for the script: few threads
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from support.divergences import ROWS
from support.fused import EVERYTHING, limits
from support.processes import launch, leave

from klft.divergences import divergence
from klft.fused import linear_divergence
from klft.heads import LMHead
from klft.sharding import VocabShard

CLOSE = {"rtol": 1e-9, "atol": 1e-9}
NAMES = [(name, {"weight" if name == "jsd" else "alpha": p for p in params}) for name, params in ROWS]
WORDS, TOKENS = 7, 4


class Dense:
    """From logits."""

    def __call__(self, name, z, y, bias, ref_bias, **params):
        return divergence(z + bias, y + ref_bias, name, **params)


class Tiles:
    """From hidden states, in tiles of so many logits."""

    def __init__(self, tile):
        self.tile = tile

    def head(self, bias):
        return LMHead(torch.eye(len(bias)).double(), bias)

    def __call__(self, name, z, y, bias, ref_bias, **params):
        table, kind, changed = limits(tile_logits=self.tile, block_logits=max(1, self.tile // 3))
        before, table[kind] = table[kind], changed
        try:
            return linear_divergence(z, self.head(bias), y, self.head(ref_bias), divergence=name, **params)
        finally:
            table[kind] = before


class Shards(Tiles):
    """The same, with the words split over processes that have all tokens."""

    def head(self, bias):
        shard = VocabShard.even(len(bias))
        rows = slice(shard.start, shard.stop)
        return LMHead(torch.eye(len(bias)).double()[rows], bias[rows], shard=shard)


NUMBERS = st.one_of(
    st.floats(-3, 3), st.floats(-60, 60), st.sampled_from([0.0, 1.0, -1e4, 1e4, 1e-9, math.log(2)])
)  # fmt: skip


@st.composite
def two_models(draw):
    """(logits, ref_logits) [N, V], and which words each can say [V], as biases of 0 and -inf."""
    n, v = draw(st.integers(0, TOKENS)), draw(st.integers(1, WORDS))
    rows = st.lists(st.lists(NUMBERS, min_size=v, max_size=v), min_size=n, max_size=n)
    z = torch.tensor(draw(rows), dtype=torch.float64).reshape(n, v)
    kind = draw(st.sampled_from(["apart", "near", "equal"]))
    y = torch.tensor(draw(rows), dtype=torch.float64).reshape(n, v) if kind == "apart" else z.clone()
    if kind == "near":
        y = y + 1e-5 * torch.linspace(-1, 1, n * v, dtype=torch.float64).reshape(n, v)
    biases = []
    for _ in range(2):
        dead = draw(st.sets(st.integers(0, v - 1), max_size=v - 1))
        biases.append(torch.tensor([-math.inf if i in dead else 0.0 for i in range(v)], dtype=torch.float64))
    return z, y, *biases


def probabilities(z, y, bias, ref_bias):
    return torch.softmax(z + bias, -1), torch.softmax(y + ref_bias, -1)


def never_negative(value, models):
    for name, params in NAMES:
        assert bool((value(name, *models, **params) >= 0).all()), name


def nothing_between_equals(value, models):
    z, _, bias, _ = models
    for name, params in NAMES:
        assert bool((value(name, z, z.clone(), bias, bias, **params) == 0).all()), name


def what_leaves_distributions_alone_leaves_values(value, models):
    z, y, bias, ref_bias = models
    order = torch.arange(z.shape[1]).flip(0)
    for name, params in NAMES:
        truth = value(name, *models, **params)
        shifted = value(name, z + 3.7, y - 11.0, bias, ref_bias, **params)
        permuted = value(name, z[:, order], y[:, order], bias[order], ref_bias[order], **params)
        dead, wide = torch.full((2,), -math.inf).double(), torch.ones(len(z), 2).double()
        more = [torch.cat([z, wide], 1), torch.cat([y, -wide], 1), torch.cat([bias, dead]), torch.cat([ref_bias, dead])]
        for found in (shifted, permuted, value(name, *more, **params)):
            torch.testing.assert_close(found, truth, **CLOSE, msg=lambda m, n=name: f"{n}: {m}")
        padded = value(name, torch.cat([z, z.new_ones(2, z.shape[1])]), torch.cat([y, y.new_zeros(2, y.shape[1])]),
                       bias, ref_bias, **params)[: len(z)]  # fmt: skip
        torch.testing.assert_close(padded, truth, **CLOSE)


def mirrors(value, models):
    z, y, bias, ref_bias = models
    for one, other, params in [
        ("forward_kl", "reverse_kl", {}),
        ("skew_kl", "skew_reverse_kl", {"alpha": 0.2}),
        ("jsd", "jsd", {"weight": 0.5}),
        ("alpha_divergence", "alpha_divergence", {"alpha": 0.5}),
    ]:
        found = value(other, y, z, ref_bias, bias, **params)
        torch.testing.assert_close(value(one, *models, **params), found, **CLOSE)


def bounds(value, models):
    p, q = probabilities(*models)
    kl, js = value("reverse_kl", *models), value("jsd", *models, weight=0.5)
    assert bool((kl >= (p - q).abs().sum(-1) ** 2 / 2 - 1e-9).all())  # Pinsker: 2 TV^2
    chi2 = torch.where(p > 0, (p - q) ** 2 / q, q).sum(-1)
    assert bool((kl <= chi2.log1p() + 1e-9).all())
    assert bool((js <= math.log(2) + 1e-9).all())
    assert bool((value("skew_reverse_kl", *models, alpha=0.2) <= -math.log(0.2) + 1e-9).all())


def gradients_of_masked_tokens_are_zero_and_rows_sum_to_zero(value, models):
    z, y, bias, ref_bias = models
    for name, params in NAMES:
        leaf = z.clone().requires_grad_()
        values = value(name, leaf, y, bias, ref_bias, **params)
        weight = torch.where(values.detach().isfinite() & (torch.arange(len(z)) % 2 == 0), 1.0, 0.0)
        (gradient,) = torch.autograd.grad(values, leaf, weight.to(values))
        assert bool((gradient[weight == 0] == 0).all()), name
        assert bool(gradient.isfinite().all()), name
        size = gradient.abs().amax(-1, keepdim=True).clamp(min=1.0) if len(z) else gradient
        assert bool(((gradient / size).sum(-1).abs() < 1e-7).all()), name


LAWS = (
    never_negative, nothing_between_equals, what_leaves_distributions_alone_leaves_values, mirrors, bounds,
    gradients_of_masked_tokens_are_zero_and_rows_sum_to_zero,
)  # fmt: skip
SUMS = {"dense": Dense(), "tiles of 5": Tiles(5), "one tile": Tiles(EVERYTHING)}


def holds(law, value, examples, **more):
    """Checks a law of `value` on made-up models, the same ones each time."""

    @settings(max_examples=examples, derandomize=True, database=None, deadline=None,
              suppress_health_check=list(HealthCheck), **more)  # fmt: skip
    @given(two_models())
    def check(models):
        law(value, models)

    check()


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize(("value", "examples"), [
    ("dense", 40), ("tiles of 5", 5),
    *(pytest.param(value, 60, marks=pytest.mark.slow) for value in ("tiles of 5", "one tile")),
])  # fmt: skip
def test_law(law, value, examples):
    holds(law, SUMS[value], examples)


def test_a_law_can_be_broken():
    off_by_a_little = lambda name, z, y, *rest, **params: Dense()(name, z, y, *rest, **params) - 1e-6
    with pytest.raises(AssertionError):
        holds(never_negative, off_by_a_little, examples=60)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_laws_over_processes(processes):
    ended = launch(__file__, processes=processes, timeout=300)
    assert ended.returncode == 0, ended.stderr[-4000:]
    assert ended.stdout.count("all laws hold") == processes


if __name__ == "__main__":
    from accelerate import PartialState

    PartialState()
    for law in LAWS:  # no shrinking: a process that found something would be alone with it
        holds(law, Shards(5), examples=15, phases=(Phase.generate,))
    print("all laws hold")
    sys.stdout.flush()
    leave()
