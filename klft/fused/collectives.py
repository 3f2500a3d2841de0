"""Collectives between the ranks that share a vocabulary, for one chunk of tokens.

Two kinds of sharding (klft.sharding): tensor parallel, where all ranks score the same tokens, and data parallel
(`dp_tokens`), where each rank has tokens of its own and a tile holds the tokens of all of them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from klft.sharding import VocabShard


class Collectives:
    """The collectives of one call. Without a shard (None, or a group of one) nothing is sent."""

    def __init__(self, shard: VocabShard | None):
        if shard is not None and shard.world == 1 and (shard.start, shard.stop) != (0, shard.vocab_size):
            raise ValueError(
                f"{shard} leaves out rows of the vocabulary, and its group has no other process to hold them"
            )
        self.shard = None if shard is None or shard.world == 1 else shard
        self.dp_tokens = self.shard is not None and self.shard.own_tokens
        self.ranks = self.shard.world if self.shard is not None and self.dp_tokens else 1  # whose tokens a tile holds

    def agree(self, tokens: int, wants_grad: Sequence[bool], device: torch.device) -> tuple[int, bool]:
        """(most tokens of any rank, whether any rank wants hidden's gradient), so that all make the same tiles.

        wants_grad: whether hidden, weight and bias ask for a gradient here. One all-gather, data-parallel tokens only.
        Raises ValueError, on every rank, where some would run a backward and others not: those would wait for ever;
        and where another rank calls `refuse` instead.
        """
        if self.shard is None or not self.dp_tokens:
            return tokens, wants_grad[0]
        ranks = self.shard.all_gather(torch.tensor([tokens, *wants_grad], device=device)).tolist()
        refused = [rank for rank, (sent, *_) in enumerate(ranks) if sent < 0]
        if refused:
            raise ValueError(f"rank(s) {refused} of the group refused their own input: their errors say why")
        wants = [rank[1:] for rank in ranks]
        if any(map(any, wants)) and not (all(map(any, wants)) and all(w[1:] == wants[0][1:] for w in wants)):
            raise ValueError(
                "over data-parallel ranks all must take part in the backward. Whether hidden, weight and bias require "
                f"a gradient, rank by rank: {[tuple(map(bool, w)) for w in wants]}. Let the head require one on all "
                "ranks or on none, and hidden on all."
            )
        return max(rank[0] for rank in ranks), any(w[0] for w in wants)

    def refuse(self, device: torch.device) -> None:
        """Instead of `agree`, on a rank that raises an error about its input: the others raise too."""
        if self.shard is not None and self.dp_tokens:
            self.shard.all_gather(torch.tensor([-1, 0, 0, 0], device=device))

    def all_gather(self, t: Tensor) -> Tensor:
        """[*] -> [shards, *], in rank order."""
        return t[None] if self.shard is None else self.shard.all_gather(t)

    def all_gather_tokens(self, t: Tensor, chunk_size: int) -> Tensor:
        """All-gather per-token tensors: [tokens, *] -> [ranks * chunk_size, *], zero-padded. No-op unless dp_tokens."""
        if self.shard is None or not self.dp_tokens:
            return t
        padded = t.new_zeros(chunk_size, *t.shape[1:])
        padded[: len(t)] = t
        return self.shard.all_gather(padded).flatten(0, 1)

    def local_tokens(self, t: Tensor, chunk_size: int, tokens: int) -> Tensor:
        """[ranks * chunk_size, *] -> [tokens, *]: this rank's part. No-op unless dp_tokens."""
        if self.shard is None or not self.dp_tokens:
            return t
        start = self.shard.rank * chunk_size
        return t[start : start + tokens]

    def all_gather_factors(self, g: dict[str, Tensor], chunk_size: int) -> dict[str, Tensor]:
        """d loss / d score of this rank's tokens, by score -> of every token of the tile. One collective."""
        if not self.dp_tokens or not g:
            return g
        return dict(
            zip(g, self.all_gather_tokens(torch.stack(list(g.values()), -1), chunk_size).unbind(-1), strict=True)
        )

    def reduce_scatter_tokens(self, t: Tensor, tokens: int) -> Tensor:
        """[ranks * chunk_size, D] -> [tokens, D]: sum over shards of this rank's tokens. No-op unless dp_tokens."""
        if self.shard is None or not self.dp_tokens:
            return t
        return self.shard.reduce_scatter(t)[:tokens]

    def all_reduce_(self, t: Tensor) -> None:
        """Sum over shards, in place, where all ranks have the same tokens (tensor parallel). No-op otherwise."""
        if self.shard is not None and not self.dp_tokens:
            self.shard.all_reduce_(t)
