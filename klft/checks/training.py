"""Checks of what surrounds the models: the mode of the loss, optimizer, processes, tokenizer, sampled tokens."""

import math
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from klft.checks.setup import Check, Rollout, Setup, largest_kl, ok, problem
from klft.fused import token_scores
from klft.masked import token_logps
from klft.models import causal_inputs, evaluating
from klft.prompts import pad_id

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# ---- the trainer around them -----------------------------------------------------------------------------------------


def check_loss_mode(setup: Setup) -> Check:
    """The rows in the mode of the loss, with gradient, against eval mode: the first ratio is 1; a gradient flows."""
    name = "loss"
    ids, mask = setup.batch
    inputs = causal_inputs(setup.policy, ids, mask, ids.shape[1])
    modes = [(module, module.training) for module in setup.policy.modules()]
    setup.policy.train(setup.was_training)
    try:
        if setup.loss_mode is not None:
            setup.loss_mode()
        with torch.enable_grad():
            logits = setup.policy(**inputs).logits
    finally:
        for module, mode in modes:
            module.training = mode
    flows = logits.requires_grad
    logits, real = logits.detach(), setup.real
    off = largest_kl(logits[real], setup.policy_logits[real])
    if off > setup.kl_tolerance:
        return problem(
            name, f"the policy has other probabilities in the loss than when it is scored (KL {off:.1e} nats), so the "
            "first ratio is not 1: dropout, jitter or layer drop is on. klft.disable_dropout(model), or model.eval()"
        )  # fmt: skip
    if not flows:
        return problem(name, "no gradient reaches the policy: its forward runs under no_grad, or all of it is frozen")
    return ok(name, "the first ratio is 1, and a gradient reaches the policy")


def check_optimizer(setup: Setup) -> Check:
    """What is trained is held by the optimizer."""
    name = "optimizer"
    assert setup.optimizer is not None
    held = {id(p) for group in setup.optimizer.param_groups for p in group["params"]}
    trained = {n: p for n, p in setup.policy.named_parameters() if p.requires_grad}
    missing = [n for n, p in trained.items() if id(p) not in held]
    if missing:
        return problem(
            name, f"the optimizer lacks {len(missing)} of {len(trained)} trainable tensors of the policy "
            f"({missing[0]}, ...): make it from policy.parameters(), after adapters and wrappers"
        )  # fmt: skip
    return ok(name, f"it holds all {len(trained)} trainable tensors")


@torch.no_grad()
def check_ranks(setup: Setup) -> Check:
    """Every process has the same weights, and so the same KL."""
    name = "processes"
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return Check(name, "skipped", "one process")
    if any(isinstance(p, DTensor) for p in setup.policy.parameters()):
        return Check(name, "skipped", "the weights are split over processes")
    of_policy = [p.detach().double().sum() for p in setup.policy.parameters()]
    try:
        of_reference = setup.reference_logits[setup.real].double().sum()
    except Exception:  # here only, perhaps: the other ranks must not wait for this one
        of_reference = torch.full_like(of_policy[0], math.nan)
    sums = torch.stack([*of_policy, of_reference])
    every = [torch.empty_like(sums) for _ in range(dist.get_world_size())]
    dist.all_gather(every, sums)
    differing = [rank for rank, each in enumerate(every) if not torch.allclose(each, every[0], rtol=1e-6, atol=1e-6)]
    if differing:
        return problem(
            name, f"rank(s) {differing} have other weights than rank 0: seed them alike, or wrap the policy "
            "(accelerator.prepare, DistributedDataParallel), which copies rank 0's"
        )  # fmt: skip
    return ok(name, f"all {len(every)} have the same weights")


# ---- tokens ----------------------------------------------------------------------------------------------------------


def check_tokenizer(setup: Setup) -> Check:
    """Its special tokens; padding that its mask leaves out."""
    name, tokenizer = "tokenizer", setup.tokenizer
    assert tokenizer is not None
    if tokenizer.eos_token_id is None:
        return problem(name, "it has no EOS token, so no completion could end: set tokenizer.eos_token")
    pieces = str(tokenizer.decode(setup.tokens.tolist()))
    short, long = pieces[: max(1, len(pieces) // 3)], pieces
    if tokenizer.pad_token_id is not None and short.strip():
        padded, alone = tokenizer([short, long], padding=True), [tokenizer(text) for text in (short, long)]
        counted = [sum(row) for row in padded["attention_mask"]]
        if counted != [len(each["input_ids"]) for each in alone]:
            return problem(name, "its attention mask counts padding as text: every KL would be of pads too")
    facts = [f"{k} {getattr(tokenizer, f'{k}_token')!r}" for k in ("bos", "eos", "pad")]
    facts.append("a chat template" if getattr(tokenizer, "chat_template", None) else "no chat template")
    return ok(name, ", ".join(facts))


def _unmarked_padding(input_ids: Tensor, tokenizer: "PreTrainedTokenizerBase") -> Tensor:
    """Pad ids at the ends of rows; one is a text's own end where EOS pads. A pad id inside may have been sampled."""
    is_pad = input_ids == pad_id(tokenizer)
    after = is_pad.flip(-1).cumprod(-1).flip(-1).bool()
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        after = after & torch.cat([torch.zeros_like(after[:, :1]), after[:, :-1]], 1)
    return after | is_pad.cumprod(-1).bool()


def check_mask(rollout: Rollout, tokenizer: "PreTrainedTokenizerBase | None") -> Check:
    """The tokens that count are real ones, each predicted by a real one."""
    name, input_ids = "mask", rollout.input_ids
    real, mask = rollout.attention_mask.bool(), rollout.mask.bool()
    before = torch.cat([torch.zeros_like(real[:, :1]), real[:, :-1]], 1)
    pads = mask & ~real
    if tokenizer is not None and bool(real.all()):
        pads = pads | (mask & _unmarked_padding(input_ids, tokenizer))
    if bool(pads.any()):
        return problem(
            name, f"{int(pads.sum())} of {int(mask.sum())} tokens that count are padding: use mask & attention_mask"
        )  # fmt: skip
    if bool((mask & ~before).any()):
        return problem(name, "a token that counts is predicted by padding: the first token of a text has no KL")
    return ok(name, f"{int(mask.sum())} tokens count, all of them text")


@torch.no_grad()
def _scored(setup: Setup, rollout: Rollout, mask: Tensor) -> Tensor:
    """Log-probabilities [N] of the tokens that count, as the scorer takes them; of the policy alone."""
    predicts = mask.roll(-1, 1)
    with evaluating(setup.policy):
        inputs = causal_inputs(setup.policy, rollout.input_ids, rollout.attention_mask, mask.shape[1])
        policy = setup.scorer.policy_side(setup.policy, inputs, predicts)
    if policy.head is not None:
        return token_scores(**setup.scorer.fused_inputs(policy, None, rollout.input_ids[mask])).logp
    shared = setup.scorer.shared_vocab(setup.policy)
    return token_logps(policy.logits[:, :shared] / setup.scorer.temperature, rollout.input_ids[mask])


def check_sampling(setup: Setup, rollout: Rollout) -> Check:
    """The sampler's log-probabilities of its tokens are the scored ones."""
    name = "sampling"
    assert rollout.logp is not None
    mask = rollout.mask.bool()
    scored = _scored(setup, rollout, mask)
    off = float((scored - rollout.logp[mask]).abs().mean()) if len(scored) else 0.0
    if not off < (0.1 if setup.low_precision else 1e-3):
        return problem(
            name, f"tokens were sampled from another distribution than the one that is scored ({off:.2g} nats apart on "
            f"average): score at the temperature of the sampler ({setup.scorer.temperature} here), without top_p, "
            "top_k or penalties"
        )  # fmt: skip
    return ok(name, "tokens are sampled from what is scored")
