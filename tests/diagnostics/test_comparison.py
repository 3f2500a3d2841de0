"""klft.compare: its numbers against a float64 loop over the logits, its files, and what it refuses."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from rich.console import Console
from support import oracles, tiny
from support.example_report import data_of, table_of

import klft
from klft.diagnostics import Statistics, read_records, visible
from klft.diagnostics.terminal import worst_table

TEXTS = ["w1 w2 w3 w4 w5", "w6 w7", "w8 w9 w10 w11 w12 w13 w14", "w3 w1"]


@pytest.fixture(scope="module")
def models():
    return tiny.llama().double(), tiny.llama(5).double()


@pytest.fixture(scope="module")
def comparison(models):
    return klft.compare(*models, TEXTS, tokenizer=tiny.tokenizer())


@pytest.fixture
def saved(tmp_path):
    """Folders of the two models, the tokenizer beside them."""
    for name, seed in {"policy": 0, "reference": 5}.items():
        tiny.llama(seed).save_pretrained(tmp_path / name)
        tiny.tokenizer().save_pretrained(tmp_path / name)
    return tmp_path


@torch.no_grad()
def enumerated(models, texts):
    """By name, of each text the values of each of its tokens, from the whole softmax of both models."""
    rows = []
    for text in texts:
        ids = torch.tensor([tiny.tokenizer()(text)["input_ids"]])
        z, y = (model.eval()(input_ids=ids).logits[0, :-1] for model in models)
        said = ids[0, 1:, None]
        p, q = z.softmax(-1), y.softmax(-1)
        rows.append(
            {
                "reverse_kl": oracles.reverse_kl(z, y).tolist(),
                "forward_kl": oracles.forward_kl(z, y).tolist(),
                "same_top1": (z.argmax(-1) == y.argmax(-1)).double().tolist(),
                "square": ((p - q).gather(-1, said)[:, 0] ** 2).tolist(),
                "gap": (q.log() - p.log()).gather(-1, said)[:, 0].tolist(),
            }
        )
    return {name: [row[name] for row in rows] for name in rows[0]}


def clustered(groups):
    """Mean over all values, and its CR1 standard error with one cluster per list."""
    count, clusters = sum(map(len, groups)), len(groups)
    mean = sum(map(sum, groups)) / count
    residual = sum((sum(group) - mean * len(group)) ** 2 for group in groups)
    return mean, math.sqrt(clusters / (clusters - 1) * residual) / count


def through(function, groups):
    """The same of a function of the mean, the slope by a central difference."""
    mean, error = clustered(groups)
    step = 1e-5 * mean
    return function(mean), error * abs(function(mean + step) - function(mean - step)) / (2 * abs(step))


def test_the_estimates_are_those_of_a_loop_over_the_logits(models, comparison):
    values, found = enumerated(models, TEXTS), comparison.estimates
    for name in ("reverse_kl", "forward_kl", "same_top1"):
        assert found[name] == pytest.approx(clustered(values[name]), rel=1e-6)
    assert found["delta_p_rms"] == pytest.approx(through(lambda m: 100 * m**0.5, values["square"]), rel=1e-6)
    assert found["perplexity_ratio"] == pytest.approx(through(math.exp, values["gap"]), rel=1e-6)
    stats = comparison.statistics
    assert stats.perplexity / stats.ref_perplexity == pytest.approx(found["perplexity_ratio"].value)
    assert comparison.mean_reverse_kl == pytest.approx(found["reverse_kl"].value)


def test_the_other_way_round_the_two_directions_change_places(models, comparison):
    swapped = klft.compare(*models[::-1], TEXTS, tokenizer=tiny.tokenizer()).estimates
    assert swapped["reverse_kl"] == pytest.approx(comparison.estimates["forward_kl"])
    assert swapped["delta_p_rms"] == pytest.approx(comparison.estimates["delta_p_rms"])
    ratio = comparison.estimates["perplexity_ratio"].value
    assert swapped["perplexity_ratio"].value == pytest.approx(1 / ratio)


def test_the_headline_says_what_the_largest_tokens_carry(models):
    texts = [" ".join(f"w{(7 * i + j * (i + 3)) % 26}" for j in range(21)) for i in range(5)]
    comparison = klft.compare(*models, texts, tokenizer=tiny.tokenizer())
    kls = sorted((kl for text in enumerated(models, texts)["reverse_kl"] for kl in text), reverse=True)
    assert len(kls) == 100
    assert comparison.headline == f"5 % of the tokens carry {100 * sum(kls[:5]) / sum(kls):.0f} % of the KL"
    assert next(iter(comparison.summary.values())) == str(comparison).splitlines()[0] == comparison.headline
    assert len(comparison.summary) == len(str(comparison).splitlines()) == 8


@pytest.mark.parametrize("token", ["\n", "<id 198>"])
@pytest.mark.parametrize(("others", "share"), [(17, "41 %"), (48, "20 %"), (49, None)])
def test_the_headline_names_a_token_that_carries_much_of_the_kl_by_itself(token, others, share):
    """A chat template's newline, say, which nobody wrote: 1.5 of 1.5 + others / 8 nats."""
    rows = [{"token_id": 198, "token": token, "reverse_kl": 0.5} for _ in range(3)]
    rows += [{"token_id": i, "token": f"w{i}", "reverse_kl": 0.125} for i in range(others)]
    rows += [{"token_id": 5, "token": "w5", "reverse_kl": 9.0, "is_prompt": True}]
    found = klft.Comparison(*table_of([row | {"forward_kl": 1.0} for row in rows]))
    named = f"; '{visible(token)}' alone carries {share} of it" if share else ""
    largest = "5 % of the tokens carry 14 %" if others == 17 else "6 % of the tokens carry 20 %"  # 1 of 20, 3 of 51
    assert found.headline == f"{largest} of the KL{named}"


def test_no_place_of_a_worst_token_is_cut_in_eighty_columns(capsys):
    rows = [{"sample_id": 1233, "position": 600 + i, "token_id": i, "token": f" word{i}" * 5} for i in range(9)]
    numbers = {"reverse_kl": 0.5, "forward_kl": 10.25, "logp": -12.5, "ref_logp": -13.5}
    stats = Statistics.of(*table_of([row | numbers for row in rows]))
    Console(width=80).print(worst_table(stats))
    said = [line.split()[-5:] for line in capsys.readouterr().out.splitlines() if "word" in line]
    assert said == [["0.500", "10.250", "-12.500", "-13.500", f"1234:{600 + i}"] for i in range(8)]


def test_equal_models_agree_on_every_token():
    comparison = klft.compare(tiny.llama(), tiny.llama(), TEXTS, tokenizer=tiny.tokenizer())
    assert comparison.headline == "the models agree on every token"
    assert comparison.estimates["delta_p_rms"] == (0, 0)
    assert comparison.estimates["perplexity_ratio"] == (1, 0)
    assert comparison.estimates["same_top1"] == (1, 0)


def test_an_infinite_kl_is_counted_said_and_in_no_mean(comparison):
    column = comparison.table["reverse_kl"].to_pylist()
    place = comparison.table["position"].to_pylist().index(1)
    column[place] = math.inf
    table = comparison.table
    table = table.set_column(table.column_names.index("reverse_kl"), "reverse_kl", [column]).cast(table.schema)
    found = klft.Comparison(table, comparison.metadata)
    assert found.unbounded == found.numbers["unbounded"] == 1
    assert found.headline.startswith("1 of 12 tokens have an infinite KL; of the others, 9 % of the tokens carry ")
    assert math.isfinite(found.estimates["reverse_kl"].value)
    assert found.mean_reverse_kl == math.inf
    json.loads(found.to_json(), parse_constant=pytest.fail)


def test_files_by_their_suffix(comparison, tmp_path):
    page, parquet, numbers, markdown = (
        comparison.save(tmp_path / "new" / f"x{suffix}") for suffix in (".html", ".parquet", ".json", ".md")
    )
    assert page.read_text().startswith("<!doctype html>")
    table, metadata = read_records(parquet)
    assert table.equals(comparison.table.replace_schema_metadata(table.schema.metadata))
    assert metadata == comparison.metadata
    assert json.loads(numbers.read_text()) == json.loads(json.dumps(comparison.numbers))
    lines = markdown.read_text().splitlines()
    assert lines[0] == f"**{comparison.headline}**"
    assert f"| Perplexity | {comparison.summary['Perplexity']} |" in lines
    assert all(line.startswith("| ") and line.endswith(" |") and line.count("|") == 3 for line in lines[4:])
    assert sorted(path.name for path in page.parent.iterdir()) == ["x.html", "x.json", "x.md", "x.parquet"]


@pytest.mark.parametrize("name", ["tokens", "tokens.csv", "tokens.PARQUET.gz"])
def test_another_suffix_is_refused_by_name(comparison, tmp_path, name):
    with pytest.raises(ValueError, match=rf"{name} must end in one of \.html, \.parquet, \.json, \.md"):
        comparison.save(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_models_by_name_and_as_they_are_give_the_same(saved):
    policy, reference, tokenizer = str(saved / "policy"), saved / "reference", tiny.tokenizer()
    expected = klft.compare(tiny.llama(), tiny.llama(5), TEXTS, tokenizer=tokenizer)
    for given in (
        (policy, reference),
        (tiny.llama(), reference),
        (policy, tiny.llama(5)),
        (policy, klft.FrozenReference(tiny.llama(5))),
    ):
        found = klft.compare(*given, TEXTS, tokenizer=None if given[0] is policy else tokenizer)
        assert found.estimates == expected.estimates
    assert klft.compare(policy, reference, TEXTS).summary["Models"] == f"{policy} against {reference}, temperature 1"


def test_an_adapter_against_its_own_base(saved):
    model = get_peft_model(tiny.llama(), tiny.lora())
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.fill_(0.3)
    found = klft.compare(model, None, TEXTS, tokenizer=tiny.tokenizer())
    assert found.metadata.reference.endswith(" without its adapter")
    model.save_pretrained(saved / "adapter")
    again = klft.compare(model.merge_and_unload(), tiny.llama(), TEXTS, tokenizer=tiny.tokenizer())
    assert found.estimates["reverse_kl"] == pytest.approx(again.estimates["reverse_kl"], rel=1e-4)


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (
            {"texts": "w1 w2"},
            TypeError,
            r"^to read a file, .*no such file; else texts must be a list .* 'w1 w2'$",
        ),
        (
            {"texts": {"text": "w1"}},
            TypeError,
            "^texts must be a list of texts or .*, got a dict, {'text': 'w1'}$",
        ),
        ({"texts": "nothere.txt"}, ValueError, "^nothere.txt: there is no such file$"),
        ({"texts": Path("nothere")}, ValueError, "^nothere: there is no such file$"),
        ({"texts": []}, ValueError, r"none of 0 text\(s\) has a token to score"),
        ({"texts": ["w1", 3]}, TypeError, "text 2 must be .* got a int, 3|Type-check error"),
        ({"tokenizer": None}, ValueError, "the model was made here, and has no name to load a tokenizer by: pass one"),
        ({"revision": "v1"}, ValueError, "revision 'v1': the model is not loaded from the hub"),
        ({"ref_revision": "v1"}, ValueError, "revision 'v1': the reference is not loaded from the hub"),
        ({"reference": None}, ValueError, "has no PEFT adapter that could be switched off"),
        ({"reference": 3}, TypeError, "reference must be a model or a klft reference, got int"),
        ({"model": "nowhere"}, ValueError, "model nowhere: there is no such folder"),
        ({"temperature": math.nan}, ValueError, "temperature must be"),
        ({"dtype": "int8"}, ValueError, "dtype must be one of auto"),
    ],
)
def test_what_cannot_be_compared_is_an_error_that_says_why(models, change, error, said):
    given = {"model": models[0], "reference": models[1], "texts": TEXTS, "tokenizer": tiny.tokenizer()} | change
    with pytest.raises(error, match=said):
        klft.compare(**given)


def test_tokenizers_that_differ_are_refused_whichever_side_is_named(saved):
    tiny.with_other_ids(saved / "other")
    for given in ((saved / "policy", saved / "other"), (tiny.llama(), saved / "other")):
        with pytest.raises(ValueError, match="differ in 2 ids"):
            klft.compare(*given, TEXTS, tokenizer=None if given[0] == saved / "policy" else tiny.tokenizer())


def test_hidden_texts_are_in_nothing_that_is_made(models, tmp_path):
    found = klft.compare(*models, TEXTS, tokenizer=tiny.tokenizer(), hide_text=True)
    made = [found.save(tmp_path / f"x{suffix}") for suffix in (".html", ".json", ".md")]
    table, metadata = read_records(found.save(tmp_path / "x.parquet"))
    everything = [*(path.read_text() for path in made), found._repr_html_(), str(found), metadata.to_json()]
    everything.append(str(table.to_pylist()))
    shown = klft.compare(*models, TEXTS, tokenizer=tiny.tokenizer())
    words = r"\bw\d+\b(?!\.org)"
    assert re.search(words, str(shown.table.to_pylist()))
    for text in everything:
        assert not re.search(words, text), re.search(words, text)
    assert set(table["token"].to_pylist()) == {f"<id {i}>" for i in set(table["token_id"].to_pylist())}
    assert found.estimates == shown.estimates


def test_what_a_chat_template_says_of_a_hidden_text_is_not_said(models):
    tokenizer = tiny.tokenizer(chat=True)
    tokenizer.chat_template = "{{ raise_exception('no ' + messages[0]['content']) }}"
    texts = [[{"role": "user", "content": "secret"}, {"role": "assistant", "content": "w1"}]]
    said = "text 1: the chat template cannot render the prompt"
    with pytest.raises(ValueError, match=rf"^{said} \(got \[.*\]\): no secret$"):
        klft.compare(*models, texts, tokenizer=tokenizer)
    with pytest.raises(ValueError, match=f"^{said}$"):
        klft.compare(*models, texts, tokenizer=tokenizer, hide_text=True)


def test_a_file_of_texts_by_its_name_and_the_page_says_where_a_text_is_from(models, tmp_path):
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    (tmp_path / "lines").write_text("w1 w2\n\nw3 w4\n")
    given = {"tokenizer": tiny.tokenizer(), "turns": "last"}
    for name in (tmp_path / "texts.jsonl", str(tmp_path / "texts.jsonl"), klft.read_texts(tmp_path / "texts.jsonl")):
        found = klft.compare(*models, name, **given)
        assert found.metadata.places == [f"texts.jsonl row {i}" for i in (1, 2, 3, 4)]
        assert "text 3, texts.jsonl row 3" in str(data_of(found.save(tmp_path / "page.html")))
    assert klft.compare(*models, str(tmp_path / "lines"), **given).metadata.places[2] == "lines line 3"
    assert klft.compare(*models, TEXTS, **given).metadata.places == []
    for misspelt, error in (("text.jsonl", ValueError), ("texts.jsnl", TypeError)):
        with pytest.raises(error, match=rf"there is no such file.*\. Did you mean '{tmp_path}/texts\.jsonl'\?$"):
            klft.compare(*models, str(tmp_path / misspelt), **given)
    with pytest.raises(TypeError, match=r"there is no such file; else texts must be a list of texts or conversations$"):
        klft.compare(*models, "secret", hide_text=True, **given)


def test_in_a_notebook_the_page_is_shut_in_a_frame(models):
    shown = klft.compare(*models, TEXTS * 100, tokenizer=tiny.tokenizer())._repr_html_()
    assert len(shown) < 400_000
    (frame,) = re.findall(r'<iframe sandbox="allow-scripts" [^>]*srcdoc="([^"]*)"></iframe>', shown)
    assert "&lt;!doctype html&gt;" in frame
    assert "<" not in frame
    assert shown.startswith("<pre>")


def test_a_name_with_markup_stays_text(models):
    hostile = klft.FrozenReference(models[1])
    hostile.model.config._name_or_path = "<img src=x>|`a`\x1b[31m"
    try:
        found = klft.compare(models[0], hostile, TEXTS, tokenizer=tiny.tokenizer())
    finally:
        hostile.model.config._name_or_path = ""
    assert r"&lt;img src=x&gt;\|\`a\`\\x1b\[31m" in found.to_markdown()
    assert "<img" not in found._repr_html_()
    assert "\x1b" not in str(found)


def test_track_sees_every_batch_and_how_many_texts_there_are(models):
    seen = []

    def track(batches, count):
        for batch in batches:
            seen.append((len(batch.sample_ids), count))
            yield batch

    klft.compare(*models, TEXTS, tokenizer=tiny.tokenizer(), batch_size=3, track=track)
    assert seen == [(3, 4), (1, 4)]


def test_without_top_lists_nothing_is_said_of_the_likeliest_token(models):
    found = klft.compare(*models, TEXTS, tokenizer=tiny.tokenizer(), top_k=0)
    assert "same_top1" not in found.estimates
    assert "same_top1" not in found.numbers
    assert found.summary["Same top-1"] == "\N{EN DASH} % of the tokens"


def test_the_readme_shows_the_lines_that_are_printed(comparison):
    readme = (Path(__file__).resolve().parents[2] / "README.md").read_text()
    (shown,) = re.findall(r"^```text\n(.*?)^```", readme, re.M | re.S)
    printed = str(comparison).splitlines()
    assert [line[:17] for line in shown.splitlines()[1:]] == [line[:17] for line in printed[1:]]
    shape = [
        re.sub(r"[\d.,%± ]+", "", line[17:].partition(" against ")[0]) for line in (shown + "\n").splitlines()[3:6]
    ]
    assert shape == [re.sub(r"[\d.,%± ]+", "", line[17:].partition(" against ")[0]) for line in printed[3:6]]
