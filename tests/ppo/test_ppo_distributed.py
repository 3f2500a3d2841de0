"""Two real processes (gloo): the same numbers as one, the same end for both.

Run as a script, this file is what each of the processes does: all checks in one process group, results as files.
"""

import os
import re
import sys
import time
from pathlib import Path

import conftest  # noqa: F401 - also for the script: no hub, few threads
import pytest
import torch
from support import tiny
from support.lengths import short_and_long
from support.processes import launch, leave

from klft.token_rules import along_ref_entropy, combine, decay

WORLD = 2


# ---- runs that one process and two must agree on -----------------------------------------------------------------


# name -> (prompts of one process and one micro-batch when there are two, config)
AGREE = {
    "plain": (4, {"whiten_rewards": True, "normalize_scores": True, "missing_eos_penalty": 0.3}),
    "accumulated": (2, {"gradient_accumulation_steps": 2, "max_grad_norm": 0.05}),
    "exact": (4, {"kl_estimator": "exact", "kl_placement": "both"}),
    "adaptive": (4, {"kl_controller": "adaptive", "kl_target": 0.5, "kl_horizon": 40, "num_ppo_epochs": 2}),
    "vocabulary": (4, {"kl_estimator": "exact", "kl_placement": "both", "kl_shard_vocab": "dp"}),
    "lengths": (4, {"train_sampling_strategy": "sequential"}),
    "weighed": (4, {"kl_estimator": "exact", "kl_placement": "both", "kl_controller": "pi", "kl_target": 0.5}),
    "adapter": (4, {}),
    "value model": (4, {"bootstrap_truncated": True}),
    "budget": (
        2,
        {
            "gradient_accumulation_steps": 2, "tokens_per_micro_batch": 16, "train_sampling_strategy": "sequential",
            "kl_estimator": "exact", "kl_placement": "both", "kl_shard_vocab": "dp",
        },
    ),
}  # fmt: skip


def agreeing(name, folder, processes):
    """Three steps on 8 prompts each, greedy, so that sampling does not depend on the number of processes."""
    size, changed = AGREE[name]
    given = {
        "adapter": {"peft_config": tiny.lora()}, "value model": {"value_model": tiny.critic()},
        "budget": {"value_model": tiny.critic()},
        "weighed": {"token_rule": combine(decay(0.6), along_ref_entropy(1.0, 5.0))},
    }.get(name, {})  # fmt: skip
    if name != "adapter":
        given = {**given, "reference": tiny.llama(5)}
    data = short_and_long() if name in ("lengths", "budget") else None
    return tiny.trainer(
        folder / name, data=data, kind=tiny.SeenTrainer, given=given,
        max_steps=3, top_k=1, per_device_train_batch_size=size * WORLD // processes, **changed,
    )  # fmt: skip


def outcome(run):
    return {
        "parameters": tiny.parameters(run.model),
        "logs": [{k: v for k, v in log.items() if k != "epoch"} for log in tiny.step_logs(run)],
        "widths": [micro.mask.sum(-1).tolist() for micro, _, _ in getattr(run, "seen", [])],
        "random": torch.get_rng_state(),
    }


# ---- what only two processes do ----------------------------------------------------------------------------------


def resumed(folder, rank):
    def go(where, steps, resume=None):
        run = tiny.trainer(
            folder / where, max_steps=steps, num_ppo_epochs=2, num_mini_batches=2, per_device_train_batch_size=2,
            gradient_accumulation_steps=2, save_strategy="steps", save_steps=3.0,
        )  # fmt: skip
        run.train(resume_from_checkpoint=resume)
        return outcome(run)

    whole = go("whole", 6)
    go("cut", 3)
    torch.manual_seed(1000 + rank)
    return {"whole": whole, "rest": go("cut", 6, True)}


def numbered(number, **_):
    return [float(n) for n in number]


def evaluated(folder, rank):
    means = {}
    for count in (1, 3, 5, 8, 11):
        data, held_out = tiny.prompts(16, number=[0] * 16), tiny.prompts(count, number=[3**i for i in range(count)])
        run = tiny.trainer(folder, None, numbered, data, given={"eval_dataset": held_out}, max_steps=1)
        means[count] = run.evaluate()["eval_reward/score/mean"]
    return means


class BrokenOnRankOne(tiny.PPOTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.args.process_index == 1 and self.state.global_step == 1:
            inputs["rollout"].returns = inputs["rollout"].returns * float("nan")
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


def broken_loss(folder, rank):
    run = tiny.trainer(folder, kind=BrokenOnRankOne, max_steps=3, save_strategy="steps", save_steps=1.0)
    recorder = tiny.Recorder()
    run.add_callback(recorder)
    try:
        run.train()
    except RuntimeError as error:
        return {"error": str(error), "steps": len(recorder.parameters)}
    return {"error": "", "steps": len(recorder.parameters)}


class BrokenGradientOnRankOne(tiny.PPOTrainer):
    """The loss is finite; what flows back of it is not, on one rank and in the second step."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self.args.process_index == 1 and self.state.global_step == 1:
            loss.register_hook(lambda gradient: gradient * float("inf"))
        return loss


def broken_gradient(folder, rank):
    run = tiny.trainer(folder, kind=BrokenGradientOnRankOne, max_steps=3, save_strategy="steps", save_steps=1.0)
    recorder = tiny.Recorder()
    run.add_callback(recorder)
    try:
        run.train()
    except RuntimeError as error:
        return {"error": str(error), "after": tiny.parameters(run.model), "steps": recorder.parameters}


def broken_rule(folder, rank):
    """Each rank's own error: the rule fails on the second alone, and the first must not wait for it."""

    def rule(token_ids, mask, scores):
        return torch.full_like(scores.logp, -1.0 if rank else 1.0)

    try:
        tiny.trainer(folder, max_steps=1, given={"token_rule": rule}).train()
    except (RuntimeError, ValueError) as error:
        return str(error)


def sampled(folder, rank):
    """The same prompt for everyone: processes draw differently. Rows are shuffled per process, so in a fixed order."""
    data = tiny.prompts(16).map(lambda _: {"prompt": "w1 w2"})
    run = tiny.trainer(folder, data=data, kind=tiny.SeenTrainer, max_steps=1, self_test=True)
    run.train()
    return sorted(run.seen[0][0].completion_ids.tolist())


def stopped(folder, rank):
    recorder = tiny.Recorder()
    run = tiny.trainer(
        folder, max_steps=5, num_ppo_epochs=5, target_kl=1e-3, given={"callbacks": [recorder]}, logging_steps=5.0
    )
    run.train()
    return recorder.parameters


def refused(folder, rank):
    found = []

    class Second(tiny.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            try:
                tiny.trainer(folder, max_steps=1).train()
            except RuntimeError as error:
                found.append(str(error))

    tiny.trainer(folder, max_steps=1, given={"callbacks": [Second()]}).train()
    return found


def rank_one_fails(completions, **_):
    if os.environ["RANK"] == "1":
        print(f"raising at {time.time()}", flush=True)
        raise ZeroDivisionError("the reward service is gone")
    return [0.0] * len(completions)


def worker(what, folder):
    rank = int(os.environ["RANK"])
    if what == "fail":
        tiny.trainer(folder, None, rank_one_fails, max_steps=2).train()
        return
    for name in AGREE:
        run = agreeing(name, folder, WORLD)
        run.train()
        torch.save(outcome(run), folder / f"{name}.{rank}.pt")
    for check in (resumed, evaluated, broken_loss, broken_gradient, broken_rule, sampled, stopped, refused):
        (folder / check.__name__).mkdir(exist_ok=True)
        torch.save(check(folder / check.__name__, rank), folder / f"{check.__name__}.{rank}.pt")


# ---- the tests ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """What each process found, by name of the check."""
    folder = tmp_path_factory.mktemp("two")
    done = launch(__file__, "check", folder, processes=WORLD, timeout=300)

    def results(name):
        paths = [folder / f"{name}.{rank}.pt" for rank in range(WORLD)]
        assert all(p.exists() for p in paths), f"the processes ended with {done.returncode}:\n{done.stderr[-6000:]}"
        return [torch.load(p, weights_only=False) for p in paths]

    return results


@pytest.mark.parametrize("name", AGREE)
def test_two_processes_train_what_one_trains(name, both, tmp_path):
    run = agreeing(name, tmp_path, 1)
    start = tiny.parameters(run.model)
    run.train()
    alone, found = outcome(run), both(name)
    assert not tiny.unequal(found[0]["parameters"], found[1]["parameters"])
    moved = max(float((alone["parameters"][n] - start[n]).abs().max()) for n in start)
    assert moved > 1e-2
    for parameter, value in alone["parameters"].items():
        torch.testing.assert_close(found[0]["parameters"][parameter], value, rtol=1e-5, atol=1e-5, msg=parameter)
    assert found[0]["logs"] == found[1]["logs"] or not found[1]["logs"]
    for mine, theirs in zip(alone["logs"], found[0]["logs"], strict=True):
        assert theirs == pytest.approx(mine, rel=1e-4, abs=1e-5)


def test_one_process_may_have_shorter_completions_than_the_other(both):
    short, long = both("lengths")
    assert max(short["widths"][0]) == 1
    assert min(long["widths"][0]) == 6


def test_both_processes_run_as_many_passes_as_the_one_with_longer_rows(both):
    """4 rows of 3 tokens fit a budget of 16; 4 rows of 8 make two passes, so the short ones are cut in two as well."""
    short, long = both("budget")
    assert [len(widths) for widths in short["widths"]] == [2] * 6
    assert [len(widths) for widths in long["widths"]] == [2] * 6
    assert max(map(max, short["widths"][:2])) == 1
    assert min(map(min, long["widths"][:2])) == 6


def test_six_steps_are_three_and_three_more_on_two_processes(both):
    found = both("resumed")
    for result in found:
        whole, rest = result["whole"], result["rest"]
        assert not tiny.unequal(whole["parameters"], rest["parameters"])
        assert torch.equal(whole["random"], rest["random"])
        assert whole["logs"] == rest["logs"]
    assert len(found[0]["whole"]["logs"]) == 6
    assert not tiny.unequal(found[0]["rest"]["parameters"], found[1]["rest"]["parameters"])
    assert not torch.equal(found[0]["rest"]["random"], found[1]["rest"]["random"])


def test_each_evaluation_sample_counts_once_on_two_processes(both):
    for means in both("evaluated"):
        assert means == pytest.approx({n: sum(3**i for i in range(n)) / n for n in means}, rel=1e-6)


def test_a_loss_that_is_not_finite_on_one_process_stops_both(both):
    for result in both("broken_loss"):
        assert "the loss is not finite on rank(s) [1] at step 1" in result["error"]
        assert "checkpoint-1" in result["error"]
        assert result["steps"] == 1


def test_a_gradient_that_is_not_finite_on_one_process_stops_both_before_the_step(both):
    for result in both("broken_gradient"):
        assert result["error"].startswith("the gradient is not finite at step 1.")
        assert re.search(r" The last good checkpoint is \S+/checkpoint-1\.$", result["error"])
        (after_first,) = result["steps"]
        names = {name.removeprefix("module."): p for name, p in after_first.items()}
        assert not tiny.unequal(names, result["after"])
        assert all(p.isfinite().all() for p in result["after"].values())


def test_a_token_rule_that_fails_on_one_process_stops_both(both):
    first, second = both("broken_rule")
    assert second.startswith("token_rule must give one finite weight >= 0 per token")
    assert first.startswith("rank 1 failed")
    assert second in first


def test_processes_sample_differently(both):
    mine, theirs = both("sampled")
    assert mine != theirs
    assert len(mine) == len(theirs) == 4


def test_processes_stop_a_rollout_together(both):
    mine, theirs = both("stopped")
    assert len(mine) == 5
    for a, b in zip(mine, theirs, strict=True):
        assert not tiny.unequal(a, b)
    assert tiny.unequal(mine[0], mine[1])
    assert not tiny.unequal(mine[3], mine[4])


def test_a_second_run_in_the_folder_is_refused_on_both(both):
    for found in both("refused"):
        assert len(found) == 1
        assert "another run is writing to" in found[0]


@pytest.mark.slow
def test_an_error_in_one_process_ends_both_with_its_traceback(tmp_path):
    started = time.time()
    done = launch(__file__, "fail", tmp_path, processes=WORLD, timeout=300)
    ended = time.time()
    raised = [line.split()[-1] for line in done.stdout.splitlines() if "raising at" in line]
    assert len(raised) == 1, done.stderr[-4000:]
    assert ended - float(raised[0]) < float(raised[0]) - started, "it takes longer to end than it took to begin"
    assert done.returncode == 1
    assert "ZeroDivisionError: the reward service is gone" in done.stderr
    assert "rank 1 failed" in done.stderr, "the other process says where it went wrong"
    assert "rank_one_fails" in done.stderr


if __name__ == "__main__":
    worker(sys.argv[1], Path(sys.argv[2]))
    leave()
