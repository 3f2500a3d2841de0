"""PPOTrainer on a GPU: the numbers of a CPU, bf16 near fp32, placements, micro-batches, resuming.

All are given the same completions, since what is sampled depends on the last digit of a logit.
"""

from unittest.mock import patch

import pytest
import torch
from support import tiny

from klft.generation import Completions
from klft.ppo import RewardModel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("on_the_card"),
]
RUNS = {
    "k1": {"max_grad_norm": 0.05},
    "exact": {"kl_estimator": "exact", "kl_placement": "both"},
    "value model": {},
    "adapter": {"learning_rate": 0.1},
}


def completions(_model, prompt_ids, prompt_mask, *_):
    """Of other lengths in every row, the same on every device."""
    generator = torch.Generator().manual_seed(int(prompt_ids.sum()))
    ids = torch.randint(3, tiny.VOCABULARY, (len(prompt_ids), 6), generator=generator)
    mask = torch.arange(6) < torch.randint(1, 7, (len(ids), 1), generator=generator)
    ids, mask = (ids * mask).to(prompt_ids.device), mask.to(prompt_ids.device)
    return Completions(prompt_ids, prompt_mask, ids, mask), ~mask[:, -1]


def judge():
    """A tiny classifier."""
    model = tiny.critic(4)
    model.config.pad_token_id = tiny.PAD
    return RewardModel(model, tiny.tokenizer())


def trained(folder, name="k1", resume=None, judged=False, **more):
    """Four steps, two epochs of each rollout."""
    given = {"adapter": {"peft_config": tiny.lora()}, "value model": {"value_model": tiny.critic()}}.get(name, {})
    if name != "adapter":
        given = {**given, "reference": tiny.llama(5)}
    if judged:
        given["reward_funcs"] = [tiny.mixed, judge()]
    settings = {"max_steps": 4, "num_ppo_epochs": 2, "use_cpu": False} | RUNS[name] | more
    run = tiny.trainer(folder, given=given, kind=tiny.SeenTrainer, **settings)
    with patch("klft.ppo.collector.sample_completions", completions):
        run.train(resume_from_checkpoint=resume)
    return run


def weights(run):
    return {n: p.detach().double().cpu() for n, p in run.model.named_parameters()}


def assert_near(run, other, tolerance):
    """Weights, and logs."""
    ours, theirs = weights(run), weights(other)
    assert ours.keys() == theirs.keys()
    for name, values in theirs.items():
        assert (ours[name] - values).abs().max() < tolerance, name
    for own, log in zip(tiny.step_logs(run), tiny.step_logs(other), strict=True):
        assert own == pytest.approx(log, rel=10 * tolerance, abs=tolerance)


@pytest.mark.parametrize("name", RUNS)
def test_a_gpu_trains_what_a_cpu_trains(tmp_path, name):
    ours, theirs = trained(tmp_path / "gpu", name), trained(tmp_path / "cpu", name, use_cpu=True)
    assert next(ours.model.parameters()).is_cuda
    assert_near(ours, theirs, 1e-4)


def assert_same_kls(run, other):
    """KLs and entropies of the last rollout, to bf16's rounding."""
    ours, theirs = ([log for log in tiny.step_logs(r) if "kl/reverse/mean" in log][-1] for r in (run, other))
    for metric in ("kl/reverse/mean", "kl/forward/mean", "entropy/policy/mean"):
        assert ours[metric] == pytest.approx(theirs[metric], rel=0.05), metric


@pytest.mark.parametrize("name", RUNS)
def test_bf16_is_near_fp32(tmp_path, name):
    half, full = trained(tmp_path / "bf16", name, bf16=True), trained(tmp_path / "fp32", name)
    assert all(p.dtype == torch.float32 for p in half.model.parameters())
    assert_same_kls(half, full)


@pytest.mark.parametrize("precision", [{}, {"bf16": True}], ids=["fp32", "bf16"])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, precision):
    """Cut in the middle of a rollout's second epoch."""
    how = {"save_strategy": "steps", "save_steps": 3.0} | precision
    whole = trained(tmp_path / "whole", max_steps=6, **how)
    trained(tmp_path / "cut", max_steps=3, **how)
    rest = trained(tmp_path / "cut", resume=True, max_steps=6, **how)
    assert tiny.unequal(weights(whole), weights(rest)) == []
    assert tiny.step_logs(whole) == tiny.step_logs(rest)


def test_offloaded_models_give_the_numbers_of_resident_ones(tmp_path):
    both = [
        trained(tmp_path / str(kind), "exact", judged=True, reference_placement=kind, reward_model_placement=kind)
        for kind in ("replicated", "offloaded")
    ]
    assert tiny.unequal(*map(weights, both)) == []
    for own, log in zip(*map(tiny.step_logs, both), strict=True):
        assert own == log
    held = both[1].penalty.reference.model
    assert all(p.device.type == "cpu" and p.is_pinned() for p in held.parameters())


@pytest.mark.parametrize("precision", [{}, {"bf16": True}], ids=["fp32", "bf16"])
def test_micro_batches_of_like_length_train_what_whole_ones_train(tmp_path, precision):
    sizes = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2} | precision
    whole = trained(tmp_path / "whole", **sizes)
    cut = trained(tmp_path / "cut", tokens_per_micro_batch=24, **sizes)
    assert len(cut.seen) > len(whole.seen)
    if precision:
        assert_same_kls(cut, whole)
    else:
        assert_near(cut, whole, 1e-4)


def test_every_log_says_what_the_phases_hold(tmp_path):
    logs = [log for log in trained(tmp_path).state.log_history if "loss" in log]
    for phase in ("generate", "score", "train"):
        assert logs[0][f"memory/{phase}/peak_gib"] > 0
    assert logs[0]["tokens_per_second"] > 0
