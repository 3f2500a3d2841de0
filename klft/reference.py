"""The frozen reference: whatever the policy must stay close to, as a thing that gives logits and never learns.

`reference(input_ids, attention_mask, keep)` returns the logits of the last `keep` positions, [B, keep, V], under
no_grad, in eval mode, with the tokens at the positions they would have without padding. `reference.hidden(...)`, with
the same arguments, returns what its head would have read and the head, and computes no logits.
"""

import inspect
import logging
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from klft.heads import LMHead, base_of, hidden_states

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def causal_inputs(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, keep: int) -> dict:
    """Keyword arguments of one scoring forward. `model` unwrapped (no DDP); call the wrapped one with them.

    Positions count real tokens only, so left padding does not change a logit. Models without these arguments (ALiBi,
    recurrent ones) take the mask alone.
    """
    accepted = inspect.signature(base_of(model).forward).parameters
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
    if "position_ids" in accepted:
        inputs["position_ids"] = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    if "logits_to_keep" in accepted:
        inputs["logits_to_keep"] = keep
    return inputs


def require_causal_lm(model: nn.Module, role: str) -> None:
    """Raise TypeError unless `model` is a transformers causal language model with a head over the vocabulary."""
    from transformers import PreTrainedModel
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    inner = base_of(model)
    config = getattr(inner, "config", None)
    # BERT and its kin have a vocabulary head too, but see the future unless told to be decoders.
    encoder = getattr(config, "model_type", "") in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    sees_the_future = encoder and not getattr(config, "is_decoder", False)
    if not isinstance(inner, PreTrainedModel) or config is None:
        raise TypeError(f"{role}: expected a transformers causal language model, got {type(inner).__name__}")
    encoder_decoder = getattr(config, "is_encoder_decoder", False)
    if encoder_decoder or sees_the_future or inner.get_output_embeddings() is None:
        raise TypeError(
            f"{role}: expected a causal language model with a vocabulary head (AutoModelForCausalLM), "
            f"got {type(inner).__name__}"
        )
    loaded_as = [a for a in getattr(config, "architectures", None) or () if a.endswith("ForSequenceClassification")]
    if loaded_as:
        raise TypeError(f"{role}: {config._name_or_path} is a {loaded_as[0]}; its vocabulary head would be random")


def check_vocabularies(policy: nn.Module, reference: nn.Module, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Refuse vocabularies that cannot be compared; padding beyond the tokenizer's own ids may differ.

    Raises ValueError if either head is smaller than the tokenizer, or sizes differ for another reason than padding.
    """
    sizes = {"policy": vocab_size(policy), "reference": vocab_size(reference)}
    for role, size in sizes.items():
        if size < len(tokenizer):
            raise ValueError(f"the {role}'s head has {size} rows, but the tokenizer has {len(tokenizer)} ids")


def vocab_size(model: nn.Module) -> int:
    """Rows of the model's vocabulary head."""
    return base_of(model).get_output_embeddings().weight.shape[0]  # pyright: ignore


class VocabularyCut:
    """Cuts logits to the ids both models have, and says once how much probability the cut ids held."""

    def __init__(self):
        self.told = False

    def __call__(self, logits: Tensor, size: int) -> Tensor:
        if logits.shape[-1] == size:
            return logits
        if not self.told:
            self.told = True
            held = logits.detach().float().softmax(-1)[..., size:].sum(-1).max().item()
            logger.warning(
                "a model has %d vocabulary rows, the other %d: ids from %d on are padding and left out "
                "(at most %.1e of the probability in the first batch)", logits.shape[-1], size, size, held,
            )  # fmt: skip
        return logits[..., :size]


@contextmanager
def evaluating(model: nn.Module):
    """Eval mode and no gradient inside; whatever modes the model's parts were in come back afterwards.

    Eval mode also keeps activation checkpointing out of the way of generation, without touching its settings.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield model
    finally:
        for module in training:
            module.training = True


@torch.no_grad()
def _hidden(model: nn.Module, inputs: dict, keep: int) -> tuple[Tensor, LMHead]:
    with hidden_states(model) as kept:
        model(**inputs)
    return kept.hidden[:, -keep:], LMHead.from_model(model)


class FrozenReference:
    """A separate model, frozen: eval mode, no parameter asks for a gradient. TypeError for anything but a causal LM.

    The model is changed in place (frozen); it may be of another dtype, device or architecture than the policy, as long
    as the vocabulary is the same.
    """

    def __init__(self, model: "PreTrainedModel"):
        require_causal_lm(model, "reference")
        self.model = model.eval().requires_grad_(False)

    def check_apart_from(self, policy: nn.Module) -> None:
        """Raise ValueError if a parameter of the policy lives in the reference's memory: it would drift along."""
        own = {p.untyped_storage().data_ptr() for p in self.model.parameters() if p.numel()}
        for name, p in policy.named_parameters():
            if p.numel() and p.untyped_storage().data_ptr() in own:
                raise ValueError(
                    f"the reference shares the policy's memory (parameter {name!r}), so it would not stay frozen. "
                    "Load it a second time, or copy it with copy.deepcopy(model)."
                )

    def __call__(
        self, input_ids: Int[Tensor, "B T"], attention_mask: Int[Tensor, "B T"], keep: int = 0
    ) -> Float[Tensor, "B K V"]:
        device = next(self.model.parameters()).device
        inputs = causal_inputs(self.model, input_ids.to(device), attention_mask.to(device), keep)
        self.model.eval()  # a trainer that walks over modules may have flipped it
        with torch.no_grad():
            return self.model(**inputs).logits[:, -keep:].to(input_ids.device)

    def hidden(
        self, input_ids: Int[Tensor, "B T"], attention_mask: Int[Tensor, "B T"], keep: int = 0
    ) -> tuple[Float[Tensor, "B K D"], LMHead]:
        """(hidden states, head), both on the reference's own device."""
        device = next(self.model.parameters()).device
        inputs = causal_inputs(self.model, input_ids.to(device), attention_mask.to(device), keep)
        self.model.eval()
        return _hidden(self.model, inputs, keep)


class AdapterReference:
    """The policy itself with its PEFT adapter switched off: no second copy of the weights in memory.

    Logits equal the base model's exactly. Raises TypeError for a model without an adapter.
    """

    def __init__(self, peft_model: "PeftModel"):
        if not hasattr(peft_model, "disable_adapter"):
            raise TypeError(
                f"AdapterReference needs a PEFT model, got {type(peft_model).__name__}; use FrozenReference for a "
                "second, frozen model"
            )
        require_causal_lm(peft_model, "reference")
        self.model = peft_model

    def check_apart_from(self, policy: nn.Module) -> None:
        """Raise ValueError if the policy trains weights the adapter does not own: they are the reference's too."""
        # PEFT marks what an adapter owns with its tuner's prefix, or with one of these.
        marks = ["modules_to_save", "prompt_encoder", "trainable_tokens_"]
        marks.append(getattr(self.model.base_model, "prefix", "") or "prompt_encoder")
        shared = [n for n, p in policy.named_parameters() if p.requires_grad and not any(m in n for m in marks)]
        if shared:
            raise ValueError(
                f"these weights are trained but belong to the base model, which is the reference: {shared[:3]}. "
                "Freeze them, or pass a FrozenReference."
            )

    def __call__(
        self, input_ids: Int[Tensor, "B T"], attention_mask: Int[Tensor, "B T"], keep: int = 0
    ) -> Float[Tensor, "B K V"]:
        inputs = causal_inputs(self.model, input_ids, attention_mask, keep)
        with evaluating(self.model), self.model.disable_adapter():
            return self.model(**inputs).logits[:, -keep:]

    def hidden(
        self, input_ids: Int[Tensor, "B T"], attention_mask: Int[Tensor, "B T"], keep: int = 0
    ) -> tuple[Float[Tensor, "B K D"], LMHead]:
        """(hidden states, head) of the base model."""
        inputs = causal_inputs(self.model, input_ids, attention_mask, keep)
        with evaluating(self.model), self.model.disable_adapter():
            return _hidden(self.model, inputs, keep)
