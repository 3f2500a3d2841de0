"""KLAnchorMixin on two real processes (DDP over gloo). Run as a script, this file is what each of them does."""

import json
import os
import sys
from pathlib import Path

import conftest  # noqa: F401 - also for the script: no hub, few threads
import pytest
from support.processes import launch, leave

FEW = ["dapo-2", "grpo-1"]
ALL = [f"{name}-{n}" for name in ("dapo", "grpo", "bnpo", "dr_grpo", "cispo", "luspo") for n in (1, 2)]


def of_beta(folder, case):
    """How far the mixin is from TRL's beta, and how far beta itself moves."""
    from support.anchors import COEF, k3_in_the_loss, trained_grpo
    from support.trainers import AnchoredGRPO, GRPOTrainer, grpo_config, parameters

    loss_type, iterations = case.split("-")
    settings = {"loss_type": loss_type, "num_iterations": int(iterations), "per_device_train_batch_size": 2}
    theirs = trained_grpo(GRPOTrainer, grpo_config(folder, beta=COEF, **settings), str(folder / "reference"))
    ours = trained_grpo(AnchoredGRPO, grpo_config(folder, **settings), penalty=k3_in_the_loss())
    without = trained_grpo(GRPOTrainer, grpo_config(folder, **settings))
    a, b, c = (parameters(t.model) for t in (theirs, ours, without))
    return {"off": float((a - b).abs().max()), "moved": float((a - c).abs().max())}


def of_sft(folder, across):
    """How far the mixin is from the dense oracle; the coefficient that its controller ends with."""
    from support.anchors import DenseOracle, exact, sft
    from support.trainers import AnchoredSFT, SFTTrainer, parameters, policy, sft_config

    from klft import AdaptiveKL

    args = sft_config(
        folder, gradient_accumulation_steps=2, per_device_train_batch_size=2, average_tokens_across_devices=across
    )
    other = policy(seed=5).eval()
    oracle = sft(DenseOracle, args, reference=lambda ids: other(input_ids=ids).logits, direction="forward")
    ours, plain = sft(AnchoredSFT, args, penalty=exact()), sft(SFTTrainer, args)
    a, b, c = (parameters(t.model) for t in (oracle, ours, plain))
    penalty = exact()
    penalty.controller = AdaptiveKL(0.5, target=1.0, horizon=60)
    steered = sft(AnchoredSFT, args, penalty=penalty)
    return {
        "off": float((a - b).abs().max()), "moved": float((a - c).abs().max()), "coef": penalty.coef,
        "logs": [log for log in steered.state.log_history if "loss" in log],
    }  # fmt: skip


def main(folder, cases):
    from support.trainers import policy

    folder = Path(folder)
    rank = int(os.environ["RANK"])
    if rank == 0:
        policy(seed=5).save_pretrained(folder / "reference")
    results = {"sft": of_sft(folder, True), "not across devices": of_sft(folder, False)}
    results |= {case: of_beta(folder, case) for case in cases.split(",")}
    (folder / f"{rank}.json").write_text(json.dumps(results))


def both(folder, cases):
    run = launch(__file__, folder, ",".join(cases), timeout=500)
    assert run.returncode == 0, run.stderr[-4000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def check_betas(results, cases):
    for case in cases:
        for of_rank in results:
            assert of_rank[case]["moved"] > 1e-3, case
            assert of_rank[case]["off"] < 2e-6, case


@pytest.mark.slow
def test_two_processes(tmp_path):
    results = both(tmp_path, FEW)
    check_betas(results, FEW)
    for name in ("sft", "not across devices"):
        for of_rank in results:
            assert of_rank[name]["moved"] > 1e-3
            assert of_rank[name]["off"] < 1e-6
        assert results[0][name]["coef"] == results[1][name]["coef"] != 0.5
        keys = [key for key in results[0][name]["logs"][0] if key.startswith("kl/")]
        assert len(keys) > 8
        for mine, others in zip(*(of_rank[name]["logs"] for of_rank in results), strict=True):
            assert {k: mine[k] for k in keys} == {k: others[k] for k in keys}, "reduced over both"


@pytest.mark.slow
def test_every_loss_type_on_two_processes(tmp_path):
    check_betas(both(tmp_path, ALL), ALL)


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave()
