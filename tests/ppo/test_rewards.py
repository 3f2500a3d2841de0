"""Reward functions and reward models: what is accepted, what comes out of it, what an error says."""

import asyncio
import functools
import math
import re

import numpy as np
import pandas as pd
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast
from trl.rewards import get_repetition_penalty_reward, get_soft_overlong_punishment, think_format_reward

from klft.ppo import RewardModel
from klft.ppo.rewards import as_reward_functions, call_reward_functions, reward_name
from klft.shaping import weigh_scores

NAN, INF = math.nan, math.inf
PROMPTS = ["one fish", "two fish"]
COMPLETIONS = ["red", "blue fish"]
IDS = [[5], [6, 7]]


def call(functions, prompts=PROMPTS, completions=COMPLETIONS, ids=IDS, columns=None, **extra):
    functions = functions if isinstance(functions, list) else [functions]
    return call_reward_functions(functions, prompts, completions, ids, columns or {}, **extra)


def length(completions, **_):
    return [float(len(c)) for c in completions]


async def slow_length(completions, **_):
    await asyncio.sleep(0.05)
    return [10.0 * len(c) for c in completions]


async def quick_words(completions, **_):
    return [len(c.split()) for c in completions]


# --- callables -------------------------------------------------------------------------------------------------------


def test_a_function_gets_everything_by_name():
    seen = {}

    def look(**given):
        seen.update(given)
        return [1.0, 2.0]

    call(look, columns={"answer": ["a", "b"]}, trainer_state="state", log_metric=print)
    assert seen == {
        "prompts": PROMPTS, "completions": COMPLETIONS, "completion_ids": IDS, "answer": ["a", "b"],
        "trainer_state": "state", "log_metric": print,
    }  # fmt: skip


def test_scores_are_one_row_per_completion_and_one_column_per_function():
    scores = call([length, quick_words])
    assert scores.dtype == torch.float32
    assert scores.tolist() == [[3.0, 1.0], [9.0, 2.0]]


@pytest.mark.parametrize(
    ("functions", "want"),
    [
        ([length], [[3.0], [9.0]]),
        ([slow_length], [[30.0], [90.0]]),
        ([slow_length, quick_words], [[30.0, 1.0], [90.0, 2.0]]),
        ([slow_length, length, quick_words], [[30.0, 3.0, 1.0], [90.0, 9.0, 2.0]]),
        ([length, slow_length], [[3.0, 30.0], [9.0, 90.0]]),
    ],
)
def test_sync_and_async_functions_keep_their_columns(functions, want):
    assert call(functions).tolist() == want


def test_async_functions_wait_together():
    """Each ends when all five have begun: one after the other, the first would never end."""
    all_have_begun = asyncio.Barrier(5)

    async def nap(completions, **_):
        await asyncio.wait_for(all_have_begun.wait(), 60)
        return [0.0] * len(completions)

    assert call([nap] * 5).shape == (2, 5)


def test_an_exception_in_a_function_is_its_own():
    def broken(**_):
        raise KeyError("no such answer")

    async def broken_later(**_):
        raise KeyError("no such answer")

    for f in (broken, broken_later):
        with pytest.raises(KeyError, match="no such answer"):
            call([length, f])


def strict(prompts, completions):
    return [0.0] * len(prompts)


async def strict_later(prompts, completions):
    return [0.0] * len(prompts)


class Strict:
    __name__ = "strict_object"

    def __call__(self, prompts, *, completions):
        return [0.0] * len(prompts)


@pytest.mark.parametrize(("function", "said"), [
    (strict, "'strict' got an unexpected keyword argument 'answer'."),
    (strict_later, "'strict_later' got an unexpected keyword argument"),
    (Strict(), "'strict_object' got an unexpected keyword argument"),
    (functools.partial(strict, [1]), "'strict' "),
    (lambda solution, **_: solution, "'<lambda>' missing a required argument: 'solution'."),
])  # fmt: skip
def test_arguments_that_do_not_fit_are_named_with_the_way_out(function, said):
    with pytest.raises(TypeError, match=f"^reward function {re.escape(said)}") as caught:
        call([length, function], columns={"answer": ["a", "b"]})
    assert "called with answer, prompts, completions, completion_ids by name: add **_ " in str(caught.value)


def test_a_type_error_inside_a_function_is_its_own():
    def adds(completions, **_):
        return completions + 1

    def filtered(function):
        @functools.wraps(function)
        def called(**given):
            return function(given["prompts"], given["completions"])

        return called

    with pytest.raises(TypeError, match="can only concatenate list"):
        call(adds)
    assert call(filtered(strict)).tolist() == [[0.0], [0.0]]


@pytest.mark.parametrize("name", ["prompts", "completions", "completion_ids"])
def test_a_column_cannot_take_the_place_of_what_was_sampled(name):
    """A dataset may have a column of that name; scoring it instead of the samples would train on nothing."""
    seen = {}

    def look(**given):
        seen.update(given)
        return [0.0, 0.0]

    sampled = {"prompts": PROMPTS, "completions": COMPLETIONS, "completion_ids": IDS}
    told = None
    try:
        call(look, columns={name: ["of the dataset"] * 2})
    except (TypeError, ValueError) as error:
        told = str(error)
    assert (name in told) if told else (seen[name] == sampled[name])


def test_trls_own_reward_functions_run_unchanged():
    completions = [[{"role": "assistant", "content": text}] for text in ("<think>a</think>b", "no thought")]
    prompts = [[{"role": "user", "content": p}] for p in PROMPTS]
    ids = [[1, 2, 3, 4], [5, 5, 5, 5, 5]]
    functions = as_reward_functions(
        [think_format_reward, get_repetition_penalty_reward(ngram_size=2), get_soft_overlong_punishment(5, 2)]
    )
    scores = call(functions, prompts, completions, ids)
    torch.testing.assert_close(scores, torch.tensor([[1.0, 0.0, -0.5], [0.0, -0.75, -1.0]]))
    names = [reward_name(f) for f in functions]
    assert names == ["think_format_reward", "repetition_penalty_reward", "soft_overlong_punishment_reward"]


def test_none_means_not_applicable_and_is_left_out_of_the_weighted_sum():
    def sometimes(**_):
        return [None, 4.0]

    def never(**_):
        return [None, None]

    scores = call([length, sometimes, never])
    torch.testing.assert_close(scores, torch.tensor([[3.0, NAN, NAN], [9.0, 4.0, NAN]]), equal_nan=True)
    weighed = weigh_scores(scores, torch.tensor([1.0, 0.5, 7.0]))
    torch.testing.assert_close(weighed, torch.tensor([3.0, 11.0]))


@pytest.mark.parametrize(
    "returned",
    [
        torch.tensor([1.0, 2.5]),
        torch.tensor([1.0, 2.5], dtype=torch.float64, requires_grad=True),
        [torch.tensor(1.0), torch.tensor(2.5)],
        (1, 2.5),
        [np.float32(1.0), np.float64(2.5)],
        np.array([1.0, 2.5]),
        pd.Series([1.0, 2.5]),
    ],
    ids=lambda r: type(r).__name__ + str(getattr(r, "dtype", "")),
)
def test_numbers_in_other_clothes(returned):
    assert call(lambda **_: returned).tolist() == [[1.0], [2.5]]


def judge(returned):
    def my_judge(**_):
        return returned

    return my_judge


@pytest.mark.parametrize(
    ("returned", "got"),
    [
        ([1.0], "1 value"),
        ([1.0, 2.0, 3.0], "3 values"),
        ([], "0 values"),
        (torch.zeros(3), "3 values"),
        (1.0, "a float"),
        (None, "None"),
        (torch.tensor(1.0), "a "),
        ("ab", "str"),  # two characters are not two numbers
        ({"a": 1.0, "b": 2.0}, "dict"),
        ((x for x in [1.0, 2.0]), "a generator"),
    ],
)
def test_a_wrong_length_or_shape_names_the_function(returned, got):
    with pytest.raises(ValueError, match=f"'my_judge' must return one number per completion: 2, got .*{got}"):
        call([length, judge(returned)])


@pytest.mark.parametrize(
    "value",
    [NAN, INF, -INF, "1.0", "good", b"1.0", [1.0], {"score": 1}, 1j, object(), torch.tensor([1.0, 2.0]),
     torch.tensor(NAN), np.float32("inf"), 10**400, 1e300],
    ids=lambda v: f"{type(v).__name__}-{v!r:.12}",
)  # fmt: skip
def test_what_is_no_number_names_the_function_the_index_and_the_prompt(value):
    with pytest.raises(ValueError, match="my_judge") as caught:
        call([length, judge([0.0, value])])
    message = str(caught.value)
    assert "completion 1" in message
    assert repr(PROMPTS[1]) in message


@pytest.mark.parametrize("bad", [NAN, INF])
def test_a_tensor_that_is_not_finite_is_named_too(bad):
    with pytest.raises(ValueError, match=r"'my_judge' returned (nan|inf) for completion 0, prompt 'one fish'"):
        call(judge(torch.tensor([bad, 0.0])))


def test_a_long_prompt_is_shortened_in_the_message():
    with pytest.raises(ValueError, match="my_judge") as caught:
        call(judge([NAN]), prompts=["x" * 10_000], completions=["y"], ids=[[1]])
    assert len(str(caught.value)) < 400


def test_no_prompts_at_all():
    assert call([length, quick_words], [], [], []).shape == (0, 2)


# --- what may be a reward function -----------------------------------------------------------------------------------


def test_one_or_several():
    assert as_reward_functions(length) == [length]
    assert as_reward_functions((length, quick_words)) == [length, quick_words]


@pytest.mark.parametrize("nothing", [[], ()])
def test_none_at_all_is_refused(nothing):
    with pytest.raises(ValueError, match="reward_funcs is empty"):
        as_reward_functions(nothing)


@pytest.mark.parametrize("thing", [3, None, {"a": length}])
def test_what_cannot_be_called_is_refused(thing):
    with pytest.raises(TypeError, match=f"expected a callable, a model id or a model, got {type(thing).__name__}"):
        as_reward_functions([length, thing])


# --- models ----------------------------------------------------------------------------------------------------------

WORDS = [*"abcdefghij", "fish", "red", "blue", "one", "two", "user", "assistant", ":", "!"]
TEMPLATE = "{{ bos_token }}{% for m in messages %} {{ m['role'] }} : {{ m['content'] }} !{% endfor %}"


def reward_tokenizer(bos=False, pad="<pad>"):
    """A tokenizer of the reward model's own: another vocabulary and other ids than any policy's."""
    vocab = {"<unk>": 0, "<s>": 1, "<pad>": 2} | {w: i + 3 for i, w in enumerate(WORDS)}
    t = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    t.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        t.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made = PreTrainedTokenizerFast(tokenizer_object=t, unk_token="<unk>", bos_token="<s>", pad_token=pad)
    made.chat_template = TEMPLATE
    return made


def reward_config(labels=1, pad_token_id=2, **more):
    return LlamaConfig(
        vocab_size=3 + len(WORDS), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_labels=labels, pad_token_id=pad_token_id, initializer_range=0.3, **more,
    )  # fmt: skip


def classifier(labels=1, seed=0, **more):
    torch.manual_seed(seed)
    return LlamaForSequenceClassification(reward_config(labels, **more)).eval()


def two_label():
    return classifier(2, id2label={0: "NEGATIVE", 1: "POSITIVE"}, label2id={"NEGATIVE": 0, "POSITIVE": 1})


def alone(model, tokenizer, text):
    """The logits of one text, without padding or batching."""
    with torch.no_grad():
        return model(**tokenizer(text, return_tensors="pt")).logits[0].double()


def whole(prompts=PROMPTS, completions=COMPLETIONS):
    return [p + c for p, c in zip(prompts, completions, strict=True)]


TEXTS = (["one fish ", "two "], ["red", "blue fish a b c d"])


def test_a_one_label_model_gives_its_raw_logit():
    model, tokenizer = classifier(), reward_tokenizer()
    want = [alone(model, tokenizer, text).item() for text in whole(*TEXTS)]
    assert abs(want[0] - want[1]) > 1e-3
    assert RewardModel(model, tokenizer)(*TEXTS) == pytest.approx(want, abs=1e-5)


@pytest.mark.parametrize(("label", "index"), [("POSITIVE", 1), ("NEGATIVE", 0), (1, 1), (0, 0)])
def test_a_two_label_model_gives_the_probability_of_the_label(label, index):
    model, tokenizer = two_label(), reward_tokenizer()
    want = [alone(model, tokenizer, text).softmax(-1)[index].item() for text in whole(*TEXTS)]
    got = RewardModel(model, tokenizer, label=label)(*TEXTS)
    assert got == pytest.approx(want, abs=1e-6)
    assert all(0 < x < 1 for x in got)


@pytest.mark.parametrize("label", [None, "positive", "NEUTRAL", 2, -1])
def test_a_label_the_model_has_not_got_is_refused(label):
    with pytest.raises(ValueError, match=r"with 2 labels needs `label`.*NEGATIVE, POSITIVE; got"):
        RewardModel(two_label(), reward_tokenizer(), label=label)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 64])
def test_the_batch_size_changes_nothing(batch_size):
    prompts, completions = ["one ", "two ", "a b c d e ", "fish ", "red blue "], ["a", "b c d e f g", "h", "i j", "a"]
    model, tokenizer = classifier(), reward_tokenizer()
    want = [alone(model, tokenizer, text).item() for text in whole(prompts, completions)]
    assert RewardModel(model, tokenizer, batch_size=batch_size)(prompts, completions) == pytest.approx(want, abs=1e-5)


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "tiny-reward"
    classifier().save_pretrained(path)
    reward_tokenizer().save_pretrained(path)
    return str(path)


def test_a_path(saved):
    (f,) = as_reward_functions(saved)
    assert reward_name(f) == "tiny-reward"
    want = [alone(classifier(), reward_tokenizer(), text).item() for text in whole(*TEXTS)]
    scores = call([f], *TEXTS, ids=IDS, columns={"answer": ["a", "b"]}, trainer_state=None)
    assert scores[:, 0].tolist() == pytest.approx(want, abs=1e-5)


def test_a_model_finds_the_tokenizer_it_was_saved_with(saved):
    model = LlamaForSequenceClassification.from_pretrained(saved)
    functions = as_reward_functions([length, model])
    want = [alone(classifier(), reward_tokenizer(), text).item() for text in whole(*TEXTS)]
    assert call(functions, *TEXTS)[:, 1].tolist() == pytest.approx(want, abs=1e-5)
    assert reward_name(functions[1]) == "tiny-reward"


def test_a_reward_model_is_frozen_and_scores_without_dropout():
    model = classifier(attention_dropout=0.5).train()
    f = RewardModel(model, reward_tokenizer())
    want = f(*TEXTS)
    model.train()
    assert f(*TEXTS) == want
    assert not any(p.requires_grad for p in model.parameters())


def test_a_tokenizer_without_a_pad_token_scores_several_texts():
    """As most decoder checkpoints come; padding by whatever must not change a score."""
    model, tokenizer = classifier(pad_token_id=None), reward_tokenizer(pad=None)
    want = [alone(model, tokenizer, text).item() for text in whole(*TEXTS)]
    assert RewardModel(model, tokenizer)(*TEXTS) == pytest.approx(want, abs=1e-5)


def test_a_causal_lm_is_no_reward_model():
    model = LlamaForCausalLM(reward_config())
    with pytest.raises(
        (TypeError, ValueError), match=r"sequence.classification.*LlamaForCausalLM|LlamaForCausalLM.*sequence"
    ):
        RewardModel(model, reward_tokenizer(), label=0)


CHATS = (
    [[{"role": "user", "content": "one fish"}], [{"role": "user", "content": "two"}]],
    [[{"role": "assistant", "content": "red"}], [{"role": "assistant", "content": "blue fish"}]],
)


@pytest.mark.parametrize("bos", [False, True])
def test_conversations_go_through_the_models_own_chat_template(bos):
    model, tokenizer = classifier(), reward_tokenizer(bos=bos)
    want = []
    for prompt, completion in zip(*CHATS, strict=True):
        # What the template itself makes of a conversation: its BOS once, however the tokenizer treats plain text.
        ids = tokenizer.apply_chat_template([*prompt, *completion], tokenize=True, return_dict=False)
        with torch.no_grad():
            want.append(model(input_ids=torch.tensor([ids])).logits.item())
    assert RewardModel(model, tokenizer)(*CHATS) == pytest.approx(want, abs=1e-5)


def test_a_conversations_completion_matters():
    model, tokenizer = classifier(), reward_tokenizer()
    prompts = [CHATS[0][0]] * 2
    first, second = RewardModel(model, tokenizer)(prompts, CHATS[1])
    assert abs(first - second) > 1e-4
