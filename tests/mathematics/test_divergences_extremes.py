"""The dense divergences where numbers end: -inf, NaN and huge logits, and a real vocabulary in low precision."""

import math

import pytest
import torch
from support import oracles
from support.divergences import every_row, logits_pair, naive, ours, run

import klft
from klft import divergences

INF = math.inf

# --- extremes --------------------------------------------------------------------------------------------------------


@every_row
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_minus_inf_in_both_models(name, params, dtype):
    logits, ref = logits_pair(8, 9, dtype=dtype)
    for column in (0, 4, 8):
        logits[:, column] = ref[:, column] = -INF
    alive = logits[0] > -INF
    value, gradient = run(name, params, logits, ref)
    true_value, true_gradient = oracles.value_and_gradient(
        getattr(oracles, name), logits[:, alive].double(), ref[:, alive].double(), *params
    )
    # Gradients are differences of terms of order 1; a 16-bit one is rounded once more at the end.
    rtol, atol = {torch.float64: (1e-12, 1e-15), torch.float32: (1e-5, 3e-7), torch.bfloat16: (4e-3, 3e-7)}[dtype]
    torch.testing.assert_close(value.double(), true_value, rtol=min(rtol, 1e-5), atol=atol)
    torch.testing.assert_close(gradient[:, alive].double(), true_gradient, rtol=rtol, atol=atol)
    assert torch.equal(gradient[:, ~alive], torch.zeros(8, 3, dtype=dtype))


def test_minus_inf_in_one_model():
    logits, ref = logits_pair(4, 5)
    cut_ref, cut_logits = ref.clone(), logits.clone()
    cut_ref[:, 2] = -INF
    cut_logits[:, 2] = -INF
    everywhere = torch.full((4,), INF, dtype=torch.float64)
    assert torch.equal(klft.reverse_kl(logits, cut_ref), everywhere)
    assert torch.equal(klft.forward_kl(cut_logits, ref), everywhere)
    # The other way round the token has no weight, and the KL is finite with a finite gradient.
    for name, pair in [("reverse_kl", (cut_logits, ref)), ("forward_kl", (logits, cut_ref))]:
        value, gradient = run(name, (), *pair)
        lp, lq = (torch.log_softmax(x, -1) for x in pair)
        w, v = (lp, lq) if name == "reverse_kl" else (lq, lp)
        keep = [0, 1, 3, 4]
        true_value = (w.exp() * (w - v))[:, keep].sum(-1)
        torch.testing.assert_close(value, true_value, rtol=1e-12, atol=0)
        true_gradient = lp.exp() * (lp - lq - value.unsqueeze(-1)) if name == "reverse_kl" else lp.exp() - lq.exp()
        true_gradient[:, 2] = 0.0 if name == "reverse_kl" else lp.exp()[:, 2]
        torch.testing.assert_close(gradient, true_gradient, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("params", [("jsd", 0.5), ("jsd", 0.1), ("skew_kl", 0.1), ("skew_reverse_kl", 0.1)])
@pytest.mark.parametrize("side", ["policy", "reference"])
def test_bounded_divergences_stay_finite_where_one_model_has_no_mass(params, side):
    name, param = params
    logits, ref = logits_pair(4, 5)
    (logits if side == "policy" else ref)[:, 2] = -INF
    # -1e3 is no mass either: its exp underflows to 0 in float64.
    stand_in = [x.masked_fill(x == -INF, -1e3) for x in (logits, ref)]
    value, gradient = run(name, (param,), logits, ref)
    assert value.isfinite().all()
    assert gradient.isfinite().all()
    near_value, near_gradient = run(name, (param,), *stand_in)
    torch.testing.assert_close(value, near_value, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, near_gradient, rtol=1e-12, atol=1e-15)


@every_row
@pytest.mark.parametrize("poison", [math.nan, INF])
def test_what_is_no_distribution_has_no_divergence(name, params, poison):
    for model in (0, 1):
        pair = logits_pair(4, 7)
        pair[model][1, 3] = poison
        value, gradient = run(name, params, *pair)
        assert value.isnan().tolist() == [False, True, False, False]
        assert gradient[1].isnan().any()
        assert gradient[[0, 2, 3]].isfinite().all()


def test_entropy_of_what_is_no_distribution():
    logits, _ = logits_pair(3, 7)
    logits[1, 3], logits[2, 0] = math.nan, INF
    value, gradient = oracles.value_and_gradient(klft.entropy, logits)
    assert value.isnan().tolist() == [False, True, True]
    assert gradient[0].isfinite().all()


@every_row
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_huge_logits_and_one_hot_rows(name, params, dtype):
    one_hot = torch.full((4, 6), -1e4, dtype=dtype)
    one_hot[:, 1] = 1e4
    other = one_hot.roll(1, -1)
    flat = torch.zeros(4, 6, dtype=dtype)
    equal, gradient = run(name, params, one_hot, one_hot.clone())
    assert torch.equal(equal, torch.zeros_like(equal))
    assert torch.equal(gradient, torch.zeros_like(gradient))
    bounded = name in ("jsd", "skew_kl", "skew_reverse_kl") or (name, params) == ("alpha_divergence", (0.5,))
    for pair in [(one_hot, other), (one_hot, flat), (flat, one_hot)]:
        value, gradient = run(name, params, *pair)
        assert not value.isnan().any()
        assert (value >= 0).all()
        if bounded or name in ("reverse_kl", "forward_kl"):
            assert value.isfinite().all()
            assert gradient.isfinite().all()


@pytest.mark.parametrize("gap", [10.0, 40.0, 1e3, 1e4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_renyi_of_two_models_far_apart(gap, dtype):
    # log(2 exp(gap/2) + 4) / (1 + ...) by hand: sqrt(pq) is largest on the two tokens the models prefer.
    logits, ref = torch.zeros(1, 6, dtype=dtype), torch.zeros(1, 6, dtype=dtype)
    logits[:, 1], ref[:, 2] = gap, gap
    log_norm = gap + math.log1p(5 * math.exp(-gap))
    log_sum = gap / 2 + math.log(2 + 4 * math.exp(-gap / 2)) - log_norm
    value, gradient = run("renyi_divergence", (0.5,), logits, ref)
    assert value.item() == pytest.approx(-2 * log_sum, rel=1e-5)
    assert gradient.isfinite().all()


def test_known_values_of_huge_logits():
    one_hot = torch.full((1, 6), -1e4)
    one_hot[:, 1] = 1e4
    other, flat = one_hot.roll(1, -1), torch.zeros(1, 6)
    assert klft.reverse_kl(one_hot, other).item() == klft.forward_kl(one_hot, other).item() == 2e4
    assert klft.reverse_kl(one_hot, flat).item() == pytest.approx(math.log(6), rel=1e-6)
    assert klft.forward_kl(flat, one_hot).item() == pytest.approx(math.log(6), rel=1e-6)
    assert klft.forward_kl(one_hot, flat).item() == pytest.approx(2e4 * 5 / 6 - math.log(6), rel=1e-6)
    assert klft.jsd(one_hot, other).item() == pytest.approx(math.log(2), rel=1e-6)
    assert klft.entropy(one_hot).item() == 0.0
    assert klft.entropy(flat).item() == pytest.approx(math.log(6), rel=1e-6)


# --- low precision ---------------------------------------------------------------------------------------------------

VOCAB = 151_936


def near_pair(dtype, rows=3):
    """Two models 5e-7 nats apart that `dtype` can tell apart."""
    gen = torch.Generator().manual_seed(0)
    logits = (2 * torch.randn(rows, VOCAB, generator=gen)).to(dtype)
    if dtype == torch.float32:
        return logits, logits + 1e-3 * torch.randn(rows, VOCAB, generator=gen)
    # One bf16 step is 2^-6 for values in [2, 4): moving tokens of mass m by it gives a KL of about m 2^-12 / 2.
    step, movable = 2.0**-6, (logits >= 2) & (logits < 3.9)
    mass = torch.softmax(logits.float(), -1)[movable].sum() / rows
    moved = movable & (torch.rand(rows, VOCAB, generator=gen) < 2 * 5e-7 / step**2 / mass)
    return logits, torch.where(moved, logits + step, logits)


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_real_vocabulary_near_zero(name, dtype):
    logits, ref = near_pair(dtype)
    truth = getattr(oracles, name)(logits, ref)
    assert ((truth > 2e-7) & (truth < 2e-6)).all(), truth
    value = ours(name)(logits, ref)
    assert value.dtype == torch.float32
    assert (value >= 0).all()
    assert ((value.double() - truth).abs() < 1e-3 * truth).all(), (value, truth)
    assert torch.equal(ours(name)(logits, logits.clone()), torch.zeros(3))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-13)])
def test_gap_has_every_digit_near_zero(dtype, tolerance):
    # expm1(x) - x has lost half of them by |x| = 1e-3.
    size = torch.logspace(-8, -2.05, 500, dtype=dtype)
    x = torch.cat([-size, size])
    exact = sum((x.double() ** n / math.factorial(n) for n in range(2, 12)), torch.zeros(1000, dtype=torch.float64))
    torch.testing.assert_close(divergences.gap(x).double(), exact, rtol=tolerance, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_form_would_fail_there(dtype):
    # Without this the test above could pass for a form that has no care for cancellation.
    logits, ref = near_pair(dtype)
    lp, lq = torch.log_softmax(logits.float(), -1), torch.log_softmax(ref.float(), -1)
    truth = oracles.reverse_kl(logits, ref)
    assert (((lp.exp() * (lp - lq)).sum(-1).double() - truth).abs() > 1e-3 * truth).all()


@every_row
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spread", [1e-2, 0.3, 3.0])
def test_never_worse_than_naive(name, params, dtype, spread):
    logits, ref = logits_pair(32, 2048, spread=spread, dtype=dtype)
    true_value, true_gradient = oracles.value_and_gradient(
        getattr(oracles, name), logits.double(), ref.double(), *params
    )
    results = {}
    for label, fn in {"ours": ours(name), "naive": lambda *args: naive(name, *args)}.items():
        value, gradient = oracles.value_and_gradient(fn, logits, ref, *params)
        results[label] = [
            (x.double() - true).square().mean().sqrt().item()
            for x, true in [(value, true_value), (gradient, true_gradient)]
        ]
    # One rounding of the result itself is not an error of the method.
    eps = torch.finfo(torch.float32).eps
    (our_value, our_gradient), (naive_value, naive_gradient) = results["ours"], results["naive"]
    assert our_value <= naive_value + eps * true_value.max().item()
    assert our_gradient <= naive_gradient + torch.finfo(dtype).eps * true_gradient.square().mean().sqrt().item()


def test_output_and_gradient_dtypes():
    for dtype, out in [(torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float64, torch.float64)]:
        value, gradient = run("reverse_kl", (), *logits_pair(3, 5, dtype=dtype))
        assert (value.dtype, gradient.dtype) == (out, dtype)
    assert klft.entropy(logits_pair(3, 5, dtype=torch.bfloat16)[0]).dtype == torch.float32
