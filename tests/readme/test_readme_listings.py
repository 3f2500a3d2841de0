"""Two listings of the README do what they say: the one shown as a diff, and the loss without logits."""

import re
from pathlib import Path

import torch
from support import tiny

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


def test_the_gradient_of_the_fused_listing_is_that_of_dense_logits(tmp_path, monkeypatch):
    (code,) = [code for code in LISTINGS if "fused_token_loss" in code]
    for name, seed in {"policy": 0, "reference": 1}.items():  # the listing loads one model twice: a KL of 0
        tiny.llama(seed, max_position_embeddings=64).save_pretrained(tmp_path / name)
        tiny.tokenizer().save_pretrained(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    two = 'AutoModelForCausalLM.from_pretrained("my/causal-lm") for _ in range(2)'
    assert two in code
    code = code.replace(two, 'AutoModelForCausalLM.from_pretrained(name) for name in ("policy", "reference")')
    given: dict = {"__name__": "listing"}
    exec(compile(code.replace("my/causal-lm", "policy"), "README.md", "exec"), given)
    model, ids, counts = given["model"], given["input_ids"], given["counts"]
    assert counts.sum() == 2 * 16
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}

    model.zero_grad()
    inputs = klft.causal_inputs(model, ids, given["attention_mask"])
    logits = model(**inputs).logits[:, :-1]
    with torch.no_grad():
        ref_logits = given["ref_model"](**inputs).logits[:, :-1]
    logp = klft.token_logps(logits, ids[:, 1:])
    dense = -logp * given["advantages"] + 0.05 * klft.reverse_kl(logits, ref_logits)
    dense[counts].sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(
            gradients[name], p.grad, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )
