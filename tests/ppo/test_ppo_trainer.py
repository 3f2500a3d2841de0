"""What PPOTrainer promises: rewards, steps, the KL and its controllers, value functions, learning."""

import copy
import itertools
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from support import tiny
from transformers import AutoModelForCausalLM

from klft import FrozenReference
from klft.ppo.rollout import forward_with_values
from klft.ppo.value import value_parameters

GOLDEN = Path(__file__).with_name("golden_ppo.json")


def last_token(mask):
    return torch.arange(mask.shape[1]) == mask.sum(-1, keepdim=True) - 1


# ---- rewards -----------------------------------------------------------------------------------------------------


def test_at_step_zero_the_kl_and_the_values_are_exactly_zero(tmp_path):
    run = tiny.trainer(tmp_path, kind=tiny.SeenTrainer, max_steps=1)
    run.train()
    (log,) = tiny.step_logs(run)
    for name in (
        "kl/reverse/max",
        "kl/forward/max",
        "kl/sequence/reverse/mean",
        "kl/k1/mean",
        "kl/k2/mean",
        "kl/k3/mean",
    ):
        assert log[name] == 0.0, name
    assert log["kl/top1_agree/frac"] == 1.0
    assert log["entropy/policy/mean"] == log["entropy/reference/mean"]
    micro = run.seen[0][0]
    assert torch.equal(micro.old_logp, micro.ref_logp)
    assert (micro.values == 0).all()


@pytest.mark.parametrize("length", [1, 6, 16])
@pytest.mark.parametrize("penalty", [None, 0.7])
def test_a_row_of_rewards_is_the_score_minus_the_kl(length, penalty, tmp_path):
    """With V = 0 and gamma = lam = 1 returns are rewards-to-go, so their differences are the rewards of each token."""
    scores = []

    def reward(completion_ids, **_):
        scores.extend(tiny.mixed(completion_ids))
        return tiny.mixed(completion_ids)

    run = tiny.trainer(
        tmp_path, None, reward, kind=tiny.SeenTrainer, given={"reference": tiny.apart()}, max_steps=1, lam=1.0,
        kl_coef=0.3, max_completion_length=length, per_device_train_batch_size=16, missing_eos_penalty=penalty,
        reward_clip=0.5,
    )  # fmt: skip
    run.train()
    micro = run.seen[0][0]
    mask = micro.mask
    terminated = (micro.completion_ids * last_token(mask) == tiny.EOS).any(-1)
    assert length == 1 or terminated.any()
    assert not terminated.all()
    k1 = torch.where(mask, micro.old_logp - micro.ref_logp, 0.0)
    assert k1.abs().max() > 1
    # Rows of the micro-batch are shuffled; the scores are a function of the ids.
    said = [ids[real].tolist() for ids, real in zip(micro.completion_ids, mask, strict=True)]
    score = torch.tensor(tiny.mixed(said)).clamp(-0.5, 0.5) - (penalty or 0.0) * ~terminated
    assert sorted(scores) == sorted(tiny.mixed(said))
    to_go = torch.cat([micro.returns, torch.zeros(len(mask), 1)], 1)
    rewards = to_go[:, :-1] - to_go[:, 1:]
    expected = torch.where(last_token(mask), score[:, None], 0.0) - 0.3 * k1
    torch.testing.assert_close(rewards[mask], expected[mask], rtol=0, atol=1e-5)
    torch.testing.assert_close(micro.returns[:, 0], score - 0.3 * k1.sum(-1), rtol=0, atol=1e-5)
    assert (micro.returns[~mask] == 0).all()
    # Whitening: mean 0, variance 1 over the tokens that count, 0 on the others.
    advantages = micro.advantages[mask].double()
    assert advantages.mean().item() == pytest.approx(0, abs=1e-6)
    assert advantages.var(correction=0).item() == pytest.approx(1, abs=1e-5)
    assert (micro.advantages[~mask] == 0).all()


@pytest.mark.parametrize("bootstrap", [False, True])
def test_the_value_behind_the_last_token_counts_only_when_asked_and_cut_off(bootstrap, tmp_path):
    run = tiny.trainer(
        tmp_path, None, tiny.nothing, kind=tiny.SeenTrainer, given={"value_model": tiny.critic()}, max_steps=1,
        lam=0.0, kl_coef=0.0, gamma=0.9, max_completion_length=12, per_device_train_batch_size=16,
        bootstrap_truncated=bootstrap, learning_rate=1e-12,
    )  # fmt: skip
    run.train()
    micro = run.seen[0][0]
    _, _, last = forward_with_values(run.model, run.model, micro)
    full = micro.mask.sum(-1)
    ended = (micro.completion_ids * last_token(micro.mask) == tiny.EOS).any(-1)
    assert 0 < ended.sum() < 16
    # lam = 0 and rewards 0: the return of a token is gamma times the value of the next state.
    at_end = micro.returns.gather(1, full[:, None] - 1)[:, 0]
    expected = torch.where(ended, 0.0, 0.9 * last) if bootstrap else torch.zeros(16)
    torch.testing.assert_close(at_end, expected.detach(), rtol=0, atol=1e-5)
    assert last.abs().max() > 0.1


# ---- steps -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulation", [1, 2, 4])
@pytest.mark.parametrize(("epochs", "minibatches"), [(1, 1), (3, 1), (1, 2), (2, 3)])
def test_optimizer_steps_per_rollout_are_epochs_times_minibatches(accumulation, epochs, minibatches, tmp_path):
    rollouts = []

    def reward(completion_ids, **_):
        rollouts.append(len(completion_ids))
        return tiny.mixed(completion_ids)

    recorder = tiny.Recorder()
    steps = epochs * minibatches
    run = tiny.trainer(
        tmp_path, None, reward, kind=tiny.SeenTrainer, given={"callbacks": [recorder]}, max_steps=2 * steps,
        gradient_accumulation_steps=accumulation, num_ppo_epochs=epochs, num_mini_batches=minibatches,
        per_device_train_batch_size=2, max_completion_length=3, logging_strategy="no",
    )  # fmt: skip
    run.train()
    size = 2 * accumulation * minibatches
    assert rollouts == [size, size]
    assert len(recorder.parameters) == 2 * steps
    for before, after in itertools.pairwise(recorder.parameters):
        assert tiny.unequal(before, after), "a step that changed nothing"
    # Every row of a rollout is used once in each of its epochs, in another order each time.
    orders = []
    per_epoch = minibatches * accumulation
    for start in range(0, len(run.seen), per_epoch):
        rows = [r for micro, _, _ in run.seen[start : start + per_epoch] for r in micro.old_logp.sum(-1).tolist()]
        orders.append(rows)
    for cycle in range(2):
        mine = orders[cycle * epochs : (cycle + 1) * epochs]
        assert all(sorted(o) == sorted(mine[0]) for o in mine)
        assert len(set(mine[0])) > size // 2
        if size > 4:
            assert all(a != b for a, b in itertools.pairwise(mine))
    assert len(run.seen) == 2 * epochs * per_epoch


@pytest.mark.parametrize("minibatches", [1, 2])
def test_eight_at_once_equals_one_eight_times(minibatches, tmp_path):
    ends = []
    for size, accumulation in ((8, 1), (2, 4), (1, 8)):
        run = tiny.trainer(
            tmp_path / str(size), given={"reference": tiny.apart()}, max_steps=4, top_k=1, weight_decay=0.1,
            per_device_train_batch_size=size, gradient_accumulation_steps=accumulation, num_mini_batches=minibatches,
        )  # fmt: skip
        start = tiny.parameters(run.model)
        run.train()
        ends.append(tiny.parameters(run.model))
    moved = max(float((ends[0][n] - start[n]).abs().max()) for n in start)
    assert moved > 1e-2
    for other in ends[1:]:
        for name, value in ends[0].items():
            torch.testing.assert_close(other[name], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("minibatches", [1, 4])
def test_the_loss_is_divided_by_the_tokens_of_its_own_minibatch(minibatches, tmp_path):
    """What is logged as the loss is the mean over the tokens that were in it, for minibatches of unequal length."""
    run = tiny.trainer(
        tmp_path, None, tiny.mixed, kind=tiny.SeenTrainer, max_steps=2 * 2 * minibatches, num_mini_batches=minibatches,
        num_ppo_epochs=2, gradient_accumulation_steps=2, per_device_train_batch_size=2, max_completion_length=12,
    )  # fmt: skip
    run.train()
    lengths = [int(a.mask.sum() + b.mask.sum()) for (a, *_), (b, *_) in zip(run.seen[::2], run.seen[1::2], strict=True)]
    assert len(set(lengths)) > 1
    for log in tiny.step_logs(run):
        assert log["loss"] == pytest.approx(log["ppo/policy_loss/mean"] + 0.1 * log["ppo/value_loss/mean"], abs=1e-5)


def test_max_grad_norm_is_applied(tmp_path):
    def length(recorder):
        return torch.stack([g.norm() for g in recorder.gradients[0].values()]).norm().item()

    norms = {}
    for limit in (0.0, 0.01):
        recorder = tiny.Recorder()
        tiny.trainer(tmp_path / str(limit), given={"callbacks": [recorder]}, max_steps=1, max_grad_norm=limit).train()
        norms[limit] = length(recorder)
    assert norms[0.0] > 0.1
    assert norms[0.01] == pytest.approx(0.01, rel=1e-3)


def test_a_kl_past_the_target_freezes_the_rest_of_the_rollout(tmp_path):
    recorder = tiny.Recorder()
    run = tiny.trainer(
        tmp_path, given={"callbacks": [recorder]}, max_steps=10, num_ppo_epochs=5, target_kl=1e-3, weight_decay=0.1,
        per_device_train_batch_size=8,
    )  # fmt: skip
    run.train()
    logs = tiny.step_logs(run)
    frozen = [i for i in range(1, 10) if not tiny.unequal(recorder.parameters[i - 1], recorder.parameters[i])]
    for start in (0, 5):
        # The first minibatch sees a ratio of 1. The first one past the target is still stepped; nothing after it.
        past = next(i for i in range(start, start + 5) if logs[i]["ppo/approx_kl/mean"] > 1e-3)
        assert past < start + 4
        assert [i for i in frozen if start <= i < start + 5] == list(range(past + 1, start + 5))
        assert not any("ppo/approx_kl/mean" in log for log in logs[past + 1 : start + 5])
        assert sum(log.get("ppo/early_stop", 0.0) for log in logs[start : start + 5]) == 1.0, "the stop was not logged"


def test_below_the_target_nothing_stops(tmp_path):
    recorder = tiny.Recorder()
    run = tiny.trainer(
        tmp_path, given={"callbacks": [recorder]}, max_steps=4, num_ppo_epochs=4, target_kl=1e3, logging_steps=4.0
    )
    run.train()
    assert all(tiny.unequal(a, b) for a, b in itertools.pairwise(recorder.parameters))
    assert tiny.step_logs(run)[0]["ppo/early_stop"] == 0.0


# ---- the KL ------------------------------------------------------------------------------------------------------


def sequence_kl(policy, reference, prompt):
    """KL(policy||reference) over completions of at most two tokens, enumerated; differentiable."""
    first, ref_first = (m(prompt[None]).logits[0, -1].log_softmax(-1) for m in (policy, reference))
    others = torch.tensor([v for v in range(tiny.VOCABULARY) if v != tiny.EOS])
    ids = torch.cat([prompt.expand(len(others), -1), others[:, None]], 1)
    second, ref_second = (m(ids).logits[:, -1].log_softmax(-1) for m in (policy, reference))
    then = (second.exp() * (second - ref_second)).sum(-1)
    return (first.exp() * (first - ref_first)).sum() + (first.exp()[others] * then).sum()


@pytest.mark.parametrize(("estimator", "placement"), [("k1", "reward"), ("exact", "both"), ("k3", "both")])
def test_the_gradient_is_that_of_the_kl_over_sequences(estimator, placement, tmp_path):
    """No reward but the KL: the first gradient of a large batch, rescaled by what whitening divided by."""
    policy, reference = tiny.llama().eval(), tiny.apart().eval()
    expected = sequence_kl(policy, reference, torch.tensor([4, 5]))
    names = [n for n, _ in policy.named_parameters()]
    truth = dict(zip(names, torch.autograd.grad(expected, policy.parameters()), strict=True))
    data = tiny.prompts(4096).map(lambda _: {"prompt": "w1 w2"})
    recorder = tiny.Recorder()
    run = tiny.trainer(
        tmp_path, policy, tiny.nothing, data, kind=tiny.SeenTrainer,
        given={"reference": reference, "callbacks": [recorder]}, max_steps=1, max_completion_length=2, lam=1.0,
        kl_coef=0.2, kl_estimator=estimator, kl_placement=placement, vf_coef=0.0, max_grad_norm=0.0,
        per_device_train_batch_size=4096,
    )  # fmt: skip
    run.train()
    micro = run.seen[0][0]
    spread = micro.returns[micro.mask].double().std(correction=0)
    factor = float(spread * micro.mask.sum() / len(micro.mask) / 0.2)
    found = torch.cat([recorder.gradients[0][n].flatten() * factor for n in names])
    wanted = torch.cat([truth[n].flatten() for n in names])
    cosine = torch.nn.functional.cosine_similarity(found, wanted, dim=0).item()
    assert cosine > 0.99
    assert (found @ wanted / (wanted @ wanted)).item() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize(
    ("estimator", "placement", "direction"),
    [
        ("k1", "reward", "reverse"),
        ("k2", "loss", "reverse"),
        ("k3", "loss", "reverse"),
        ("exact", "loss", "reverse"),
        ("exact", "both", "reverse"),
        ("k3", "loss", "forward"),
        ("exact", "loss", "forward"),
    ],
)
def test_every_offered_form_of_the_penalty_lowers_the_kl(estimator, placement, direction, tmp_path):
    run = tiny.trainer(
        tmp_path, None, tiny.nothing, given={"reference": tiny.apart()}, max_steps=24,  kl_coef=0.5,
        kl_estimator=estimator, kl_placement=placement, kl_direction=direction, per_device_train_batch_size=32,
         learning_rate=2e-2,
    )  # fmt: skip
    run.train()
    kl = [log[f"kl/{direction}/mean"] for log in tiny.step_logs(run)]
    assert kl[-1] < 0.75 * kl[0]


def test_the_adaptive_controller_follows_its_rule(tmp_path):
    run = tiny.trainer(
        tmp_path, given={"reference": tiny.apart()}, max_steps=6, num_ppo_epochs=2, logging_steps=2.0,
        kl_controller="adaptive", kl_target=4.0, kl_horizon=20, kl_coef=0.2, per_device_train_batch_size=8,
    )  # fmt: skip
    run.train()
    coef = 0.2
    for log in tiny.step_logs(run):
        assert log["kl/coef"] == pytest.approx(coef, rel=1e-9)
        # per sequence, in nats: mean tokens times mean per token
        assert log["kl/sequence/reverse/mean"] == pytest.approx(
            log["kl/reverse/mean"] * log["completions/mean_length"], rel=1e-6
        )
        coef *= 1 + min(max(log["kl/sequence/reverse/mean"] / 4.0 - 1, -0.2), 0.2) * 8 / 20
    assert run.penalty.coef == pytest.approx(coef, rel=1e-9)
    assert abs(coef - 0.2) > 0.01


def test_the_reference_never_changes_and_gets_no_gradient(tmp_path):
    given = tiny.apart()
    before = copy.deepcopy(given.state_dict())
    run = tiny.trainer(
        tmp_path / "given", given={"reference": given}, max_steps=3, kl_estimator="exact", kl_placement="both"
    )
    run.train()
    policy = tiny.llama()
    start = copy.deepcopy(policy.state_dict())
    own = tiny.trainer(tmp_path / "own", policy, max_steps=3)
    own.train()
    for reference, initial in ((run.penalty.reference, before), (own.penalty.reference, start)):
        assert isinstance(reference, FrozenReference)
        assert not tiny.unequal(reference.model.state_dict(), initial)
        assert all(p.grad is None and not p.requires_grad for p in reference.model.parameters())
        assert not reference.model.training
    assert tiny.unequal(start, {n: t for n, t in policy.state_dict().items() if n in start})


# ---- value functions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("apart_from_policy", [False, True])
def test_the_value_function_learns_is_saved_and_is_no_part_of_the_policy(apart_from_policy, tmp_path, caplog):
    given = {"value_model": tiny.critic()} if apart_from_policy else {}
    run = tiny.trainer(tmp_path, given=given, max_steps=2, save_strategy="steps", save_steps=2.0)
    start = copy.deepcopy(value_parameters(run.model))
    run.train()
    learnt = value_parameters(run.model)
    assert tiny.unequal(start, learnt)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    policy = {n: t for n, t in run.model.state_dict().items() if not n.startswith(("v_head", "value_model"))}
    assert not tiny.unequal(loaded.state_dict(), policy)
    ids = torch.tensor([[4, 5, 6]])
    assert torch.equal(loaded.eval()(ids).logits, run.model.eval()(ids).logits)


def test_the_value_loss_brings_values_to_the_returns(tmp_path):
    run = tiny.trainer(
        tmp_path, None, lambda completions, **_: [3.0] * len(completions), max_steps=60, kl_coef=0.0, lam=1.0,
        vf_coef=1.0, cliprange_value=10.0, learning_rate=3e-2, per_device_train_batch_size=8,
    )  # fmt: skip
    run.train()
    losses = [log["ppo/value_loss/mean"] for log in tiny.step_logs(run)]
    assert losses[0] == pytest.approx(4.5, rel=1e-5)
    assert losses[-1] < 0.1


# ---- learning ----------------------------------------------------------------------------------------------------


def learn(folder, coef):
    run = tiny.trainer(
        folder, None, tiny.count_w5, max_steps=60, num_ppo_epochs=2, kl_coef=coef, per_device_train_batch_size=32,
        logging_steps=2.0, max_completion_length=8, learning_rate=1e-2,
    )  # fmt: skip
    run.train()
    return tiny.step_logs(run)


def test_it_learns_and_the_penalty_bounds_the_kl(tmp_path):
    held, free = learn(tmp_path / "held", 0.04), learn(tmp_path / "free", 0.0)
    for logs in (held, free):
        assert logs[-1]["reward/score/mean"] > logs[0]["reward/score/mean"] + 0.1
    kl = [np.mean([log["kl/sequence/reverse/mean"] for log in logs[-5:]]) for logs in (held, free)]
    assert max(log["kl/sequence/reverse/mean"] for log in held) < 15
    assert kl[1] > 2 * kl[0]


GOLDEN_METRICS = ("loss", "grad_norm", "kl/reverse/mean", "reward/score/mean", "ppo/value_loss/mean")


def test_twenty_steps_give_the_losses_they_always_gave(tmp_path):
    """KLFT_WRITE_GOLDEN=1 writes them anew; a change to them is a change of what is computed."""
    run = tiny.trainer(
        tmp_path, None, tiny.count_w5, max_steps=20, num_ppo_epochs=2, num_mini_batches=2,
        gradient_accumulation_steps=2, learning_rate=3e-3, missing_eos_penalty=0.1, whiten_rewards=True, self_test=True,
    )  # fmt: skip
    run.train()
    found = [{name: log[name] for name in GOLDEN_METRICS if name in log} for log in tiny.step_logs(run)]
    if os.environ.get("KLFT_WRITE_GOLDEN"):
        GOLDEN.write_text(json.dumps({"torch": torch.__version__, "steps": found}, indent=1) + "\n")
    golden = json.loads(GOLDEN.read_text())
    if golden["torch"] != torch.__version__:
        pytest.skip(f"golden losses are of torch {golden['torch']}, this is {torch.__version__}")
    assert len(found) == len(golden["steps"]) == 20
    for step, (mine, theirs) in enumerate(zip(found, golden["steps"], strict=True)):
        assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-5), f"step {step}"
