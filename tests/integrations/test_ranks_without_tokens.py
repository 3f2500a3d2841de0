"""A rank none of whose tokens count: the other trains as alone, both log the same, nobody waits for ever.

Run as a script, this file is what each of two processes (gloo) does; one process, in the test, has all rows at once.
"""

import os
import sys
from pathlib import Path

import conftest  # noqa: F401 - also for the script: no hub, few threads
import pytest
import torch
from datasets import Dataset
from support import rloo, tiny
from support.anchors import COEF, DenseOracle, exact, k3_in_the_loss, trained_grpo
from support.processes import launch, leave
from support.trainers import AnchoredGRPO, AnchoredSFT, GRPOTrainer, grpo_config, policy, sft_config, texts

from klft import FixedKL, FrozenReference, KLPenalty
from klft.integrations import KLReward

GRPO = ("dapo", "grpo", "dr_grpo")
SETTINGS = {"per_device_train_batch_size": 2, "num_iterations": 2}


# ---- labelled texts --------------------------------------------------------------------------------------------------


def half_labelled():
    """Of every four rows two have labels: those of the first process, with two rows for each."""
    rows = texts(16).to_dict()
    labels = [x if i % 4 < 2 else [-100] * len(x) for i, x in enumerate(rows["labels"])]
    return Dataset.from_dict({"input_ids": rows["input_ids"], "labels": labels})


def sft(make, folder, size, **more):
    args = sft_config(folder, per_device_train_batch_size=size, train_sampling_strategy="sequential")
    run = make(policy(), args=args, train_dataset=half_labelled(), processing_class=tiny.tokenizer(), **more)
    run.train()
    return run


# ---- completions -----------------------------------------------------------------------------------------------------


class Masked:
    """Before a trainer: on the second process (or on both) no token of a completion counts."""

    everywhere = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.everywhere or self.args.process_index == 1:
            inputs["completion_mask"].zero_()
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


class MaskedGRPO(Masked, GRPOTrainer):
    pass


class MaskedAnchor(Masked, AnchoredGRPO):
    pass


class MaskedEverywhere(MaskedAnchor):
    everywhere = True


def in_the_reward():
    return KLPenalty(FrozenReference(policy(seed=5)), estimator="k1", placement="reward", controller=FixedKL(COEF))


def with_reward(path, folder, rank, ours):
    """RLOO by beta or by KLReward. The second process takes all its completions for truncated ones."""
    kl = KLReward(rloo.reference(path), coef=COEF)
    settings = {"beta": 0.0 if ours else COEF, "mask_truncated_completions": True}
    run = rloo.trainer(folder, rloo.policy(path), [tiny.mixed, kl][: 1 + ours], **settings)
    if ours:
        kl.bind(run)
    if rank == 1:
        run.eos_token_ids = []
    run.train()
    return run


# ---- what each process does ------------------------------------------------------------------------------------------


def found(run):
    return {"parameters": tiny.parameters(run.model), "logs": [log for log in run.state.log_history if "loss" in log]}


def worker(folder):
    rank, path = int(os.environ["RANK"]), str(folder / "reference")
    results = {"sft": found(sft(AnchoredSFT, folder, 2, penalty=exact()))}
    for name in GRPO:
        args = SETTINGS | {"loss_type": name}
        results[f"{name} beta"] = found(trained_grpo(MaskedGRPO, grpo_config(folder, beta=COEF, **args), path))
        results[name] = found(trained_grpo(MaskedAnchor, grpo_config(folder, **args), penalty=k3_in_the_loss()))
    args = grpo_config(folder, **SETTINGS)
    results["in the reward"] = found(trained_grpo(MaskedAnchor, args, penalty=in_the_reward()))
    results["on both"] = found(trained_grpo(MaskedEverywhere, args, penalty=k3_in_the_loss()))
    results |= {f"reward {ours}": found(with_reward(path, folder, rank, ours)) for ours in (False, True)}
    torch.save(results, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """What each process found, by name of the run."""
    folder = tmp_path_factory.mktemp("two")
    rloo.saved(folder)
    done = launch(__file__, folder, timeout=400)
    assert done.returncode == 0, done.stderr[-6000:]
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def furthest(a, b):
    return max(float((a["parameters"][name] - b["parameters"][name]).abs().max()) for name in a["parameters"])


def kl_logs(result):
    return [{name: value for name, value in log.items() if "kl/" in name} for log in result["logs"]]


pytestmark = pytest.mark.slow


def test_both_have_the_same_parameters_and_the_same_metrics(both):
    for name in both[0]:
        first, second = (of_rank[name] for of_rank in both)
        assert furthest(first, second) == 0.0, name
        assert all(p.isfinite().all() for p in first["parameters"].values()), name
        assert kl_logs(first) == kl_logs(second), name
        assert len(first["logs"]) == 4, name


def test_without_labels_on_one_rank_they_train_what_one_process_trains(both, tmp_path):
    other = policy(seed=5).eval()
    dense = found(sft(DenseOracle, tmp_path, 4, reference=lambda ids: other(input_ids=ids).logits, direction="forward"))
    ours = found(sft(AnchoredSFT, tmp_path, 4, penalty=exact()))
    start = {"parameters": tiny.parameters(policy())}
    assert furthest(both[0]["sft"], dense) < 1e-6
    assert furthest(dense, start) > 1e-3
    for mine, theirs in zip(kl_logs(both[0]["sft"]), kl_logs(ours), strict=True):
        assert len(mine) > 8
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", GRPO)
def test_without_completions_on_one_rank_the_anchor_is_beta(name, both):
    result = both[0][name]
    assert furthest(result, both[0][f"{name} beta"]) < 2e-6
    assert furthest(result, both[0]["on both"]) > 1e-3
    assert all(log["kl/k3/mean"] > 0 for log in result["logs"])


def test_in_the_reward_too(both):
    assert all(log["kl/k1/mean"] for log in both[0]["in the reward"]["logs"])
    assert furthest(both[0]["in the reward"], both[0]["on both"]) > 1e-3


def test_without_completions_on_both_nothing_moves_and_no_kl_is_logged(both):
    for of_rank in both:
        assert furthest(of_rank["on both"], {"parameters": tiny.parameters(policy())}) == 0.0
        for log, kl in zip(of_rank["on both"]["logs"], kl_logs(of_rank["on both"]), strict=True):
            assert (log["loss"], log["grad_norm"]) == (0.0, 0.0)
            assert kl.keys() <= {"kl/coef"}


def test_truncated_completions_on_one_rank_have_no_kl_reward_as_with_beta(both):
    ours, beta = both[0]["reward True"], both[0]["reward False"]
    assert furthest(ours, beta) < 1e-5
    assert all(log["kl/k1/mean"] for log in ours["logs"])


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
    leave()
