"""Micro-batches of like length: a partition within the budget, of as many as are asked for, and training unchanged."""

import itertools
import json

import pytest
import torch
from support import tiny

from klft.generation import Completions
from klft.ppo.micro_batches import count_within, split_by_length


def rows_of(lengths, width=(0, 0)):
    """Completions of (prompt, completion) tokens, padded to the longest and then by `width`."""
    prompts, completions = (max(column) + more for column, more in zip(zip(*lengths, strict=True), width, strict=True))
    prompt_mask = torch.stack([torch.arange(prompts) >= prompts - p for p, _ in lengths])
    mask = torch.stack([torch.arange(completions) < c for _, c in lengths])
    ids = torch.arange(len(lengths))[:, None] + 3
    return Completions(ids * prompt_mask, prompt_mask, ids * mask, mask)


def drawn(seed, count=9):
    generator = torch.Generator().manual_seed(seed)
    most = (4, 24) if seed % 2 else (24, 4)  # of which there is more: completions or prompts
    return [tuple(int(torch.randint(1, m + 1, (), generator=generator)) for m in most) for _ in range(count)]


def padded_size(lengths):
    prompts, completions = zip(*lengths, strict=True)
    return len(lengths) * (max(prompts) + max(completions))


# ---- the partition -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_every_row_is_in_one_micro_batch_and_none_is_over_the_budget(seed):
    lengths = drawn(seed)
    rows = rows_of(lengths)
    for budget in range(max(p + c for p, c in lengths), 300, 13):
        least = count_within(rows, budget)
        for count in range(least, len(lengths) + 1):  # more: where another process needs them
            groups = split_by_length(rows, count)
            assert len(groups) == count
            assert sorted(itertools.chain(*groups)) == list(range(len(lengths)))
            assert all(padded_size([lengths[i] for i in group]) <= budget for group in groups)


@pytest.mark.parametrize("seed", range(4))
def test_the_largest_micro_batch_is_as_small_as_any_cut_of_the_sorted_rows_makes_it(seed):
    lengths = drawn(seed, 7)
    first = max((0, 1), key=lambda column: max(x[column] for x in lengths) - min(x[column] for x in lengths))
    in_order = sorted(lengths, key=lambda x: (x[first], x[1 - first]), reverse=True)

    def largest(cuts):
        return max(padded_size(in_order[a:b]) for a, b in itertools.pairwise([0, *cuts, 7]))

    for count in range(1, 8):
        best = min(map(largest, itertools.combinations(range(1, 7), count - 1)))
        groups = split_by_length(rows_of(lengths), count)
        assert max(padded_size([lengths[i] for i in group]) for group in groups) == best


def test_rows_of_one_length_stay_in_their_order():
    assert split_by_length(rows_of([(3, 5)] * 8), 4) == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_a_row_over_the_budget_is_a_micro_batch_of_its_own():
    rows = rows_of([(2, 2), (2, 30), (2, 3)])
    assert count_within(rows, 12) == 2
    assert split_by_length(rows, 2) == [[1], [2, 0]]


def test_trimming_takes_off_padding_alone():
    rows, bare = rows_of([(2, 5), (3, 1)], width=(4, 7)), rows_of([(2, 5), (3, 1)])
    assert {k: v.tolist() for k, v in vars(rows.trimmed()).items()} == {k: v.tolist() for k, v in vars(bare).items()}
    nothing = rows_of([(1, 0), (2, 0)], width=(0, 4)).trimmed()
    assert nothing.mask.tolist() == [[False], [False]]


# ---- training ----------------------------------------------------------------------------------------------------

SETTINGS = {
    "k1": {},
    "exact": {"kl_estimator": "exact", "kl_placement": "both"},
    "value model": {"bootstrap_truncated": True},
}
SIZES = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_completion_length": 12}
BUDGET = {"tokens_per_micro_batch": 24}


def run_with(folder, name, **changed):
    """In float64 but for the values, which are of fp32 by design."""
    recorder = tiny.Recorder()
    given = {"reference": tiny.apart().double(), "callbacks": [recorder]}
    if name == "value model":
        given["value_model"] = tiny.critic().double()
    model = tiny.llama().double()
    run = tiny.trainer(folder, model, kind=tiny.SeenTrainer, given=given, max_steps=2, **SIZES | changed)
    run.train()
    return run, recorder


@pytest.mark.parametrize("name", SETTINGS)
def test_gradients_and_metrics_are_those_of_one_batch(name, tmp_path):
    """One pass of 8 rows, and passes of at most 24 tokens: to 1e-6, over two rollouts."""
    whole, gradients = run_with(
        tmp_path / "whole", name, **SETTINGS[name], per_device_train_batch_size=8, gradient_accumulation_steps=1
    )
    cut, found = run_with(tmp_path / "cut", name, **SETTINGS[name], **BUDGET)
    assert len(whole.seen) == 2
    assert len(cut.seen) > 4
    assert len({len(micro.mask) for micro, _, _ in cut.seen}) > 1
    for micro, _, _ in cut.seen:
        assert micro.inputs[0].numel() <= 24
        assert micro.mask.any(0).all()
        assert micro.prompt_mask.any(0).all()
    for one, other in zip(gradients.gradients, found.gradients, strict=True):
        assert max(float(g.abs().max()) for g in one.values()) > 1e-2
        for parameter, gradient in one.items():
            torch.testing.assert_close(other[parameter], gradient, rtol=1e-6, atol=1e-6, msg=parameter)
    for mine, theirs in zip(tiny.step_logs(whole), tiny.step_logs(cut), strict=True):
        assert theirs == pytest.approx(mine, rel=1e-6, abs=1e-6)


def test_a_budget_for_all_makes_one_pass_of_it(tmp_path):
    run, recorder = run_with(tmp_path, "k1", tokens_per_micro_batch=1000)
    assert [len(micro.mask) for micro, _, _ in run.seen] == [8, 8]
    assert len(recorder.gradients) == 2


def test_resuming_within_a_rollout_is_bit_for_bit_and_the_budget_may_change(tmp_path):
    """Passes are counted once per rollout and saved with it: another budget says how the next rollout is cut."""
    settings = {"num_ppo_epochs": 2, "num_mini_batches": 2, "save_strategy": "steps", "save_steps": 2.0} | SIZES

    def go(folder, steps, budget, resume=None):
        run = tiny.trainer(folder, max_steps=steps, tokens_per_micro_batch=budget, **settings)
        run.train(resume_from_checkpoint=resume)
        return tiny.parameters(run.model)

    whole = go(tmp_path / "whole", 4, 24)
    go(tmp_path / "cut", 2, 24)
    saved = json.loads((tmp_path / "cut" / "checkpoint-2" / "klft_state.json").read_text())
    assert len(saved["cycle"]["stats"]["minibatch_passes"]) == 4
    for budget in (24, None):
        resumed = go(tmp_path / "cut", 4, budget, str(tmp_path / "cut" / "checkpoint-2"))
        assert not tiny.unequal(whole, resumed)


def test_a_stopped_rollout_has_no_passes(tmp_path):
    run = tiny.trainer(
        tmp_path,
        kind=tiny.SeenTrainer,
        max_steps=6,
        num_ppo_epochs=6,
        target_kl=1e-3,
        learning_rate=3e-2,
        **SIZES | BUDGET,
    )
    recorder = tiny.Recorder()
    run.add_callback(recorder)
    run.train()
    assert run.ppo.cycle.rollout is None
    assert not tiny.unequal(recorder.parameters[-1], recorder.parameters[-2])


# ---- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"tokens_per_micro_batch": 0}, "tokens_per_micro_batch must be finite and >= 1, got 0"),
        ({"tokens_per_micro_batch": 12}, "tokens_per_micro_batch=12 is below 13: one prompt and completion"),
        ({"tokens_per_micro_batch": 20, "max_prompt_length": 9}, "tokens_per_micro_batch=20 is below 21"),
        ({"tokens_per_micro_batch": 99, "gradient_accumulation_steps": 1}, "needs gradient_accumulation_steps >= 2"),
    ],
)
def test_a_budget_that_cannot_work_is_refused(changed, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        tiny.config(tmp_path, **SIZES | changed)


def test_a_prompt_that_does_not_fit_is_refused_before_training(tmp_path):
    data = tiny.Dataset.from_dict({"prompt": ["w1 w2"] * 7 + [" ".join(["w3"] * 12)]})
    said = r"up to 12 tokens and max_completion_length = 12 make 24, and tokens_per_micro_batch is 20\. Set max_prompt"
    with pytest.raises(ValueError, match=said):
        tiny.trainer(tmp_path, data=data, **SIZES | {"tokens_per_micro_batch": 20})
    tiny.trainer(tmp_path, data=data, **SIZES | {"tokens_per_micro_batch": 24})
