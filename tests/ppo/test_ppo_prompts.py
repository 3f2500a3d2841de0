"""Prompts: one BOS, no EOS that a tokenizer appends, BOS kept in cut ones, cuts counted; how many a rollout takes."""

import logging

import pytest
from datasets import Dataset
from support import tiny
from tokenizers import processors

from klft.ppo.inputs import check_datasets
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


# ---- how many a rollout takes --------------------------------------------------------------------------------------


def checked(train, evaluation=None, **sizes):
    args = tiny.config("unused", **sizes)
    return check_datasets(train, evaluation, args, tiny.tokenizer(), [])


@pytest.mark.parametrize(("prompts", "sizes", "fit"), [
    (7, (8, 1, 1), "per_device_train_batch_size = 7; or 8 prompts"),
    (7, (4, 3, 2), "per_device_train_batch_size = 1; or 24 prompts"),
    (9, (4, 3, 2), "per_device_train_batch_size = 1, or gradient_accumulation_steps = 1; or 24 prompts"),
    (1, (2, 2, 2), "sizes whose product is at most 1; or 8 prompts"),
])  # fmt: skip
def test_too_few_prompts_are_refused_with_the_arithmetic_and_what_would_fit(prompts, sizes, fit):
    names = ("per_device_train_batch_size", "gradient_accumulation_steps", "num_mini_batches")
    product = " * ".join(f"{size} ({name})" for size, name in zip((*sizes, 1), (*names, "processes"), strict=True))
    takes = sizes[0] * sizes[1] * sizes[2]
    with pytest.raises(ValueError, match="one rollout takes") as refused:
        checked(tiny.prompts(prompts), **dict(zip(names, sizes, strict=True)))
    assert str(refused.value) == (
        f"train_dataset has {prompts} prompt(s), and one rollout takes {takes} = {product}. What would fit: {fit}"
    )
    if " = " in fit:  # each of them does, and one more would not
        for name, size in (each.split(" = ") for each in fit.partition(";")[0].split(", or ")):
            others = dict(zip(names, sizes, strict=True)) | {name: int(size)}
            checked(tiny.prompts(prompts), **others)
            with pytest.raises(ValueError, match="one rollout takes"):
                checked(tiny.prompts(prompts), **(others | {name: int(size) + 1}))


def test_an_evaluation_set_needs_one_prompt_and_no_arithmetic():
    blank = Dataset.from_dict({"prompt": [" "]})
    with pytest.raises(ValueError, match=r"^eval_dataset has no prompt$"):
        checked(None, blank)
    with pytest.raises(ValueError, match=r"^eval_dataset\['b'\] has no prompt$"):
        checked(None, {"a": tiny.prompts(1), "b": blank})


@pytest.mark.parametrize(("order", "which"), [("random", "others each time"), ("sequential", "the last ones")])
def test_prompts_that_a_pass_leaves_unused_are_said_once_at_the_start(tmp_path, caplog, order, which):
    sizes = {"per_device_train_batch_size": 4, "num_mini_batches": 1, "gradient_accumulation_steps": 1}
    with caplog.at_level(logging.WARNING):
        run = tiny.trainer(
            tmp_path,
            data=tiny.prompts(11),
            train_sampling_strategy=order,
            num_train_epochs=2,
            num_ppo_epochs=1,
            **sizes,
        )
        run.train()
    (said,) = [record.getMessage() for record in caplog.records if "unused" in record.getMessage()]
    assert said.startswith(f"train_dataset: a pass leaves 3 of 11 prompts unused ({which}): one rollout takes 4 = 4 (")
    assert said.endswith("With 8 or 12 prompts it would leave none")
    assert run.state.global_step == 4
    caplog.clear()
    checked(tiny.prompts(12))
    assert "unused" not in caplog.text
