"""The KL penalty in other people's trainers: `KLAnchorMixin` in the loss, `KLReward` in the reward."""

from klft.integrations.anchor import KLAnchorMixin

__all__ = ["KLAnchorMixin"]
