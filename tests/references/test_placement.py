"""A reference's body may be quantised, of lower precision, or placed by accelerate: it is read where it is."""

import warnings

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from support import tiny

from klft import CachedReference, FrozenReference, KLPenalty
from klft.models import causal_inputs
from klft.scoring import Scorer

IDS = torch.tensor([[0, 0, 5, 7, 9, 4], [3, 8, 6, 4, 11, 5]])
MASK = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
COUNTED = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 1, 1]]) != 0


def placed(folder):
    return dispatch_model(tiny.llama(5), {"": "cpu"})


def offloaded(folder):
    return cpu_offload(tiny.llama(5), torch.device("cpu"))


def on_disk(folder):
    kept = dict.fromkeys(["model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb"], "cpu")
    places = kept | {"model.layers.1": "disk", "lm_head": "disk"}
    return dispatch_model(tiny.llama(5), places, main_device="cpu", offload_dir=str(folder))


def quantised(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = torch.ao.quantization.quantize_dynamic(tiny.llama(5).eval(), {torch.nn.Linear}, dtype=torch.qint8)
    made.is_quantized = True  # as transformers marks what it has quantised
    return made


def bf16(folder):
    return tiny.llama(5).to(torch.bfloat16)


# What rounding may do to a KL of 1 nat: nothing where a body is only placed.
MAKES = {placed: 1e-6, offloaded: 1e-6, on_disk: 1e-6, quantised: 0.2, bf16: 0.05}


@pytest.mark.parametrize(("make", "tolerance"), MAKES.items(), ids=[make.__name__ for make in MAKES])
def test_the_kl_is_that_of_a_plain_body(make, tolerance, tmp_path):
    policy = tiny.llama().eval()
    logits = policy(**causal_inputs(policy, IDS, MASK)).logits
    reference, plain = FrozenReference(make(tmp_path)), FrozenReference(tiny.llama(5))
    reference.check_independent(policy)
    reference.to("cpu")
    for estimator, placement in (("k1", "reward"), ("exact", "loss")):
        kls = [
            KLPenalty(r, estimator=estimator, placement=placement).measure(logits, IDS, MASK, MASK)
            for r in (reference, plain)
        ]
        got, want = (kl.scores.reverse_kl[kl.mask] for kl in kls)
        assert got.isfinite().all()
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
    by_scorer = Scorer(reference).score_batch(policy, IDS, MASK, COUNTED).reverse_kl[COUNTED]
    torch.testing.assert_close(by_scorer, want, rtol=tolerance, atol=tolerance)
    assert reference.distance_to(policy) is None or reference.distance_to(policy) > 1


@pytest.mark.parametrize("make", [placed, offloaded, on_disk, quantised])
def test_it_is_not_moved(make, tmp_path):
    reference = FrozenReference(make(tmp_path))
    places = [p.device for p in reference.model.parameters()]
    reference.to("meta")
    assert [p.device for p in reference.model.parameters()] == places


def test_a_body_that_is_plain_moves_and_a_placed_one_can_be_cached(tmp_path):
    plain = FrozenReference(tiny.llama(5))
    plain.to("meta")
    assert all(p.is_meta for p in plain.model.parameters())
    cached = CachedReference.write(tmp_path / "cache", FrozenReference(placed(tmp_path)), [(IDS, MASK)])
    want = FrozenReference(tiny.llama(5)).logits(IDS, MASK)
    torch.testing.assert_close(cached.logits(IDS, MASK)[MASK != 0], want[MASK != 0])
