"""Everything klft knows of a transformers model: wrappers, inputs, modes, hidden states, vocabulary, positions.

Models are recognised by what they have (duck typing); transformers and peft are imported inside functions only.
"""

import hashlib
import inspect
import logging
import math
import re
from collections.abc import Callable
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, ref

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from klft.divergences import reverse_kl

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


VALUE_MODULES = frozenset({"v_head", "value_model"})
"""Submodules that PPO attaches to a policy as its value function: no part of the language model."""


def unwrap(model: nn.Module) -> nn.Module:
    """The transformers or PEFT model inside DDP, FSDP1, DeepSpeed's engine and torch.compile, whatever is in what.

    Told by what classes define: engines and compiled modules hand other attributes on from the model inside.
    """
    while not any(hasattr(type(model), name) for name in ("get_output_embeddings", "get_base_model")):
        inner = getattr(model, "_orig_mod", None)  # of torch.compile(model)
        inner = getattr(model, "module", None) if inner is None else inner
        if not isinstance(inner, nn.Module):
            break
        model = inner
    return model


def base_of(model: nn.Module) -> Any:
    """The transformers model inside wrappers and PEFT, or the model itself."""
    model = unwrap(model)
    return unwrap(model.get_base_model()) if hasattr(model, "get_base_model") else model  # pyright: ignore


def model_name(model: nn.Module) -> str:
    """The model's name or path, else its class."""
    base = base_of(model)
    return base.config._name_or_path or type(base).__name__


def token_positions(attention_mask: Tensor) -> Tensor:
    """[B, T] -> each token's place among the real ones of its row; 0 on left padding."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def causal_inputs(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, keep: int = 0) -> dict[str, Any]:
    """Keyword arguments of one scoring forward, whose logits are the last `keep` positions' (0: all). `model` may be
    wrapped; call it as you have it.

    Positions count real tokens only, so left padding does not change a logit. Models without these arguments (ALiBi,
    recurrent ones) take the mask alone.
    """
    accepted = inspect.signature(base_of(model).forward).parameters
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
    if "position_ids" in accepted:
        inputs["position_ids"] = token_positions(attention_mask)
    if "logits_to_keep" in accepted:
        inputs["logits_to_keep"] = keep
    return inputs


def device_of(model: nn.Module) -> torch.device:
    """Where its inputs go: with the first weight that is not offloaded. accelerate's hooks take them from there."""
    return next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))


_ignoring_padding: set[type] = set()  # classes whose logits left padding was seen not to change
_causal: set[type] = set()  # classes whose logits were seen not to depend on what follows


def _probe_kl(model: nn.Module, ids: Tensor, attention: Tensor, kept: slice) -> tuple[float, float]:
    """(KL between the first row's real tokens alone and `kept` of the second forward, what rounding may give); the KL
    is NaN where the weights are."""
    alone = ids[:, kept]
    with evaluating(model), torch.random.fork_rng([ids.device] if ids.device.type == "cuda" else []):
        plain = model(**causal_inputs(model, alone, torch.ones_like(alone))).logits
        other = model(**causal_inputs(model, ids, attention)).logits[:, kept]
    # Under autocast accelerate gives fp32 logits of 16-bit products.
    rounded = torch.is_autocast_enabled(ids.device.type) or is_quantized(model)
    exact = plain.dtype in (torch.float32, torch.float64) and not rounded
    # NaN without anything around it says nothing of what a model reads: scoring names model, sample and position.
    off = math.nan if bool(plain.isnan().any()) else float(reverse_kl(other, plain).nan_to_num(math.inf).max())
    return off, 1e-5 if exact else 1e-2


def _probe_tokens(model: nn.Module, count: int) -> Tensor:
    """Ids [1, count], all over the vocabulary; fewer where the model has not so many positions."""
    size = vocab_size(model)
    ids = (torch.arange(min(count, max_positions(model) or count)) * 7 + 5) % size
    return ids[None].to(device_of(model))


def check_left_padding(model: nn.Module, role: str = "model") -> None:
    """Raise TypeError for a model whose logits left padding changes: recurrent ones, positions or windows by column.

    Two small forwards, once per class: tokens alone, and the same after padding. There are more of them than the
    windows are long that models compress (4), and no window divides the padding.
    """
    kind = type(base_of(model))
    # A prompt that is learnt stands before the padding.
    learnt = [c for c in getattr(model, "peft_config", {}).values() if c.is_prompt_learning]
    if kind in _ignoring_padding and not learnt:
        return
    ids, padding = _probe_tokens(model, 23), 7
    mask = (torch.arange(ids.shape[1], device=ids.device) >= padding).long()[None]
    off, rounding = _probe_kl(model, ids * mask, mask, slice(padding, None))
    if math.isnan(off):
        return
    if off >= rounding:
        raise TypeError(
            f"{role}: {kind.__name__} does not leave padding out: the same tokens have other probabilities "
            f"after left padding (KL {off:.1e} nats). Score texts of equal length, without padding, or use a model "
            "that reads the attention mask and position_ids"
        )
    if not learnt:
        _ignoring_padding.add(kind)


def check_causal(model: nn.Module, role: str = "model") -> None:
    """Raise TypeError for a model whose logits depend on later tokens: it gives no probability of a next token.

    Two small forwards, once per class: tokens alone, and the same with others behind them.
    """
    kind = type(base_of(model))
    if kind in _causal:
        return
    ids = _probe_tokens(model, 9)
    off, rounding = _probe_kl(model, ids, torch.ones_like(ids), slice(-3))
    if math.isnan(off):
        return
    if off >= rounding:
        raise TypeError(
            f"{role}: {kind.__name__} sees what follows: the same tokens have other probabilities where a text goes on "
            f"(KL {off:.1e} nats), so it has none of a next token. Use a causal language model"
        )
    _causal.add(kind)


def is_quantized(model: nn.Module) -> bool:
    """Whether some weights are packed: a quantisation config, integers, or torch.ao's weights behind a method."""
    base = base_of(model)
    return (
        bool(getattr(base, "is_quantized", False))
        or any(not p.is_floating_point() for p in base.parameters())
        or any(callable(getattr(type(m), "weight", None)) for m in base.modules())
    )


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
        load = ": load it, AutoModelForCausalLM.from_pretrained(name)" if isinstance(inner, str) else ""
        raise TypeError(f"{role}: expected a transformers causal language model, got {type(inner).__name__}{load}")
    encoder_decoder = getattr(config, "is_encoder_decoder", False)
    if encoder_decoder or sees_the_future or inner.get_output_embeddings() is None:
        raise TypeError(
            f"{role}: expected a causal language model with a vocabulary head (AutoModelForCausalLM), "
            f"got {type(inner).__name__}"
        )
    loaded_as = [a for a in getattr(config, "architectures", None) or () if a.endswith("ForSequenceClassification")]
    if loaded_as:
        raise TypeError(f"{role}: {config._name_or_path} is a {loaded_as[0]}; its vocabulary head would be random")


LOADING_INFO = {"output_loading_info": True, "ignore_mismatched_sizes": True}
"""Options of from_pretrained, which then gives (model, what check_loading wants to see)."""


def check_loading(model: nn.Module, info: dict[str, Any], role: str) -> None:
    """Raise ValueError, naming tensors, where a checkpoint is not the whole of `model`: transformers draws what is
    missing or of another shape at random, and drops what has no place.

    Tensors of modules that the model does not have (a value head, an image tower) are no fault; further layers, and
    further tensors of the model's own modules, are.
    """
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    missing = sorted(set(info["missing_keys"]) & parameters)
    mismatched = [f"{name} {list(of_file)}, not {list(own)}" for name, of_file, own in sorted(info["mismatched_keys"])]
    patterns = {re.sub(r"\d+", "#", name) for name in parameters}
    modules = {name.rpartition(".")[0] for name in parameters}
    further = [
        name
        for name in sorted(info["unexpected_keys"])
        if re.sub(r"\d+", "#", name) in patterns or name.rpartition(".")[0] in modules
    ]
    if getattr(model, "is_quantized", False):
        further = []  # scales and the like, which the quantiser reads
    faults = {"lacks": missing, "has in another shape": mismatched, "has, and the model has no place for,": further}
    said = [f"{verb} {len(names)} tensor(s) ({', '.join(names[:3])})" for verb, names in faults.items() if names]
    if said:
        raise ValueError(
            f"{role}: the checkpoint is not a whole {type(model).__name__}: it {'; it '.join(said)}. Save the model "
            "anew, or mend its config.json"
        )


def last_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    """The largest id; ids may have gaps, so it is not always len(tokenizer) - 1."""
    return max(tokenizer.get_vocab().values() if hasattr(tokenizer, "get_vocab") else range(len(tokenizer)), default=-1)


def check_vocabularies(tokenizer: "PreTrainedTokenizerBase", **sizes: int) -> None:
    """Raise ValueError if a head (by role: its rows) is smaller than the tokenizer. Rows beyond its ids may differ."""
    last = last_id(tokenizer)
    for role, size in sizes.items():
        if size <= last:
            gaps = "" if last < len(tokenizer) else f", up to {last}"
            raise ValueError(f"the {role}'s head has {size} rows, but the tokenizer has {len(tokenizer)} ids{gaps}")


def head_rows(head: Any) -> int:
    """Rows of a vocabulary head; of a quantised one, whose weight has another shape, the features it puts out."""
    weight = getattr(head, "weight", None)
    if isinstance(weight, Tensor) and weight.ndim == 2 and weight.is_floating_point():
        return weight.shape[0]
    rows = getattr(head, "out_features", None)
    if not isinstance(rows, int):
        raise TypeError(f"the vocabulary head ({type(head).__name__}) does not say how many ids it has")
    return rows


def vocab_size(model: nn.Module) -> int:
    """Rows of the model's vocabulary head."""
    return head_rows(base_of(model).get_output_embeddings())


CUT_MASS = 1e-3  # the most probability that ids may hold and still be padding
CUT_TOKENS = 16  # of every batch after the first, on which that is measured


class VocabularyCut:
    """Cuts logits to the ids both models have. What the others hold is measured in every batch: CUT_MASS at most."""

    def __init__(self):
        self.warned = False

    def __call__(self, logits: Tensor, size: int) -> Tensor:
        if logits.shape[-1] == size:
            return logits
        held = self.some(logits.detach().reshape(-1, logits.shape[-1])).float().softmax(-1)[:, size:].sum(-1)
        self.check(logits.shape[-1], size, held)
        return logits[..., :size]

    def some(self, tokens: Tensor) -> Tensor:
        """Of tokens [N, *] those to measure: all of the first batch, few of a later one, where they cost little."""
        return tokens[:: len(tokens) // CUT_TOKENS | 1] if self.warned else tokens  # odd: another column in each row

    def check(self, rows: int, size: int, mass: Float[Tensor, "N"]) -> None:
        """A head of `rows` rows is cut to `size`, which takes `mass` from each token; said once.

        Raises ValueError where that is more than CUT_MASS: then the ids are no padding.
        """
        held = mass.max().item() if len(mass) else 0.0
        if held > CUT_MASS:
            raise ValueError(
                f"a model has {rows} vocabulary rows, the other {size}, and the ids from {size} on are no padding: they"
                f" hold up to {held:.1e} of the probability, where at most {CUT_MASS:g} may be cut. Take two models "
                "with one vocabulary"
            )
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
    """Set every dropout probability to 0: dropout modules, the floats that functional calls read, and layer drop."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if ("dropout" in name or name == "layerdrop") and isinstance(value, float):
                setattr(module, name, 0.0)


def quiet(model: nn.Module) -> None:
    """Eval mode for all but layers that checkpoint their activations, which do so in train mode only.

    After `model.train()`, before a loss: dropout, router jitter, layer drop and their like then stay off, as they were
    when the tokens were scored. Gradients flow as before.
    """
    for module in model.modules():
        if module.training and not getattr(module, "gradient_checkpointing", False):
            module.training = False


def max_positions(model: nn.Module) -> int | None:
    """The longest text the model can read, in tokens; None where its configuration has no such limit."""
    positions = getattr(base_of(model).config.get_text_config(), "max_position_embeddings", None)
    return positions if positions and positions > 0 else None


def position_offset(model: nn.Module) -> int:
    """Positions that are never used: RoBERTa and its kin count from behind the pad id."""
    embeddings = [m for name, m in model.named_modules() if name.endswith("position_embeddings")]
    padding = [m.padding_idx for m in embeddings if isinstance(m, nn.Embedding) and m.padding_idx is not None]
    return padding[0] + 1 if padding else 0


def check_positions(longest: int, **positions: int | None) -> None:
    """Raise ValueError where a model (by role: its positions, or None) has fewer than the longest text has tokens."""
    for role, limit in positions.items():
        if limit is not None and limit < longest:
            raise ValueError(f"texts have up to {longest} tokens, the {role} {limit} positions: cut them shorter")


def zero_pad_embedding(model: nn.Module) -> int | None:
    """The pad id, where its embedding is all zeros: there the gradient of some families is NaN (Gemma3n)."""
    layer = base_of(model).get_input_embeddings()
    pad, weight = getattr(layer, "padding_idx", None), getattr(layer, "weight", None)
    if pad is None or not isinstance(weight, Tensor) or isinstance(weight, DTensor) or weight.ndim != 2:
        return None
    return pad if pad < len(weight) and not bool(weight[pad].any()) else None


def address(p: Tensor) -> int | None:
    """Where a tensor's numbers are; None for tensor subclasses without a storage of their own (torchao)."""
    try:
        return p.untyped_storage().data_ptr() or None
    except (NotImplementedError, RuntimeError):
        return None


def check_no_shared_storage(
    kept: nn.Module, trained: nn.Module, *, role: str = "reference", trained_role: str = "policy"
) -> None:
    """Raise ValueError, naming the parameter, if one of the trained model's lives in the other's storage."""
    own = {address(p) for p in kept.parameters() if p.numel()} - {None}
    for name, p in trained.named_parameters():
        if p.numel() and address(p) in own:
            raise ValueError(
                f"the {role} shares the {trained_role}'s memory (parameter {name!r}), so training the {trained_role} "
                f"would change the {role}. Load it a second time, or copy it with copy.deepcopy(model)."
            )


def tokenizer_hash(tokenizer: "PreTrainedTokenizerBase") -> str:
    """16 hex digits that differ when any id stands for another piece."""
    pieces = sorted((token_id, piece) for piece, token_id in tokenizer.get_vocab().items())
    return hashlib.sha256(repr(pieces).encode("utf-8", "backslashreplace")).hexdigest()[:16]


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


def _place_tokens(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Add the positions that count real tokens only, unless the caller has some: a reference is placed so too."""
    mask = kwargs.get("attention_mask")
    takes_them = "position_ids" in inspect.signature(base_of(model).forward).parameters
    if takes_them and kwargs.get("position_ids") is None and isinstance(mask, Tensor) and mask.dim() == 2:
        kwargs = kwargs | {"position_ids": token_positions(mask)}
    return args, kwargs


_taps: WeakKeyDictionary[nn.Module, tuple[SimpleNamespace, Callable]] = WeakKeyDictionary()


def _tap(head: nn.Module) -> tuple[SimpleNamespace, Any]:
    """(where to put hidden states, the forward that puts them there): one pair per head.

    A new function in every step would be a new graph to a compiled model. It is not traced itself.
    """
    if head not in _taps:
        slot, of = SimpleNamespace(kept=None), ref(head)

        def keep(hidden: Tensor, *_args: Any, **_options: Any) -> Tensor:
            layer: Any = of()
            # Not an empty batch through the head's own forward: a DTensor cannot view [B, 0, V].
            hidden = hidden.full_tensor() if isinstance(hidden, DTensor) else hidden
            slot.kept.hidden = hidden
            empty = hidden[..., :0, :1].expand(*hidden.shape[:-2], 0, head_rows(layer))
            return _Tied.apply(empty, *layer.parameters())  # pyright: ignore

        _taps[head] = slot, torch.compiler.disable(keep)
    return _taps[head]


@contextmanager
def hidden_states(model: nn.Module):
    """Forwards of `model` inside compute no logits: they return [B, 0, V], and kept.hidden [B, T, D] is what the head
    would have read (T tokens, or the last logits_to_keep).

    Tokens are placed as `causal_inputs` places them where the call has an attention_mask and no position_ids.
    Only the forward of the head's module is exchanged, so all hooks run (DDP, FSDP2, PEFT, tensor parallel) and the
    head's parameters have their place in the graph. Pass the model as you call it. A compiled model's graph ends before
    the head here (so not with fullgraph=True). Raises RuntimeError at the end if no forward came through the head.
    """
    kept, head = SimpleNamespace(hidden=None), base_of(model).get_output_embeddings()

    slot, keep = _tap(head)
    outer, slot.kept = slot.kept, kept

    @torch.compiler.disable
    def join(_model: nn.Module, _args: tuple, output: Any) -> None:
        logits = output.get("logits") if isinstance(output, dict) else output[0]
        if isinstance(logits, Tensor):
            # Plus nothing, but with the model's output in the graph: FSDP2's root counts on a backward through it.
            kept.hidden = kept.hidden + logits.sum().to(kept.hidden)

    before = {name: value for name, value in vars(head).items() if name == "forward"}  # tensor parallel has its own
    place: Any = torch.compiler.disable(_place_tokens)
    hook = model.register_forward_hook(join)  # pyright: ignore
    places = model.register_forward_pre_hook(place, with_kwargs=True)
    head.forward = keep
    try:
        yield kept
        if kept.hidden is None:
            raise RuntimeError(f"hidden_states: no forward of {type(base_of(model)).__name__} came through its head")
    finally:
        hook.remove()
        places.remove()
        del head.forward
        vars(head).update(before)
        slot.kept = outer
