"""Two listings of the README do what they say: the loop of your own, and the loss without logits."""

import re
from pathlib import Path

import pytest
import torch
from support import tiny

import klft

README = (Path(__file__).resolve().parents[2] / "README.md").read_text()
LISTINGS = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)
TWO = 'AutoModelForCausalLM.from_pretrained("my/causal-lm") for _ in range(2)'


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs a listing with two different models: it loads one twice, whose KL is 0."""
    for name, seed in {"policy": 0, "reference": 1}.items():
        tiny.llama(seed, max_position_embeddings=64).save_pretrained(tmp_path / name)
        tiny.tokenizer().save_pretrained(tmp_path / name)
    monkeypatch.chdir(tmp_path)

    def run_listing(mark):
        (code,) = [code for code in LISTINGS if mark in code]
        assert TWO in code
        code = code.replace(TWO, 'AutoModelForCausalLM.from_pretrained(name) for name in ("policy", "reference")')
        given: dict = {"__name__": "listing"}
        exec(compile(code.replace("my/causal-lm", "policy"), "README.md", "exec"), given)
        return given

    return run_listing


def test_the_loop_of_ones_own_trains_on_the_score_less_the_kl(run):
    given = run("penalty.rewards(")
    kl, mask = given["kl"], given["completion_mask"]
    assert mask.sum() == 8 * 16
    k1 = torch.where(mask, kl.scores.logp - kl.scores.ref_logp, 0.0).detach()
    assert k1.abs().sum() > 1
    expected = given["scores"] - given["scores"].mean() - 0.05 * k1.sum(1)
    torch.testing.assert_close(given["rewards"].sum(1), expected)
    torch.testing.assert_close(given["returns"][:, 0], expected)
    start = dict(tiny.llama(0, max_position_embeddings=64).named_parameters())
    assert all((p - start[name]).abs().max() > 1e-6 for name, p in given["model"].named_parameters())


def test_the_gradient_of_the_fused_listing_is_that_of_dense_logits(run):
    given = run("fused_token_loss")
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
