"""KLAnchorMixin with kl_shard_vocab="dp": the numbers of "none", on two processes by DDP and by FSDP2 (over gloo).

In some steps the second process has no token that counts. Run as a script, this file is what each process does.
"""

import sys
from pathlib import Path

import conftest  # noqa: F401 - also for the script: no hub, few threads
import pytest
import torch
from datasets import Dataset
from support import tiny
from support.anchors import another, exact
from support.processes import launch, leave
from support.trainers import AnchoredSFT, policy, sft_config, texts

PENALTIES = {"forward": exact, "jsd": another, "measured": lambda: exact(coef=0.0)}


def full(p):
    return p.full_tensor() if hasattr(p, "full_tensor") else p


def uneven():
    """Of every eight rows those that the second process has in every other step have no labels."""
    rows = texts(16).to_dict()
    labels = [[-100] * len(x) if i % 8 in (2, 3) else x for i, x in enumerate(rows["labels"])]
    return Dataset.from_dict({"input_ids": rows["input_ids"], "labels": labels})


def main(folder, kind):
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    more = {"per_device_train_batch_size": 2, "train_sampling_strategy": "sequential"}
    if kind == "fsdp2":
        layers = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
        more |= {"fsdp": "full_shard", "fsdp_config": layers}
    for name, penalty in PENALTIES.items():
        for shard in ("none", "dp"):
            args = sft_config(folder, **more)
            assert args.distributed_state is not None
            if kind == "fsdp2":
                PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
            run = AnchoredSFT(
                policy(), args=args, train_dataset=uneven(), eval_dataset=uneven().select(range(6)),
                processing_class=tiny.tokenizer(), penalty=penalty(), kl_shard_vocab=shard,
            )  # fmt: skip
            run.train()
            evaluated = run.evaluate()
            sharded = sum(hasattr(p, "full_tensor") for p in run.model.parameters())
            assert (sharded > 15) == (kind == "fsdp2"), f"{sharded} DTensors"
            found = {
                "weights": torch.cat([full(p.detach()).double().flatten() for p in run.model.parameters()]),
                "logs": [
                    {k: v for k, v in log.items() if "kl/" in k or k in ("loss", "grad_norm")}
                    for log in [*run.state.log_history, evaluated]
                ],
            }
            torch.save(found, Path(folder) / f"{kind}-{name}-{shard}-{args.process_index}.pt")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_shards_of_the_vocabulary_give_what_the_whole_gives(tmp_path, kind):
    run = launch(__file__, tmp_path, kind, timeout=300)
    assert run.returncode == 0, run.stderr[-4000:]
    for name in PENALTIES:
        for rank in (0, 1):
            ours, theirs = (torch.load(tmp_path / f"{kind}-{name}-{shard}-{rank}.pt") for shard in ("dp", "none"))
            assert (ours["weights"] - theirs["weights"]).abs().max() < 1e-6, name
            for mine, other in zip(ours["logs"], theirs["logs"], strict=True):
                assert mine == pytest.approx(other, rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize(
    ("shard", "message"),
    [
        ("rows", r"kl_shard_vocab must be one of auto, tp, dp, none, got 'rows'"),
        ("tp", r"kl_shard_vocab=tp: the policy's head is not tensor parallel; use auto"),
    ],
)
def test_what_does_not_apply_is_refused(tmp_path, shard, message):
    with pytest.raises(ValueError, match=message):
        AnchoredSFT(
            policy(), args=sft_config(tmp_path), train_dataset=texts(), processing_class=tiny.tokenizer(),
            penalty=exact(), kl_shard_vocab=shard,
        )  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave()
