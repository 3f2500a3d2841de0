"""PPO under a KL penalty, on transformers.Trainer."""

from klft.ppo.checkpoint import check_output_dir, finished_run
from klft.ppo.checkpoint import resolve_checkpoint as checkpoint_to_resume
from klft.ppo.config import PPOConfig
from klft.ppo.progress import RolloutProgress
from klft.ppo.rewards import RewardModel
from klft.ppo.trainer import PPOTrainer

__all__ = [
    "PPOConfig", "PPOTrainer", "RewardModel", "RolloutProgress", "check_output_dir", "checkpoint_to_resume",
    "finished_run",
]  # fmt: skip
