"""A whole PPO step beside its floor and beside TRL: episodes per second, and peak memory.

    python benchmarks/ppo_step.py [--rounds 3] [--trl FOLDER] [--vocab 512 32768] [--phases] [--card]

Contenders: klft's PPOTrainer (k1 in the reward); the floor, a plain loop of transformers that generates, scores and
trains likewise, from dense logits, with no reference and no KL; and TRL's experimental PPOTrainer, from a FOLDER where
`pip install --no-deps --target FOLDER "trl==1.12.*"` put it. "+vm": with a value model of the policy's size, which is
the only way TRL has, instead of a value head. All have the same llama (hidden size 256, 4 layers, fp32), AdamW,
clipping, 16 prompts of 16 tokens a rollout, 64 new tokens, micro-batches of 8 and 2 epochs of one minibatch; a
completion ends early by chance only. Each runs in a process of its own, in turn: the first rollout does not count, the
next ones are timed; memory is what the process had at its peak above what it had after its imports. --phases: in which
phase klft and the floor have most, sampled. --card: on a GPU, in bf16 autocast, with hidden size 1024, 12 layers, 64
prompts, 128 new tokens and micro-batches of 16; memory is then that of the CUDA allocator.
"""

import argparse
import importlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

PAD, EOS = 0, 1
CARD = "--card" in sys.argv
PROMPT, EPOCHS = 16, 2
NEW, ROWS, MICRO, HIDDEN, LAYERS = (128, 64, 16, 1024, 12) if CARD else (64, 16, 8, 256, 4)
DEVICE = torch.device("cuda" if CARD else "cpu")
ROLLOUTS = 3  # one of them to warm up


def config(vocab_size: int, hidden_size: int = HIDDEN, layers: int = LAYERS) -> LlamaConfig:
    """A small body."""
    return LlamaConfig(
        vocab_size=vocab_size, hidden_size=hidden_size, intermediate_size=4 * hidden_size, num_hidden_layers=layers,
        num_attention_heads=max(hidden_size // 64, 1), num_key_value_heads=max(hidden_size // 64, 1),
        max_position_embeddings=512, bos_token_id=None, eos_token_id=EOS, pad_token_id=PAD,
    )  # fmt: skip


def policy(vocab_size: int, seed: int = 0) -> LlamaForCausalLM:
    """The policy, or the reference with another seed."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(config(vocab_size))


def critic(vocab_size: int, hidden_size: int = HIDDEN, layers: int = LAYERS) -> LlamaForSequenceClassification:
    """A value model of the policy's size, or a smaller one."""
    torch.manual_seed(2)
    one_output = config(vocab_size, hidden_size, layers)
    one_output.num_labels = 1
    return LlamaForSequenceClassification(one_output)


def tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """One id per word."""
    words = {"<pad>": PAD, "<eos>": EOS} | {f"w{i}": i for i in range(2, vocab_size)}
    inner = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )  # fmt: skip


def prompt_ids() -> list[list[int]]:
    """Those of a rollout, all of one length."""
    return torch.randint(2, 512, (ROWS, PROMPT), generator=torch.Generator().manual_seed(3)).tolist()


class Clock(TrainerCallback):
    """(wall, CPU) seconds at the end of every optimizer step, as the trainers count these."""

    def __init__(self, phase: "Sampler"):
        self.marks: list[tuple[float, float]] = []
        self.phase = phase

    def mark(self) -> None:
        """Now."""
        if CARD:
            torch.cuda.synchronize()
        self.marks.append((time.perf_counter(), time.process_time()))
        if len(self.marks) == EPOCHS * (ROLLOUTS - 1):  # of which only the last rollout's are said
            self.phase.seconds.clear()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Called by the trainers."""
        self.mark()

    def per_rollout(self) -> list[float]:
        """Wall and CPU seconds of a rollout, without the first."""
        steps = len(self.marks) // ROLLOUTS
        first, last = self.marks[steps - 1], self.marks[-1]
        return [(b - a) / (ROLLOUTS - 1) for a, b in zip(first, last, strict=True)]


# --- contenders ------------------------------------------------------------------------------------------------------


class Sampler:
    """Seconds by phase; what the process holds, every 2 ms, and its most by phase."""

    def __init__(self):
        self.phase, self.most, self.base = "other", {}, 0.0
        self.seconds: dict[str, float] = defaultdict(float)
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        """From here on, relative to what is held now."""
        self.base = held()
        self._thread.start()

    def _run(self) -> None:
        while True:
            self.most[self.phase] = max(self.most.get(self.phase, 0.0), held() - self.base)
            time.sleep(0.002)

    @contextmanager
    def __call__(self, name: str):
        """Around a phase."""
        before, self.phase, start = self.phase, name, time.perf_counter()
        yield
        if CARD:
            torch.cuda.synchronize()
        self.phase = before
        self.seconds[name] += time.perf_counter() - start


def held() -> float:
    """MiB resident now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def run_klft(vocab_size: int, value_model: bool, folder: str, clock: Clock, phase: Sampler) -> None:
    """klft's PPOTrainer."""
    from klft import FrozenReference, PPOConfig, PPOTrainer
    from klft.ppo.phases import Phases

    args = PPOConfig(
        output_dir=folder, per_device_train_batch_size=MICRO, gradient_accumulation_steps=ROWS // MICRO,
        num_ppo_epochs=EPOCHS, max_steps=EPOCHS * ROLLOUTS, max_completion_length=NEW, report_to="none",
        save_strategy="no", logging_steps=EPOCHS, disable_tqdm=True, use_cpu=not CARD, bf16=CARD,
        learning_rate=1e-5,
    )  # fmt: skip
    texts = [" ".join(f"w{i}" for i in ids) for ids in prompt_ids()]
    trainer = PPOTrainer(
        policy(vocab_size), reward_funcs=lambda completion_ids, **_: [ids[0] / vocab_size for ids in completion_ids],
        args=args, train_dataset=Dataset.from_dict({"prompt": texts}), processing_class=tokenizer(vocab_size),
        reference=FrozenReference(policy(vocab_size, 1)), value_model=critic(vocab_size) if value_model else None,
        callbacks=[clock],
    )  # fmt: skip
    original = Phases.__call__

    @contextmanager
    def seen(self: Phases, name: str, device: torch.device):
        with phase(name), original(self, name, device):
            yield

    with patch.object(Phases, "__call__", seen), patch("torch.cuda.reset_peak_memory_stats"):
        trainer.train()


def run_trl(vocab_size: int, value_model: bool, folder: str, clock: Clock, _: Sampler) -> None:
    """TRL's: a reward model is asked for, so it gets one of hidden size 16 and one layer."""
    from trl.experimental.ppo import PPOConfig, PPOTrainer  # pyright: ignore

    assert value_model
    args = PPOConfig(
        output_dir=folder, per_device_train_batch_size=MICRO, gradient_accumulation_steps=ROWS // MICRO,
        num_ppo_epochs=EPOCHS, total_episodes=ROWS * ROLLOUTS, response_length=NEW, report_to="none",
        save_strategy="no", disable_tqdm=True, use_cpu=not CARD, learning_rate=1e-5, temperature=1.0, bf16=CARD,
        gradient_checkpointing=os.environ.get("KLFT_BENCH_CHECKPOINTING") == "1", num_sample_generations=0,
    )  # fmt: skip
    PPOTrainer(
        args, tokenizer(vocab_size), model=policy(vocab_size), ref_model=policy(vocab_size, 1),
        reward_model=critic(vocab_size, 16, 1),
        value_model=critic(vocab_size), train_dataset=Dataset.from_dict({"input_ids": prompt_ids()}),
        eval_dataset=Dataset.from_dict({"input_ids": prompt_ids()[:1]}), callbacks=[clock],
    ).train()  # fmt: skip


class Floor:
    """What a PPO step cannot do without: generation, one forward to score, and the epochs."""

    def __init__(self, vocab_size: int, value_model: bool):
        self.policy = policy(vocab_size).to(DEVICE)
        self.critic = (critic(vocab_size) if value_model else torch.nn.Linear(HIDDEN, 1)).to(DEVICE)
        self.parameters = [*self.policy.parameters(), *self.critic.parameters()]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-5, fused=True)
        self.sampling = GenerationConfig(
            max_new_tokens=NEW, do_sample=True, top_k=0, eos_token_id=EOS, pad_token_id=PAD
        )

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """(log-probabilities, values), [B, C] each."""
        new = ids.shape[1] - PROMPT
        whole = isinstance(self.critic, LlamaForSequenceClassification)
        output = self.policy(input_ids=ids, logits_to_keep=new + 1, output_hidden_states=not whole, use_cache=False)
        logits = output.logits[:, :-1]
        logps = -torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, PROMPT:], reduction="none")
        if isinstance(self.critic, LlamaForSequenceClassification):
            states = self.critic.model(input_ids=ids, use_cache=False).last_hidden_state
            values = self.critic.score(states)
        else:
            values = self.critic(output.hidden_states[-1])
        return logps, values[:, PROMPT - 1 : -1, 0]

    def rollout(self, clock: Clock, phase: Sampler) -> None:
        """One rollout and its two optimizer steps."""
        prompts = torch.tensor(prompt_ids(), device=DEVICE)
        with torch.no_grad(), phase("generate"):
            model: Any = self.policy  # transformers' types hide its own generate
            ids = model.generate(prompts, generation_config=self.sampling)
        with torch.no_grad(), phase("score"):
            parts = [self.forward(part) for part in ids.split(MICRO)]
            old, values = (torch.cat(side) for side in zip(*parts, strict=True))
        returns = (ids[:, PROMPT] / self.policy.config.vocab_size)[:, None].expand_as(values)
        advantages = returns - values
        for _ in range(EPOCHS):
            for rows in torch.randperm(len(ids)).split(MICRO):
                with phase("train"):
                    logps, now = self.forward(ids[rows])
                    ratio, a = (logps - old[rows]).exp(), advantages[rows]
                    surrogate = torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a).mean()
                    (0.05 * (now - returns[rows]).square().mean() - surrogate / 2).backward()
            torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            clock.mark()


def run_floor(vocab_size: int, value_model: bool, _folder: str, clock: Clock, phase: Sampler) -> None:
    """The plain loop."""
    floor = Floor(vocab_size, value_model)
    for _ in range(ROLLOUTS):
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=CARD):
            floor.rollout(clock, phase)


RUNS: dict[str, Callable[[int, bool, str, Clock, Sampler], None]] = {
    "klft": run_klft, "floor": run_floor, "trl": run_trl,
}  # fmt: skip


# --- one process, and those that start it ----------------------------------------------------------------------------


def child(name: str, vocab_size: int, threads: int, phases: bool) -> None:
    """One contender: prints seconds and MiB as JSON."""
    torch.set_num_threads(threads)
    kind, _, value_model = name.partition("+")
    if kind != "floor":  # what RUNS imports, before the first look at the memory
        importlib.import_module({"klft": "klft.ppo.trainer", "trl": "trl.experimental.ppo.ppo_trainer"}[kind])
    base, phase = held(), Sampler()
    clock = Clock(phase)
    if phases:
        phase.start()
    with tempfile.TemporaryDirectory() as folder:
        RUNS[kind](vocab_size, bool(value_model), folder, clock, phase)
    wall, cpu = clock.per_rollout()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - base  # Linux: KiB
    if CARD:
        peak = torch.cuda.max_memory_allocated() / 2**20
    most = {key: round(value) for key, value in phase.most.items()}
    seconds = {key: round(value, 3) for key, value in phase.seconds.items()}
    result = {"wall": wall, "cpu": cpu, "peak": peak, "phases": most, "seconds": seconds}
    print("RESULT " + json.dumps(result), flush=True)


def measured(name: str, vocab_size: int, args: argparse.Namespace) -> dict[str, Any]:
    """What a fresh process says of one contender."""
    command = [sys.executable, __file__, "--child", name, "--vocab", str(vocab_size), "--threads", str(args.threads)]
    command += ["--card"] * CARD
    paths = [args.trl] if name.startswith("trl") else []
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")]), "TRL_EXPERIMENTAL_SILENCE": "1",
    }  # fmt: skip
    if args.phases:  # else glibc keeps what is freed, and every phase has the most of those before
        command, environment = [*command, "--phases"], environment | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not found:
        raise SystemExit(f"{name}, V {vocab_size}: {done.stderr[-3000:]}")
    return json.loads(found[0].removeprefix("RESULT "))


def spread(ratios: list[float]) -> str:
    """Median and range."""
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} ... {max(ratios):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--vocab", type=int, nargs="+", default=[512, 32_768])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--trl", help="folder with TRL 1.12")
    parser.add_argument("--card", action="store_true", help="on a GPU")
    parser.add_argument("--phases", action="store_true", help="also sample memory by phase")
    parser.add_argument("--contenders", nargs="+", default=["klft", "floor", "klft+vm", "floor+vm"])
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(args.child, args.vocab[0], args.threads, args.phases)
    names = [*args.contenders, *(["trl+vm"] if args.trl else [])]
    for vocab_size in args.vocab:
        rounds: list[dict[str, dict[str, Any]]] = []
        for i in range(args.rounds):
            rounds.append({})
            for name in names:
                rounds[-1][name] = measured(name, vocab_size, args)
                print(f"V {vocab_size}, round {i}, {name}: {json.dumps(rounds[-1][name])}", flush=True)
        for mine, other in [("klft", "floor"), ("klft+vm", "floor+vm"), ("klft+vm", "trl+vm"), ("klft", "trl+vm")]:
            if not {mine, other} <= set(names):
                continue
            ratio = {key: [r[other][key] / r[mine][key] for r in rounds] for key in ("cpu", "wall", "peak")}
            peak = [1 / value for value in ratio["peak"]]
            print(
                f"V {vocab_size}, {mine} over {other}: episodes/second x {spread(ratio['cpu'])} by CPU time, "
                f"{spread(ratio['wall'])} by the clock; peak memory x {spread(peak)}",
                flush=True,
            )


if __name__ == "__main__":
    main()
