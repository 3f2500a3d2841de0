"""The vocabulary head as data, read off a causal language model, and the hidden states that it reads.

    with hidden_states(model) as kept:             # the model as it is trained: PEFT, DDP, FSDP2, tensor parallel
        model(input_ids=ids, attention_mask=mask)  # its logits are empty, [B, 0, V]
    head = LMHead.from_model(model)                # anew for every step: under FSDP2 it is a copy, gathered once
    # kept.hidden [B, T, D], head: what token_scores, linear_divergence and fused_token_loss take

A head with an adapter of its own, a quantised one or an MLP cannot be read: score those from logits.
"""

from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from klft._deprecated import moved
from klft.models import address, base_of
from klft.parallel import placed
from klft.sharding import VocabShard
from klft.writing import one_line

# Classes (...ForCausalLM, ...LMHeadModel) of transformers whose logits are the head's output and nothing else. Those in
# neither table are probed.
_PLAIN = """Bamba Bloom DeepseekV2 DeepseekV3 Ernie4_5 Ernie4_5_Moe Exaone4 Falcon Gemma Glm Glm4 Glm4Moe GPT2 GPTJ
    GPTNeo GPTNeoX GPTBigCode GptOss Jamba Llama Mamba Mamba2 MiniCPM3 Mistral Mixtral Mpt Nemotron Olmo Olmo2 Olmo3 OPT
    Olmoe Phi Phi3 Qwen2 Qwen2Moe Qwen3 Qwen3Moe Qwen3Next Qwen3_5 SeedOss SmolLM3 StableLm Starcoder2 Zamba2"""
# What others do to it: configuration field, operation, classes. A field means different things in different classes
# (MiniCPM3 divides hidden states by logits_scaling, ahead of the head), so none is trusted without its class.
_AFTER = (
    ("logit_scale", "times", "Cohere Cohere2 Cohere2Moe CohereCompass"),
    ("logits_scaling", "times", "HyperCLOVAX"),
    ("logits_scaling", "over", "Granite GraniteSWA GraniteMoe GraniteMoeSWA GraniteMoeHybrid GraniteMoeShared"),
    ("lm_head_multiplier", "times", "FalconH1"),
    ("final_logit_softcapping", "cap", "Gemma2 Gemma3 Gemma3n Gemma4 Gemma4Unified NanoChat VaultGemma"),
    ("logits_soft_cap", "cap", "RecurrentGemma"),
    ("output_logit_soft_cap", "cap", "xLSTM"),
)
_probed: WeakKeyDictionary[nn.Module, tuple[float, float | None]] = WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class LMHead:
    """logits = cap(scale * (hidden @ weight.T + bias)), cap(z) = softcap * tanh(z / softcap), or z without softcap.

    With `shard`, weight and bias are this process's rows of the vocabulary. Gradients flow to weight and bias where
    they ask for one. Raises ValueError for what does not fit together.
    """

    weight: Tensor  # float [V, D]; __post_init__ says what else does not fit
    bias: Tensor | None = None  # float [V]
    scale: float = 1.0
    softcap: float | None = None
    shard: VocabShard | None = None

    def __post_init__(self):
        w, b, s = self.weight, self.bias, self.shard
        if isinstance(w, DTensor) or w.ndim != 2 or not w.is_floating_point():
            raise ValueError(
                f"LMHead: expected a plain floating-point weight [V, D], got a {type(w).__name__} {w.dtype} "
                f"{list(w.shape)}. LMHead.from_model reads DTensors; gather first what ZeRO-3 or FSDP1 keep elsewhere."
            )
        if (b is not None and b.shape != w.shape[:1]) or (s is not None and s.stop - s.start != len(w)):
            raise ValueError(f"LMHead: a weight of shape {w.shape} does not fit bias {getattr(b, 'shape', None)}, {s}")
        if not (0 < abs(self.scale) < torch.inf and (self.softcap is None or 0 < self.softcap < torch.inf)):
            raise ValueError(f"LMHead: scale must not be 0, softcap > 0 or None; got {self.scale} and {self.softcap}")

    @one_line
    def __repr__(self) -> str:
        w, shard = self.weight, self.shard
        rows = "" if shard is None else f", rows {shard.start} to {shard.stop}"
        more = [f"{name}={value:g}" for name in ("scale", "softcap") if (value := getattr(self, name)) not in (1, None)]
        size = f"{self.vocab_size} x {w.shape[1]}{rows}{'' if self.bias is None else ', bias'}"
        return ", ".join([size, str(w.dtype), str(w.device), *more])

    @property
    def vocab_size(self) -> int:
        """V: rows of the whole vocabulary, here and on other processes."""
        return len(self.weight) if self.shard is None else self.shard.vocab_size

    def _only(self, start: int, stop: int, shard: VocabShard | None) -> "LMHead":
        bias = None if self.bias is None else self.bias[start:stop]
        return replace(self, weight=self.weight[start:stop], bias=bias, shard=shard)

    def to(self, device: torch.device | str) -> "LMHead":
        """The same on a device: a reference may live on another one."""
        return replace(
            self, weight=self.weight.to(device), bias=None if self.bias is None else self.bias.to(device)
        )  # fmt: skip

    def cut(self, vocab_size: int) -> "LMHead":
        """The same head over the ids below `vocab_size` alone (padding rows left out). ValueError if it has fewer."""
        if not 0 < vocab_size <= self.vocab_size:
            raise ValueError(f"LMHead.cut: expected 1 to {self.vocab_size} rows, got {vocab_size}")
        if self.shard is None:
            return self._only(0, vocab_size, None)
        start, stop = min(self.shard.start, vocab_size), min(self.shard.stop, vocab_size)
        return self._only(0, stop - start, replace(self.shard, start=start, stop=stop, vocab_size=vocab_size))

    def narrow(self, shard: VocabShard) -> "LMHead":
        """This process's rows of a whole head: no copy, and the gradient goes to the whole weight. ValueError else."""
        if self.shard is not None or shard.vocab_size != self.vocab_size:
            raise ValueError(
                f"LMHead.narrow: {shard} needs a whole head, got {self.vocab_size} rows, shard {self.shard}"
            )
        return self._only(shard.start, shard.stop, shard)

    def logits(self, hidden: Float[Tensor, "*B D"]) -> Float[Tensor, "*B V"]:
        """All logits, dense, in fp32 (fp64 if one of the two is): for tests and small uses. ValueError with a shard."""
        if self.shard is not None and self.shard.world > 1:
            raise ValueError("LMHead.logits: the head is split over processes; use token_scores or linear_divergence")
        dtype = torch.promote_types(torch.promote_types(hidden.dtype, self.weight.dtype), torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.to(dtype)
            z = nn.functional.linear(hidden.to(dtype), self.weight.to(dtype), bias) * self.scale
            return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)

    @classmethod
    def from_model(cls, model: nn.Module, *, shard_rows: bool = False) -> "LMHead":
        """The head of a transformers causal LM: plain, or in PEFT, DDP, FSDP2 or transformers' tensor parallelism.

        Tensor parallel (a weight `Shard(0)` over a mesh named "tp", or in a model without FSDP2 units): the rows that
        live here, with their shard. FSDP2: the whole weight, gathered; its gradient is averaged over processes, as
        FSDP2 does with every other one. With shard_rows, only the rows that live here: then every process must score
        its tokens together with the others, and the rows' gradient is that same average. FSDP2 and tensor parallelism
        at once: read it after the forward, with the head's unit kept gathered (reshard_after_forward=False).
        The weight belongs to this step: read it again after optimizer.step(). A whole head, and DDP's: see `narrow`.

        Raises TypeError, by name, for a head that is not linear, and for a class not known to klft, unless its logits
        agree with the head's on a probe (one tiny forward without gradient; under FSDP2 on all processes together).
        """
        base = base_of(model)
        layer = _layer_under_peft(base.get_output_embeddings(), type(base).__name__)
        scale, softcap = _transform(base, layer)
        weight, bias, shard = placed(model, layer.weight, getattr(layer, "bias", None), shard_rows)
        return cls(weight, bias, scale, softcap, shard)


# ---- what from_model reads ------------------------------------------------------------------------------------------


def _refusal(name: str, why: str) -> TypeError:
    return TypeError(f"LMHead.from_model: {name} {why}. Score from logits (KLPenalty.measure), or pass an LMHead(...)")


def _layer_under_peft(layer: Any, name: str) -> Any:
    """The layer that makes the logits. TypeError if an adapter adds to what its weight gives."""
    while hasattr(layer, "original_module") or hasattr(layer, "base_layer"):
        if hasattr(layer, "modules_to_save"):
            saved = [] if layer.disable_adapters else [a for a in layer.active_adapters if a in layer.modules_to_save]
            layer = layer.modules_to_save[saved[0]] if saved else layer.original_module
            continue
        layer = getattr(layer, "token_adapter", layer)  # PEFT's trainable_token_indices wrap a layer of theirs
        active = any(a in getattr(layer, name) for a in layer.active_adapters for name in layer.adapter_layer_names)
        # A merged adapter is in the weight already, unless the next forward would take it out again.
        if layer.merged == layer.disable_adapters and (active or layer.merged):
            raise _refusal(name, f"has an adapter ({type(layer).__name__}) at work on its head; merge or disable it")
        layer = layer.base_layer
    weight: Any = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor) or weight.is_meta:
        raise _refusal(name, f"has no weight at hand in its head ({type(layer).__name__})")
    dense = weight.ndim == 2 and weight.is_floating_point()
    if not dense or not (isinstance(weight, DTensor) or address(weight) is not None):
        what = f"{type(layer).__name__}: a {type(weight).__name__} {weight.dtype} {list(weight.shape)}"
        why = "is quantised, or kept elsewhere by ZeRO-3 or FSDP1"
        raise _refusal(name, f"has no plain floating-point weight [V, D] in its head ({what}): it {why}")
    return layer


def _transform(base: Any, layer: Any) -> tuple[float, float | None]:
    """(scale, softcap) that the class is known to put on the head's output, or that a probe finds."""
    forward = type(base).forward  # that of the class which defines it: FSDP2 makes subclasses
    owner = forward.__qualname__.split(".")[0].removesuffix("LMHeadModel").removesuffix("ForCausalLM")
    known = owner in " ".join([_PLAIN, *(classes for _, _, classes in _AFTER)]).split()
    known &= forward.__module__.startswith("transformers.models.") and type(layer).forward is nn.Linear.forward
    factors, caps = [], []
    for field, how, classes in _AFTER:
        value = getattr(base.config.get_text_config(), field, None)
        if value and (not known or owner in classes.split()):
            (caps if how == "cap" else factors).append(1 / value if how == "over" else float(value))
    candidates = [(factor, cap) for factor in [*factors, 1.0] for cap in [*caps, None]]
    return candidates[0] if known else _probed.get(base) or _probed.setdefault(base, _probe(base, layer, candidates))


@torch.no_grad()
def _probe(base: Any, layer: Any, candidates: list) -> tuple[float, float | None]:
    """The (scale, softcap) with which the head gives the model's own logits. TypeError if none does. Leaves no trace.

    The hidden states are drawn so that logits are tens: a softcap that is left out, or one too many, shows.
    """
    name, training = f"{type(base).__name__} is not known here, and", [m for m in base.modules() if m.training]
    seen, generator = {}, torch.Generator().manual_seed(0)  # the same on every process

    def swap(_head: nn.Module, args: tuple) -> tuple:
        hidden = torch.randn(args[0].shape, generator=generator).to(args[0])
        hidden = hidden * (20 / head.logits(hidden).std().clamp(min=1e-6)).to(hidden)
        full = min(hidden.itemsize, head.weight.itemsize) >= 4 and not torch.is_autocast_enabled(hidden.device.type)
        seen.update(hidden=hidden, tolerance=1e-3 if full else 1e-2)
        return (hidden, *args[1:])

    hook = base.get_output_embeddings().register_forward_pre_hook(swap)
    try:
        weight, bias = (t.full_tensor() if isinstance(t, DTensor) else t for t in (layer.weight, layer.bias))
        head, device = LMHead(weight, bias), weight.device
        base.eval()
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            ids = torch.arange(8, device=device).view(2, 4) % head.vocab_size
            logits = base(input_ids=ids, use_cache=False).logits.float()
    except Exception as error:
        raise _refusal(name, f"failed on a probe ({error})") from error
    finally:
        hook.remove()
        for module in training:
            module.training = True
    for scale, softcap in candidates:
        ours = replace(head, scale=scale, softcap=softcap).logits(seen["hidden"])
        if ours.shape == logits.shape and (ours - logits).norm() <= seen["tolerance"] * ours.norm():
            return scale, softcap
    raise _refusal(name, f"its logits are not what its head ({type(layer).__name__}) gives")


# ---- hidden states --------------------------------------------------------------------------------------------------


__getattr__ = moved(__name__, {"hidden_states": "klft.models"})
