"""Each Python listing of the README runs as it stands, on tiny models; the one shown as a diff with its lines added."""

import re
from pathlib import Path

import pytest
import torch
from support import tiny, trainers

import klft

README = (Path(__file__).resolve().parents[2] / "README.md").read_text()
LISTINGS = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)
(DIFF,) = re.findall(r"^```diff\n(.*?)^```", README, re.M | re.S)


def batch(rows=4, length=10, prompt=3):
    ids = torch.randint(3, tiny.VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(0))
    completion_mask = torch.arange(length) >= prompt
    completion_mask = completion_mask.expand(rows, length).clone()
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "completion_mask": completion_mask,
        "advantages": torch.linspace(-1, 1, rows * length).view(rows, length),
    }


def test_there_is_a_listing_for_each_door():
    assert len(LISTINGS) == 4


def test_the_listing_shown_as_a_diff():
    added = "\n".join(line[2:] for line in DIFF.splitlines() if not line.startswith("-"))
    model, ref_model = tiny.llama(0), tiny.llama(1)
    model.train()
    seen = {}

    def my_policy_loss(logits, batch, rewards):
        seen["rewards"] = rewards
        logp = klft.token_logps(logits[:, :-1], batch["input_ids"][:, 1:])
        return -(logp * rewards[:, 1:]).mean()

    one = batch()
    given = {
        "klft": klft, "model": model, "ref_model": ref_model, "loader": [one], "my_policy_loss": my_policy_loss,
        "completion_mask": one["completion_mask"], "scores": torch.ones(4),
    }  # fmt: skip
    exec(compile(added, "README.md (diff)", "exec"), given)
    kl, coef = given["kl"], given["penalty"].coef
    assert coef != 0.05, "the controller saw the batch"
    expected = 1 - 0.05 * (kl.scores.logp - kl.scores.ref_logp)[one["completion_mask"]].view(4, -1).sum(1)
    torch.testing.assert_close(seen["rewards"].sum(1), expected.detach())
    assert any(p.grad is not None and bool(p.grad.any()) for p in model.parameters())


def test_the_listing_of_a_trainer_of_ones_own():
    (code,) = [code for code in LISTINGS if "fused_token_loss" in code]
    model, ref_model = tiny.llama(0).eval(), tiny.llama(1)  # without dropout: two forwards are compared
    one = batch()
    exec(compile(code, "README.md", "exec"), {"model": model, "ref_model": ref_model, **one})
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert len(gradients) == len(list(model.parameters()))

    model.zero_grad()
    logits = model(one["input_ids"]).logits[:, :-1]
    with torch.no_grad():
        ref_logits = ref_model(one["input_ids"]).logits[:, :-1]
    counts = one["completion_mask"][:, 1:]
    logp = klft.token_logps(logits, one["input_ids"][:, 1:])
    dense = -logp * one["advantages"][:, 1:] + 0.05 * klft.reverse_kl(logits, ref_logits)
    dense[counts].sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(
            gradients[name], p.grad, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("trainer", ["SFTTrainer", "GRPOTrainer"])
def test_the_listings_of_the_anchor(trainer, tmp_path, monkeypatch):
    (code,) = [code for code in LISTINGS if f"(KLAnchorMixin, {trainer})" in code]
    config, dataset = {
        "SFTTrainer": (trainers.sft_config, trainers.texts()),
        "GRPOTrainer": (trainers.grpo_config, tiny.prompts(16)),
    }[trainer]
    given = {
        "model": trainers.policy(), "ref_model": trainers.policy(5), "args": config(tmp_path, max_steps=2),
        "dataset": dataset, "tokenizer": tiny.tokenizer(), "reward_funcs": [trainers.reward_w5],
    }  # fmt: skip
    before = trainers.parameters(given["model"])
    exec(compile(code, "README.md", "exec"), given)
    assert not torch.equal(trainers.parameters(given["model"]), before)


@pytest.mark.timeout(300)
def test_the_listing_of_the_ppo_trainer(tmp_path, monkeypatch):
    (code,) = [code for code in LISTINGS if "PPOTrainer" in code]
    model, tokenizer = tiny.llama(0, max_position_embeddings=512), tiny.tokenizer()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    assert "my/causal-lm" in code
    monkeypatch.chdir(tmp_path)
    given = {"__name__": "listing"}
    exec(compile(code.replace("my/causal-lm", "model"), "README.md", "exec"), given)
    assert given["trainer"].state.global_step > 0
    assert any("kl/reverse/mean" in row for row in given["trainer"].state.log_history)
