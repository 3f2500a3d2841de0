"""KLAnchorMixin in GRPOTrainer: TRL's own beta, its normalisers, per-token advantages."""

import pytest
import torch
from support.anchors import COEF, DENSE, k3_in_the_loss, trained_grpo
from support.penalties import other_penalty
from support.trainers import AnchoredGRPO, grpo_config, parameters, policy
from trl import GRPOTrainer

from klft import FixedKL, FrozenReference, KLPenalty


@pytest.fixture(scope="module")
def reference_folder(tmp_path_factory):
    """Where TRL loads the reference of its beta from: the name of the policy."""
    folder = tmp_path_factory.mktemp("reference")
    policy(seed=5).save_pretrained(folder)
    return str(folder)


TYPES = ("dapo", "grpo", "bnpo", "dr_grpo", "cispo", "luspo")
MORE = {  # what else the normalisers read
    "a generation batch of two steps": {"loss_type": "dapo", "steps_per_generation": 4, "learning_rate": 0.02},
    "no accumulation": {"loss_type": "cispo", "gradient_accumulation_steps": 1, "steps_per_generation": 2},
    "temperature": {"loss_type": "grpo", "temperature": 0.7},
    "mean over the maximum": {"loss_type": "dr_grpo", "gradient_accumulation_steps": 1, "max_completion_length": 9},
}
SETTINGS = {f"{name}-{n}": {"loss_type": name, "num_iterations": n} for name in TYPES for n in (1, 2)} | MORE
QUICK = ("dapo-2", "grpo-1", "luspo-2", "a generation batch of two steps")


def slow_but(quick, values):
    """All values, those whose name is not among the quick ones marked slow."""
    named = values.items() if isinstance(values, dict) else [(value, value) for value in values]
    return [pytest.param(v, id=str(n), marks=[] if n in quick else [pytest.mark.slow]) for n, v in named]


@pytest.mark.parametrize("settings", slow_but(QUICK, SETTINGS))
def test_k3_in_the_loss_is_the_beta_of_trl(tmp_path, settings, reference_folder):
    theirs = trained_grpo(GRPOTrainer, grpo_config(tmp_path, beta=COEF, **settings), reference_folder)
    ours = trained_grpo(AnchoredGRPO, grpo_config(tmp_path, **settings), penalty=k3_in_the_loss())
    without = trained_grpo(GRPOTrainer, grpo_config(tmp_path, **settings))
    moved = (parameters(theirs.model) - parameters(without.model)).abs().max()
    off = (parameters(theirs.model) - parameters(ours.model)).abs().max()
    assert moved > 1e-3
    assert off < 2e-6


# ---- per-token advantages --------------------------------------------------------------------------------------------


class PerToken(GRPOTrainer):
    """The same advantages, [B, T] instead of [B]."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        advantages = inputs["advantages"]
        if advantages.dim() == 1:
            inputs["advantages"] = advantages[:, None].repeat(1, inputs["completion_ids"].shape[1])
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


@pytest.mark.parametrize("loss_type", slow_but(("dapo",), ["dapo", "grpo", "cispo", "sapo", "vespo", "luspo"]))
def test_advantages_per_token_are_the_same_to_the_bit(tmp_path, loss_type):
    args = grpo_config(tmp_path, loss_type=loss_type, num_iterations=2, learning_rate=0.5)
    by_sequence, by_token = trained_grpo(GRPOTrainer, args), trained_grpo(PerToken, args)
    assert not torch.equal(parameters(by_token.model), parameters(policy()))
    assert torch.equal(parameters(by_sequence.model), parameters(by_token.model))


class DenseCharges(GRPOTrainer):
    """Exact KL from logits: a token's own in the loss, that of the later ones in its advantage."""

    def __init__(self, *args, reference, estimator, **kwargs):
        super().__init__(*args, **kwargs)
        self.other, self.estimator = reference, estimator

    def kl(self, model, inputs):
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        start = inputs["prompt_ids"].shape[1]
        with torch.no_grad():
            ref_logits = self.other(input_ids=ids, attention_mask=attention).logits[:, start - 1 : -1]
        logits = model(input_ids=ids, attention_mask=attention).logits[:, start - 1 : -1]
        if self.estimator in ("exact", "jsd"):
            return DENSE["jsd" if self.estimator == "jsd" else "reverse"](logits, ref_logits)
        log_ratio = logits.log_softmax(-1) - ref_logits.log_softmax(-1)
        return log_ratio.gather(-1, inputs["completion_ids"][..., None])[..., 0]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        mask = inputs["completion_mask"]
        if inputs["advantages"].dim() == 1:
            with torch.no_grad():
                charged = self.kl(model, inputs) * mask
            to_go = charged.flip(1).cumsum(1).flip(1)
            to_go = to_go - charged if self.estimator != "k1" else to_go
            inputs["advantages"] = inputs["advantages"][:, None] - COEF * to_go
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self.estimator != "k1":
            own = (self.kl(model, inputs) * mask).sum(1) / mask.sum(1).clamp(min=1)
            loss = loss + COEF * own.mean() / self.current_gradient_accumulation_steps
        return loss


@pytest.mark.parametrize("iterations", slow_but((2,), [1, 2]))
@pytest.mark.parametrize("estimator", ["exact", "k1", "jsd"])
def test_a_penalty_in_the_reward_equals_a_dense_oracle(tmp_path, estimator, iterations):
    args = grpo_config(tmp_path, loss_type="grpo", num_iterations=iterations)
    other = policy(seed=5).eval()
    placement = "both" if estimator == "exact" else "reward"
    penalty = other_penalty("jsd", "both", FrozenReference(other), COEF)
    if estimator != "jsd":
        penalty = KLPenalty(FrozenReference(other), estimator=estimator, placement=placement, controller=FixedKL(COEF))
    ours = trained_grpo(AnchoredGRPO, args, penalty=penalty)
    oracle = trained_grpo(DenseCharges, args, reference=other, estimator=estimator)
    assert (parameters(oracle.model) - parameters(trained_grpo(GRPOTrainer, args).model)).abs().max() > 1e-3
    assert (parameters(ours.model) - parameters(oracle.model)).abs().max() < 2e-6
