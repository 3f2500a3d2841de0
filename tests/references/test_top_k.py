"""TopKReference: k log-probabilities per position give an unbiased KL, value and gradient, by enumeration.

One position, 7 tokens: row y of a batch [7, 2] is the text (0, y), so a batch is every token that can be sampled.
"""

from types import SimpleNamespace

import pytest
import torch
from support import oracles
from support.penalties import close

from klft import FixedKL, KLPenalty, LMHead, TopKReference, kl_metrics
from klft.references import Reference

V = 7
DIRECTIONS = pytest.mark.parametrize("direction", ["reverse", "forward"])
IDS = torch.stack([torch.zeros(V, dtype=torch.long), torch.arange(V)], 1)
MASK = torch.tensor([[False, True]]).expand(V, 2)


def support_of(ref, k, extra=0):
    """The k likeliest under the reference for every text, [V, 2, k]; `extra` entries of padding behind them."""
    lq = ref.log_softmax(-1)
    logps, ids = lq.topk(k)
    ids = torch.cat([ids, ids.new_zeros(extra)]).expand(V, 2, -1)
    logps = torch.cat([logps, logps.new_full((extra,), -torch.inf)]).expand(V, 2, -1)
    return ids, logps, lq.expand(V, 2, V).gather(-1, IDS.unsqueeze(-1)).squeeze(-1)


def penalty(reference, direction="reverse"):
    return KLPenalty(
        reference, direction=direction, estimator="exact", placement="loss", controller=FixedKL(1.0)
    )  # fmt: skip


def measured(theta, reference, direction, behaviour_logp=None):
    """fn(rows of logits [V, V], ids [V]) -> the penalty [V]."""

    def fn(rows, ids):
        logits = torch.stack([rows, torch.full_like(rows, torch.nan)], 1)  # column 1 predicts what is not there
        made = penalty(reference, direction)
        kl = made.measure(logits, IDS, torch.ones_like(IDS), MASK, behaviour_logp=behaviour_logp)
        return made.losses(kl)[:, 1]

    return oracles.every_token(fn, theta)


SAMPLERS = pytest.mark.parametrize("sampler", ["policy", "another policy", "reference"])


def setting(sampler, seed):
    """Logits of policy, reference and of who sampled, and what `behaviour_logp` says [V, 2]."""
    theta, ref, other = oracles.one_position(seed=seed)
    by = {"policy": theta, "another policy": other, "reference": ref}[sampler]
    given = by.log_softmax(-1).expand(V, 2, V).gather(-1, IDS.unsqueeze(-1)).squeeze(-1)
    return theta, ref, by, None if sampler == "policy" else given


@DIRECTIONS
@SAMPLERS
@pytest.mark.parametrize("k", range(V + 1))
@pytest.mark.parametrize("seed", [0, 1])
def test_value_and_gradient_are_unbiased_for_every_k(direction, sampler, k, seed):
    theta, ref, by, behaviour = setting(sampler, seed)
    values, gradients = measured(theta, TopKReference(*support_of(ref, k)), direction, behaviour)
    value, gradient = oracles.value_and_gradient(getattr(oracles, f"{direction}_kl"), theta, ref)
    w = by.softmax(-1)
    close(w @ values, value)
    close(w @ gradients, gradient)
    assert (values >= 0).all()
    if k == V:
        close(values, value.expand(V))
        close(gradients, gradient.expand(V, V))


@DIRECTIONS
def test_without_the_tail_the_gradient_is_far_off(direction):
    """What is left out of the sum is no small thing: the tail is in neither value nor gradient of what is in it."""
    theta, ref, by, _ = setting("policy", 0)
    ids, logps, sampled = support_of(ref, 2)
    _, gradient = oracles.value_and_gradient(getattr(oracles, f"{direction}_kl"), theta, ref)
    inside = by.softmax(-1) @ measured(theta, TopKReference(ids, logps, sampled), direction)[1]
    rows = theta.expand(V, V).clone().requires_grad_()
    lp, lq = rows.log_softmax(-1).gather(-1, ids[:, 0]), logps[:, 0]
    p, q = lp.exp(), lq.exp()
    terms = p * (lp - lq) + q - p if direction == "reverse" else q * (lq - lp) + p - q
    (headless,) = torch.autograd.grad(terms.sum(), rows)
    close(inside, gradient)
    assert (by.softmax(-1) @ headless - gradient).norm() > 0.3 * gradient.norm()


@DIRECTIONS
def test_padding_says_nothing(direction):
    """Of id 0, which is a token of its own, and which may be the sampled one."""
    theta, ref, _, _ = setting("policy", 1)
    for k in (0, 1, 3):
        plain = measured(theta, TopKReference(*support_of(ref, k)), direction)
        padded = measured(theta, TopKReference(*support_of(ref, k, extra=2)), direction)
        close(padded[0], plain[0])
        close(padded[1], plain[1])


@DIRECTIONS
def test_suppressed_tokens(direction):
    """-inf in the policy: the reverse KL is finite, and its gradient; the forward one is infinite, and said to be."""
    theta, ref, _, _ = setting("policy", 1)
    theta[2] = -torch.inf
    ids, logps, sampled = support_of(ref, V)
    if direction == "forward":
        with pytest.raises(ValueError, match=r"the forward KL .* is not finite"):
            measured(theta, TopKReference(ids, logps, sampled), direction)
        return
    values, gradients = measured(theta, TopKReference(ids, logps, sampled), direction)
    value, gradient = oracles.value_and_gradient(
        lambda z, y: (z.softmax(-1) * (z.log_softmax(-1) - y.log_softmax(-1)).nan_to_num(neginf=0.0)).sum(-1),
        theta,
        ref,
    )
    close(values, value.expand(V))
    assert gradients.isfinite().all()
    close(gradients[:, 3:], gradient[3:].expand(V, -1))


def heads(kind):
    two = oracles.two_heads(12, 11, kind, seed=2)
    return two, LMHead(two.weight, two.bias, **two.options)


@pytest.mark.parametrize("kind", ["plain", "bias", "softcap", "scale"])
@pytest.mark.parametrize("k", [1, 4, 11])
@DIRECTIONS
def test_from_hidden_states_it_is_what_it_is_from_logits(kind, k, direction, monkeypatch):
    """Values, and gradients in hidden states, weight and bias; several chunks."""
    monkeypatch.setattr("klft.references.top_k.CHUNK", 3)
    two, _ = heads(kind)
    lq = two.ref_logits.log_softmax(-1)
    logps, ids = lq.topk(k)
    tokens = two.token_ids
    sampled = lq.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    grid = lambda t: t.view(3, 4, *t.shape[1:])
    reference = TopKReference(grid(ids), grid(logps), grid(sampled))
    mask, behaviour = torch.arange(12).view(3, 4) % 5 != 0, grid(sampled) - 0.3

    def by_hidden(hidden, *head):
        scores = reference.score_hidden(
            grid(hidden), LMHead(*head, **two.options), grid(tokens), mask, behaviour_logp=behaviour
        )
        assert (scores.logp[~mask] == 0).all()
        return getattr(scores, f"{direction}_kl") + 0.1 * scores.logp

    def by_logits(hidden, *head):
        logits = grid(two.logits(hidden, *head))
        scores = reference.score(logits, grid(tokens), mask, behaviour_logp=behaviour)
        return getattr(scores, f"{direction}_kl") + 0.1 * scores.logp

    ours, theirs = (oracles.value_and_gradients(fn, two.leaves) for fn in (by_hidden, by_logits))
    for a, b in zip(ours, theirs, strict=True):
        close(a, b)
    if k == 11:
        dense = oracles.token_scores(two.logits(*two.leaves), two.ref_logits, tokens)
        close(ours[0][mask], grid(getattr(dense, f"{direction}_kl") + 0.1 * dense.logp)[mask])


def test_every_estimator_and_the_metrics_read_it():
    theta, ref, _, _ = setting("policy", 0)
    reference = TopKReference(*support_of(ref, 3))
    assert isinstance(reference, Reference)
    logits = theta.expand(V, 2, V)
    made = KLPenalty(reference)
    kl = made.measure(logits, IDS, torch.ones_like(IDS), MASK)
    close(made.reward_kl(kl)[:, 1], theta.log_softmax(-1) - ref.log_softmax(-1))
    metrics = kl_metrics(kl.scores, kl.mask)
    assert {"kl/reverse/mean", "kl/forward/mean", "kl/k3/mean", "kl/sequence/reverse/mean"} <= set(metrics)
    assert made.update(kl) == 0.05


def entry(**logprobs):
    return {int(name[1:]): SimpleNamespace(logprob=value) for name, value in logprobs.items()}


def test_what_vllm_returns_is_read_without_the_texts_own_token():
    ids = torch.tensor([[0, 3, 5, 1], [2, 4, 6, 0]])
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 0]])
    returned = [
        [None, entry(t5=-3.0, t2=-0.5, t4=-1.5), entry(t1=-0.2, t3=-2.5)],
        [None, entry(t4=-0.1, t1=-4.0), entry(t6=-5.0, t0=-1.0, t3=-0.9)],
    ]
    reference = TopKReference.from_vllm(returned, ids, mask, k=2)
    assert reference.ids[0, 2].tolist() == [2, 4], "5 is the text's own, and not among the two likeliest"
    close(reference.logps[0, 2], torch.tensor([-0.5, -1.5]))
    assert reference.ids[1, 1].tolist() == [4, 1]
    assert reference.ids[1, 2].tolist() == [3, 0]
    close(reference.sampled_logp, torch.tensor([[0.0, 0.0, -3.0, -0.2], [0.0, -0.1, -5.0, 0.0]]))
    assert (reference.logps[[0, 0, 1, 1], [0, 1, 0, 3]] == -torch.inf).all()
    for other in (ids + 1, ids[:, [0, 1, 3, 2]]):
        with pytest.raises(ValueError, match="prompt_logprobs 0 are of another text"):
            TopKReference.from_vllm(returned, other, mask, k=2)
    with pytest.raises(ValueError, match="prompt_logprobs 0 are of another text"):
        TopKReference.from_vllm(returned, ids, torch.ones_like(mask), k=2)


def test_what_cannot_be_is_refused():
    ids, logps, sampled = support_of(oracles.one_position()[1], 3)
    for given in ((ids, logps[..., :2], sampled), (ids[0], logps[0], sampled), (ids, logps, sampled[:1])):
        with pytest.raises(ValueError, match=r"expected ids and logps \[B, T, k\]"):
            TopKReference(*given)
    twice = ids.clone()
    twice[3, 1, 2] = twice[3, 1, 0]
    nan = sampled.clone()
    nan[2, 0] = torch.nan
    for given, said in (
        ((twice, logps, sampled), r"an id stands twice at \[sample, position\] \[3, 1\]"),
        ((ids, logps + 2, sampled), "more probability than 1"),
        ((ids, logps, sampled + 9), "more probability than 1"),
        ((ids, logps, nan), r"NaN at \[sample, position\] \[2, 0\]"),
    ):
        with pytest.raises(ValueError, match=said):
            TopKReference(*given)
    logits, ones = torch.zeros(V, 2, V).double(), torch.ones_like(IDS)
    reference = TopKReference(ids, logps, sampled)
    for changed, said in (
        (lambda: penalty(reference).measure(logits[1:], IDS[1:], ones[1:], MASK[1:]), "of another batch"),
        (lambda: penalty(reference).measure(logits, IDS, ones, MASK, temperature=0.7), "temperature 1.*0.7"),
        (lambda: penalty(reference).measure(logits[..., :4], IDS.clamp(max=3), ones, MASK), "of another vocabulary"),
        (lambda: penalty(TopKReference(ids, logps, sampled.roll(1, 0))).measure(logits, IDS, ones, MASK), "shifted"),
    ):
        with pytest.raises(ValueError, match=said):
            changed()
    for ask in (reference.logits, reference.hidden):
        with pytest.raises(TypeError, match=r"TopKReference has no .* of its own"):
            ask(IDS, ones)
