"""Scoring and training of a PPOTrainer on completions of very different lengths, side by side: ratios of tokens/second.

    python benchmarks/ppo.py [--rounds 3] [--rows 32] [--lengths exponential] [--estimator k1] [--contenders budget]

A llama of hidden size 256 with 4 layers and V = 32,768, fp32. Nothing is generated: completions of 8 ... 256
tokens are drawn, log-uniform or 8 and an exponential with a mean of 32, prompts of 8 ... 32, and all contenders get the
same. They take turns in one process, after a round that does not count; medians of the rounds' ratios of CPU time. A
token is one of a completion, once per rollout.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from klft import FrozenReference, PPOConfig, PPOTrainer
from klft.generation import Completions

VOCAB_SIZE, PAD, EOS = 32_768, 0, 1
PROMPT, COMPLETION = (8, 32), (8, 256)  # tokens
BUDGET = 8 * (PROMPT[1] + COMPLETION[1])  # of a forward pass: what 8 padded rows take
CONTENDERS: dict[str, dict[str, Any]] = {
    "padded": {},  # rows as they come, padded to the rollout's longest: until klft 0.2
    "trimmed": {},  # scored by length; micro-batches without their common padding
    "budget": {"tokens_per_micro_batch": BUDGET},
}


def llama(seed: int) -> LlamaForCausalLM:
    """A small body under a head of 32,768 ids."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=512, bos_token_id=None, eos_token_id=EOS, pad_token_id=PAD,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def tokenizer() -> PreTrainedTokenizerFast:
    """Every word is <eos>: texts are not looked at."""
    inner = Tokenizer(models.WordLevel({"<pad>": PAD, "<eos>": EOS}, unk_token="<eos>"))
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")


def drawn_completions(rows: int, seed: int, kind: str) -> Completions:
    """Random ids; completions' lengths of a kind, prompts' uniform."""
    generator = torch.Generator().manual_seed(seed)
    drawn, (shortest, longest) = torch.rand(rows, generator=generator), COMPLETION
    lengths = shortest * (longest / shortest) ** drawn if kind == "log-uniform" else shortest - 32 * drawn.log()
    lengths = lengths.round().long().clamp(max=longest)
    prompts = torch.randint(PROMPT[0], PROMPT[1] + 1, (rows,), generator=generator)
    lengths[0], prompts[0] = COMPLETION[1], PROMPT[1]  # one of full length, as a rollout usually has
    prompt_mask = torch.arange(PROMPT[1]) >= PROMPT[1] - prompts[:, None]
    mask = torch.arange(COMPLETION[1]) < lengths[:, None]
    ids = torch.randint(2, VOCAB_SIZE, (rows, PROMPT[1] + COMPLETION[1]), generator=generator)
    return Completions(ids[:, : PROMPT[1]] * prompt_mask, prompt_mask, ids[:, PROMPT[1] :] * mask, mask)


def trainer(name: str, args: argparse.Namespace, folder: str) -> PPOTrainer:
    """One of CONTENDERS: a rollout per call of train, two epochs of one minibatch each."""
    config = PPOConfig(
        output_dir=folder, per_device_train_batch_size=8, gradient_accumulation_steps=args.rows // 8,
        num_ppo_epochs=2, max_steps=2, max_completion_length=COMPLETION[1], kl_estimator=args.estimator,
        report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True, use_cpu=True, self_test=False,
        overwrite_output_dir=True, learning_rate=1e-5, **CONTENDERS[name],
    )  # fmt: skip
    return PPOTrainer(
        llama(0), reward_funcs=lambda completion_ids, **_: [len(ids) / 256 for ids in completion_ids], args=config,
        train_dataset=Dataset.from_dict({"prompt": ["<eos>"] * args.rows}), processing_class=tokenizer(),
        reference=FrozenReference(llama(1)),
    )  # fmt: skip


@contextmanager
def as_contender(name: str, completions: Completions) -> Iterator[None]:
    """Completions are given instead of sampled; "padded" sorts and trims nothing."""

    def in_order(rows: Completions, count: int) -> list[list[int]]:
        return [part.tolist() for part in torch.arange(len(rows.mask)).chunk(count)]

    given = (completions, torch.ones(len(completions.mask), dtype=torch.bool))
    with patch("klft.ppo.collector.sample_completions", lambda *_: given):
        if name != "padded":
            yield
            return
        with (
            patch("klft.ppo.rollout.split_by_length", in_order),
            patch.object(Completions, "trimmed", lambda c: c),
        ):
            yield


def seconds(name: str, made: PPOTrainer, completions: Completions) -> float:
    """CPU time of one rollout's scoring and of its two optimizer steps: wall time says who else was on the machine."""
    with as_contender(name, completions):
        start = time.process_time()
        made.train()
        return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=32, help="of a rollout, a multiple of 8, at least 16")
    parser.add_argument("--estimator", default="k1")
    parser.add_argument("--lengths", default="log-uniform", choices=["log-uniform", "exponential"])
    parser.add_argument("--contenders", nargs="+", default=["trimmed", "budget"], choices=["trimmed", "budget"])
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        trainers = {name: trainer(name, args, f"{folder}/{name}") for name in ("padded", *args.contenders)}
        rates: dict[str, list[float]] = {name: [] for name in trainers}
        for i in range(1 + args.rounds):
            completions = drawn_completions(args.rows, i, args.lengths)
            tokens = int(completions.mask.sum())
            for name, made in trainers.items():
                rates[name].append(tokens / seconds(name, made, completions))
            last = {name: round(rate[-1], 1) for name, rate in rates.items()}
            print(f"round {i}, {tokens} tokens; tokens/second: {last}", flush=True)
    for name, rate in rates.items():
        ratios = [mine / padded for mine, padded in zip(rate[1:], rates["padded"][1:], strict=True)]
        print(f"{name:8s} {statistics.median(ratios):5.2f} x padded ({min(ratios):.2f} ... {max(ratios):.2f})")


if __name__ == "__main__":
    main()
