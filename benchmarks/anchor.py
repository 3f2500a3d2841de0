"""The step of an SFTTrainer with and without the KL anchor, side by side: ratios of time and of peak memory.

    python benchmarks/anchor.py [--rounds 5] [--hidden 256] [--batch 4] [--length 128]

A llama with a small body and V = 151,936, so that the heads decide; fp32 on a CPU, bf16 autocast on a GPU. Time: both
trainers in one process in turn, medians of the rounds' ratios. Memory: each in a process of its own, from before the
model is made; the anchored one is compared with the plain one plus the reference's weights.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

from klft import FixedKL, FrozenReference, KLPenalty
from klft.integrations import KLAnchorMixin

CUDA = torch.cuda.is_available()
VOCAB_SIZE = 151_936
CONTENDERS = ("plain", "forward", "reverse", "forward logged")  # logged: a step before a log, with all scores


class AnchoredSFT(KLAnchorMixin, SFTTrainer):
    """SFT with a KL anchor."""


def llama(hidden: int) -> LlamaForCausalLM:
    """The same weights whenever it is called."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=2048, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def trainer(name: str, args: argparse.Namespace, folder: str) -> Any:
    """A trainer on random texts of one length; `name`: one of CONTENDERS."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    rows = torch.randint(2, VOCAB_SIZE, (args.batch * 64, args.length), generator=torch.Generator().manual_seed(1))
    config = SFTConfig(
        output_dir=folder, per_device_train_batch_size=args.batch, max_steps=1, report_to="none", bf16=CUDA,
        save_strategy="no", disable_tqdm=True, logging_steps=1,
        logging_strategy="steps" if name.endswith("logged") else "no", use_cpu=not CUDA, gradient_checkpointing=False,
        max_length=args.length, loss_type="nll", optim="adamw_torch",
    )  # fmt: skip
    inner = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    more: dict[str, Any] = {
        "args": config, "train_dataset": Dataset.from_dict({"input_ids": rows.tolist(), "labels": rows.tolist()}),
        "processing_class": PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>"),
    }  # fmt: skip
    if name == "plain":
        return SFTTrainer(llama(args.hidden), **more)
    penalty = KLPenalty(
        FrozenReference(llama(args.hidden)), direction=name.split()[0], estimator="exact", placement="loss",
        controller=FixedKL(0.1),
    )  # fmt: skip
    return AnchoredSFT(llama(args.hidden), penalty=penalty, self_test=False, **more)


def step_of(made: Any) -> Any:
    """One optimizer step of a trainer that has been set up by a step of its own."""
    made.train()
    batch = made._prepare_inputs(next(iter(made.get_train_dataloader())))
    count = (batch["labels"][:, 1:] != -100).sum()

    def step() -> None:
        made.training_step(made.model, dict(batch), count)
        made.optimizer.step()
        made.optimizer.zero_grad()
        if CUDA:
            torch.cuda.synchronize()

    return step


def race(args: argparse.Namespace) -> None:
    """Median ratios of the rounds, by the clock and, on a CPU, by the seconds that the cores were busy."""
    with tempfile.TemporaryDirectory() as folder:
        steps = {name: step_of(trainer(name, args, folder)) for name in CONTENDERS}
    clocks = {"clock": time.perf_counter} | ({} if CUDA else {"busy cores": time.process_time})
    ratios: dict[tuple[str, str], list[float]] = {}
    for number in range(args.rounds + 1):
        taken = {}
        for name, step in steps.items():
            starts = {clock: now() for clock, now in clocks.items()}
            step()
            taken |= {(name, clock): now() - starts[clock] for clock, now in clocks.items()}
        for (name, clock), seconds in taken.items():
            if number and name != "plain":  # the first round warms up
                ratios.setdefault((name, clock), []).append(seconds / taken["plain", clock])
        print(f"  round {number}: {', '.join(f'{n} {t:.2f} s ({c})' for (n, c), t in taken.items())}", file=sys.stderr)
    for (name, clock), values in ratios.items():
        print(f"{name} KL in the loss: a step takes {statistics.median(values):.2f} x the plain one, by the {clock}")


def peak(name: str, args: argparse.Namespace) -> float:
    """Bytes at the peak of two steps, beyond what the imports take."""
    with open("/proc/self/status") as status:
        before = int(next(line for line in status if line.startswith("VmRSS")).split()[1]) * 1024
    with tempfile.TemporaryDirectory() as folder:
        step = step_of(trainer(name, args, folder))
        step()
    if CUDA:
        return float(torch.cuda.max_memory_allocated())
    with open("/proc/self/status") as status:
        return int(next(line for line in status if line.startswith("VmHWM")).split()[1]) * 1024 - before


def memory(args: argparse.Namespace) -> None:
    """Each contender in a process of its own."""
    sizes = [f"--{name}={getattr(args, name)}" for name in ("hidden", "batch", "length")]
    peaks = {}
    for name in ("plain", "forward"):
        done = subprocess.run([sys.executable, __file__, "--peak", name, *sizes], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr)
        peaks[name] = float(done.stdout.split()[-1])
    body = sum(p.numel() * p.element_size() for p in llama(args.hidden).parameters())
    mebibyte = 2**20
    print(
        f"peak memory: plain {peaks['plain'] / mebibyte:.0f} MiB, anchored {peaks['forward'] / mebibyte:.0f} MiB, the "
        f"reference's weights {body / mebibyte:.0f} MiB: {peaks['forward'] / (peaks['plain'] + body):.3f} x their sum"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"rounds": 5, "hidden": 256, "batch": 4, "length": 128}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--peak", help=argparse.SUPPRESS)  # how `memory` calls this file again
    args = parser.parse_args()
    if args.peak:
        print(peak(args.peak, args))
        return
    where = "a GPU" if CUDA else "a CPU"
    print(f"hidden {args.hidden}, {args.batch} texts of {args.length} tokens, V {VOCAB_SIZE:,}, on {where}")
    memory(args)
    race(args)


if __name__ == "__main__":
    main()
