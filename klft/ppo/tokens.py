"""Token-level KL of the rollouts, as tables and a page (`kl_log_tokens`)."""

import torch
from torch import Tensor

from klft.diagnostics.tables import TrainerTables
from klft.generation import Completions
from klft.penalty import TokenKL
from klft.scores import TokenScores


class TokenTables(TrainerTables):
    """Every n-th rollout's tokens, and the last one's, prompts included."""

    def due(self, step: int) -> bool:
        """Whether the rollout made at this optimizer step is to be kept."""
        last = (self.trainer.state.max_steps - 1) // self.args.steps_per_rollout
        return (rollout := step // self.args.steps_per_rollout) % self.args.kl_log_tokens == 0 or rollout == last

    def add(self, step: int, completions: Completions, kl: TokenKL, rewards: Tensor, advantages: Tensor) -> None:
        """Keep a rollout, [B, C] each. `step` is that of the first log its tokens are in."""
        prompts = completions.prompt_mask

        def widened(t: Tensor) -> Tensor:
            # Prompt tokens were not scored; they are there to be read.
            return torch.cat([t.new_zeros(*prompts.shape, *t.shape[2:]), t], 1)

        scores = {name: widened(t) for name, t in kl.scores.items()}
        ids, attention = completions.inputs
        self.log.add(
            TokenScores(**scores), ids, attention.bool(), step=step,
            is_prompt=torch.cat([prompts, torch.zeros_like(completions.mask)], 1),
            scored=torch.cat([torch.zeros_like(prompts), completions.mask], 1),
            rewards=widened(rewards), advantages=widened(advantages),
            weights=None if kl.weight is None else widened(kl.weight),
        )  # fmt: skip
