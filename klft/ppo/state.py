"""PPOState: all that changes while PPO trains and is not the Trainer's."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from klft.ppo.cycle import Cycle
from klft.ppo.metrics import LOSS_SUMS, Table
from klft.ppo.phases import Phases
from klft.shaping import RunningMoments

if TYPE_CHECKING:
    from klft.ppo.tokens import TokenTables


def _zeros() -> dict[str, float]:
    return dict.fromkeys(LOSS_SUMS, 0.0)


@dataclass
class Pending:
    """Measurements since the last log: rollouts' tables, and metrics that reward functions logged, by name."""

    tables: list[Table] = field(default_factory=list)
    logged: dict[str, list[float]] = field(default_factory=dict)

    def add_logged(self, metrics: dict[str, list[float]]) -> None:
        """More of the reward functions' own metrics."""
        for name, values in metrics.items():
            self.logged.setdefault(name, []).extend(values)


@dataclass
class PPOState:
    """A checkpoint holds the first three; the rest is between two logs, or two minibatches."""

    cycle: Cycle
    episodes: int = 0  # completions trained on
    moments: RunningMoments = field(default_factory=RunningMoments)  # of all scores, for normalize_scores
    coef: float = 0.0  # of the last rollout
    minibatch_sums: dict[str, float] = field(default_factory=_zeros)  # of the loss, on this process
    loss_sums: dict[str, float] = field(default_factory=_zeros)  # since the last log, over all processes
    early_stops: int = 0  # since the last log
    train: Pending = field(default_factory=Pending)
    evaluation: Pending = field(default_factory=Pending)
    completions: list[dict[str, Any]] = field(default_factory=list)  # of the last rollout, for log_completions
    phases: Phases = field(default_factory=Phases)  # of training, since the last log
    tokens: "TokenTables | None" = None  # with kl_log_tokens
    warned_of_scores: bool = False  # of large ones
    warned_of_equal_scores: bool = False  # there is nothing to learn from

    def take_minibatch_sums(self) -> dict[str, float]:
        """This minibatch's sums; the next one starts at zero."""
        sums, self.minibatch_sums = self.minibatch_sums, _zeros()
        return sums

    def forget_logged(self) -> None:
        """After a log of training."""
        self.train, self.loss_sums, self.early_stops = Pending(), _zeros(), 0
