"""Special tokens of prompts: one BOS, no EOS that a tokenizer appends, BOS kept in cut prompts, cuts counted."""

import logging

import pytest
from datasets import Dataset
from support import tiny
from tokenizers import processors

from klft.prompts import cut_prompt, encode_prompt, encode_prompts, encode_texts

BOS, EOS = tiny.BOS, tiny.EOS
PADS_WITH_EOS = "the tokenizer has no pad token; padding with its EOS token '<eos>'"


def ids(*words):
    return [word + 3 for word in words]


def ending():
    """A tokenizer that begins and ends every text."""
    made = tiny.tokenizer(adds_bos=True)
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", BOS), ("<eos>", EOS)]
    )
    return made


def test_a_text_that_begins_with_bos_gets_no_second_one():
    tokenizer = tiny.tokenizer(adds_bos=True)
    assert tokenizer("<bos> w1 w2")["input_ids"][:2] == [BOS, BOS]
    assert encode_prompt(tokenizer, "<bos> w1 w2") == [BOS, *ids(1, 2)]
    assert encode_texts(tokenizer, ["<bos> w1 w2"], max_length=9).ids == [[BOS, *ids(1, 2)]]
    assert encode_prompt(tokenizer, "w1 w2") == [BOS, *ids(1, 2)]


def test_a_prompt_goes_on_after_its_end():
    assert encode_prompt(ending(), "w1 w2") == [BOS, *ids(1, 2)]
    assert encode_prompt(tiny.tokenizer(), "w1 <eos>") == [*ids(1), EOS]  # written by the user
    assert encode_texts(ending(), ["w1 w2"], max_length=9).ids == [[BOS, *ids(1, 2), EOS]]


@pytest.mark.parametrize(("limit", "kept"), [
    (None, [BOS, *ids(1, 2, 3)]), (4, [BOS, *ids(1, 2, 3)]), (3, [BOS, *ids(2, 3)]), (2, [BOS, *ids(3)]), (1, ids(3)),
])  # fmt: skip
def test_a_cut_prompt_keeps_its_bos_and_its_end(limit, kept):
    tokenizer = tiny.tokenizer(adds_bos=True)
    assert cut_prompt(tokenizer, [BOS, *ids(1, 2, 3)], limit) == kept
    assert encode_prompts(tokenizer, ["w1 w2 w3"], limit) == [kept]


def test_cut_prompts_are_counted(tmp_path):
    data = Dataset.from_dict({"prompt": ["w1 w2 w3 w4", "w1", "w2 w3", "w4"] * 4})
    run = tiny.trainer(tmp_path, data=data, max_prompt_length=3, max_steps=4)
    run.train()
    assert [row["prompts/truncated/frac"] for row in tiny.step_logs(run)] != [0.0] * 4
    assert sum(row["prompts/truncated/frac"] for row in tiny.step_logs(run)) == pytest.approx(1.0)
    run = tiny.trainer(tmp_path, data=data, max_steps=1)
    run.train()
    assert "prompts/truncated/frac" not in tiny.step_logs(run)[0]


def test_a_dataset_without_prompts_is_told_what_it_has(tmp_path):
    data = Dataset.from_dict({"question": ["w1"] * 64, "answer": ["w2"] * 64})
    for given in ({"train_dataset": data}, {"eval_dataset": data}, {"eval_dataset": {"other": data}}):
        (name,) = given
        with pytest.raises(ValueError, match=rf"^{name}.* needs a column 'prompt' .*it has \['question', 'answer'\]"):
            tiny.trainer(tmp_path, given=given)


@pytest.mark.parametrize(("pad", "lines"), [(None, 1), ("<pad>", 0)])
def test_without_a_pad_token_the_end_pads_and_it_is_said_once(pad, lines, tmp_path, caplog):
    logger = logging.getLogger("klft.ppo.inputs")
    with caplog.at_level(logging.INFO, logger.name):
        logger.addHandler(caplog.handler)
        try:
            run = tiny.trainer(tmp_path, given={"processing_class": tiny.tokenizer(pad=pad)}, max_steps=2)
            run.train()
        finally:
            logger.removeHandler(caplog.handler)
    said = [id(r) for r in caplog.records if r.getMessage() == PADS_WITH_EOS]
    assert len(set(said)) == lines  # a record that also went up to the root counts once
