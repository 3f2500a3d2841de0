"""Token rules in PPO: every number a rule has a part in, against a dense float64 computation; weight 1 as no rule."""

import json
import math

import jaxtyping
import pytest
import torch
from support import tiny
from support.penalties import SILENT as FORMS

from klft.diagnostics import read_records
from klft.penalty import effective_placement
from klft.token_rules import along_ref_entropy, burn_in, by_ids, combine, constant, decay

COEF = 0.3
RULE = combine(burn_in(1), by_ids({tiny.EOS: 0.0, **dict.fromkeys(range(3, 17), 0.25)}), along_ref_entropy(1.0, 4.0))


def weigh(token_ids, ref_entropy):
    """RULE, for the tokens of one completion."""
    table = torch.tensor([0.0 if i == tiny.EOS else 0.25 if 3 <= i < 17 else 1.0 for i in token_ids.tolist()]).double()
    later = (torch.arange(len(token_ids)) >= 1).double()
    return table * later * ((4.0 - ref_entropy) / 3.0).clamp(0, 1)


def train(folder, form=FORMS[0], rule=RULE, **changed):
    """A run of one micro-batch unless told otherwise, with its gradients and the parameters it began with."""
    direction, estimator, placement = form
    recorder = tiny.Recorder()
    run = tiny.trainer(
        folder, changed.pop("model", None), changed.pop("reward", tiny.mixed), kind=tiny.SeenTrainer,
        given={"reference": tiny.apart(), "callbacks": [recorder], "token_rule": rule},
        **{
            "max_steps": 1, "lam": 1.0, "kl_coef": COEF, "kl_direction": direction, "kl_estimator": estimator,
            "kl_placement": placement, "max_grad_norm": 0.0, "per_device_train_batch_size": 8,
        } | changed,
    )  # fmt: skip
    start = tiny.parameters(run.model)
    run.train()
    return run, recorder, start


class Dense:
    """Of each completion of a micro-batch, from whole logits in float64: what the penalty is made of."""

    def __init__(self, micro, direction, estimator):
        self.policy, reference = tiny.llama().double().eval(), tiny.apart().double().eval()
        self.rows = []
        for prompt, real, said, mask in zip(
            micro.prompt_ids, micro.prompt_mask, micro.completion_ids, micro.mask, strict=True
        ):
            ids, first = torch.cat([prompt[real], said[mask]])[None], int(real.sum()) - 1
            lp, lq = (m(ids).logits[0, first:-1].log_softmax(-1) for m in (self.policy, reference))
            lq = lq.detach()
            tokens = said[mask]
            logp, ref_logp = (x.gather(1, tokens[:, None])[:, 0] for x in (lp, lq))
            exact = {"reverse": (lp.exp() * (lp - lq)).sum(-1), "forward": (lq.exp() * (lq - lp)).sum(-1)}[direction]
            log_ratio, r = logp - ref_logp, (ref_logp - logp).exp()
            value = {
                ("reverse", "k1"): log_ratio,
                ("reverse", "k2"): log_ratio**2 / 2,
                ("reverse", "k3"): r - 1 + log_ratio,
                ("forward", "k3"): r * r.log() - r + 1,
            }.get((direction, estimator), exact)
            weight = weigh(tokens, -(lq.exp() * lq).sum(-1))
            self.rows.append((logp, value, exact, weight, log_ratio, r))

    def kl_loss(self, direction, estimator, placement):
        """sum of weight * the KL in the loss, its gradient that of the direction (a score-function term if sampled)."""
        total = 0.0
        for logp, _, exact, weight, log_ratio, r in self.rows:
            if estimator == "exact":
                carrier = exact
            elif placement == "both":
                carrier = r - 1 + log_ratio  # k3's plain derivative: the other half is in the reward
            else:
                slope = log_ratio if direction == "reverse" else 1 - r
                carrier = slope.detach() * logp
            total = total + (weight * carrier).sum()
        return total


def rewards_to_go(row, estimator, in_reward, score):
    """Of one completion: rewards-to-go of score - coef * weighted KL, exact charged one token later."""
    _, value, _, weight, *_ = row
    kl = (weight * value).detach()
    if estimator == "exact":
        kl = torch.cat([kl[1:], kl.new_zeros(1)])
    rewards = -COEF * kl if in_reward else torch.zeros_like(kl)
    rewards[-1] += score
    return rewards.flip(0).cumsum(0).flip(0)


@pytest.mark.parametrize("form", FORMS, ids="-".join)
def test_rewards_losses_and_gradients_are_those_of_a_dense_computation(form, tmp_path):
    direction, estimator, placement = form
    run, recorder, start = train(tmp_path, form)
    ((micro, _, loss),) = run.seen
    dense = Dense(micro, direction, estimator)
    weights = torch.cat([row[3] for row in dense.rows])
    torch.testing.assert_close(micro.kl_weight[micro.mask].double(), weights, rtol=0, atol=1e-5)
    assert ((weights > 0.01) & (weights < 0.9)).any()
    assert (weights == 0).any()
    said = [ids[real].tolist() for ids, real in zip(micro.completion_ids, micro.mask, strict=True)]
    in_reward = effective_placement(estimator, placement) != "loss"
    to_go = [rewards_to_go(row, estimator, in_reward, s) for row, s in zip(dense.rows, tiny.mixed(said), strict=True)]
    for found, mask, expected in zip(micro.returns, micro.mask, to_go, strict=True):
        torch.testing.assert_close(found[mask].double(), expected, rtol=0, atol=2e-5)
    returns = torch.cat(to_go)
    scale = 1 / math.sqrt(returns.var(correction=0) + 1e-8)
    advantages = (returns - returns.mean()) * scale
    logp = torch.cat([row[0] for row in dense.rows])
    objective = -(advantages * (logp - logp.detach()).exp()).sum()
    kl_value = 0.0
    if placement != "reward":
        objective = objective + scale * COEF * dense.kl_loss(*form)
        kl_value = scale * COEF * sum(float((row[3] * row[1].detach()).sum()) for row in dense.rows)
    # The value loss has a value, at a value function of 0, and no gradient for the policy: its head begins at 0.
    value_loss = 0.1 * 0.5 * returns.square().sum()
    expected = (-float(advantages.sum()) + kl_value + float(value_loss)) / len(returns)
    assert loss.item() == pytest.approx(expected, rel=1e-5, abs=1e-5)
    names = [name for name, _ in dense.policy.named_parameters()]
    gradients = torch.autograd.grad(objective / len(returns), dense.policy.parameters())
    for name, gradient in zip(names, gradients, strict=True):
        found = recorder.gradients[0][name].double()
        torch.testing.assert_close(found, gradient, rtol=1e-3, atol=2e-5, msg=lambda text, n=name: f"{n}: {text}")
    assert start.keys() >= set(names)


def test_what_is_logged_and_what_the_controller_sees_are_weighted(tmp_path):
    run, *_ = train(
        tmp_path, kl_controller="target", kl_target=0.01, log_completions=True, num_completions_to_print=0,
        kl_log_tokens=1,
    )  # fmt: skip
    (micro, *_), (log,) = run.seen[0], tiny.step_logs(run)
    rows = Dense(micro, "reverse", "k1").rows
    exact, weight, k1 = (torch.cat([row[i] for row in rows]).detach() for i in (2, 3, 1))
    counted = weight != 0
    assert log["kl/tokens/count"] == int(counted.sum()) < len(weight)
    assert log["kl/reverse/mean"] == pytest.approx(float((exact * weight).sum() / weight.sum()), rel=1e-5)
    assert log["kl/k1/mean"] == pytest.approx(float((k1 * weight).sum() / weight.sum()), rel=1e-4)
    assert log["kl/reverse/max"] == pytest.approx(float(exact[counted].max()), rel=1e-5)
    sequences = [float((row[2].detach() * row[3]).sum()) for row in rows]
    assert run.penalty.coef == 2 * COEF  # what it was shown is far above 0.01
    shown = run.ppo.completions
    assert sorted(row["sequence_kl"] for row in shown) == pytest.approx(sorted(sequences), rel=1e-5)
    # The token tables hold each token's own KL, and its weight beside it.
    frame = read_records(tmp_path)[0].to_pandas()
    assert frame[frame.is_prompt].weight.isna().all()
    by_text = {tuple(group.token_id): group[~group.is_prompt] for _, group in frame.groupby("sample_id")}
    ids, attention = micro.inputs
    for row, text, real in zip(rows, ids, attention.bool(), strict=True):
        group = by_text[tuple(text[real].tolist())]
        assert group.weight.to_numpy() == pytest.approx(row[3].numpy(), abs=1e-5)
        assert group.reverse_kl.to_numpy() == pytest.approx(row[2].detach().numpy(), abs=1e-4)


def test_the_controller_sees_the_weighted_nats(tmp_path):
    """A target between the weighted and the whole KL: one of them would double the coefficient, the other halve it."""
    run, *_ = train(tmp_path / "a", rule=constant(0.05), kl_controller="target", kl_target=2.0)
    whole, *_ = train(tmp_path / "b", rule=None, kl_controller="target", kl_target=2.0)
    assert (run.penalty.coef, whole.penalty.coef) == (COEF / 2, COEF * 2)


@pytest.mark.parametrize("form", [FORMS[0], FORMS[2], FORMS[5]], ids="-".join)
def test_weight_1_changes_nothing_bit_for_bit(form, tmp_path):
    rule = combine(constant(1), burn_in(0), decay(1.0), by_ids({tiny.EOS: 1.0}), along_ref_entropy(98.0, 99.0))
    more = {"max_steps": 4, "num_ppo_epochs": 2, "kl_controller": "pi", "kl_target": 1.0, "whiten_rewards": True}
    plain, first, _ = train(tmp_path / "plain", form, None, **more)
    ruled, second, _ = train(tmp_path / "ruled", form, rule, **more)
    assert not tiny.unequal(tiny.parameters(plain.model), tiny.parameters(ruled.model))
    for a, b in zip(first.gradients, second.gradients, strict=True):
        assert not tiny.unequal(a, b)
    assert tiny.step_logs(plain) == tiny.step_logs(ruled)
    assert plain.penalty.state_dict() == ruled.penalty.state_dict()


def test_weight_0_is_no_penalty(tmp_path):
    ends = []
    for name, rule, coef in (("ruled", constant(0), 0.3), ("free", None, 0.0)):
        run, *_ = train(tmp_path / name, FORMS[5], rule, kl_coef=coef, max_steps=3)
        ends.append(tiny.parameters(run.model))
    assert not tiny.unequal(*ends)


def test_evaluation_weighs_too(tmp_path):
    run, *_ = train(tmp_path, rule=constant(0.5))
    run.eval_dataset = tiny.prompts(8)
    half = run.evaluate()
    run.penalty.token_rule = None
    whole = run.evaluate()
    name = "eval_kl/sequence/reverse/mean"
    assert half[name] == pytest.approx(whole[name] / 2, rel=1e-6)


def test_a_run_resumed_in_the_middle_of_a_rollout_keeps_its_weights(tmp_path):
    cycle = {"num_ppo_epochs": 2, "num_mini_batches": 2, "save_strategy": "steps", "save_steps": 3.0}
    cycle |= {"per_device_train_batch_size": 2, "max_steps": 6}
    whole, *_ = train(tmp_path / "whole", FORMS[5], **cycle)
    train(tmp_path / "cut", FORMS[5], **cycle | {"max_steps": 3})
    rest = tiny.trainer(
        tmp_path / "cut", given={"reference": tiny.apart(), "token_rule": RULE},
        **{"lam": 1.0, "kl_coef": COEF, "kl_estimator": "exact", "kl_placement": "both", "max_grad_norm": 0.0} | cycle,
    )  # fmt: skip
    rest.train(resume_from_checkpoint=True)
    assert not tiny.unequal(tiny.parameters(whole.model), tiny.parameters(rest.model))


@pytest.mark.parametrize(
    ("before", "after", "named"),
    [
        (None, burn_in(2), r"token_rule: None in the checkpoint, 'burn_in\(2\)' now"),
        (burn_in(2), None, r"token_rule: 'burn_in\(2\)' in the checkpoint, None now"),
        (burn_in(2), burn_in(3), r"token_rule: 'burn_in\(2\)' in the checkpoint, 'burn_in\(3\)' now"),
    ],
)
def test_a_run_resumed_with_another_rule_is_refused(before, after, named, tmp_path):
    train(tmp_path, rule=before, save_strategy="steps", save_steps=1.0)
    rest = tiny.trainer(
        tmp_path, given={"reference": tiny.apart(), "token_rule": after}, max_steps=2, lam=1.0, kl_coef=COEF,
        per_device_train_batch_size=8,
    )  # fmt: skip
    with pytest.raises(ValueError, match=named):
        rest.train(resume_from_checkpoint=True)


def test_a_checkpoint_from_before_there_were_rules_is_resumed(tmp_path):
    train(tmp_path, rule=None, save_strategy="steps", save_steps=1.0)
    path = tmp_path / "checkpoint-1" / "klft_state.json"
    state = json.loads(path.read_text())
    assert state["run"].pop("token_rule", 0) is None
    text = json.dumps(state, indent=1)
    path.write_text(text + " " * (path.stat().st_size - len(text)))  # of the length that the marker has
    marker = path.with_name("_COMPLETE")
    marker.write_text(json.dumps({"files": json.loads(marker.read_text())["files"]}))  # without checksums, as then
    rest = tiny.trainer(
        tmp_path, given={"reference": tiny.apart()}, max_steps=2, lam=1.0, kl_coef=COEF, per_device_train_batch_size=8,
        max_grad_norm=0.0,
    )  # fmt: skip
    rest.train(resume_from_checkpoint=True)
    assert rest.state.global_step == 2


@pytest.mark.parametrize("bad", [0.5, "burn_in", torch.ones(3)], ids=["number", "name", "weights"])
def test_a_rule_that_is_no_function_is_refused_before_training(bad, tmp_path, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # the suite's own type checks would come first
    with pytest.raises(TypeError, match=r"token_rule must be a function \(token_ids, mask, scores\) -> weight, got"):
        tiny.trainer(tmp_path, given={"token_rule": bad})
