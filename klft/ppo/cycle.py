"""The generation cycle: one rollout, and how far the PPO epochs over it have come."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from klft.ppo.config import PPOConfig
from klft.ppo.micro_batches import count_within, split_by_length
from klft.ppo.rollout import Rollout, RolloutStats


class Cycle:
    """Hands out a rollout's micro-batches, reshuffled in each PPO epoch. All state is the rollout and plain numbers."""

    def __init__(self, args: PPOConfig, data_rank: int, episodes: int):
        self.args, self.data_rank, self.episodes = args, data_rank, episodes
        self.rollout: Rollout | None = None
        self.stats: RolloutStats | None = None
        self.position = 0

    def start(self, rollout: Rollout, stats: RolloutStats, gather: Callable[[Tensor], Tensor]) -> None:
        """Begin with a fresh rollout. Counts each minibatch's tokens over all processes: what losses are divided by.

        And with tokens_per_micro_batch its passes: as many as the process needs whose rows are longest. Forwards and
        backwards are collectives, which every process must enter alike. `gather` concatenates over processes.
        """
        self.rollout, self.position = rollout, 0
        budget, minibatches = self.args.tokens_per_micro_batch, range(self.args.steps_per_rollout)
        rows = [rollout.rows(self._minibatch(i)) for i in minibatches]
        counts = [[int(r.mask.sum()), count_within(r, budget) if budget else 0] for r in rows]
        every = gather(torch.tensor([counts], device=rollout.mask.device))  # [processes, minibatches, 2]
        tokens = tuple(every[:: self.args.tp_size, :, 0].sum(0).double().tolist())  # one rank of each group
        passes = tuple(every[..., 1].amax(0).tolist()) if budget else ()
        self.stats = replace(stats, minibatch_tokens=tokens, minibatch_passes=passes)

    @property
    def running(self) -> RolloutStats:
        """The stats of the rollout that is used."""
        assert self.stats is not None, "no rollout was made yet"
        return self.stats

    def next_micro_batches(self) -> list[tuple[Rollout, float]]:
        """(micro-batch, tokens of its minibatch over all processes) each, for the Trainer's next call.

        The Trainer makes gradient_accumulation_steps calls per minibatch and synchronises gradients in the last: it has
        exactly one pass, and the others, of any number, lie in the calls before. None once target_kl was passed.
        """
        assert self.rollout is not None
        calls, stats = self.args.gradient_accumulation_steps, self.running
        minibatch, call = divmod(self.position, calls)
        self.position += 1
        if stats.stopped:
            return []
        index = self._minibatch(minibatch)
        if not stats.minibatch_passes:
            groups = [index.view(calls, -1)[call]]
        else:
            passes = split_by_length(self.rollout.rows(index), stats.minibatch_passes[minibatch])
            first, end = ((len(passes) - 1) * c // (calls - 1) for c in (call, call + 1))
            groups = [index[group] for group in (passes[first:end] if call < calls - 1 else passes[-1:])]
        tokens = stats.minibatch_tokens[minibatch]
        return [(self.rollout.rows(group).trimmed(), tokens) for group in groups]

    @property
    def used_up(self) -> bool:
        """Whether every micro-batch was handed out."""
        return self.position == self.args.micro_batches_per_rollout

    def _minibatch(self, i: int) -> Tensor:
        epoch, within = divmod(i, self.args.num_mini_batches)
        return self._order(epoch).view(self.args.num_mini_batches, -1)[within]

    def _order(self, epoch: int) -> Tensor:
        # Drawn from the seed and the place alone, so that a resumed run draws the same.
        assert self.rollout is not None
        seed = self.args.seed + 7919 * (self.episodes * self.args.num_ppo_epochs + epoch) + 104_729 * self.data_rank
        generator = torch.Generator().manual_seed(seed)
        return torch.randperm(len(self.rollout.mask), generator=generator).to(self.rollout.mask.device)

    def state_dict(self) -> dict[str, Any]:
        """All but the rollout's tensors."""
        stats = None if self.stats is None else self.stats.state_dict()
        return {"position": self.position, "stats": stats, "episodes": self.episodes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue; the rollout's tensors are put back by the caller if `position` is not 0."""
        self.position, self.episodes = state["position"], state["episodes"]
        self.stats = None if state["stats"] is None else RolloutStats.from_state(state["stats"])
