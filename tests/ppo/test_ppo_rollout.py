"""What is generated, what of it counts, and that what is scored is what was sampled."""

import copy
import gc
import logging

import pytest
import torch
from support import tiny
from support.fused import limits
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GenerationConfig

from klft import FrozenReference
from klft.generation import Completions, sample_completions
from klft.masked import token_logps
from klft.ppo.inputs import check_dataset
from klft.ppo.rollout import score_completions
from klft.ppo.value import attach_value_head, install_hooks
from klft.prompts import completion_mask, encode_prompts, eos_ids, pad
from klft.scoring import Scorer

MODELS = {"llama": tiny.llama, "gpt2": tiny.gpt2}
each_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())


def with_head(model):
    """A value head that says something, so that a wrong value would show."""
    attach_value_head(model)
    install_hooks(model)
    torch.nn.init.normal_(model.v_head.weight)
    return model.eval()


def a_batch(seed=0, rows=6, width=5):
    """Prompts of 1 to 4 tokens and completions of 1 to 5, some ended, some cut off."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [1 + i % 4 for i in range(rows)]
    prompt_ids, prompt_mask = torch.zeros(rows, 4, dtype=torch.long), torch.zeros(rows, 4, dtype=torch.bool)
    for i, n in enumerate(lengths):
        prompt_ids[i, 4 - n :] = torch.randint(3, tiny.VOCABULARY, (n,), generator=generator)
        prompt_mask[i, 4 - n :] = True
    completion_ids = torch.randint(3, tiny.VOCABULARY, (rows, width), generator=generator)
    for i in range(0, rows, 2):
        completion_ids[i, i % width] = tiny.EOS
    mask, _ = completion_mask(completion_ids, [tiny.EOS])
    return Completions(prompt_ids, prompt_mask, completion_ids.masked_fill(~mask, tiny.PAD), mask)


# ---- masks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "ends", "real", "ended"),
    [
        ([2, 9, 9, 9], [2], 1, True),  # at once
        ([9, 2, 9, 9], [2], 2, True),
        ([9, 9, 9, 2], [2], 4, True),  # with the last token
        ([9, 9, 9, 9], [2], 4, False),  # never
        ([9, 2, 2, 2], [2], 2, True),  # the first end counts, the others pad
        ([0, 0, 2, 0], [2], 3, True),  # a pad id that was said is a token like any other
        ([0, 0, 0, 0], [2], 4, False),
        ([9, 7, 2, 9], [2, 7], 2, True),  # several ends: the first of any
        ([9, 2, 7, 9], [2, 7], 2, True),
    ],
)
def test_a_completion_counts_up_to_and_with_its_first_end(row, ends, real, ended):
    mask, terminated = completion_mask(torch.tensor([row]), ends)
    assert mask.tolist() == [[True] * real + [False] * (4 - real)]
    assert terminated.tolist() == [ended]


def test_ends_are_those_of_the_model_and_of_the_tokenizer():
    model = tiny.llama()
    model.generation_config.eos_token_id = [7, 5]
    assert eos_ids(model, tiny.tokenizer()) == [tiny.EOS, 5, 7]
    model.generation_config.eos_token_id = None
    assert eos_ids(model, tiny.tokenizer()) == [tiny.EOS]


def test_any_of_several_ends_stops_a_completion(tmp_path):
    model = tiny.llama()
    model.generation_config.eos_token_id = list(range(4, 14))
    run = tiny.trainer(
        tmp_path, model, kind=tiny.SeenTrainer, max_steps=4, per_device_train_batch_size=8, max_completion_length=8
    )
    run.train()
    ends, stopped_by = {tiny.EOS, *range(4, 14)}, set()
    for micro, _, _ in run.seen:
        for ids, mask in zip(micro.completion_ids.tolist(), micro.mask.tolist(), strict=True):
            first = next((t for t, token in enumerate(ids) if token in ends), None)
            length = len(ids) if first is None else first + 1
            assert mask == [t < length for t in range(len(ids))]
            assert all(token == tiny.PAD for token in ids[length:])
            stopped_by |= {ids[length - 1]} & ends
    assert len(stopped_by) > 3


# ---- padding -----------------------------------------------------------------------------------------------------


def test_padding_with_the_end_token_changes_no_loss_and_no_gradient(tmp_path):
    """The run where pad is eos and the run where it is not, three steps with ended and with cut-off completions."""
    recorders, logs, lengths = [], [], []
    for name in ("<pad>", "<eos>", None):
        recorder = tiny.Recorder()
        run = tiny.trainer(
            tmp_path / str(name), kind=tiny.SeenTrainer, max_steps=3, per_device_train_batch_size=8,
            missing_eos_penalty=0.3, max_completion_length=12,
            given={"processing_class": tiny.tokenizer(pad=name), "callbacks": [recorder]},
        )  # fmt: skip
        run.train()
        recorders.append(recorder)
        logs.append(tiny.step_logs(run))
        lengths.append(torch.cat([micro.mask.sum(-1) for micro, _, _ in run.seen]))
    assert lengths[0].min() < 12 == lengths[0].max()
    for other in (1, 2):
        assert torch.equal(lengths[other], lengths[0])
        assert logs[other] == logs[0]
        for mine, theirs in zip(recorders[0].gradients, recorders[other].gradients, strict=True):
            assert not tiny.unequal(mine, theirs)


@each_model
def test_left_padding_changes_no_log_probability(make):
    model, reference = with_head(make()), make(seed=5).eval()
    scorer = Scorer(FrozenReference(reference), temperature=0.7)
    batch = a_batch()
    scores, values, last = score_completions(scorer, model, model, batch, 4)
    for i in range(len(batch.mask)):
        prompt = batch.prompt_ids[i][batch.prompt_mask[i]]
        said = batch.completion_ids[i][batch.mask[i]]
        ids = torch.cat([prompt, said])[None]
        for network, actual in ((model, scores.logp), (reference, scores.ref_logp)):
            logits = network(ids).logits[0, len(prompt) - 1 : -1] / 0.7
            torch.testing.assert_close(
                actual[i][batch.mask[i]], logits.log_softmax(-1).gather(-1, said[:, None])[:, 0], rtol=0, atol=1e-5
            )
        hidden = model(ids, output_hidden_states=True).hidden_states[-1]
        expected = model.v_head(hidden)[0, len(prompt) - 1 :, 0]
        torch.testing.assert_close(values[i][batch.mask[i]], expected[:-1], rtol=0, atol=1e-5)
        torch.testing.assert_close(last[i], expected[-1], rtol=0, atol=1e-5)


@each_model
def test_scoring_is_the_same_however_many_rows_at_a_time(make):
    model = with_head(make())
    scorer = Scorer(FrozenReference(make(seed=5)), temperature=1.3)
    batch = a_batch()
    whole = score_completions(scorer, model, model, batch, 1)
    parts = score_completions(scorer, model, model, batch, len(batch.mask))
    for name in vars(whole[0]):
        torch.testing.assert_close(getattr(parts[0], name), getattr(whole[0], name), rtol=0, atol=1e-5)
    torch.testing.assert_close(parts[1:], whole[1:], rtol=0, atol=1e-5)


class Widest(TorchDispatchMode):
    """The most rows of any tensor whose last dimension is the vocabulary, but the head's own [16, V]."""

    def __init__(self):
        super().__init__()
        self.rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor) and t.shape[-1:] == (4 * tiny.VOCABULARY,) and t.shape[0] != 16:
                self.rows = max(self.rows, *t.shape[-2:-1], 0)  # blocks' scratch is [8, rows, V]
        return out


@pytest.mark.parametrize("estimator", ["k1", "exact"])
def test_logits_never_exist_whole(estimator, tmp_path, monkeypatch):
    """A tile of 3 tokens is the most there is in scoring and in training; generation has one row per completion."""
    monkeypatch.setitem(*limits(tile_logits=3 * 4 * tiny.VOCABULARY))
    large = {"vocab_size": 4 * tiny.VOCABULARY}
    run = tiny.trainer(
        tmp_path, tiny.llama(**large), given={"reference": tiny.llama(5, **large)}, max_steps=1, kl_estimator=estimator,
        per_device_train_batch_size=2, self_test=False,
    )  # fmt: skip
    with Widest() as seen:
        run.train()
    assert 2 <= seen.rows <= 3
    ids = torch.randint(3, tiny.VOCABULARY, (2, 5))
    with Widest() as seen:
        run.model(ids)
    assert seen.rows == 10


def test_no_score_of_generation_outlives_it(tmp_path):
    """At no time after generating is there a tensor as large as rollout x completion x vocabulary."""
    largest = []

    def look(completions, **_):
        gc.collect()
        sizes = [t.numel() for t in gc.get_objects() if type(t) is torch.Tensor and t.shape[-1:] == (tiny.VOCABULARY,)]
        largest.append(max(sizes, default=0))
        return [0.0] * len(completions)

    run = tiny.trainer(
        tmp_path, reward=look, max_steps=4, num_mini_batches=4, per_device_train_batch_size=4, max_completion_length=8
    )
    run.train()
    assert largest
    assert max(largest) < 16 * 8 * tiny.VOCABULARY
    asked = run.args.generation_config([tiny.EOS], tiny.PAD)
    assert not asked.output_scores
    assert not asked.output_logits
    assert not asked.return_dict_in_generate


# ---- sampling is scoring -----------------------------------------------------------------------------------------


@each_model
@pytest.mark.parametrize("off", [True, False])
def test_the_first_ratio_is_one_at_any_temperature(make, off, tmp_path):
    """Old log-probabilities come from the forward that is trained; dropout, were it left on, would show."""
    run = tiny.trainer(
        tmp_path, make(), kind=tiny.SeenTrainer, max_steps=2, num_mini_batches=2, temperature=0.7,
        disable_dropout=off, gradient_accumulation_steps=2,
    )  # fmt: skip
    run.train()
    first = run.seen[:2]  # the micro-batches of the first minibatch: nothing has been learnt yet
    furthest = max(float((logp - micro.old_logp).exp().sub(1).abs()[micro.mask].max()) for micro, logp, _ in first)
    if off:
        assert furthest < 1e-5
        assert tiny.step_logs(run)[0]["ppo/ratio/mean"] == pytest.approx(1, abs=1e-5)
        assert tiny.step_logs(run)[0]["ppo/ratio_clipped/frac"] == 0
    else:
        assert furthest > 1e-2


@each_model
def test_log_probabilities_are_those_of_the_sampling_temperature(make, tmp_path):
    untouched = make().eval()
    run = tiny.trainer(tmp_path, make(), kind=tiny.SeenTrainer, max_steps=1, temperature=0.7)
    run.train()
    micro = run.seen[0][0]
    for i in range(len(micro.mask)):
        prompt, said = micro.prompt_ids[i][micro.prompt_mask[i]], micro.completion_ids[i][micro.mask[i]]
        logits = untouched(torch.cat([prompt, said])[None]).logits[0, len(prompt) - 1 : -1] / 0.7
        torch.testing.assert_close(micro.old_logp[i][micro.mask[i]], token_logps(logits, said), rtol=0, atol=1e-5)


USERS = [
    {"top_k": 1},
    {"top_p": 0.1},
    {"do_sample": False, "num_beams": 2},
    {"repetition_penalty": 5.0},
    {"temperature": 0.1, "min_p": 0.5},
    {"suppress_tokens": list(range(3, 20))},
    {"min_new_tokens": 1, "forced_eos_token_id": 9},
]


@pytest.mark.parametrize("users", USERS, ids=lambda users: next(iter(users)))
def test_what_is_sampled_is_what_is_scored_whatever_the_model_brings_along(users):
    model = tiny.llama().eval()
    for name, value in users.items():
        setattr(model.generation_config, name, value)
    before, kept = model.generation_config, copy.deepcopy(model.generation_config)
    n = 6000
    prompt = torch.tensor([[5, 9, 9]]).expand(n, -1)
    wanted = tiny.config("unused", temperature=0.8, max_completion_length=1).generation_config([tiny.EOS], tiny.PAD)
    torch.manual_seed(0)
    batch, _ = sample_completions(model, prompt, torch.ones_like(prompt).bool(), wanted, model.config.vocab_size)
    scored = (model(prompt[:1]).logits[0, -1] / 0.8).softmax(-1)
    sampled = batch.completion_ids[:, 0].bincount(minlength=tiny.VOCABULARY) / n
    # The distance expected of so many honest draws, by their standard errors; a wrong distribution is 0.3 and more off.
    assert (sampled - scored).abs().sum() / 2 < (scored * (1 - scored) / n).sqrt().sum()
    assert model.generation_config is before
    assert model.generation_config.to_dict() == kept.to_dict()


def test_training_leaves_the_models_generation_config_alone(tmp_path):
    model = tiny.llama()
    model.generation_config.top_k, model.generation_config.top_p = 1, 0.3
    model.generation_config.repetition_penalty = 1.7
    model.generation_config.eos_token_id = [tiny.EOS, 9]
    kept = copy.deepcopy(model.generation_config)
    said = []

    def listen(completion_ids, **_):
        said.append([tuple(ids) for ids in completion_ids])
        return [0.0] * len(completion_ids)

    same = tiny.prompts(16).map(lambda _: {"prompt": "w1 w2"})
    run = tiny.trainer(tmp_path, model, listen, same, max_steps=1, per_device_train_batch_size=16, temperature=2.0)
    run.train()
    assert model.generation_config.to_dict() == kept.to_dict()
    assert len(set(said[0])) > 8, "the model's own top_k=1 made sampling greedy"


def test_what_follows_the_end_changes_nothing(tmp_path):
    """Ids behind the mask are replaced: the same scores, the same loss, the same gradients, bit for bit."""
    run = tiny.trainer(
        tmp_path, kind=tiny.SeenTrainer, max_steps=1, per_device_train_batch_size=8, max_completion_length=12
    )
    run.train()
    rollout = run.seen[0][0]
    assert not rollout.mask.all()
    noisy = copy.copy(rollout)
    noise = torch.randint(3, tiny.VOCABULARY, rollout.mask.shape, generator=torch.Generator().manual_seed(0))
    noisy.completion_ids = torch.where(rollout.mask, rollout.completion_ids, noise)
    results = []
    for batch in (rollout, noisy):
        run.model.zero_grad()
        loss = run.compute_loss(run.model, {"rollout": batch, "tokens": 10.0})
        loss.backward()
        results.append((loss.detach(), {n: p.grad.clone() for n, p in run.model.named_parameters()}))
    assert torch.equal(results[0][0], results[1][0])
    assert not tiny.unequal(results[0][1], results[1][1])
    scored = [score_completions(run.scorer, run.model, run.model, batch, 4) for batch in (rollout, noisy)]
    for name in [name for name, value in vars(scored[0][0]).items() if value is not None]:
        clean, dirty = (getattr(s[0], name)[rollout.mask] for s in scored)
        assert torch.equal(clean, dirty), name


# ---- prompts -----------------------------------------------------------------------------------------------------


def test_a_long_prompt_keeps_its_end():
    ids, mask = pad(encode_prompts(tiny.tokenizer(), ["w1 w2 w3 w4 w5", "w7"], 3), tiny.PAD)
    assert ids.tolist() == [[6, 7, 8], [tiny.PAD, tiny.PAD, 10]]
    assert mask.tolist() == [[True] * 3, [False, False, True]]


def test_without_a_limit_a_prompt_is_whole():
    ids, _ = pad(encode_prompts(tiny.tokenizer(), ["w1 w2 w3 w4 w5"]), tiny.PAD)
    assert ids.tolist() == [[4, 5, 6, 7, 8]]


def test_a_prompt_without_a_token_is_an_error():
    with pytest.raises(ValueError, match="no tokens"):
        encode_prompts(tiny.tokenizer(), ["w1", " "])


def conversation(i):
    return [{"role": "user", "content": f"w{i} w{i + 1}"}]


def test_a_conversation_has_one_bos():
    tokenizer = tiny.tokenizer(adds_bos=True, chat=True)
    ids, mask = pad(encode_prompts(tokenizer, [conversation(1), "w1 w2"]), tiny.PAD)
    assert ids[0][mask[0]].tolist() == [tiny.BOS, 30, 4, 5, 31]  # <bos> w27 w1 w2 w28
    assert ids[1][mask[1]].tolist() == [tiny.BOS, 4, 5]


def test_reward_functions_see_messages_where_the_prompt_was_messages(tmp_path):
    calls = []

    def look(prompts, completions, completion_ids, topic, **_):
        calls.append((prompts, completions, completion_ids, topic))
        return [0.0] * len(prompts)

    data = tiny.Dataset.from_dict({"prompt": [conversation(i) for i in range(8)], "topic": list("abcdefgh")})
    tokenizer = tiny.tokenizer(adds_bos=True, chat=True)
    given = {"processing_class": tokenizer}
    tiny.trainer(tmp_path, None, look, data, given=given, max_steps=2).train()
    for prompts, completions, ids, topics in calls:
        for prompt, completion, row, topic in zip(prompts, completions, ids, topics, strict=True):
            i = "abcdefgh".index(topic)
            assert prompt == conversation(i)
            text = tokenizer.decode([i for i in row if i not in (tiny.PAD, tiny.BOS, tiny.EOS)])
            assert completion == [{"role": "assistant", "content": text}]


def test_empty_prompts_are_dropped_and_counted(caplog):
    data = tiny.Dataset.from_dict({"prompt": ["w1", "", "w2", None, "w3"], "n": [0, 1, 2, 3, 4]})
    with caplog.at_level(logging.WARNING):
        kept = check_dataset(data, "train_dataset")
    assert kept["n"] == [0, 2, 4]
    assert "dropped 2 empty prompt(s) of 5" in caplog.text
    talk = tiny.Dataset.from_dict({"prompt": [conversation(1), [], conversation(2)]})
    assert len(check_dataset(talk, "train_dataset")) == 2


# ---- modes -------------------------------------------------------------------------------------------------------


def modes(model):
    return {name: module.training for name, module in model.named_modules()}


def test_ids_that_only_the_policy_has_are_never_sampled():
    model = tiny.llama()
    ids = torch.full((64, 1), 5)
    wanted = tiny.config("unused", max_completion_length=4).generation_config([tiny.EOS], tiny.PAD)
    batch, _ = sample_completions(model, ids, torch.ones_like(ids).bool(), wanted, 8)
    assert batch.completion_ids.max() < 8


def test_a_nan_in_generation_is_placed():
    model = tiny.llama()
    torch.nn.init.constant_(model.lm_head.weight, float("nan"))
    ids = torch.full((2, 3), 5)
    wanted = tiny.config("unused").generation_config([tiny.EOS], tiny.PAD)
    with pytest.raises(ValueError, match=r"not finite for sample 0, position 3 \(2 of 2"):
        sample_completions(model, ids, torch.ones_like(ids).bool(), wanted, tiny.VOCABULARY)


@pytest.mark.parametrize("fails", [False, True])
def test_every_module_gets_its_mode_back(fails):
    model = tiny.llama().train()
    model.model.layers[1].eval()
    model.model.layers[1].mlp.train()
    before, own = modes(model), model.generation_config
    seen = []
    model.model.layers[0].register_forward_hook(
        lambda *_: seen.append((any(modes(model).values()), torch.is_grad_enabled()))
    )
    prompt = torch.tensor([[5, 6]])

    def go(ids):
        wanted = GenerationConfig(max_new_tokens=2, do_sample=True, eos_token_id=[2], pad_token_id=0)
        return sample_completions(model, ids, torch.ones_like(ids).bool(), wanted, model.config.vocab_size)

    if fails:
        with pytest.raises(IndexError):
            go(prompt + tiny.VOCABULARY)  # ids that the embedding does not have
    else:
        go(prompt)
        assert set(seen) == {(False, False)}
    assert modes(model) == before
    assert model.generation_config is own
    assert torch.is_grad_enabled()


def test_gradient_checkpointing_is_out_of_the_way_of_generation_and_on_in_training(tmp_path):
    recorders = []
    for checkpointing in (False, True):
        recorder = tiny.Recorder()
        run = tiny.trainer(
            tmp_path / str(checkpointing), max_steps=2, gradient_checkpointing=checkpointing,
            given={"callbacks": [recorder]},
        )  # fmt: skip
        run.train()
        assert run.model.is_gradient_checkpointing is checkpointing
        recorders.append(recorder)
    for plain, checkpointed in zip(*(r.gradients for r in recorders), strict=True):
        for name, gradient in plain.items():
            torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-5, atol=1e-7)
