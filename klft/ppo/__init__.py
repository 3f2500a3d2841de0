"""PPO under a KL penalty, on transformers.Trainer. Importing it loads nothing; its names load what they need."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from klft.ppo.checkpoint import check_output_dir, finished_run
    from klft.ppo.checkpoint import resolve_checkpoint as checkpoint_to_resume
    from klft.ppo.config import PPOConfig
    from klft.ppo.progress import RolloutProgress
    from klft.ppo.rewards import RewardModel
    from klft.ppo.trainer import PPOTrainer

_HOME = {
    "PPOConfig": "config", "PPOTrainer": "trainer", "RewardModel": "rewards", "RolloutProgress": "progress",
    "check_output_dir": "checkpoint", "checkpoint_to_resume": "checkpoint", "finished_run": "checkpoint",
}  # fmt: skip
__all__ = [
    "PPOConfig", "PPOTrainer", "RewardModel", "RolloutProgress", "check_output_dir", "checkpoint_to_resume",
    "finished_run",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'klft.ppo' has no attribute {name!r}")
    own = "resolve_checkpoint" if name == "checkpoint_to_resume" else name
    return getattr(import_module(f"klft.ppo.{_HOME[name]}"), own)
