"""Divergences, scores and losses from hidden states and heads: the dense float64 result, without its logits."""

import math
from dataclasses import replace

import pytest
import torch
from support.fused import (
    CONSTANT,
    DIFFERENTIABLE,
    EVERYTHING,
    EXACT,
    INF,
    LOSSES,
    MANY,
    SIZES,
    all_tokens,
    dense_divergence,
    dense_loss,
    dense_scores,
    dense_total,
    every_function,
    every_head,
    every_row,
    limits,
    mix,
    our_divergence,
    our_loss,
    our_scores,
    our_total,
    set_tile,
    tiles,
    weights,
)
from support.oracles import two_heads, value_and_gradients

from klft.fused import TokenScores, fused_token_loss, token_scores
from klft.heads import LMHead

# --- values and gradients --------------------------------------------------------------------------------------------


@every_row
@every_head
def test_divergence_is_the_dense_one(name, params, kind, monkeypatch):
    for tokens, vocab in SIZES:
        two = two_heads(tokens, vocab, kind)
        truth = value_and_gradients(dense_divergence(two, name, *params), two.leaves, weights(tokens))
        for _ in tiles(monkeypatch, vocab):
            found = value_and_gradients(our_divergence(two, name, *params), two.leaves, weights(tokens))
            assert found[0].shape == (tokens,)
            assert {x.dtype for x in found} == {torch.float64}
            torch.testing.assert_close(found, truth, **EXACT)


@every_head
def test_scores_are_the_dense_ones(kind, monkeypatch):
    for tokens, vocab in SIZES:
        two = two_heads(tokens, vocab, kind)
        truth = dense_scores(two, *two.leaves)
        for _ in tiles(monkeypatch, vocab):
            with torch.no_grad():
                found = our_scores(two, *two.leaves)
            assert isinstance(found, TokenScores)
            for field in (*DIFFERENTIABLE, *CONSTANT):
                value = getattr(found, field)
                assert value.shape == (tokens,), field
                torch.testing.assert_close(value.double(), getattr(truth, field), **EXACT, msg=field)


@every_head
@pytest.mark.parametrize("field", [*DIFFERENTIABLE, "all"])
def test_gradients_of_scores_are_the_dense_ones(kind, field, monkeypatch):
    pick = mix if field == "all" else lambda scores: getattr(scores, field)
    for tokens, vocab in SIZES:
        two = two_heads(tokens, vocab, kind)
        truth = value_and_gradients(lambda *x, t=two: pick(dense_scores(t, *x)), two.leaves, weights(tokens))
        for _ in tiles(monkeypatch, vocab):
            found = value_and_gradients(lambda *x, t=two: pick(our_scores(t, *x)), two.leaves, weights(tokens))
            torch.testing.assert_close(found, truth, **EXACT)


@pytest.mark.parametrize("field", ["logp", "entropy"])
def test_scores_of_one_model_alone(field, monkeypatch):
    two = two_heads(7, 13, "all")

    def alone(hidden, weight, bias):
        head = LMHead(weight, bias, **two.options)
        scores = token_scores(hidden, head, two.token_ids, temperature=two.temperature, top_k=3)
        for of_both in (*CONSTANT, "reverse_kl", "forward_kl", "ref_top_ids", "ref_top_p"):
            assert getattr(scores, of_both) is None, of_both
        assert scores.top_ids.shape == scores.top_p.shape == (7, 3)
        return getattr(scores, field)

    def loss(*leaves):
        head = LMHead(*leaves[1:], **two.options)
        return fused_token_loss(
            lambda s, w: (getattr(s, field) * w).sum(), leaves[0], head, two.token_ids, temperature=two.temperature,
            per_token=(weights(7),),
        )  # fmt: skip

    truth = value_and_gradients(lambda *x: getattr(dense_scores(two, *x), field), two.leaves, weights(7))
    for _ in tiles(monkeypatch, 13):
        torch.testing.assert_close(value_and_gradients(alone, two.leaves, weights(7)), truth, **EXACT)
        value, *gradients = value_and_gradients(loss, two.leaves)
        torch.testing.assert_close([value, *gradients], [truth[0] @ weights(7), *truth[1:]], **EXACT)


@pytest.mark.parametrize("top_k", [1, 5, 13])
def test_top_k_lists(top_k, monkeypatch):
    two = two_heads(7, 13, "all")
    probabilities = [torch.softmax(x, -1).topk(top_k) for x in (two.logits(*two.leaves), two.ref_logits)]
    for _ in tiles(monkeypatch, 13):
        scores = our_scores(two, *two.leaves, top_k=top_k)
        found = [(scores.top_p, scores.top_ids), (scores.ref_top_p, scores.ref_top_ids)]
        for (p, ids), dense in zip(found, probabilities, strict=True):
            torch.testing.assert_close(p, dense.values, **EXACT)
            assert torch.equal(ids, dense.indices)
    assert our_scores(two, *two.leaves).top_ids is None


@every_row
def test_gradcheck_of_divergences(name, params, monkeypatch):
    two = two_heads(3, 5, "all", dim=3)
    set_tile(monkeypatch, 10)
    leaves = [x.requires_grad_() for x in two.leaves]
    assert torch.autograd.gradcheck(our_divergence(two, name, *params), leaves)


def test_gradcheck_of_scores_and_loss(monkeypatch):
    two = two_heads(3, 5, "all", dim=3)
    set_tile(monkeypatch, 10)
    leaves = [x.requires_grad_() for x in two.leaves]
    assert torch.autograd.gradcheck(
        lambda *x: [getattr(our_scores(two, *x), field) for field in DIFFERENTIABLE], leaves
    )
    assert torch.autograd.gradcheck(our_loss(two, lambda s: (s.reverse_kl * s.logp.exp()).sum()), leaves)


# --- losses taken chunk by chunk -------------------------------------------------------------------------------------


@every_head
@pytest.mark.parametrize("loss", LOSSES)
def test_loss_is_the_dense_one(loss, kind, monkeypatch):
    for tokens, vocab in [(7, 13), (1, 7), (0, 7)]:
        two = two_heads(tokens, vocab, kind)
        old_logp = dense_scores(two, *two.leaves).logp + torch.linspace(-0.5, 0.5, tokens).double()
        per_token = (old_logp, weights(tokens), torch.arange(tokens) % 3 != 1)
        truth = value_and_gradients(dense_loss(two, LOSSES[loss], per_token), two.leaves, -3.7)
        for _ in tiles(monkeypatch, vocab):
            found = value_and_gradients(our_loss(two, LOSSES[loss], per_token), two.leaves, -3.7)
            assert found[0].shape == ()
            torch.testing.assert_close(found, truth, **EXACT)


def test_chunks_are_cut_in_order_and_to_the_tile(monkeypatch):
    two = two_heads(11, 13)
    columns = torch.arange(22).view(11, 2)
    seen = []

    def loss(scores, rows, numbers):
        assert len(scores.logp) == len(scores.ref_entropy) == len(rows) == len(numbers)
        assert (rows[:, 0] == 2 * numbers).all()
        seen.append(numbers)
        return scores.reverse_kl.sum()

    for most in (1, 3, 11):
        seen.clear()
        set_tile(monkeypatch, most * 13 + 12)
        our_loss(two, loss, (columns, torch.arange(11)))(*two.leaves)
        assert torch.equal(torch.cat(seen), torch.arange(11))
        assert 1 <= min(map(len, seen)) <= max(map(len, seen)) <= most
        assert len(seen) == math.ceil(11 / most), "the loss is called once per chunk"


def test_a_loss_that_reads_no_score_has_no_gradient():
    two = two_heads(7, 13, "bias")
    for constant in (lambda s: torch.tensor(2.5, dtype=torch.float64), lambda s: s.ref_logp.sum()):
        with pytest.warns(UserWarning, match="loss_fn's result has no gradient"):
            _, *gradients = value_and_gradients(our_loss(two, constant), two.leaves)
        assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients)


def test_a_loss_that_reads_a_trained_tensor_is_refused(monkeypatch):
    two = two_heads(7, 13)
    coef = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    hidden = two.hidden.requires_grad_()
    losses = [
        lambda s: (coef * s.reverse_kl).sum(),
        lambda s: s.logp.sum() + (2 * coef).exp(),
        lambda s: 2 * coef,
        lambda s: s.logp.sum() + hidden.square().sum(),
    ]
    for _ in tiles(monkeypatch, 13):
        for loss in losses:
            with pytest.raises(ValueError, match="gradient"):
                our_loss(two, loss)(hidden, two.weight.requires_grad_())
        our_loss(two, lambda s: (coef.detach() * s.reverse_kl).sum())(hidden, two.weight).backward()
    assert coef.grad is None


def test_what_per_token_may_not_be():
    two = two_heads(7, 13)
    loss = lambda s, x: (s.logp * x).sum()
    with pytest.raises(ValueError, match="per_token"):
        our_loss(two, loss, (torch.ones(7, requires_grad=True),))(*two.leaves)
    with pytest.raises(ValueError, match=r"per_token.*6.*7|per_token.*7.*6"):
        our_loss(two, loss, (torch.ones(6),))(*two.leaves)
    with pytest.raises((ValueError, TypeError)):
        our_loss(two, lambda s: s.logp)(*two.leaves)


# --- how the result is used ------------------------------------------------------------------------------------------


@every_function
def test_backward_twice_gives_gradients_of_their_own(function, monkeypatch):
    two = two_heads(7, 13, "all")
    truth = value_and_gradients(dense_total(function, two), two.leaves, -3.7)[1:]
    for _ in tiles(monkeypatch, 13):
        leaves = [x.clone().requires_grad_() for x in two.leaves]
        total = -3.7 * our_total(function, two, all_tokens(two))(*leaves)
        total.backward(retain_graph=True)
        torch.testing.assert_close([x.grad for x in leaves], truth, **EXACT)
        for x in leaves:
            x.grad.zero_()  # as clipping does, in place: must not reach what the graph keeps
        total.backward(retain_graph=True)
        torch.testing.assert_close([x.grad for x in leaves], truth, **EXACT)
        total.backward()
        torch.testing.assert_close([x.grad / 2 for x in leaves], truth, **EXACT)


@every_function
def test_gradients_add_up_over_calls(function):
    two = two_heads(7, 13, "all")
    truth = value_and_gradients(dense_total(function, two), two.leaves)[1:]
    leaves = [x.clone().requires_grad_() for x in two.leaves]
    total = our_total(function, two, all_tokens(two))
    for _ in range(3):
        total(*leaves).backward()
    (total(*leaves) - 0.5 * total(*leaves)).backward()
    torch.testing.assert_close([x.grad / 3.5 for x in leaves], truth, **EXACT)


@every_function
def test_without_gradient(function):
    two = two_heads(7, 13, "all")
    truth = dense_total(function, two)(*two.leaves)
    total = our_total(function, two, all_tokens(two))
    leaves = [x.clone().requires_grad_() for x in two.leaves]
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            value = total(*leaves)
        assert not value.requires_grad
        torch.testing.assert_close(value.clone(), truth, **EXACT)
    value = total(*two.leaves)
    assert not value.requires_grad
    torch.testing.assert_close(value, truth, **EXACT)


@every_function
@pytest.mark.parametrize("trained", [[0], [1], [2], [0, 1], [0, 2], [1, 2]], ids=str)
def test_frozen_parts_get_no_gradient(function, trained):
    two = two_heads(7, 13, "all")
    truth = value_and_gradients(dense_total(function, two), two.leaves)[1:]
    leaves = [x.clone().requires_grad_(i in trained) for i, x in enumerate(two.leaves)]
    our_total(function, two, all_tokens(two))(*leaves).backward()
    for i, leaf in enumerate(leaves):
        if i in trained:
            torch.testing.assert_close(leaf.grad, truth[i], **EXACT)
        else:
            assert leaf.grad is None


@every_function
def test_reference_gets_no_gradient(function, monkeypatch):
    two = two_heads(7, 13, "all")
    truth = value_and_gradients(dense_total(function, two), two.leaves)
    for x in (two.ref_hidden, two.ref_weight, two.ref_bias):
        x.requires_grad_()
    leaves = [x.clone().requires_grad_() for x in two.leaves]
    our_total(function, two, all_tokens(two))(*leaves).backward()
    assert two.ref_hidden.grad is two.ref_weight.grad is two.ref_bias.grad is None
    torch.testing.assert_close([x.grad for x in leaves], truth[1:], **EXACT)
    scores = our_scores(two, *leaves)
    assert [getattr(scores, field).requires_grad for field in (*DIFFERENTIABLE, *CONSTANT)] == [True] * 4 + [False] * 3


@every_function
@pytest.mark.parametrize("kind", ["plain", "all"])
def test_tied_weights(function, kind, monkeypatch):
    """One tensor is the embedding the hidden states come from, the policy's head and the reference's head."""
    two = two_heads(7, 13, kind, ref_dim=5)
    ids = two.token_ids.roll(1)

    def run(total):
        weight = two.weight.clone().requires_grad_()
        own = replace(two, ref_weight=weight)
        bias = [] if two.bias is None else [two.bias]
        value = total(own)(torch.tanh(weight[ids] + two.hidden), weight, *bias)
        value.backward()
        return [value.detach(), weight.grad]

    truth = run(lambda own: dense_total(function, own))
    for _ in tiles(monkeypatch, 13):
        torch.testing.assert_close(run(lambda own: our_total(function, own, all_tokens(own))), truth, **EXACT)


@every_function
def test_weight_and_hidden_that_are_computed_and_strided(function, monkeypatch):
    two = two_heads(6, 13, "bias", dim=4)
    gen = torch.Generator().manual_seed(3)
    a, b, base = (torch.randn(*shape, generator=gen, dtype=torch.float64) for shape in [(13, 2), (2, 4), (4, 12)])

    def run(total):
        leaves = [x.clone().requires_grad_() for x in (a, b, base)]
        low, high, states = leaves
        transposed = (two.weight.T.contiguous().T + low @ high).T.contiguous().T  # not contiguous, not a leaf
        value = total(states.T[::2], transposed, two.bias.expand(2, -1).T[:, 0])
        value.backward()
        return [value.detach(), *[x.grad for x in leaves]]

    truth = run(dense_total(function, two))
    for _ in tiles(monkeypatch, 13):
        torch.testing.assert_close(run(our_total(function, two, all_tokens(two))), truth, **EXACT)


def test_expanded_grad_output():
    two = two_heads(7, 13)
    truth = value_and_gradients(dense_divergence(two, "jsd", 0.3), two.leaves, 1 / 7)
    leaves = [x.clone().requires_grad_() for x in two.leaves]
    our_divergence(two, "jsd", 0.3)(*leaves).mean().backward()
    torch.testing.assert_close([x.grad for x in leaves], truth[1:], **EXACT)


@every_function
def test_a_second_derivative_is_right_or_refused(function):
    two = two_heads(4, 7)
    hidden = two.hidden.requires_grad_()

    def twice(total):
        (first,) = torch.autograd.grad(total(hidden, two.weight), hidden, create_graph=True)
        return torch.autograd.grad(first.square().sum(), hidden)[0]

    try:
        found = twice(our_total(function, two, all_tokens(two)))
    except RuntimeError:
        return
    torch.testing.assert_close(found, twice(dense_total(function, two)), **EXACT)


def test_ids_changed_before_backward_are_refused():
    two = two_heads(7, 13)
    total = our_scores(two, *[x.clone().requires_grad_() for x in two.leaves]).logp.sum()
    two.token_ids.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_what_a_second_backward_reads_may_not_change():
    for changed in ("ids", "per_token"):
        two, factor = two_heads(7, 13), weights(7)
        loss = our_loss(two, lambda s, x: (s.logp * x).sum(), (factor,))
        total = loss(*[x.clone().requires_grad_() for x in two.leaves])
        total.backward(retain_graph=True)
        (two.token_ids if changed == "ids" else factor).zero_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            total.backward()


@pytest.mark.parametrize("function", ["linear_divergence", "token_scores"])
def test_weight_changed_before_backward_is_refused(function):
    two = two_heads(7, 13)
    leaves = [x.clone().requires_grad_() for x in two.leaves]
    total = our_total(function, two, all_tokens(two))(*leaves)
    with torch.no_grad():
        leaves[1].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


# --- what is no distribution -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("poison", [math.nan, INF])
@pytest.mark.parametrize("place", ["bias", "weight", "hidden"])
def test_what_is_no_distribution_is_never_a_number(poison, place, monkeypatch):
    two = two_heads(3, 13, "bias")
    {"bias": two.bias, "weight": two.weight[:, 0], "hidden": two.hidden[:, 0]}[place][2] = poison
    two.hidden[:, 0].abs_()  # an infinite weight is an infinite logit then, never a suppressed token
    touched = [False, False, True] if place == "hidden" else [True] * 3
    two.token_ids.copy_(torch.tensor([0, 7, 11]))
    for _ in tiles(monkeypatch, 13):
        scores = our_scores(two, *two.leaves)
        for field in DIFFERENTIABLE:
            assert getattr(scores, field).isnan().tolist() == touched, field
            # exp: of a log-probability of -inf it would be 0, and so would the loss be.
            found = value_and_gradients(our_loss(two, lambda s, f=field: getattr(s, f).exp().sum()), two.leaves)
            assert found[0].isnan(), field
            assert found[1][2].isnan().any(), field
        for name, params in MANY:
            assert our_divergence(two, name, *params)(*two.leaves).isnan().tolist() == touched, name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("block_logits", [1, 5, EVERYTHING])
def test_the_lowest_number_as_a_mask(dtype, block_logits, monkeypatch):
    """finfo.min instead of -inf: its tokens are as if they were not there, whole blocks of them too."""
    monkeypatch.setitem(*limits(block_logits=block_logits))
    two, kept = two_heads(3, 13, "bias"), [0, *range(4, 11), 12]
    gone = [i for i in range(13) if i not in kept]
    two.token_ids.copy_(torch.tensor([5, 0, 12]))
    few = two.only(kept)
    lowest = torch.finfo(dtype).min
    names = ("hidden", "weight", "bias", "ref_hidden", "ref_weight", "ref_bias")
    tolerance = EXACT if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-4}
    for mask, ref_mask in [(lowest, lowest), (-1e35, lowest), (-1000.0, lowest)]:  # exp gives 0 for each
        two.bias[gone], two.ref_bias[gone] = mask, ref_mask
        cast = replace(two, **{name: getattr(two, name).to(dtype) for name in names})
        for loss in (
            lambda s: 1e4 * s.entropy.sum(),
            lambda s: 10 * s.reverse_kl.sum(),
            lambda s: (10 * s.entropy + 7 * s.reverse_kl - 3 * s.logp).sum(),
            lambda s: (9 * s.forward_kl + 7 * s.reverse_kl).sum(),
        ):
            value, *truth = value_and_gradients(dense_loss(few, loss), few.leaves)
            found = value_and_gradients(our_loss(cast, loss), cast.leaves)
            assert all(x.isfinite().all() for x in found)
            scale = max(1, *(x.abs().max().item() for x in truth))  # of a factor of 1e4 too the digits count
            found = [x.double() / scale for x in (found[0], found[1], found[2][kept], found[3][kept])]
            torch.testing.assert_close(found, [x / scale for x in (value, *truth)], **tolerance)


@pytest.mark.parametrize("function", ["token_scores", "fused_token_loss", "linear_divergence"])
def test_constants_made_in_inference_mode(function):
    """As rollouts are: ids, old log-probabilities, the reference's hidden states and head."""
    two = two_heads(7, 13, "bias")
    truth = value_and_gradients(dense_total(function, two), two.leaves)
    with torch.inference_mode():
        names = ("token_ids", "ref_hidden", "ref_weight", "ref_bias")
        two = replace(two, **{name: getattr(two, name).clone() for name in names})
        mask = all_tokens(two)
    if function != "fused_token_loss":
        mask = mask.clone()  # the test's own use of it
    assert two.token_ids.is_inference()
    torch.testing.assert_close(value_and_gradients(our_total(function, two, mask), two.leaves), truth, **EXACT)
