"""What is checked: a policy, its reference, what trains them, and a few rows of tokens."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from klft.divergences import reverse_kl
from klft.models import base_of, causal_inputs, evaluating, max_positions, vocab_size
from klft.parallel import reshard
from klft.references import Reference
from klft.scoring import Scorer

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Check:
    """status: "ok", "note" (a fact worth knowing), "problem" or "skipped". text: what was found, and what to do."""

    name: str
    status: str
    text: str


def ok(name: str, text: str) -> Check:
    return Check(name, "ok", text)


def problem(name: str, text: str) -> Check:
    return Check(name, "problem", text)


@dataclass
class Setup:
    """Policy and reference as a trainer uses them, and three rows: a long text, and a short one padded left and right.

    loss_mode: puts the policy in the mode in which its loss is computed; None: the mode it is in. low_precision: 16-bit
    weights, autocast or TF32. starts_equal: the policy is where the reference is now; None: it came from there;
    False: the reference is another model on purpose.
    """

    policy: nn.Module
    reference: Reference
    tokenizer: "PreTrainedTokenizerBase | None" = None
    optimizer: "Optimizer | None" = None
    temperature: float = 1.0
    starts_equal: bool | None = None
    low_precision: bool | None = None
    loss_mode: Callable[[], Any] | None = None
    shard_vocab: str = "auto"
    scorer: Any = None
    was_training: bool = field(init=False)
    low_reference: bool = field(init=False, default=False)  # its logits are of 16 bits, whatever the policy's are
    heads: dict[str, Check] = field(default_factory=dict)  # what check_head found, by role

    def __post_init__(self):
        self.was_training = self.policy.training
        if self.scorer is None:
            self.scorer = Scorer(self.reference, temperature=self.temperature, shard_vocab=self.shard_vocab)
        if self.low_precision is None:
            parameters = list(self.policy.parameters())
            self.low_precision = any(p.dtype not in (torch.float32, torch.float64) for p in parameters) or (
                self.device.type == "cuda" and torch.get_float32_matmul_precision() != "highest"
            )
            self.low_precision |= torch.is_autocast_enabled(self.device.type)

    @property
    def device(self) -> torch.device:
        """Where the policy is."""
        return next(self.policy.parameters()).device

    @property
    def kl_tolerance(self) -> float:
        """Nats per token that rounding alone may make of two equal distributions."""
        return 1e-2 if self.low_precision or self.low_reference else 1e-5

    @cached_property
    def tokens(self) -> Int[Tensor, "L"]:
        """The long text: ordinary ids, up to 12."""
        base = base_of(self.policy)
        special = {v for k, v in base.config.to_dict().items() if k.endswith("_token_id") and isinstance(v, int)}
        special |= set(getattr(self.tokenizer, "all_special_ids", None) or ())
        shared = min(vocab_size(self.policy), self.reference.vocab_size)
        if self.tokenizer is not None:
            shared = min(shared, max(len(self.tokenizer), 1))
        ordinary = [i for i in range(min(shared, 50_000)) if i not in special] or [0]
        limits = [each for each in (max_positions(self.policy), self.reference.max_positions) if each is not None]
        length = max(2, min([12, *(each - 4 for each in limits)]))  # four more are sampled after them
        return torch.tensor([ordinary[(7 * i + 3) % len(ordinary)] for i in range(length)], device=self.device)

    @cached_property
    def batch(self) -> tuple[Int[Tensor, "3 L"], Int[Tensor, "3 L"]]:
        """(input_ids, attention_mask)."""
        long, short = self.tokens, self.short
        empty = long.new_full((len(long) - len(short),), int(long[0]))
        ids = torch.stack([long, torch.cat([empty, short]), torch.cat([short, empty])])
        real = torch.arange(len(long), device=long.device)
        mask = torch.stack([real >= 0, real >= len(empty), real < len(short)])
        return ids, mask.long()

    @property
    def real(self) -> Bool[Tensor, "3 L"]:
        """Where the batch has a token."""
        return self.batch[1].bool()

    @property
    def short(self) -> Int[Tensor, "S"]:
        """The short text."""
        return self.tokens.flip(0)[: max(2, len(self.tokens) // 2)]

    @cached_property
    def policy_logits(self) -> Float[Tensor, "3 L V"]:
        """The policy's own, of the batch, in eval mode."""
        with evaluating(self.policy):
            return self._own_logits(*self.batch)

    @cached_property
    def reference_logits(self) -> Float[Tensor, "3 L V"]:
        """The reference's, of the batch."""
        logits = self.reference.logits(*self.batch)
        self.low_reference = logits.dtype not in (torch.float32, torch.float64)
        return logits

    def _own_logits(self, ids: Tensor, mask: Tensor) -> Tensor:
        logits = self.policy(**causal_inputs(self.policy, ids, mask)).logits
        reshard(self.policy)
        return logits

    def logits_again(self, role: str, ids: Tensor, mask: Tensor) -> Tensor:
        """A forward more of one of the two."""
        if role == "reference":
            return self.reference.logits(ids, mask)
        with evaluating(self.policy):
            return self._own_logits(ids, mask)

    def logits_of(self, role: str) -> Tensor:
        """Of the batch."""
        return self.reference_logits if role == "reference" else self.policy_logits


def largest_kl(logits: Tensor, others: Tensor) -> float:
    """The largest KL of a token, in nats; infinite where one of the two is not a number."""
    size = min(logits.shape[-1], others.shape[-1])
    kl = reverse_kl(logits[..., :size].float(), others[..., :size].float())
    return float(kl.nan_to_num(nan=math.inf).max()) if kl.numel() else 0.0


class Rollout(NamedTuple):
    """A few sampled rows. logp: of each token where the mask holds, as the sampler reports it (optional)."""

    input_ids: Int[Tensor, "B T"]
    attention_mask: Int[Tensor, "B T"]
    mask: Bool[Tensor, "B T"]
    logp: Float[Tensor, "B T"] | None = None
