"""The dense divergences: laws, an independent float64 oracle, limits, shapes and masks, errors."""

import math

import pytest
import torch
from jaxtyping import TypeCheckError
from support import oracles
from support.divergences import every_row, every_spread, logits_pair, ours, run

import klft
from klft import divergences
from klft.divergences import DIVERGENCES, divergence

INF = math.inf


# --- values and gradients --------------------------------------------------------------------------------------------


@every_row
@every_spread
def test_value_and_gradient_are_the_oracles(name, params, spread):
    logits, ref = logits_pair(64, 23, spread=spread)
    weight = torch.linspace(-2, 3, 64, dtype=torch.float64)  # a grad_output that is neither 1 nor of one sign
    value, gradient = run(name, params, logits, ref, weight)
    true_value, true_gradient = oracles.value_and_gradient(getattr(oracles, name), logits, ref, *params, weight=weight)
    assert value.dtype == gradient.dtype == torch.float64
    # Absolute for the plain formulas' own rounding: they are the less accurate of the two near zero.
    torch.testing.assert_close(value, true_value, rtol=1e-11, atol=2e-15)
    torch.testing.assert_close(gradient, true_gradient, rtol=1e-10, atol=2e-15)


@every_spread
def test_entropy_is_the_oracles(spread):
    logits, _ = logits_pair(64, 23)
    logits = logits * spread
    weight = torch.linspace(-2, 3, 64, dtype=torch.float64)
    value, gradient = oracles.value_and_gradient(klft.entropy, logits, weight=weight)
    true_value, true_gradient = oracles.value_and_gradient(oracles.entropy, logits, weight=weight)
    torch.testing.assert_close(value, true_value, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(gradient, true_gradient, rtol=1e-10, atol=2e-15)


@every_row
def test_gradcheck(name, params):
    logits, ref = logits_pair(3, 5)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ours(name)(x, ref, *params), (logits,))


def test_gradcheck_entropy():
    assert torch.autograd.gradcheck(klft.entropy, (logits_pair(3, 5)[0].requires_grad_(),))


def test_closed_form_gradients_of_the_two_kls():
    logits, ref = logits_pair(16, 11)
    lp, lq = torch.log_softmax(logits, -1), torch.log_softmax(ref, -1)
    value, reverse = run("reverse_kl", (), logits, ref)
    _, forward = run("forward_kl", (), logits, ref)
    torch.testing.assert_close(reverse, lp.exp() * (lp - lq - value.unsqueeze(-1)), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(forward, lp.exp() - lq.exp(), rtol=1e-12, atol=1e-15)


def test_known_values():
    p, q = torch.tensor([0.5, 0.5]).double().log(), torch.tensor([0.25, 0.75]).double().log()
    expected = {
        ("reverse_kl", ()): 0.5 * math.log(4 / 3),
        ("forward_kl", ()): 0.25 * math.log(0.5) + 0.75 * math.log(1.5),
        ("jsd", (0.5,)): 0.5
        * (
            0.25 * math.log(0.25 / 0.375)
            + 0.75 * math.log(0.75 / 0.625)
            + 0.5 * math.log(0.5 / 0.375)
            + 0.5 * math.log(0.5 / 0.625)
        ),
        ("skew_kl", (0.1,)): 0.25 * math.log(0.25 / 0.475) + 0.75 * math.log(0.75 / 0.525),
        ("skew_reverse_kl", (0.1,)): 0.5 * math.log(0.5 / 0.275) + 0.5 * math.log(0.5 / 0.725),
        ("alpha_divergence", (2.0,)): (0.25 / 0.25 + 0.25 / 0.75 - 1) / 2,
        ("renyi_divergence", (2.0,)): math.log(4 / 3),
    }
    for (name, params), value in expected.items():
        assert ours(name)(p, q, *params).item() == pytest.approx(value, abs=1e-15), name
    assert klft.entropy(p).item() == pytest.approx(math.log(2), abs=1e-15)


def test_defaults_are_the_documented_ones():
    logits, ref = logits_pair(4, 6)
    for name, default in {
        "jsd": 0.5,
        "skew_kl": 0.1,
        "skew_reverse_kl": 0.1,
        "alpha_divergence": 0.5,
        "renyi_divergence": 0.5,
    }.items():
        assert torch.equal(ours(name)(logits, ref), ours(name)(logits, ref, default))


@every_row
def test_reference_gets_no_gradient(name, params):
    logits, ref = (x.requires_grad_() for x in logits_pair(4, 6))
    ours(name)(logits, ref, *params).sum().backward()
    assert ref.grad is None
    assert logits.grad is not None
    assert logits.grad.abs().sum() > 0


def test_the_same_tensor_as_its_own_reference_has_no_divergence_and_no_gradient():
    logits = logits_pair(4, 6)[0].requires_grad_()
    value = klft.reverse_kl(logits, logits)
    value.sum().backward()
    assert torch.equal(value, torch.zeros_like(value))
    assert logits.grad.abs().max() < 1e-16


# --- limits and bounds -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "param", "scale", "limit"),
    [
        ("jsd", 1e-7, 1e-7, "forward_kl"),
        ("jsd", 1 - 1e-7, 1e-7, "reverse_kl"),
        ("skew_kl", 1e-7, 1, "forward_kl"),
        ("skew_reverse_kl", 1e-7, 1, "reverse_kl"),
        ("alpha_divergence", 1 - 1e-7, 1, "reverse_kl"),
        ("alpha_divergence", 1 + 1e-7, 1, "reverse_kl"),
        ("alpha_divergence", 1e-7, 1, "forward_kl"),
        ("alpha_divergence", -1e-7, 1, "forward_kl"),
        ("renyi_divergence", 1 - 1e-7, 1, "reverse_kl"),
        ("renyi_divergence", 1 + 1e-7, 1, "reverse_kl"),
    ],
)
def test_limits(name, param, scale, limit):
    logits, ref = logits_pair(32, 13)
    value, gradient = run(name, (param,), logits, ref)
    true_value, true_gradient = oracles.value_and_gradient(getattr(oracles, limit), logits, ref)
    torch.testing.assert_close(value / scale, true_value, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(gradient / scale, true_gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("a", [0.01, 0.1, 0.5, 0.9])
def test_bounds(a):
    logits, ref = logits_pair(256, 13, spread=20.0)
    # Disjoint supports reach each bound exactly; it is also where the two bounds are easiest to break.
    logits[0], ref[0] = torch.tensor([0.0] + [-1e4] * 12), torch.tensor([-1e4] + [0.0] * 12)
    binary_entropy = -a * math.log(a) - (1 - a) * math.log(1 - a)
    for value, bound in [
        (klft.jsd(logits, ref, a), binary_entropy),
        (klft.skew_kl(logits, ref, a), -math.log(a)),
        (klft.skew_reverse_kl(logits, ref, a), -math.log(a)),
    ]:
        assert value.max() <= bound + 1e-14
        assert value[0].item() == pytest.approx(bound, rel=1e-12)


@every_row
@every_spread
def test_non_negative(name, params, spread):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        assert (ours(name)(*logits_pair(256, 37, spread=spread, dtype=dtype), *params) >= 0).all(), dtype


@every_row
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_exactly_zero_for_equal_logits(name, params, dtype):
    logits, _ = logits_pair(64, 101, dtype=dtype)
    value, gradient = run(name, params, logits, logits.clone())
    assert torch.equal(value, torch.zeros_like(value))
    assert gradient.abs().max() <= 1e-7


@every_row
def test_shift_and_permutation_invariance(name, params):
    logits, ref = logits_pair(32, 29)
    value, gradient = run(name, params, logits, ref)
    shift = torch.linspace(-50, 50, 32, dtype=torch.float64).unsqueeze(-1)
    for shifted in [(logits + shift, ref), (logits, ref + shift), (logits + shift, ref - 3 * shift)]:
        moved_value, moved_gradient = run(name, params, *shifted)
        torch.testing.assert_close(moved_value, value, rtol=1e-11, atol=1e-14)
        torch.testing.assert_close(moved_gradient, gradient, rtol=1e-11, atol=1e-14)
    order = torch.randperm(29, generator=torch.Generator().manual_seed(1))
    permuted_value, permuted_gradient = run(name, params, logits[:, order], ref[:, order])
    torch.testing.assert_close(permuted_value, value, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(permuted_gradient, gradient[:, order], rtol=1e-13, atol=1e-15)


@every_spread
def test_mirror_laws(spread):
    logits, ref = logits_pair(64, 17, spread=spread)
    same = {"rtol": 1e-12, "atol": 1e-16}
    torch.testing.assert_close(klft.forward_kl(logits, ref), klft.reverse_kl(ref, logits), **same)
    torch.testing.assert_close(klft.jsd(logits, ref, 0.5), klft.jsd(ref, logits, 0.5), **same)
    torch.testing.assert_close(klft.jsd(logits, ref, 0.3), klft.jsd(ref, logits, 0.7), **same)
    torch.testing.assert_close(klft.skew_kl(logits, ref, 0.2), klft.skew_reverse_kl(ref, logits, 0.2), **same)
    torch.testing.assert_close(klft.alpha_divergence(logits, ref, 0.3), klft.alpha_divergence(ref, logits, 0.7), **same)
    assert klft.jsd(logits, ref).max() <= math.log(2)


@every_spread
def test_pinsker_and_chi2(spread):
    logits, ref = logits_pair(256, 17, spread=spread)
    for p, q in [(logits, ref), (ref, logits)]:
        kl = klft.reverse_kl(p, q)
        assert (kl >= 2 * oracles.total_variation(p, q) ** 2 * (1 - 1e-9)).all()
        # log1p of a sum of p^2/q - 1, whose own rounding is about 1e-15
        assert (kl <= torch.log1p(oracles.chi2(p, q)) * (1 + 1e-9) + 1e-14).all()


# --- shapes, strides, padding, masks ---------------------------------------------------------------------------------


@every_row
@pytest.mark.parametrize("shape", [(7,), (1,), (5, 1), (4, 13), (2, 3, 8), (2, 1, 3, 5), (0, 5), (3, 0, 5)])
def test_shapes(name, params, shape):
    logits, ref = logits_pair(*shape)
    value, gradient = run(name, params, logits, ref)
    assert value.shape == shape[:-1]
    assert gradient.shape == shape
    torch.testing.assert_close(value, getattr(oracles, name)(logits, ref, *params), rtol=1e-11, atol=2e-15)
    if shape[-1] == 1:
        assert torch.equal(value, torch.zeros_like(value))


@pytest.mark.parametrize("shape", [(7,), (1,), (2, 3, 8), (0, 5)])
def test_entropy_shapes(shape):
    value, gradient = oracles.value_and_gradient(klft.entropy, logits_pair(*shape)[0])
    assert value.shape == shape[:-1]
    assert gradient.shape == shape


@every_row
def test_non_contiguous_inputs(name, params):
    logits, ref = logits_pair(6, 5, 4)
    for view in (lambda x: x.transpose(1, 2), lambda x: x[::2, 1:, ::2], lambda x: x.permute(2, 0, 1)):
        value, gradient = run(name, params, view(logits), view(ref))
        true_value, true_gradient = run(name, params, view(logits).contiguous(), view(ref).contiguous())
        assert torch.equal(value, true_value)
        assert torch.equal(gradient, true_gradient)
    # A grad_output that is expanded (stride 0), and a leaf that is a view.
    base = logits.clone().requires_grad_()
    ours(name)(base.transpose(1, 2), ref.transpose(1, 2), *params).mean().backward()
    _, whole = run(name, params, logits.transpose(1, 2), ref.transpose(1, 2))
    torch.testing.assert_close(base.grad, whole.transpose(1, 2) / 24, rtol=1e-13, atol=1e-16)


@every_row
def test_blocks_of_rows_are_invisible(name, params, monkeypatch):
    logits, ref = logits_pair(11, 13)
    value, gradient = run(name, params, logits, ref)
    for elements in (1, 13, 40, 11 * 13 - 1):  # one row at a time; rows that do not divide into blocks
        monkeypatch.setattr(divergences, "CPU_BLOCK", elements)
        blocked_value, blocked_gradient = run(name, params, logits, ref)
        torch.testing.assert_close(blocked_value, value, rtol=1e-14, atol=1e-16)
        torch.testing.assert_close(blocked_gradient, gradient, rtol=1e-14, atol=1e-16)


@every_row
def test_appended_minus_inf_columns_change_nothing(name, params):
    logits, ref = logits_pair(16, 13)
    value, gradient = run(name, params, logits, ref)
    dead = torch.full((16, 5), -INF, dtype=torch.float64)
    wide_value, wide_gradient = run(name, params, torch.cat([logits, dead], -1), torch.cat([ref, dead], -1))
    torch.testing.assert_close(wide_value, value, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(wide_gradient[:, :13], gradient, rtol=1e-13, atol=1e-15)
    assert torch.equal(wide_gradient[:, 13:], torch.zeros_like(dead))


def test_entropy_with_minus_inf_columns():
    logits, _ = logits_pair(16, 13)
    value, gradient = oracles.value_and_gradient(klft.entropy, logits)
    wide = torch.cat([logits, torch.full((16, 5), -INF, dtype=torch.float64)], -1)
    wide_value, wide_gradient = oracles.value_and_gradient(klft.entropy, wide)
    torch.testing.assert_close(wide_value, value, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(wide_gradient[:, :13], gradient, rtol=1e-13, atol=1e-15)
    assert torch.equal(wide_gradient[:, 13:], torch.zeros(16, 5, dtype=torch.float64))


@every_row
def test_padding_rows_change_nothing(name, params):
    logits, ref = logits_pair(6, 13)
    value, gradient = run(name, params, logits, ref)
    padded = [torch.cat([x, 100 * torch.ones(3, 13, dtype=x.dtype)]) for x in (logits, -ref)]
    padded[1][:6] = ref
    more_value, more_gradient = run(name, params, *padded)
    assert torch.equal(more_value[:6], value)
    assert torch.equal(more_gradient[:6], gradient)


@every_row
@pytest.mark.parametrize("poison", [math.nan, INF, -INF])
def test_masked_tokens_contribute_nothing(name, params, poison):
    logits, ref = logits_pair(2, 4, 7)
    mask = torch.tensor([[True, False, True, True], [False, True, True, False]])
    logits[~mask], ref[0, 1] = poison, poison
    leaf = logits.requires_grad_()
    mean = klft.masked_mean(ours(name)(leaf, ref, *params), mask)
    mean.backward()
    true_value, true_gradient = run(name, params, logits.detach()[mask], ref[mask])
    torch.testing.assert_close(mean.detach(), true_value.mean(), rtol=1e-12, atol=0)
    torch.testing.assert_close(leaf.grad[mask], true_gradient / 5, rtol=1e-12, atol=1e-16)
    assert torch.equal(leaf.grad[~mask], torch.zeros(3, 7, dtype=torch.float64))


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["jsd", "skew_kl", "skew_reverse_kl"])
@pytest.mark.parametrize("param", [0.0, 1.0, -0.1, 1.5, math.nan])
def test_end_points_are_refused_by_name(name, param):
    with pytest.raises(ValueError, match=f"^{name}: .*{param}.*") as error:
        ours(name)(*logits_pair(2, 3), param)
    assert "forward_kl" in str(error.value)
    assert "reverse_kl" in str(error.value)


@pytest.mark.parametrize("param", [0.0, 1.0, math.nan, INF])
def test_alpha_end_points_are_refused(param):
    with pytest.raises(ValueError, match=r"alpha_divergence.*forward_kl.*reverse_kl"):
        klft.alpha_divergence(*logits_pair(2, 3), param)


@pytest.mark.parametrize("param", [0.0, 1.0, -0.5, math.nan, INF])
def test_renyi_end_points_are_refused(param):
    with pytest.raises(ValueError, match=r"renyi_divergence: alpha.*reverse_kl"):
        klft.renyi_divergence(*logits_pair(2, 3), param)


def test_unknown_name_lists_the_valid_ones():
    with pytest.raises(ValueError, match="'kl'") as error:
        divergence(*logits_pair(2, 3), "kl")
    for name in DIVERGENCES:
        assert name in str(error.value)


@pytest.mark.parametrize("shapes", [((2, 3), (2, 4)), ((2, 3), (3, 3)), ((2, 3), (3,)), ((2, 1, 3), (2, 3))])
@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "jsd", "skew_kl", "alpha_divergence"])
def test_mismatched_shapes_are_refused(name, shapes):
    with pytest.raises((ValueError, TypeCheckError)):
        ours(name)(torch.zeros(shapes[0]), torch.zeros(shapes[1]))


def test_mismatched_shapes_are_named():
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(2, 4\)"):
        divergence(torch.zeros(2, 3), torch.zeros(2, 4), "reverse_kl")
    with pytest.raises(ValueError, match="vocabulary"):
        divergence(torch.zeros(2, 0), torch.zeros(2, 0), "reverse_kl")
