"""The sentences of docs/porting.md: where a name from TRL, verl or OpenRLHF has another value here."""

import math

import pytest
import torch
from support import oracles
from support.divergences import every_row, logits_pair, run

import klft

GENERATOR = torch.Generator().manual_seed(0)
X = 3 + 2 * torch.randn(4, 6, generator=GENERATOR, dtype=torch.float64)
MASK = torch.rand(4, 6, generator=GENERATOR) < 0.6
MASK[2] = False


def test_whitening_without_shift_scales_the_mean():
    mean, deviation = X[MASK].mean(), X[MASK].std(correction=0)
    white = klft.masked_whiten(X, MASK, shift_mean=False)
    assert white[MASK].mean().item() == pytest.approx((mean / deviation).item(), rel=1e-7)
    trl = torch.where(MASK, (X - mean) / deviation + mean, 0.0)
    torch.testing.assert_close(klft.masked_whiten(X, MASK) + torch.where(MASK, mean, 0.0), trl, rtol=1e-7, atol=1e-9)


def test_the_variance_has_no_correction():
    torch.testing.assert_close(klft.masked_var(X, MASK), X[MASK].var(correction=0))


def test_k3_is_never_clamped():
    logp, ref_logp = torch.tensor([-30.0, -200.0]), torch.tensor([-1.0, 0.0])
    value = klft.k3(logp, ref_logp)
    assert value[0] == pytest.approx(math.exp(29) - 30, rel=1e-6)
    assert value[1] == math.inf


@every_row
def test_log_probabilities_are_logits_too(name, params):
    logits, ref = logits_pair(16, 11)
    value, gradient = run(name, params, logits, ref)
    of_logps = lambda z: run_on_logps(name, params, z, ref)
    logp_value, logp_gradient = oracles.value_and_gradient(of_logps, logits)
    torch.testing.assert_close(logp_value, value, rtol=1e-11, atol=1e-14)
    torch.testing.assert_close(logp_gradient, gradient, rtol=1e-10, atol=1e-13)


def run_on_logps(name, params, logits, ref):
    return getattr(klft, name)(torch.log_softmax(logits, -1), torch.log_softmax(ref, -1), *params)


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_a_mean_over_one_dimension(dim):
    """The plain loop; 0 where nothing counts, and a NaN under the mask touches neither value nor gradient."""
    x = X.masked_fill(~MASK, math.nan)
    value, gradient = oracles.value_and_gradient(lambda t: klft.masked_mean(t, MASK, dim=dim), x)
    counts = MASK.sum(dim)
    want = torch.where(MASK, X, 0.0).sum(dim) / counts.clamp(min=1)
    torch.testing.assert_close(value, want, rtol=1e-14, atol=0)
    weights = torch.where(MASK, 1 / counts.clamp(min=1).unsqueeze(dim).double(), 0.0)
    torch.testing.assert_close(gradient, weights, rtol=1e-14, atol=0)
    if dim != 0:
        assert value[2] == 0
    doubled = klft.masked_mean(x, MASK, lambda t: 2 * t, dim=dim)  # two processes with the same tokens
    torch.testing.assert_close(doubled, value)
