"""Exact KL, entropies and log-probabilities from hidden states: the logits never exist whole. See klft.fused.api."""

from klft.fused.api import fused_token_loss, linear_divergence, token_scores
from klft.scores import TokenScores

__all__ = ["TokenScores", "fused_token_loss", "linear_divergence", "token_scores"]
