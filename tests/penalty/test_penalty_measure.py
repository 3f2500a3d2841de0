"""KLPenalty.measure on a model: how it lines up tokens, masks, paddings, temperatures and vocabularies."""

import pytest
import torch
from support.penalties import penalty
from transformers import LlamaConfig, LlamaForCausalLM

from klft import FrozenReference, KLPenalty

VOCAB = 19


def llama(seed, vocab_size=VOCAB):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=0.5, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def policy():
    return llama(0)


@pytest.fixture(scope="module")
def ref_model():
    return llama(1)


PROMPT, LENGTHS, WIDTH = 2, (7, 5, 3), 7


def tokens(side):
    """Ids, attention mask and completion mask [3, 7]; the first PROMPT tokens of each row are its prompt."""
    gen = torch.Generator().manual_seed(5)
    ids = torch.zeros(3, WIDTH, dtype=torch.long)
    attention = torch.zeros(3, WIDTH, dtype=torch.long)
    completion = torch.zeros(3, WIDTH, dtype=torch.bool)
    for i, n in enumerate(LENGTHS):
        start = 0 if side == "right" else WIDTH - n
        ids[i, start : start + n] = torch.randint(1, VOCAB, (n,), generator=gen)
        attention[i, start : start + n] = 1
        completion[i, start + PROMPT : start + n] = True
    return ids, attention, completion


def forward(model, ids, attention):
    positions = (attention.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=attention, position_ids=positions).logits


def one_by_one(model, ids, attention, temperature):
    """Float64 log-probabilities [3, 7, V] of the distribution that predicts each token, a row at a time, no padding."""
    wide = torch.zeros(*ids.shape, VOCAB, dtype=torch.float64)
    for i in range(len(ids)):
        real = attention[i].bool().nonzero().flatten()
        for place in range(1, len(real)):
            with torch.no_grad():
                logits = model(input_ids=ids[i, real[:place]].unsqueeze(0)).logits[0, -1]
            wide[i, real[place]] = torch.log_softmax(logits.double() / temperature, -1)
    return wide


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
def test_measure_aligns_each_kl_with_the_token_it_predicts(policy, ref_model, side, temperature):
    ids, attention, completion = tokens(side)
    made = KLPenalty(FrozenReference(ref_model))
    kl = made.measure(forward(policy, ids, attention), ids, attention, completion, temperature=temperature)
    lp, lq = (one_by_one(m, ids, attention, temperature) for m in (policy, ref_model))
    said = ids.unsqueeze(-1)
    want = {
        "logp": lp.gather(-1, said).squeeze(-1),
        "ref_logp": lq.gather(-1, said).squeeze(-1),
        "entropy": -(lp.exp() * lp).sum(-1),
        "ref_entropy": -(lq.exp() * lq).sum(-1),
        "reverse_kl": (lp.exp() * (lp - lq)).sum(-1),
        "forward_kl": (lq.exp() * (lq - lp)).sum(-1),
    }
    assert torch.equal(kl.mask, completion)
    for name, expected in want.items():
        got = getattr(kl.scores, name)[completion].double()
        torch.testing.assert_close(got, expected[completion], rtol=2e-5, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")
    agree = (lp.argmax(-1) == lq.argmax(-1))[completion]
    assert torch.equal(kl.scores.top1_agree[completion], agree)
    k1 = want["logp"] - want["ref_logp"]
    torch.testing.assert_close(made.reward_kl(kl)[completion].double(), k1[completion], rtol=2e-5, atol=5e-5)
    assert made.reward_kl(kl)[~completion].eq(0).all()


def test_the_first_token_never_counts(policy, ref_model):
    ids, attention, _ = tokens("right")
    everything = torch.ones_like(ids, dtype=torch.bool)
    made = KLPenalty(FrozenReference(ref_model))
    logits = forward(policy, ids, attention)
    kl = made.measure(logits, ids, attention, everything)
    assert not kl.mask[:, 0].any()
    assert torch.equal(kl.mask[:, 1:], attention[:, 1:].bool())
    changed = logits.clone()
    changed[:, -1] += torch.randn(VOCAB)  # predicts a token that is not there
    for name in ("reward_kl", "losses", "token_kl"):
        torch.testing.assert_close(
            getattr(made, name)(made.measure(changed, ids, attention, everything)), getattr(made, name)(kl)
        )


@pytest.mark.parametrize("how", [("k1", "reward"), ("k2", "loss"), ("k3", "both"), ("exact", "both")], ids="-".join)
def test_left_and_right_padding_give_the_same_penalty(policy, ref_model, how):
    made = penalty("reverse", *how, FrozenReference(ref_model))
    parts = {}
    for side in ("right", "left"):
        ids, attention, completion = tokens(side)
        kl = made.measure(forward(policy, ids, attention), ids, attention, completion)
        parts[side] = [
            x[completion] for x in (made.reward_kl(kl), made.losses(kl), made.rewards(torch.arange(3.0), kl))
        ]
    for right, left in zip(parts["right"], parts["left"], strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=2e-5)


def test_equal_models_have_a_kl_of_exactly_zero(policy):
    ids, attention, completion = tokens("left")
    made = penalty("reverse", "exact", "both", FrozenReference(policy))
    kl = made.measure(forward(policy, ids, attention), ids, attention, completion)
    assert kl.scores.reverse_kl[completion].eq(0).all()
    assert kl.scores.forward_kl[completion].eq(0).all()
    assert made.losses(kl).eq(0).all()


def test_a_padded_vocabulary_is_cut(policy):
    """A reference with more rows counts as if it had the policy's."""
    big, small = llama(1), llama(1)
    big.lm_head = torch.nn.Linear(16, VOCAB + 6)
    torch.nn.init.zeros_(big.lm_head.weight)
    big.lm_head.weight.data[:VOCAB] = small.lm_head.weight.data
    big.lm_head.bias.data = torch.where(torch.arange(VOCAB + 6) < VOCAB, 0.0, -14.0)
    ids, attention, completion = tokens("right")
    logits = forward(policy, ids, attention)
    got, want = (KLPenalty(FrozenReference(m)).measure(logits, ids, attention, completion) for m in (big, small))
    torch.testing.assert_close(got.scores.reverse_kl, want.scores.reverse_kl, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.scores.ref_logp, want.scores.ref_logp, rtol=1e-5, atol=1e-6)
