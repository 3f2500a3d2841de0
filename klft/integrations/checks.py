"""What KLAnchorMixin refuses before training, each by name and with a way out."""

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from klft.checks import Check, Setup, raise_problems, run_checks
from klft.checks.setup import largest_kl, ok, problem
from klft.integrations.backbone import versions
from klft.loading import check_saved_tokenizer
from klft.models import base_of, evaluating, require_causal_lm, unwrap
from klft.parallel import check_parallelism, why_no_zero3
from klft.penalty import KLPenalty
from klft.references import parts_of
from klft.scoring import SHARDINGS, Scorer

if TYPE_CHECKING:
    from klft.integrations.measure import PenaltyPart

_KNOWN = ("Trainer", "SFTTrainer", "GRPOTrainer")


def _is_upstream(cls: type) -> bool:
    """Whether transformers or TRL define the class, with a compute_loss."""
    return "compute_loss" in vars(cls) and cls.__module__.partition(".")[0] in ("transformers", "trl")


def _owner(trainer: Any) -> type:
    """The class of transformers or TRL whose compute_loss is at work, below the mixin and the user's own classes."""
    return next(filter(_is_upstream, type(trainer).__mro__))


def tokenizer_of(trainer: Any) -> Any:
    """The trainer's tokenizer, also of a processor; None where it has none."""
    return getattr(trainer.processing_class, "tokenizer", trainer.processing_class)


def trains_completions(trainer: Any) -> bool:
    """Whether the trainer's batches are completions that the policy sampled (GRPO), not labelled texts."""
    return _owner(trainer).__name__ == "GRPOTrainer"


def as_penalty(given: Any, policy: nn.Module) -> KLPenalty:
    """The penalty, or what a function of the policy gives as one. TypeError, with what to write, for anything else."""
    makes_one = callable(given) and not isinstance(given, nn.Module) and not hasattr(given, "check_independent")
    penalty = given(policy) if makes_one else given
    if not isinstance(penalty, KLPenalty):
        got = f"a function that gives a {type(penalty).__name__}" if makes_one else f"a {type(penalty).__name__}"
        raise TypeError(
            f"KLAnchorMixin: penalty must be a KLPenalty, or a function of the policy that gives one; got {got}. "
            "Pass penalty=KLPenalty(ref_model, estimator='exact', placement='loss', controller=FixedKL(0.1))"
        )
    return penalty


def check_order(cls: type) -> None:
    """Raise TypeError for a class in which the trainer stands before the mixin, which then has no part in it."""
    before = cls.__mro__[: next(i for i, each in enumerate(cls.__mro__) if each.__name__ == "KLAnchorMixin")]
    for each in before:
        if _is_upstream(each):
            raise TypeError(
                f"KLAnchorMixin must stand before {each.__name__}: class {cls.__name__}(KLAnchorMixin, {each.__name__})"
            )


def check_anchor(trainer: Any, penalty: KLPenalty, measure_every: int) -> None:
    """Raise ValueError or TypeError for a trainer, a penalty or a model that KLAnchorMixin cannot be right with."""
    if why := why_no_zero3(trainer.args):
        raise ValueError(f"KLAnchorMixin: {why}")
    if isinstance(measure_every, bool) or not isinstance(measure_every, int) or measure_every < 0:
        raise ValueError(f"KLAnchorMixin: measure_every must be a whole number >= 0, got {measure_every!r}")
    if measure_every and trainer.processing_class is None:
        raise ValueError(
            "KLAnchorMixin: measure_every writes texts, and this trainer has no processing_class: give it the tokenizer"
        )
    _check_trainer(trainer)
    _check_penalty(trainer, penalty)
    _check_model(trainer.model, penalty)
    tokenizer = tokenizer_of(trainer)
    if tokenizer is not None:
        for _, reference in parts_of(penalty.reference):
            check_saved_tokenizer(tokenizer, reference.name)


def _check_trainer(trainer: Any) -> None:
    owner = _owner(trainer)
    if owner.__name__ not in _KNOWN:
        instead = "KLReward, as one of its reward_funcs" if owner.__name__ == "RLOOTrainer" else "a loop of your own"
        raise TypeError(
            f"KLAnchorMixin knows the losses of {', '.join(_KNOWN)} and what derives from them, not that of "
            f"{owner.__name__} ({versions()}); use {instead}"
        )
    if trainer.args.n_gpu > 1:
        raise ValueError("KLAnchorMixin does not go with nn.DataParallel: start it with accelerate launch")
    check_parallelism(trainer.args, trainer.accelerator, trainer.model)
    parallel = getattr(trainer.accelerator, "parallelism_config", None)
    if parallel is not None and (parallel.cp_enabled or parallel.sp_enabled):
        raise ValueError(
            "KLAnchorMixin does not go with context or sequence parallelism: each process sees a part of a text, and "
            "the reference would too. Shard with FSDP2 or tensor parallelism instead"
        )
    if trains_completions(trainer) and (processes := trainer.get_tp_size()) > 1:
        raise ValueError(
            f"KLAnchorMixin: the policy is split over {processes} processes by tensor parallelism, and GRPOTrainer "
            f"({versions()}) gives each of them prompts and random numbers of its own: shard with FSDP2 instead"
        )
    if trains_completions(trainer) and trainer.args.beta:
        raise ValueError(
            f"KLAnchorMixin: GRPOConfig has beta={trainer.args.beta}, which counts the KL twice: set beta=0"
        )


def _check_penalty(trainer: Any, penalty: KLPenalty) -> None:
    if trains_completions(trainer):
        if penalty.placement != "loss" and trainer.args.importance_sampling_level == "sequence":
            raise ValueError(
                f"KLAnchorMixin: placement={penalty.placement!r} gives each token an advantage of its own, and "
                "importance_sampling_level='sequence' spreads their mean over the sequence: use placement='loss', or "
                "importance_sampling_level='token'"
            )
        return
    if penalty.placement != "loss":
        raise ValueError(
            f"KLAnchorMixin: placement={penalty.placement!r} needs rewards, and {_owner(trainer).__name__} has none: "
            "use KLPenalty(..., estimator='exact', placement='loss')"
        )
    if penalty.estimator != "exact":
        raise ValueError(
            f"KLAnchorMixin: estimator={penalty.estimator!r} estimates a KL from tokens that the policy sampled, and "
            "labels are given texts: use estimator='exact', which costs the same"
        )


def _check_model(model: nn.Module, penalty: KLPenalty) -> None:
    require_causal_lm(model, "policy")
    learnt = [name for name, c in getattr(unwrap(model), "peft_config", {}).items() if c.is_prompt_learning]
    if learnt:
        raise ValueError(
            f"KLAnchorMixin: adapter {learnt[0]!r} learns a prompt, whose virtual tokens shift every position against "
            "the reference's: use an adapter of weights, as LoRA is"
        )
    for _, reference in parts_of(penalty.reference):
        reference.check_independent(model)
        if hasattr(reference, "score") or not hasattr(reference, "hidden_of"):
            raise TypeError(
                f"KLAnchorMixin: {type(reference).__name__} has no hidden states to be compared (hidden_of): use it in "
                "a loop of your own, with KLPenalty.measure"
            )


def check_sharding(policy: nn.Module, scorer: Scorer) -> None:
    """Raise ValueError for an unknown kl_shard_vocab, and where the policy's head does not lie as it says."""
    if scorer.shard_vocab not in SHARDINGS:
        choices = ", ".join(SHARDINGS)
        raise ValueError(f"KLAnchorMixin: kl_shard_vocab must be one of {choices}, got {scorer.shard_vocab!r}")
    if scorer.shard_vocab != "auto":
        scorer.policy_head(policy)


# ---- before the first step -------------------------------------------------------------------------------------------


def run_self_test(trainer: Any, model: nn.Module, parts: list["PenaltyPart"]) -> None:
    """klft.checks on the policy and each reference, and whether their backbones give what their heads read.

    Draws no random number of the run's; leaves weights, modes and gradients as they were. Raises RuntimeError, naming
    what is wrong and what to do, on every process that found it.
    """
    policy, accelerator = unwrap(model), trainer.accelerator
    tokenizer = tokenizer_of(trainer)
    devices = [accelerator.device] if accelerator.device.type == "cuda" else []
    checks: list[Check] = []
    with torch.random.fork_rng(devices), accelerator.autocast():
        for part in parts:
            if hasattr(part.reference, "fixed_text"):
                continue  # it knows the training's texts alone
            setup = Setup(
                policy, part.reference, tokenizer, optimizer=getattr(trainer.optimizer, "optimizer", trainer.optimizer),
                temperature=part.scorer.temperature, starts_equal=False, loss_mode=policy.eval,
                low_precision=True if accelerator.mixed_precision != "no" else None,
            )  # fmt: skip
            checks += [*run_checks(setup), _check_backbone(setup, "policy"), _check_backbone(setup, "reference")]
    if not trains_completions(trainer):  # texts are padded on the right
        checks = [check for check in checks if not check.name.endswith("padding")]
    raise_problems(checks, "KLAnchorMixin, before the first step")


@torch.no_grad()
def _check_backbone(setup: Setup, role: str) -> Check:
    """Whether the backbone's last hidden state times the head gives the model's own logits."""
    name, ids = f"{role}: backbone", setup.tokens[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    try:
        if role == "policy":
            with evaluating(setup.policy):
                hidden = base_of(setup.policy).base_model(**inputs).last_hidden_state
                head = setup.scorer.policy_head(setup.policy)
        else:
            hidden, head = setup.reference.hidden_of(inputs)  # pyright: ignore - check_anchor saw that it is there
    except (TypeError, AttributeError) as error:
        return problem(name, f"its KL cannot be taken without logits: {error}")
    if head.shard is not None:
        return Check(name, "skipped", "the head is split over processes")
    ours, own = head.logits(hidden), setup.logits_again(role, ids, inputs["attention_mask"]).to(hidden.device)
    off = largest_kl(ours, own)
    if off > setup.kl_tolerance:
        return problem(
            name, f"its last hidden state times its head is not what the model says (KL {off:.1e} nats): something "
            "stands between the two. Take this model's KL in a loop of your own, with klft.hidden_states"
        )  # fmt: skip
    return ok(name, "its last hidden state is what its head reads")
