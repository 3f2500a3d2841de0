"""KLAnchorMixin on a policy that transformers splits over two processes by tensor parallelism: one process's numbers.

Both processes have the same samples. On a CPU accelerate takes no parallel configuration; here the state says there
were GPUs, as in tests/ppo/test_ppo_tensor_parallel.py. Run as a script, this file is what each process does.
"""

import sys
from pathlib import Path

import conftest  # noqa: F401 - also for the script: no hub, few threads
import pytest
import torch
import transformers
from pyarrow import parquet
from support import tiny
from support.anchors import exact
from support.processes import launch, leave, python
from support.trainers import AnchoredGRPO, AnchoredSFT, grpo, grpo_config, policy, sft_config, texts

from klft import AdaptiveKL
from klft.integrations.checks import check_sharding
from klft.scoring import Scorer

LIKE = {
    "vocab_size": tiny.VOCABULARY, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "max_position_embeddings": 64,
    "initializer_range": 0.25, "bos_token_id": tiny.BOS, "eos_token_id": tiny.EOS, "pad_token_id": tiny.PAD,
}  # fmt: skip
KINDS = {"one": python, "tp": launch}
# name -> family, direction, what goes to the config. Qwen3 without accumulation: transformers 5.23 sums the gradient of
# its q_norm and k_norm over processes after every micro-batch, what is summed already with it.
RUNS = {
    "llama": ("llama", "forward", {"gradient_accumulation_steps": 2}),
    "qwen3": ("qwen3", "reverse", {}),
    "not across devices": ("llama", "forward", {"average_tokens_across_devices": False}),
}


def full(p):
    return p.full_tensor() if hasattr(p, "full_tensor") else p


def main(folder, kind):
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    folder = Path(folder)
    for name, (family, direction, more) in RUNS.items():
        if kind == "tp" and name == "not across devices":
            # Then transformers divides its own count by the processes and not the loss: all of it is twice as large.
            more = more | {"learning_rate": 0.025}
        args = sft_config(folder / f"{kind} {name}", per_device_eval_batch_size=4, **more)
        assert args.distributed_state is not None
        split = {}
        if kind == "tp":
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
            split = {"distributed_config": transformers.DistributedConfig(tp_size=2)}
        model = transformers.AutoModelForCausalLM.from_pretrained(folder / family, **split)
        penalty = exact(direction)
        penalty.controller = AdaptiveKL(0.5, target=1.0, horizon=60)
        run = AnchoredSFT(
            model, args=args, train_dataset=texts(), eval_dataset=texts(8), processing_class=tiny.tokenizer(),
            penalty=penalty, self_test=name == "llama", measure_every=2 if name == "llama" else 0,
            kl_shard_vocab="tp" if kind == "tp" and name == "llama" else "auto",
        )  # fmt: skip
        run.train()
        dtensors = sum(hasattr(p, "full_tensor") for p in run.model.parameters())
        assert (dtensors > 10) == (kind == "tp"), f"{dtensors} DTensors"
        evaluated = run.evaluate()
        found = {
            "weights": {n: full(p.detach()).double() for n, p in run.model.named_parameters()},
            "logs": [
                {k: v for k, v in log.items() if "kl/" in k or k in ("loss", "grad_norm")}
                for log in run.state.log_history if "loss" in log
            ],
            "evaluated": {k: v for k, v in evaluated.items() if "kl/" in k or k == "eval_loss"},
            "controller": penalty.coef,
        }  # fmt: skip
        torch.save(found, folder / f"{kind}-{name}-{args.process_index}.pt")
    if kind == "tp":
        for shard in ("dp", "none"):
            with pytest.raises(ValueError, match=f"kl_shard_vocab={shard}: the policy's head is tensor parallel"):
                check_sharding(model, Scorer(penalty.reference, shard_vocab=shard))
        args = grpo_config(folder)
        assert args.distributed_state is not None
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        with pytest.raises(ValueError, match=r"tensor parallelism, and GRPOTrainer .* random numbers of its own"):
            grpo(AnchoredGRPO, model, args, penalty=exact(direction))


@pytest.mark.slow
def test_two_processes_with_one_model_are_one(tmp_path):
    policy().save_pretrained(tmp_path / "llama")
    torch.manual_seed(0)
    transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**LIKE)).save_pretrained(tmp_path / "qwen3")
    for kind, start in KINDS.items():
        done = start(__file__, tmp_path, kind, timeout=500)
        assert done.returncode == 0, [x for x in done.stderr.splitlines() if x.startswith("[rank")] or done.stderr
    for name in RUNS:
        theirs = torch.load(tmp_path / f"one-{name}-0.pt")
        for rank in (0, 1):
            ours = torch.load(tmp_path / f"tp-{name}-{rank}.pt")
            for parameter, weights in theirs["weights"].items():
                assert (ours["weights"][parameter] - weights).abs().max() < 1e-5, (name, parameter)
            assert len(ours["logs"]) == 4
            for own, other in zip(ours["logs"], theirs["logs"], strict=True):
                assert len(own) > 8
                if name == "not across devices":
                    own |= {"loss": own["loss"] / 2, "grad_norm": own["grad_norm"] / 2}
                assert own == pytest.approx(other, rel=1e-4, abs=1e-5), name
            assert ours["evaluated"] == pytest.approx(theirs["evaluated"], rel=1e-4, abs=1e-5)
            assert ours["controller"] == pytest.approx(theirs["controller"], rel=1e-4)
    folders = [tmp_path / f"{kind} llama" / "kl" for kind in KINDS]
    one, two = ([parquet.read_table(path) for path in sorted(each.glob("*.parquet"))] for each in folders)
    assert [t.num_rows for t in one] == [t.num_rows for t in two], "each token once"
    assert len(one) == 2


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave()
