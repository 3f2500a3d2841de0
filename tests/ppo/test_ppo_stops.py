"""Stop strings end a completion where they are said; settings of generate, processors and columns that do not fit."""

import logging

import pytest
import torch
from support import tiny
from transformers import GenerationConfig, ProcessorMixin

from klft.generation import sample_completions
from klft.prompts import pad


class Processor(ProcessorMixin):
    attributes = ("tokenizer",)
    tokenizer_class = "PreTrainedTokenizerFast"

    def __init__(self, tokenizer):
        super().__init__(tokenizer)


class Said(torch.nn.Module):
    """A policy that says what it is told, whatever is asked."""

    def __init__(self, said):
        super().__init__()
        self.model, self.said, self.at = tiny.llama(), said, 0

    def script(self, input_ids, scores):
        scores = torch.full_like(scores, -torch.inf)
        column = torch.tensor([row[self.at] for row in self.said])
        self.at += 1
        return scores.scatter(1, column[:, None], 0.0)


@pytest.mark.parametrize("pad_with", [tiny.PAD, tiny.EOS, 9])
def test_a_completion_ends_with_its_stop_string(pad_with, monkeypatch):
    """Whatever id fills up what follows: the mask comes from where the string was said."""
    words = lambda *numbers: [n + 3 for n in numbers]
    said = [words(1, 5, 6, 7, 8), words(5, 1, 6, 2, 2), [*words(1, 2), tiny.EOS, *words(3, 3)], words(1, 2, 3, 4, 5)]
    policy = Said(said)
    monkeypatch.setattr("klft.generation._SharedVocabulary", lambda _: policy.script)
    config = GenerationConfig(
        max_new_tokens=5,
        do_sample=True,
        eos_token_id=[tiny.EOS],
        pad_token_id=pad_with,
        stop_strings=["w5 w6", "w2 w2"],
    )
    ids, mask = pad([[4, 5, 6], [8, 9], [4], [5, 6]], 0)  # the second prompt ends with w5 w6
    completions, terminated = sample_completions(policy.model, ids, mask, config, tiny.VOCABULARY, tiny.tokenizer())
    assert completions.mask.sum(1).tolist() == [3, 5, 3, 5]
    assert terminated.tolist() == [True, True, True, False]
    assert completions.completion_ids[0].tolist()[3:] == [pad_with] * 2
    assert config.stop_strings == ["w5 w6", "w2 w2"]


def test_a_run_with_stop_strings(tmp_path):
    kwargs = {"stop_strings": "w5"}
    run = tiny.trainer(tmp_path, max_steps=2, generation_kwargs=kwargs, missing_eos_penalty=1.0, kind=tiny.SeenTrainer)
    run.train()
    stopped = 0
    for micro, _, _ in run.seen:
        for ids, mask in zip(micro.completion_ids, micro.mask, strict=True):
            row = ids[mask].tolist()
            assert 5 + 3 not in row[:-1]
            stopped += row[-1] == 5 + 3
    assert stopped > 0
    assert tiny.step_logs(run)[0]["ppo/ratio/mean"] == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("name", ["return_dict_in_generate", "output_scores", "output_logits", "output_hidden_states"])
def test_settings_that_change_what_generate_returns(tmp_path, name):
    with pytest.raises(ValueError, match=rf"generation_kwargs cannot be used: {name} changes what generate returns"):
        tiny.config(tmp_path, generation_kwargs={name: True})


def test_a_processor_has_a_tokenizer(tmp_path):
    run = tiny.trainer(tmp_path, given={"processing_class": Processor(tiny.tokenizer())}, max_steps=1)
    run.train()
    assert run.processing_class.eos_token_id == tiny.EOS
    with pytest.raises(TypeError, match=r"processing_class: expected a tokenizer.*got str.*AutoTokenizer"):
        tiny.trainer(tmp_path, given={"processing_class": "gpt2"})


def test_a_logged_column_of_another_length_is_left_out(tmp_path, caplog):
    def reward(completions, log_extra, **_):
        log_extra("why", ["x"])
        log_extra("because", completions)
        return [0.0] * len(completions)

    logging.getLogger("klft").addHandler(caplog.handler)
    try:
        run = tiny.trainer(tmp_path, reward=reward, log_completions=True, max_steps=1)
        run.train()
    finally:
        logging.getLogger("klft").removeHandler(caplog.handler)
    said = {r.getMessage() for r in caplog.records if "log_extra('why', ...)" in r.getMessage()}
    assert len(said) == 1
    assert "1 value(s) for 4 completions" in said.pop()
    assert set(run.ppo.completions[0]) == {"prompt", "completion", "score", "sequence_kl", "because"}
