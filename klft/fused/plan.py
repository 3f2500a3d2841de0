"""FusedPlan: the two models, how tokens and vocabulary rows are cut, the collectives and the backend.

Cutting does not change a result; it decides what lies in memory (a tile) and in the cache (a block).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from klft.fused.collectives import Collectives
from klft.fused.model_side import ModelSide


@dataclass(frozen=True)
class Limits:
    """Upper bounds: logits of one model in a tile, tokens in a chunk (one at least), logits in a block."""

    tile_logits: int
    chunk_tokens: int
    block_logits: int


# Measured in benchmarks/README.md. On a CPU a block stays in a core's cache; on a GPU blocks only bound memory.
LIMITS = {"cpu": Limits(5 << 23, 512, 1 << 18), "gpu": Limits(1 << 28, 1 << 14, 1 << 24)}


@dataclass(frozen=True)
class Geometry:
    """chunks: ranges of this process's tokens, chunk_size the longest. vocab_blocks: ranges of its vocabulary rows.

    With data-parallel tokens all ranks have as many chunks; a rank with fewer tokens has short or empty ones.
    """

    chunk_size: int
    chunks: list[slice]
    block_size: int
    vocab_blocks: list[slice]

    @classmethod
    def cut(cls, tokens: int, rows: int, largest_shard: int, ranks: int, limits: Limits, backend: Any) -> "Geometry":
        """`tokens`: of the rank that has most; `ranks`: whose tokens a tile holds. Chunks are alike on all ranks.

        largest_shard bounds a tile's memory: chunks are cut by it. A head that was cut to fewer ids may have a shard
        that is a little larger than V / world.
        """
        most = max(1, min(limits.tile_logits // max(1, largest_shard), limits.chunk_tokens) // ranks)
        # Equal chunks, not full ones and a remainder: some sizes in between multiply badly.
        chunk_size = -(-tokens // -(-tokens // most)) if tokens else 1
        chunks = [slice(start, start + chunk_size) for start in range(0, tokens, chunk_size)]
        block_size = backend.block_size(chunk_size * ranks, rows, limits.block_logits)
        blocks = [slice(start, min(start + block_size, rows)) for start in range(0, max(1, rows), block_size)]
        return cls(chunk_size, chunks, block_size, blocks)


@dataclass(frozen=True)
class FusedPlan:
    """One call: both models, the sampled tokens, the collectives, the geometry and the backend.

    wants_grad: whether any rank needs the gradient of its hidden states.
    """

    policy: ModelSide
    reference: ModelSide | None
    token_ids: Tensor  # [N], ids of the whole vocabulary
    comm: Collectives
    geometry: Geometry
    backend: Any
    wants_grad: bool

    @property
    def sides(self) -> list[ModelSide]:
        """The policy, and the reference if there is one."""
        return [self.policy] if self.reference is None else [self.policy, self.reference]

    @property
    def chunks(self) -> list[slice]:
        """Ranges of this process's tokens."""
        return self.geometry.chunks

    @property
    def first_row(self) -> int:
        """Token id of this process's first vocabulary row."""
        return 0 if self.comm.shard is None else self.comm.shard.start

    def constants(self, *more: Tensor) -> list[Tensor]:
        """Tensors that must not change before the backward, for save_for_backward, which refuses inference tensors."""
        side = self.reference
        tensors = [self.token_ids, *more] + ([] if side is None else [side.hidden, side.weight, side.bias])
        return [t for t in tensors if t is not None and not t.is_inference()]

    def local(self, t: Tensor, chunk: slice) -> Tensor:
        """A per-token tensor of a tile -> of this process's tokens."""
        return self.comm.local_tokens(t, self.geometry.chunk_size, len(self.token_ids[chunk]))

    def workspaces(self) -> list[Any]:
        """Scratch memory for one pass over the tiles, one per worker."""
        like = self.policy.hidden.new_empty(0, dtype=self.policy.acc_dtype)
        tokens = self.geometry.chunk_size * self.comm.ranks
        return self.backend.workspaces(like, self.geometry.block_size * tokens)

    def for_each_block(self, block_fn: Any, workspaces: list[Any]) -> None:
        """block_fn(block number, workspace) for every vocabulary block; in any order, on any of the workspaces."""
        self.backend.for_each_block(block_fn, len(self.geometry.vocab_blocks), workspaces)

    def free(self) -> None:
        """Release the tiles' memory."""
        for side in self.sides:
            side.free()


def make_plan(
    policy: ModelSide,
    reference: ModelSide | None,
    token_ids: Tensor,
    comm: Collectives,
    backend: Any,
    wants_grad: Sequence[bool],
    limits: Limits | None = None,
) -> FusedPlan:
    """Cut the work; wants_grad: of hidden, weight and bias, here.

    With data-parallel tokens one collective: every rank must make as many tiles as the others.
    """
    device = token_ids.device
    tokens, any_wants_grad = comm.agree(len(token_ids), wants_grad, device)
    rows = len(policy.weight)
    largest_shard = max(1, rows if comm.shard is None else -(-comm.shard.vocab_size // comm.shard.world))
    limits = limits or LIMITS["cpu" if device.type == "cpu" else "gpu"]
    geometry = Geometry.cut(tokens, rows, largest_shard, comm.ranks, limits, backend)
    return FusedPlan(policy, reference, token_ids, comm, geometry, backend, any_wants_grad)
