"""Sharding that was asked for and does not run: an error in every trainer, not whole models without a word."""

from types import SimpleNamespace

import pytest
import torch.distributed as dist
from accelerate.utils import DistributedType
from support import rloo, tiny
from support.anchors import exact, sft
from support.trainers import AnchoredSFT, sft_config
from torch import nn
from torch.distributed.tensor import distribute_tensor, init_device_mesh

from klft.integrations import KLReward
from klft.parallel import check_parallelism

RUNS = ("NO", "MULTI_CPU", "MULTI_GPU", "FSDP", "DEEPSPEED")


def given(asked, runs, config=None):
    args = SimpleNamespace(**{"fsdp": "", "deepspeed": None, "gradient_accumulation_steps": 1} | asked)
    return args, SimpleNamespace(distributed_type=DistributedType(runs), parallelism_config=config)


@pytest.mark.parametrize("runs", RUNS)
@pytest.mark.parametrize(("asked", "variable", "kind"), [
    ({"fsdp": "full_shard"}, None, "FSDP"), ({}, "ACCELERATE_USE_FSDP", "FSDP"),
    ({"deepspeed": "zero.json"}, None, "DEEPSPEED"), ({}, "ACCELERATE_USE_DEEPSPEED", "DEEPSPEED"), ({}, None, None),
])  # fmt: skip
def test_sharding_that_was_asked_for_and_does_not_run_is_refused(runs, asked, variable, kind, monkeypatch):
    if variable:
        monkeypatch.setenv(variable, "true")
    if kind in (None, runs):
        check_parallelism(*given(asked, runs), nn.Linear(2, 2))
    else:
        with pytest.raises(ValueError, match=f"^{kind} was asked for and {runs} runs: every process would hold"):
            check_parallelism(*given(asked, runs), nn.Linear(2, 2))


@pytest.mark.parametrize("by", ["launcher", "arguments", "nobody"])
def test_tensor_parallelism_needs_a_model_that_was_loaded_with_it(by, monkeypatch):
    config = SimpleNamespace(tp_size=2) if by == "arguments" else None
    if by == "launcher":
        monkeypatch.setenv("PARALLELISM_CONFIG_TP_SIZE", "2")
    whole, sharded = nn.Linear(2, 2), nn.Linear(2, 2)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        sharded.weight = nn.Parameter(distribute_tensor(sharded.weight.data, init_device_mesh("cpu", (1,))))
        check_parallelism(*given({}, "MULTI_GPU", config), sharded)
        sharded.tp_plan = {"q_norm": "replicated_with_grad_allreduce"}  # as Qwen3's
        check_parallelism(*given({}, "MULTI_GPU", config), sharded)
        with pytest.raises(ValueError, match=r"^Linear under tensor parallelism: .*gradient_accumulation_steps=1$"):
            check_parallelism(*given({"gradient_accumulation_steps": 2}, "MULTI_GPU", config), sharded)
    finally:
        dist.destroy_process_group()
    if by == "nobody":
        check_parallelism(*given({}, "MULTI_GPU", config), whole)
    else:
        said = r"^tensor parallelism over 2 processes was asked for and MULTI_GPU runs: .*Config\(tp_size=N\)"
        with pytest.raises(ValueError, match=said):
            check_parallelism(*given({}, "MULTI_GPU", config), whole)


def bound_reward(folder):
    path = rloo.saved(folder)
    kl = KLReward(rloo.reference(path))
    kl.bind(rloo.trainer(folder, rloo.policy(path), [tiny.mixed, kl]))


TRAINERS = {
    "PPO": lambda folder: tiny.trainer(folder, max_steps=1),
    "KLAnchorMixin": lambda folder: sft(AnchoredSFT, sft_config(folder), penalty=exact()),
    "KLReward": bound_reward,
}


@pytest.mark.parametrize(("name", "value", "said"), [
    ("ACCELERATE_USE_FSDP", "true", "FSDP"),
    ("PARALLELISM_CONFIG_TP_SIZE", "2", "tensor parallelism over 2 processes"),
])  # fmt: skip
@pytest.mark.parametrize("trainer", TRAINERS)
def test_every_trainer_refuses(trainer, name, value, said, tmp_path, monkeypatch):
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"^{said} was asked for and NO runs"):
        TRAINERS[trainer](tmp_path)
