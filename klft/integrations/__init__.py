"""The KL penalty in other people's trainers: `KLAnchorMixin` in the loss, `KLReward` in the reward."""

from klft.integrations.anchor import KLAnchorMixin
from klft.integrations.reward import KLReward

__all__ = ["KLAnchorMixin", "KLReward"]
