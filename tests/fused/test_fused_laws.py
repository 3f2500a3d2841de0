"""What divergences, scores and losses without logits cost, which laws they obey, what they refuse."""

import math
from dataclasses import replace

import pytest
import torch
from support.divergences import ROWS
from support.fused import (
    CONSTANT,
    DIFFERENTIABLE,
    EVERYTHING,
    EXACT,
    INF,
    MANY,
    all_tokens,
    dense_divergence,
    dense_total,
    every_function,
    our_divergence,
    our_scores,
    our_total,
    set_tile,
    tiles,
    weights,
)
from support.oracles import TwoHeads, dead_words, two_heads, value_and_gradients
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import klft
from klft.fused import fused_token_loss, linear_divergence, token_scores
from klft.heads import LMHead

# --- what it costs ---------------------------------------------------------------------------------------------------


class Ledger(TorchDispatchMode):
    """Multiplications of matrix products, and the most bytes alive at once of those that were made inside."""

    def __init__(self):
        super().__init__()
        self.products, self.peak, self.alive = 0, 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if "mm" in func.overloadpacket.__name__:
            left, right = [x for x in args if isinstance(x, torch.Tensor)][-2:]
            self.products += left.numel() * right.shape[-1]
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.alive[StorageWeakRef(storage)] = storage.nbytes()
        if sum(self.alive.values()) > self.peak:  # only then is it worth to look which of them are gone
            self.alive = {ref: size for ref, size in self.alive.items() if not ref.expired()}
            self.peak = max(self.peak, sum(self.alive.values()))
        return out


def cost(function, two, trained, backward=True):
    leaves = [x.clone().requires_grad_(i in trained) for i, x in enumerate(two.leaves)]
    mask = all_tokens(two)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the ledger sees what its own thread does
    with Ledger() as ledger:
        total = our_total(function, two, mask)(*leaves)
        if trained and backward:
            total.backward()
    torch.set_num_threads(threads)
    return ledger.products / (len(two.hidden) * two.weight.numel()), ledger.peak / (8 * two.logits(*leaves).numel())


@pytest.mark.parametrize(
    ("function", "trained", "products"),
    [
        ("fused_token_loss", [0, 1], 4),  # two heads, two gradients: nothing is computed twice
        ("fused_token_loss", [0], 3),
        ("fused_token_loss", [1], 3),
        ("fused_token_loss", [], 2),
        ("token_scores", [], 2),
        ("token_scores", [0, 1], 6),
        ("token_scores", [0], 5),
        ("linear_divergence", [], 2),
        ("linear_divergence", [0, 1], 6),
        ("linear_divergence", [0], 5),
    ],
)
def test_matrix_products_are_counted(function, trained, products, monkeypatch):
    two = two_heads(64, 31, dim=4)
    set_tile(monkeypatch, 5 * 31)
    found, _ = cost(function, two, trained)
    if function == "fused_token_loss" or not trained:
        assert found == products
    else:
        assert products - 2 <= found <= products  # a backend may keep what it would otherwise compute again


@every_function
def test_no_gradient_is_made_that_nobody_can_ask_for(function, monkeypatch):
    two = two_heads(64, 31, dim=4)
    set_tile(monkeypatch, 5 * 31)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert cost(function, two, [0, 1], backward=False)[0] == 2


@every_function
@pytest.mark.parametrize("trained", [[0, 1], []], ids=["trained", "no gradient"])
def test_no_tensor_of_logits_size_is_ever_held(function, trained, monkeypatch):
    two = two_heads(512, 199, dim=4)
    set_tile(monkeypatch, 4 * 199)
    assert cost(function, two, trained)[1] < 1 / 4
    set_tile(monkeypatch, EVERYTHING)
    assert cost(function, two, trained)[1] > 1, "the ledger sees the logits when they are there"


# --- laws ------------------------------------------------------------------------------------------------------------


def all_results(two):
    """Every divergence and its gradients, and every score."""
    results = {
        f"{name} {params}": value_and_gradients(
            our_divergence(two, name, *params), two.leaves, weights(len(two.hidden))
        )
        for name, params in MANY
    }
    scores = our_scores(two, *two.leaves)
    return results | {"scores": [getattr(scores, field) for field in (*DIFFERENTIABLE, *CONSTANT)]}


def assert_same(found, expected, change=lambda gradients: gradients, **tolerance):
    for name, (value, *gradients) in expected.items():
        moved = [value, *gradients] if name == "scores" else [value, *change(gradients)]
        torch.testing.assert_close(found[name], moved, **(tolerance or EXACT), msg=lambda m, n=name: f"{n}: {m}")


@pytest.fixture(params=[3 * 13, EVERYTHING], ids=["tiles", "one tile"])
def tiled(request, monkeypatch):
    set_tile(monkeypatch, request.param)


def test_a_constant_in_either_bias_changes_nothing(tiled):
    two = two_heads(7, 13, "bias")
    truth = all_results(two)
    for shift, ref_shift in [(30.0, 0.0), (0.0, -50.0), (-20.0, 40.0)]:
        assert_same(all_results(replace(two, bias=two.bias + shift, ref_bias=two.ref_bias + ref_shift)), truth)


def test_the_order_of_the_vocabulary_changes_nothing(tiled):
    two = two_heads(7, 13, "all")
    order = torch.randperm(13, generator=torch.Generator().manual_seed(1))
    assert_same(all_results(two.vocabulary(order)), all_results(two), lambda g: [g[0], g[1][order], g[2][order]])


def test_the_order_of_the_tokens_changes_nothing(tiled):
    two = two_heads(7, 13, "all")
    found = our_divergence(two.tokens(torch.arange(6, -1, -1)), "reverse_kl")(two.hidden.flip(0), *two.leaves[1:])
    torch.testing.assert_close(found.flip(0), our_divergence(two, "reverse_kl")(*two.leaves), **EXACT)


def test_mirror_laws(tiled):
    two = two_heads(7, 13, "all")
    mirrored = replace(
        two, hidden=two.ref_hidden, weight=two.ref_weight, bias=two.ref_bias, options=two.ref_options,
        ref_hidden=two.hidden, ref_weight=two.weight, ref_bias=two.bias, ref_options=two.options,
    )  # fmt: skip
    for (name, *params), (other, *others) in [
        (("forward_kl",), ("reverse_kl",)),
        (("jsd", 0.3), ("jsd", 0.7)),
        (("skew_kl", 0.2), ("skew_reverse_kl", 0.2)),
        (("alpha_divergence", 0.3), ("alpha_divergence", 0.7)),
    ]:
        found = our_divergence(two, name, *params)(*two.leaves)
        torch.testing.assert_close(found, our_divergence(mirrored, other, *others)(*mirrored.leaves), **EXACT)
    scores, swapped = our_scores(two, *two.leaves), our_scores(mirrored, *mirrored.leaves)
    assert torch.equal(scores.top1_agree, swapped.top1_agree)
    torch.testing.assert_close(scores.forward_kl, swapped.reverse_kl, **EXACT)
    torch.testing.assert_close(scores.ref_logp, swapped.logp, **EXACT)


def test_words_that_neither_model_can_say_change_nothing(tiled):
    wide = dead_words(two_heads(7, 13, "bias"), dead := torch.tensor([0, 4, 11, 12]))
    alive = torch.tensor([i for i in range(13) if i not in dead])
    wide.token_ids = alive[wide.token_ids % len(alive)]
    found = all_results(wide)
    assert_same({name: [x[0], x[1], x[2][alive], x[3][alive]] if name != "scores" else x for name, x in found.items()},
                all_results(wide.vocabulary(alive)))  # fmt: skip
    for name, (_, *gradients) in found.items():
        if name != "scores":
            assert not any(g[dead].any() for g in gradients[1:]), name


@pytest.mark.parametrize("name", ["forward_kl", "jsd", "skew_kl", "skew_reverse_kl"])
def test_words_that_only_a_policy_with_a_softcap_can_say(name, tiled):
    """A cap makes every word possible: only the reference, which has none, can exclude one."""
    cut, near = (
        replace(dead_words(two_heads(7, 13, "all"), torch.tensor([0, 12]), policy=False, value=v), ref_options={})
        for v in (-INF, -700.0)  # no mass either
    )
    params = () if name == "forward_kl" else (0.3,)
    found = value_and_gradients(our_divergence(cut, name, *params), cut.leaves, weights(7))
    truth = value_and_gradients(dense_divergence(near, name, *params), near.leaves, weights(7))
    torch.testing.assert_close(found, truth, **EXACT)


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl"])
def test_words_that_one_model_alone_can_say(name, tiled):
    dead = torch.tensor([0, 12])
    policy_only = {"reverse_kl": True, "forward_kl": False}[name]  # a word of the policy alone: KL(p||q) is infinite
    infinite = dead_words(two_heads(7, 13, "bias"), dead, policy=not policy_only, ref=policy_only)
    assert torch.equal(our_divergence(infinite, name)(*infinite.leaves), torch.full((7,), INF, dtype=torch.float64))
    assert (getattr(our_scores(infinite, *infinite.leaves), name) == INF).all()
    # The other way round the word has no weight. -1e3 is no mass either: its exp underflows to 0 in float64.
    sides = {"policy": policy_only, "ref": not policy_only}
    finite, near = (dead_words(two_heads(7, 13, "bias"), dead, **sides, value=v) for v in (-INF, -1e3))
    found = value_and_gradients(our_divergence(finite, name), finite.leaves, weights(7))
    torch.testing.assert_close(
        found, value_and_gradients(dense_divergence(near, name), near.leaves, weights(7)), **EXACT
    )  # fmt: skip
    # A token left out because it is infinite contributes nothing.
    _, *gradients = value_and_gradients(
        lambda *x: torch.where((kl := our_divergence(infinite, name)(*x)) == INF, 0.0, kl), infinite.leaves
    )
    assert not any(g.any() for g in gradients)  # NaN counts as any


@pytest.mark.parametrize(("name", "param"), [("jsd", 0.5), ("skew_kl", 0.1), ("skew_reverse_kl", 0.1)])
@pytest.mark.parametrize("side", ["policy", "ref"])
def test_bounded_divergences_stay_finite_where_one_model_has_no_mass(name, param, side, tiled):
    sides = {"policy": side == "policy", "ref": side == "ref"}
    cut, near = (dead_words(two_heads(7, 13, "bias"), torch.tensor([2, 9]), **sides, value=v) for v in (-INF, -700.0))
    found = value_and_gradients(our_divergence(cut, name, param), cut.leaves, weights(7))
    truth = value_and_gradients(our_divergence(near, name, param), near.leaves, weights(7))
    torch.testing.assert_close(found, truth, **EXACT)


@every_function
@pytest.mark.parametrize("kind", ["bias", "all"])
@pytest.mark.parametrize("poison", [math.nan, INF, -INF])
def test_masked_tokens_contribute_nothing(function, kind, poison, monkeypatch):
    clean = two_heads(9, 13, kind)
    mask = torch.tensor([True, False, True, True, False, True, False, False, True])
    kept = clean.tokens(mask)
    truth = value_and_gradients(dense_total(function, kept), kept.leaves)
    two = replace(clean, hidden=clean.hidden.clone(), ref_hidden=clean.ref_hidden.clone())
    two.hidden[1], two.ref_hidden[4] = poison, poison
    two.hidden[6], two.ref_hidden[6] = poison, poison
    two.hidden[7, 2] = poison  # one number is enough to spoil a row
    for _ in tiles(monkeypatch, 13):
        value, hidden, *head = value_and_gradients(our_total(function, two, mask), two.leaves)
        torch.testing.assert_close([value, hidden[mask], *head], truth, **EXACT)
        assert torch.equal(hidden[~mask], torch.zeros(4, 5, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_huge_logits_and_one_hot_rows(dtype, tiled):
    eye = torch.eye(6, dtype=dtype)
    rows = 2e4 * torch.cat([eye, eye, torch.zeros_like(eye)]) - 1e4
    ref_rows = 2e4 * torch.cat([eye, eye.roll(1, 0), eye]) - 1e4
    two = TwoHeads(rows, eye, None, ref_rows, eye, None, torch.arange(18) % 6)
    dense = two.to(torch.float64)
    for name, params in MANY:
        found = value_and_gradients(our_divergence(two, name, *params), two.leaves)
        assert (found[0] >= 0).all(), name
        if (name, params) not in [("alpha_divergence", (2.0,)), ("alpha_divergence", (-1.0,))]:  # infinite here
            assert all(x.isfinite().all() for x in found), name
        assert torch.equal(found[0][:6], torch.zeros(6, dtype=dtype)), name
        # The plain formulas give 0 * inf here; the dense functions have their own tests at these sizes.
        apart = getattr(klft, name)(dense.hidden, *(() if name == "entropy" else (dense.ref_hidden, *params)))
        torch.testing.assert_close(found[0].double(), apart, rtol=1e-5, atol=1e-7)
    scores = our_scores(two, *two.leaves)
    assert torch.equal(scores.reverse_kl[6:12], torch.full((6,), 2e4, dtype=dtype))
    assert torch.equal(scores.ref_logp[6:12], torch.full((6,), -2e4, dtype=dtype))
    assert scores.top1_agree[:12].tolist() == [1] * 6 + [0] * 6
    torch.testing.assert_close(scores.entropy[12:], torch.full((6,), math.log(6), dtype=dtype))


# --- errors ----------------------------------------------------------------------------------------------------------


def calls(two):
    """Each function, from the keyword arguments of a right call."""
    hidden, head, ids = two.hidden, LMHead(two.weight, two.bias), two.token_ids
    models = {"hidden": hidden, "head": head, "ref_hidden": two.ref_hidden}
    models["ref_head"] = LMHead(two.ref_weight, two.ref_bias)
    return {
        "linear_divergence": lambda **bad: linear_divergence(**(models | bad)),
        "token_scores": lambda **bad: token_scores(**(models | {"token_ids": ids} | bad)),
        "fused_token_loss": lambda **bad: fused_token_loss(
            lambda s: s.logp.sum(), **(models | {"token_ids": ids} | bad)
        ),
    }  # fmt: skip


def refused(function, match, **bad):
    call = calls(two_heads(7, 13, "bias"))[function]
    call()
    with pytest.raises(ValueError, match=match):
        call(**bad)


@every_function
@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, INF])
def test_temperatures_that_are_none(function, temperature):
    refused(function, f"temperature.*{temperature}", temperature=temperature)


@every_function
def test_shapes_that_do_not_fit(function):
    ones = lambda *shape: torch.ones(*shape, dtype=torch.float64)
    refused(function, "7, 6", hidden=ones(7, 6))
    refused(function, "7, 3", ref_hidden=ones(7, 3))
    refused(function, "2, 7, 5", hidden=ones(2, 7, 5))
    refused(function, r"[([]5,?[)\]]", hidden=ones(5))
    refused(function, r"6.*7|7.*6", ref_hidden=ones(6, 4))
    refused(function, r"(?s)13.*12|12.*13", ref_head=LMHead(ones(12, 4)))  # padded to another size: cut by the caller


@pytest.mark.parametrize("function", ["token_scores", "fused_token_loss"])
def test_tokens_that_do_not_fit(function):
    ids = torch.arange(7)
    refused(function, r"6.*7|7.*6", token_ids=ids[:6])
    refused(function, r"(?s)13", token_ids=ids + 7)  # the last is 13, one past the vocabulary
    refused(function, r"(?s)-100", token_ids=torch.where(ids == 3, -100, ids))  # the label that others ignore
    refused(function, "ref_h", ref_head=None)
    refused(function, "ref_h", ref_hidden=None)


@pytest.mark.parametrize("top_k", [-1, 14])
def test_lists_longer_than_the_vocabulary(top_k):
    refused("token_scores", f"top_k.*13.*{top_k}", top_k=top_k)


def test_divergences_that_are_none():
    refused("linear_divergence", "'kl'", divergence="kl")
    with pytest.raises(ValueError, match="'kl'") as error:
        calls(two_heads(7, 13))["linear_divergence"](divergence="kl")
    for name in (*{name for name, _ in ROWS}, "entropy"):
        assert name in str(error.value)
    refused("linear_divergence", "jsd: .*weight.*forward_kl.*reverse_kl", divergence="jsd", weight=1.0)
    refused("linear_divergence", "skew_kl: .*alpha", divergence="skew_kl", alpha=0.0)
    refused("linear_divergence", "alpha_divergence: .*alpha", divergence="alpha_divergence", alpha=1.0)
    refused("linear_divergence", "renyi_divergence: .*alpha", divergence="renyi_divergence", alpha=-0.5)
    refused("linear_divergence", "backend", backend="abacus")
    for params in ({"alpha": 0.5}, {"weight": 0.5}):
        with pytest.raises((ValueError, TypeError), match=next(iter(params))):
            calls(two_heads(7, 13))["linear_divergence"](divergence="reverse_kl", **params)


def test_defaults_are_those_of_the_dense_functions():
    two = two_heads(7, 13)
    assert torch.equal(calls(two)["linear_divergence"](), our_divergence(two, "reverse_kl")(*two.leaves))
    for name, default in [("jsd", 0.5), ("skew_kl", 0.1), ("skew_reverse_kl", 0.1), ("alpha_divergence", 0.5),
                          ("renyi_divergence", 0.5)]:  # fmt: skip
        found = our_divergence(two, name)(*two.leaves)
        assert torch.equal(found, our_divergence(two, name, default)(*two.leaves))
