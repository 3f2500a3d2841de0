"""A temperature that leaves one token, or is no number, is refused wherever one is taken, in the same words."""

import math

import pytest
import torch
from support import tiny

import klft
from klft.checks import check_setup
from klft.diagnostics import TokenKLCallback
from klft.scoring import Scorer, score_texts

IDS = torch.tensor([[5, 6, 7]])
ONES = torch.ones_like(IDS)


def heads():
    policy, reference = klft.LMHead(torch.randn(7, 4)), klft.LMHead(torch.randn(7, 4))
    return torch.randn(3, 4), policy, torch.randn(3, 4), reference


def with_token_scores(temperature):
    hidden, head, ref_hidden, ref_head = heads()
    klft.token_scores(hidden, head, torch.tensor([0, 3, 6]), ref_hidden, ref_head, temperature=temperature)


def with_linear_divergence(temperature):
    klft.linear_divergence(*heads(), temperature=temperature)


def with_fused_token_loss(temperature):
    hidden, head, ref_hidden, ref_head = heads()
    ids = torch.tensor([0, 3, 6])
    klft.fused_token_loss(lambda s: s.logp.sum(), hidden, head, ids, ref_hidden, ref_head, temperature=temperature)


def with_scorer(temperature):
    Scorer(klft.FrozenReference(tiny.llama()), temperature=temperature)


def with_score_texts(temperature):
    options = {"batch_size": 1, "max_length": 8, "temperature": temperature}
    score_texts(tiny.llama(), tiny.apart(), tiny.tokenizer(), ["w1 w2"], **options)


def with_measure(temperature):
    logits = torch.randn(1, 3, tiny.VOCABULARY)
    klft.KLPenalty(tiny.llama()).measure(logits, IDS, ONES, ONES, temperature=temperature)


def with_measure_hidden(temperature):
    hidden, head, ref_hidden, ref_head = heads()
    ids = torch.tensor([0, 3, 6])
    penalty = klft.KLPenalty(tiny.llama())
    penalty.measure_hidden(hidden, head, ids, ids >= 0, ref_hidden, ref_head, temperature=temperature)


def with_check_setup(temperature):
    check_setup(tiny.llama(), klft.FrozenReference(tiny.apart()), temperature=temperature)


def with_callback(temperature):
    TokenKLCallback(tiny.apart(), ["w1 w2"], temperature=temperature)


def with_config(temperature):
    klft.PPOConfig(output_dir="nowhere", report_to="none", temperature=temperature)


TAKEN = [
    with_token_scores, with_linear_divergence, with_fused_token_loss, with_scorer, with_score_texts, with_measure,
    with_measure_hidden, with_check_setup, with_callback, with_config,
]  # fmt: skip


@pytest.mark.parametrize("take", TAKEN, ids=lambda take: take.__name__)
@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf, 1e-9, 9e-4])
def test_an_impossible_temperature_is_refused_in_the_same_words(take, temperature):
    with pytest.raises(ValueError, match=f"temperature must be finite and >= 0.001, got {temperature}"):
        take(temperature)


@pytest.mark.parametrize("take", TAKEN, ids=lambda take: take.__name__)
def test_the_least_temperature_is_taken(take):
    take(1e-3)
