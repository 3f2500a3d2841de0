"""What PPO once did otherwise than the diagnostics or KLPenalty: padded vocabularies, references, directions, ends."""

import logging
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support import tiny

from klft import KLPenalty
from klft.prompts import pad_id

CUT = "padding and left out"


def cuts(caplog):
    return [record.getMessage() for record in caplog.records if CUT in record.getMessage()]


@pytest.mark.parametrize("wide", ["policy", "reference"])
def test_a_padded_vocabulary_is_cut_once_and_said_once_with_the_mass_it_held(wide, caplog, tmp_path):
    models = {"policy": tiny.llama(), "reference": tiny.llama(5)}
    models[wide] = tiny.padded()
    run = tiny.trainer(tmp_path, models["policy"], given={"reference": models["reference"]}, max_steps=3)
    with caplog.at_level(logging.WARNING):
        run.train()
    (said,) = cuts(caplog)
    assert "40 vocabulary rows, the other 32" in said
    held = float(said.split("at most ")[1].split(" ")[0])
    assert 0 < held < 1e-3


@pytest.mark.parametrize("wide", ["policy", "reference"])
def test_rows_that_hold_probability_are_not_cut(wide, tmp_path):
    models = {"policy": tiny.llama(), "reference": tiny.llama(5)}
    models[wide] = tiny.llama(7, vocab_size=40)
    given = {"reference": models["reference"]}
    run = tiny.trainer(tmp_path / "a", models["policy"], given=given, max_steps=3, self_test=False)
    with pytest.raises(ValueError, match="40 vocabulary rows, the other 32, and the ids from 32 on are no padding"):
        run.train()
    run = tiny.trainer(tmp_path / "b", models["policy"], given=given, max_steps=3, self_test=True)
    with pytest.raises(RuntimeError, match=rf"vocabulary: the {wide}'s head has 40 rows, the other 32.* no padding"):
        run.train()


def test_equal_vocabularies_are_not_spoken_of(caplog, tmp_path):
    with caplog.at_level(logging.WARNING):
        tiny.trainer(tmp_path, max_steps=1).train()
    assert cuts(caplog) == []


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_sequence_kls_of_both_directions_whatever_the_penalty(direction, tmp_path):
    run = tiny.trainer(
        tmp_path, given={"reference": tiny.apart()}, max_steps=1, kl_direction=direction, kl_estimator="exact",
    )  # fmt: skip
    run.train()
    (log,) = tiny.step_logs(run)
    for each in ("reverse", "forward"):
        per_sequence = log[f"kl/{each}/mean"] * log["completions/mean_length"]
        assert log[f"kl/sequence/{each}/mean"] == pytest.approx(per_sequence, rel=1e-6)
    assert log["kl/sequence/reverse/mean"] != pytest.approx(log["kl/sequence/forward/mean"], rel=1e-2)


class Quantised:
    """A model that says it is quantised and cannot be moved, as bitsandbytes' do."""

    is_quantized = True

    def to(self, *_args, **_more):
        raise ValueError("`.to` is not supported for 4-bit or 8-bit models")


def quantised(seed):
    model = tiny.llama(seed)
    model.__class__ = type("QuantisedLlama", (Quantised, type(model)), {})
    return model


def with_an_adapter_on_its_head(seed):
    """A head that klft cannot read: it is scored from logits."""
    config = LoraConfig(r=2, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    return get_peft_model(tiny.llama(seed), config)


@pytest.mark.parametrize("make", [quantised, with_an_adapter_on_its_head])
def test_a_reference_that_cannot_be_moved_or_whose_head_cannot_be_read(make, tmp_path):
    """As in klft diff: PPO moved it, or refused it. The numbers are those of the plain model."""
    logs = []
    for i, reference in enumerate((tiny.llama(5), make(5))):
        run = tiny.trainer(tmp_path / str(i), given={"reference": reference}, max_steps=2)
        run.train()
        logs.append(tiny.step_logs(run))
    for ours, theirs in zip(*logs, strict=True):
        for key in ours:
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-5), key


def test_an_exact_loss_without_a_head_says_so_at_the_start(tmp_path):
    with pytest.raises(TypeError, match="head cannot be read"):
        tiny.trainer(tmp_path, given={"reference": with_an_adapter_on_its_head(5)}, kl_estimator="exact")


def test_the_controller_sees_the_same_as_in_a_loop_of_ones_own(tmp_path, monkeypatch):
    """A sequence whose KL is not finite: PPO left it out, KLPenalty.update raised."""
    policy, reference = tiny.llama(), tiny.apart()
    # The reference suppresses an id, which makes every KL to it infinite; the policy hardly ever says it.
    for model, at_27 in ((policy, -20.0), (reference, -math.inf)):
        model.lm_head.bias = torch.nn.Parameter(torch.zeros(tiny.VOCABULARY).index_fill(0, torch.tensor(27), at_27))
    seen = []
    monkeypatch.setattr(KLPenalty, "rewards", lambda self, scores, kl: seen.append(kl) or real(self, scores, kl))
    run = tiny.trainer(
        tmp_path, policy, given={"reference": reference}, max_steps=1, kl_controller="adaptive", kl_target=1.0,
        kl_horizon=100,
    )  # fmt: skip
    run.train()
    (kl,) = seen
    assert not kl.scores.reverse_kl[kl.mask].isfinite().any()
    assert run.penalty.sequence_kl(kl) == (0.0, 0)
    assert run.penalty.coef == 0.05
    assert run.penalty.update(kl) == 0.05


real = KLPenalty.rewards


@pytest.mark.parametrize(("pad", "expected"), [("<pad>", tiny.PAD), ("<eos>", tiny.EOS), (None, tiny.EOS)])
def test_one_pad_id(pad, expected):
    assert pad_id(tiny.tokenizer(pad=pad)) == expected


def test_a_tokenizer_with_neither_pads_with_0():
    tokenizer = tiny.tokenizer(pad=None)
    tokenizer.eos_token = None
    assert pad_id(tokenizer) == 0


@pytest.mark.parametrize("row", [5, slice(None)], ids=["some", "all"])
@pytest.mark.parametrize("broken", ["policy", "reference"])
def test_nan_weights_name_the_model_the_sample_and_the_position(broken, row, tmp_path):
    models = {"policy": tiny.llama(), "reference": tiny.llama(5)}
    models[broken].model.embed_tokens.weight.data[row] = torch.nan
    given = {"reference": models["reference"]}
    run = tiny.trainer(tmp_path, models["policy"], given=given, max_steps=3, self_test=False)
    with pytest.raises(ValueError, match=rf"the {broken}'s logits are (NaN|not finite).*sample.*position"):
        run.train()
