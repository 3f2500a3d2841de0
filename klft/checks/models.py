"""Checks of one model by itself, and of policy and reference together."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from klft.checks.setup import Check, Setup, largest_kl, ok, problem
from klft.models import CUT_MASS, causal_inputs, check_vocabularies, evaluating, last_id, vocab_size

UNRELATED = 0.9  # relative distance of weights past which one model did not come from the other

# ---- one model by itself ---------------------------------------------------------------------------------------------


def check_repeatable(setup: Setup, role: str) -> Check:
    """The same rows twice in eval mode."""
    name = f"{role}: repeatable"
    logits, real = setup.logits_of(role), setup.real
    nonfinite = logits.isnan().any(-1) & real
    if bool(nonfinite.any()):
        row, column = nonfinite.nonzero()[0].tolist()
        return problem(name, f"its logits are NaN (sample {row}, position {column}): look for NaN among its weights")
    if not setup.low_precision and check_head(setup, role).status == "ok":  # a second forward, to the last digit
        return ok(name, "the same rows twice have the same probabilities")
    off = largest_kl(setup.logits_again(role, *setup.batch)[real], logits[real])
    if off > setup.kl_tolerance / 100:
        return problem(
            name, f"the same rows twice in eval mode are {off:.1e} nats apart: something random is on (a router's "
            "jitter, dropout that is called by hand); turn it off"
        )  # fmt: skip
    return ok(name, "the same rows twice have the same probabilities")


def check_padding(setup: Setup, role: str) -> Check:
    """The short text alone, and padded left and right in a batch."""
    name = f"{role}: padding"
    short = setup.short
    alone = setup.logits_again(role, short[None], torch.ones_like(short[None]))[0]
    logits = setup.logits_of(role)
    off = {"left": largest_kl(logits[1, -len(short) :], alone), "right": largest_kl(logits[2, : len(short)], alone)}
    side = max(off, key=lambda each: off[each])
    if off[side] > setup.kl_tolerance:
        return problem(
            name, f"a row padded on the {side} has other probabilities than alone (KL {off[side]:.1e} nats): it reads "
            "padding, or counts positions by column. Use klft.causal_inputs, or texts of one length"
        )  # fmt: skip
    return ok(name, "a row alone, padded left and padded right has the same probabilities")


def check_head(setup: Setup, role: str) -> Check:
    """Hidden states times the head that klft reads, against the model's own logits."""
    if role not in setup.heads:
        setup.heads[role] = _check_head(setup, role)
    return setup.heads[role]


@torch.no_grad()
def _check_head(setup: Setup, role: str) -> Check:
    name = f"{role}: head"
    ids, mask = setup.batch
    everywhere = mask.bool()
    with evaluating(setup.policy):
        if role == "reference":
            side = setup.scorer.reference_side(ids, mask, everywhere)
        else:
            inputs = causal_inputs(setup.policy, ids, mask, ids.shape[1])
            side = setup.scorer.policy_side(setup.policy, inputs, everywhere)
    if side.head is None:
        return Check(name, "note", "its head cannot be read: scored from logits, which takes more memory")
    if side.head.shard is not None:
        return Check(name, "skipped", "the head is split over processes")
    ours, own = side.head.logits(side.hidden).float(), setup.logits_of(role)[everywhere]
    rough, own = setup.low_precision or own.dtype in (torch.float16, torch.bfloat16), own.float()
    both = ours.isfinite() & own.isfinite()
    if not torch.equal(ours.nan_to_num()[~both], own.nan_to_num()[~both]):  # a suppressed id is -inf in both
        return problem(name, "hidden states times the head are infinite or NaN where the model's own logits are not")
    ours, own = ours[both], own[both]
    off = float((ours - own).abs().max() / own.abs().max().clamp(min=1e-6)) if len(own) else 0.0
    if not off < (3e-2 if rough else 1e-5):
        return problem(
            name, f"hidden states times the head differ from the model's own logits by {off:.1e} of the largest: a "
            "softcap, a scale or a bias is not read. Pass an LMHead with it, or score from logits"
        )  # fmt: skip
    return ok(name, "hidden states times the head are the model's own logits")


OF_ONE = {"repeatable": check_repeatable, "padding": check_padding, "head": check_head}


# ---- the two together ------------------------------------------------------------------------------------------------


def check_start(setup: Setup) -> Check:
    """KL(policy, reference), which is 0 where one is the other."""
    name = "start"
    real = setup.real
    off = largest_kl(setup.policy_logits[real], setup.reference_logits[real])
    if setup.starts_equal and off > setup.kl_tolerance:
        return problem(
            name, f"the policy starts as the reference, and their KL is {off:.1e} nats: one of the two is not what it "
            "was loaded as (an adapter that is on, another checkpoint)"
        )  # fmt: skip
    measure = getattr(setup.reference, "distance_to", None) if setup.starts_equal is None else None
    distance = None if measure is None else measure(setup.policy)
    if distance is not None and distance > UNRELATED:
        return problem(
            name, f"the weights of policy and reference have nothing in common (relative distance {distance:.2f}): is "
            "the reference the model that the policy came from?"
        )  # fmt: skip
    if off > setup.kl_tolerance:
        return Check(name, "note", f"the policy does not start as the reference: KL up to {off:.2g} nats per token")
    return ok(name, "KL(policy, reference) is 0")


def check_independent(setup: Setup) -> Check:
    """Change every trained weight: the policy must move, the reference must not. Undone exactly."""
    name = "reference stays"
    try:
        setup.reference.check_independent(setup.policy)
    except ValueError as error:
        return problem(name, str(error))
    trained = [p for p in setup.policy.parameters() if p.requires_grad and p.is_floating_point() and p.numel()]
    if not trained:
        if any(p.requires_grad for p in setup.policy.parameters()):
            return Check(name, "skipped", "the trained weights lie on other processes (ZeRO-3)")
        return problem("policy moves", "no weight of the policy is trainable: call requires_grad_(True)")
    real = setup.real
    policy, reference = setup.policy_logits[real], setup.reference_logits[real]
    with _changed(trained):
        moved = largest_kl(setup.logits_again("policy", *setup.batch)[real], policy)
        followed = setup.logits_again("reference", *setup.batch)[real]
    if not torch.equal(followed, reference) and largest_kl(followed, reference) > setup.kl_tolerance / 100:
        return problem(
            name, "weights that are trained move the reference: its adapter is not off, or it shares memory with the "
            "policy. Load the reference a second time"
        )  # fmt: skip
    if moved == 0:
        return problem("policy moves", "the policy's probabilities do not depend on the weights that are trained")
    return ok(name, "what is trained moves the policy, and not the reference")


@contextmanager
def _changed(weights: list[nn.Parameter]) -> Iterator[None]:
    """Each shifted by a number and negated, zeros 0.01: exactly undone, without a copy of all. Not negated alone: the
    product of an adapter's two matrices, or a reflection, would be as before.
    """
    local = [(p.to_local() if isinstance(p, DTensor) else p).detach() for p in weights]
    zeros = [not bool(t.any()) for t in local]

    def turn(by: int) -> None:
        for t, zero in zip(local, zeros, strict=True):
            t.fill_(0.01 if by == 1 else 0.0) if zero else t.copy_(-t.flatten().roll(by).view(t.shape))
        torch.clear_autocast_cache()  # it would go on with 16-bit copies of the weights as they were

    turn(1)
    try:
        yield
    finally:
        turn(-1)


def check_vocabulary(setup: Setup) -> Check:
    """Heads against the tokenizer, and the probability of ids that only one of the two has."""
    name = "vocabulary"
    sizes = {"policy": vocab_size(setup.policy), "reference": setup.reference.vocab_size}
    if setup.tokenizer is not None:
        try:
            check_vocabularies(setup.tokenizer, **sizes)
        except ValueError as error:
            return problem(name, str(error))
    shared = min(sizes.values())
    wider = max(sizes, key=lambda role: sizes[role])
    if sizes[wider] == shared:
        return _check_unknown_ids(setup, ok(name, f"both heads have {shared:,} rows"))
    held = setup.logits_of(wider)[setup.real].float().softmax(-1)[:, shared:].sum(-1).max()
    if held > CUT_MASS:
        return problem(
            name, f"the {wider}'s head has {sizes[wider]:,} rows, the other {shared:,}, and the ids that are cut hold "
            f"{float(held):.1e} of the probability: they are no padding. Use two models with one vocabulary"
        )  # fmt: skip
    return _check_unknown_ids(
        setup, ok(name, f"{shared:,} ids are shared; the {wider}'s others hold {float(held):.1e} of the probability")
    )


def _check_unknown_ids(setup: Setup, otherwise: Check) -> Check:
    """A note where the policy would sample ids that the tokenizer does not have."""
    if setup.tokenizer is None:
        return otherwise
    known = last_id(setup.tokenizer) + 1
    held = float(setup.policy_logits[setup.real].float().softmax(-1)[:, known:].sum(-1).max())
    if not held > CUT_MASS:
        return otherwise
    return Check(
        "vocabulary", "note", f"the policy gives up to {held:.1e} of the probability to ids from {known} on, which the "
        "tokenizer does not have: it samples them, and they read as nothing. Train it with its own tokenizer"
    )  # fmt: skip
