"""Conversations: template arguments of config and columns reach the templates, prefills are continued as one turn."""

import pytest
from datasets import Dataset
from support import tiny

from klft.diagnostics import TokenKLCallback
from klft.ppo import RewardModel
from klft.prompts import decode_completions, encode_prompts, encode_texts, join_turns, pad, template_arguments

USER, PREFILL = {"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}
# w20: tools are there; w21: thinking is off; w27, w28: whose turn it is.
TEMPLATE = (
    "{% if tools %}w20 {{ tools[0]['function']['name'] }} {% endif %}"
    "{% if enable_thinking is defined and not enable_thinking %}w21 {% endif %}" + tiny.CHAT_TEMPLATE
)
STRICT = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{{ m['content'] }} {% endfor %}"
)
TOOL = {"type": "function", "function": {"name": "w9", "description": "w8"}}


def tokenizer(template=TEMPLATE):
    made = tiny.tokenizer(chat=True)
    made.chat_template = template
    return made


def trained(folder, rows, **changed):
    """What the policy was given, by the reward functions' table: (prompts' texts, columns that the function saw)."""
    seen = []

    def reward(prompts, completions, **columns):
        seen.append((prompts, completions, columns))
        return [0.0] * len(completions)

    read = []
    run = tiny.trainer(
        folder,
        reward=reward,
        data=Dataset.from_list(rows),
        given={"processing_class": tokenizer()},
        max_steps=1,
        self_test=False,  # it generates too
        **changed,
    )
    generate = run.model.generate
    run.model.generate = lambda **given: read.append(given["input_ids"]) or generate(**given)
    run.train()
    return tokenizer().batch_decode(read[0]), seen[0]


@pytest.mark.parametrize("as_json", [False, True])
def test_columns_and_config_reach_the_template(tmp_path, as_json):
    tools = "[" + str(TOOL).replace("'", '"') + "]" if as_json else [TOOL]
    rows = [{"prompt": [USER], "chat_template_kwargs": {"enable_thinking": False}, "tools": tools}] * 8
    texts, (_, _, columns) = trained(tmp_path / "a", rows)
    assert all("w20 w9" in t and "w21" in t and "w27 w1 w28" in t for t in texts)
    assert columns["chat_template_kwargs"] == [{"enable_thinking": False}] * 4
    assert columns["tools"] == [tools] * 4
    texts, _ = trained(tmp_path / "b", [{"prompt": [USER]}] * 8)
    assert not any("w20" in t or "w21" in t for t in texts)
    given = '{"enable_thinking": false}' if as_json else {"enable_thinking": False}
    texts, _ = trained(tmp_path / "c", [{"prompt": [USER]}] * 8, chat_template_kwargs=given)
    assert all("w21" in t and "w20" not in t for t in texts)


def test_a_row_says_more_than_the_config():
    defaults = {"enable_thinking": False, "date": "today"}
    row = {
        "chat_template_kwargs": {"enable_thinking": True, "of_another_row": None},
        "tools": [TOOL | {"strict": None}],
    }
    # What Arrow fills in where another row has more keys is nobody's wish.
    assert template_arguments(row, defaults) == {"enable_thinking": True, "date": "today", "tools": [TOOL]}
    assert template_arguments({"tools": None, "chat_template_kwargs": None}, '{"a": 1}') == {"a": 1}
    assert template_arguments({"prompt": "w1", "tools": []}) == {}


@pytest.mark.parametrize(("kwargs", "said"), [
    ({"tokenize": True}, "tokenize"), ({"add_generation_prompt": False}, "add_generation_prompt"), ([1], "dict"),
    ("{", "dict"),
])  # fmt: skip
def test_arguments_that_are_not_the_users_to_say(tmp_path, kwargs, said):
    with pytest.raises(ValueError, match=rf"PPOConfig: chat_template_kwargs.*{said}"):
        tiny.config(tmp_path, chat_template_kwargs=kwargs)
    if not isinstance(kwargs, list):
        with pytest.raises(ValueError, match=rf"chat_template_kwargs.*{said}"):
            tiny.trainer(tmp_path, data=Dataset.from_list([{"prompt": [USER], "chat_template_kwargs": kwargs}] * 8),
                         given={"processing_class": tokenizer()})  # fmt: skip


# ---- prefills -------------------------------------------------------------------------------------------------------


def test_a_prefill_is_continued(tmp_path):
    texts, (prompts, completions, _) = trained(tmp_path, [{"prompt": [USER, PREFILL]}] * 8)
    assert all(t.endswith("w27 w1 w28 w2") for t in texts), texts
    assert prompts[0] == [USER, PREFILL]
    assert [m["role"] for m in completions[0]] == ["assistant"]


def test_a_continuation_keeps_its_space():
    """As after a text: prefill + completion is what the tokens read as."""
    made = tokenizer()
    prompt_ids, prompt_mask = pad(encode_prompts(made, [[USER, PREFILL], [USER]]), 0)
    ids, mask = pad([[8, 9], [8, 9]], 0, side="right")
    prefilled, answered = decode_completions(made, [[USER, PREFILL], [USER]], prompt_ids, prompt_mask, ids, mask)
    assert prefilled == [{"role": "assistant", "content": " w5 w6"}]
    assert answered == [{"role": "assistant", "content": "w5 w6"}]


def test_a_prefill_and_its_continuation_are_one_turn():
    said = [{"role": "assistant", "content": " w3"}]
    assert join_turns([USER, PREFILL], said) == [USER, {"role": "assistant", "content": "w2 w3"}]
    assert join_turns([USER], said) == [USER, *said]
    parts = {"role": "assistant", "content": [{"type": "text", "text": "w2"}]}
    assert join_turns([USER, parts], said)[-1]["content"] == [*parts["content"], {"type": "text", "text": " w3"}]


@pytest.mark.parametrize("template", [TEMPLATE, STRICT])
def test_the_judge_reads_one_assistants_turn(template):
    made = tokenizer(template)
    judge = RewardModel(tiny.critic(), made)
    read = []
    judge.tokenizer = lambda texts, **_: read.extend(texts) or made(texts, return_tensors="pt", padding=True)
    judge.tokenizer.apply_chat_template = made.apply_chat_template
    judge([[USER, PREFILL]], [[{"role": "assistant", "content": " w3"}]])
    judge([[USER]], [[{"role": "assistant", "content": "w2 w3"}]])
    assert read[0] == read[1]
    judge([[USER]], [[PREFILL]], template_arguments=[{"enable_thinking": False, "tools": [TOOL]}])
    assert ("w20 w9 w21" in read[2]) == (template is TEMPLATE)


def test_a_judge_gets_the_arguments_and_other_functions_do_not(tmp_path, monkeypatch):
    given = []
    score = RewardModel.__call__
    monkeypatch.setattr(
        RewardModel, "__call__", lambda self, *a, **k: given.append(k["template_arguments"]) or score(self, *a, **k)
    )
    rows = [{"prompt": [USER], "tools": [TOOL]}] * 8
    own = lambda completions, **columns: [float("template_arguments" in columns)] * len(completions)
    run = tiny.trainer(
        tmp_path, reward=[RewardModel(tiny.critic(), tokenizer()), own],
        data=Dataset.from_list(rows), given={"processing_class": tokenizer()}, max_steps=1,
        chat_template_kwargs={"enable_thinking": False},
    )  # fmt: skip
    run.train()
    assert tiny.step_logs(run)[0]["reward/<lambda>/mean"] == 0
    assert given == [[{"enable_thinking": False, "tools": [TOOL]}] * 4]


# ---- texts that are scored as they are ------------------------------------------------------------------------------


def test_texts_and_probes_take_the_same_arguments(tmp_path):
    made, said = tokenizer(), [{"role": "assistant", "content": "w3"}]
    row = {"prompt": [USER], "chat_template_kwargs": {"enable_thinking": False}, "tools": [TOOL]}
    for text in (
        row | {"completion": said},
        {k: v for k, v in row.items() if k != "prompt"} | {"messages": [USER, *said]},
    ):
        encoded = encode_texts(made, [text], max_length=32)
        assert "w20 w9 w21" in made.decode(encoded.ids[0])
    callback = TokenKLCallback(tiny.apart(), [row, [USER], row | {"completion": said}], max_new_tokens=4, max_length=40)
    callback._tokenizer = made
    callback._template = None
    callback._prepare()
    assert ["w21" in made.decode(ids) for ids in callback._prompts.values()] == [True, False]
    assert "w20 w9 w21" in made.decode(callback._fixed.ids[0])


def test_a_text_with_a_prefill_is_one_turn():
    made = tokenizer(STRICT)
    encoded = encode_texts(
        made, [{"prompt": [USER, PREFILL], "completion": [{"role": "assistant", "content": " w3 w4"}]}], max_length=32
    )
    assert made.decode(encoded.ids[0]) == "w1 w2 w3 w4"
    assert encoded.prompt_lengths == [2]


# ---- prompts that are none ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("prompt", "said"), [
    ([3, 4, 5], r"prompt 0 .*token ids"), (["w1 w2", "w3"], "prompt 0 .*list of texts"),
    ([{"from": "human", "value": "w1"}], "prompt 0 .*role.*content"),
    ([{"role": "system", "content": "w1"}], "prompt 0 .*ends with .*system"),
])  # fmt: skip
def test_prompts_that_are_neither_text_nor_messages(tmp_path, prompt, said):
    with pytest.raises(ValueError, match=rf"train_dataset: {said}"):
        tiny.trainer(
            tmp_path, data=Dataset.from_list([{"prompt": prompt}] * 8), given={"processing_class": tokenizer()}
        )


def test_who_cannot_render_a_conversation_is_named_before_training(tmp_path):
    rows = Dataset.from_list([{"prompt": [USER]}] * 8)
    with pytest.raises(ValueError, match=r"train_dataset has conversations.*tokenizer has no chat template"):
        tiny.trainer(tmp_path, data=rows)
    with pytest.raises(ValueError, match="reward model 'LlamaForSequenceClassification' has no chat template"):
        tiny.trainer(tmp_path, reward=RewardModel(tiny.critic(), tiny.tokenizer()), data=rows,
                     given={"processing_class": tokenizer()})  # fmt: skip
    bad = Dataset.from_list([{"prompt": [USER]}] * 7 + [{"prompt": [USER, USER]}])
    with pytest.raises(ValueError, match=r"chat template .*roles must alternate"):
        tiny.trainer(tmp_path, data=bad, given={"processing_class": tokenizer(STRICT)})
