"""KLAnchorMixin under FSDP2 on two processes: the parameters of DDP.

On a CPU accelerate makes DDP of a wish for FSDP2. Here the state says there were GPUs, so that accelerate's own FSDP2
code runs, over gloo: real are the DTensors, the gathered head and its averaged gradient, the sharded optimizer; not
real are CUDA, NCCL and mixed precision. Run as a script, this file is what each process does.
"""

import json
import sys
from pathlib import Path

import conftest  # noqa: F401 - also for the script: no hub, few threads
import pytest
import torch
from support.processes import launch, leave

KINDS = ("forward", "reverse", "0")


def full(p):
    return p.full_tensor() if hasattr(p, "full_tensor") else p


def resumed(folder, kind):
    """A run of four steps, and one that is cut after two and continued, with a controller that moves."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType
    from support import tiny
    from support.anchors import exact
    from support.trainers import AnchoredSFT, policy, sft_config, texts

    from klft import AdaptiveKL

    layers = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"], "state_dict_type": kind}

    def run(where, direction, steps, resume=None):
        args = sft_config(
            where, max_steps=steps, gradient_accumulation_steps=2, per_device_train_batch_size=2, optim="adamw_torch",
            save_strategy="steps", save_steps=2, fsdp="full_shard", fsdp_config=layers,
        )  # fmt: skip
        assert args.distributed_state is not None
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        penalty = exact(direction)
        penalty.controller = AdaptiveKL(0.5, target=1.0, horizon=60)
        made = AnchoredSFT(
            policy(), args=args, train_dataset=texts(), processing_class=tiny.tokenizer(), penalty=penalty
        )
        made.train(resume_from_checkpoint=resume)
        logs = [{k: v for k, v in log.items() if "kl/" in k or k == "loss"} for log in made.state.log_history]
        weights = {n: full(p.detach()) for n, p in made.model.named_parameters()}
        return made, {"weights": weights, "logs": [log for log in logs if "loss" in log], "coef": penalty.coef}

    for direction in KINDS[:2]:
        where = Path(folder) / direction
        made, whole = run(where / "whole", direction, 4)
        run(where / "cut", direction, 2)
        torch.manual_seed(1000 + made.args.process_index)
        rest = run(where / "cut", direction, 4, True)[1]
        made.save_model(where / "final")
        torch.save({"whole": whole, "rest": rest}, where / f"{made.args.process_index}.pt")


def equal(folder, kind):
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
        run = launch(__file__, "equal", tmp_path, kind, timeout=300)
        assert run.returncode == 0, run.stderr[-4000:]
    for name in KINDS:
        ours, theirs = (torch.load(tmp_path / f"{kind}-{name}.pt") for kind in ("fsdp2", "ddp"))
        assert (ours["weights"] - theirs["weights"]).abs().max() < 2e-6, name
        assert ours["kl"] == pytest.approx(theirs["kl"], rel=1e-4), name


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["FULL_STATE_DICT", "SHARDED_STATE_DICT"])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, kind):
    from support import tiny
    from transformers import LlamaForCausalLM

    run = launch(__file__, "resumed", tmp_path, kind, timeout=300)
    assert run.returncode == 0, run.stderr[-4000:]
    for direction in KINDS[:2]:
        folder = tmp_path / direction
        for rank in (0, 1):
            both = torch.load(folder / f"{rank}.pt")
            whole, rest = both["whole"], both["rest"]
            assert tiny.unequal(rest["weights"], whole["weights"]) == []
            assert rest["logs"] == whole["logs"]
            assert rest["coef"] == whole["coef"] != 0.5
        state = json.loads((folder / "whole/checkpoint-4/klft_penalty.json").read_text())
        assert state["klft.KLAnchor"]["coef"] == torch.load(folder / "0.pt")["whole"]["coef"]
        for name in ("whole/checkpoint-4", "final") if kind == "FULL_STATE_DICT" else ("final",):
            loaded = LlamaForCausalLM.from_pretrained(folder / name)
            assert tiny.unequal(dict(loaded.named_parameters()), torch.load(folder / "0.pt")["whole"]["weights"]) == []


if __name__ == "__main__":
    {"equal": equal, "resumed": resumed}[sys.argv.pop(1)](*sys.argv[1:])
    leave()
