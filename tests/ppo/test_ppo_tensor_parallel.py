"""PPOTrainer on a policy that transformers splits over two processes by tensor parallelism: the numbers of one process.

Both processes have the same samples. On a CPU accelerate takes no parallel configuration; here the state says there
were GPUs. Real are transformers' plan, the DTensors, the head's rows and the collectives of its vocabulary, over gloo;
not real are CUDA and NCCL. Run as a script, this file is what each process does.
"""

import random
import sys
from pathlib import Path

import conftest  # noqa: F401 - also for the script: no hub, few threads
import pytest
import torch
import transformers
from support import tiny
from support.processes import launch, leave, python

LIKE = {
    "vocab_size": tiny.VOCABULARY, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "max_position_embeddings": 64,
    "initializer_range": 0.25, "bos_token_id": tiny.BOS, "eos_token_id": tiny.EOS, "pad_token_id": tiny.PAD,
}  # fmt: skip
# name -> family, what goes to the config
RUNS = {
    "k1": ("llama", {"max_grad_norm": 0.05}),
    "exact": ("llama", {"kl_estimator": "exact", "kl_placement": "both"}),
    "qwen3": ("qwen3", {"kl_estimator": "exact", "kl_placement": "loss"}),
    "episodes": ("llama", {"total_episodes": 13, "max_steps": -1, "whiten_rewards": True, "normalize_scores": True}),
}


def full(p):
    return p.full_tensor() if hasattr(p, "full_tensor") else p


def at_random(completions, **_):
    """A judge that never says the same twice, and another thing to each process."""
    return [random.SystemRandom().random() for _ in completions]


def trainer(folder, kind, name, reward=tiny.mixed, **more):
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    family, changed = RUNS[name]
    args = tiny.config(folder / name, **({"max_steps": 4, "num_ppo_epochs": 2} | changed | more))
    assert args.distributed_state is not None
    split = {}
    if kind == "tp":
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        args.kl_shard_vocab = "tp" if name == "exact" else "auto"
        split = {"distributed_config": transformers.DistributedConfig(tp_size=2)}
    policy = transformers.AutoModelForCausalLM.from_pretrained(folder / family, **split)
    return tiny.SeenTrainer(
        policy, reward, args, train_dataset=tiny.prompts(), eval_dataset=tiny.prompts(6),
        processing_class=tiny.tokenizer(), reference=tiny.llama(5),
    )  # fmt: skip


def outcome(run):
    return {
        "weights": {n: full(p.detach()).double() for n, p in run.model.named_parameters()},
        "logs": tiny.step_logs(run),
        "tokens": [micro.completion_ids.tolist() for micro, _, _ in run.seen],
        "episodes": run.episodes,
    }


def equal(folder, kind):
    for name in RUNS:
        run = trainer(folder, kind, name)
        run.train()
        split = sum(hasattr(p, "full_tensor") for p in run.model.parameters())
        assert (split > 10) == (kind == "tp"), f"{split} DTensors"
        found = outcome(run) | {
            "evaluated": {k: v for k, v in run.evaluate().items() if "_per_" not in k and "time" not in k}
        }
        torch.save(found, folder / f"{kind}-{name}-{run.args.process_index}.pt")


def saved(folder, kind):
    """transformers saves no optimizer state of what it split itself: it says so at once."""
    with pytest.raises(ValueError, match="Resuming is not supported"):
        trainer(folder, kind, "k1", save_strategy="steps", save_steps=3.0)
    run = trainer(folder, kind, "k1", max_steps=2, save_strategy="steps", save_steps=2.0, save_only_model=True)
    run.train()
    run.save_model(folder / "final")
    torch.save(outcome(run), folder / f"saved-{run.args.process_index}.pt")


def asked(folder, kind):
    """What is asked of a judge is asked once for a sample, and its answer is both processes'."""
    run = trainer(folder, kind, "k1", at_random, max_steps=2, overwrite_output_dir=True)
    run.train()
    torch.save(outcome(run), folder / f"asked-{run.args.process_index}.pt")


def main(what, folder, kind):
    {"equal": equal, "saved": saved, "asked": asked}[what](Path(folder), kind)


# ---- the tests ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("tp")
    tiny.llama().save_pretrained(made / "llama")
    torch.manual_seed(0)
    transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**LIKE)).save_pretrained(made / "qwen3")
    return made


def run(what, folder, kind):
    start = launch if kind == "tp" else python
    done = start(__file__, what, folder, kind, timeout=500)
    assert done.returncode == 0, [line for line in done.stderr.splitlines() if line.startswith("[rank")] or done.stderr


@pytest.mark.slow
def test_two_processes_with_one_model_are_one(folder):
    for kind in ("tp", "one"):
        run("equal", folder, kind)
    for name in RUNS:
        theirs = torch.load(folder / f"one-{name}-0.pt")
        for rank in (0, 1):
            ours = torch.load(folder / f"tp-{name}-{rank}.pt")
            assert ours["tokens"] == theirs["tokens"], name
            assert ours["episodes"] == theirs["episodes"]
            for parameter, weights in theirs["weights"].items():
                assert (ours["weights"][parameter] - weights).abs().max() < 1e-5, (name, parameter)
            for own, other in zip(ours["logs"], theirs["logs"], strict=True):
                assert own == pytest.approx(other, rel=1e-3, abs=1e-5), name
            assert ours["evaluated"] == pytest.approx(theirs["evaluated"], rel=1e-3, abs=1e-5)


@pytest.mark.slow
def test_what_is_saved_is_whole(folder):
    run("saved", folder, "tp")
    trained = torch.load(folder / "saved-0.pt")["weights"]
    policy = {n: p for n, p in trained.items() if not n.startswith("v_head")}
    for where in ("k1/checkpoint-2", "final"):
        loaded = transformers.LlamaForCausalLM.from_pretrained(folder / where)
        assert tiny.unequal({n: p.detach().double() for n, p in loaded.named_parameters()}, policy) == []


@pytest.mark.slow
def test_a_judge_is_asked_once_for_both(folder):
    run("asked", folder, "tp")
    first, second = (torch.load(folder / f"asked-{rank}.pt") for rank in (0, 1))
    assert tiny.unequal(first["weights"], second["weights"]) == []
    assert first["logs"] == second["logs"]


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave()
