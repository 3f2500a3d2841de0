"""Heads of real architectures on a GPU, in bf16: the model's own logits, and scores against float64."""

import pytest
import torch
from support import oracles
from support.heads import FAMILIES, IDS, build

from klft.fused import token_scores
from klft.heads import LMHead
from klft.models import hidden_states

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@torch.no_grad()
def hidden_and_head(model, ids):
    """[N, D] of all tokens, the head, and the model's own logits."""
    with hidden_states(model) as kept:
        model(input_ids=ids)
    return kept.hidden.flatten(0, 1), LMHead.from_model(model), model(input_ids=ids).logits.flatten(0, 1)


@pytest.mark.parametrize("name", FAMILIES)
def test_scores_are_those_of_the_models_own_logits(name):
    ids = IDS.cuda()
    (hidden, head, own), (ref_hidden, ref_head, _) = (
        hidden_and_head(build(name, torch.bfloat16, seed).cuda(), ids) for seed in (0, 1)
    )
    torch.testing.assert_close(head.logits(hidden).float(), own.float(), rtol=2e-2, atol=2e-2)
    scores = token_scores(hidden, head, ids.flatten(), ref_hidden, ref_head)

    def dense(states, of):
        options = {"scale": of.scale, "softcap": of.softcap}
        bias = None if of.bias is None else of.bias.double()
        return oracles.head_logits(states.double(), of.weight.double(), bias, **options)

    expected = oracles.token_scores(dense(hidden, head), dense(ref_hidden, ref_head), ids.flatten())
    assert expected.reverse_kl.mean() > 1e-3
    for field in ("logp", "ref_logp", "entropy", "reverse_kl", "forward_kl"):
        found, truth = getattr(scores, field).double(), getattr(expected, field)
        torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-5, msg=lambda m, f=field: f"{f}: {m}")
