"""What every direction x estimator x placement of a penalty is, written out, and a penalty with a given reference."""

import warnings

import torch

from klft import FixedKL, KLPenalty
from support import oracles

COEF = 0.3
DIRECTIONS, ESTIMATORS, PLACEMENTS = ("reverse", "forward"), ("k1", "k2", "k3", "exact"), ("reward", "loss", "both")
TIGHT = {"rtol": 1e-10, "atol": 1e-13}

# What every combination is, written out: a word of the message it is refused or warned with, or None for silence.
REFUSED = {
    ("reverse", "k1", "loss"): "zero in expectation",
    ("reverse", "k1", "both"): "zero in expectation",
    ("reverse", "k2", "both"): "counts the KL twice",
    ("forward", "k1", "loss"): "zero in expectation",
    ("forward", "k1", "both"): "zero in expectation",
    ("forward", "k2", "reward"): "no k2 of the forward KL",
    ("forward", "k2", "loss"): "no k2 of the forward KL",
    ("forward", "k2", "both"): "no k2 of the forward KL",
    ("forward", "k3", "both"): "counts the KL twice",
}
WARNED = {
    ("reverse", "k2", "reward"): "reverse k2 in the reward: its expected gradient is not that of a KL",
    ("reverse", "k3", "reward"): "reverse k3 in the reward: its expected gradient is about zero near the reference",
    ("reverse", "exact", "reward"): "reverse exact in the reward: alone it has the wrong gradient.*placement='both'",
    ("forward", "exact", "reward"): "forward exact in the reward: alone it has the wrong gradient.*placement='both'",
    ("forward", "k1", "reward"): "forward k1 in the reward: its expected gradient is not that of the forward KL",
    ("forward", "k3", "reward"): "forward k3 in the reward: its expected gradient is not that of the forward KL",
}
SILENT = [
    ("reverse", "k1", "reward"),
    ("reverse", "k2", "loss"),
    ("reverse", "k3", "loss"),
    ("reverse", "k3", "both"),
    ("reverse", "exact", "loss"),
    ("reverse", "exact", "both"),
    ("forward", "k3", "loss"),
    ("forward", "exact", "loss"),
    ("forward", "exact", "both"),
]
ACCEPTED = SILENT + list(WARNED)

# Divergences that are no KL, and parameters of theirs.
OTHERS = {
    "jsd": {"weight": 0.3},
    "skew_kl": {"alpha": 0.2},
    "skew_reverse_kl": {"alpha": 0.2},
    "alpha_divergence": {"alpha": 1.5},
    "renyi_divergence": {"alpha": 0.4},
}


class GivenReference:
    """A reference by its protocol alone: its logits [B, T, V] are known beforehand, for whatever ids."""

    name, vocab_size, max_positions = "given", 0, None

    def __init__(self, logits=None):
        self.given = logits

    def logits(self, input_ids, attention_mask, keep=0):
        return self.given[:, -keep:]

    def hidden(self, input_ids, attention_mask, keep=0):
        raise TypeError("there are only logits")

    def hidden_of(self, inputs):
        raise TypeError("there are only logits")

    def to(self, device):
        pass

    def check_independent(self, policy):
        pass

    def after_step(self, policy):
        pass

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


ANY = GivenReference()


def penalty(direction, estimator, placement, reference=ANY, **more):
    """A penalty without its warning: that one is another test's business."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return KLPenalty(
            reference, direction=direction, estimator=estimator, placement=placement,
            **({"controller": FixedKL(COEF)} | more),
        )  # fmt: skip


def other_penalty(name, placement="both", reference=ANY, coef=COEF, **more):
    """A penalty of another divergence than the KL."""
    return KLPenalty(
        reference, estimator="exact", placement=placement, controller=FixedKL(coef),
        divergence=name, divergence_kwargs=OTHERS[name], **more,
    )  # fmt: skip


def dense_other(name):
    """That divergence by the definition, a function of both models' logits."""
    return lambda logits, ref_logits: getattr(oracles, name)(logits, ref_logits, *OTHERS[name].values())


def close(actual, expected):
    torch.testing.assert_close(actual, expected, **TIGHT)
