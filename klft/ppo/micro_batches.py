"""Micro-batches of rows of like length: what is padding in a rollout is neither scored nor trained on.

A row is a prompt and its completion. Prompts are padded on the left and completions on the right, so the padded size of
a micro-batch is rows * (longest prompt + longest completion). Rows are sorted by length and cut where they lie.
"""

from bisect import bisect_left
from collections.abc import Sequence

from klft.generation import Completions

Lengths = tuple[int, int]
"""Tokens of a row: (prompt, completion)."""


def sorted_by_length(rows: Completions) -> tuple[list[int], list[Lengths]]:
    """(indices of the rows, their lengths), longest first: what does not fit in memory shows at once.

    By prompts or by completions, whichever differ more: the others are padded within a micro-batch.
    """
    lengths = list(zip(rows.prompt_mask.sum(-1).tolist(), rows.mask.sum(-1).tolist(), strict=True))
    by_prompt, by_completion = (max(column) - min(column) for column in zip(*lengths, strict=True))
    first = int(by_completion >= by_prompt)
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i][first], lengths[i][1 - first]), reverse=True)
    return order, [lengths[i] for i in order]


def cuts_within(lengths: Sequence[Lengths], budget: int) -> list[int]:
    """Where each micro-batch starts, if they are as few as have a padded size of at most `budget` tokens.

    Rows stay in their order. One that is longer than the budget is a micro-batch of its own.
    """
    starts, prompt, completion = [0], 0, 0
    for i, (p, c) in enumerate(lengths):
        prompt, completion = max(prompt, p), max(completion, c)
        if i > starts[-1] and (i + 1 - starts[-1]) * (prompt + completion) > budget:
            starts.append(i)
            prompt, completion = p, c
    return starts


def count_within(rows: Completions, budget: int) -> int:
    """How many micro-batches of at most `budget` tokens, padding included, the rows make."""
    return len(cuts_within(sorted_by_length(rows)[1], budget))


def split_by_length(rows: Completions, count: int) -> list[list[int]]:
    """Indices of the rows in exactly `count` micro-batches (at most one per row); the largest is as small as can be.

    Ranks that agree on `count` run as many forwards and backwards as each other, whatever their rows' lengths.
    """
    order, lengths = sorted_by_length(rows)
    widest = max(p for p, _ in lengths) + max(c for _, c in lengths)
    budget = bisect_left(range(len(order) * widest), True, key=lambda b: len(cuts_within(lengths, b)) <= count)
    starts = cuts_within(lengths, budget)
    groups = [order[start:end] for start, end in zip(starts, [*starts[1:], len(order)], strict=True)]
    while len(groups) < count:  # another rank has longer rows
        i = max(range(len(groups)), key=lambda i: len(groups[i]))
        half = len(groups[i]) // 2
        groups[i : i + 1] = [groups[i][:half], groups[i][half:]]
    return groups
