"""Ids and labels: those of -100 are named with the way out, everywhere; masked by hand they are right."""

import pytest
import torch
from support import oracles, tiny

import klft
from klft import LMHead
from klft.prompts import encode_texts

V = 7
GENERATOR = torch.Generator().manual_seed(0)
LOGITS, REF_LOGITS = torch.randn(2, 5, V, generator=GENERATOR, dtype=torch.float64).unbind()
HIDDEN, WEIGHT = torch.randn(5, 3), torch.randn(V, 3)
LABELS = torch.tensor([-100, -100, 3, 0, 6])
IDS = LABELS.clamp(min=0)

TAKING_IDS = {
    "token_logps": lambda ids: klft.token_logps(LOGITS, ids),
    "score_logits": lambda ids: klft.score_logits(LOGITS, REF_LOGITS, ids),
    "top_k_kl": lambda ids: klft.top_k_kl(LOGITS, REF_LOGITS, ids, 2),
    "token_scores": lambda ids: klft.token_scores(HIDDEN, LMHead(WEIGHT), ids),
    "fused_token_loss": lambda ids: klft.fused_token_loss(lambda s: s.logp.sum(), HIDDEN, LMHead(WEIGHT), ids),
}
every_function = pytest.mark.parametrize("name", TAKING_IDS)


@every_function
def test_labels_of_minus_100_are_named_with_the_way_out(name):
    with pytest.raises(ValueError, match=rf"ids are 0\.\.{V - 1}, got -100 .*drop or mask labels of -100.*clamp"):
        TAKING_IDS[name](LABELS)


@every_function
def test_ids_of_a_larger_vocabulary_are_named(name):
    with pytest.raises(ValueError, match=rf"ids are 0\.\.{V - 1}, got 9 .*another vocabulary"):
        TAKING_IDS[name](IDS + 3)


@every_function
def test_ids_within_the_vocabulary_pass(name):
    TAKING_IDS[name](IDS)
    if name != "top_k_kl":
        TAKING_IDS[name](torch.tensor([0, V - 1, 0, 0, 0]))


@pytest.mark.parametrize("name", ["token_logps", "top_k_kl"])
def test_masked_labels_have_the_values_and_gradients_of_dropped_ones(name):
    """The way out that the message names: any id, and the result masked."""
    function = {
        "token_logps": klft.token_logps,
        "top_k_kl": lambda logits, ids: klft.top_k_kl(logits, REF_LOGITS[-len(ids) :], ids, 2),
    }[name]
    real = LABELS != -100
    masked = lambda logits: klft.masked_sum(function(logits, LABELS.clamp(min=0)), real)
    dropped = lambda logits: function(logits[real], LABELS[real]).sum()
    value, gradient = oracles.value_and_gradient(masked, LOGITS)
    want, want_gradient = oracles.value_and_gradient(dropped, LOGITS)
    torch.testing.assert_close(value, want, rtol=1e-13, atol=0)
    torch.testing.assert_close(gradient, want_gradient, rtol=1e-13, atol=1e-16)
    assert not gradient[~real].any()


def test_labels_off_the_mask_do_no_harm_without_logits():
    """KLPenalty.measure_hidden drops what the mask leaves out before it is looked at."""
    penalty = klft.KLPenalty(tiny.llama())
    real = LABELS != -100
    kl = penalty.measure_hidden(HIDDEN, LMHead(WEIGHT), LABELS, real, HIDDEN * 2, LMHead(WEIGHT))
    alone = klft.token_scores(HIDDEN[real], LMHead(WEIGHT), LABELS[real], HIDDEN[real] * 2, LMHead(WEIGHT))
    assert torch.equal(kl.scores.logp[real], alone.logp)
    with pytest.raises(ValueError, match="drop or mask labels of -100"):
        penalty.measure_hidden(HIDDEN, LMHead(WEIGHT), LABELS, real | True, HIDDEN, LMHead(WEIGHT))


def test_token_ids_of_a_text_are_no_labels():
    with pytest.raises(ValueError, match=r"text 2: .*-100.*drop or mask"):
        encode_texts(tiny.tokenizer(), [([3, 4, 5], 1), ([3, -100, 5], 1)], max_length=8)
