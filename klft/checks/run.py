"""All checks, in the order in which one explains the next."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from torch import Tensor, nn

from klft.checks import models, training
from klft.checks.setup import Check, Rollout, Setup, problem
from klft.parallel import reshard
from klft.references import Reference, resolve_reference

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def run_checks(setup: Setup, rollout: Rollout | None = None) -> list[Check]:
    """Every check that applies; one that raises is a problem of its own."""
    todo: list[tuple[str, Callable[[], Check]]] = []
    for role in ("policy", "reference"):
        for name, check in models.OF_ONE.items():
            todo.append((f"{role}: {name}", lambda check=check, role=role: check(setup, role)))
    todo += [
        ("vocabulary", lambda: models.check_vocabulary(setup)),
        ("start", lambda: models.check_start(setup)),
        ("reference stays", lambda: models.check_independent(setup)),
        ("loss", lambda: training.check_loss_mode(setup)),
        ("processes", lambda: training.check_ranks(setup)),
    ]
    if setup.optimizer is not None:
        todo.append(("optimizer", lambda: training.check_optimizer(setup)))
    if setup.tokenizer is not None:
        todo.append(("tokenizer", lambda: training.check_tokenizer(setup)))
    if rollout is not None:
        todo.append(("mask", lambda: training.check_mask(rollout, setup.tokenizer)))
        if rollout.logp is not None:
            todo.append(("sampling", lambda: training.check_sampling(setup, rollout)))
    return [_run(name, check, setup) for name, check in todo]


def _run(name: str, check: Callable[[], Check], setup: Setup) -> Check:
    try:
        return check()
    except Exception as error:
        return problem(name, " ".join(f"{type(error).__name__}: {error}".split()))
    finally:
        reshard(setup.policy)  # a check's own forward may have gathered weights


def raise_problems(checks: list[Check], where: str) -> None:
    """Raise RuntimeError with what is wrong, each cause once, by the first check that found it."""
    causes: dict[str, str] = {}
    for check in checks:
        if check.status == "problem":
            causes.setdefault(check.text, check.name)
    if causes:
        text = "; ".join(f"{name}: {cause}" for cause, name in causes.items())
        raise RuntimeError(f"{where}: {text}. (self_test=False leaves it out)")


def check_setup(
    policy: nn.Module,
    reference: "Reference | PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    *,
    optimizer: "Optimizer | None" = None,
    temperature: float = 1.0,
    starts_equal: bool | None = None,
    rollout: Mapping[str, Tensor] | None = None,
) -> list[Check]:
    """Check a policy, its reference and what trains them, before the first step of a loop of your own.

    Args:
        policy: as you call it, in the mode in which you compute its loss.
        reference: a klft reference, or a model, which is frozen, as by KLPenalty.
        optimizer: made from the policy's weights.
        temperature: at which you score.
        starts_equal: True: the policy is where the reference is now, so that their KL must be 0; None: it came from
            there, and may have been trained since; False: the reference is another model on purpose.
        rollout: a few sampled rows: input_ids, attention_mask, mask (the tokens that count) [B, T], and logp [B, T] as
            the sampler reports it, if it does.

    About ten forwards of three rows of 12 tokens. Nothing else is changed. Returns the checks; those with status
    "problem" say what is wrong and what to do.
    """
    if isinstance(reference, nn.Module):
        reference = resolve_reference(reference, policy)
    setup = Setup(policy, reference, tokenizer, optimizer, temperature, starts_equal)
    return run_checks(setup, None if rollout is None else Rollout(**rollout))
