"""klft: keep a language model close to where it came from while you train it.

Token-level KL between a policy p and a frozen reference q, in both directions, as numbers, as a reward penalty, as a
loss with the right gradient. All values in nats, one per token. Arguments come policy first.

Shapes: B batch, T tokens, N = B*T flattened, V vocabulary, D hidden.

`import klft` loads torch and nothing heavier; what needs torch.distributed or transformers loads on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from klft._version import __version__  # noqa: F401
from klft.controllers import AdaptiveKL, FixedKL, PIController, ScheduledKL, TargetKL
from klft.divergences import (
    alpha_divergence,
    entropy,
    forward_kl,
    jsd,
    renyi_divergence,
    reverse_kl,
    skew_kl,
    skew_reverse_kl,
)
from klft.estimators import estimate_kl, forward_k1, forward_k3, k1, k2, k3, top_k_kl
from klft.masked import masked_mean, masked_sum, masked_var, masked_whiten, token_logps
from klft.shaping import shape_rewards

if TYPE_CHECKING:
    from klft.fused import fused_token_loss, linear_divergence, token_scores
    from klft.heads import LMHead
    from klft.penalty import KLPenalty
    from klft.ppo import PPOConfig, PPOTrainer
    from klft.references import AdapterReference, FrozenReference
    from klft.scores import TokenScores, kl_metrics
    from klft.sharding import VocabShard


_LAZY = {
    "AdapterReference": "klft.references",
    "FrozenReference": "klft.references",
    "KLPenalty": "klft.penalty",
    "LMHead": "klft.heads",
    "PPOConfig": "klft.ppo",
    "PPOTrainer": "klft.ppo",
    "TokenScores": "klft.scores",
    "VocabShard": "klft.sharding",
    "fused_token_loss": "klft.fused",
    "kl_metrics": "klft.scores",
    "linear_divergence": "klft.fused",
    "token_scores": "klft.fused",
}

__all__ = [
    "AdapterReference", "AdaptiveKL", "FixedKL", "FrozenReference", "KLPenalty", "LMHead", "PIController", "PPOConfig",
    "PPOTrainer", "ScheduledKL", "TargetKL", "TokenScores", "VocabShard", "alpha_divergence", "entropy", "estimate_kl",
    "forward_k1", "forward_k3", "forward_kl", "fused_token_loss", "jsd", "k1", "k2", "k3", "kl_metrics",
    "linear_divergence",
    "masked_mean", "masked_sum", "masked_var", "masked_whiten", "renyi_divergence", "reverse_kl", "shape_rewards",
    "skew_kl", "skew_reverse_kl", "token_logps", "token_scores", "top_k_kl",
]  # fmt: skip


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'klft' has no attribute {name!r}")
