"""Low precision without logits, by the three-way criterion: float64 is the truth, ours is never worse than naive."""

import math

import pytest
import torch
from support import oracles
from support.fused import (
    CONSTANT,
    DIFFERENTIABLE,
    EVERYTHING,
    MANY,
    all_tokens,
    dense_divergence,
    dense_total,
    every_divergence,
    every_function,
    every_row,
    our_divergence,
    our_scores,
    our_total,
    set_tile,
)
from support.oracles import TwoHeads, two_heads, value_and_gradients
from support.precision import NOISE, assert_never_worse, error, near_heads, plain, pooled, several

LOW = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
# Under a softcap its slope 1 - tanh^2 is found again from rounded log-probabilities: 1.35 at most for caps that matter.
CAPPED = 1.5


def assert_close_to_truth(ours, truth):
    """Naive may have no correct digit: not to be worse is then no achievement."""
    for mine, true in zip(ours, truth, strict=True):
        assert error(mine, true) <= max(torch.finfo(mine.dtype).eps, 1e-3) * true.square().mean().sqrt()


def check_divergence(name, params, dtype, pairs, noise=NOISE):
    ours = pooled(value_and_gradients(our_divergence(two, name, *params), two.leaves) for two, _ in pairs)
    other = pooled(value_and_gradients(plain(two, name, *params), two.leaves) for two, _ in pairs)
    truth = pooled(value_and_gradients(dense_divergence(exact, name, *params), exact.leaves) for _, exact in pairs)
    assert [x.dtype for x in ours] == [torch.float32, dtype, dtype]
    assert_never_worse(ours, other, truth, noise)
    assert_close_to_truth(ours, truth)


@every_row
@LOW
@pytest.mark.parametrize("spread", [1e-2, 0.3, 1.5])
def test_never_worse_than_naive(name, params, dtype, spread, monkeypatch):
    set_tile(monkeypatch, 20 * 256)
    check_divergence(name, params, dtype, several(spread, dtype))


@LOW
@pytest.mark.parametrize("softcap", [8.0, 30.0])
@pytest.mark.parametrize("spread", [1e-2, 1.5])
def test_softcaps_never_worse_than_naive(dtype, softcap, spread, monkeypatch):
    set_tile(monkeypatch, 20 * 256)
    for name, params in [("reverse_kl", ()), ("forward_kl", ()), ("entropy", ()), ("jsd", (0.5,))]:
        check_divergence(name, params, dtype, several(spread, dtype, softcap=softcap), CAPPED)


@LOW
@pytest.mark.parametrize("function", ["token_scores", "fused_token_loss"])
def test_scores_and_losses_never_worse_than_naive(function, dtype, monkeypatch):
    set_tile(monkeypatch, 20 * 256)
    pairs = several(0.3, dtype)

    def naive_total(two):
        def fn(hidden, weight):
            lp = torch.log_softmax(two.logits(hidden, weight).float(), -1)
            lq = torch.log_softmax(two.ref_logits.float(), -1)
            logp, p, q = lp.gather(-1, two.token_ids.unsqueeze(-1)).sum(), lp.exp(), lq.exp()
            return 1.3 * logp + 0.4 * (p * lp).sum() + 0.7 * (p * (lp - lq)).sum() + 2 * (q * (lq - lp)).sum()

        return fn

    ours = pooled(value_and_gradients(our_total(function, two, all_tokens(two)), two.leaves) for two, _ in pairs)
    other = pooled(value_and_gradients(naive_total(two), two.leaves) for two, _ in pairs)
    truth = pooled(value_and_gradients(dense_total(function, exact), exact.leaves) for _, exact in pairs)
    assert [x.dtype for x in ours] == [torch.float32, dtype, dtype]
    # Three sums over tokens are three draws of an error: only gradients say something of a method.
    assert_never_worse(ours[1:], other[1:], truth[1:])
    assert_close_to_truth(ours, truth)


def barely_moved(dtype):
    """Two heads 4e-7 to 3e-6 nats apart over 20,000 words, in numbers that dtype has."""
    gen = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 16, generator=gen).to(dtype)
    weight = (0.5 * torch.randn(20_000, 16, generator=gen)).to(dtype)
    if dtype == torch.float32:
        ref = weight + 2.5e-4 * torch.randn(20_000, 16, generator=gen)
    else:  # one bf16 step of a few numbers
        ref = torch.where(torch.rand(20_000, 16, generator=gen) < 0.004, weight * (1 + 2**-7), weight)
    return TwoHeads(hidden, weight, None, hidden.clone(), ref.to(dtype), None, torch.arange(3))


@LOW
@pytest.mark.parametrize("elements", [EVERYTHING, 128, pytest.param(1, marks=pytest.mark.slow)])
def test_near_zero(dtype, elements, monkeypatch):
    set_tile(monkeypatch, elements)
    two = barely_moved(dtype)
    exact = two.to(torch.float64)
    scores = our_scores(two, *two.leaves)
    for name in ("reverse_kl", "forward_kl"):
        truth = getattr(oracles, name)(exact.logits(*exact.leaves), exact.ref_logits)
        assert ((truth > 2e-7) & (truth < 4e-6)).all(), truth
        for value in (our_divergence(two, name)(*two.leaves), getattr(scores, name)):
            assert ((value.double() - truth).abs() < 1e-3 * truth).all(), (value, truth)
        # Without this the test could pass for a form that has no care for cancellation.
        assert ((plain(two, name)(*two.leaves).double() - truth).abs() > 1e-3 * truth).any()


@every_divergence
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spread", [1e-4, 1e-2, 1.0])
def test_never_negative(name, params, dtype, spread, monkeypatch):
    set_tile(monkeypatch, 7 * 64)
    two = near_heads(128, 64, 8, spread, dtype)
    assert (our_divergence(two, name, *params)(*two.leaves) >= 0).all()
    scores = our_scores(two, *two.leaves)
    assert (scores.reverse_kl >= 0).all()
    assert (scores.forward_kl >= 0).all()


@every_divergence
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_exactly_zero_for_equal_models(name, params, dtype, monkeypatch):
    two = two_heads(5, 31, "all", ref_dim=5).to(dtype)
    two.ref_options = two.options
    for same in (lambda x: x, torch.clone):
        two.ref_hidden, two.ref_weight, two.ref_bias = map(same, two.leaves)
        for elements in (1, 3 * 31, EVERYTHING):
            set_tile(monkeypatch, elements)
            value, *gradients = value_and_gradients(our_divergence(two, name, *params), two.leaves)
            assert torch.equal(value, torch.zeros_like(value))
            assert max(g.abs().max() for g in gradients) <= 1e-6
            scores = our_scores(two, *two.leaves)
            assert not scores.reverse_kl.any()
            assert not scores.forward_kl.any()
            assert torch.equal(scores.logp, scores.ref_logp)
            assert torch.equal(scores.entropy, scores.ref_entropy)
            assert scores.top1_agree.double().mean() == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_of_results(dtype):
    two = two_heads(7, 13, "all").to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for name, params in MANY:
        found = value_and_gradients(our_divergence(two, name, *params), two.leaves)
        assert [x.dtype for x in found] == [wide, dtype, dtype, dtype], name
    scores = our_scores(two, *two.leaves, top_k=2)
    for field in (*DIFFERENTIABLE, *CONSTANT[:2], "top_p", "ref_top_p"):
        assert getattr(scores, field).dtype == wide, field
    for function in ("linear_divergence", "token_scores", "fused_token_loss"):
        found = value_and_gradients(our_total(function, two, all_tokens(two)), two.leaves)
        assert [x.dtype for x in found] == [wide, dtype, dtype, dtype], function


@pytest.mark.parametrize(("dtype", "ref_dtype"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32),
                                                   (torch.float64, torch.float32)])  # fmt: skip
def test_a_reference_in_a_precision_of_its_own(dtype, ref_dtype, monkeypatch):
    two, ref = (two_heads(7, 13, "all").to(x) for x in (dtype, ref_dtype))
    two.ref_hidden, two.ref_weight, two.ref_bias = ref.ref_hidden, ref.ref_weight, ref.ref_bias
    exact = two.to(torch.float64)
    for elements in (3 * 13, EVERYTHING):
        set_tile(monkeypatch, elements)
        for function in ("linear_divergence", "token_scores", "fused_token_loss"):
            found = value_and_gradients(our_total(function, two, all_tokens(two)), two.leaves)
            truth = value_and_gradients(dense_total(function, exact), exact.leaves)
            assert [x.dtype for x in found[1:]] == [dtype] * 3
            for mine, true in zip(found, truth, strict=True):
                eps = torch.finfo(mine.dtype).eps
                assert error(mine, true) <= 8 * max(eps, 2e-7) * true.abs().max()


@pytest.mark.slow
@every_function
def test_sixteen_bit_weights_gather_their_gradient_in_fp32(function, monkeypatch):
    two = near_heads(256, 67, 16, 0.5, torch.bfloat16)
    exact = two.to(torch.float64)
    truth = value_and_gradients(dense_total(function, exact), exact.leaves)
    errors = {}
    for chunks in (1, 64, 256):
        set_tile(monkeypatch, 67 * 256 // chunks)
        found = value_and_gradients(our_total(function, two, all_tokens(two)), two.leaves)
        errors[chunks] = [error(mine, true) for mine, true in zip(found[1:], truth[1:], strict=True)]
    for chunks in (64, 256):
        assert errors[chunks] == pytest.approx(errors[1], rel=0.05)
    # One rounding to bf16 at the end, relative to each number: half a step of 2^-8 at the very most.
    for mine, true in zip(errors[256], truth[1:], strict=True):
        assert mine <= 2**-9 * true.square().mean().sqrt()


@every_function
@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16])
def test_autocast_with_fp32_weights(function, hidden_dtype, monkeypatch):
    set_tile(monkeypatch, 20 * 257)
    two = near_heads(256, 257, 32, 0.5, torch.float32)
    two.hidden, two.ref_hidden = two.hidden.to(hidden_dtype), two.ref_hidden.to(hidden_dtype)
    exact = two.to(torch.float64)
    truth = value_and_gradients(dense_total(function, exact), exact.leaves)

    def autocast(total):
        leaves = [x.clone().requires_grad_() for x in two.leaves]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = total(*leaves)
        value.backward()  # outside, as trainers do
        return [value.detach(), *[x.grad for x in leaves]]

    def naive_total(hidden, weight):
        lp = torch.log_softmax((hidden @ weight.T).float(), -1)
        lq = torch.log_softmax((two.ref_hidden @ two.ref_weight.T).float(), -1)
        reverse = (lp.exp() * (lp - lq)).sum()
        if function == "linear_divergence":
            return reverse
        logp = lp.gather(-1, two.token_ids.unsqueeze(-1)).sum()
        return 1.3 * logp + 0.4 * (lp.exp() * lp).sum() + 0.7 * reverse + 2 * (lq.exp() * (lq - lp)).sum()

    found, other = autocast(our_total(function, two, all_tokens(two))), autocast(naive_total)
    assert [x.dtype for x in found] == [torch.float32, hidden_dtype, torch.float32]
    assert_never_worse(found[1:], other[1:], truth[1:])
    assert math.isclose(found[0], truth[0], rel_tol=1e-2)
    for mine, true in zip(found[1:], truth[1:], strict=True):
        assert error(mine, true) <= 0.02 * true.square().mean().sqrt()
