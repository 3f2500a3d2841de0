"""PPOConfig: the documented defaults, and every value that cannot work refused by the name of its field."""

import dataclasses
import json
import math

import jaxtyping
import pytest
from support import tiny
from transformers import TrainingArguments
from trl import ScriptArguments, TrlParser

from klft import AdaptiveKL, FixedKL, PIController, PPOConfig, ScheduledKL, TargetKL

NAN, INF = math.nan, math.inf

# The documented fields and what they are when nobody says anything.
DEFAULTS = {
    "total_episodes": None,
    "num_ppo_epochs": 4,
    "num_mini_batches": 1,
    "max_prompt_length": None,
    "max_completion_length": 64,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "generation_kwargs": None,
    "kl_coef": 0.05,
    "kl_estimator": "k1",
    "kl_direction": "reverse",
    "kl_placement": "reward",
    "kl_controller": "fixed",
    "kl_target": None,
    "kl_horizon": 10000,
    "target_kl": None,
    "cliprange": 0.2,
    "cliprange_value": 0.2,
    "dual_clip": None,
    "vf_coef": 0.1,
    "gamma": 1.0,
    "lam": 0.95,
    "whiten_rewards": False,
    "reward_weights": None,
    "reward_clip": None,
    "missing_eos_penalty": None,
    "disable_dropout": True,
    "log_completions": False,
    "num_completions_to_print": 4,
}
# Beyond the documented list, and the Trainer's own whose default is another here.
MORE = {
    "normalize_scores": False, "bootstrap_truncated": False, "kl_shard_vocab": "auto", "kl_log_tokens": 0,
    "model_init_kwargs": None, "self_test": True, "overwrite_output_dir": False, "chat_template_kwargs": None,
    "cliprange_low": None, "cliprange_high": None, "resume_changes": None, "reward_timeout": None,
    "kl_coef_end": None, "reference_placement": None, "reward_model_placement": None, "tokens_per_micro_batch": None,
}  # fmt: skip
CHANGED = {
    "learning_rate": 3e-6,
    "adam_epsilon": 1e-5,
    "logging_steps": 10,
    "logging_nan_inf_filter": False,
    "remove_unused_columns": False,
}

INHERITED = {f.name for f in dataclasses.fields(TrainingArguments)}
FIELDS = {f.name: f for f in dataclasses.fields(PPOConfig)}
OWN = {name: f for name, f in FIELDS.items() if name not in INHERITED}
CHOICES = ("kl_estimator", "kl_direction", "kl_placement", "kl_controller", "kl_shard_vocab")


@pytest.fixture(autouse=True)
def _as_users_have_it():
    """Without the suite's own type checks, which would refuse a wrong type before PPOConfig sees it."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def config(tmp_path):
    """A config of a run that writes below the test's own folder."""
    return lambda **more: PPOConfig(**({"output_dir": str(tmp_path / "run"), "report_to": "none"} | more))


# --- what there is ---------------------------------------------------------------------------------------------------


def test_the_option_names_are_frozen():
    """A renamed option breaks every YAML file out there: change this list only together with the documentation."""
    assert set(OWN) == set(DEFAULTS) | set(MORE)


def test_no_more_than_forty_fields_and_six_that_came_later():
    assert len(OWN) <= 46


@pytest.mark.parametrize("name", [*DEFAULTS, *MORE, *CHANGED])
def test_default(config, name):
    want = (DEFAULTS | MORE | CHANGED)[name]
    got = getattr(config(), name)
    assert got == want
    assert type(got) is type(want) or name == "logging_steps"


def test_every_field_explains_itself():
    assert [n for n in OWN if not FIELDS[n].metadata.get("help")] == []


# --- what is refused -------------------------------------------------------------------------------------------------


def kind(f):
    """The field's type without its None: int, float, bool, str, dict or list."""
    text = str(f.type)
    for t in (dict, list, int, float, bool, str):
        if f.type is t or t.__name__ in text:
            return t
    raise AssertionError(text)


def refused_values(name):
    """Values that no sensible reading of the field's type and name allows."""
    f, optional = FIELDS[name], FIELDS[name].default is None
    numbers = ["3", "many", [1], {"a": 1}, NAN, INF, -INF, -1, True]
    values = {
        int: [*numbers, 1.5, 2.0],
        float: numbers,
        bool: ["true", "no", 1, 0, 0.5, NAN, [True]],
        str: ["K1", "none", "", 3, True, NAN, ["k1"], {"k1": 1}],
        dict: [3, NAN, True, ["top_k"], "not json", "[1]", '"text"', "3"],
        list: [3, 1.5, "1.0", True, NAN, ["1.0"], [NAN], [INF], [None], [True], [[1.0]], {"f": 1.0}],
    }[kind(f)]
    return [v for v in values if (name, v) != ("kl_shard_vocab", "none")] + ([] if optional else [None])


def cases(names):
    return [pytest.param(n, v, id=f"{n}-{v!r}") for n in names for v in refused_values(n)]


@pytest.mark.parametrize(("name", "value"), cases(OWN))
def test_refused_by_name(config, name, value):
    with pytest.raises(ValueError, match=rf"\b{name}\b"):
        config(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    cases(["learning_rate", "adam_epsilon", "logging_nan_inf_filter", "remove_unused_columns"]),
)
def test_the_changed_fields_of_the_trainer_are_checked_too(config, name, value):
    with pytest.raises(ValueError, match=rf"\b{name}\b"):
        config(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("total_episodes", 0),
        ("num_ppo_epochs", 0),
        ("num_mini_batches", 0),
        ("max_prompt_length", 0),
        ("max_completion_length", 0),
        ("temperature", 0),
        ("temperature", 1e-9),
        ("top_p", 0.0),
        ("top_p", 1.0001),
        ("kl_target", 0.0),
        ("kl_horizon", 0),
        ("target_kl", 0.0),
        ("cliprange", 0.0),
        ("cliprange_value", 0.0),
        ("dual_clip", 1.0),
        ("gamma", 1.01),
        ("lam", 1.01),
        ("reward_clip", 0.0),
    ],
)
def test_out_of_range_is_refused_with_the_value(config, name, value):
    with pytest.raises(ValueError, match=rf"\b{name} must be.*got {value}"):
        config(**{name: value})


@pytest.mark.parametrize("trackers", ["all", "none", ["none"]])
def test_trackers_that_are_there_are_taken(config, trackers):
    assert config(report_to=trackers).report_to == []


@pytest.mark.parametrize(("options", "named"), [
    ({"adam_beta1": 1.0}, "adam_beta1 must be finite and >= 0 and < 1, got 1.0"),
    ({"adam_beta2": -0.1}, "adam_beta2 must be finite and >= 0 and < 1, got -0.1"),
    ({"warmup_steps": NAN}, "warmup_steps must be finite and >= 0, got nan"),
    ({"warmup_steps": 1.5}, "warmup_steps must be whole, or below 1 for a share, got 1.5"),
    ({"eval_steps": 0}, "eval_steps must be finite and > 0, got 0"),
    ({"save_total_limit": 0}, "save_total_limit must be finite and >= 1, got 0"),
    ({"report_to": "graphs"}, "report_to names 'graphs', which is unknown or not installed: pip"),
    ({"report_to": ["none", "graphs"]}, "report_to names 'graphs'"),
    ({"log_level": "loud"}, "log_level must be one of detail, debug, info"),
    ({"lr_scheduler_kwargs": {"cycles": 2}}, "lr_scheduler_kwargs do not go with lr_scheduler_type=linear: .*'cycles'"),
    ({"generation_kwargs": {"repetition_penalty": -1.0}}, "repetition_penalty must be finite and > 0, got -1.0"),
    ({"generation_kwargs": {"min_p": 1.5}}, "min_p must be finite and >= 0 and <= 1, got 1.5"),
])  # fmt: skip
def test_what_the_trainer_takes_as_it_comes_is_refused_with_the_value(config, options, named):
    with pytest.raises(ValueError, match=named):
        config(**options)


@pytest.mark.parametrize("name", CHOICES)
def test_an_unknown_choice_lists_the_known_ones(config, name):
    known = {
        "kl_estimator": "k1, k2, k3, exact",
        "kl_direction": "reverse, forward",
        "kl_placement": "reward, loss, both",
        "kl_controller": "fixed, adaptive, pi, target, scheduled, scheduled_cosine",
        "kl_shard_vocab": "auto, tp, dp, none",
    }[name]
    with pytest.raises(ValueError, match=f"{name} must be one of {known}, got 'backward'"):
        config(**{name: "backward"})


def test_all_problems_are_told_at_once(config):
    with pytest.raises(
        ValueError, match=r"kl_coef.*; .*top_p.*; .*whiten_rewards|top_p.*; .*kl_coef.*; .*whiten_rewards"
    ):
        config(kl_coef=-1, top_p=3, whiten_rewards="yes")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("kl_coef", 0),
        ("kl_coef", 0.0),
        ("kl_coef", 1),
        ("temperature", 2),
        ("top_p", 1),
        ("top_k", 50),
        ("gamma", 0),
        ("lam", 1),
        ("vf_coef", 0),
        ("missing_eos_penalty", 0),
        ("num_completions_to_print", 0),
        ("max_prompt_length", 1),
        ("reward_weights", [1, -0.5]),
        ("generation_kwargs", {"repetition_penalty": 1.1}),
        ("generation_kwargs", '{"repetition_penalty": 1.1}'),
        ("dual_clip", 3),
        ("warmup_steps", 0.1),
        ("warmup_steps", 20),
        ("adam_beta1", 0),
        ("eval_steps", 0.25),
        ("save_total_limit", None),
        ("lr_scheduler_kwargs", {"last_epoch": -1}),
        ("generation_kwargs", {"min_p": None}),
    ],
)
def test_allowed(config, name, value):
    assert getattr(config(**{name: value}), name) == value


@pytest.mark.parametrize("weights", [[1, 2], [0.5], [-1.0, 0.0]])
def test_reward_weights_are_taken(config, weights):
    assert config(reward_weights=weights).reward_weights == weights


# --- contradictions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"kl_controller": "adaptive"}, "'adaptive' needs kl_target"),
        ({"kl_controller": "pi"}, "'pi' needs kl_target"),
        ({"kl_controller": "target"}, "'target' needs kl_target"),
        ({"kl_controller": "adaptive", "kl_target": 6.0, "kl_coef": 0.0}, "kl_coef=0 would stay 0"),
        ({"kl_target": 6.0}, "kl_target would be ignored"),
        ({"kl_horizon": 500}, "kl_horizon would be ignored"),
        ({"kl_controller": "scheduled"}, "'scheduled' needs kl_coef_end"),
        ({"kl_controller": "scheduled_cosine"}, "'scheduled_cosine' needs kl_coef_end"),
        ({"kl_controller": "scheduled", "kl_coef_end": 0.0, "kl_target": 6.0}, "kl_target would be ignored"),
        ({"kl_coef_end": 0.0}, "kl_coef_end would be ignored with kl_controller='fixed'; say 'scheduled'"),
        ({"kl_controller": "pi", "kl_target": 6.0, "kl_coef_end": 0.1}, "kl_coef_end would be ignored"),
        ({"kl_controller": "pi", "kl_target": 6.0, "kl_horizon": 500}, "kl_horizon would be ignored"),
        ({"total_episodes": 8, "max_steps": 3}, "total_episodes and max_steps"),
        ({"logging_nan_inf_filter": True}, "logging_nan_inf_filter must be False"),
        ({"dataloader_num_workers": 2}, "dataloader_num_workers must be 0"),
        ({"kl_estimator": "k1", "kl_placement": "loss"}, "k1"),
        ({"kl_estimator": "k1", "kl_placement": "both"}, "k1"),
        ({"kl_estimator": "k2", "kl_placement": "both"}, "k2"),
        ({"kl_estimator": "k2", "kl_direction": "forward", "kl_placement": "loss"}, "k2"),
    ],
)
def test_contradictions_are_refused(config, options, named):
    with pytest.raises(ValueError, match=named):
        config(**options)


# --- derived sizes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("episodes", "batch", "accumulation", "mini", "epochs", "rollout", "steps"),
    [
        (24, 2, 3, 2, 4, 12, 2 * 8),
        (25, 2, 3, 2, 4, 12, 3 * 8),  # the last rollout is a whole one
        (1, 4, 1, 1, 1, 4, 1),
        (1000, 8, 1, 4, 2, 32, 32 * 8),  # 1000 / 32 = 31.25
        (64, 8, 2, 1, 4, 16, 4 * 4),  # accumulation makes rollouts larger, not steps more
    ],
)
def test_total_episodes_sets_max_steps(config, episodes, batch, accumulation, mini, epochs, rollout, steps):
    made = config(
        total_episodes=episodes,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        num_mini_batches=mini,
        num_ppo_epochs=epochs,
    )
    assert made.world_size == 1
    assert made.rollout_batch_size == made.episodes_per_rollout == rollout
    assert made.steps_per_rollout == epochs * mini
    assert made.max_steps == steps


def test_without_total_episodes_max_steps_is_the_users(config):
    assert config().max_steps == -1
    assert config(max_steps=7).max_steps == 7


def test_controllers(config):
    assert isinstance(config(kl_coef=0.3).controller(), FixedKL)
    assert config(kl_coef=0.3).controller().coef == 0.3
    adaptive = config(kl_controller="adaptive", kl_coef=0.3, kl_target=5.0, kl_horizon=700).controller()
    assert isinstance(adaptive, AdaptiveKL)
    assert (adaptive.coef, adaptive.target, adaptive.horizon) == (0.3, 5.0, 700)
    for name, shape in (("scheduled", "linear"), ("scheduled_cosine", "cosine")):
        made = config(kl_controller=name, kl_coef=0.0, kl_coef_end=0.2, kl_horizon=70).controller()
        assert isinstance(made, ScheduledKL)
        assert (made.coef, made.start, made.end, made.episodes, made.shape) == (0.0, 0.0, 0.2, 70, shape)
    assert config(kl_controller="scheduled", kl_coef_end=0).controller().episodes == 10000
    for name, kind_ in (("pi", PIController), ("target", TargetKL)):
        made = config(kl_controller=name, kl_coef=0.3, kl_target=5.0).controller()
        assert isinstance(made, kind_)
        assert (made.coef, made.target) == (0.3, 5.0)


def test_a_controller_is_a_new_one_each_time(config):
    made = config(kl_controller="target", kl_target=5.0)
    first, second = made.controller(), made.controller()
    first.update(100.0, 1)
    assert second.coef == made.kl_coef


# --- YAML and the command line ---------------------------------------------------------------------------------------


def parse(tmp_path, text, *arguments):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    arguments = ["--config", str(path), "--output_dir", str(tmp_path / "out"), *arguments]
    return TrlParser((ScriptArguments, PPOConfig)).parse_args_and_config(args=arguments)[1]


YAML = """
dataset_name: none
report_to: none
kl_coef: 0.1
kl_estimator: exact
kl_placement: both
learning_rate: 1e-5
lam: 1
num_ppo_epochs: 2
total_episodes: 100
per_device_train_batch_size: 4
whiten_rewards: true
disable_dropout: false
max_prompt_length: 32
missing_eos_penalty: 1.0
reward_weights: [1.0, 0.5]
generation_kwargs: {repetition_penalty: 1.2}
"""


def test_a_yaml_file(tmp_path):
    made = parse(tmp_path, YAML)
    assert (made.kl_coef, made.kl_estimator, made.kl_placement) == (0.1, "exact", "both")
    assert made.learning_rate == 1e-5
    assert made.lam == 1
    assert (made.whiten_rewards, made.disable_dropout) == (True, False)
    assert (made.max_prompt_length, made.missing_eos_penalty) == (32, 1.0)
    assert made.reward_weights == [1.0, 0.5]
    assert made.generation_kwargs == {"repetition_penalty": 1.2}
    assert made.max_steps == math.ceil(100 / 4) * 2


def test_the_command_line_overrides_the_file(tmp_path):
    made = parse(
        tmp_path, YAML, "--kl_coef", "0.3", "--max_completion_length", "9", "--whiten_rewards", "false",
        "--reward_weights", "2", "3", "--generation_kwargs", json.dumps({"min_new_tokens": 2}),
    )  # fmt: skip
    assert (made.kl_coef, made.max_completion_length, made.whiten_rewards) == (0.3, 9, False)
    assert made.reward_weights == [2.0, 3.0]
    kwargs = made.generation_kwargs
    assert (json.loads(kwargs) if isinstance(kwargs, str) else kwargs) == {"min_new_tokens": 2}
    assert made.kl_estimator == "exact"


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("kl_coef: .nan", "kl_coef"),
        ("kl_coef: null", "kl_coef"),
        ("kl_coef: -0.1", "kl_coef"),
        ("kl_coef: [0.1]", "kl_coef"),
        ("num_ppo_epochs: 1.5", "num_ppo_epochs"),
        ("kl_estimator: k4", "kl_estimator"),
        ("kl_direction: null", "kl_direction"),
        ("whiten_rewards: 3", "whiten_rewards"),
        ("reward_weights: 1.0", "reward_weights"),
        ("generation_kwargs: [1]", "generation_kwargs"),
        ("klcoef: 0.1", "klcoef"),
    ],
)
def test_what_a_yaml_file_may_not_say(tmp_path, line, named):
    with pytest.raises(ValueError, match=named):
        parse(tmp_path, f"dataset_name: none\nreport_to: none\n{line}\n")


def test_a_bad_value_on_the_command_line(tmp_path):
    with pytest.raises(ValueError, match="top_p"):
        parse(tmp_path, YAML, "--top_p", "1.5")


# --- sampling --------------------------------------------------------------------------------------------------------


def test_generation_config(config):
    made = config(temperature=0.7, top_p=0.9, top_k=5, max_completion_length=11, generation_kwargs={"min_p": 0.1})
    generation = made.generation_config([2, 5], 0)
    assert generation.do_sample is True
    assert (generation.temperature, generation.top_p, generation.top_k, generation.min_p) == (0.7, 0.9, 5, 0.1)
    assert (generation.max_new_tokens, generation.eos_token_id, generation.pad_token_id) == (11, [2, 5], 0)
    assert config(generation_kwargs='{"min_p": 0.2}').generation_config([2], 0).min_p == 0.2
    plain = config().generation_config([2], 0)
    assert (plain.temperature, plain.top_p, plain.top_k) == (1.0, 1.0, 0)


# --- the Trainer's own that PPO would ignore ------------------------------------------------------------------------

IGNORED = {
    "label_smoothing_factor": 0.1, "label_names": ["labels"], "include_for_metrics": ["loss"],
    "batch_eval_metrics": True, "eval_do_concat_batches": False, "eval_use_gather_object": True,
    "eval_accumulation_steps": 2, "prediction_loss_only": True, "include_num_input_tokens_seen": "all",
    "auto_find_batch_size": True, "length_column_name": "n", "dataloader_persistent_workers": True,
    "dataloader_multiprocessing_context": "spawn", "train_sampling_strategy": "group_by_length",
}  # fmt: skip


@pytest.mark.parametrize(("name", "value"), IGNORED.items())
def test_an_option_of_the_trainer_that_ppo_ignores_is_refused(config, name, value):
    with pytest.raises(ValueError, match=rf"\b{name}\b") as caught:
        config(**{name: value})
    assert "\n" not in str(caught.value)


def test_completions_that_no_log_shows_are_refused(config):
    with pytest.raises(ValueError, match="log_completions would be ignored"):
        config(log_completions=True, logging_strategy="no")


def test_a_config_made_of_anothers_fields_is_taken(config):
    first = config()
    same = {f.name: getattr(first, f.name) for f in dataclasses.fields(first) if f.init and f.name in IGNORED}
    config(**same)
    config(include_num_input_tokens_seen=False, include_for_metrics=None)


@pytest.mark.parametrize(
    ("given", "sides"),
    [
        ({}, (0.2, 0.2)),
        ({"cliprange_low": 0.1}, (0.1, 0.2)),
        ({"cliprange_high": 0.3}, (0.2, 0.3)),
        ({"cliprange": 0.4, "cliprange_low": 0.1, "cliprange_high": 0.3}, (0.1, 0.3)),
    ],
)
def test_the_sides_of_the_clip(tmp_path, given, sides):
    assert PPOConfig(output_dir=str(tmp_path), use_cpu=True, **given).clip_sides == sides


def test_the_trainer_clips_to_both_sides(tmp_path, monkeypatch):
    from klft.ppo import trainer

    seen = set()
    plain = trainer.policy_losses
    spy = lambda log_ratio, advantages, low, dual, high: (
        seen.add((low, high)) or plain(log_ratio, advantages, low, dual, high)
    )
    monkeypatch.setattr(trainer, "policy_losses", spy)
    tiny.trainer(tmp_path, max_steps=1, cliprange_low=0.1, cliprange_high=0.3).train()
    assert seen == {(0.1, 0.3)}
