"""KLAnchorMixin under FSDP2 on two processes: the parameters of DDP.

On a CPU accelerate makes DDP of a wish for FSDP2. Here the state says there were GPUs, so that accelerate's own FSDP2
code runs, over gloo: real are the DTensors, the gathered head and its averaged gradient, the sharded optimizer; not
real are CUDA, NCCL and mixed precision. Run as a script, this file is what each process does.
"""

import sys
from pathlib import Path

import conftest  # noqa: F401 - also for the script: no hub, few threads
import pytest
import torch
from support.processes import launch, leave

KINDS = ("forward", "reverse", "0")


def full(p):
    return p.full_tensor() if hasattr(p, "full_tensor") else p


def main(folder, kind):
    from accelerate import PartialState
    from accelerate.utils import DistributedType
    from support.anchors import exact, sft
    from support.trainers import AnchoredSFT, sft_config

    more = {}
    if kind == "fsdp2":
        layers = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
        more = {"fsdp": "full_shard", "fsdp_config": layers}
    for name in KINDS:
        args = sft_config(
            folder, gradient_accumulation_steps=2, per_device_train_batch_size=2, optim="adamw_torch", **more
        )
        assert args.distributed_state is not None
        if more:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        penalty = exact(coef=0.0) if name == "0" else exact(name)
        run = sft(AnchoredSFT, args, penalty=penalty)
        sharded = sum(hasattr(p, "full_tensor") for p in run.model.parameters())
        assert (sharded > 15) == bool(more), f"{sharded} DTensors"
        weights = torch.cat([full(p.detach()).double().flatten() for p in run.model.parameters()])
        kl = [log["kl/forward/mean"] for log in run.state.log_history if "loss" in log]
        if run.accelerator.is_main_process:
            torch.save({"weights": weights, "kl": kl}, Path(folder) / f"{kind}-{name}.pt")


@pytest.mark.slow
def test_fsdp2_is_ddp(tmp_path):
    for kind in ("fsdp2", "ddp"):
        run = launch(__file__, tmp_path, kind, timeout=300)
        assert run.returncode == 0, run.stderr[-4000:]
    for name in KINDS:
        ours, theirs = (torch.load(tmp_path / f"{kind}-{name}.pt") for kind in ("fsdp2", "ddp"))
        assert (ours["weights"] - theirs["weights"]).abs().max() < 2e-6, name
        assert ours["kl"] == pytest.approx(theirs["kl"], rel=1e-4), name


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave()
