"""Masked sums, means, variances and whitening against plain loops, no_reduce and over two pretended processes."""

import math
import threading

import pytest
import torch
from jaxtyping import TypeCheckError
from support import oracles

import klft
from klft.masked import no_reduce

INF = math.inf
STATISTICS = [klft.masked_sum, klft.masked_mean, klft.masked_var]
every_statistic = pytest.mark.parametrize("statistic", STATISTICS, ids=lambda f: f.__name__)
every_poison = pytest.mark.parametrize("poison", [math.nan, INF, -INF])


def sample(*shape, seed=0, dtype=torch.float64):
    gen = torch.Generator().manual_seed(seed)
    x = 3 + 2 * torch.randn(shape, generator=gen, dtype=torch.float64)
    return x.to(dtype), torch.rand(shape, generator=gen) < 0.6


def loop(x, mask):
    """sum, mean, variance by hand."""
    kept = [v for v, m in zip(x.flatten().tolist(), mask.flatten().tolist(), strict=True) if m]
    total = math.fsum(kept)
    mean = total / len(kept) if kept else 0.0
    var = math.fsum((v - mean) ** 2 for v in kept) / len(kept) if kept else 0.0
    return {"masked_sum": total, "masked_mean": mean, "masked_var": var}


@every_statistic
@pytest.mark.parametrize("shape", [(), (1,), (9,), (4, 7), (2, 3, 5), (0,), (0, 4)])
def test_statistics_are_the_loops(statistic, shape):
    x, mask = sample(*shape)
    value = statistic(x, mask)
    assert value.shape == ()
    assert value.item() == pytest.approx(loop(x, mask)[statistic.__name__], rel=1e-13, abs=1e-15)


@every_statistic
def test_all_or_one_or_none(statistic):
    x, _ = sample(3, 4)
    for mask in (torch.ones(3, 4), torch.zeros(3, 4), torch.eye(3, 4) * torch.tensor([[0.0], [1.0], [0.0]])):
        value = statistic(x, mask.bool())
        assert value.item() == pytest.approx(loop(x, mask.bool())[statistic.__name__], rel=1e-13, abs=1e-15)
    one = torch.zeros(3, 4, dtype=torch.bool)
    one[1, 2] = True
    assert klft.masked_mean(x, one) == x[1, 2]
    assert klft.masked_var(x, one) == 0
    assert klft.masked_mean(x, torch.zeros_like(one)) == klft.masked_var(x, torch.zeros_like(one)) == 0


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitening_is_the_loops(shift_mean):
    x, mask = sample(5, 8)
    stats = loop(x, mask)
    centre = stats["masked_mean"] if shift_mean else 0.0
    expected = torch.where(mask, (x - centre) / math.sqrt(stats["masked_var"] + 1e-8), 0.0)
    torch.testing.assert_close(klft.masked_whiten(x, mask, shift_mean=shift_mean), expected, rtol=1e-12, atol=0)


def test_whitened_tokens_have_mean_zero_and_variance_one():
    x, mask = sample(50, 8)
    white = klft.masked_whiten(x, mask)
    assert klft.masked_mean(white, mask).item() == pytest.approx(0, abs=1e-14)
    assert klft.masked_var(white, mask).item() == pytest.approx(1, abs=1e-7)
    assert torch.equal(white[~mask], torch.zeros_like(white[~mask]))


@pytest.mark.parametrize("tokens", [0, 1])
def test_whitening_one_token_or_none(tokens):
    x, mask = sample(3, 4)
    mask[:] = False
    mask[1, :tokens] = True
    assert torch.equal(klft.masked_whiten(x, mask), torch.zeros_like(x))
    constant = klft.masked_whiten(torch.full_like(x, 2.5), torch.ones_like(mask))
    assert torch.equal(constant, torch.zeros_like(x))


def test_large_means_do_not_cancel_in_fp32():
    x = 1e4 + torch.tensor([-0.5, 0.5]).repeat(500)
    assert klft.masked_var(x, torch.ones(1000, dtype=torch.bool)).item() == pytest.approx(0.25, rel=1e-3)


# --- what is under the mask ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fn", [*STATISTICS, klft.masked_whiten], ids=lambda f: f.__name__)
@every_poison
def test_nothing_under_the_mask_changes_a_value(fn, poison):
    x, mask = sample(4, 6)
    poisoned = torch.where(mask, x, poison)
    assert torch.equal(fn(poisoned, mask), fn(x, mask))


@pytest.mark.parametrize("fn", [*STATISTICS, klft.masked_whiten], ids=lambda f: f.__name__)
@every_poison
def test_nothing_under_the_mask_changes_a_gradient(fn, poison):
    x, mask = sample(4, 6)
    weight = torch.linspace(-1, 2, 24, dtype=torch.float64).view(4, 6) if fn is klft.masked_whiten else None
    gradient = lambda values: oracles.value_and_gradient(fn, values, mask, weight=weight)[1]
    clean = gradient(x)
    poisoned = gradient(torch.where(mask, x, poison))
    assert clean[mask].abs().sum() > 0
    assert torch.equal(poisoned[~mask], torch.zeros_like(x)[~mask])
    torch.testing.assert_close(poisoned[mask], clean[mask], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", ["k1", "k2", "k3"])
def test_nan_log_probabilities_under_the_mask(name):
    x, mask = sample(4, 6)
    logp, ref_logp = -x.abs(), -x.abs() / 2
    mean = lambda p: klft.masked_mean(getattr(klft, name)(p, ref_logp), mask)
    clean_value, clean = oracles.value_and_gradient(mean, logp)
    value = mean(torch.where(mask, logp, math.nan))
    assert torch.equal(value, clean_value)
    assert torch.equal(clean[~mask], torch.zeros_like(x)[~mask])


# --- two processes ---------------------------------------------------------------------------------------------------


def on_two_processes(fn, parts):
    """fn(part, reduce) on each part, in two threads whose `reduce` adds up what both hand in."""
    barrier, slots, results = threading.Barrier(2, timeout=20), [None, None], [None, None]

    def work(rank):
        def reduce(t):
            slots[rank] = t
            barrier.wait()
            total = slots[0] + slots[1]
            barrier.wait()
            return total

        results[rank] = fn(*parts[rank], reduce)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize("cut", [0, 1, 3, 6])
@every_statistic
def test_two_processes_give_the_single_process_statistics(statistic, cut):
    x, mask = sample(6, 5)
    whole = statistic(x, mask)
    for part in on_two_processes(statistic, [(x[:cut], mask[:cut]), (x[cut:], mask[cut:])]):
        torch.testing.assert_close(part, whole, rtol=1e-13, atol=1e-15)
    assert no_reduce(whole) is whole


@pytest.mark.parametrize("shift_mean", [True, False])
def test_two_processes_whiten_as_one(shift_mean):
    x, mask = sample(6, 5)
    mask[:2] = False  # a process with few tokens must not count as much as one with many
    mask[0, 0] = True
    fn = lambda values, kept, reduce: klft.masked_whiten(values, kept, reduce, shift_mean=shift_mean)
    parts = on_two_processes(fn, [(x[:2], mask[:2]), (x[2:], mask[2:])])
    whole = klft.masked_whiten(x, mask, shift_mean=shift_mean)
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-12, atol=1e-14)


# --- token_logps -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(7,), (4, 7), (2, 3, 7), (0, 7), (5, 1)])
def test_token_logps(shape):
    logits, _ = sample(*shape)
    labels = torch.randint(0, shape[-1], shape[:-1], generator=torch.Generator().manual_seed(1))
    pick = lambda x: torch.log_softmax(x, -1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    value, gradient = oracles.value_and_gradient(klft.token_logps, logits, labels)
    true_value, true_gradient = oracles.value_and_gradient(pick, logits)
    assert value.shape == shape[:-1]
    torch.testing.assert_close(value, true_value, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(gradient, true_gradient, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_token_logps_are_computed_in_fp32(dtype):
    logits, _ = sample(64, 1000, dtype=dtype)
    labels = torch.arange(64)
    value, gradient = oracles.value_and_gradient(klft.token_logps, logits, labels)
    assert value.dtype == torch.float32
    assert gradient.dtype == dtype
    truth = torch.log_softmax(logits.double(), -1)[torch.arange(64), labels]
    torch.testing.assert_close(value.double(), truth, rtol=1e-6, atol=1e-6)


def test_token_logps_with_suppressed_tokens():
    logits, _ = sample(4, 7)
    logits[:, 3] = -INF
    labels = torch.tensor([0, 1, 2, 3])
    value, gradient = oracles.value_and_gradient(klft.token_logps, logits, labels)
    assert value[3] == -INF
    assert value[:3].isfinite().all()
    assert torch.equal(gradient[:3, 3], torch.zeros(3, dtype=torch.float64))


def test_mismatched_masks_are_refused():
    x, mask = sample(3, 4)
    with pytest.raises((ValueError, RuntimeError, TypeCheckError)):
        klft.masked_mean(x, mask[:, :3])
    with pytest.raises((ValueError, RuntimeError, TypeCheckError)):
        klft.masked_mean(x, mask.double())
