"""What a beginner does wrong with KLAnchorMixin: one line that says what to write instead."""

import pytest
from support import tiny
from support.anchors import exact, sft
from support.trainers import AnchoredSFT, policy, sft_config
from transformers import Trainer
from trl import SFTTrainer

from klft import FrozenReference, KLPenalty, MixtureReference
from klft.integrations import KLAnchorMixin
from klft.token_rules import by_ids


@pytest.mark.parametrize(("penalty", "got"), [
    ({}, "got a NoneType"),
    ({"penalty": None}, "got a NoneType"),
    ({"penalty": 0.1}, "got a float"),
    ({"penalty": policy(5)}, "got a LlamaForCausalLM"),
    ({"penalty": FrozenReference(policy(5))}, "got a FrozenReference"),
    ({"penalty": lambda model: FrozenReference(policy(5))}, "got a function that gives a FrozenReference"),
])  # fmt: skip
def test_what_is_no_penalty_is_named(tmp_path, penalty, got):
    with pytest.raises(TypeError, match=rf"penalty must be a KLPenalty, .*{got}\. Pass penalty=KLPenalty\("):
        sft(AnchoredSFT, sft_config(tmp_path), **penalty)


@pytest.mark.parametrize("trainer", [SFTTrainer, Trainer])
def test_the_mixin_stands_before_the_trainer(trainer):
    name = trainer.__name__
    with pytest.raises(TypeError, match=rf"must stand before {name}: class A\(KLAnchorMixin, {name}\)"):
        type("A", (trainer, KLAnchorMixin), {})


def test_the_default_penalty_in_sft_names_all_that_must_change(tmp_path):
    with pytest.raises(ValueError, match=r"use KLPenalty\(..., estimator='exact', placement='loss'\)"):
        sft(AnchoredSFT, sft_config(tmp_path), penalty=KLPenalty(policy(5)))


def test_an_adapter_reference_of_a_model_without_one_says_how(tmp_path):
    from klft import AdapterReference

    with pytest.raises(TypeError, match="penalty=lambda model: KLPenalty"):
        AdapterReference(policy())


@pytest.mark.parametrize("given", [[policy(5), policy(6)], [("a", policy(5))], [(1.0, policy(5), 2)]])
def test_a_mixture_names_its_pairs(given):
    with pytest.raises(TypeError, match=r"expected \(weight, reference\) pairs"):
        MixtureReference(given)


@pytest.mark.parametrize("given", [{"<eos>": 0.0}, [2], {}])
def test_ids_are_numbers(given):
    with pytest.raises(ValueError, match="by_ids: expected a table id -> weight of ids >= 0, got"):
        by_ids(given)


def test_a_reference_whose_ids_mean_other_words_is_refused(tmp_path):
    reference = FrozenReference(tiny.with_other_ids(tmp_path / "reference"))
    with pytest.raises(ValueError, match="policy and reference differ in 2 ids: 8 is 'w5' and 'w6'"):
        sft(AnchoredSFT, sft_config(tmp_path), penalty=exact(reference=reference))


def test_a_reference_by_name_says_how_to_load_it():
    with pytest.raises(TypeError, match=r"got str: load it, AutoModelForCausalLM.from_pretrained"):
        FrozenReference("a/model")


def test_16_bit_products_are_not_held_to_fp32_bounds(tmp_path):
    """Under accelerate's autocast logits are fp32, and of 16-bit products: TRL's default on a CPU too."""
    from klft import AdapterReference

    run = sft(
        AnchoredSFT, sft_config(tmp_path, bf16=True), model=policy(initializer_range=1.0), peft_config=tiny.lora(),
        penalty=lambda model: exact(reference=AdapterReference(model)),
    )  # fmt: skip
    assert run.state.global_step == 4
