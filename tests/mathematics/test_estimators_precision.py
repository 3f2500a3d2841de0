"""The estimators in fp32: every digit near zero and over all sizes, nothing clamped, limits that are finite."""

import math

import pytest
import torch
from support import oracles

import klft

INF = math.inf


@pytest.mark.parametrize("size", [1e-4, 1e-5, 1e-6, 1e-7])
def test_k3_is_accurate_near_zero(size):
    gen = torch.Generator().manual_seed(0)
    logp = -5 * torch.rand(10_000, generator=gen)
    # Small logp so that a difference of 1e-7 is more than one fp32 step.
    logp = logp * min(1.0, size * 1e4)
    ref_logp = logp + size * torch.randn(10_000, generator=gen)
    apart = logp != ref_logp
    for ours, truth in [(klft.k3, oracles.k3), (klft.forward_k3, oracles.forward_k3)]:
        value = ours(logp, ref_logp)
        assert value.dtype == torch.float32
        assert (value >= 0).all()
        assert (value[apart] > 0).all()
        # fp32 differences this small are exact; float64's own plain formula is good to 1e-16 / size^2 here
        log_r = ref_logp.double() - logp.double()
        exact = log_r**2 / 2 + log_r**3 / 6 + log_r**4 / 24
        if truth is oracles.forward_k3:
            exact = log_r.exp() * (log_r**2 / 2 - log_r**3 / 6 + log_r**4 / 24)
        relative = ((value.double() - exact).abs() / exact)[apart]
        assert relative.max() < 1e-6
        torch.testing.assert_close(truth(logp, ref_logp), exact, rtol=1e-6, atol=1e-15)
    naive = torch.exp(ref_logp - logp) - 1 - (ref_logp - logp)
    assert (naive < 0).float().mean() > 0.1 or size > 5e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_k3_over_all_sizes(dtype):
    # Around 1e-2 the series hands over to expm1: no step, no loss of digits on either side.
    size = torch.logspace(-7, 1.9, 400, dtype=dtype)
    log_ratio = torch.cat([-size, size])
    zero = torch.zeros_like(log_ratio)
    wide = log_ratio.double()
    exact = torch.where(
        wide.abs() < 0.1,
        sum(((-wide) ** n / math.factorial(n) for n in range(2, 14)), torch.zeros_like(wide)),
        torch.exp(-wide) - 1 + wide,
    )
    tolerance = 1e-12 if dtype == torch.float64 else 5e-5
    torch.testing.assert_close(klft.k3(log_ratio, zero).double(), exact, rtol=tolerance, atol=0)
    slope = oracles.value_and_gradient(klft.k3, log_ratio, zero)[1]
    torch.testing.assert_close(slope.double(), -torch.expm1(-wide), rtol=tolerance, atol=0)


def test_nothing_is_clamped():
    low, zero, high = torch.tensor([-200.0]), torch.tensor([0.0]), torch.tensor([200.0])
    assert klft.k3(low, zero).item() == INF
    assert klft.k1(low, zero).item() == -200
    assert klft.k2(low, zero).item() == 20_000
    assert klft.k3(high, zero).item() == 199
    assert klft.estimate_kl(low, zero, estimator="k3").item() == INF
    assert klft.k3(torch.tensor([-80.0]), zero).item() == pytest.approx(math.exp(80), rel=1e-5)
    assert klft.forward_k3(low, zero).item() == INF
    assert klft.forward_k1(low, zero).item() == INF


@pytest.mark.parametrize("log_ratio", [79.0, 81.0, 90.0, 200.0, 1e4, INF])
def test_forward_k3_is_finite_where_the_reference_has_no_mass(log_ratio):
    logp, ref_logp = torch.tensor([-1.0]), torch.tensor([-1.0 - log_ratio])
    value, gradient = oracles.value_and_gradient(klft.forward_k3, logp, ref_logp)
    assert value.item() == pytest.approx(1.0, abs=1e-6)
    assert gradient.isfinite().all()
    assert klft.forward_k1(logp, ref_logp).item() == pytest.approx(0.0, abs=1e-6)
