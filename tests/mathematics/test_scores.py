"""kl_metrics: the numbers that are logged, against plain loops; the diagnostics' statistics give the same keys."""

import math

import pytest
import torch
from support import oracles, tiny

import klft
from klft.diagnostics import Metadata, Statistics, records_table, scalars
from klft.scores import QUANTITIES, TokenScores, kl_metrics, score_logits

KEYS = {
    *(f"kl/{d}/{s}" for d in ("reverse", "forward") for s in ("mean", "p50", "p90", "p99", "max")),
    *(f"kl/{k}/mean" for k in ("k1", "k2", "k3", "sequence/reverse", "sequence/forward")),
    "kl/top1_agree/frac", "kl/nonfinite/count", "kl/tokens/count", "entropy/policy/mean", "entropy/reference/mean",
}  # fmt: skip


def batch(seed=0, shape=(5, 9), vocab=13):
    gen = torch.Generator().manual_seed(seed)
    logits, ref = (2 * torch.randn(*shape, vocab, generator=gen, dtype=torch.float64) for _ in range(2))
    ids = torch.randint(0, vocab, shape, generator=gen)
    return score_logits(logits, ref, ids), torch.rand(shape, generator=gen) < 0.7


def test_every_key_is_what_a_plain_loop_says():
    scores, mask = batch()
    found = kl_metrics(scores, mask)
    assert set(found) == KEYS
    assert all(type(value) is float for value in found.values())
    for name, kl in (("reverse", scores.reverse_kl), ("forward", scores.forward_kl)):
        values = sorted(kl[mask].tolist())
        assert found[f"kl/{name}/mean"] == pytest.approx(sum(values) / len(values), rel=1e-12)
        assert found[f"kl/{name}/max"] == values[-1]
        for percent in (50, 90, 99):
            assert found[f"kl/{name}/p{percent}"] == values[round((len(values) - 1) * percent / 100)]
        sums = [row[m].sum().item() for row, m in zip(kl, mask, strict=True)]
        assert found[f"kl/sequence/{name}/mean"] == pytest.approx(sum(sums) / len(sums), rel=1e-12)
    for name in ("k1", "k2", "k3"):
        values = getattr(oracles, name)(scores.logp, scores.ref_logp)[mask]
        assert found[f"kl/{name}/mean"] == pytest.approx(values.mean().item(), rel=1e-9)
    assert found["entropy/reference/mean"] == pytest.approx(scores.ref_entropy[mask].mean().item(), rel=1e-12)
    assert found["kl/top1_agree/frac"] == pytest.approx(scores.top1_agree[mask].double().mean().item())
    assert (found["kl/nonfinite/count"], found["kl/tokens/count"]) == (0.0, float(mask.sum()))


def test_sequences_without_a_token_are_no_sequences():
    scores, mask = batch()
    mask[2] = False
    sums = [row[m].sum().item() for row, m in zip(scores.reverse_kl, mask, strict=True) if m.any()]
    assert len(sums) == 4
    assert kl_metrics(scores, mask)["kl/sequence/reverse/mean"] == pytest.approx(sum(sums) / 4, rel=1e-12)
    assert kl_metrics(scores, torch.zeros_like(mask)) == {}


@pytest.mark.parametrize("name", [name for name in QUANTITIES if name not in ("k1", "k2", "k3")])
def test_a_token_that_is_not_finite_anywhere_is_counted_once(name):
    """Whatever it is that is not finite: in one place five quantities counted, in another ten."""
    scores, mask = batch()
    mask[0, 0] = True
    field = {"reverse": "reverse_kl", "forward": "forward_kl"}.get(name, name)
    getattr(scores, field)[0, 0] = math.inf
    found = kl_metrics(scores, mask)
    assert found["kl/nonfinite/count"] == 1
    assert all(math.isfinite(value) for value in found.values())
    table = records_table(scores, torch.full_like(mask.long(), 4), mask, tiny.tokenizer())
    assert scalars(Statistics.of(table))["kl/nonfinite/count"] == 1


def test_a_k3_that_fp32_cannot_hold_is_not_finite():
    scores = TokenScores(logp=torch.tensor([[-200.0, -1.0]]), ref_logp=torch.tensor([[-1.0, -1.0]]))
    found = kl_metrics(scores, torch.ones(1, 2, dtype=torch.bool))
    assert found["kl/nonfinite/count"] == 1
    assert found["kl/k3/mean"] == 0


def test_the_diagnostics_have_the_same_keys_and_numbers():
    scores, mask = batch(1)
    ids = torch.full(mask.shape, 4)
    scores.top_ids, scores.ref_top_ids = ids[..., None], (ids + ~scores.top1_agree)[..., None]
    scores.top_p = scores.ref_top_p = torch.ones(*mask.shape, 1)
    table = records_table(scores, ids, mask, tiny.tokenizer())
    theirs = scalars(Statistics.of(table, Metadata.of(table, tiny.tokenizer())))
    ours = kl_metrics(scores, mask)
    assert set(ours) == set(theirs)
    for key in ours:
        assert theirs[key] == pytest.approx(ours[key], rel=1.1e-2 if "/p" in key else 1e-6), key


def test_small_log_ratios_keep_their_digits():
    """expm1(-l) + l loses them below 1e-4; both places use the guarded gap."""
    log_ratio = torch.tensor([[3e-6, -7e-7]], dtype=torch.float64)
    scores, mask = TokenScores(logp=log_ratio, ref_logp=torch.zeros_like(log_ratio)), torch.ones(1, 2, dtype=torch.bool)
    true = (log_ratio.square() / 2 - log_ratio**3 / 6).mean().item()
    assert kl_metrics(scores, mask)["kl/k3/mean"] == pytest.approx(true, rel=1e-9)
    table = records_table(scores, torch.full((1, 2), 4), mask, tiny.tokenizer())
    assert scalars(Statistics.of(table))["kl/k3/mean"] == pytest.approx(true, rel=1e-6)


def test_log_ratios_of_tokens_that_the_policy_did_not_sample_estimate_nothing():
    scores, mask = batch()
    whole = kl_metrics(scores, mask)
    scores.sampled = torch.arange(mask.shape[1]).expand_as(mask) > 3
    scores.logp[0, 0], mask[0, 0] = -2000.0, True  # its k3 is beyond fp32, which is no fault of a given text
    found = kl_metrics(scores, mask)
    assert set(found) == KEYS
    assert found["kl/nonfinite/count"] == 0
    for name in ("k1", "k2", "k3"):
        values = getattr(oracles, name)(scores.logp, scores.ref_logp)[mask & scores.sampled]
        assert found[f"kl/{name}/mean"] == pytest.approx(values.mean().item(), rel=1e-9)
    table = records_table(scores, torch.full_like(mask.long(), 4), mask, tiny.tokenizer())
    theirs = scalars(Statistics.of(table))
    for name in ("k1", "k2", "k3"):
        assert theirs[f"kl/{name}/mean"] == pytest.approx(found[f"kl/{name}/mean"], rel=1e-6)
    assert theirs["kl/nonfinite/count"] == 0
    scores.sampled = torch.zeros_like(mask)
    given = kl_metrics(scores, mask)
    assert set(given) == KEYS - {"kl/k1/mean", "kl/k2/mean", "kl/k3/mean"}
    assert given["kl/reverse/mean"] == pytest.approx(found["kl/reverse/mean"], rel=1e-12)
    assert set(whole) == KEYS


def test_weights():
    scores, mask = batch()
    assert kl_metrics(scores, mask, weight=torch.ones(mask.shape)) == kl_metrics(scores, mask)
    weight = torch.rand(mask.shape, generator=torch.Generator().manual_seed(3)).double()
    weight[1, :4] = 0
    found, kept = kl_metrics(scores, mask, weight=weight), mask & (weight != 0)
    assert found["kl/tokens/count"] == kept.sum() < mask.sum()
    w, x = weight[kept], scores.forward_kl[kept]
    assert found["kl/forward/mean"] == pytest.approx(((w * x).sum() / w.sum()).item(), rel=1e-12)
    assert found["kl/forward/max"] == x.max()
    sums = torch.where(kept, weight * scores.reverse_kl, 0.0).sum(-1)
    assert found["kl/sequence/reverse/mean"] == pytest.approx(sums.mean().item(), rel=1e-12)


def test_scores_of_one_row_are_one_sequence():
    scores, mask = batch(shape=(7,))
    found = kl_metrics(scores, mask)
    assert found["kl/sequence/reverse/mean"] == pytest.approx(scores.reverse_kl[mask].sum().item(), rel=1e-12)


def test_it_is_public():
    assert klft.kl_metrics is kl_metrics
