"""The KL penalty as one object, and what it is computed from."""

from klft.penalty.combinations import ESTIMATES, PLACEMENTS, check_combination, effective_placement
from klft.penalty.penalty import KLPenalty
from klft.penalty.token_kl import TokenKL, TokenRule, mixed_scores
from klft.scores import score_logits  # it was here once

__all__ = [
    "ESTIMATES",
    "PLACEMENTS",
    "KLPenalty",
    "TokenKL",
    "TokenRule",
    "check_combination",
    "effective_placement",
    "mixed_scores",
    "score_logits",
]
