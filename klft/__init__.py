"""klft: keep a language model close to where it came from while you train it.

Token-level KL between a policy p and a frozen reference q, in both directions, as numbers, as a reward penalty, as a
loss with the right gradient. All values in nats, one per token. Arguments come policy first.

Shapes: B batch, T tokens, N = B*T flattened, V vocabulary, D hidden.

Arguments that mean the same wherever they stand:

    model, policy; reference    what is trained; what it must stay close to
    tokenizer                   of both
    logits, ref_logits          [*, V] of policy and reference: what predicts the token that is asked for
    logp, ref_logp              [*] log-probabilities of one token each under them
    hidden, ref_hidden          [N, D], [N, E] hidden states that their heads read
    head, ref_head              LMHead, or a linear layer
    input_ids, token_ids        ids of whole texts [B, T]; of the tokens that are scored [*]
    attention_mask              [B, T], 1 on a real token, 0 on padding
    mask                        [*], True or 1 where a token counts
    scores                      TokenScores
    kl                          TokenKL, as KLPenalty.measure gives it
    direction                   "reverse": KL(p||q), or "forward": KL(q||p)
    behaviour_logp              [*] log-probabilities under the policy that sampled, where that is not the one scored
    temperature                 divides both models' logits
    weight                      [*] of each token's KL
    reduce                      a function that sums a tensor over processes
    device; state               where to move; what state_dict gave

`import klft` loads nothing heavy; each name loads what it needs on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from klft._version import __version__ as __version__

if TYPE_CHECKING:
    from klft.checks import check_setup
    from klft.controllers import AdaptiveKL, FixedKL, PIController, ScheduledKL, TargetKL
    from klft.diagnostics import TokenKLCallback, TokenKLLog, write_report
    from klft.diagnostics.comparison import Comparison, compare
    from klft.diagnostics.loading import read_texts
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
    from klft.fused import fused_token_loss, linear_divergence, token_scores
    from klft.heads import LMHead
    from klft.integrations import KLAnchorMixin, KLReward
    from klft.masked import masked_mean, masked_sum, masked_var, masked_whiten, token_logps
    from klft.models import causal_inputs, hidden_states
    from klft.penalty import KLPenalty, TokenKL
    from klft.ppo import PPOConfig, PPOTrainer
    from klft.references import (
        AdapterReference,
        CachedReference,
        EMAReference,
        FrozenReference,
        MixtureReference,
        Reference,
        TopKReference,
        resolve_reference,
    )
    from klft.scores import TokenScores, kl_metrics, score_logits
    from klft.shaping import shape_rewards
    from klft.sharding import VocabShard

_NAMES = {
    "klft.checks": ("check_setup",),
    "klft.controllers": ("AdaptiveKL", "FixedKL", "PIController", "ScheduledKL", "TargetKL"),
    "klft.diagnostics": ("TokenKLCallback", "TokenKLLog", "write_report"),
    "klft.diagnostics.comparison": ("Comparison", "compare"),
    "klft.diagnostics.loading": ("read_texts",),
    "klft.divergences": (
        "alpha_divergence", "entropy", "forward_kl", "jsd", "renyi_divergence", "reverse_kl", "skew_kl",
        "skew_reverse_kl",
    ),
    "klft.estimators": ("estimate_kl", "forward_k1", "forward_k3", "k1", "k2", "k3", "top_k_kl"),
    "klft.fused": ("fused_token_loss", "linear_divergence", "token_scores"),
    "klft.heads": ("LMHead",),
    "klft.integrations": ("KLAnchorMixin", "KLReward"),
    "klft.masked": ("masked_mean", "masked_sum", "masked_var", "masked_whiten", "token_logps"),
    "klft.models": ("causal_inputs", "hidden_states"),
    "klft.penalty": ("KLPenalty", "TokenKL"),
    "klft.ppo": ("PPOConfig", "PPOTrainer"),
    "klft.references": (
        "AdapterReference", "CachedReference", "EMAReference", "FrozenReference", "MixtureReference", "Reference",
        "TopKReference", "resolve_reference",
    ),
    "klft.scores": ("TokenScores", "kl_metrics", "score_logits"),
    "klft.shaping": ("shape_rewards",),
    "klft.sharding": ("VocabShard",),
}  # fmt: skip
_HOME = {name: module for module, names in _NAMES.items() for name in names}
_MODULES = (*dict.fromkeys(module.split(".")[1] for module in _NAMES), "plots", "scoring", "token_rules")

__all__ = [
    "AdapterReference", "AdaptiveKL", "CachedReference", "Comparison", "EMAReference", "FixedKL", "FrozenReference",
    "KLAnchorMixin", "KLPenalty", "KLReward", "LMHead", "MixtureReference", "PIController", "PPOConfig", "PPOTrainer",
    "Reference", "ScheduledKL", "TargetKL", "TokenKL", "TokenKLCallback", "TokenKLLog", "TokenScores",
    "TopKReference", "VocabShard", "alpha_divergence", "causal_inputs", "check_setup", "compare", "entropy",
    "estimate_kl", "forward_k1", "forward_k3", "forward_kl", "fused_token_loss", "hidden_states", "jsd", "k1", "k2",
    "k3", "kl_metrics", "linear_divergence", "masked_mean", "masked_sum", "masked_var", "masked_whiten",
    "read_texts", "renyi_divergence", "resolve_reference", "reverse_kl", "score_logits", "shape_rewards", "skew_kl",
    "skew_reverse_kl", "token_logps", "token_scores", "top_k_kl", "write_report",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    if name in _MODULES:
        return import_module(f"klft.{name}")
    raise AttributeError(f"module 'klft' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES} - {"Any", "TYPE_CHECKING", "import_module"})
