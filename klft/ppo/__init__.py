"""PPO under a KL penalty, on transformers.Trainer."""

from klft.ppo.checkpoint import resolve_checkpoint as checkpoint_to_resume
from klft.ppo.config import PPOConfig
from klft.ppo.rewards import RewardModel
from klft.ppo.trainer import PPOTrainer

__all__ = ["PPOConfig", "PPOTrainer", "RewardModel", "checkpoint_to_resume"]
