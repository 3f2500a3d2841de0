"""TokenKLCallback in a real Trainer and in TRL's: what is logged, written, and that training does not notice.

Run as a script, this file is what each of two processes does.
"""

import copy
import sys
from pathlib import Path

import conftest  # noqa: F401 - also for the script
import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from support import oracles, tiny
from support.processes import launch, leave
from transformers import DataCollatorForLanguageModeling, Trainer, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer

from klft.diagnostics import Statistics, TokenKLCallback, read_records, scalars
from klft.references import AdapterReference, FrozenReference

PROBES = ["w1 w2", "w3 w4 w5", {"prompt": "w6"}, {"prompt": "w1 w2", "completion": " w3 w4"}]
PROMPTS = {0: [4, 5], 1: [6, 7, 8], 2: [9]}


class Tracker(TrainerCallback):
    """As TensorBoard's or W&B's: added when the Trainer is made, sees what is logged."""

    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append({"step": state.global_step, **logs})


def texts():
    return Dataset.from_dict(tiny.tokenizer()(list(tiny.prompts(24)["prompt"])))


def arguments(folder, **changed):
    return {
        "output_dir": str(folder), "max_steps": 5, "per_device_train_batch_size": 4, "learning_rate": 3e-2,
        "report_to": "none", "save_strategy": "no", "logging_steps": 2, "use_cpu": True, "disable_tqdm": True,
    } | changed  # fmt: skip


def trainer(folder, model=None, tracker=None, **changed):
    return Trainer(
        model=tiny.llama() if model is None else model,
        args=TrainingArguments(**arguments(folder, **changed)),
        train_dataset=texts(),
        data_collator=DataCollatorForLanguageModeling(tiny.tokenizer(), mlm=False),
        processing_class=tiny.tokenizer(),
        callbacks=[] if tracker is None else [tracker],
    )


def watched(folder, reference, probes=PROBES, *, through=True, options=None, **given):
    """A trained Trainer that has the callback, and what its tracker saw."""
    tracker = Tracker()
    run = trainer(folder, tracker=tracker, **given)
    options = {"every": 2, "max_new_tokens": 6, "max_length": 32, "batch_size": 3} | (options or {})
    run.add_callback(TokenKLCallback(reference, probes, trainer=run if through else None, **options))
    run.train()
    return run, tracker.seen


def kl_logs(logs):
    return {log["step"]: log for log in logs if "kl/reverse/mean" in log}


def expect_reproduced(folder, logged):
    """Sums over the Parquet's rows are the logged scalars."""
    table, metadata = read_records(folder)
    rows = [row for row in table.to_pylist() if not row["is_prompt"] and row["logp"] is not None]
    assert sorted({row["step"] for row in rows}) == sorted(logged)
    for step, log in logged.items():
        mine = [row for row in rows if row["step"] == step]
        assert log["kl/tokens/count"] == len(mine)
        for name in ("reverse", "forward"):
            kls = [row[f"{name}_kl"] for row in mine]
            assert log[f"kl/{name}/mean"] == pytest.approx(sum(kls) / len(kls), rel=1e-6)
            assert log[f"kl/{name}/max"] == pytest.approx(max(kls), rel=1e-6)
        assert not {"kl/k1/mean", "kl/k2/mean", "kl/k3/mean"} & set(log), "given texts and greedy ones are no samples"
        assert log["kl/sequence/reverse/mean"] == pytest.approx(sum(r["reverse_kl"] for r in mine) / 4, rel=1e-6)
    return table, metadata


def sequences(table, step):
    """sample_id -> rows of its scored tokens: those from position 1 on."""
    found = {}
    for row in table.to_pylist():
        if row["step"] == step and (row["position"] or row["logp"] is not None):
            found.setdefault(row["sample_id"], []).append(row)
    return {number: sorted(rows, key=lambda row: row["position"]) for number, rows in found.items()}


@pytest.fixture(scope="module")
def run_and_seen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    run, seen = watched(folder, tiny.gpt2(3))
    return folder, run, seen


def test_scalars_reach_a_tracker_that_was_there_before(run_and_seen):
    folder, run, seen = run_and_seen
    logged = kl_logs(seen)
    assert sorted(logged) == [2, 4, 5]  # every second, and the last
    assert kl_logs(run.state.log_history) == {
        step: {key: value for key, value in log.items() if not key.startswith("eval")} for step, log in logged.items()
    }
    assert all(type(value) in (int, float) for log in logged.values() for value in log.values())
    assert logged[2]["kl/reverse/mean"] != logged[5]["kl/reverse/mean"]
    table, metadata = expect_reproduced(folder, logged)
    assert metadata.vocabulary[4] == "w1"
    assert all(row["rank"] == 0 for row in table.to_pylist())
    stats = Statistics.of(read_records(folder / "kl" / "tokens_000004-r0.parquet")[0])
    found = scalars(stats)
    assert {name: logged[4][name] for name in found} == pytest.approx(found, rel=1e-6)


def test_the_trainers_own_logs_stay(run_and_seen):
    _, _, seen = run_and_seen
    assert [log["step"] for log in seen if "loss" in log] == [2, 4]
    assert "train_runtime" in seen[-1]


def test_the_last_rows_are_what_the_trained_model_says(run_and_seen):
    folder, run, _ = run_and_seen
    found = sequences(read_records(folder)[0], 5)
    policy, reference = copy.deepcopy(run.model).double().eval(), tiny.gpt2(3).double().eval()
    assert sorted(found) == [0, 1, 2, 3]
    for number, rows in found.items():
        prompt = PROMPTS.get(number, [4, 5])
        ids = prompt[:1] + [row["token_id"] for row in rows]
        assert [row["is_prompt"] for row in rows] == [t < len(prompt) for t in range(1, len(ids))]
        with torch.no_grad():
            p, q = (each(input_ids=torch.tensor([ids])).logits[0, :-1] for each in (policy, reference))
        oracle = oracles.token_scores(p, q, torch.tensor(ids[1:]))
        for name in ("logp", "ref_logp", "entropy", "ref_entropy", "reverse_kl", "forward_kl"):
            values = torch.tensor([row[name] for row in rows], dtype=torch.float64)
            torch.testing.assert_close(values, getattr(oracle, name), rtol=1e-5, atol=1e-5)
        assert rows[0]["top_ids"] == p[0].topk(5).indices.tolist()
        written = ids[len(prompt) :]
        if number == 3:
            assert written == [6, 7]
        else:  # greedy, up to and including the first end
            assert written == p[len(prompt) - 1 :].argmax(-1).tolist()
            assert len(written) == 6 or written.index(tiny.EOS) == len(written) - 1


def test_completions_run_up_to_and_including_their_end(tmp_path):
    model, found = tiny.llama().eval(), {}
    prompts = [f"w{a} w{b}" for a in range(26) for b in range(26)]
    rows = torch.tensor(tiny.tokenizer()(prompts)["input_ids"])
    with torch.no_grad():
        while rows.shape[1] < 8:
            rows = torch.cat([rows, model(input_ids=rows).logits[:, -1].argmax(-1, keepdim=True)], 1)
    for prompt, ids in zip(prompts, rows.tolist(), strict=True):  # one for each length
        ids = ids[: [*ids, tiny.EOS].index(tiny.EOS) + 1]
        found.setdefault(len(ids), (prompt, ids))
    assert set(found) == {3, 4, 5, 6, 7, 8}
    watched(tmp_path, tiny.llama(5), [prompt for prompt, _ in found.values()], learning_rate=0.0, max_steps=1)
    rows = sequences(read_records(tmp_path)[0], 1)
    for number, (_, ids) in enumerate(found.values()):
        assert [row["token_id"] for row in rows[number]] == ids[1:]


def test_the_page_is_there_at_the_end(run_and_seen):
    folder, _, _ = run_and_seen
    assert f"<title>{folder}, steps " in (folder / "kl" / "report.html").read_text()


def test_training_does_not_notice(run_and_seen, tmp_path):
    _, run, seen = run_and_seen
    tracker = Tracker()
    alone = trainer(tmp_path, tracker=tracker)
    alone.train()
    assert not tiny.unequal(tiny.parameters(alone.model), tiny.parameters(run.model))
    losses = [(log["step"], log["loss"], log["grad_norm"]) for log in tracker.seen if "loss" in log]
    assert losses == [(log["step"], log["loss"], log["grad_norm"]) for log in seen if "loss" in log]
    assert run.model.training == alone.model.training


def test_without_the_trainer_numbers_go_to_the_history_and_to_callbacks_added_later(tmp_path, caplog):
    later, earlier = Tracker(), Tracker()
    run = trainer(tmp_path / "out", tracker=earlier)
    given = {"max_new_tokens": 6, "output_dir": str(tmp_path / "else"), "prefix": "probe/"}
    callback = TokenKLCallback(tiny.llama(5), PROBES, every=2, **given)
    run.add_callback(callback)
    run.add_callback(later)
    run.args.report_to = ["tensorboard"]
    run.train()
    assert "tensorboard will not see kl/...; pass trainer=trainer" in caplog.text
    history = [log for log in run.state.log_history if "probe/kl/reverse/mean" in log]
    assert [log["step"] for log in history] == [2, 4, 5]
    assert not any("probe/kl/reverse/mean" in log for log in earlier.seen)
    told = [log for log in later.seen if "probe/kl/reverse/mean" in log]
    assert [log["step"] for log in told] == [2, 4, 5]
    for log, entry in zip(told, history, strict=True):
        assert log["probe/kl/forward/mean"] == entry["probe/kl/forward/mean"]
    assert (tmp_path / "else" / "kl" / "report.html").exists()
    assert not (tmp_path / "out" / "kl").exists()


def test_a_run_that_another_callback_stops_is_measured_at_its_end(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    run = trainer(tmp_path)
    run.add_callback(TokenKLCallback(tiny.llama(5), PROBES, every=100, max_new_tokens=6, trainer=run))
    run.add_callback(Stop())
    run.train()
    assert sorted(kl_logs(run.state.log_history)) == [3]
    assert (tmp_path / "kl" / "report.html").exists()


def test_a_run_goes_on_where_it_was_cut(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 3.0}
    watched(tmp_path, tiny.llama(5), max_steps=3, **options)
    assert sorted(set(read_records(tmp_path)[0]["step"].to_pylist())) == [2, 3]
    run = trainer(tmp_path, max_steps=6, **options)
    run.add_callback(TokenKLCallback(tiny.llama(5), PROBES, every=2, max_new_tokens=6, max_length=32, trainer=run))
    run.train(resume_from_checkpoint=True)
    assert sorted(set(read_records(tmp_path)[0]["step"].to_pylist())) == [2, 3, 4, 6]
    assert sorted(kl_logs(run.state.log_history)) == [2, 3, 4, 6]


def test_a_second_run_does_not_write_among_the_tables_of_the_first(tmp_path):
    run, _ = watched(tmp_path, tiny.llama(5))
    run.train()  # the same trainer's second time is no other run
    before = {p.name: p.read_bytes() for p in (tmp_path / "kl").iterdir()}
    with pytest.raises(ValueError, match=r"holds another run: kl/tokens_000002-r0\.parquet") as caught:
        watched(tmp_path, tiny.llama(5), max_steps=3)
    assert "overwrite=True" in str(caught.value)
    assert {p.name: p.read_bytes() for p in (tmp_path / "kl").iterdir()} == before
    watched(tmp_path, tiny.llama(5), max_steps=3, options={"overwrite": True})
    assert sorted(set(read_records(tmp_path)[0]["step"].to_pylist())) == [2, 3]


# --- in TRL's trainers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["adapter off", "another model"])
def test_in_an_sft_trainer_with_an_adapter(tmp_path, given):
    chat = [{"role": "user", "content": "w1 w2"}]
    probes = [chat, {"messages": [*chat, {"role": "assistant", "content": "w3"}]}, "w4 w5", {"text": "w1 w2 w3"}]
    tracker = Tracker()
    run = SFTTrainer(
        model=tiny.llama(),
        args=SFTConfig(
            **arguments(tmp_path, gradient_checkpointing=True), max_length=16, eos_token="<eos>", bf16=False
        ),
        train_dataset=Dataset.from_dict({"text": list(tiny.prompts(24)["prompt"])}),
        processing_class=tiny.tokenizer(chat=True),
        peft_config=tiny.lora(),
        callbacks=[tracker],
    )
    reference = None if given == "adapter off" else tiny.llama(5)
    run.add_callback(TokenKLCallback(reference, probes, 2, max_new_tokens=6, max_length=32, trainer=run))
    run.train()
    logged = kl_logs(tracker.seen)
    assert sorted(logged) == [2, 4, 5]
    table, metadata = expect_reproduced(tmp_path, logged)
    assert logged[5]["kl/reverse/mean"] > 1e-4
    assert metadata.reference.endswith("without its adapter") == (given == "adapter off")
    for log in tracker.seen:  # TRL's averages belong to its own logs
        assert ("mean_token_accuracy" in log) == ("kl/reverse/mean" not in log)
    policy = get_peft_model(tiny.llama(), tiny.lora())  # not a copy: TRL's forward would be that of the original
    policy.load_state_dict(run.model.state_dict())
    policy.double().eval()
    base = tiny.llama(0 if reference is None else 5).double().eval()
    for number, rows in sequences(table, 5).items():
        first = {0: tiny.BOS, 1: tiny.BOS, 2: 7, 3: 4}[number]
        ids = [first] + [row["token_id"] for row in rows]
        with torch.no_grad():
            p, q = (each(input_ids=torch.tensor([ids])).logits[0, :-1] for each in (policy, base))
        oracle = oracles.token_scores(p, q, torch.tensor(ids[1:]))
        values = torch.tensor([row["reverse_kl"] for row in rows], dtype=torch.float64)
        torch.testing.assert_close(values, oracle.reverse_kl, rtol=1e-5, atol=1e-5)
    assert [row["is_prompt"] for row in sequences(table, 5)[1]] == [True] * 4 + [False]


@pytest.mark.parametrize("precision", [{"bf16": True}, {"bf16": False}])
def test_a_policy_that_does_not_move_has_a_kl_of_zero(tmp_path, precision):
    run, seen = watched(tmp_path, tiny.llama(), learning_rate=0.0, max_steps=2, **precision)
    assert kl_logs(seen)[2]["kl/reverse/max"] == kl_logs(seen)[2]["kl/forward/max"] == 0.0
    assert run.args.bf16 == precision["bf16"]


def test_in_klfts_own_trainer(tmp_path):
    run = tiny.trainer(tmp_path, max_steps=2)
    run.add_callback(TokenKLCallback(tiny.llama(5), ["w1 w2"], 1, max_new_tokens=6, trainer=run, prefix="probe/"))
    run.train()
    told = [log for log in run.state.log_history if "probe/kl/reverse/mean" in log]
    assert [log["step"] for log in told] == [1, 2]
    assert not any("loss" in log for log in told)
    assert all("kl/reverse/mean" in log for log in run.state.log_history if "loss" in log)


# --- the policy's greedy continuation, whatever generation_config the model brings along -----------------------------


def greedy(model, ids, shared, most=6):
    """The likeliest shared id, one after the other, up to the first end."""
    said = []
    while len(said) < most and (not said or said[-1] != tiny.EOS):
        with torch.no_grad():
            logits = model(torch.tensor([ids + said])).logits[0, -1, :shared]
        said.append(int(logits.argmax()))
    return said


OWN = [
    {"repetition_penalty": 9.0}, {"suppress_tokens": list(range(3, 25))}, {"no_repeat_ngram_size": 1},
    {"forced_eos_token_id": tiny.EOS}, {"min_new_tokens": 6}, {"bad_words_ids": [[i] for i in range(3, 25)]},
    {"num_beams": 3, "length_penalty": -9.0},
]  # fmt: skip


@pytest.mark.parametrize("own", OWN, ids=lambda own: next(iter(own)))
def test_the_models_own_generation_config_has_no_say(own, tmp_path):
    model = tiny.padded(attention_dropout=0.0)
    for name, value in own.items():
        setattr(model.generation_config, name, value)
    kept = copy.deepcopy(model.generation_config)
    expected = {i: greedy(model.eval(), PROMPTS[i], shared=32) for i in PROMPTS}
    watched(tmp_path, tiny.llama(5), PROBES[:3], model=model, max_steps=1, learning_rate=0.0)
    rows = sequences(read_records(tmp_path)[0], 1)
    said = {i: [r["token_id"] for r in rows[i] if not r["is_prompt"]] for i in rows}
    assert said == expected
    assert model.generation_config.to_dict() == kept.to_dict()


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"every": 0}, "every=0"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"max_new_tokens": 32, "max_length": 32}, "max_length=32"),
        ({"probe_prompts": []}, "at least one prompt"),
        ({"probe_prompts": "w1 w2"}, "a list of"),
    ],
)
def test_arguments_are_checked(changed, said):
    with pytest.raises(ValueError, match=said):
        TokenKLCallback(**{"reference": None, "probe_prompts": ["w1"]} | changed)


def shared():
    model = tiny.llama()
    other = tiny.llama(5)
    other.lm_head = model.lm_head
    return model, other


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (lambda: (tiny.llama(), None, PROBES), "has no PEFT adapter"),
        (lambda: (tiny.llama(), tiny.critic(), PROBES), "expected a causal language model"),
        (lambda: (tiny.llama(), tiny.llama(5, vocab_size=31), PROBES), "the reference's head has 31 rows"),
        (lambda: (*shared(), PROBES), "shares the policy's memory"),
        (lambda: (tiny.llama(), tiny.llama(5), [{"prompt": "w1", "completion": ""}]), "has a token to score"),
        (lambda: (tiny.llama(), tiny.llama(5), ["w1", ""]), "the prompt '' has no tokens"),
        (lambda: (tiny.llama(), tiny.llama(5), ["w1"]), "texts have up to 65 tokens, the model 64 positions"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_training(tmp_path, given, said):
    model, reference, probes = given()
    run = trainer(tmp_path, model)
    run.add_callback(TokenKLCallback(reference, probes, trainer=run))
    with pytest.raises((ValueError, TypeError), match=said):
        run.train()
    assert run.state.global_step == 0


def test_a_long_prompt_keeps_its_end(tmp_path):
    reference = FrozenReference(tiny.llama(5))
    long = " ".join(f"w{i}" for i in range(26))
    watched(tmp_path, reference, [long], max_steps=1, options={"max_length": 16})
    rows = sequences(read_records(tmp_path)[0], 1)[0]
    assert [row["token_id"] for row in rows if row["is_prompt"]] == list(range(29 - 9, 29))


def test_an_adapter_reference_of_trained_base_weights_is_refused(tmp_path):
    model = get_peft_model(tiny.llama(), tiny.lora())
    model.base_model.model.lm_head.weight.requires_grad_()
    run = trainer(tmp_path, model)
    run.add_callback(TokenKLCallback(AdapterReference(model), PROBES, trainer=run))
    with pytest.raises(ValueError, match="belong to the base model"):
        run.train()


# --- two processes ---------------------------------------------------------------------------------------------------


def worker(folder):
    run, _ = watched(folder, tiny.llama(5), model=tiny.llama(attention_dropout=0.0), per_device_train_batch_size=2)
    assert run.args.world_size == 2


@pytest.mark.slow
def test_two_processes_log_what_one_logs(tmp_path):
    done = launch(__file__, tmp_path / "two", timeout=200)
    assert done.returncode == 0, done.stderr[-6000:]
    watched(tmp_path / "one", tiny.llama(5), model=tiny.llama(attention_dropout=0.0))
    one, two = (read_records(tmp_path / name)[0] for name in ("one", "two"))
    assert sorted(file.name for file in (tmp_path / "two" / "kl").iterdir()) == [
        "report.html", "tokens_000002-r0.parquet", "tokens_000004-r0.parquet", "tokens_000005-r0.parquet",
    ]  # fmt: skip
    for name in ("step", "sample_id", "position", "token_id"):
        assert one[name].to_pylist() == two[name].to_pylist()
    for name in ("reverse_kl", "forward_kl"):
        alone, together = (table[name].to_pylist() for table in (one, two))
        assert [kl is None for kl in alone] == [kl is None for kl in together]  # a text's first token has none
        assert [kl or 0.0 for kl in alone] == pytest.approx([kl or 0.0 for kl in together], rel=1e-3, abs=1e-4)


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
    leave()
