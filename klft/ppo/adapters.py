"""A new adapter on the policy: made, and refused where it could not be trained or compared."""

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from klft.divergences import reverse_kl
from klft.models import check_left_padding, evaluating, vocab_size
from klft.scoring import Scorer

# What each needs of a training loop that is not there.
REFUSED = {
    "ADALORA": "AdaLoRA moves its ranks by update_and_allocate, once per step, which PPO does not call: use LoraConfig",
    "ADAPTION_PROMPT": "an adaption prompt's forward goes past the hooks that the value head needs: use LoraConfig",
    "POLY": "Poly asks for task_ids in every forward, and prompts have none",
    "MULTITASK_PROMPT_TUNING": "multitask prompt tuning asks for task_ids in every forward, and prompts have none",
    "XLORA": "X-LoRA mixes adapters that are trained already, by a classifier of its own: take one of them",
}


def _kind(peft_config: Any) -> str:
    return str(getattr(peft_config.peft_type, "value", peft_config.peft_type))


def check_method(model: Any, peft_config: Any) -> None:
    """Raise ValueError for a second adapter, and for a method, new or there already, that PPO's loop cannot train."""
    there = getattr(model, "peft_config", {})
    if there and peft_config is not None:
        raise ValueError(
            f"the model has an adapter already ({', '.join(there)}), and there is a peft_config: give the base model "
            "and the peft_config, or the PEFT model alone"
        )
    for kind in map(_kind, there.values() if peft_config is None else [peft_config]):
        if kind in REFUSED:
            raise ValueError(f"{'model' if peft_config is None else 'peft_config'}: {REFUSED[kind]}")


def attach_adapter(model: Any, peft_config: Any, *, is_reference: bool) -> Any:
    """The model with a new adapter. The value function comes after it: it is none of the adapter's modules.

    `is_reference`: with the adapter off it is to be the reference. Raises ValueError, naming the method, where that is
    not the model as it was, and for one that reads padding.
    """
    kind = _kind(peft_config)
    from peft import get_peft_model

    before = _logits(model) if is_reference else None
    policy = get_peft_model(model, peft_config)
    if peft_config.is_prompt_learning:
        try:
            check_left_padding(policy, "peft_config")
        except TypeError as error:
            raise ValueError(
                f"peft_config: {kind} drops position_ids, so a text's probabilities depend on its padding: use an "
                "adapter on layers, LoraConfig for instance"
            ) from error
    if before is not None:
        with policy.disable_adapter():
            off = float(reverse_kl(_logits(policy), before).max())
        if not off < (1e-6 if before.dtype in (torch.float32, torch.float64) else 1e-2):
            raise ValueError(
                f"peft_config: {kind} with its adapter off is not the model as it was (KL {off:.1e} nats), so it is no "
                "reference: give the base model, loaded a second time, as reference=..., or take another method"
            )
    return policy


def starts_equal(model: Any, reference: Any, peft_config: Any) -> bool | None:
    """Whether the policy starts as its reference: False for another model, None for adapters that may do something."""
    if reference is not None:
        return False
    if hasattr(model, "peft_config"):
        return None
    if peft_config is None:
        return True
    keeps = _kind(peft_config) == "LORA" and peft_config.init_lora_weights in (True, "gaussian")
    return True if keeps else None


@torch.no_grad()
def _logits(model: nn.Module) -> Any:
    """Of four tokens; None where the weights are not whole here (DeepSpeed's, tensor parallel)."""
    if any(p.numel() == 0 or p.is_meta or isinstance(p, DTensor) for p in model.parameters()):
        return None
    device = next(model.parameters()).device
    ids = torch.tensor([[5, 7, 6, 4]], device=device) % vocab_size(model)
    with evaluating(model):
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


def require_readable_policy_head(scorer: Scorer, model: nn.Module) -> None:
    """Raise TypeError for a vocabulary head that PPO cannot read: tokens are scored from it, without logits."""
    try:
        scorer.policy_head(model)
    except TypeError as error:
        if not hasattr(model, "peft_config"):
            raise
        raise TypeError(
            f"the policy's vocabulary head cannot be read, and PPO takes scores from it ({str(error).split('. ')[0]}). "
            "An adapter must leave lm_head out of its target_modules; modules_to_save=['lm_head'] trains it as a whole"
        ) from error
