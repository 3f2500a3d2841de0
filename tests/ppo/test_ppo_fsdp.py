"""PPOTrainer under FSDP2 on two processes: the parameters of DDP, and a resumed run's are those of one in one piece.

On a CPU accelerate makes DDP of a wish for FSDP2. Here the state says there were GPUs, so that accelerate's own FSDP2
code runs, over gloo: real are the DTensors, the gathering for `generate`, the head (whole or by rows) and its averaged
gradient, clipping, the sharded optimizer and checkpoint; not real are CUDA, NCCL, streams and mixed precision. Run as a
script, this file is what each process does.
"""

import sys
from pathlib import Path

import conftest  # noqa: F401 - also for the script: no hub, few threads
import pytest
import torch
from support import tiny
from support.lengths import short_and_long
from support.processes import launch, leave
from transformers import LlamaForCausalLM

LAYERS = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
RUNS = {
    "k1": {"max_grad_norm": 0.05},
    "exact": {"kl_estimator": "exact", "kl_placement": "both"},
    "k1 dp": {"kl_shard_vocab": "dp"},
    "exact dp": {"kl_estimator": "exact", "kl_placement": "both", "kl_shard_vocab": "dp"},
    "value model": {},
    "adapter": {},
    "lengths": {"train_sampling_strategy": "sequential", "top_k": 1},
}


def full(p):
    return p.full_tensor() if hasattr(p, "full_tensor") else p


def trainer(folder, name, kind, **more):
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    layers = LAYERS | ({"state_dict_type": "SHARDED_STATE_DICT"} if kind == "fsdp2 sharded" else {})
    options = {} if kind == "ddp" else {"fsdp": True, "fsdp_config": layers}
    given = {"adapter": {"peft_config": tiny.lora()}, "value model": {"value_model": tiny.critic()}}.get(name, {})
    if name != "adapter":
        given = {**given, "reference": tiny.llama(5)}
    args = tiny.config(folder, **({"max_steps": 4, "num_ppo_epochs": 2} | RUNS[name] | options | more))
    assert args.distributed_state is not None
    if options:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    prompts = short_and_long() if name == "lengths" else tiny.prompts()
    return tiny.SeenTrainer(
        tiny.llama(), tiny.mixed, args, train_dataset=prompts, processing_class=tiny.tokenizer(), **given
    )


def outcome(run):
    return {
        "weights": {n: full(p.detach()).double() for n, p in run.model.named_parameters()},
        "logs": tiny.step_logs(run),
        "tokens": [micro.completion_ids.tolist() for micro, _, _ in run.seen],
        "lengths": [micro.mask.sum(-1).tolist() for micro, _, _ in run.seen],
    }


def run(folder, kind, name, resume=None, **more):
    trained = trainer(folder, name, kind, **more)
    trained.train(resume_from_checkpoint=resume)
    sharded = sum(hasattr(p, "full_tensor") for p in trained.model.parameters())
    assert (sharded == len(list(trained.model.parameters()))) == (kind != "ddp"), f"{sharded} DTensors"
    return trained


def equal(folder, kind):
    for name in RUNS:
        trained = run(folder / name, kind, name)
        torch.save(outcome(trained), folder / f"{kind}-{name}-{trained.args.process_index}.pt")


def resumed(folder, kind):
    """Cut in the middle of a rollout's second epoch, and continued."""
    for name in ("k1", "value model", "adapter"):
        where, how = folder / name, {"max_steps": 3, "save_strategy": "steps", "save_steps": 3.0}
        whole = run(where / "whole", kind, name, **how | {"max_steps": 6})
        run(where / "cut", kind, name, **how)
        torch.manual_seed(1000 + whole.args.process_index)
        rest = run(where / "cut", kind, name, True, **how | {"max_steps": 6})
        whole.save_model(where / "final")
        torch.save({"whole": outcome(whole), "rest": outcome(rest)}, folder / f"{name}-{whole.args.process_index}.pt")


def continued(folder, kind):
    """Another layout's checkpoint."""
    how = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3.0}
    with pytest.raises((ValueError, RuntimeError), match=r"was written by another run: .*fsdp"):
        run(folder / "k1" / "cut", kind, "k1", True, **how)


def main(what, folder, kind):
    {"equal": equal, "resumed": resumed, "continued": continued}[what](Path(folder), kind)


@pytest.mark.slow
def test_fsdp2_is_ddp(tmp_path):
    for kind in ("fsdp2", "ddp"):
        done = launch(__file__, "equal", tmp_path, kind, timeout=500)
        assert done.returncode == 0, done.stderr[-4000:]
        assert "view tensor" not in done.stderr
    start = dict(tiny.llama().named_parameters())
    for name in RUNS:
        for rank in (0, 1):
            ours, theirs = (torch.load(tmp_path / f"{kind}-{name}-{rank}.pt") for kind in ("fsdp2", "ddp"))
            assert ours["tokens"] == theirs["tokens"], name
            assert ours["weights"].keys() == theirs["weights"].keys()
            for parameter, weights in theirs["weights"].items():
                assert (ours["weights"][parameter] - weights).abs().max() < 1e-5, (name, parameter)
            moved = [n for n, w in theirs["weights"].items() if n in start and (w - start[n]).abs().max() > 1e-3]
            assert moved or name == "adapter"
            for own, other in zip(ours["logs"], theirs["logs"], strict=True):
                assert own == pytest.approx(other, rel=1e-4, abs=1e-5), name
    first = [torch.load(tmp_path / f"fsdp2-lengths-{rank}.pt")["lengths"][0] for rank in (0, 1)]
    assert first == [[1] * 4, [6] * 4]  # one process's completions end before the other's


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fsdp2", "fsdp2 sharded"])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, kind):
    done = launch(__file__, "resumed", tmp_path, kind, timeout=500)
    assert done.returncode == 0, done.stderr[-4000:]
    for name in ("k1", "value model", "adapter"):
        for rank in (0, 1):
            both = torch.load(tmp_path / f"{name}-{rank}.pt")
            whole, rest = both["whole"], both["rest"]
            assert rest["tokens"] == whole["tokens"][3:]
            assert rest["logs"] == whole["logs"]
            assert tiny.unequal(rest["weights"], whole["weights"]) == []
    final = torch.load(tmp_path / "k1-0.pt")["whole"]["weights"]
    other = launch(__file__, "continued", tmp_path, "ddp", timeout=500)
    assert other.returncode == 0, other.stderr[-4000:]
    for name in ("whole/checkpoint-6", "final") if kind == "fsdp2" else ("final",):
        loaded = LlamaForCausalLM.from_pretrained(tmp_path / "k1" / name)
        assert (
            tiny.unequal(
                {n: p.detach().double() for n, p in loaded.named_parameters()},
                {n: p for n, p in final.items() if not n.startswith("v_head")},
            )
            == []
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave()
