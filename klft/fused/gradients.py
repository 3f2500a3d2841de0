"""Gradients of hidden states, head weight and bias, accumulated over tiles."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from klft.fused.plan import FusedPlan
from klft.fused.tile import Tile


class Gradients:
    """d loss / d hidden [N, D], weight [v, D], bias [v] in fp32 (fp64 for fp64); None for what is not asked for."""

    def __init__(self, plan: FusedPlan, hidden: bool, weight: bool, bias: bool):
        self.plan, side = plan, plan.policy

        def zeros_like(t: Tensor | None, wanted: bool) -> Tensor | None:
            return torch.zeros_like(t, dtype=side.acc_dtype) if wanted and t is not None else None

        # With data-parallel tokens this rank's rows add to the hidden gradient of other ranks that want theirs.
        self.hidden = zeros_like(side.hidden, hidden or (plan.comm.dp_tokens and plan.wants_grad))
        # The first tile's gradient is written, not added. A CPU zeroes each block first: MKL is slow in fresh memory.
        self._unwritten = weight
        self.weight = torch.empty_like(side.weight, dtype=side.acc_dtype) if weight else None
        self.bias = zeros_like(side.bias, bias)

    def add_tile(
        self, tile: Tile, chunk: slice, block_gradient: Callable[[int, torch.dtype, Any], Tensor], zero_grad: Tensor
    ) -> None:
        """Backpropagate a tile's gradient through the head, block by block.

        block_gradient: (block number, dtype, workspace) -> dz = d loss / d (hidden @ weight.T) of the block, [n, rows],
        in that dtype if that saves a pass. zero_grad [n]: tokens whose gradient is 0; their hidden states may be NaN
        or infinite.
        """
        plan, side, hidden = self.plan, self.plan.policy, tile.hidden[0]
        if hidden.is_cuda or bool(zero_grad.any()):  # on a GPU to ask costs more: the CPU would wait for the answer
            hidden = hidden.masked_fill(zero_grad[:, None], 0.0)  # 0 * NaN would reach the weight's gradient
        # The bias's gradient is a sum over tokens, which 16 bits would spoil.
        dtype = side.factor_dtype if self.bias is None else side.acc_dtype

        def backward(i: int, workspace: Any) -> None:
            rows, dz = plan.geometry.vocab_blocks[i], block_gradient(i, dtype, workspace)
            if self.bias is not None:
                self.bias[rows].add_(dz.sum(0))
            dz = dz.to(side.factor_dtype)
            if self.weight is not None:
                grad, fresh = self.weight[rows], self._unwritten
                if fresh and not grad.is_cuda:
                    grad.zero_()
                side.grad_weight_(grad, dz, hidden, beta=0 if fresh and grad.is_cuda else 1)
            if self.hidden is not None:
                workspace.grad_hidden = side.grad_hidden(workspace.grad_hidden, dz, rows)

        plan.for_each_block(backward, tile.workspaces)
        self._unwritten = False
        if self.hidden is not None:
            # The sum over this process's blocks, then over the other shards: now (data parallel) or in finish.
            parts = [w.grad_hidden for w in tile.workspaces if w.grad_hidden is not None]
            for workspace in tile.workspaces:
                workspace.grad_hidden = None
            total = functools.reduce(torch.add, parts)
            self.hidden[chunk] = plan.comm.reduce_scatter_tokens(total, len(plan.token_ids[chunk]))

    def finish(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """(hidden, weight, bias) after the last tile; under tensor parallelism one collective sums hidden's."""
        if self._unwritten and self.weight is not None:
            self.weight.zero_()  # no tile had a gradient
        if self.hidden is not None:
            self.plan.comm.all_reduce_(self.hidden)
        return self.hidden, self.weight, self.bias
