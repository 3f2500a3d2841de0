"""Makes rollouts: generate, score by both models, call the reward functions, shape rewards, estimate advantages."""

from dataclasses import InitVar, dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, TrainerState
from transformers.utils import logging

from klft.generation import Completions, sample_completions
from klft.masked import masked_whiten
from klft.parallel import check_parallelism, gathered
from klft.penalty import KLPenalty, TokenKL
from klft.ppo.completions import completion_rows
from klft.ppo.config import PPOConfig
from klft.ppo.guards import check_finite, on_all_ranks
from klft.ppo.losses import gae
from klft.ppo.metrics import Table, gather_table, why_nothing_to_learn
from klft.ppo.micro_batches import count_within
from klft.ppo.phases import Phases
from klft.ppo.reward_loop import RewardLoop
from klft.ppo.rewards import RewardFunction, is_judged, move_reward_models, reward_names, score_completions_by
from klft.ppo.rollout import Rollout, RolloutStats, score_completions
from klft.ppo.state import PPOState
from klft.prompts import (
    cut_prompt,
    decode_completions,
    encode_prompts,
    eos_ids,
    pad,
    pad_id,
    template_arguments,
)
from klft.scoring import Scorer
from klft.shaping import finish_scores, weigh_scores

logger = logging.get_logger(__name__)

LARGE_SCORE = 1e4
CUT_PROMPTS = "prompts/truncated/frac"  # logged where max_prompt_length is given

Continued = tuple[Completions, Tensor, list, dict[str, list[float]]]
"""(completions, terminated [B], completions as the reward functions see them, which prompts were cut)."""


def continue_prompts(
    model: nn.Module, rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, args: PPOConfig, vocab_size: int
) -> Continued:
    """Completions of the rows' prompts by `model`, without wrappers and with its weights whole, sampled as PPO samples.

    Only ids below `vocab_size`, those of policy and reference, are sampled. Raises ValueError for a prompt without
    tokens, and for logits that are not finite.
    """
    prompts, limit = [row["prompt"] for row in rows], args.max_prompt_length
    templates = [template_arguments(row, args.chat_template_kwargs) for row in rows]
    whole = encode_prompts(tokenizer, prompts, limit and limit + 1, templates)  # one token more says which are cut
    kept = [cut_prompt(tokenizer, row, limit) for row in whole]
    ids, mask = pad(kept, pad_id(tokenizer))
    config = args.generation_config(eos_ids(model, tokenizer), pad_id(tokenizer))
    policy: Any = model
    completions, terminated = sample_completions(
        policy, ids.to(args.device), mask.to(args.device), config, vocab_size, tokenizer
    )
    texts = decode_completions(tokenizer, prompts, **vars(completions), eos_ids=config.eos_token_id)  # pyright: ignore
    cut = {} if limit is None else {CUT_PROMPTS: [float(len(k) < len(w)) for k, w in zip(kept, whole, strict=True)]}
    return completions, terminated, texts, cut


@dataclass
class RolloutCollector:
    """The part of PPO that training and evaluation share. Fields are fixed; what changes is passed to `collect`."""

    args: PPOConfig
    accelerator: Accelerator
    penalty: KLPenalty
    scorer: Scorer
    reward_funcs: list[RewardFunction]
    weights: Tensor  # [K], one per reward function
    tokenizer: PreTrainedTokenizerBase
    policy: InitVar[nn.Module]  # as it was loaded; `collect` is given it as the trainer wraps it
    loop: RewardLoop = field(default_factory=RewardLoop)  # of async reward functions

    def __post_init__(self, policy: nn.Module):
        check_parallelism(self.args, self.accelerator, policy)
        move_reward_models(self.reward_funcs, self.args.device, self.args.reward_model_placement, self.args.tp_size)

    def reduce(self, t: Tensor) -> Tensor:
        """Sum over data-parallel ranks: the ranks of a tensor-parallel group hold the same samples."""
        reduced = self.accelerator.reduce(t, "sum")
        assert isinstance(reduced, Tensor)
        return reduced / self.args.tp_size

    @property
    def _counts(self) -> bool:
        """Whether this is the first rank of its tensor-parallel group, whose samples count for all of it."""
        return self.accelerator.process_index % self.args.tp_size == 0

    def collect(
        self,
        model: nn.Module,
        rows: list[dict],
        state: PPOState,
        trainer_state: TrainerState,
        *,
        learn: bool,
        keep: int | None = None,
    ) -> tuple[Rollout, RolloutStats, Table]:
        """One rollout of this process's prompts; its advantages are not whitened yet.

        Args:
            model: the policy as the trainer wraps it.
            learn: in training; then score moments are updated, and tables for readers kept.
            keep: count only the first so many rows; the others repeat samples to fill a batch.
        """
        args, accelerator, penalty = self.args, self.accelerator, self.penalty
        phase = state.phases if learn else Phases()
        # 1. - 3. Encode and left-pad the prompts; generate; the completions' mask from their lengths.
        with phase("generate", args.device):
            completions, terminated, texts, cut = on_all_ranks(accelerator, lambda: self._generate(model, rows))
        mask = completions.mask
        # 4. Both models' scores and the values, from the training forward, at the sampling temperature.
        tables = state.tokens if learn and state.tokens and state.tokens.due(trainer_state.global_step) else None
        with phase("score", args.device):
            kl, values, last_values = self._score(model, completions, top_k=tables.top_k if tables else 0)
        # 5. Reward functions.
        with phase("reward", args.device):
            by_function, columns, logged = self._judge(rows, completions, texts, trainer_state, cut)
        (state.train if learn else state.evaluation).add_logged(logged)
        # 6. Weigh, normalise, clip, charge for a missing end.
        totals, scores = self._total_scores(by_function, terminated, state, learn)
        # 7. The score on the last real token, minus coef * KL on every token.
        rewards = on_all_ranks(accelerator, lambda: penalty.rewards(totals, kl))
        # 8. Optional whitening, without shifting the mean.
        if args.whiten_rewards:
            rewards = masked_whiten(rewards, mask, self.reduce, shift_mean=False)
        # 9. Advantages. After a completion that ran out of tokens the next state's value is 0, or bootstrapped.
        values = torch.where(mask, values, 0.0)
        last_values = torch.where(terminated | (not args.bootstrap_truncated), 0.0, last_values)
        advantages = gae(rewards, values, mask, gamma=args.gamma, lam=args.lam, last_value=last_values)
        returns = advantages + values
        if tables and self._counts:
            tables.add(trainer_state.global_step + 1, completions, kl, rewards, advantages)
        if learn and args.log_completions:
            state.completions = self._completion_rows(rows, texts, scores, kl, columns)
        per_token = {"value": values, "return": returns, "reward": rewards}
        table = gather_table(
            accelerator, kl, per_token, scores, terminated, by_function, slice(keep if self._counts else 0)
        )
        if learn:
            self._warn_of_equal_scores(table, state)
        logp, ref_logp = (torch.where(mask, t, 0.0) for t in (kl.scores.logp, kl.scores.ref_logp))  # pyright: ignore
        rollout = Rollout(
            **vars(completions), old_logp=logp, behaviour_logp=logp.clone(), ref_logp=ref_logp, kl_weight=kl.weights,
            values=values, advantages=advantages, returns=returns,
        )  # fmt: skip
        return rollout, RolloutStats(penalty.coef, *penalty.sequence_kl(kl, self.reduce)), table

    def _templates(self, rows: list[dict]) -> list[dict[str, Any]]:
        return [template_arguments(row, self.args.chat_template_kwargs) for row in rows]

    def _generate(self, model: nn.Module, rows: list[dict]) -> "Continued":
        policy = self.accelerator.unwrap_model(model)
        with gathered(model):
            return continue_prompts(policy, rows, self.tokenizer, self.args, self.scorer.shared_vocab(policy))

    def _score(self, model: nn.Module, completions: Completions, *, top_k: int) -> tuple[TokenKL, Tensor, Tensor]:
        """(KL of the completions' tokens [B, C], values [B, C], value after the last token [B])."""
        self.scorer.top_k = top_k
        policy, budget = self.accelerator.unwrap_model(model), self.args.tokens_per_micro_batch
        passes = -(-len(completions.mask) // self.args.per_device_train_batch_size)
        if budget is not None:  # as many on every process: forwards are collectives under FSDP2
            passes = int(max(gather_object([count_within(completions, budget)])))
        with self.accelerator.autocast():  # as the loss will score them again
            scores, values, last_values = score_completions(self.scorer, model, policy, completions, passes)

        def compare() -> TokenKL:
            check_finite(scores.logp, completions.mask, self.accelerator.process_index)
            return self.penalty.measure_scores(scores, completions.mask, token_ids=completions.completion_ids)

        return on_all_ranks(self.accelerator, compare), values, last_values

    def _judge(
        self, rows: list[dict], completions: Completions, texts: list, trainer_state: TrainerState, cut: dict
    ) -> tuple[Tensor, dict[str, list], dict[str, list[float]]]:
        return score_completions_by(
            self.reward_funcs, self.accelerator, rows, completions, texts, trainer_state=trainer_state, loop=self.loop,
            known=cut, templates=self._templates(rows), timeout=self.args.reward_timeout,
            tp_size=self.args.tp_size,
        )  # fmt: skip

    def _total_scores(
        self, by_function: Tensor, terminated: Tensor, state: PPOState, learn: bool
    ) -> tuple[Tensor, Tensor]:
        """[B, K] -> (scores to train on [B], the same to be shown [B]: NaN where no function gave one).

        What no function judged has a score of 0, or with normalize_scores the mean, which is 0 then. So its tokens are
        trained on the KL penalty, and on the one for a missing end, alone.
        """
        args, judged = self.args, is_judged(by_function)
        totals = weigh_scores(by_function, self.weights.to(by_function))
        if args.normalize_scores:
            if learn:
                state.moments.learn(totals[judged], self.reduce)
            totals = torch.where(judged, state.moments.normalise(totals), 0.0)
        if not state.warned_of_scores and bool((totals.abs() > LARGE_SCORE).any()):
            state.warned_of_scores = True
            logger.warning(
                f"scores beyond {LARGE_SCORE:g} make value losses and gradients of their square: give them a smaller "
                "scale, or set normalize_scores or reward_clip"
            )
        penalty = args.missing_eos_penalty
        totals = finish_scores(totals, terminated, clip=args.reward_clip, missing_eos_penalty=penalty)
        return totals, torch.where(judged, totals, torch.nan)

    def _warn_of_equal_scores(self, table: Table, state: PPOState) -> None:
        """Say once, on the main process, that a rollout's scores tell no completion from another."""
        problem = why_nothing_to_learn(table.sequences, reward_names(self.reward_funcs), self.penalty.coef)
        if problem and not state.warned_of_equal_scores and self.accelerator.is_main_process:
            logger.warning(f"{problem}. Look at the reward function, and at what the completions say")
            state.warned_of_equal_scores = True

    def _completion_rows(
        self, rows: list[dict], texts: list, scores: Tensor, kl: TokenKL, columns: dict[str, list]
    ) -> list[dict[str, Any]]:
        """The table of completions of all processes, on the main one."""
        exact = kl.scores.reverse_kl if self.penalty.direction == "reverse" else kl.scores.forward_kl
        assert exact is not None
        sequence_kl = torch.where(kl.counted, exact * kl.weights, 0.0).sum(-1)
        return gather_object(completion_rows(rows, texts, scores, sequence_kl, columns) if self._counts else [])
