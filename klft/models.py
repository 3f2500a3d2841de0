"""Everything klft knows of a transformers model: wrappers, inputs, modes, hidden states, vocabulary, positions.

Models are recognised by what they have (duck typing); transformers and peft are imported inside functions only.
"""

import inspect
import logging
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def base_of(model: nn.Module) -> Any:
    """The transformers model inside DistributedDataParallel and PEFT wrappers, or the model itself."""
    model = model.module if isinstance(model, DistributedDataParallel) else model
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # pyright: ignore


def causal_inputs(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, keep: int = 0) -> dict[str, Any]:
    """Keyword arguments of one scoring forward, whose logits are the last `keep` positions' (0: all). `model` may be
    wrapped; call it as you have it.

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


def check_vocabularies(tokenizer: "PreTrainedTokenizerBase", **sizes: int) -> None:
    """Raise ValueError if a head (by role: its rows) is smaller than the tokenizer. Rows beyond its ids may differ."""
    for role, size in sizes.items():
        if size < len(tokenizer):
            raise ValueError(f"the {role}'s head has {size} rows, but the tokenizer has {len(tokenizer)} ids")


def vocab_size(model: nn.Module) -> int:
    """Rows of the model's vocabulary head."""
    return base_of(model).get_output_embeddings().weight.shape[0]  # pyright: ignore


class VocabularyCut:
    """Cuts logits to the ids both models have, and says once how much probability the cut ids held."""

    def __init__(self):
        self.warned = False

    def __call__(self, logits: Tensor, size: int) -> Tensor:
        if logits.shape[-1] == size:
            return logits
        if not self.warned:
            held = logits.detach().float().softmax(-1)[..., size:].sum(-1)
            self.warn(logits.shape[-1], size, held.max().item() if held.numel() else 0.0)
        return logits[..., :size]

    def warn(self, rows: int, size: int, held: float) -> None:
        """Once: a head of `rows` rows is cut to `size`; `held` is the most probability that was cut from a token."""
        if not self.warned:
            self.warned = True
            logger.warning(
                "a model has %d vocabulary rows, the other %d: ids from %d on are padding and left out "
                "(at most %.1e of the probability in the first batch)", rows, size, size, held,
            )  # fmt: skip


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


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout probability to 0: dropout modules and the floats that functional calls read."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def max_positions(model: nn.Module) -> int | None:
    """The longest text the model can read, in tokens; None where its configuration has no such limit."""
    positions = getattr(base_of(model).config.get_text_config(), "max_position_embeddings", None)
    return positions if positions and positions > 0 else None


def check_positions(longest: int, **positions: int | None) -> None:
    """Raise ValueError where a model (by role: its positions, or None) has fewer than the longest text has tokens."""
    for role, limit in positions.items():
        if limit is not None and limit < longest:
            raise ValueError(f"texts have up to {longest} tokens, the {role} {limit} positions: cut them shorter")


def check_no_shared_storage(reference: nn.Module, policy: nn.Module) -> None:
    """Raise ValueError, naming the parameter, if one of the policy's lives in the reference's storage."""
    own = {p.untyped_storage().data_ptr() for p in reference.parameters() if p.numel()}
    for name, p in policy.named_parameters():
        if p.numel() and p.untyped_storage().data_ptr() in own:
            raise ValueError(
                f"the reference shares the policy's memory (parameter {name!r}), so it would not stay frozen. "
                "Load it a second time, or copy it with copy.deepcopy(model)."
            )


def check_tokenizers(tokenizer: "PreTrainedTokenizerBase", ref_tokenizer: "PreTrainedTokenizerBase") -> None:
    """Raise ValueError, naming the first ones, where an id stands for different pieces in two tokenizers.

    Ids that only one of them has are no contradiction: whether both heads have a row for them, `score_texts` checks.
    """
    ids, ref_ids = ({i: piece for piece, i in each.get_vocab().items()} for each in (tokenizer, ref_tokenizer))
    differing = sorted(i for i in ids.keys() & ref_ids.keys() if ids[i] != ref_ids[i])
    if differing:
        shown = "; ".join(f"{i} is {ids[i]!r} and {ref_ids[i]!r}" for i in differing[:3])
        raise ValueError(
            f"the tokenizers of policy and reference differ in {len(differing):,} ids: {shown}. KL per token needs two "
            "models with one vocabulary"
        )


class _Tied(torch.autograd.Function):
    """x, with other tensors in its graph that get no gradient from it (not even zeros, which would be their size)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *others: Tensor) -> Tensor:
        ctx.count = len(others)
        return x.clone()  # FSDP2 warns of a unit that returns a view

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple:  # pyright: ignore
        return gradient, *[None] * ctx.count


@contextmanager
def hidden_states(model: nn.Module):
    """Forwards of `model` inside compute no logits: they return [B, 0, V], and kept.hidden [B, T, D] is what the head
    would have read (T tokens, or the last logits_to_keep).

    Only the forward of the head's module is exchanged, so all hooks run (DDP, FSDP2, PEFT, tensor parallel) and the
    head's parameters have their place in the graph. Pass the model as you call it. Raises RuntimeError at the end if no
    forward came through the head (a model compiled before, for instance).
    """
    kept, head = SimpleNamespace(hidden=None), base_of(model).get_output_embeddings()

    def keep(hidden: Tensor, *_args: Any, **_options: Any) -> Tensor:
        # Not an empty batch through the head's own forward: a DTensor cannot view [B, 0, V].
        kept.hidden = hidden.full_tensor() if isinstance(hidden, DTensor) else hidden
        empty = kept.hidden[..., :0, :1].expand(*hidden.shape[:-2], 0, len(head.weight))
        return _Tied.apply(empty, *head.parameters())  # pyright: ignore

    def join(_model: nn.Module, _args: tuple, output: Any) -> None:
        logits = output.get("logits") if isinstance(output, dict) else output[0]
        if isinstance(logits, Tensor):
            # Plus nothing, but with the model's output in the graph: FSDP2's root counts on a backward through it.
            kept.hidden = kept.hidden + logits.sum().to(kept.hidden)

    before = {name: value for name, value in vars(head).items() if name == "forward"}  # tensor parallel has its own
    hook = model.register_forward_hook(join)
    head.forward = keep
    try:
        yield kept
        if kept.hidden is None:
            raise RuntimeError(f"hidden_states: no forward of {type(base_of(model)).__name__} came through its head")
    finally:
        hook.remove()
        del head.forward
        vars(head).update(before)
