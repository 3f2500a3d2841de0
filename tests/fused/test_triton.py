"""The Triton kernels: torch_backend's results and float64's, in Triton's interpreter and, if there is one, on a GPU.

The interpreter is a property of a process (TRITON_INTERPRET is read when triton is imported), so the checks run in one
of their own, as plain functions of (..., device), and nobody else's tests see it.
"""

import importlib.util
import itertools
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import conftest  # noqa: F401 - also for the interpreter's process: few threads
import pytest
import torch
from support import oracles
from support.fused import limits
from support.kernels import (
    INF,
    NAMES,
    NAN,
    close,
    gradient_by,
    kernels,
    log_probabilities,
    max_and_sum,
    norm_by_kernels,
    normal,
    replaced,
    several_blocks,
    sums_by,
    tile,
)
from support.oracles import two_heads, value_and_gradients

from klft.fused import api, fused_token_loss, linear_divergence, token_scores, torch_backend
from klft.heads import LMHead

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed here")
sizes = pytest.mark.parametrize("v", [1, 5, 127, 1031])
tokens = pytest.mark.parametrize("n", [1, 3, 7])

ROUNDING = {"rtol": 1e-6, "atol": 1e-6}


@pytest.fixture(scope="module")
def interpreter():
    """One process where kernels are interpreted."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            assert pool.submit(kernels_are_interpreted).result()
        yield pool


GPU = [pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else []


@pytest.fixture(params=["interpreter", *GPU])
def check(request):
    """check(f, *args): f(*args, device) where the kernels run."""
    if request.param == "cuda":
        return lambda f, *args: f(*args, "cuda")
    pool = request.getfixturevalue("interpreter")
    return lambda f, *args: pool.submit(f, *args, "cpu").result()


def kernels_are_interpreted():
    return kernels().INTERPRETED


# ---- max_and_sum_ ----------------------------------------------------------------------------------------------------


def folds(n, v, offset, device):
    logits, _ = tile(normal(n, v) + offset, device)
    truth = logits.double()
    z, intact = tile(logits, device)
    with several_blocks():
        peak, total = max_and_sum(kernels(), z)
    close(peak, truth.amax(-1), rtol=0, atol=0)
    close(z, truth, rtol=0, atol=0)
    # As exact for logits of 1e4 as for logits of 1.
    close(total, (truth - truth.amax(-1, keepdim=True)).exp().sum(-1), **ROUNDING)
    assert intact()
    for mine, theirs in zip((peak, total), max_and_sum(torch_backend, logits), strict=True):
        close(mine, theirs, **ROUNDING)
    close(sums_by(kernels(), z, z, ("entropy",), norm_by_kernels(z, z))[0], oracles.entropy(truth))


@tokens
@sizes
@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4])
def test_fold(check, n, v, offset):
    check(folds, n, v, offset)


def folds_the_unusual(device):
    v = 600
    values = normal(8, v)
    values[0, ::2] = -INF
    values[1] = -INF
    values[1, -1] = 3.0
    values[2] = -INF
    values[3, 300] = INF
    values[4, 300] = NAN
    values[5] = NAN
    values[6, 0] = 1e38
    values[7] = -INF
    values[7, 5] = NAN
    z, intact = tile(values, device)
    with several_blocks():
        peak, total = max_and_sum(kernels(), z)
    assert intact()
    keep = [0, 1, 6]
    close(peak[keep], values[keep].amax(-1))
    close(total[keep], (values - values.amax(-1, keepdim=True))[keep].exp().sum(-1))
    assert peak[2:4].tolist() == [0, 0]
    assert total[2] == 0
    assert not total[[3, 4, 5, 7]].isfinite().any()
    assert peak.isfinite().all()
    theirs = tile(values, device)[0]
    other = max_and_sum(torch_backend, theirs)
    assert other[1].isfinite().tolist() == total.isfinite().tolist()
    assert (other[0].isfinite() & (other[0][[0, 1, 2, 3, 6]] == peak[[0, 1, 2, 3, 6]]).all()).all()


def test_fold_the_unusual(check):
    check(folds_the_unusual)


# ---- exact_sums ------------------------------------------------------------------------------------------------------


def true_sums(lp, lq):
    """[4, n] from the formulas and their limits, term by term in float64."""
    lp, lq = lp.double().cpu(), lq.double().cpu()
    p, q, x = lp.exp(), lq.exp(), lq - lp
    reverse = torch.where(lp == -INF, q, torch.where(lq == -INF, INF, p * (torch.expm1(x) - x)))
    forward = torch.where(lq == -INF, p, torch.where(lp == -INF, INF, q * (torch.expm1(-x) + x)))
    neither = (lp == -INF) & (lq == -INF)
    reverse, forward = reverse.masked_fill(neither, 0.0), forward.masked_fill(neither, 0.0)
    entropies = [-(w * lw).masked_fill(lw == -INF, 0.0) for w, lw in ((p, lp), (q, lq))]
    return torch.stack([t.sum(-1) for t in (*entropies, reverse, forward)])


def sums(n, v, spread, device):
    logits = normal(n, v)
    ref_logits = logits + normal(n, v, seed=1, size=spread)
    lp, _ = tile(log_probabilities(logits), device)
    lq, _ = tile(log_probabilities(ref_logits), device, more=2)
    with several_blocks():
        found = sums_by(kernels(), lp, lq, NAMES)
        assert found.shape == (4, n)
        assert (found[2:] >= 0).all()
        close(found, true_sums(lp, lq))
        close(found, sums_by(torch_backend, lp, lq, NAMES))
        for i, name in enumerate(NAMES):
            every = getattr(oracles, name.removeprefix("ref_"))
            arguments = {"entropy": [logits], "ref_entropy": [ref_logits]}.get(name, [logits, ref_logits])
            close(found[i], every(*arguments))
        close(sums_by(kernels(), lp, lp, ("entropy",)), found[:1])
        for names in (c for k in (1, 2, 3) for c in itertools.combinations(NAMES, k) if v == 5):
            close(sums_by(kernels(), lp, lq, names), found[[NAMES.index(name) for name in names]])


@tokens
@sizes
@pytest.mark.parametrize("spread", [0.3, 6.0])
def test_exact_sums(check, n, v, spread):
    check(sums, n, v, spread)


def suppressed(device):
    """Rows with -inf on both sides, on one, on the other, on everything; what is left of a shard that has none."""
    v = 600
    logits, ref_logits = normal(6, v), normal(6, v, seed=1)
    for row, sides in enumerate([(logits, ref_logits), (logits,), (ref_logits,)]):
        for side in sides:
            side[row, row::7] = -INF
    lp, lq = log_probabilities(logits), log_probabilities(ref_logits)
    lp[3:5], lq[3], lq[5] = -INF, -INF, -INF
    lp, lq = tile(lp, device)[0], tile(lq, device)[0]
    with several_blocks():
        found = sums_by(kernels(), lp, lq, NAMES)
    close(found, true_sums(lp, lq))
    assert found[:, 0].isfinite().all()
    assert found[:, 3].tolist() == [0, 0, 0, 0]
    assert found[2].isinf().tolist() == [False, False, True, False, False, True]
    assert found[3].isinf().tolist() == [False, True, False, False, True, False]


def test_suppressed_tokens_have_their_limits(check):
    check(suppressed)


def nan_reaches_the_sums(device):
    v = 600
    lp, lq = tile(log_probabilities(normal(4, v)), device)[0], tile(log_probabilities(normal(4, v, seed=1)), device)[0]
    lp[0, 500], lq[1, 3] = NAN, NAN
    lp[2, 7], lq[2, 7] = NAN, -INF
    with several_blocks():
        isnan = sums_by(kernels(), lp, lq, NAMES).isnan()
    assert isnan[:, 3].tolist() == [False] * 4
    # entropy, ref_entropy, reverse_kl, forward_kl where lp, where lq, where lp is NaN
    policy, reference = [True, False, True, True], [False, True, True, True]
    assert isnan[:, :3].T.tolist() == [policy, reference, policy]


def test_nan_reaches_the_sums(check):
    check(nan_reaches_the_sums)


def nearly_equal(device):
    """A KL of 5e-7, where the plain formula has no correct digit; from logits to sums with these kernels only."""
    logits = normal(5, 1031, size=2.0).float()
    ref_logits = logits + normal(5, 1031, seed=1, size=1e-3).float()
    ref_logits[4] = logits[4]
    z, y = tile(logits, device)[0], tile(ref_logits, device)[0]
    with several_blocks():
        found = sums_by(kernels(), z, y, NAMES, norm_by_kernels(z, y))[2:].cpu()
    truth = torch.stack([oracles.reverse_kl(logits, ref_logits), oracles.forward_kl(logits, ref_logits)])
    assert ((truth[:, :4] > 3e-7) & (truth[:, :4] < 8e-7)).all()
    close(found[:, :4], truth[:, :4], rtol=1e-3, atol=0.0)
    assert found[:, 4].tolist() == [0, 0]


def test_nearly_equal_models(check):
    check(nearly_equal)


def never_negative(device):
    """A term a row, where q - p - p * x loses its last digits: two ratios down where the numbers end, then others."""
    tail, rest = torch.linspace(-104.5, -102.5, 41), torch.tensor([-100.0, -40.0, -3.0])
    ratios = (-200.0, -10.0, -1.0000001, -1.0, -1e-6, 1e-6, 1.0, 1.0000001, 2.9)
    pairs = [(tail, -1.01), (tail, 1.01), *((rest, ratio) for ratio in ratios)]
    lp = torch.cat([column for column, _ in pairs])[:, None].to(device)
    x = torch.cat([torch.full_like(column, ratio) for column, ratio in pairs])[:, None].to(device)
    found = sums_by(kernels(), lp, lp + x, NAMES[2:])
    assert (found >= 0).all()
    close(found, true_sums(lp, lp + x)[2:], rtol=1e-5, atol=1e-40)


def test_no_term_is_negative(check):
    check(never_negative)


# ---- gradients -------------------------------------------------------------------------------------------------------


def factors(n, given, device):
    gen = torch.Generator().manual_seed(5)
    return [torch.randn(n, 2, generator=gen).to(device)[:, 0] if wanted else None for wanted in (True, *given)]


def true_gradient(lp, lq, a, b, c, d):
    """0 - d * q where p is 0, in float64."""
    lp, lq, a, b, c, d = (torch.zeros(1) if t is None else t.double().cpu() for t in (lp, lq, a, b, c, d))
    a, b, c, d = (t[:, None] for t in (a, b, c, d))
    p = lp.exp()
    first = torch.where(lp == -INF, 0.0, p * (a + b * lp + torch.where(c == 0, 0.0, c * (lq - lp))))
    return first - d * lq.exp()


def gradients(n, v, device):
    logits, ref_logits = log_probabilities(normal(n, v)), log_probabilities(normal(n, v, seed=1))
    with several_blocks():
        for given in itertools.product([False, True], repeat=3):
            given = factors(n, given, device)
            lp, intact = tile(logits, device)
            lq = tile(ref_logits, device, more=2)[0]
            before, theirs = lp.clone(), lp.clone()
            found = gradient_by(kernels(), lp, lq, *given)
            assert found.data_ptr() == lp.data_ptr()
            close(lp, true_gradient(before, lq, *given))
            close(lp, gradient_by(torch_backend, theirs, lq, *given))
            close(theirs, before)
            assert intact()
            close(lq, ref_logits)


@tokens
@sizes
def test_gradient(check, n, v):
    check(gradients, n, v)


def gradient_of_suppressed_tokens(device):
    lp = log_probabilities(normal(4, 600))
    lq = log_probabilities(normal(4, 600, seed=1))
    lp[0, 3], lq[0, 3] = -INF, -INF  # neither may say it
    lp[0, 500], lp[1] = -INF, -INF  # the policy may not; nor anything on this shard
    lp[2, 9] = NAN
    lp, lq = tile(lp, device)[0], tile(lq, device)[0]
    given = factors(4, (True, True, True), device)
    truth = true_gradient(lp, lq, *given)
    with several_blocks():
        gradient_by(kernels(), lp, lq, *given)
    close(lp, truth)
    assert lp[[0, 1, 3]].isfinite().all()
    assert lp[0, 3] == 0
    assert lp[2].isnan().nonzero().tolist() == [[9]]


def test_gradient_of_suppressed_tokens(check):
    check(gradient_of_suppressed_tokens)


def gradient_with_one_hot(n, v, device):
    """logp's one-hot, in fp32 and rounded once to bf16, as autograd has it: p near 1 loses no digits."""
    logits = normal(n, v)
    ids = torch.arange(n) * 5 % v
    logits[0, ids[0]] = logits[0].max() + 8.0
    g = torch.linspace(-2, 3, n)
    truth = logits.clone().requires_grad_()
    (torch.log_softmax(truth, -1).gather(1, ids[:, None])[:, 0] * g).sum().backward()
    elsewhere = ids.clone()
    elsewhere[1:2] = -1  # another process has this token's row
    with several_blocks():
        bf16 = 2**-8 if device == "cuda" else 2**-7  # the interpreter cuts digits off, a GPU rounds to nearest
        for dtype, digits in ((torch.float32, 1e-5), (torch.bfloat16, bf16 + 1e-5)):
            z, intact = tile(logits, device)
            norm = norm_by_kernels(z, z)
            found = gradient_by(
                kernels(), z, z, -g.to(device), norm=norm, of_id=(elsewhere.to(device), g.to(device)), dtype=dtype
            )
            assert found.dtype == dtype
            assert intact()
            close(found[:1], truth.grad[:1], rtol=digits, atol=1e-6)
            close(found[2:], truth.grad[2:], rtol=digits, atol=1e-6)
            if n > 1:
                close(found[1], -g[1] * torch.softmax(logits[1], -1), rtol=digits, atol=1e-6)


@tokens
@sizes
def test_gradient_with_one_hot(check, n, v):
    check(gradient_with_one_hot, n, v)


# ---- what is not launched --------------------------------------------------------------------------------------------


def nothing_to_do(n, v, device):
    empty = torch.zeros(n, v, device=device)
    for backend in (kernels(), torch_backend):
        assert [t.tolist() for t in max_and_sum(backend, empty)] == [[0.0] * n] * 2
        assert sums_by(backend, empty, empty, NAMES).tolist() == [[0.0] * n] * 4
        assert gradient_by(backend, empty, empty, *[torch.zeros(n, device=device)] * 4).shape == (n, v)


@pytest.mark.parametrize(("n", "v"), [(0, 5), (3, 0), (0, 0)])
def test_no_tokens_or_no_vocabulary(check, n, v):
    check(nothing_to_do, n, v)


def beyond_2_to_the_31(device):
    """Row 2 starts 2 * (2^30 + 5) numbers after row 0. Memory that nobody touches is not there."""
    v, stride = 700, 2**30 + 5
    try:
        memory = torch.empty(2 * stride + 2 * v, device=device)
    except RuntimeError:
        pytest.skip("8.6 GB of addresses are not to be had here")
    lp, lq = memory.as_strided((3, v), (stride, 1)), memory.as_strided((3, v), (stride, 1), v)
    small = normal(3, v).float().to(device), normal(3, v, seed=1).float().to(device)
    for big, values in zip((lp, lq), small, strict=True):
        for row in range(3):
            big[row] = values[row]
    a = torch.tensor([1.0, 2.0, 3.0], device=device)
    results = []
    with several_blocks():
        for z, y in ((lp, lq), small):
            norm = norm_by_kernels(z, y)
            out = [norm.log_z, norm.ref_log_z, sums_by(kernels(), z, y, NAMES, norm)]
            gradient_by(kernels(), z, y, a, a, a, a, norm)
            results.append([*out, *z, *y])
    for big, expected in zip(*results, strict=True):
        close(big, expected, **ROUNDING)


def test_rows_beyond_2_to_the_31(check):
    check(beyond_2_to_the_31)


# ---- through the public functions ------------------------------------------------------------------------------------


def policy_and_reference(kind, special):
    two = two_heads(6, 127, kind, dim=8, ref_dim=4).to(torch.float32)
    for bias in {"": [], "both": [two.bias, two.ref_bias], "policy": [two.bias], "reference": [two.ref_bias]}[special]:
        bias[3] = -INF  # who may not say it
    return two


def by_backend(backend, name, kind, special, device):
    two = policy_and_reference(kind, special)
    there = [None if t is None else t.to(device) for t in (two.ref_hidden, two.ref_weight, two.ref_bias)]

    def fn(hidden, weight, bias=None):
        head = LMHead(weight, bias, **two.options)
        reference = there[0], LMHead(*there[1:], **two.ref_options)
        return linear_divergence(
            hidden, head, *reference, divergence=name, temperature=two.temperature, backend=backend
        )  # fmt: skip

    weight = torch.linspace(-2, 3, 6, device=device)
    return value_and_gradients(fn, [leaf.to(device) for leaf in two.leaves], weight)


def agree(name, kind, special, device):
    table, where, changed = limits(device, tile_logits=4 * 127)
    with several_blocks(), replaced(table, where, changed):
        ours, theirs = (by_backend(backend, name, kind, special, device) for backend in ("triton", "torch"))
    for mine, other in zip(ours, theirs, strict=True):
        close(mine, other)
    assert ours[0].isfinite().all() == ((name, special) not in (("reverse_kl", "reference"), ("forward_kl", "policy")))


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "entropy", "jsd"])
@pytest.mark.parametrize(
    ("kind", "special"),
    [("plain", ""), ("all", ""), ("bias", "both"), ("bias", "policy"), ("bias", "reference"), ("all", "both")],
)
def test_linear_divergence(check, name, kind, special):
    check(agree, name, kind, special)


def mixed(scores, seen):
    kept = 1.3 * scores.logp - 0.4 * scores.entropy + 0.7 * scores.reverse_kl + 2 * scores.forward_kl
    return torch.where(seen, kept, 0.0).sum()


def scores_and_losses(kind, special, device):
    two = policy_and_reference(kind, special)
    two.token_ids[two.token_ids == 3] = 0
    there = [None if t is None else t.to(device) for t in (two.ref_hidden, two.ref_weight, two.ref_bias)]
    ids, seen = two.token_ids.to(device), (torch.arange(6) != 2).to(device)
    results = []
    for backend in (kernels(), torch_backend):

        def inputs(hidden, weight, bias=None):
            head, ref_head = LMHead(weight, bias, **two.options), LMHead(*there[1:], **two.ref_options)
            return hidden, head, ids, there[0], ref_head

        def loss(*leaves):
            return fused_token_loss(mixed, *inputs(*leaves), temperature=two.temperature, per_token=(seen,))

        def later(*leaves):
            return mixed(token_scores(*inputs(*leaves), temperature=two.temperature), seen)

        with several_blocks(), replaced(api, "_backend", lambda *_: backend):  # noqa: B023
            leaves = [leaf.to(device) for leaf in two.leaves]
            values = [token_scores(*inputs(*leaves), temperature=two.temperature)]
            values = [getattr(values[0], name) for name in ("logp", "ref_logp", *NAMES)]
            results.append([*values, *value_and_gradients(loss, leaves), *value_and_gradients(later, leaves)])
    for ours, theirs in zip(*results, strict=True):
        close(ours, theirs)


@pytest.mark.parametrize(
    ("kind", "special"), [("all", ""), ("bias", "both"), ("all", "both"), ("bias", "policy"), ("bias", "reference")]
)
def test_scores_and_losses(check, kind, special):
    check(scores_and_losses, kind, special)
