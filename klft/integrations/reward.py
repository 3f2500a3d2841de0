"""KLReward: the KL to a reference as a reward function, for TRL's RLOOTrainer.

And for GRPOTrainer where it does not divide rewards by their standard deviation.
"""

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import ProcessorMixin
from trl import GRPOTrainer, RLOOTrainer, is_conversational

from klft.controllers import Controller, FixedKL, check_controller
from klft.estimators import Direction
from klft.integrations.checks import tokenizer_of
from klft.integrations.measure import Measurements
from klft.integrations.state import PenaltyState
from klft.loading import check_saved_tokenizer
from klft.models import check_positions, check_vocabularies, vocab_size
from klft.parallel import check_parallelism, why_no_zero3
from klft.penalty import KLPenalty, TokenRule
from klft.prompts import pad, pad_id
from klft.references import Reference, resolve_reference
from klft.scores import TokenScores
from klft.scoring import Scorer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainerState


class KLReward:
    """Reward of a completion: -coef * the sum over its tokens of their KL, in nats, detached.

    Example:
        from trl import RLOOConfig, RLOOTrainer
        kl = KLReward(ref_model, coef=0.05)
        args = RLOOConfig("out", beta=0.0, max_steps=1, num_generations=4, max_completion_length=6, bf16=False)
        trainer = RLOOTrainer(model, [reward, kl], args, train_dataset=prompts, processing_class=tokenizer)
        kl.bind(trainer)
        trainer.train()

    With k1 and RLOOTrainer(beta=0) it trains as RLOOTrainer(beta=coef) does, and adds what beta has not: a controller,
    a token rule, a reference of any kind, exact KL, metrics. It costs a second scoring pass of the policy per rollout,
    as the trainer's own log-probabilities do not reach a reward function. Both models are scored in eval mode at
    `args.temperature`; RLOO's beta scores the policy with its dropout on, so the two agree where there is none.

    The controller learns from training rollouts alone, once each, after their rewards. Logs kl/*/mean of `kl_metrics`
    over all processes and kl/coef. With `mask_truncated_completions` a truncated completion has no KL, as with beta. A
    completion that no other reward function judges (all None) is judged by its KL alone. RLOO's `normalize_advantages`
    divides rewards by their standard deviation, hence the coefficient too, as it does with beta.

    Args:
        reference: a klft reference; a causal LM, which `bind` freezes; or None: the policy with its PEFT adapter off
            (the base model, also where the policy came with a trained adapter, of which beta would take a copy).
        coef: the coefficient, or a controller of it.
        estimator: "k1" (sampled), whose expected gradient as a reward is the KL's, or "exact": less noise, but only
            the half of the gradient that goes through which tokens are sampled; the other belongs in a loss.
        clip, token_rule: see KLPenalty.

    Raises ValueError for other estimators, whose gradient as a reward is wrong.
    """

    def __init__(
        self,
        reference: "Reference | PreTrainedModel | None" = None,
        *,
        coef: float | Controller = 0.05,
        direction: Direction = "reverse",
        estimator: Literal["k1", "exact"] = "k1",
        clip: float | None = None,
        token_rule: TokenRule | None = None,
    ):
        if estimator not in ("k1", "exact"):
            raise ValueError(
                f"KLReward: estimator={estimator!r} in a reward has not the gradient of the KL: use 'k1', or put "
                "another into the loss, KLPenalty(..., placement='loss')"
            )
        if estimator == "exact":
            text = (
                "KLReward: estimator='exact' in a reward alone has half the gradient of the KL, since a token's own "
                "exact KL does not depend on it. Use 'k1', or add KLPenalty(..., 'exact', placement='loss') to the loss"
            )
            warnings.warn(text, stacklevel=2)
        controller = FixedKL(coef) if isinstance(coef, int | float) else coef
        check_controller(controller, "KLReward")
        self.__name__ = "KLReward"
        self._reference = reference
        self._options: dict[str, Any] = {
            "direction": direction, "estimator": estimator, "clip": clip, "token_rule": token_rule,
            "controller": controller, "placement": "reward" if estimator == "k1" else "loss",
        }  # fmt: skip
        self._trainer: Any = None

    def bind(self, trainer: RLOOTrainer | GRPOTrainer) -> None:
        """Say whose reward function this is: its policy, tokenizer, temperature, devices and checkpoints are used.

        Raises TypeError for another kind of trainer, ValueError for settings under which the reward would not be the
        KL, and for a reference that would move with the policy.
        """
        if self._trainer is trainer:
            return
        if self._trainer is not None:
            raise ValueError("KLReward.bind: it is bound to another trainer; make one KLReward per trainer")
        _check_trainer(trainer, self)
        owner: Any = trainer
        check_parallelism(owner.args, owner.accelerator, owner.model)
        reference = resolve_reference(self._reference, owner.model)
        check_vocabularies(owner.processing_class, policy=vocab_size(owner.model), reference=reference.vocab_size)
        check_saved_tokenizer(tokenizer_of(owner), reference.name)
        reference.to(owner.args.device)
        self.penalty = KLPenalty(reference, **self._options)
        self._scorer = Scorer(reference, temperature=owner.args.temperature)
        owner.add_callback(PenaltyState(self.penalty, self.__name__))
        self._trainer = owner

    def __call__(
        self,
        prompts: list[str] | list[list[dict[str, object]]],
        completions: list[str] | list[list[dict[str, object]]],
        completion_ids: list[list[int]],
        trainer_state: "TrainerState | None" = None,
        log_metric: Callable[[str, float], None] | None = None,
        **kwargs: object,
    ) -> list[float]:
        """One reward per completion. TRL calls this, with the ids it sampled. ValueError before `bind`."""
        if self._trainer is None:
            raise ValueError("KLReward: it is not bound to a trainer; call kl.bind(trainer) before trainer.train()")
        ids, attention, mask = self._tokens(prompts, completion_ids)
        check_positions(ids.shape[1], reference=self.penalty.reference.max_positions)
        kl = self.penalty.measure_scores(self._scores(ids, attention, mask), mask, token_ids=ids)
        coef = self.penalty.coef
        rewards = (-coef * self.penalty.token_kl(kl).sum(-1)).tolist()
        if log_metric is not None:
            measurements = Measurements()
            measurements.add(kl)
            metrics = measurements.take(self._trainer.accelerator, sampled=True) | {"kl/coef": coef}
            for name, value in metrics.items():
                if name.endswith(("/mean", "/coef")):  # what TRL may average over rollouts
                    log_metric(name, value)
        if self._trainer.model.training:  # by this the trainer itself tells a training rollout from an evaluation's
            self.penalty.update(kl)
        return rewards

    def _tokens(
        self, prompts: list, completion_ids: list[list[int]]
    ) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"], Bool[Tensor, "B T"]]:
        """(ids, attention mask, True on completions) of prompt and completion, padded on the right.

        Prompts are encoded by the very call that the trainer makes.
        """
        trainer = self._trainer
        tokenizer, args = trainer.processing_class, trainer.args
        if is_conversational({"prompt": prompts[0]}):
            prompt_ids = tokenizer.apply_chat_template(
                conversation=prompts, add_generation_prompt=True, tokenize=True, return_dict=True,
                **(args.chat_template_kwargs or {}),
            )["input_ids"]  # fmt: skip
        else:
            prompt_ids = tokenizer(text=prompts)["input_ids"]
        if args.mask_truncated_completions:
            ends = {*trainer.eos_token_ids, tokenizer.pad_token_id}
            completion_ids = [c if c[-1] in ends else [] for c in completion_ids]
        rows = [[*p, *c] for p, c in zip(prompt_ids, completion_ids, strict=True)]
        ids, real = (t.to(args.device) for t in pad(rows, pad_id(tokenizer), side="right"))
        lengths = torch.tensor([len(p) for p in prompt_ids], device=ids.device)
        mask = real & (torch.arange(ids.shape[1], device=ids.device) >= lengths[:, None].clamp(min=1))
        return ids, real.long(), mask

    def _scores(self, ids: Tensor, attention: Tensor, mask: Tensor) -> TokenScores:
        """In the trainer's precision, as many completions at a time as it takes."""
        trainer, args = self._trainer, self._trainer.args
        size = args.per_device_train_batch_size if trainer.model.training else args.per_device_eval_batch_size
        with trainer.accelerator.autocast():
            chunks = [
                dict(self._scorer.score_batch(trainer.model, *rows).items())
                for rows in zip(ids.split(size), attention.split(size), mask.split(size), strict=True)
            ]
        return TokenScores(**{name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]})


def _check_trainer(trainer: Any, reward: KLReward) -> None:
    """Raise TypeError or ValueError, with what to use instead, where the reward would not be the KL."""
    if not isinstance(trainer, RLOOTrainer | GRPOTrainer):
        raise TypeError(
            f"KLReward.bind: expected an RLOOTrainer or a GRPOTrainer of TRL, got {type(trainer).__name__}. For PPO "
            "use klft.PPOTrainer, which has a KL of its own; elsewhere put the KL into the loss"
        )
    args: Any = trainer.args
    weights = args.reward_weights or [1.0] * len(trainer.reward_funcs)
    weight = next((w for w, f in zip(weights, trainer.reward_funcs, strict=True) if f is reward), None)
    scale, clip = getattr(args, "scale_rewards", "none"), getattr(args, "reward_clip_range", None)
    aggregation = getattr(args, "multi_objective_aggregation", "sum_then_normalize")
    sampled_elsewhere = any(getattr(trainer, n, None) for n in ("tools", "environment_factories", "rollout_func"))
    tokenizer = trainer.processing_class
    in_the_loss = "or put the KL into the loss"
    scaling = "divides by a standard deviation, and the coefficient with it"
    zero3 = why_no_zero3(args)
    refused = (
        (zero3 is not None, zero3),
        (trainer.get_tp_size() > 1, "tensor parallelism splits the policy, and TRL gives each of its processes prompts "
         "and random numbers of its own: shard with FSDP2 instead"),
        (weight is None, "the trainer does not have it: RLOOTrainer(..., reward_funcs=[reward, kl])"),
        (weight != 1.0, f"its reward weight is {weight}, which scales the coefficient: use 1.0, and coef="),
        (args.beta != 0.0, f"beta={args.beta} counts the KL a second time: set beta=0.0"),
        (aggregation != "sum_then_normalize", f"multi_objective_aggregation={aggregation!r} {scaling}: use "
         f"'sum_then_normalize', {in_the_loss}"),
        (scale != "none", f"scale_rewards={scale!r} {scaling}: use 'none', {in_the_loss}"),
        (clip is not None, f"reward_clip_range={clip} would clip the KL too: clip in your own reward function"),
        (sampled_elsewhere, "a reward function is not told which tokens come from tools, an environment_factory or a "
         f"rollout_func, and not from the policy: leave them out, {in_the_loss}"),
        (isinstance(tokenizer, ProcessorMixin), f"a reward function is not given the images that "
         f"{type(tokenizer).__name__} may bring: pass the tokenizer as processing_class, {in_the_loss}"),
    )  # fmt: skip
    for applies, reason in refused:
        if applies:
            raise ValueError(f"KLReward.bind: {reason}")
