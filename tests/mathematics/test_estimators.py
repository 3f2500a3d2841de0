"""Every row of the estimators' table, by enumeration: expected value, sign, gradient as a loss and as a reward."""

import itertools
import math
import warnings

import pytest
import torch
from jaxtyping import TypeCheckError
from support import oracles

import klft
from klft.masked import token_logps

INF = math.inf
SEEDS = [0, 1, 2]
every_seed = pytest.mark.parametrize("seed", SEEDS)
TIGHT = {"rtol": 1e-11, "atol": 1e-13}


def close(actual, expected):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=torch.float64), **TIGHT)


def far(actual, expected):
    """Further apart than a tenth of the true gradient: a wrong gradient, not an inexact one."""
    return (actual - expected).norm() > 0.1 * expected.norm()


def on_token(estimator, ref):
    """An estimator of log-probabilities as a function of (rows of logits, sampled ids)."""
    return lambda rows, ids: estimator(token_logps(rows, ids), token_logps(ref.expand_as(rows), ids))


def truths(theta, ref):
    """RKL, its gradient, FKL, its gradient."""
    return *oracles.value_and_gradient(oracles.reverse_kl, theta, ref), *oracles.value_and_gradient(
        oracles.forward_kl, theta, ref
    )


def rho(rows, ids, sampler):
    """The ratio kept in the graph."""
    return (token_logps(rows, ids) - token_logps(sampler.detach().expand_as(rows), ids)).exp()


# --- the table, row by row -------------------------------------------------------------------------------------------


@every_seed
def test_k1(seed):
    theta, ref, _ = oracles.one_position(seed=seed)
    rkl, grad_rkl, _, _ = truths(theta, ref)
    fn = on_token(klft.k1, ref)
    value, gradient = oracles.expected(fn, theta, theta)
    values, per_sample = oracles.every_token(fn, theta)
    close(value, rkl)
    close(gradient, torch.zeros(7))
    close(per_sample, oracles.scores(theta))
    assert values.min() < 0 < values.max()
    close(oracles.as_reward(fn, theta), grad_rkl)


@every_seed
def test_k2(seed):
    theta, ref, _ = oracles.one_position(seed=seed)
    _, grad_rkl, _, _ = truths(theta, ref)
    fn = on_token(klft.k2, ref)
    values, per_sample = oracles.every_token(fn, theta)
    log_ratio, _ = oracles.every_token(on_token(klft.k1, ref), theta)
    assert (values >= 0).all()
    close(values, log_ratio**2 / 2)
    close(oracles.expected(fn, theta, theta)[1], grad_rkl)
    close(per_sample, log_ratio.unsqueeze(-1) * oracles.scores(theta))
    assert far(oracles.as_reward(fn, theta), grad_rkl)


@every_seed
def test_k2_is_biased_by_the_third_order(seed):
    theta, ref, _ = oracles.one_position(seed=seed)
    bias = []
    for step in (0.02, 0.01):
        near = theta + step * (ref - theta)
        bias.append(oracles.expected(on_token(klft.k2, near), theta, theta)[0] - oracles.reverse_kl(theta, near))
    assert bias[0].abs() > 1e-9
    assert (bias[0] / bias[1]).item() == pytest.approx(8, rel=0.1)


@every_seed
def test_k3(seed):
    theta, ref, _ = oracles.one_position(seed=seed)
    rkl, grad_rkl, _, grad_fkl = truths(theta, ref)
    fn = on_token(klft.k3, ref)
    value, gradient = oracles.expected(fn, theta, theta)
    values, per_sample = oracles.every_token(fn, theta)
    log_ratio, _ = oracles.every_token(on_token(klft.k1, ref), theta)
    close(value, rkl)
    close(gradient, grad_fkl)
    close(per_sample, (1 - torch.exp(-log_ratio)).unsqueeze(-1) * oracles.scores(theta))
    assert (values >= 0).all()
    reward = oracles.as_reward(fn, theta)
    close(reward, grad_rkl - grad_fkl)
    assert far(reward, grad_rkl)
    close(reward + gradient, grad_rkl)  # in the reward and as a loss, coef each


@every_seed
def test_k3_in_the_reward_vanishes_near_the_reference(seed):
    theta, ref, _ = oracles.one_position(seed=seed)
    near = theta + 1e-3 * (ref - theta)
    _, grad_rkl, _, _ = truths(theta, near)
    assert oracles.as_reward(on_token(klft.k3, near), theta).norm() < 5e-3 * grad_rkl.norm()


@every_seed
@pytest.mark.parametrize("off_policy", [False, True])
def test_rho_k3_and_detached_rho_k2(seed, off_policy):
    theta, ref, behaviour = oracles.one_position(seed=seed)
    sampler = behaviour if off_policy else theta
    rkl, grad_rkl, _, _ = truths(theta, ref)
    log_ratio, _ = oracles.every_token(on_token(klft.k1, ref), theta)
    weight = torch.softmax(theta, -1) / torch.softmax(sampler, -1)
    wanted = (weight * log_ratio).unsqueeze(-1) * oracles.scores(theta)

    rho_k3 = lambda rows, ids: rho(rows, ids, sampler) * on_token(klft.k3, ref)(rows, ids)
    value, gradient = oracles.expected(rho_k3, theta, sampler)
    close(value, rkl)
    close(gradient, grad_rkl)
    close(oracles.every_token(rho_k3, theta)[1], wanted)

    rho_k2 = lambda rows, ids: rho(rows, ids, sampler).detach() * on_token(klft.k2, ref)(rows, ids)
    value, gradient = oracles.expected(rho_k2, theta, sampler)
    close(value, oracles.expected(on_token(klft.k2, ref), theta, theta)[0])
    close(gradient, grad_rkl)
    close(oracles.every_token(rho_k2, theta)[1], wanted)

    # Kept in the graph, rho makes it the gradient of E[k2].
    live = lambda rows, ids: rho(rows, ids, sampler) * on_token(klft.k2, ref)(rows, ids)
    _, gradient = oracles.expected(live, theta, sampler)
    mean_k2 = lambda logits, other: (
        torch.softmax(logits, -1) * (torch.log_softmax(logits, -1) - torch.log_softmax(other, -1)) ** 2 / 2
    ).sum(-1)
    close(gradient, oracles.value_and_gradient(mean_k2, theta, ref)[1])
    assert far(gradient, grad_rkl)


@every_seed
@pytest.mark.parametrize("off_policy", [False, True])
def test_forward_estimators(seed, off_policy):
    theta, ref, behaviour = oracles.one_position(seed=seed)
    sampler = behaviour if off_policy else theta
    _, _, fkl, grad_fkl = truths(theta, ref)
    log_ratio, _ = oracles.every_token(on_token(klft.k1, ref), theta)
    r = torch.exp(-log_ratio)
    for estimator in (klft.forward_k1, klft.forward_k3):
        fn = on_token(estimator, ref)
        value, gradient = oracles.expected(fn, theta, theta)
        close(value, fkl)
        assert far(gradient, grad_fkl)
    values, _ = oracles.every_token(on_token(klft.forward_k1, ref), theta)
    close(values, -r * log_ratio)
    assert values.min() < 0 < values.max()
    values, _ = oracles.every_token(on_token(klft.forward_k3, ref), theta)
    assert (values >= 0).all()

    weighted = lambda rows, ids: rho(rows, ids, sampler) * on_token(klft.forward_k3, ref)(rows, ids)
    value, gradient = oracles.expected(weighted, theta, sampler)
    weight = torch.softmax(theta, -1) / torch.softmax(sampler, -1)
    close(value, fkl)
    close(gradient, grad_fkl)
    close(oracles.every_token(weighted, theta)[1], (weight * (1 - r)).unsqueeze(-1) * oracles.scores(theta))


@every_seed
def test_k3_the_wrong_way_round_is_another_divergence(seed):
    theta, ref, _ = oracles.one_position(seed=seed)
    swapped = on_token(lambda logp, ref_logp: klft.k3(ref_logp, logp), ref)  # pi/ref - 1 - log(pi/ref)
    value, _ = oracles.expected(swapped, theta, theta)
    close(value, oracles.chi2(theta, ref) - oracles.reverse_kl(theta, ref))
    assert (value - oracles.reverse_kl(theta, ref)).abs() > 1e-3


@every_seed
def test_the_estimators_are_the_oracles(seed):
    gen = torch.Generator().manual_seed(seed)
    logp, ref_logp = (-5 * torch.rand(4, 6, generator=gen, dtype=torch.float64) for _ in range(2))
    for name in ("k1", "k2", "k3", "forward_k1", "forward_k3"):
        close(getattr(klft, name)(logp, ref_logp), getattr(oracles, name)(logp, ref_logp))
        _, gradient = oracles.value_and_gradient(getattr(klft, name), logp, ref_logp)
        close(gradient, oracles.value_and_gradient(getattr(oracles, name), logp, ref_logp)[1])
        zeros = getattr(klft, name)(logp, logp.clone())
        assert torch.equal(zeros, torch.zeros_like(zeros))


@every_seed
def test_f_divergence_gradients(seed):
    """grad E_ref[f(pi/ref)] = E_pi[f'(pi/ref) s], for the alpha divergence's f."""
    theta, ref, _ = oracles.one_position(seed=seed)
    ratio = torch.softmax(theta, -1) / torch.softmax(ref, -1)
    for a in (0.5, 2.0):
        # f(u) = (u^a - 1) / (a (a - 1)) and sum_v q f(p/q) is the divergence
        slope = ratio ** (a - 1) / (a - 1)
        _, gradient = oracles.value_and_gradient(klft.alpha_divergence, theta, ref, a)
        close(gradient, (torch.softmax(theta, -1) * slope) @ oracles.scores(theta))


@every_seed
def test_truncated_or_tempered_sampling_is_off_policy(seed):
    theta, ref, _ = oracles.one_position(seed=seed)
    sampler = theta / 0.7
    plain, _ = oracles.expected(on_token(klft.k1, ref), theta, sampler)
    assert (plain - oracles.reverse_kl(theta, ref)).abs() > 1e-2
    fn = lambda rows, ids: estimate(rows, ids, ref, sampler)
    close(oracles.expected(fn, theta, sampler)[0], oracles.reverse_kl(theta, ref))


# --- estimate_kl: direction x value x gradient x behaviour -----------------------------------------------------------

VALUES = [("reverse", "k1"), ("reverse", "k2"), ("reverse", "k3"), ("forward", "k1"), ("forward", "k3")]
every_value = pytest.mark.parametrize(("direction", "value"), VALUES)
# "on, weighted": behaviour_logp is given and equals the policy's own.
every_behaviour = pytest.mark.parametrize("behaviour", ["none", "on, weighted", "off"])


def estimate(rows, ids, ref, sampler=None, **how):
    behaviour = None if sampler is None else token_logps(sampler.expand_as(rows), ids)
    return klft.estimate_kl(
        token_logps(rows, ids), token_logps(ref.expand_as(rows), ids), behaviour_logp=behaviour, **how
    )


def setting(behaviour, seed):
    """theta, ref, the sampling distribution, and what is passed as the behaviour."""
    theta, ref, other = oracles.one_position(seed=seed)
    sampler = other if behaviour == "off" else theta
    return theta, ref, sampler, None if behaviour == "none" else sampler


def quietly(fn):
    """fn with the deliberate warnings of gradient="autograd" left out."""

    def wrapped(*args):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return fn(*args)

    return wrapped


@every_value
@every_behaviour
@every_seed
@pytest.mark.parametrize("gradient", ["none", "unbiased", "autograd"])
def test_estimate_kl_value(direction, value, behaviour, gradient, seed):
    theta, ref, sampler, given = setting(behaviour, seed)
    fn = quietly(
        lambda rows, ids: estimate(rows, ids, ref, given, direction=direction, estimator=value, gradient=gradient)
    )
    mean, _ = oracles.expected(fn, theta, sampler)
    if value == "k2":
        truth, _ = oracles.expected(on_token(oracles.k2, ref), theta, theta)
    else:
        truth = getattr(oracles, f"{direction}_kl")(theta, ref)
    close(mean, truth)


@every_value
@every_behaviour
@every_seed
def test_estimate_kl_unbiased_gradient(direction, value, behaviour, seed):
    theta, ref, sampler, given = setting(behaviour, seed)
    fn = lambda rows, ids: estimate(rows, ids, ref, given, direction=direction, estimator=value, gradient="unbiased")
    _, gradient = oracles.expected(fn, theta, sampler)
    close(gradient, oracles.value_and_gradient(getattr(oracles, f"{direction}_kl"), theta, ref)[1])
    log_ratio = torch.log_softmax(theta, -1) - torch.log_softmax(ref, -1)
    weight = torch.softmax(theta, -1) / torch.softmax(sampler, -1)
    factor = weight * (log_ratio if direction == "reverse" else 1 - torch.exp(-log_ratio))
    close(oracles.every_token(fn, theta)[1], factor.unsqueeze(-1) * oracles.scores(theta))


@every_value
@every_behaviour
def test_estimate_kl_none_is_detached(direction, value, behaviour):
    theta, ref, _, given = setting(behaviour, 0)
    ids = torch.arange(7)
    rows = theta.repeat(7, 1).requires_grad_()
    result = estimate(rows, ids, ref, given, direction=direction, estimator=value)
    assert not result.requires_grad
    assert torch.equal(result, estimate(rows, ids, ref, given, direction=direction, estimator=value, gradient="none"))


@every_value
@every_behaviour
@every_seed
def test_autograd_warns_exactly_where_its_gradient_is_wrong(direction, value, behaviour, seed):
    theta, ref, sampler, given = setting(behaviour, seed)
    fn = lambda rows, ids: estimate(rows, ids, ref, given, direction=direction, estimator=value, gradient="autograd")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _, gradient = oracles.expected(fn, theta, sampler)
    _, truth = oracles.value_and_gradient(getattr(oracles, f"{direction}_kl"), theta, ref)
    wrong = far(gradient, truth)
    if not wrong:
        close(gradient, truth)
    assert len(caught) == int(wrong), [str(w.message) for w in caught]
    if wrong:
        assert "unbiased" in str(caught[0].message)
        assert direction in str(caught[0].message)


@every_value
def test_autograd_differentiates_the_formula(direction, value):
    theta, ref, _ = oracles.one_position()
    name = value if direction == "reverse" else f"forward_{value}"
    fn = quietly(lambda rows, ids: estimate(rows, ids, ref, direction=direction, estimator=value, gradient="autograd"))
    ours = oracles.every_token(fn, theta)
    plain = oracles.every_token(on_token(getattr(oracles, name), ref), theta)
    close(ours[0], plain[0])
    close(ours[1], plain[1])


@every_value
@pytest.mark.parametrize("gradient", ["unbiased", "autograd"])
def test_neither_reference_nor_behaviour_gets_a_gradient(direction, value, gradient):
    logp, ref_logp, behaviour = ((-torch.rand(5, dtype=torch.float64)).requires_grad_() for _ in range(3))
    how = {"direction": direction, "estimator": value, "gradient": gradient}
    quietly(lambda: klft.estimate_kl(logp, ref_logp, behaviour_logp=behaviour, **how).sum().backward())()
    assert ref_logp.grad is None
    assert behaviour.grad is None
    assert logp.grad.abs().sum() > 0


def test_the_default_is_k1_detached():
    logp, ref_logp = torch.tensor([-1.0, -2.0], requires_grad=True), torch.tensor([-3.0, -1.5])
    result = klft.estimate_kl(logp, ref_logp)
    assert torch.equal(result, torch.tensor([2.0, -0.5]))
    assert not result.requires_grad


@pytest.mark.parametrize(
    ("how", "named", "choices"),
    [
        ({"direction": "backward"}, "backward", ["reverse", "forward"]),
        ({"estimator": "k4"}, "k4", ["k1", "k2", "k3"]),
        ({"direction": "forward", "estimator": "k2"}, "k2", ["k1", "k3"]),
        ({"gradient": "yes"}, "yes", ["none", "unbiased", "autograd"]),
    ],
)
def test_unknown_names_list_the_valid_ones(how, named, choices):
    with pytest.raises(ValueError, match=named) as error:
        klft.estimate_kl(torch.zeros(2), torch.zeros(2), **how)
    assert all(choice in str(error.value) for choice in choices)


def test_the_old_and_the_new_name_of_the_estimator_contradict_each_other():
    logp, ref_logp = torch.zeros(2), torch.ones(2)
    with pytest.raises(ValueError, match=r"estimator='k3' and value='k2'.*give estimator alone"):
        klft.estimate_kl(logp, ref_logp, estimator="k3", value="k2")
    with pytest.warns(DeprecationWarning, match="estimator="):
        klft.estimate_kl(logp, ref_logp, value="k2")


def test_every_combination_is_covered():
    combinations = set(itertools.product(("reverse", "forward"), ("k1", "k2", "k3"))) - {("forward", "k2")}
    assert combinations == set(VALUES)


# --- top_k_kl --------------------------------------------------------------------------------------------------------

DIRECTIONS = pytest.mark.parametrize("direction", ["reverse", "forward"])


def top_k(ref, k, direction, given=None):
    def fn(rows, ids):
        behaviour = None if given is None else token_logps(given.expand_as(rows), ids)
        return klft.top_k_kl(rows, ref.expand_as(rows), ids, k, direction=direction, behaviour_logp=behaviour)

    return fn


@DIRECTIONS
@every_behaviour
@every_seed
@pytest.mark.parametrize("k", range(8))
def test_top_k_is_unbiased_for_every_k(direction, behaviour, seed, k):
    theta, ref, sampler, given = setting(behaviour, seed)
    value, gradient = oracles.expected(top_k(ref, k, direction, given), theta, sampler)
    true_value, true_gradient = oracles.value_and_gradient(getattr(oracles, f"{direction}_kl"), theta, ref)
    close(value, true_value)
    close(gradient, true_gradient)


@DIRECTIONS
@every_seed
def test_top_k_of_the_whole_vocabulary_is_dense(direction, seed):
    theta, ref, _ = oracles.one_position(seed=seed)
    values, gradients = oracles.every_token(top_k(ref, 7, direction), theta)
    value, gradient = oracles.value_and_gradient(getattr(oracles, f"{direction}_kl"), theta, ref)
    close(values, value.expand(7))
    close(gradients, gradient.expand(7, 7))


@DIRECTIONS
@every_behaviour
@every_seed
def test_top_zero_is_rho_k3(direction, behaviour, seed):
    theta, ref, sampler, given = setting(behaviour, seed)
    name = "k3" if direction == "reverse" else "forward_k3"
    ours = oracles.every_token(top_k(ref, 0, direction, given), theta)
    plain = oracles.every_token(
        lambda rows, ids: rho(rows, ids, sampler) * on_token(getattr(oracles, name), ref)(rows, ids), theta
    )
    close(ours[0], plain[0])
    close(ours[1], plain[1])


@DIRECTIONS
@every_seed
def test_top_k_lowers_the_variance(direction, seed):
    theta, ref, _ = oracles.one_position(seed=seed)
    p = torch.softmax(theta, -1)
    variance = []
    for k in range(8):
        values, _ = oracles.every_token(top_k(ref, k, direction), theta)
        variance.append((p @ (values - p @ values) ** 2).item())
        assert (values >= 0).all()
    assert variance[7] < 1e-25
    assert variance[4] < variance[0]


@DIRECTIONS
def test_the_head_is_where_the_expectation_has_its_weight(direction):
    theta, ref, _ = oracles.one_position(seed=3)
    weigher = theta if direction == "reverse" else ref
    sampled = torch.argsort(weigher, descending=True)
    w, v = torch.softmax(weigher, -1), torch.softmax(ref if direction == "reverse" else theta, -1)
    terms = w * (w / v).log() + v - w
    for k in (1, 3):
        values, _ = oracles.every_token(top_k(ref, k, direction), theta)
        close(values[sampled[:k]], terms[sampled[:k]].sum().expand(k))


@pytest.mark.parametrize("k", range(8))
@pytest.mark.parametrize(
    ("direction", "dead"),
    [("reverse", "both"), ("reverse", "policy"), ("forward", "both"), ("forward", "reference")],
)
@pytest.mark.parametrize("off_policy", [False, True])
def test_top_k_with_minus_inf(direction, k, dead, off_policy):
    """Where the KL is finite, every sample is finite and the expectation is the dense value and gradient.

    Off-policy the sampler may have said a token the policy cannot say: k3 * rho tends to ref/behaviour there.
    """
    theta, ref, behaviour = oracles.one_position(seed=4)
    if dead in ("both", "policy"):
        theta[2] = -INF
    if dead in ("both", "reference"):
        ref[2] = -INF
    sampler = behaviour if off_policy else theta
    given = sampler if off_policy else None
    values, gradients = oracles.every_token(top_k(ref, k, direction, given), theta)
    w = torch.softmax(sampler, -1)
    alive = w > 0
    assert values[alive].isfinite().all()
    assert gradients[alive].isfinite().all()
    value, gradient = oracles.value_and_gradient(getattr(klft, f"{direction}_kl"), theta, ref)
    close(w[alive] @ gradients[alive], gradient)
    if dead == "policy" and not off_policy:
        # What the policy never says is never sampled: its share of sum(q - p) is seen only inside the head.
        value = value - torch.softmax(ref, -1)[2] * (2 not in theta.topk(k).indices)
    close(w[alive] @ values[alive], value)


@pytest.mark.parametrize("k", [-1, 8])
def test_top_k_refuses_an_impossible_k(k):
    with pytest.raises(ValueError, match=rf"top_k_kl: k .*0\.\.7.*{k}"):
        klft.top_k_kl(torch.zeros(2, 7), torch.zeros(2, 7), torch.zeros(2, dtype=torch.long), k)


def test_top_k_errors_and_shapes():
    logits, ref, ids = torch.randn(2, 3, 7), torch.randn(2, 3, 7), torch.zeros(2, 3, dtype=torch.long)
    assert klft.top_k_kl(logits, ref, ids, 2).shape == (2, 3)
    assert klft.top_k_kl(logits[0, 0], ref[0, 0], ids[0, 0], 2).shape == ()
    assert klft.top_k_kl(logits.bfloat16(), ref.bfloat16(), ids, 2).dtype == torch.float32
    with pytest.raises(ValueError, match="sideways"):
        klft.top_k_kl(logits, ref, ids, 2, direction="sideways")
    with pytest.raises((ValueError, TypeCheckError)):
        klft.top_k_kl(logits, ref[..., :6], ids, 2)
