"""KLAnchorMixin in GRPOTrainer under FSDP2 on two processes: the parameters of DDP. And with a sharded reference.

As in test_anchor_fsdp.py accelerate's own FSDP2 code runs on the CPU, over gloo. Run as a script, this file is what
each process does.
"""

import sys
from pathlib import Path

import conftest  # noqa: F401 - also for the script: no hub, few threads
import pytest
import torch
from support.processes import launch, leave

KINDS = {
    "k3": ("k3", "loss"),
    "exact": ("exact", "loss"),
    "reward": ("k1", "reward"),  # in per-token advantages
}


def full(p):
    return p.full_tensor() if hasattr(p, "full_tensor") else p


def main(folder, kind):
    from accelerate import PartialState
    from accelerate.utils import DistributedType
    from support.anchors import COEF, trained_grpo
    from support.trainers import AnchoredGRPO, grpo_config, policy

    from klft import FixedKL, FrozenReference, KLPenalty

    more = {}
    if kind == "fsdp2":
        layers = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
        more = {"fsdp": "full_shard", "fsdp_config": layers}
    for name, (estimator, placement) in KINDS.items():
        args = grpo_config(folder, per_device_train_batch_size=2, num_iterations=2, **more)
        assert args.distributed_state is not None
        if more:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        reference = FrozenReference(policy(seed=5), placement="sharded" if kind == "sharded" else "replicated")
        penalty = KLPenalty(reference, estimator=estimator, placement=placement, controller=FixedKL(COEF))
        run = trained_grpo(AnchoredGRPO, args, penalty=penalty)
        split = [sum(hasattr(p, "full_tensor") for p in model.parameters()) for model in (run.model, reference.model)]
        assert [n > 15 for n in split] == [kind == "fsdp2", kind == "sharded"], split
        weights = {n: full(p.detach()).double() for n, p in run.model.named_parameters()}
        logs = [{k: v for k, v in log.items() if "kl/" in k} for log in run.state.log_history if "loss" in log]
        torch.save({"weights": weights, "logs": logs}, Path(folder) / f"{kind}-{name}-{args.process_index}.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("grpo")
    run("ddp", made)
    return made


def run(kind, folder):
    done = launch(__file__, folder, kind, timeout=500)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fsdp2", "sharded"])
def test_grpo_is_that_of_ddp(folder, kind):
    from support import tiny
    from support.trainers import policy

    run(kind, folder)
    start = tiny.parameters(policy())
    for name in KINDS:
        for rank in (0, 1):
            ours, theirs = (torch.load(folder / f"{each}-{name}-{rank}.pt") for each in (kind, "ddp"))
            for parameter, weights in theirs["weights"].items():
                assert (ours["weights"][parameter] - weights).abs().max() < 1e-5, (name, parameter)
            assert max((w - start[n]).abs().max() for n, w in theirs["weights"].items()) > 1e-3, name
            assert len(ours["logs"]) == 4
            for mine, other in zip(ours["logs"], theirs["logs"], strict=True):
                assert len(mine) > 4
                assert mine == pytest.approx(other, rel=1e-4, abs=1e-6), name


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave()
