"""What KLReward refuses, each by name and before the first step."""

import copy
from types import SimpleNamespace

import pytest
from support import rloo, tiny
from transformers import ProcessorMixin
from trl import GRPOTrainer

from klft import AdaptiveKL
from klft.integrations import KLReward


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return rloo.saved(tmp_path_factory.mktemp("reference"))


class Pictures(ProcessorMixin):
    def __init__(self):
        pass


def unscaled(**changed):
    return {"kind": GRPOTrainer, "scale_rewards": "none"} | changed


# name -> (settings of the trainer, attributes it is given afterwards, message)
TRAINERS = {
    "KL twice": ({"beta": 0.1}, {}, "beta=0.1 counts the KL a second time"),
    "KL twice in GRPO": (unscaled(beta=0.1), {}, "beta=0.1 counts the KL a second time"),
    "scaled by its group": (unscaled(scale_rewards="group"), {}, "scale_rewards='group' divides by a"),
    "scaled by default": ({"kind": GRPOTrainer}, {}, "scale_rewards='group' divides by a"),
    "scaled by true": (unscaled(scale_rewards=True), {}, "scale_rewards='group' divides by a"),
    "scaled by the batch": (unscaled(scale_rewards="batch"), {}, "scale_rewards='batch' divides by a"),
    "normalised alone": (
        unscaled(multi_objective_aggregation="normalize_then_sum"), {}, "aggregation='normalize_then_sum' divides by",
    ),
    "weighted": ({"reward_weights": [1.0, 0.5]}, {}, "its reward weight is 0.5, which scales the coefficient"),
    "clipped": ({"reward_clip_range": (-1.0, 1.0)}, {}, r"reward_clip_range=\(-1.0, 1.0\) would clip the KL too"),
    "tools": (unscaled(), {"tools": [print]}, "tools, an environment_factory or a rollout"),
    "environments": (unscaled(), {"environment_factories": {None: dict}}, "tools, an environment_factory"),
    "own rollouts": (unscaled(), {"rollout_func": print}, "tools, an environment_factory or a rollout"),
    "images": ({}, {"processing_class": Pictures()}, "not given the images that Pictures may bring"),
}  # fmt: skip


@pytest.mark.parametrize("name", TRAINERS)
def test_trainer_is_refused(name, path, tmp_path):
    settings, attributes, message = TRAINERS[name]
    kl = KLReward(rloo.reference(path))
    run = rloo.trainer(tmp_path, rloo.policy(path), [tiny.mixed, kl], **settings)
    for attribute, value in attributes.items():
        setattr(run, attribute, value)
    with pytest.raises(ValueError, match=f"KLReward.bind: .*{message}"):
        kl.bind(run)
    with pytest.raises(ValueError, match="not bound to a trainer"):
        kl(prompts=["w3"], completions=[""], completion_ids=[[4]])


def test_a_policy_that_is_split_is_refused(path, tmp_path, monkeypatch):
    kl = KLReward(rloo.reference(path))
    run = rloo.trainer(tmp_path, rloo.policy(path), [kl])
    monkeypatch.setattr(run, "get_tp_size", lambda: 2)
    with pytest.raises(ValueError, match="tensor parallelism splits the policy"):
        kl.bind(run)


def test_trainer_without_it_is_refused(path, tmp_path):
    run = rloo.trainer(tmp_path, rloo.policy(path), [tiny.mixed, KLReward(rloo.reference(path))])
    with pytest.raises(ValueError, match="the trainer does not have it"):
        KLReward(rloo.reference(path)).bind(run)


def test_another_kind_of_trainer_is_refused(path, tmp_path):
    with pytest.raises(TypeError, match="expected an RLOOTrainer or a GRPOTrainer of TRL, got PPOTrainer"):
        KLReward(rloo.reference(path)).bind(tiny.trainer(tmp_path))
    with pytest.raises(TypeError, match="got SimpleNamespace"):
        KLReward(rloo.reference(path)).bind(SimpleNamespace())


def test_call_before_bind_is_refused(path, tmp_path):
    run = rloo.trainer(tmp_path, rloo.policy(path), [KLReward(rloo.reference(path))])
    with pytest.raises(ValueError, match=r"not bound to a trainer; call kl.bind\(trainer\) before trainer.train\(\)"):
        run.train()


def test_second_trainer_is_refused_and_the_same_one_again_is_not(path, tmp_path):
    kl = KLReward(rloo.reference(path))
    first, second = (rloo.trainer(tmp_path, rloo.policy(path), [kl]) for _ in range(2))
    kl.bind(first)
    callbacks = len(first.callback_handler.callbacks)
    kl.bind(first)
    assert len(first.callback_handler.callbacks) == callbacks
    with pytest.raises(ValueError, match="bound to another trainer"):
        kl.bind(second)


def test_reference_that_is_the_policy_is_refused_and_not_frozen(path, tmp_path):
    policy = rloo.policy(path)
    kl = KLReward(policy)
    with pytest.raises(ValueError, match="the reference is the policy itself"):
        kl.bind(rloo.trainer(tmp_path, policy, [kl]))
    sharing = copy.deepcopy(policy)
    sharing.lm_head.weight = policy.lm_head.weight
    kl = KLReward(sharing)
    with pytest.raises(ValueError, match="shares the policy's memory"):
        kl.bind(rloo.trainer(tmp_path, policy, [kl]))
    assert all(p.requires_grad for p in policy.parameters())


def test_reference_of_another_vocabulary_is_refused(path, tmp_path):
    kl = KLReward(tiny.llama(vocab_size=20))
    with pytest.raises(ValueError, match="the reference's head has 20 rows, but the tokenizer has 32 ids"):
        kl.bind(rloo.trainer(tmp_path, rloo.policy(path), [kl]))


def test_reference_whose_ids_mean_other_words_is_refused(path, tmp_path):
    kl = KLReward(tiny.with_other_ids(tmp_path / "reference"))
    with pytest.raises(ValueError, match="policy and reference differ in 2 ids: 8 is 'w5' and 'w6'"):
        kl.bind(rloo.trainer(tmp_path, rloo.policy(path), [kl]))


def test_reference_with_too_few_positions_is_refused(path, tmp_path):
    kl = KLReward(tiny.llama(max_position_embeddings=4))
    kl.bind(rloo.trainer(tmp_path, rloo.policy(path), [kl]))
    with pytest.raises(ValueError, match="texts have up to 5 tokens, the reference 4 positions"):
        kl(prompts=["w3 w9"], completions=[""], completion_ids=[[4, 5, 6]])


def test_no_reference_and_no_adapter_is_refused(path, tmp_path):
    kl = KLReward()
    with pytest.raises(ValueError, match="there is no reference, and LlamaForCausalLM has no PEFT adapter"):
        kl.bind(rloo.trainer(tmp_path, rloo.policy(path), [kl]))


@pytest.mark.parametrize("estimator", ["k2", "k3", "K1"])
def test_estimator_with_another_gradient_is_refused(estimator):
    with pytest.raises(ValueError, match=f"estimator='{estimator}' in a reward has not the gradient of the KL"):
        KLReward(tiny.apart(), estimator=estimator)


def test_forward_k1_is_warned_of(path, tmp_path):
    kl = KLReward(rloo.reference(path), direction="forward")
    run = rloo.trainer(tmp_path, rloo.policy(path), [kl])
    with pytest.warns(UserWarning, match="forward k1 in the reward: its expected gradient is not that of the forward"):
        kl.bind(run)


@pytest.mark.parametrize(
    ("coef", "error", "message"),
    [(-0.1, ValueError, "finite number >= 0, got -0.1"), (AdaptiveKL, TypeError, "the class AdaptiveKL"),
     ("0.1", TypeError, "must be a klft controller")],
)  # fmt: skip
def test_coefficient_that_is_none_is_refused(coef, error, message):
    with pytest.raises(error, match=message):
        KLReward(tiny.apart(), coef=coef)
