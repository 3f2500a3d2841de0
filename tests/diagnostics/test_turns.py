"""Which of the assistant's turns count: each scored as if it were the last, in one pass over the conversation."""

import pytest
import torch
from support import tiny

import klft
from klft.prompts import Turns, encode_texts

USER, SAID = "user", "assistant"


def chat(*contents):
    """A conversation of these turns, the user's first."""
    return [{"role": (USER, SAID)[i % 2], "content": content} for i, content in enumerate(contents)]


LONG = chat("w1 w2", "w3", "w4", "w5 w6 w7", "w8 w9", "w10 w11")
SHORT = chat("w12", "w13 w14")


@pytest.fixture(scope="module")
def models():
    return tiny.llama().double(), tiny.llama(5).double()


def counted(comparison):
    """(text, position) -> (token id, both KLs, both log-probabilities) of the tokens that count."""
    names = ("token_id", "reverse_kl", "forward_kl", "logp", "ref_logp")
    rows = comparison.table.to_pylist()
    return {
        (r["sample_id"], r["position"]): [r[n] for n in names]
        for r in rows
        if r["logp"] is not None and not r["is_prompt"]
    }


def compare(models, texts, **options):
    return klft.compare(*models, texts, tokenizer=tiny.tokenizer(chat=True), **options)


def test_every_turn_is_scored_as_if_it_were_the_last(models):
    found = counted(compare(models, [LONG, SHORT], turns="all"))
    prefixes = [(0, LONG[:2]), (0, LONG[:4]), (0, LONG), (1, SHORT)]
    alone = counted(compare(models, [prefix for _, prefix in prefixes]))
    expected = {(prefixes[i][0], position): values for (i, position), values in alone.items()}
    assert len(expected) == len(alone) == 8
    assert found.keys() == expected.keys()
    for place, values in found.items():
        assert values == pytest.approx(expected[place], rel=1e-6)  # float32 in the table


def test_what_the_user_said_counts_in_no_number(models):
    comparison = compare(models, [LONG], turns="all")
    shown = comparison.table.to_pylist()
    users = [r["token"] for r in shown if r["is_prompt"]]
    assert users == ["<bos>", "w27", "w1", "w2", "w28", "w27", "w4", "w28", "w27", "w8", "w9", "w28"]
    assert comparison.statistics.tokens == 6
    kl = [values[1] for values in counted(comparison).values()]
    assert comparison.estimates["reverse_kl"].value == pytest.approx(sum(kl) / len(kl))


@pytest.mark.parametrize("shape", [list, lambda messages: {"messages": list(messages)}])
def test_a_conversation_that_ends_with_the_user_has_the_turns_before(models, shape):
    asked = [*LONG, {"role": "user", "content": "w1 w2"}, {"role": "tool", "content": "w3"}]
    assert counted(compare(models, [shape(asked)], turns="all")) == counted(compare(models, [LONG], turns="all"))
    with pytest.raises(ValueError, match=r"text 1: the last message is not the assistant's \(got 'tool'\)"):
        compare(models, [shape(asked)])
    with pytest.raises(ValueError, match=r"text 1: the last message is not the assistant's \(got 'user'\)"):
        compare(models, [shape(LONG[:1])], turns="all")


@pytest.mark.parametrize(("turns", "number"), [("last", 2), ("all", 4)])
def test_how_many_of_how_many_are_said(models, turns, number):
    comparison = compare(models, [LONG, "w1 w2", SHORT], turns=turns)
    assert comparison.turns == (turns, number, 4)
    assert f"; {number} of 4 assistant turns (turns: {turns})" in comparison.summary["Scored"]
    assert comparison.numbers["turns"] == {"setting": turns, "counted": number, "total": 4}
    assert compare(models, ["w1 w2"], turns=turns).turns is None
    assert "turns" not in compare(models, ["w1 w2"], turns=turns).summary["Scored"]


def test_the_turns_of_one_conversation_are_one_cluster(models):
    one = compare(models, [LONG], turns="all").estimates["reverse_kl"]
    assert one.standard_error is None
    two = compare(models, [LONG, SHORT], turns="all")
    sums = {i: [v[1] for (text, _), v in counted(two).items() if text == i] for i in (0, 1)}
    mean = sum(map(sum, sums.values())) / 8
    residual = sum((sum(kls) - mean * len(kls)) ** 2 for kls in sums.values())
    assert two.estimates["reverse_kl"].standard_error == pytest.approx((2 * residual) ** 0.5 / 8)


@pytest.mark.parametrize("shape", [lambda c: {"messages": c}, lambda c: {"prompt": c[:3], "completion": c[3:]}])
def test_all_shapes_of_a_conversation_are_split_alike(shape):
    tokenizer = tiny.tokenizer(chat=True)
    expected = encode_texts(tokenizer, [LONG], max_length=64, turns="all")
    assert encode_texts(tokenizer, [shape(LONG)], max_length=64, turns="all") == expected
    assert expected.turns == {0: Turns([(5, 6), (9, 12), (16, 18)], 3)}
    assert expected.prompt_lengths == [5]


def test_turns_that_are_cut_off_do_not_count(caplog):
    tokenizer = tiny.tokenizer(chat=True)
    found = encode_texts(tokenizer, [LONG, SHORT], max_length=10, turns="all")
    assert found.turns == {0: Turns([(5, 6), (9, 10)], 3), 1: Turns([(4, 6)], 1)}
    found = encode_texts(tokenizer, [LONG, SHORT], max_length=10)
    assert found.sample_ids == [1]
    assert found.turns == {0: Turns([], 3), 1: Turns([(4, 6)], 1)}, "a text left out has turns too"


def test_a_greeting_that_nothing_stands_before_does_not_count():
    greeted = [{"role": SAID, "content": "w1"}, *SHORT]
    found = encode_texts(tiny.tokenizer(chat=True), [greeted], max_length=64, turns="all")
    assert found.turns == {0: Turns([(6, 8)], 2)}


def test_a_template_that_rewrites_earlier_turns_is_refused_and_the_last_turn_scored():
    tokenizer = tiny.tokenizer(chat=True)
    last = "{% if loop.last and m['role'] == 'assistant' %} w26 {% endif %}"  # as reasoning, which is then dropped
    tokenizer.chat_template = tokenizer.chat_template.replace("{{ m['content'] }}", last + "{{ m['content'] }}")
    with pytest.raises(ValueError, match=r"^text 1: turns='all' cannot tell where the turn of message 2 ends"):
        encode_texts(tokenizer, [LONG], max_length=64, turns="all")
    assert encode_texts(tokenizer, [LONG], max_length=64).turns == {0: Turns([(16, 19)], 3)}
    assert encode_texts(tokenizer, [SHORT], max_length=64, turns="all").turns == {0: Turns([(4, 7)], 1)}


def test_an_unknown_choice_lists_the_known_ones(models):
    with pytest.raises(ValueError, match="turns must be one of last, all, got 'first'"):
        compare(models, [LONG], turns="first")


def test_a_batch_of_texts_and_conversations_keeps_each_ones_prompt(models):
    pair = {"prompt": "w1 w2", "completion": " w3"}
    texts = [LONG, "w1 w2 w3", pair, SHORT]
    whole = counted(compare(models, texts, turns="all", batch_size=4))
    one_by_one = counted(compare(models, texts, turns="all", batch_size=1))
    assert whole.keys() == one_by_one.keys()
    assert sorted({text for text, _ in whole}) == [0, 1, 2, 3]
    assert torch.tensor(list(whole.values())).allclose(torch.tensor(list(one_by_one.values())))
