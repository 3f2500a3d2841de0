"""Names to choose from: each list is one Literal, the same in signatures as at run time."""

import inspect
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
import torch

import klft
from klft import controllers, divergences, estimators, parallel, scoring
from klft.fused import api
from klft.penalty import ESTIMATES, PLACEMENTS, combinations

LISTS = {
    "Direction": (estimators.Direction, estimators.DIRECTIONS),
    "Gradient": (estimators.Gradient, estimators.GRADIENTS),
    "Estimate": (combinations.Estimate, ESTIMATES),
    "Placement": (combinations.Placement, PLACEMENTS),
    "OtherDivergence": (divergences.OtherDivergence, combinations.NO_KL),
    "DivergenceName": (divergences.DivergenceName, tuple(divergences.DIVERGENCES)),
    "ModelPlacement": (parallel.ModelPlacement, parallel.PLACEMENTS),
    "Sharding": (scoring.Sharding, scoring.SHARDINGS),
    "Backend": (api.Backend, api.BACKENDS),
    "Shape": (controllers.Shape, controllers.SHAPES),
}


@pytest.mark.parametrize("name", LISTS)
def test_a_type_lists_what_is_checked(name):
    hint, known = LISTS[name]
    assert get_args(hint) == known
    assert len(known) > 1


def test_estimators_are_those_that_there_are():
    assert {name for _, name in estimators.ESTIMATORS} == set(get_args(estimators.Estimator))


TYPED = {
    "KLPenalty": ("direction", "estimator", "placement", "divergence"), "KLPenalty.token_kl": ("gradient",),
    "estimate_kl": ("direction", "estimator", "gradient"), "top_k_kl": ("direction",),
    "linear_divergence": ("divergence", "backend"), "FrozenReference": ("placement",), "ScheduledKL": ("shape",),
    "KLReward": ("direction", "estimator"), "KLAnchorMixin": ("kl_shard_vocab",),
}  # fmt: skip


@pytest.mark.parametrize("name", TYPED)
def test_a_public_argument_that_is_a_name_says_which_there_are(name):
    found = klft
    for part in name.split("."):
        found = getattr(found, part)
    parameters = inspect.signature(found).parameters
    for argument in TYPED[name]:
        hint, default = parameters[argument].annotation, parameters[argument].default
        names = hint if get_origin(hint) is Literal else next(h for h in get_args(hint) if get_origin(h) is Literal)
        assert default in (None, inspect.Parameter.empty, *get_args(names))


def test_hints_can_be_read_at_run_time():
    assert get_type_hints(klft.estimate_kl)["direction"] is estimators.Direction


def test_what_klft_says_of_a_wrong_name_is_seen_by_tests():
    """beartype, which checks shapes in tests, leaves names to klft."""
    logp = torch.zeros(2)
    with pytest.raises(ValueError, match="unknown direction 'sideways': choose one of reverse, forward"):
        klft.estimate_kl(logp, logp, direction="sideways")
    with pytest.raises(TypeError):
        klft.estimate_kl(logp, logp, direction=1)
