"""No logits of a whole batch: watched at every operation of an anchored step."""

import pytest
import torch
from datasets import Dataset
from support import tiny
from support.anchors import COEF
from support.fused import limits
from support.trainers import AnchoredGRPO, AnchoredSFT, grpo, grpo_config, sft_config
from torch.utils._python_dispatch import TorchDispatchMode

from klft import FixedKL, FrozenReference, KLPenalty

VOCABULARY = 70_001  # TRL's own head takes all tokens and 32,768 ids at a time


class Largest(TorchDispatchMode):
    """The most numbers in any tensor that an operation has made."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor):
                self.numel = max(self.numel, t.numel())
        return out


def wide(seed=0):
    return tiny.llama(seed, vocab_size=VOCABULARY, attention_dropout=0.0, max_position_embeddings=600)


def penalty(**changed):
    settings = {"estimator": "exact", "placement": "loss", "controller": FixedKL(COEF)} | changed
    return KLPenalty(FrozenReference(wide(5)), **settings)


@pytest.mark.parametrize(("measure_every", "divergence"), [
    (0, None), (0, "jsd"), pytest.param(1, None, marks=pytest.mark.slow),
], ids=["", "jsd", "tables"])  # fmt: skip
def test_sft_never_has_logits(tmp_path, measure_every, divergence, monkeypatch):
    """[B, T, V] would be more than twice what TRL's head takes at a time; klft's tiles are smaller here."""
    monkeypatch.setitem(*limits(tile_logits=100 * VOCABULARY))
    rows = torch.randint(3, VOCABULARY, (4, 128), generator=torch.Generator().manual_seed(0)).tolist()
    args = sft_config(tmp_path, per_device_train_batch_size=4, max_steps=1, max_length=128)
    trainer = AnchoredSFT(
        wide(), args=args, train_dataset=Dataset.from_dict({"input_ids": rows, "labels": rows}),
        processing_class=tiny.tokenizer(), penalty=penalty(divergence=divergence), measure_every=measure_every,
        self_test=False,
    )  # fmt: skip
    with Largest() as seen:
        trainer.train()
    assert 0 < seen.numel < 4 * 128 * VOCABULARY / 2


@pytest.mark.parametrize("placement", [pytest.param("loss", marks=pytest.mark.slow), "both"])
def test_grpo_never_has_logits(tmp_path, placement, monkeypatch):
    monkeypatch.setitem(*limits(tile_logits=100 * VOCABULARY))
    args = grpo_config(
        tmp_path, per_device_train_batch_size=8, num_generations=8, max_completion_length=64, max_steps=1,
        gradient_accumulation_steps=1, generation_kwargs={"min_new_tokens": 64},
    )  # fmt: skip
    trainer = grpo(AnchoredGRPO, wide(), args, penalty=penalty(placement=placement), self_test=False)
    with Largest() as seen:
        trainer.train()
    assert 0 < seen.numel < 8 * 64 * VOCABULARY / 2
