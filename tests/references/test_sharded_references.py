"""References and reward models that are split over two processes, or lie on the CPU between uses: the same numbers.

Run as a script, this file is what each process does: torch's own FSDP2 over gloo, beside a policy that DDP trains. Not
real are CUDA, its streams and its pinned memory.
"""

import sys
from pathlib import Path

import conftest  # noqa: F401 - also for the script: no hub, few threads
import pytest
import torch
from support import tiny
from support.processes import launch, leave

from klft import EMAReference, FrozenReference
from klft.parallel import Placement
from klft.ppo import RewardModel

IDS = torch.tensor([[3, 8, 6, 4, 11, 5], [0, 0, 7, 9, 3, 4]])
ATTENTION = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
MADE = {"llama": tiny.llama, "tied": lambda: tiny.gpt2(3, 0.0)}


def judge():
    """A tiny classifier with its tokenizer."""
    model = tiny.critic(4)
    model.config.pad_token_id = tiny.PAD
    return model


def read(reference):
    """What a reference gives: logits, (hidden states, head) of the protocol, and of the backbone's own arguments."""
    hidden, head = reference.hidden(IDS, ATTENTION)
    alone, head_alone = reference.hidden_of({"input_ids": IDS, "attention_mask": ATTENTION})
    return {
        "logits": reference.logits(IDS, ATTENTION), "hidden": head.logits(hidden)[ATTENTION.bool()],
        "alone": head_alone.logits(alone)[:1],
    }  # fmt: skip


def held(model):
    """Numbers that this process holds of a model."""
    return sum((p.to_local() if hasattr(p, "to_local") else p).numel() for p in model.parameters())


def ppo(folder, **more):
    given = {"reference": tiny.llama(5), "reward_funcs": [tiny.mixed, RewardModel(judge(), tiny.tokenizer())]}
    how = {"save_strategy": "steps", "save_steps": 2.0, "kl_estimator": "exact", "kl_placement": "both"}
    return tiny.trainer(folder, given=given, num_ppo_epochs=2, **({"max_steps": 4} | how | more))


def scored(folder, rank):
    for name, make in MADE.items():
        whole, split = FrozenReference(make()), FrozenReference(make(), placement="sharded")
        split.to("cpu")
        for _ in range(2):
            for what, value in read(whole).items():
                torch.testing.assert_close(read(split)[what], value, msg=f"{name} {what}")
        assert held(split.model) <= 0.51 * held(whole.model), name


def trained(folder, rank):
    kept = {}
    for placement in (None, "sharded", "offloaded"):
        run = ppo(folder / str(placement), reference_placement=placement, reward_model_placement=placement)
        run.train()
        kept[placement] = tiny.parameters(run.model), tiny.step_logs(run)
    size = held(tiny.llama(5))
    run = ppo(folder / "cut", reference_placement="sharded", reward_model_placement="sharded", max_steps=2)
    assert held(run.penalty.reference.model) <= 0.51 * size
    run.train()
    # Where it lies is no part of what it is.
    rest = ppo(folder / "cut")
    rest.train(resume_from_checkpoint=True)
    torch.save((kept, tiny.parameters(rest.model)), folder / f"{rank}.pt")


def anchored(folder, rank):
    from support.anchors import exact, sft
    from support.trainers import AnchoredSFT, sft_config

    for placement in ("replicated", "sharded"):
        penalty = exact("reverse", reference=FrozenReference(tiny.apart(), placement=placement))
        run = sft(AnchoredSFT, sft_config(folder, max_steps=2), penalty=penalty)
        torch.save(tiny.parameters(run.model), folder / f"{placement}-{rank}.pt")


def main(what, folder):
    import os

    from accelerate import PartialState

    PartialState(cpu=True)
    {"scored": scored, "trained": trained, "anchored": anchored}[what](Path(folder), int(os.environ["RANK"]))


# ---- the tests ---------------------------------------------------------------------------------------------------


def run(what, folder):
    done = launch(__file__, what, folder, timeout=500)
    assert done.returncode == 0, [line for line in done.stderr.splitlines() if line.startswith("[rank")] or done.stderr


@pytest.mark.slow
def test_a_sharded_reference_gives_the_same(tmp_path):
    run("scored", tmp_path)


@pytest.mark.slow
def test_ppo_is_the_same_wherever_reference_and_reward_model_lie(tmp_path):
    run("trained", tmp_path)
    for rank in (0, 1):
        kept, rest = torch.load(tmp_path / f"{rank}.pt")
        weights, logs = kept[None]
        for placement in ("sharded", "offloaded"):
            others, other_logs = kept[placement]
            assert max((others[n] - w).abs().max() for n, w in weights.items()) < 1e-6, placement
            for own, other in zip(other_logs, logs, strict=True):
                assert own == pytest.approx(other, rel=1e-4, abs=1e-5), placement
        assert max((rest[n] - w).abs().max() for n, w in weights.items()) < 1e-6


@pytest.mark.slow
def test_an_anchor_is_the_same(tmp_path):
    run("anchored", tmp_path)
    for rank in (0, 1):
        ours, theirs = (torch.load(tmp_path / f"{placement}-{rank}.pt") for placement in ("sharded", "replicated"))
        assert max((ours[n] - w).abs().max() for n, w in theirs.items()) < 1e-6


@pytest.mark.parametrize("make", MADE.values(), ids=MADE)
def test_an_offloaded_reference_gives_the_same_and_goes_back(make):
    whole, away = FrozenReference(make()), FrozenReference(make(), placement="offloaded")
    away.to("cpu")
    places = [p.data_ptr() for p in away.model.parameters()]
    with away.placement.in_use():  # a copy, as on another device
        assert not {p.data_ptr() for p in away.model.parameters()} & set(places)
    for what, value in read(whole).items():
        torch.testing.assert_close(read(away)[what], value, msg=what)
    assert [p.data_ptr() for p in away.model.parameters()] == places


def test_one_process_has_nothing_to_share():
    reference = FrozenReference(tiny.llama(), placement="sharded")
    reference.to("cpu")
    assert held(reference.model) == held(tiny.llama())


def test_what_cannot_be_placed_is_refused(tmp_path):
    with pytest.raises(ValueError, match="placement must be one of replicated, sharded, offloaded, got 'gpu'"):
        FrozenReference(tiny.llama(), placement="gpu")
    with pytest.raises(ValueError, match="reference_placement must be one of replicated, sharded, offloaded"):
        tiny.config(tmp_path, reference_placement="cpu")
    with pytest.raises(ValueError, match="reference_placement='sharded' is for a frozen model; a AdapterReference"):
        tiny.trainer(tmp_path, given={"peft_config": tiny.lora()}, reference_placement="sharded")
    policy = tiny.llama()
    with pytest.raises(ValueError, match="reference_placement='offloaded' is for a frozen model; a EMAReference"):
        tiny.trainer(
            tmp_path, policy, given={"reference": EMAReference(policy, decay=0.9)}, reference_placement="offloaded"
        )
    spread = tiny.llama()
    spread.hf_device_map = {"": "cpu"}
    with pytest.raises(ValueError, match="placement='sharded': LlamaForCausalLM is quantised or spread already"):
        Placement(spread, "sharded").to("cpu")


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave()
