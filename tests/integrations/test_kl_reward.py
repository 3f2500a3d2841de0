"""KLReward in TRL's trainers: what RLOO's own beta does, on the tokens that were sampled, learnt and logged once."""

import copy

import pytest
import torch
from support import rloo, tiny
from trl import GRPOTrainer

from klft import AdaptiveKL, FixedKL, FrozenReference
from klft.integrations import KLReward

COEF = 0.3


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return rloo.saved(tmp_path_factory.mktemp("reference"))


def with_kl(folder, path, kl, model=None, rewards=(tiny.mixed,), **changed):
    """A trainer with that reward function, bound."""
    run = rloo.trainer(folder, model or rloo.policy(path), [*rewards, kl], **changed)
    kl.bind(run)
    return run


def trained(run):
    """A trainer seeds what it samples when it is made: train it before another one is."""
    run.train()
    return run


def sequence_kl(model, reference, prompt, completion, temperature, estimator="k1", direction="reverse"):
    """By the definition, of one text without padding."""
    ids = torch.tensor([prompt + completion])
    with torch.no_grad():
        p, q = ((m(ids).logits[0, len(prompt) - 1 : -1] / temperature).log_softmax(-1) for m in (model, reference))
    if direction == "forward":
        p, q = q, p
    if estimator == "exact":
        return float((p.exp() * (p - q)).sum())
    return float((p - q).gather(-1, ids[0, len(prompt) :, None]).sum())


# ---- the law --------------------------------------------------------------------------------------------------------

CASES = {
    "plain": {},
    "two iterations": {"num_iterations": 2},
    "four generations, cool": {"num_generations": 4, "temperature": 0.6},
    "two generations, hot, accumulated": {"temperature": 1.7, "gradient_accumulation_steps": 2},
    "normalised": {"normalize_advantages": True},
    "truncated": {"mask_truncated_completions": True},
    "two rollouts of two steps": {"steps_per_generation": 2, "num_iterations": 2},
    "adapter": {"given": {"peft_config": tiny.lora()}, "learning_rate": 1.0},
    "adamw": {"optim": "adamw_torch", "learning_rate": 1e-3},
    "conversations": {"conversational": True},
}


def conversations(prompts):
    return prompts.map(lambda row: {"prompt": [{"role": "user", "content": row["prompt"]}]})


SLOW = set(CASES) - {"plain", "four generations, cool", "adapter"}


@pytest.mark.parametrize("case", [pytest.param(c, marks=pytest.mark.slow) if c in SLOW else c for c in CASES])
def test_kl_reward_is_beta(case, path, tmp_path):
    """RLOOTrainer(beta=0, [r, KLReward(b)]) trains what RLOOTrainer(beta=b, [r]) trains."""
    changed = dict(CASES[case])
    data, held_out = tiny.prompts(), tiny.prompts(5)
    given = changed.pop("given", {})
    if changed.pop("conversational", False):
        data, held_out = conversations(data), conversations(held_out)
        given["processing_class"] = tiny.tokenizer(chat=True)
    given["eval_dataset"] = held_out
    # The adapter's reference is the policy's base for beta too.
    reference = None if "peft_config" in given else rloo.reference(path)
    changed |= {"data": data, "given": given}

    beta = trained(rloo.trainer(tmp_path, rloo.policy(path), [tiny.mixed], beta=COEF, **changed))
    without = trained(rloo.trainer(tmp_path, rloo.policy(path), [tiny.mixed], **changed))
    ours = trained(with_kl(tmp_path, path, KLReward(reference, coef=COEF), **changed))
    assert rloo.largest_difference(ours.model, beta.model) < 1e-5
    assert rloo.largest_difference(without.model, beta.model) > 1e-3, "beta does something"
    # beta logs the same KL, mean over tokens; in evaluation too.
    random = torch.get_rng_state()
    for run in (beta, ours):
        torch.set_rng_state(random)
        run.evaluate()
    for prefix in ("", "eval_"):
        theirs, own = (
            [log[prefix + key] for log in run.state.log_history if prefix + key in log]
            for run, key in ((beta, "kl"), (ours, "kl/k1/mean"))
        )
        assert own == pytest.approx(theirs, rel=1e-4, abs=1e-6)
        assert max(map(abs, own)) > 1e-3


def test_the_case_truncated_has_both_kinds(path, tmp_path):
    run = trained(with_kl(tmp_path, path, KLReward(rloo.reference(path), coef=COEF)))
    truncated = [log["completions/clipped_ratio"] for log in run.state.log_history if "loss" in log]
    assert 0.1 < sum(truncated) / len(truncated) < 0.9


def by_hand(model, reference, temperature):
    """KLReward(k1) as a user would write it, one text after the other, from plain logits."""

    def kl(prompts, completion_ids, **_):
        prompt_ids = [tiny.tokenizer()(prompt)["input_ids"] for prompt in prompts]
        texts = zip(prompt_ids, completion_ids, strict=True)
        return [-COEF * sequence_kl(model, reference, *text, temperature) for text in texts]

    return kl


@pytest.mark.parametrize(
    "loss_type", [pytest.param("grpo", marks=pytest.mark.slow), "dapo", pytest.param("dr_grpo", marks=pytest.mark.slow)]
)
def test_grpo_with_unscaled_rewards_trains_on_reward_minus_kl(loss_type, path, tmp_path):
    changed = {"kind": GRPOTrainer, "scale_rewards": "none", "loss_type": loss_type, "temperature": 0.8}
    ours = trained(with_kl(tmp_path, path, KLReward(rloo.reference(path), coef=COEF), **changed))
    model = rloo.policy(path)
    kl = by_hand(model, rloo.reference(path), temperature=0.8)
    hand = trained(rloo.trainer(tmp_path, model, [tiny.mixed, kl], **changed))
    without = trained(rloo.trainer(tmp_path, rloo.policy(path), [tiny.mixed], **changed))
    assert rloo.largest_difference(ours.model, hand.model) < 1e-5
    assert rloo.largest_difference(ours.model, without.model) > 1e-3


def test_expected_gradient_is_the_kls(path, tmp_path):
    """Over all completions of two tokens, in fp64. exact in the reward has one half of it, its loss the other."""
    model, reference = tiny.gpt2(dropout=0.0).double(), tiny.gpt2(5, dropout=0.0).double()  # no fp32 norms inside
    prompt = tiny.tokenizer()("w3 w9")["input_ids"]
    every = torch.cartesian_prod(*[torch.arange(tiny.VOCABULARY)] * 2)
    ids = torch.cat([torch.tensor([prompt] * len(every)), every], 1)

    def logits(which):
        return which(ids).logits[:, 1:3].log_softmax(-1)

    policy_logp, ref_logp = logits(model), logits(reference).detach()
    logp = policy_logp.gather(-1, every[..., None]).sum((1, 2))
    exact = (policy_logp.exp() * (policy_logp - ref_logp)).sum(-1).sum(-1)
    weights = [p for p in model.parameters() if p.requires_grad]

    def gradient(value):
        return torch.cat([g.flatten() for g in torch.autograd.grad(value, weights, retain_graph=True)])

    kl = gradient((logp.exp() * exact).sum())
    assert kl.abs().max() > 0.1
    # The detached half is what a score function sees; the other is the mean of the exact KL's own gradients.
    own = gradient((logp.detach().exp() * exact).sum())
    arguments = {"prompts": ["w3 w9"] * len(every), "completions": [""] * len(every), "completion_ids": every.tolist()}
    for make, expected in ((KLReward, kl), (exact_reward, kl - own)):
        reward = make(reference, coef=COEF)
        with_kl(tmp_path, path, reward, model=model, per_device_train_batch_size=256, max_completion_length=2)
        surrogate = (logp.exp() * torch.tensor(reward(**arguments), dtype=torch.float64)).sum()
        torch.testing.assert_close(gradient(surrogate), -COEF * expected, rtol=1e-6, atol=1e-9)
    assert own.abs().max() > 0.1


def exact_reward(reference, **changed):
    with pytest.warns(UserWarning, match="KLReward: estimator='exact' in a reward alone has half the gradient"):
        return KLReward(reference, estimator="exact", **changed)


# ---- which tokens ---------------------------------------------------------------------------------------------------


class Sampled:
    """What the model generated from and what came of it: at the source, not as the trainer tells it."""

    def __init__(self, model):
        self.texts, self.generate = [], model.generate
        model.generate = self

    def __call__(self, input_ids, attention_mask, **more):
        out = self.generate(input_ids=input_ids, attention_mask=attention_mask, **more)
        for row, mask in zip(out.tolist(), attention_mask, strict=True):
            prompt, completion = row[: len(mask)][len(mask) - int(mask.sum()) :], row[len(mask) :]
            ends = [i for i, token in enumerate(completion) if token in rloo.ENDS]
            self.texts.append((prompt, completion[: ends[0] + 1] if ends else completion))
        return out


LOUD = tiny.CHAT_TEMPLATE + "{% if loud %} w7{% endif %}"


@pytest.mark.parametrize("kind", ["text", "bos", "chat", "chat with arguments"])
@pytest.mark.parametrize("trains", ["RLOO", "GRPO"])
def test_tokens_are_those_the_trainer_sampled(kind, trains, path, tmp_path):
    tokenizer = tiny.tokenizer(adds_bos=kind == "bos", chat=kind.startswith("chat"))
    changed = {"kind": GRPOTrainer, "scale_rewards": "none"} if trains == "GRPO" else {}
    data = tiny.prompts()
    if kind.startswith("chat"):
        data = conversations(data)
    if kind == "chat with arguments":
        tokenizer.chat_template = LOUD
        changed["chat_template_kwargs"] = {"loud": True}
    model, reference = rloo.policy(path), rloo.reference(path)
    before = copy.deepcopy(model).eval()
    sampled = Sampled(model)
    run = with_kl(
        tmp_path, path, KLReward(reference, coef=COEF), model=model, data=data, max_steps=1, temperature=0.7,
        given={"processing_class": tokenizer}, **changed,
    )  # fmt: skip
    run.train()
    assert len({len(prompt) for prompt, _ in sampled.texts}) > 1, "some are padded"
    assert len({len(completion) for _, completion in sampled.texts}) > 1
    if kind == "chat with arguments":
        assert all(prompt[-1] == tokenizer.convert_tokens_to_ids("w7") for prompt, _ in sampled.texts)
    kls = [sequence_kl(before, reference, *text, 0.7) for text in sampled.texts]
    (log,) = (log for log in run.state.log_history if "loss" in log)
    assert log["rewards/KLReward/mean"] == pytest.approx(-COEF * sum(kls) / len(kls), rel=1e-4)
    exact = [sequence_kl(before, reference, *text, 0.7, "exact") for text in sampled.texts]
    assert log["kl/sequence/reverse/mean"] == pytest.approx(sum(exact) / len(exact), rel=1e-4)
    assert log["kl/k1/mean"] == pytest.approx(sum(kls) / sum(len(c) for _, c in sampled.texts), rel=1e-4)
    assert log["kl/coef"] == pytest.approx(COEF)


PROMPTS = ["w3 w9", "w3", "w1 w2 w4 w5"]
COMPLETIONS = [[5, 6, 7], [9, 9, 10, 11, 3], [2]]


def called(kl, completions=COMPLETIONS):
    return kl(prompts=PROMPTS, completions=["", "", ""], completion_ids=completions)


@pytest.mark.parametrize(("estimator", "direction"), [("k1", "reverse"), ("exact", "reverse"), ("exact", "forward")])
def test_reward_is_minus_coef_times_the_summed_kl(estimator, direction, path, tmp_path):
    model, reference = rloo.policy(path), rloo.reference(path)
    make = KLReward if estimator == "k1" else exact_reward
    kl = make(reference, coef=COEF, direction=direction)
    with_kl(tmp_path, path, kl, model=model, temperature=0.7)
    prompts = [tiny.tokenizer()(prompt)["input_ids"] for prompt in PROMPTS]
    expected = [
        -COEF * sequence_kl(model, reference, p, c, 0.7, estimator, direction)
        for p, c in zip(prompts, COMPLETIONS, strict=True)
    ]
    assert called(kl) == pytest.approx(expected, rel=1e-4)


def test_token_rule_sees_whole_texts_and_weighs_their_kl(path, tmp_path):
    model, reference = rloo.policy(path), rloo.reference(path)
    seen = []

    def first_only(token_ids, mask, scores):
        seen.append((token_ids, mask))
        return (mask & ~mask.roll(1, 1)).float()

    kl = KLReward(reference, coef=1.0, token_rule=first_only)
    with_kl(tmp_path, path, kl, model=model)
    prompts = [tiny.tokenizer()(prompt)["input_ids"] for prompt in PROMPTS]
    expected = [
        -sequence_kl(model, reference, p, c[:1], 1.0) for p, c in zip(prompts, COMPLETIONS, strict=True)
    ]  # fmt: skip
    assert called(kl) == pytest.approx(expected, rel=1e-4)
    ((ids, mask),) = seen
    assert [row[real].tolist() for row, real in zip(ids, mask, strict=True)] == COMPLETIONS


@pytest.mark.parametrize("ended", [[False, False, False], [True, True, True], [True, False, True]])
def test_truncated_completions_have_no_kl_where_they_are_masked(ended, path, tmp_path):
    kl, masking = KLReward(rloo.reference(path), coef=COEF), KLReward(rloo.reference(path), coef=COEF)
    with_kl(tmp_path, path, kl)
    with_kl(tmp_path, path, masking, mask_truncated_completions=True)
    last = [rloo.ENDS[1] if end else 5 for end in ended]
    completions = [[*ids, token] for ids, token in zip(COMPLETIONS, last, strict=True)]
    expected = [reward * end for reward, end in zip(called(kl, completions), ended, strict=True)]
    assert called(masking, completions) == pytest.approx(expected, rel=1e-5)


# ---- how it is scored -----------------------------------------------------------------------------------------------


def test_scored_in_eval_mode_and_modes_come_back(path, tmp_path):
    """With dropout in the policy the reward is that without, and the same each time."""
    noisy = rloo.policy(path, attention_dropout=0.5)
    kl, calm = KLReward(rloo.reference(path), coef=COEF), KLReward(rloo.reference(path), coef=COEF)
    with_kl(tmp_path, path, kl, model=noisy)
    with_kl(tmp_path, path, calm)
    noisy.train()
    noisy.model.layers[0].eval()
    modes = [module.training for module in noisy.modules()]
    random = torch.get_rng_state()
    assert torch.is_grad_enabled()
    assert called(kl) == pytest.approx(called(calm), rel=1e-5)
    assert called(kl) == called(kl)
    assert [module.training for module in noisy.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None for p in noisy.parameters())


def test_scored_in_the_precision_that_the_trainer_computes_in(path, tmp_path):
    full, half = KLReward(rloo.reference(path), coef=COEF), KLReward(rloo.reference(path), coef=COEF)
    with_kl(tmp_path, path, full)
    with_kl(tmp_path, path, half, bf16=True)
    assert called(half) == pytest.approx(called(full), abs=0.03)
    assert called(half) != pytest.approx(called(full), abs=1e-4)


class Shown(FixedKL):
    """A constant that remembers what it was shown."""

    def __init__(self):
        super().__init__(COEF)
        self.updates = []

    def update(self, sequence_kl, episodes):
        self.updates.append((sequence_kl, episodes))
        return super().update(sequence_kl, episodes)


def test_controller_learns_once_per_training_rollout_and_not_in_evaluation(path, tmp_path):
    shown = Shown()
    changed = {"num_iterations": 2, "eval_strategy": "steps", "eval_steps": 1}
    kl = KLReward(rloo.reference(path), coef=shown)
    run = trained(with_kl(tmp_path, path, kl, given={"eval_dataset": tiny.prompts(4)}, **changed))
    assert len(shown.updates) == 2, "two rollouts in four steps"
    assert [episodes for _, episodes in shown.updates] == [4, 4]
    logs = [log for log in run.state.log_history if "loss" in log]
    assert shown.updates[0][0] == pytest.approx(logs[0]["kl/sequence/reverse/mean"], rel=1e-5)
    evaluated = [log for log in run.state.log_history if "eval_loss" in log]
    assert len(evaluated) == 4
    assert all({"eval_kl/sequence/reverse/mean", "eval_kl/k1/mean", "eval_kl/coef"} <= log.keys() for log in evaluated)


def test_coefficient_moves_after_its_rollout(path, tmp_path):
    run = with_kl(tmp_path, path, KLReward(rloo.reference(path), coef=AdaptiveKL(0.1, target=0.5, horizon=40)))
    run.train()
    logs = [log["kl/coef"] for log in run.state.log_history if "loss" in log]
    assert logs == pytest.approx([0.1 * (1 + 0.2 * 4 / 40) ** step for step in range(4)])


def test_reference_is_told_of_each_step(path, tmp_path):
    told = []

    class Told(FrozenReference):
        def after_step(self, policy):
            told.append(policy)

    run = trained(with_kl(tmp_path, path, KLReward(Told(rloo.reference(path)))))
    assert told == [run.model] * 4
