"""Which estimator goes where: combinations without a gradient are refused, those with a wrong one named."""

import warnings

from klft.estimators import ESTIMATORS

PLACEMENTS = ("reward", "loss", "both")
ESTIMATES = ("k1", "k2", "k3", "exact")


def check_combination(direction: str, estimator: str, placement: str) -> None:
    """Raise ValueError for what carries no gradient, or twice the wrong one."""
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


def effective_placement(estimator: str, placement: str) -> str:
    """The placement that is used: exact KL in the reward alone has a wrong gradient, so its loss part goes with it."""
    return "both" if (estimator, placement) == ("exact", "reward") else placement


def warn_of(direction: str, estimator: str, placement: str) -> None:
    """Say by name which wrong gradient a legal combination has."""
    wrong = {
        ("reverse", "k2"): "its expected gradient is not that of a KL",
        ("reverse", "k3"): "its expected gradient is about zero near the reference",
        ("reverse", "exact"): "alone it has the wrong gradient, since a token's own exact KL does not depend on it",
        ("forward", "exact"): "alone it has the wrong gradient, since a token's own exact KL does not depend on it",
        ("forward", "k1"): "its expected gradient is not that of the forward KL",
        ("forward", "k3"): "its expected gradient is not that of the forward KL",
    }.get((direction, estimator))
    if placement != "reward" or wrong is None:
        return
    way_out = "Use estimator='k1' (reverse) in the reward, or estimator='exact' with placement='both'"
    if estimator == "exact":
        way_out = "klft adds the differentiable loss that belongs to it; say placement='both' to mean that"
    warnings.warn(f"{direction} {estimator} in the reward: {wrong}. {way_out}.", stacklevel=3)
