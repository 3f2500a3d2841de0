"""TokenKLLog.add(kl): what KLPenalty.measure gave goes into the table in one line."""

import pytest
import torch
from support import tiny

from klft import KLPenalty, TokenKLLog
from klft.diagnostics import read_records


def measured(**options):
    """TokenKL of two texts, left-padded, whose last three tokens were generated; and their attention mask."""
    ids = torch.randint(3, tiny.VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(0))
    attention = (torch.arange(7) >= torch.tensor([[0], [2]])).long()
    completion = (torch.arange(7) >= 4).expand(2, -1)
    penalty = KLPenalty(tiny.llama(5), **options)
    return penalty.measure(tiny.llama(0).eval()(ids, attention).logits, ids, attention, completion), attention


def rows(folder):
    return read_records(folder)[0].to_pylist()


@pytest.mark.parametrize("rule", [None, lambda ids, mask, scores: torch.arange(7.0).expand_as(scores.logp)])
def test_one_argument_is_all_of_them(tmp_path, rule):
    kl, _ = measured(token_rule=rule)
    with TokenKLLog(tmp_path / "short", tiny.tokenizer()) as log:
        log.add(kl, step=3)
        short = log.scalars()
    with TokenKLLog(tmp_path / "long", tiny.tokenizer()) as log:
        log.add(kl.scores, kl.token_ids, kl.mask, step=3, weights=kl.weight)
        assert log.scalars() == short
    assert rows(tmp_path / "short") == rows(tmp_path / "long")
    assert len(rows(tmp_path / "short")) == 6
    assert {row["step"] for row in rows(tmp_path / "short")} == {3}


def test_with_the_attention_mask_the_prompt_is_shown_and_not_counted(tmp_path):
    kl, attention = measured()
    counted = {}
    for name, more in {"alone": {}, "whole": {"mask": attention}}.items():
        with TokenKLLog(tmp_path / name, tiny.tokenizer()) as log:
            log.add(kl, **more)
            counted[name] = log.scalars()
    assert counted["alone"] == counted["whole"]
    written = rows(tmp_path / "whole")
    assert len(written) == 12
    assert [row for row in written if not row["is_prompt"]] == rows(tmp_path / "alone")
    assert {row["logp"] for row in written if row["is_prompt"]} == {None}


def test_what_is_said_beside_it_goes_over_it(tmp_path):
    kl, attention = measured()
    said = {"mask": attention, "scored": attention != 0, "is_prompt": torch.zeros_like(kl.mask)}
    with TokenKLLog(tmp_path, tiny.tokenizer()) as log:
        log.add(kl, token_ids=kl.token_ids + 1, weights=torch.full((2, 7), 2.0), **said)
    written = rows(tmp_path)
    assert not any(row["is_prompt"] or row["logp"] is None for row in written)
    assert {row["weight"] for row in written} == {2.0}
    assert [row["token_id"] for row in written[:7]] == (kl.token_ids[0] + 1).tolist()


def test_scores_alone_say_what_is_missing(tmp_path):
    kl, _ = measured()
    log = TokenKLLog(tmp_path, tiny.tokenizer())
    with pytest.raises(ValueError, match=r"token_ids and mask .* are missing"):
        log.add(kl.scores)
    with pytest.raises(ValueError, match=r"token_ids and mask .* are missing"):
        log.add(KLPenalty(tiny.llama(5)).measure_scores(kl.scores, kl.mask))
    assert log.scalars() == {}
