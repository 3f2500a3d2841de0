"""A reward that tells no completion from another trains on nothing but the KL: said once, at the first such rollout."""

import itertools

import pytest
from support import tiny

SAME = "every completion of this rollout has the same score"
LEFT = "there is nothing to learn from"


def one(completions, **_):
    """1 for everyone."""
    return [1.0] * len(completions)


def unjudged(completions, **_):
    """No number for anyone."""
    return [None] * len(completions)


def halves(prompts, completions, **_):
    """1 for every second completion, no number for the others."""
    return [(1.0, None)[i % 2] for i in range(len(completions))]


def later():
    """0 for all of the first rollout; then what differs."""
    calls = itertools.count()
    return lambda completion_ids, **_: [0.0] * len(completion_ids) if next(calls) == 0 else tiny.mixed(completion_ids)


def warned(tmp_path, caplog, reward, **changed):
    """What a run of three rollouts says of its scores."""
    run = tiny.trainer(tmp_path, reward=reward, **({"max_steps": 3} | changed))
    caplog.clear()
    run.train()
    return [text for text in caplog.messages if "score" in text]


@pytest.mark.parametrize(("reward", "changed", "said"), [
    (tiny.nothing, {"kl_coef": 0.1}, f"{SAME} (0.0): {LEFT} but the KL penalty. Look at the reward function, and at"),
    (tiny.nothing, {"kl_coef": 0.0}, f"{SAME} (0.0): {LEFT}. Look at"),
    (one, {}, f"{SAME} (1.0): {LEFT} but"),
    ([one, tiny.nothing], {"reward_weights": [0.5, 1.0]}, f"{SAME} (0.50): {LEFT} but"),
    (later(), {}, f"{SAME} (0.0): {LEFT} but"),
    (unjudged, {}, f"no completion of this rollout has a score, by any reward function: {LEFT} but"),
    ([tiny.mixed, one], {}, "reward function 'one' gave every completion of this rollout that it judged the same"),
    (halves, {}, "reward function 'halves' gave every completion of this rollout that it judged the same score (1.0)"),
])  # fmt: skip
def test_scores_that_tell_nothing_apart_are_said_once(reward, changed, said, tmp_path, caplog):
    (line,) = warned(tmp_path, caplog, reward, **changed)
    assert line.startswith(said)


@pytest.mark.parametrize(("reward", "changed"), [
    (tiny.mixed, {}),
    ([tiny.mixed, unjudged], {}),  # another rollout's prompts may be its own
    (tiny.nothing, {"per_device_train_batch_size": 1}),  # nothing to be told from
])  # fmt: skip
def test_scores_that_differ_are_not_spoken_of(reward, changed, tmp_path, caplog):
    assert warned(tmp_path, caplog, reward, **changed) == []


def test_an_evaluation_says_nothing(tmp_path, caplog):
    run = tiny.trainer(tmp_path, reward=tiny.nothing, given={"eval_dataset": tiny.prompts(4)})
    run.evaluate()
    assert "score" not in caplog.text
