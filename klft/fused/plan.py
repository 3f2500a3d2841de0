"""Two models' hidden states and heads, cut into tiles; collectives and accumulation."""

import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from klft.fused import torch_backend, workers
from klft.fused.model_side import Gradients, Side
from klft.fused.torch_backend import ROOM
from klft.sharding import VocabShard

if TYPE_CHECKING:
    from klft.fused.tile import Tile


class Problem:
    """Two models' hidden states and heads, cut into tiles of so many logits (of one model) and tokens at most."""

    def __init__(
        self,
        policy: Side,
        reference: Side | None,
        token_ids: Tensor,
        shard: VocabShard | None,
        elements: int,
        tokens: int,
        slice_elements: int | None,
        wants: bool,
        backend: Any = torch_backend,
    ):
        self.policy, self.reference, self.ids, self.backend = policy, reference, token_ids, backend
        self.shard = None if shard is None or shard.world == 1 else shard
        self.apart = self.shard is not None and self.shard.own_tokens
        n, ranks, self.wants = len(token_ids), 1, wants
        if self.apart:
            # Ranks meet in the same collectives: as many tiles, and hidden's gradient if one of them wants it.
            assert self.shard is not None
            most = self.shard.gather(torch.tensor([n, wants], device=token_ids.device)).amax(0).tolist()
            n, ranks, self.wants = most[0], self.shard.world, bool(most[1])
        rows = max(1, len(policy.weight))
        if self.shard is not None:
            rows = max(1, -(-self.shard.vocab_size // self.shard.world))  # every rank must cut alike
        most = max(1, min(elements // rows, tokens) // ranks)
        self.size = -(-n // -(-n // most)) if n else 1  # tiles alike, not full ones and a rest
        self.chunks = [slice(start, start + self.size) for start in range(0, n, self.size)]
        held = len(policy.weight)
        jobs = workers.count() if token_ids.device.type == "cpu" else 1
        self.tokens, self.sliced = self.size * ranks, slice_elements is not None  # tokens of a tile
        slices = 1 if slice_elements is None else -(-held // max(1, slice_elements // self.tokens))
        if slices > 1:
            slices = -(-slices // jobs) * jobs  # a like number for every thread
        self.step = max(1, -(-held // max(1, slices)))
        self.slices = [slice(start, min(start + self.step, held)) for start in range(0, max(1, held), self.step)]
        share = -(-len(self.slices) // jobs)
        self.parts = [range(len(self.slices))[start : start + share] for start in range(0, len(self.slices), share)]

    def constants(self, *more: Tensor) -> list[Tensor]:
        """The ids, the reference's tensors and more, as far as autograd can see whether one changes."""
        side = self.reference
        found = [self.ids, *more] + ([] if side is None else [side.hidden, side.weight, side.bias])
        return [t for t in found if t is not None and not t.is_inference()]

    def free(self) -> None:
        """Give the tiles' memory back."""
        for side in self.sides:
            side.free()

    @property
    def sides(self) -> list[Side]:
        """The models at hand."""
        return [self.policy] if self.reference is None else [self.policy, self.reference]

    def each(self, job: Callable[[range, Tensor | None], Any]) -> list[Any]:
        """job(part, room for intermediate results) for every part of the slices, each in a thread of its own."""
        hidden, numbers = self.policy.hidden, self.slices[0].stop * self.tokens

        def run(part: range) -> Any:
            room = hidden.new_empty(ROOM, numbers, dtype=self.policy.wide) if self.sliced else None
            # Autocast has had its say about the inputs; it must not round what is multiplied or summed inside.
            with torch.autocast(hidden.device.type, enabled=False):
                return job(part, room)

        return workers.each(run, self.parts)

    def everyones(self, t: Tensor) -> Tensor:
        """My tokens' tensor [n, *]; with everyone's beside it [W * size, *] if ranks have tokens of their own."""
        if not self.apart:
            return t
        assert self.shard is not None
        padded = t.new_zeros(self.size, *t.shape[1:])
        padded[: len(t)] = t
        return self.shard.gather(padded).flatten(0, 1)

    def mine(self, t: Tensor, rows: slice) -> Tensor:
        """[W * n] of a tile -> my tokens' part."""
        if not self.apart:
            return t
        assert self.shard is not None
        start = self.shard.rank * self.size
        return t[start : start + len(self.ids[rows])]

    def factors(self, g: dict[str, Tensor]) -> dict[str, Tensor]:
        """Factors for my tokens of a tile -> for every token of it."""
        if not self.apart or not g:
            return g
        return dict(zip(g, self.everyones(torch.stack(list(g.values()), -1)).unbind(-1), strict=True))

    def new_gradients(self, hidden: bool, weight: bool, bias: bool) -> Gradients:
        """Zeros to accumulate into."""
        side = self.policy

        def zeros(like: Tensor | None, wanted: bool) -> Tensor | None:
            return torch.zeros_like(like, dtype=side.wide) if wanted and like is not None else None

        hidden |= self.apart and self.wants
        fresh = weight and not side.weight.is_cuda
        of_weight = torch.empty_like(side.weight, dtype=side.wide) if fresh else zeros(side.weight, weight)
        return Gradients(zeros(side.hidden, hidden), of_weight, zeros(side.bias, bias), fresh)

    def send_back(
        self,
        tile: "Tile",
        gradient: Callable[[range, Tensor | None], Iterator[Tensor]],
        rows: slice,
        grads: Gradients,
        dead: Tensor,
    ) -> None:
        """A logit gradient, slice after slice through the head.

        `dead` [n]: tokens that get no gradient, whose hidden states may be NaN or infinite.
        """
        hidden = tile.hidden[0]
        if bool(dead.any()):
            hidden = hidden.masked_fill(dead[:, None], 0.0)  # 0 * NaN would reach the weight's gradient

        def back(part: range, room: Tensor | None) -> Tensor | None:
            dh = None
            for i, dz in zip(part, gradient(part, room), strict=True):
                dh = self.policy.back(dz, self.slices[i], hidden, grads, dh)
            return dh

        dh = self.each(back)
        grads.fresh = False
        if grads.hidden is None:
            return
        dh = functools.reduce(torch.add, dh)
        if self.apart:
            assert self.shard is not None
            dh = self.shard.sum_of_mine(dh)[: len(self.ids[rows])]
        grads.hidden[rows] = dh

    def finish(self, grads: Gradients) -> None:
        """What has to wait for the last tile: every rank's rows of the vocabulary add to hidden's gradient."""
        if grads.fresh and grads.weight is not None:
            grads.weight.zero_()  # no tile had a gradient
        if self.shard is not None and not self.apart and grads.hidden is not None:
            self.shard.sum(grads.hidden)
