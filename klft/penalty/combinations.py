"""Which estimator goes where: combinations without a gradient are refused, those with a wrong one named."""

import warnings
from collections.abc import Mapping
from typing import Literal, get_args

from klft.divergences import OtherDivergence, find_divergence
from klft.estimators import DIRECTIONS, ESTIMATORS, Estimator

Placement = Literal["reward", "loss", "both"]
Estimate = Literal[Estimator, "exact"]
PLACEMENTS: tuple[Placement, ...] = get_args(Placement)
ESTIMATES: tuple[Estimate, ...] = get_args(Estimate)
NO_KL: tuple[OtherDivergence, ...] = get_args(OtherDivergence)


def check_combination(direction: str, estimator: str, placement: str) -> None:
    """Raise ValueError for unknown names, and for what carries no gradient, or twice the wrong one."""
    for name, value, known in (
        ("direction", direction, DIRECTIONS),
        ("estimator", estimator, ESTIMATES),
        ("placement", placement, PLACEMENTS),
    ):
        if value not in known:
            backward = " (the backward KL is 'reverse')" if value == "backward" else ""
            raise ValueError(f"KLPenalty: unknown {name} {value!r}: choose one of {', '.join(known)}{backward}")
    if estimator != "exact" and (direction, estimator) not in ESTIMATORS:
        raise ValueError(f"there is no {estimator} of the {direction} KL; use k1, k3 or exact")
    if estimator == "k1" and placement != "reward":
        raise ValueError(
            "k1 as a loss has a gradient of zero in expectation: it would do nothing but add noise. "
            "Use placement='reward' with k1, or estimator='exact' (of sampled tokens also 'k2' or 'k3') in the loss."
        )
    if placement == "both" and estimator != "exact" and (direction, estimator) != ("reverse", "k3"):
        raise ValueError(
            f"{direction} {estimator} in the reward and in the loss counts the KL twice, with a gradient of neither. "
            "placement='both' goes with estimator='exact', or with 'k3' of the reverse KL."
        )


def check_divergence(name: str | None, kwargs: Mapping[str, float], direction: str, estimator: str) -> None:
    """Raise ValueError, TypeError for unknown kwargs, unless `name` is None or a divergence that there can be here."""
    if name is None:
        if kwargs:
            raise ValueError(f"divergence_kwargs={dict(kwargs)} without a divergence: name one of {', '.join(NO_KL)}")
        return
    if name in ("reverse_kl", "forward_kl"):
        raise ValueError(f"divergence={name!r} is direction={name.removesuffix('_kl')!r}: say that")
    if name not in NO_KL:
        raise ValueError(f"unknown divergence {name!r}: choose one of {', '.join(NO_KL)}, or a direction of the KL")
    if estimator != "exact":
        raise ValueError(f"{estimator} estimates a KL: divergence={name!r} goes with estimator='exact'")
    if direction != "reverse":
        raise ValueError(f"divergence={name!r} takes no direction, got direction={direction!r}")
    find_divergence(name, dict(kwargs))


def effective_placement(estimator: str, placement: str) -> str:
    """The placement that is used: "exact" in the reward alone has a wrong gradient, so its loss part goes with it."""
    return "both" if (estimator, placement) == ("exact", "reward") else placement


def warn_of(direction: str, estimator: str, placement: str, divergence: str | None) -> None:
    """Say by name which wrong gradient a legal combination has."""
    wrong = {
        ("reverse", "k2"): "its expected gradient is not that of a KL",
        ("reverse", "k3"): "its expected gradient is about zero near the reference",
        ("forward", "k1"): "its expected gradient is not that of the forward KL",
        ("forward", "k3"): "its expected gradient is not that of the forward KL",
    }.get((direction, estimator))
    way_out = "Use estimator='k1' (reverse) in the reward, or 'exact' with placement='both' (given texts: 'loss')"
    if estimator == "exact":
        wrong = f"alone it has the wrong gradient, since a token's own exact {divergence or 'KL'} does not depend on it"
        way_out = "klft adds the differentiable loss that belongs to it; say placement='both' to mean that"
    if placement == "reward" and wrong is not None:
        warnings.warn(f"{divergence or direction} {estimator} in the reward: {wrong}. {way_out}.", stacklevel=3)
