"""The generation cycle: one rollout, and how far the PPO epochs over it have come."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from klft.masked import Reduce
from klft.ppo.config import PPOConfig
from klft.ppo.rollout import Rollout, RolloutStats


class Cycle:
    """Hands out a rollout's micro-batches, reshuffled in each PPO epoch. All state is the rollout and plain numbers."""

    def __init__(self, args: PPOConfig, data_rank: int, episodes: int):
        self.args, self.data_rank, self.episodes = args, data_rank, episodes
        self.rollout: Rollout | None = None
        self.stats: RolloutStats | None = None
        self.position = 0

    def start(self, rollout: Rollout, stats: RolloutStats, reduce: Reduce) -> None:
        """Begin with a fresh rollout. Counts each minibatch's tokens over all processes: what losses are divided by."""
        self.rollout, self.position = rollout, 0
        lengths = rollout.mask.sum(-1).float()
        per_epoch = [lengths[self._order(epoch)] for epoch in range(self.args.num_ppo_epochs)]
        counts = torch.stack(per_epoch).view(self.args.steps_per_rollout, -1).sum(-1)
        self.stats = replace(stats, minibatch_tokens=tuple(reduce(counts).tolist()))

    @property
    def running(self) -> RolloutStats:
        """The stats of the rollout that is used."""
        assert self.stats is not None, "no rollout was made yet"
        return self.stats

    def next_micro_batch(self) -> tuple[Rollout, float]:
        """(micro-batch, tokens of the minibatch it belongs to, over all processes)."""
        assert self.rollout is not None
        args = self.args
        tokens = self.running.minibatch_tokens[self.position // args.gradient_accumulation_steps]
        epoch, within = divmod(self.position, args.gradient_accumulation_steps * args.num_mini_batches)
        size = args.per_device_train_batch_size
        self.position += 1
        return self.rollout.rows(self._order(epoch)[within * size : (within + 1) * size]), tokens

    @property
    def used_up(self) -> bool:
        """Whether every micro-batch was handed out."""
        return self.position == self.args.micro_batches_per_rollout

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
