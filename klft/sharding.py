"""VocabShard: which rows of a vocabulary head live on this process, and the collectives over its group.

Two ways to shard the vocabulary over W processes:

- tensor parallel (`own_tokens=False`): every process has the same hidden states and V/W rows, hence N * V/W logits:
  a real saving.
- data parallel (`own_tokens=True`): every process has tokens of its own and V/W rows; hidden states are
  all-gathered, gradients reduce-scattered. That saves the head's memory, not the logits': tiles save those.

Per tile of tokens two small all-gathers (the shards' log-sum-exps, then their sums), and with own_tokens the tokens'
hidden states: klft/fused/functions.py lists them. Gradients are written by hand: the backward of
`torch.distributed.nn`'s all_reduce sums what is equal on all ranks, W times too large under tensor parallelism.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard


@runtime_checkable
class HasDeviceMesh(Protocol):
    """An accelerate.Accelerator, or whatever else has a mesh."""

    @property
    def torch_device_mesh(self) -> DeviceMesh | None:
        """Its dimensions by name, "tp" among them."""
        ...


def all_reduce_sum(t: Tensor) -> Tensor:
    """The sum over the default process group, where there is one."""
    if dist.is_available() and dist.is_initialized():
        t = t.clone()
        dist.all_reduce(t)
    return t


def on_rank() -> str:
    """ " on rank 3" where there are several processes, else "": of an error that one of them raises."""
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return f" on rank {dist.get_rank()}" if several else ""


@dataclass(frozen=True)
class VocabShard:
    """Rows [start, stop) of a head over `vocab_size` tokens live on this process. `group` None: the default group.

    own_tokens: False if the processes of the group score the same tokens, True if each has tokens of its own.
    """

    start: int
    stop: int
    vocab_size: int
    group: dist.ProcessGroup | None = None
    own_tokens: bool = False

    def __post_init__(self):
        if not 0 <= self.start <= self.stop <= self.vocab_size:
            raise ValueError(
                f"VocabShard: rows {self.start}..{self.stop} do not lie within a vocabulary of {self.vocab_size}"
            )

    @classmethod
    def even(cls, vocab_size: int, group: dist.ProcessGroup | None = None, own_tokens: bool = False) -> "VocabShard":
        """This process's shard of an even split, dealt as torch.chunk does, like a DTensor `Shard(0)`.

        ceil(V / W) rows each; the last ranks may hold fewer, or none.
        """
        world, rank = (dist.get_world_size(group), dist.get_rank(group)) if dist.is_initialized() else (1, 0)
        size = -(-vocab_size // world)
        start = min(rank * size, vocab_size)
        return cls(start, min(start + size, vocab_size), vocab_size, group, own_tokens)

    @classmethod
    def from_mesh(cls, vocab_size: int, mesh: DeviceMesh, own_tokens: bool = False) -> "VocabShard":
        """An even split over a 1-D DeviceMesh. ValueError for more dimensions: name the one to use, `mesh["tp"]`."""
        if mesh.ndim != 1:
            raise ValueError(f"VocabShard.from_mesh: a 1-D mesh is expected, got {mesh}; pick a dimension: mesh['tp']")
        return cls.even(vocab_size, mesh.get_group(), own_tokens)

    @classmethod
    def from_dtensor(cls, weight: DTensor, own_tokens: bool = False) -> "VocabShard":
        """The split a head's weight (or bias) already has. ValueError unless it is `Shard(0)` over a 1-D mesh."""
        if tuple(weight.placements) != (Shard(0),):
            raise ValueError(
                f"VocabShard.from_dtensor: expected rows split over one mesh dimension, (Shard(dim=0),), got "
                f"{tuple(weight.placements)} over {weight.device_mesh}"
            )
        return cls.from_mesh(weight.shape[0], weight.device_mesh, own_tokens)

    @classmethod
    def from_accelerator(cls, vocab_size: int, accelerator: HasDeviceMesh) -> "VocabShard":
        """Over the accelerator's tensor-parallel group if it has one, otherwise over the data-parallel one."""
        mesh = accelerator.torch_device_mesh
        if mesh is not None and "tp" in (mesh.mesh_dim_names or ()) and mesh["tp"].size() > 1:
            return cls.from_mesh(vocab_size, mesh["tp"])
        return cls.even(vocab_size, None, own_tokens=True)

    @property
    def world(self) -> int:
        """Processes in the group."""
        return dist.get_world_size(self.group) if dist.is_initialized() else 1

    @property
    def rank(self) -> int:
        """This process within the group."""
        return dist.get_rank(self.group) if dist.is_initialized() else 0

    def all_gather(self, t: Tensor) -> Tensor:
        """All-gather: t [*] -> [W, *], in rank order; all ranks' tensors have one shape."""
        if self.world == 1:
            return t.unsqueeze(0)
        gathered = [torch.empty_like(t, memory_format=torch.contiguous_format) for _ in range(self.world)]
        dist.all_gather(gathered, t.contiguous(), group=self.group)
        return torch.stack(gathered)

    def all_reduce_(self, t: Tensor) -> Tensor:
        """All-reduce (sum) of t, in place."""
        if self.world > 1:
            dist.all_reduce(t, group=self.group)
        return t

    def reduce_scatter(self, t: Tensor) -> Tensor:
        """Reduce-scatter (sum): t [W * n, D] -> this rank's [n, D]."""
        if self.world == 1:
            return t
        local = torch.empty_like(t[: len(t) // self.world])
        dist.reduce_scatter(local, list(t.contiguous().chunk(self.world)), group=self.group)
        return local
