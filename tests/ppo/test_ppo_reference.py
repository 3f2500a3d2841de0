"""PPO with a reference that follows the policy: told of each step, kept in the checkpoint, resumed bit for bit."""

import pytest
import torch
from peft import get_peft_model
from support import tiny

from klft import CachedReference, EMAReference, FrozenReference, MixtureReference, TopKReference

KINDS = pytest.mark.parametrize("kind", ["full", "adapter"])


def start(folder, kind, max_steps, **changed):
    model = tiny.llama()
    if kind == "adapter":
        torch.manual_seed(3)
        model = get_peft_model(model, tiny.lora())
    settings = {"save_strategy": "steps", "save_steps": 3.0, "kl_estimator": "exact", "kl_coef": 0.5} | changed
    given = {"reference": EMAReference(model, decay=0.5, every=2)}
    return tiny.trainer(folder, model, given=given, max_steps=max_steps, kl_placement="both", **settings)


@KINDS
def test_six_steps_are_three_and_three_more(kind, tmp_path):
    whole = start(tmp_path / "whole", kind, 6)
    whole.train()
    start(tmp_path / "cut", kind, 3).train()
    rest = start(tmp_path / "cut", kind, 6)
    rest.train(resume_from_checkpoint=True)
    assert tiny.unequal(tiny.parameters(whole.model), tiny.parameters(rest.model)) == []
    states = [run.penalty.reference.state_dict() for run in (whole, rest)]
    assert tiny.unequal(*states) == []
    assert int(states[0]["steps"]) == 6
    assert tiny.step_logs(whole) == tiny.step_logs(rest)
    kls = [log["kl/sequence/reverse/mean"] for log in tiny.step_logs(whole)]
    assert kls[0] == 0
    assert min(kls[1:]) > 0


@KINDS
def test_a_copy_after_every_step_leaves_no_kl(kind, tmp_path):
    run = start(tmp_path, kind, 3, save_strategy="no", self_test=True)
    run.penalty.reference.decay, run.penalty.reference.every = 0.0, 1
    run.train()
    assert [log["kl/reverse/max"] for log in tiny.step_logs(run)] == [0, 0, 0]
    assert run.penalty.reference.steps == 3


def test_another_kind_of_reference_does_not_resume(tmp_path):
    start(tmp_path, "full", 3).train()
    rest = start(tmp_path, "full", 6)
    still = tiny.trainer(
        tmp_path, given={"reference": tiny.apart()}, max_steps=6, save_strategy="steps", save_steps=3.0,
        kl_placement="both", kl_estimator="exact", kl_coef=0.5,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"reference: \['1 EMAReference .* now"):
        still.train(resume_from_checkpoint=True)
    rest.train(resume_from_checkpoint=True)


def test_references_that_cannot_score_rollouts_are_refused(tmp_path):
    ids = torch.tensor([[4, 5, 6]])
    cached = CachedReference.write(tmp_path / "cache", FrozenReference(tiny.apart()), [(ids, torch.ones_like(ids))])
    known = TopKReference(ids.unsqueeze(-1), torch.full((1, 3, 1), -1.0), torch.full((1, 3), -1.0))
    for reference in (cached, known, MixtureReference([(1.0, tiny.apart())])):
        with pytest.raises(TypeError, match=f"a {type(reference).__name__} cannot score what the policy will sample"):
            tiny.trainer(tmp_path / "run", given={"reference": reference})
