"""KLAnchorMixin on a GPU: TRL's beta in fp32, SFT in bf16 with and without an adapter."""

import pytest
import torch
from support import tiny
from support.anchors import COEF, DenseOracle, exact, k3_in_the_loss, sft, trained_grpo
from support.trainers import AnchoredGRPO, AnchoredSFT, grpo_config, parameters, policy, sft_config
from trl import GRPOTrainer, SFTTrainer

from klft import AdapterReference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("on_the_card"),
]
CARD = {"use_cpu": False}


@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
def test_k3_in_the_loss_is_the_beta_of_trl(tmp_path, loss_type):
    policy(seed=5).save_pretrained(tmp_path / "reference")
    settings = {"loss_type": loss_type, **CARD}
    theirs = trained_grpo(GRPOTrainer, grpo_config(tmp_path, beta=COEF, **settings), str(tmp_path / "reference"))
    ours = trained_grpo(AnchoredGRPO, grpo_config(tmp_path, **settings), penalty=k3_in_the_loss())
    without = trained_grpo(GRPOTrainer, grpo_config(tmp_path, **settings))
    a, b, c = (parameters(run.model) for run in (theirs, ours, without))
    assert (a - c).abs().max() > 1e-3
    assert (a - b).abs().max() < 1e-5


def test_sft_equals_a_dense_oracle(tmp_path):
    args = sft_config(tmp_path, gradient_accumulation_steps=2, **CARD)
    other = policy(seed=5).eval().cuda()
    oracle = sft(DenseOracle, args, reference=lambda ids: other(input_ids=ids).logits, direction="forward")
    ours, plain = sft(AnchoredSFT, args, penalty=exact()), sft(SFTTrainer, args)
    a, b, c = (parameters(run.model) for run in (oracle, ours, plain))
    assert (a - c).abs().max() > 1e-3
    assert (a - b).abs().max() < 1e-5


@pytest.mark.parametrize("adapter", [None, tiny.lora], ids=["full", "lora"])
def test_bf16_is_near_fp32(tmp_path, adapter):
    more = {} if adapter is None else {"peft_config": adapter()}
    reference = None if adapter is None else (lambda model: exact(reference=AdapterReference(model)))
    kls = []
    for bf16 in (False, True):
        args = sft_config(tmp_path, bf16=bf16, learning_rate=0.5 if adapter else 0.05, **CARD)
        run = sft(AnchoredSFT, args, penalty=reference or exact(), **more)
        kls.append([log["kl/forward/mean"] for log in run.state.log_history if "loss" in log])
    assert kls[1][-1] == pytest.approx(kls[0][-1], rel=0.1, abs=2e-3)


def test_a_coefficient_of_0_changes_nothing(tmp_path):
    args = sft_config(tmp_path, bf16=True, **CARD)
    a, b = sft(SFTTrainer, args), sft(AnchoredSFT, args, penalty=exact(coef=0.0))
    assert torch.equal(parameters(a.model), parameters(b.model))
