"""What PPOTrainer logs, in training and in evaluation: exactly what is promised, of the real tokens, each once."""

import math

import numpy as np
import pytest
import torch
from support import tiny

# ---- metrics -----------------------------------------------------------------------------------------------------

ROLLOUT = {
    *(f"kl/{d}/{s}" for d in ("reverse", "forward") for s in ("mean", "p50", "p90", "p99", "max")),
    *(f"kl/{k}/mean" for k in ("k1", "k2", "k3", "sequence/reverse", "sequence/forward")), "kl/top1_agree/frac",
    "kl/nonfinite/count", "kl/tokens/count",
    "entropy/policy/mean", "entropy/reference/mean", "value/explained_variance", "reward/score/mean",
    "reward/score/std", "reward/mixed/mean", "reward/count_w5/mean", "reward/total/mean", "completions/mean_length",
    "completions/terminated/frac",
}  # fmt: skip
TRAINING = {
    "ppo/policy_loss/mean", "ppo/value_loss/mean", "ppo/approx_kl/mean", "ppo/ratio/mean", "ppo/ratio_clipped/frac",
    "ppo/value_clipped/frac", "ppo/early_stop", "kl/coef", "episode",
}  # fmt: skip
TRAINERS_OWN = {"loss", "grad_norm", "learning_rate", "epoch", "step"}


def test_exactly_the_promised_metrics_are_logged_as_floats(tmp_path):
    run = tiny.trainer(
        tmp_path, None, [tiny.mixed, tiny.count_w5], given={"eval_dataset": tiny.prompts(6), "reference": tiny.apart()},
        max_steps=2, per_device_train_batch_size=8,
    )  # fmt: skip
    run.train()
    evaluated = run.evaluate()
    for log in tiny.step_logs(run):
        assert set(log) - TRAINERS_OWN == ROLLOUT | TRAINING
        strange = {n: v for n, v in log.items() if n in ROLLOUT | TRAINING and type(v) is not float}
        assert not strange
        assert all(math.isfinite(v) for v in log.values())
    speed = {"eval_runtime", "eval_samples_per_second", "eval_steps_per_second", "epoch"}
    assert set(evaluated) - speed == {f"eval_{name}" for name in ROLLOUT}
    assert all(type(evaluated[f"eval_{n}"]) is float and math.isfinite(evaluated[f"eval_{n}"]) for n in ROLLOUT)


def test_metrics_are_those_of_the_real_tokens(tmp_path):
    """The second rollout's, from the two models and numpy alone, one unpadded sequence at a time."""
    recorder = tiny.Recorder()
    run = tiny.trainer(
        tmp_path, kind=tiny.SeenTrainer, given={"reference": tiny.apart(), "callbacks": [recorder]}, max_steps=2,
        per_device_train_batch_size=16, max_completion_length=12, temperature=1.4, learning_rate=3e-2, lam=1.0,
        kl_coef=0.3,
    )  # fmt: skip
    run.train()
    policy, reference = tiny.llama().eval(), tiny.apart().eval()
    policy.load_state_dict({n: t for n, t in recorder.parameters[0].items() if n in policy.state_dict()}, strict=False)
    micro = run.seen[1][0]
    columns = {n: [] for n in ("reverse", "forward", "k1", "entropy", "ref_entropy", "agree", "sequence", "value")}
    for i in range(16):
        prompt, said = micro.prompt_ids[i][micro.prompt_mask[i]], micro.completion_ids[i][micro.mask[i]]
        ids = torch.cat([prompt, said])[None]
        with torch.no_grad():
            lp, lq = (
                (m(ids).logits[0, len(prompt) - 1 : -1].double() / 1.4).log_softmax(-1).numpy()
                for m in (policy, reference)
            )
        reverse = (np.exp(lp) * (lp - lq)).sum(-1)
        columns["reverse"] += reverse.tolist()
        columns["forward"] += (np.exp(lq) * (lq - lp)).sum(-1).tolist()
        columns["k1"] += (lp - lq)[np.arange(len(said)), said.numpy()].tolist()
        columns["entropy"] += (-(np.exp(lp) * lp).sum(-1)).tolist()
        columns["ref_entropy"] += (-(np.exp(lq) * lq).sum(-1)).tolist()
        columns["agree"] += (lp.argmax(-1) == lq.argmax(-1)).tolist()
        columns["sequence"].append(reverse.sum())
    k1 = np.array(columns["k1"])
    said = [ids[real].tolist() for ids, real in zip(micro.completion_ids, micro.mask, strict=True)]
    scores = np.array(tiny.mixed(said))
    returns, values = (t[micro.mask].double().numpy() for t in (micro.returns, micro.values))
    expected = {
        "kl/k1/mean": k1.mean(),
        "kl/k2/mean": (k1**2 / 2).mean(),
        "kl/k3/mean": (np.exp(-k1) - 1 + k1).mean(),
        "kl/sequence/reverse/mean": np.mean(columns["sequence"]),
        "kl/top1_agree/frac": np.mean(columns["agree"]),
        "entropy/policy/mean": np.mean(columns["entropy"]),
        "entropy/reference/mean": np.mean(columns["ref_entropy"]),
        "reward/score/mean": scores.mean(),
        "reward/score/std": scores.std(),
        "reward/mixed/mean": scores.mean(),
        "reward/total/mean": (scores.sum() - 0.3 * k1.sum()) / 16,
        "completions/mean_length": np.mean([len(s) for s in said]),
        "completions/terminated/frac": np.mean([s[-1] == tiny.EOS for s in said]),
        "value/explained_variance": 1 - (returns - values).var() / returns.var(),
        "ppo/ratio/mean": 1.0,
        "episode": 32.0,
    }
    for direction in ("reverse", "forward"):
        kl = np.array(columns[direction])
        expected |= {f"kl/{direction}/mean": kl.mean(), f"kl/{direction}/max": kl.max()}
        for percent in (50, 90, 99):
            expected[f"kl/{direction}/p{percent}"] = np.percentile(kl, percent, method="nearest")
    log = tiny.step_logs(run)[1]
    assert {n: log[n] for n in expected} == pytest.approx(expected, rel=2e-4, abs=1e-5)


# ---- evaluation --------------------------------------------------------------------------------------------------


def by_number(number, **_):
    return [float(i) for i in number]


@pytest.mark.parametrize("count", [1, 4, 10])
def test_each_evaluation_sample_counts_once(count, tmp_path):
    data, held_out = tiny.prompts(16, number=[0] * 16), tiny.prompts(count, number=[3**i for i in range(count)])
    run = tiny.trainer(tmp_path, None, by_number, data, given={"eval_dataset": held_out}, max_steps=1)
    expected = sum(3**i for i in range(count)) / count
    for _ in range(2):
        assert run.evaluate()["eval_reward/score/mean"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("on_start", [False, True])
def test_evaluating_changes_nothing_in_training(on_start, tmp_path):
    ends, logs, randoms = [], [], []
    for evaluates in (False, True):
        extra = {"eval_strategy": "steps", "eval_steps": 1.0, "eval_on_start": on_start} if evaluates else {}
        run = tiny.trainer(
            tmp_path / str(evaluates), given={"eval_dataset": tiny.prompts(6)}, max_steps=5, num_ppo_epochs=2,
            normalize_scores=True, kl_controller="adaptive", kl_target=0.1, kl_horizon=100, **extra,
        )  # fmt: skip
        run.train()
        ends.append(tiny.parameters(run.model))
        logs.append(tiny.step_logs(run))
        randoms.append(torch.get_rng_state())
        evaluations = [e for e in run.state.log_history if "eval_kl/reverse/mean" in e]
        assert len(evaluations) == (5 + on_start if evaluates else 0)
    assert not tiny.unequal(*ends)
    assert logs[0] == logs[1]
    assert torch.equal(*randoms)


def test_what_a_reward_function_logs_in_evaluation_stays_out_of_training(tmp_path):
    def reward(prompts, completions, held_out, log_metric, **_):
        log_metric("held_out", sum(held_out) / len(held_out))
        return [0.0] * len(completions)

    run = tiny.trainer(
        tmp_path, None, reward, tiny.prompts(16, held_out=[0.0] * 16),
        given={"eval_dataset": tiny.prompts(4, held_out=[1.0] * 4)}, max_steps=3, eval_strategy="steps",
        eval_steps=1.0,
    )  # fmt: skip
    run.train()
    assert [log["held_out"] for log in tiny.step_logs(run)] == [0.0, 0.0, 0.0]


def test_what_a_reward_function_logs_never_replaces_what_klft_does(tmp_path, caplog):
    def reward(completions, log_metric, **_):
        log_metric("kl/coef", 99.0)
        log_metric("mine", 3.0)
        return [20000.0] * len(completions)

    run = tiny.trainer(tmp_path, None, reward, tiny.prompts(16), max_steps=1)
    with caplog.at_level("WARNING"):
        run.train()
    (log,) = tiny.step_logs(run)
    assert (log["kl/coef"], log["logged/kl/coef"], log["mine"]) == (run.args.kl_coef, 99.0, 3.0)
    assert "scores beyond 10000 make value losses" in caplog.text


# ---- completions that no function judged ------------------------------------------------------------------------


def some(completions, **_):
    """A score of 1 for all but the first."""
    return [None, *[1.0] * (len(completions) - 1)]


@pytest.mark.parametrize("normalize", [False, True])
def test_what_no_function_judged_counts_in_no_metric_of_scores(normalize, tmp_path):
    run = tiny.trainer(
        tmp_path, None, some, given={"eval_dataset": tiny.prompts(4)}, max_steps=1, normalize_scores=normalize,
        log_completions=True,
    )  # fmt: skip
    run.train()
    (log,) = tiny.step_logs(run)
    assert log["reward/score/mean"] == (0.0 if normalize else 1.0)
    assert log["reward/score/std"] == 0.0
    assert log["reward/some/mean"] == 1.0
    assert run.evaluate()["eval_reward/score/mean"] == (0.0 if normalize else 1.0)
    assert [row["score"] is None for row in run.ppo.completions] == [True, False, False, False]
    if normalize:
        assert (run.ppo.moments.count, run.ppo.moments.mean) == (3, 1.0), "a None is no 0 to normalise by"


def test_what_nothing_judged_is_trained_on_its_kl_alone(tmp_path):
    def never(completions, **_):
        return [None] * len(completions)

    run = tiny.trainer(tmp_path, None, never, max_steps=1, kind=tiny.SeenTrainer, given={"reference": tiny.apart()})
    run.train()
    (log,) = tiny.step_logs(run)
    assert not [name for name in log if name.startswith("reward/") and name != "reward/total/mean"]
    # A completion's rewards add up to -coef * k1 over its tokens, and nothing for a score.
    expected = -log["kl/coef"] * log["kl/k1/mean"] * log["completions/mean_length"]
    assert log["reward/total/mean"] == pytest.approx(expected, rel=1e-5)


# ---- a run without logs ------------------------------------------------------------------------------------------


def test_a_run_without_logs_holds_no_more_than_one_rollout(tmp_path):
    run = tiny.trainer(tmp_path, max_steps=5, logging_strategy="no")
    run.train()
    assert len(run.ppo.train.tables) == 1
