"""What is known of a token under two models: TokenScores, and how to get them from logits."""

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from klft.divergences import entropy, forward_kl, reverse_kl
from klft.masked import token_logps


@dataclass
class TokenScores:
    """Per token, in nats: what both models say of the sampled token and how far apart they are over the vocabulary."""

    logp: Tensor
    ref_logp: Tensor | None = None
    entropy: Tensor | None = None
    ref_entropy: Tensor | None = None
    reverse_kl: Tensor | None = None
    forward_kl: Tensor | None = None
    top1_agree: Tensor | None = None
    top_ids: Tensor | None = None  # [N, k]: what the policy would rather have said, best first
    top_p: Tensor | None = None
    ref_top_ids: Tensor | None = None
    ref_top_p: Tensor | None = None


def score_logits(
    logits: Float[Tensor, "*B V"], ref_logits: Float[Tensor, "*B V"], token_ids: Int[Tensor, "*B"]
) -> TokenScores:
    """Everything klft reports about a token, from the logits that predict it. Differentiable in the policy's logits."""
    ref_logits = ref_logits.detach()
    return TokenScores(
        logp=token_logps(logits, token_ids),
        ref_logp=token_logps(ref_logits, token_ids),
        entropy=entropy(logits),
        ref_entropy=entropy(ref_logits),
        reverse_kl=reverse_kl(logits, ref_logits),
        forward_kl=forward_kl(logits, ref_logits),
        top1_agree=logits.argmax(-1) == ref_logits.argmax(-1),
    )
