"""The controllers of the KL coefficient: worked examples, an oracle, checkpoints, errors, a simulated plant."""

import json
import math
import random

import pytest
from jaxtyping import TypeCheckError
from support import oracles

from klft import AdaptiveKL, FixedKL, PIController, ScheduledKL, TargetKL

BUILD = {
    "FixedKL": lambda: FixedKL(0.05),
    "AdaptiveKL": lambda: AdaptiveKL(0.2, 6.0, 10_000),
    "ScheduledKL": lambda: ScheduledKL(0.2, 0.01, 5_000, shape="cosine"),
    "PIController": lambda: PIController(0.1, 6.0),
    "TargetKL": lambda: TargetKL(0.1, 6.0),
}
every_controller = pytest.mark.parametrize("name", BUILD)


def observations(count=60, seed=0):
    rng = random.Random(seed)
    levels = [-0.5, 0.0, 3.0, 5.9, 6.1, 9.5, 40.0]
    return [(rng.choice(levels) + rng.random(), rng.randint(1, 256)) for _ in range(count)]


# --- the rules -------------------------------------------------------------------------------------------------------


def test_zieglers_worked_example():
    assert AdaptiveKL(0.2, target=6.0, horizon=10_000).update(12.0, 256) == pytest.approx(0.201024, abs=1e-15)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_adaptive_is_zieglers_formula(seed):
    controller, seen = AdaptiveKL(0.2, 6.0, 10_000), observations(seed=seed)
    history = [controller.update(kl, n) for kl, n in seen]
    assert history == pytest.approx(oracles.ziegler(0.2, 6.0, 10_000, seen), rel=1e-13)
    assert controller.coef == history[-1]


@pytest.mark.parametrize(
    ("kl", "factor"),
    [(6.0, 1.0), (6.6, 1 + 0.1 * 0.01), (7.2, 1.002), (600.0, 1.002), (5.4, 1 - 0.001), (4.8, 0.998), (-3.0, 0.998)],
)
def test_adaptive_error_is_clipped_at_a_fifth(kl, factor):
    assert AdaptiveKL(0.2, 6.0, 10_000).update(kl, 100) == pytest.approx(0.2 * factor, rel=1e-13)


def test_adaptive_counts_episodes_not_updates():
    once, often = AdaptiveKL(0.2, 6.0, 1_000_000), AdaptiveKL(0.2, 6.0, 1_000_000)
    once.update(12.0, 256)
    for _ in range(256):
        often.update(12.0, 1)
    assert once.coef == pytest.approx(often.coef, rel=1e-8)
    assert once.update(12.0, 0) == once.coef


def test_fixed_stays():
    controller = FixedKL(0.05)
    assert {controller.update(kl, n) for kl, n in observations()} == {0.05}
    assert FixedKL(0.0).coef == 0.0


@pytest.mark.parametrize(("shape", "quarter"), [("linear", 0.25), ("cosine", (1 - math.sqrt(0.5)) / 2)])
def test_schedule(shape, quarter):
    controller = ScheduledKL(0.2, 0.04, 400, shape=shape)
    assert controller.coef == 0.2
    for weight in (quarter, 0.5, 1 - quarter, 1.0, 1.0):
        assert controller.update(1.0, 100) == pytest.approx(0.2 - 0.16 * weight, rel=1e-12)
    assert controller.update(1e6, 10**9) == pytest.approx(0.04, rel=1e-12)


def test_schedule_is_linear_by_default_and_counts_episodes():
    controller = ScheduledKL(0.0, 1.0, 100)
    assert [controller.update(0.0, n) for n in (1, 0, 9, 40)] == pytest.approx([0.01, 0.01, 0.1, 0.5])


def test_pi_formula():
    controller, integral = PIController(0.1, 6.0, kp=0.3, ki=0.05), 0.0
    for kl, n in observations():
        error = min(max(kl / 6.0 - 1, -1), 1)
        integral += error
        assert controller.update(kl, n) == pytest.approx(0.1 * math.exp(0.3 * error + 0.05 * integral), rel=1e-12)
    before = controller.coef
    assert controller.update(1e6, 0) == before  # nothing was observed
    assert controller.update(6.0, 1) == pytest.approx(0.1 * math.exp(0.05 * integral), rel=1e-12)


@pytest.mark.parametrize("start", [1e-3, 0.05, 5.0])
def test_pi_holds_a_plant_at_its_target(start):
    """The KL a policy settles at falls with the coefficient; each update moves it part of the way there."""
    controller, kl = PIController(start, target=6.0), 0.0
    history = []
    for _ in range(1500):
        settles_at = 2.0 / (controller.coef + 0.01)
        kl += 0.2 * (settles_at - kl)
        controller.update(kl, 64)
        history.append(kl)
    assert history[-200:] == pytest.approx([6.0] * 200, rel=1e-3)
    assert controller.coef == pytest.approx(2 / 6 - 0.01, rel=1e-3)


def test_a_proportional_rule_alone_would_not_hold_it():
    # Without the integral the plant settles where its error pays for the coefficient: this is what ki is for.
    controller, kl = PIController(0.05, target=6.0, ki=1e-12), 0.0
    for _ in range(1500):
        kl += 0.2 * (2.0 / (controller.coef + 0.01) - kl)
        controller.update(kl, 64)
    assert kl > 9


def test_target_doubles_and_halves():
    controller = TargetKL(0.1, target=6.0)
    steps = [(9.1, 0.2), (9.0, 0.2), (6.0, 0.2), (4.0, 0.2), (3.9, 0.1), (0.0, 0.05), (-1.0, 0.025), (1e3, 0.05)]
    for kl, coef in steps:
        assert controller.update(kl, 8) == pytest.approx(coef, rel=1e-13), kl
    assert controller.update(1e3, 0) == pytest.approx(0.05)
    assert TargetKL(0.1, 6.0, tolerance=1.0, factor=3.0).update(6.1, 1) == pytest.approx(0.3)


@every_controller
def test_coefficients_stay_positive_and_finite(name):
    controller = BUILD[name]()
    for kl, n in observations(500, seed=3):
        coef = controller.update(kl, n)
        assert 0 < coef < math.inf
        assert coef == controller.coef


# --- checkpoints -----------------------------------------------------------------------------------------------------


@every_controller
@pytest.mark.parametrize("after", [0, 1, 30])
def test_a_checkpoint_continues_identically(name, after):
    controller, seen = BUILD[name](), observations()
    for kl, n in seen[:after]:
        controller.update(kl, n)
    state = json.loads(json.dumps(controller.state_dict()))
    resumed = BUILD[name]()
    resumed.load_state_dict(state)
    assert resumed.coef == controller.coef
    for kl, n in seen[after:]:
        assert resumed.update(kl, n) == controller.update(kl, n)
    assert resumed.state_dict() == controller.state_dict()


@every_controller
def test_a_state_does_not_follow_its_controller(name):
    controller = BUILD[name]()
    state = controller.state_dict()
    before = dict(state)
    controller.update(40.0, 100)
    assert state == before


@every_controller
def test_states_of_others_are_refused(name):
    controller = BUILD[name]()
    for other in BUILD:
        if other != name:
            with pytest.raises(ValueError, match=name):
                controller.load_state_dict(BUILD[other]().state_dict())
    with pytest.raises(ValueError, match=name):
        controller.load_state_dict({})
    with pytest.raises(ValueError, match=name):
        controller.load_state_dict(controller.state_dict() | {"extra": 1})


def test_a_fixed_coefficient_that_changed_is_a_contradiction():
    with pytest.raises(ValueError, match=r"0\.05.*0\.1"):
        FixedKL(0.1).load_state_dict(FixedKL(0.05).state_dict())


# --- errors ----------------------------------------------------------------------------------------------------------

NUMBERS = [0.0, -1.0, math.nan, math.inf]
ADAPTIVE = {"coef": 0.2, "target": 6.0, "horizon": 100}
PI = {"coef": 0.2, "target": 6.0, "kp": 1.0, "ki": 1.0}
TARGET = {"coef": 0.2, "target": 6.0, "tolerance": 1.5, "factor": 2.0}
SCHEDULE = {"start": 0.2, "end": 0.1, "episodes": 10}
every_argument = pytest.mark.parametrize(
    ("cls", "good", "argument"),
    [
        *((cls, good, argument) for cls, good in ((PIController, PI), (TargetKL, TARGET)) for argument in good),
        *((AdaptiveKL, ADAPTIVE, argument) for argument in ADAPTIVE),
        (ScheduledKL, SCHEDULE, "episodes"),
    ],
)


@every_argument
@pytest.mark.parametrize("bad", NUMBERS)
def test_errors_name_the_argument_and_the_value(cls, good, argument, bad):
    cls(**good)
    if isinstance(good[argument], int):
        if not math.isfinite(bad):
            return
        bad = int(bad)
    with pytest.raises(ValueError, match=rf"^{cls.__name__}: {argument}.*{bad!r}"):
        cls(**{**good, argument: bad})


@every_argument
@pytest.mark.parametrize("bad", ["1", None, True])
def test_other_types_are_refused(cls, good, argument, bad):
    cls(**good)
    with pytest.raises((ValueError, TypeCheckError), match=argument):
        cls(**{**good, argument: bad})


@pytest.mark.parametrize("whole", [{"coef": 1}, {"target": 6}, {"horizon": 100}])
def test_whole_numbers_are_numbers(whole):
    assert AdaptiveKL(**{**ADAPTIVE, **whole}).coef > 0


@pytest.mark.parametrize("bad", [-0.1, math.nan, math.inf])
@pytest.mark.parametrize("argument", ["start", "end"])
def test_schedule_ends_are_checked(argument, bad):
    with pytest.raises(ValueError, match=f"ScheduledKL: {argument}"):
        ScheduledKL(**{"start": 0.2, "end": 0.1, "episodes": 10, argument: bad})


@pytest.mark.parametrize("bad", [-0.1, math.nan, math.inf, "1", None, True])
def test_fixed_coef_is_checked(bad):
    with pytest.raises((ValueError, TypeCheckError), match="coef"):
        FixedKL(bad)


def test_other_contradictions():
    with pytest.raises(ValueError, match=r"'step'.*linear.*cosine"):
        ScheduledKL(0.1, 0.2, 10, shape="step")
    with pytest.raises(ValueError, match="tolerance"):
        TargetKL(0.1, 6.0, tolerance=0.9)
    with pytest.raises(ValueError, match="factor"):
        TargetKL(0.1, 6.0, factor=1.0)
    # A horizon so short that one update could take the coefficient to zero, for good.
    with pytest.raises(ValueError, match=r"horizon 50.*256"):
        AdaptiveKL(0.1, 6.0, 50).update(1.0, 256)


@every_controller
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_non_finite_kl_raises_and_changes_nothing(name, bad):
    controller = BUILD[name]()
    controller.update(7.0, 10)
    before = controller.state_dict()
    with pytest.raises(ValueError, match=rf"{name}.*sequence_kl"):
        controller.update(bad, 10)
    with pytest.raises(ValueError, match=rf"{name}.*episodes"):
        controller.update(7.0, -1)
    assert controller.state_dict() == before
