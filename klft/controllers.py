"""Controllers of the KL coefficient. Standard library only.

Every controller has `.coef`, `.update(sequence_kl, episodes) -> coef`, `.state_dict()` and `.load_state_dict()`.
`sequence_kl` is the mean over episodes of the KL *summed over each sequence*, in nats; `episodes` is how many there
were. A per-token mean makes targets of different completion lengths incomparable, so it is not what this takes.
"""

import math
from typing import Any, Literal, get_args

Shape = Literal["linear", "cosine"]
SHAPES: tuple[Shape, ...] = get_args(Shape)


def _positive(name: str, **values: float | int) -> None:
    for key, value in values.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise ValueError(f"{name}: {key} must be a finite number above 0, got {value!r}")


def _observed(name: str, sequence_kl: float, episodes: int) -> float:
    if not math.isfinite(sequence_kl):
        raise ValueError(f"{name}.update: sequence_kl must be finite, got {sequence_kl}; find the token behind it")
    if episodes < 0:
        raise ValueError(f"{name}.update: episodes must be >= 0, got {episodes}")
    return float(sequence_kl)


class Controller:
    """Base of the five controllers; `_state` names the attributes that a checkpoint holds."""

    _state: tuple[str, ...] = ("coef",)
    coef: float

    def update(self, sequence_kl: float, episodes: int) -> float:
        """Learn from a batch; the new coefficient. Raises ValueError for a KL that is not finite.

        Args:
            sequence_kl: mean over its episodes of the KL summed over each, in nats.
            episodes: how many completions those are, over all processes.
        """
        raise NotImplementedError

    def __repr__(self) -> str:
        said = (f"{key}={x:g}" if isinstance(x, float) else f"{key}={x!r}" for key, x in vars(self).items())
        return f"{type(self).__name__}({', '.join(said)})"

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to continue: plain numbers and the class name."""
        return {"controller": type(self).__name__} | {key: getattr(self, key) for key in self._state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`. Raises ValueError if another controller wrote it."""
        if state.get("controller") != type(self).__name__ or set(state) != {"controller", *self._state}:
            raise ValueError(f"{type(self).__name__} cannot continue from the state {state!r}")
        for key in self._state:
            setattr(self, key, state[key])


def check_controller(controller: Any, where: str) -> None:
    """Raise TypeError for what has no `coef` and `update` (a number, None), or is a class."""
    if isinstance(controller, type) or not (hasattr(controller, "coef") and hasattr(controller, "update")):
        got = f"the class {controller.__name__}" if isinstance(controller, type) else repr(controller)
        raise TypeError(
            f"{where}: controller must be a klft controller, FixedKL(0.05) or AdaptiveKL(0.05, target=6.0, "
            f"horizon=10_000) for instance, got {got}"
        )


class FixedKL(Controller):
    """A constant coefficient: coef >= 0."""

    def __init__(self, coef: float):
        if isinstance(coef, bool) or not isinstance(coef, (int, float)) or not 0 <= coef < math.inf:
            raise ValueError(f"FixedKL: coef must be a finite number >= 0, got {coef!r}")
        self.coef = float(coef)

    def update(self, sequence_kl: float, episodes: int) -> float:
        _observed("FixedKL", sequence_kl, episodes)
        return self.coef

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """A constant has nothing to continue from: another value in the checkpoint is a contradiction, not a state."""
        if state != self.state_dict():
            raise ValueError(f"FixedKL: the checkpoint was written with {state!r}, this run has coef={self.coef}")


class AdaptiveKL(Controller):
    """coef *= 1 + clip(KL/target - 1, -0.2, 0.2) * episodes/horizon. Source: Ziegler et al. 2019, arXiv 1909.08593.

    Args:
        coef: where it starts, above 0.
        target: the KL to aim at, in nats per sequence.
        horizon: episodes that it takes to react: more is slower. Above 0.2 * episodes of an update.
    """

    def __init__(self, coef: float, target: float, horizon: int):
        _positive("AdaptiveKL", coef=coef, target=target, horizon=horizon)
        self.coef, self.target, self.horizon = float(coef), float(target), horizon

    def update(self, sequence_kl: float, episodes: int) -> float:
        error = min(max(_observed("AdaptiveKL", sequence_kl, episodes) / self.target - 1, -0.2), 0.2)
        if 0.2 * episodes >= self.horizon:  # the factor could reach 0, and the coefficient would never come back
            raise ValueError(f"AdaptiveKL: horizon {self.horizon} is too short for {episodes} episodes per update")
        self.coef *= 1 + error * episodes / self.horizon
        return self.coef


class ScheduledKL(Controller):
    """From `start` to `end` over `episodes` episodes, then constant at `end`.

    `shape` of the way: "linear", or half a "cosine".
    Raises ValueError for another shape, coefficients below 0 and no episodes.
    """

    _state = ("coef", "seen")

    def __init__(self, start: float, end: float, episodes: int, shape: Shape = "linear"):
        for key, value in {"start": start, "end": end}.items():
            if not 0 <= value < math.inf:
                raise ValueError(f"ScheduledKL: {key} must be a finite number >= 0, got {value!r}")
        _positive("ScheduledKL", episodes=episodes)
        if shape not in SHAPES:
            raise ValueError(f"ScheduledKL: unknown shape {shape!r}: choose one of {', '.join(SHAPES)}")
        self.start, self.end, self.episodes, self.shape = float(start), float(end), episodes, shape
        self.coef, self.seen = self.start, 0

    def update(self, sequence_kl: float, episodes: int) -> float:
        _observed("ScheduledKL", sequence_kl, episodes)
        self.seen += episodes
        done = min(self.seen / self.episodes, 1.0)
        weight = done if self.shape == "linear" else (1 - math.cos(math.pi * done)) / 2
        self.coef = self.start + (self.end - self.start) * weight
        return self.coef


class PIController(Controller):
    """coef = coef_0 * exp(kp * e + ki * sum e), e = clip(KL/target - 1, -1, 1): holds the KL *at* the target.

    Working on the logarithm keeps the coefficient positive and makes the gains independent of its size; clipping the
    error bounds what one bad batch adds to the integral. After PID Lagrangian methods, Stooke et al., arXiv 2007.03964.

    Args:
        coef: coef_0, above 0.
        target: nats per sequence.
        kp, ki: how much the error of this batch counts, and that of all so far.
    """

    _state = ("coef", "integral")

    def __init__(self, coef: float, target: float, kp: float = 0.1, ki: float = 0.02):
        _positive("PIController", coef=coef, target=target, kp=kp, ki=ki)
        self.initial, self.target, self.kp, self.ki = float(coef), float(target), float(kp), float(ki)
        self.coef, self.integral = self.initial, 0.0

    def update(self, sequence_kl: float, episodes: int) -> float:
        kl = _observed("PIController", sequence_kl, episodes)
        if episodes:
            error = min(max(kl / self.target - 1, -1.0), 1.0)
            self.integral += error
            self.coef = self.initial * math.exp(self.kp * error + self.ki * self.integral)
        return self.coef


class TargetKL(Controller):
    """coef *= factor where the KL is above target * tolerance, coef /= factor below target / tolerance, else unchanged.

    `target` is in nats per sequence, tolerance >= 1, factor > 1 (2: doubled and halved).
    The rule of the PPO paper, arXiv 1707.06347 section 4, with the reference in the place of the old policy.
    """

    def __init__(self, coef: float, target: float, tolerance: float = 1.5, factor: float = 2.0):
        _positive("TargetKL", coef=coef, target=target, tolerance=tolerance, factor=factor)
        if tolerance < 1 or factor <= 1:
            raise ValueError(f"TargetKL: tolerance must be >= 1 and factor > 1, got {tolerance} and {factor}")
        self.coef, self.target = float(coef), float(target)
        self.tolerance, self.factor = float(tolerance), float(factor)

    def update(self, sequence_kl: float, episodes: int) -> float:
        kl = _observed("TargetKL", sequence_kl, episodes)
        if episodes and kl > self.target * self.tolerance:
            self.coef *= self.factor
        elif episodes and kl < self.target / self.tolerance:
            self.coef /= self.factor
        return self.coef
