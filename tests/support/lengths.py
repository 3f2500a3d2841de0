"""Prompts whose greedy completions are short on one process and long on the other."""

from typing import Any

import torch
from datasets import Dataset

from support import tiny


def lengths_of_greedy_completions(prompts: list[str], most: int) -> torch.Tensor:
    """Tokens of each, up to and with the end."""
    model: Any
    model, tokenizer = tiny.llama().eval(), tiny.tokenizer()
    ids = torch.tensor([tokenizer(p)["input_ids"] for p in prompts])
    out = model.generate(ids, do_sample=False, max_new_tokens=most, attention_mask=torch.ones_like(ids))[:, 2:]
    ended = (out == tiny.EOS).long()
    return torch.where(ended.any(1), ended.argmax(1) + 1, most)


def short_and_long(rollouts: int = 3) -> Dataset:
    """Prompts in an order that gives the first process completions of one token, the second those that run on."""
    every = [f"w{a} w{b}" for a in range(26) for b in range(26)]
    lengths = lengths_of_greedy_completions(every, 6)
    short = [p for p, n in zip(every, lengths, strict=True) if n == 1][: 4 * rollouts]
    long = [p for p, n in zip(every, lengths, strict=True) if n == 6][: 4 * rollouts]
    assert len(short) == len(long) == 4 * rollouts
    order = [p for i in range(rollouts) for p in short[4 * i : 4 * i + 4] + long[4 * i : 4 * i + 4]]
    return Dataset.from_dict({"prompt": order})
