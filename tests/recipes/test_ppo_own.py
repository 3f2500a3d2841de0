"""recipes/ppo.py: from a saved model, prompts in a file and rewards by name to a policy and the next command."""

import json
import re
import runpy
import shlex
import statistics
import sys

import pytest
import yaml
from safetensors.torch import load_file
from support import tiny
from support.processes import launch
from support.recipes import RECIPES, error_of

from klft.writing import two_digits

REWARD = """
def w5(prompts, completions, answer, **_):
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [text.split().count("w5") / 8 for text in texts]


def short(completions, completion_ids, **_):
    return [-len(ids) / 4 for ids in completion_ids]


def strict(prompts, completions):
    return [0.0] * len(completions)


def zero(completions, **_):
    return [0] * len(completions)


def unjudged(completions, **_):
    return [None] * len(completions)


def broken(completions, **_):
    return [float("nan")] * len(completions)


def raising(solution, **_):
    return solution


constant = 3
"""
SETTINGS = {
    "max_steps": 4, "per_device_train_batch_size": 4, "num_mini_batches": 1, "num_ppo_epochs": 2, "logging_steps": 1,
    "max_completion_length": 6, "learning_rate": 1e-2, "self_test": "false", "disable_tqdm": "true", "save_steps": 2,
    "use_cpu": "true",
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a policy, rewards, and prompts: texts, and conversations."""
    folder = tmp_path_factory.mktemp("world")
    tiny.llama(attention_dropout=0.0).save_pretrained(folder / "policy")
    tiny.tokenizer(chat=True).save_pretrained(folder / "policy")
    tiny.critic().save_pretrained(folder / "judge")
    tiny.tokenizer().save_pretrained(folder / "judge")
    (folder / "judge_of_words.py").write_text(REWARD)
    texts = tiny.prompts(32)["prompt"]
    rows = [{"question": text, "answer": str(i)} for i, text in enumerate(texts)]
    chats = [{"prompt": [{"role": "user", "content": text}], "answer": "1"} for text in texts]
    for name, lines in (("texts", rows), ("chats", chats)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def options(world, output, **changed):
    given = {
        "model_name_or_path": world / "policy", "prompts": world / "texts.jsonl", "prompt_column": "question",
        "reward": ["judge_of_words.py:w5"], "output_dir": output, "held_out": 0.25,
    } | SETTINGS | changed  # fmt: skip
    parts = [(f"--{name}", *(value if isinstance(value, list) else [value])) for name, value in given.items()]
    return [str(part) for option in parts for part in option if part is not None]


@pytest.fixture
def run(world, monkeypatch, capsys):
    """run(output, **options): the recipe in this process, started in the world's folder; what it said."""

    def start(output, config=RECIPES / "ppo.yaml", **changed):
        arguments = ["--config", str(config), *(options(world, output, **changed) if changed is not None else [])]
        return started(arguments)

    def started(arguments):
        monkeypatch.chdir(world)
        monkeypatch.syspath_prepend(str(RECIPES))
        monkeypatch.setattr(sys, "argv", [str(RECIPES / "ppo.py"), *arguments])
        monkeypatch.setattr(sys, "path", [*sys.path])
        monkeypatch.setenv("COLUMNS", "400")  # one line per row of a table
        capsys.readouterr()
        runpy.run_path(str(RECIPES / "ppo.py"), run_name="__main__")
        return capsys.readouterr().out

    start.with_arguments = started
    return start


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def last_command(said):
    (line,) = [line for line in said.splitlines() if "klft diff" in line]
    return shlex.split(line.partition(": ")[2])


def diff(command, monkeypatch, world):
    from klft.cli import main

    monkeypatch.chdir(world)
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code


def check_samples(rows, said):
    """The first lines of samples.jsonl stand in the table; every score is that of the text beside it."""
    table = [[cell.strip() for cell in line.split("│")[1:-1]] for line in said.splitlines() if "│" in line]
    for row in rows[:3]:
        both = [
            part
            for name in ("reference_", "")
            for part in (row[f"{name}completion"].strip(), two_digits(row[f"{name}score"]))
        ]
        assert [row["prompt"], *both] in table
    for row in rows:
        for name in ("", "reference_"):
            text = row[f"{name}completion"]
            score = text.split().count("w5") / 8 - 0.5 * min(len(text.split()) + 1, 6) / 4
            assert row[f"{name}score"] == pytest.approx(score, abs=0.13)  # more by one, where it ends without EOS
    assert any(row["completion"] != row["reference_completion"] for row in rows)


def test_texts_and_two_rewards(run, world, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    said = run(out, reward=["judge_of_words.py:w5", "judge_of_words:short"], reward_weights=[1.0, 0.5])
    start = (
        f"policy {world}/policy, prompts 32 from {world}/texts.jsonl (8 held out), "
        "reward judge_of_words.py:w5, 0.5 x judge_of_words:short, KL: k1 in the reward, coef 0.05, "
        f"reference a frozen copy of {world}/policy"
    )
    assert start in said
    assert "the same prompts, continued by both" in said

    # The policy has moved; its files are whole.
    before, after = (load_file(folder / "model.safetensors") for folder in (world / "policy", out))
    assert tiny.unequal(before, {name: after[name] for name in before})
    logs = lines_of(out / "log.jsonl")
    assert [log["step"] for log in logs if "loss" in log] == [1, 2, 3, 4]
    evaluations = [log for log in logs if "eval_reward/score/mean" in log]
    assert [log["step"] for log in evaluations] == [0, 4]
    assert evaluations[0]["eval_kl/sequence/reverse/mean"] == pytest.approx(0.0, abs=1e-6)
    kl, score = (evaluations[1][f"eval_{name}/mean"] for name in ("kl/sequence/reverse", "reward/score"))
    assert kl > 0
    card = (out / "README.md").read_text()
    rollouts = [log for log in logs if "kl/coef" in log]
    course = [f"| {log['step']} | {two_digits(log['reward/score/mean'])} | " for log in rollouts]
    assert len(course) == 2
    again = f"python recipes/ppo.py --config {out}/run.yaml --output_dir ANOTHER"
    assert again in (out / "run.yaml").read_text()
    for part in (
        f"| {two_digits(score)} ± ",
        f"| {two_digits(kl)} |",
        *course,
        again,
        "k1 in the reward",
        "run.yaml",
        "judge_of_words:short",
    ):
        assert part in card

    # Held-out prompts are none of those that were trained on, and the same ones every time.
    held = lines_of(out / "samples.jsonl")
    assert len({row["prompt"] for row in held}) == 8
    assert {row["prompt"] for row in held} < set(tiny.prompts(32)["prompt"])
    check_samples(held, said)

    assert diff(last_command(said), monkeypatch, world) in (0, None)
    assert (out / "diff.html").is_file()


def test_run_yaml_runs_the_same_again(run, world, tmp_path):
    run(tmp_path / "first")
    run.with_arguments(["--config", str(tmp_path / "first" / "run.yaml"), "--output_dir", str(tmp_path / "second")])
    assert not tiny.unequal(*(load_file(tmp_path / name / "model.safetensors") for name in ("first", "second")))
    again, first = (yaml.safe_load((tmp_path / name / "run.yaml").read_text()) for name in ("second", "first"))
    assert again | {"output_dir": first["output_dir"]} == first


def test_conversations_with_an_adapter_and_a_reward_model(run, world, tmp_path, monkeypatch):
    out = tmp_path / "out"
    said = run(
        out, prompts="chats.jsonl", prompt_column="prompt", use_peft="true", lora_target_modules=["q_proj", "v_proj"],
        kl_estimator="exact", kl_placement="loss", missing_eos_penalty=0.1,
    )  # fmt: skip
    assert "KL: exact in the loss" in said
    assert f"reference {world}/policy without the new adapter" in said
    assert "policy, a new adapter |" in (out / "README.md").read_text()
    sample = lines_of(out / "samples.jsonl")[0]
    assert {sample[f"{name}completion"][0]["role"] for name in ("", "reference_")} == {"assistant"}
    assert "--adapter" in last_command(said)
    assert diff(last_command(said), monkeypatch, world) in (0, None)


def test_none_held_out_and_a_reward_model(run, world, tmp_path, monkeypatch):
    said = run(tmp_path / "out", held_out=0, reward=["judge"], max_steps=2)
    assert "prompts 32 from" in said
    assert "(0 held out)" in said
    assert "nothing was measured" in (tmp_path / "out" / "README.md").read_text()
    assert len(lines_of(tmp_path / "out" / "samples.jsonl")) == 32
    assert diff(last_command(said), monkeypatch, world) in (0, None)


def test_a_score_that_was_always_the_same_is_said_at_the_end(run, tmp_path):
    said = run(tmp_path / "out", reward=["judge_of_words.py:zero"], max_steps=2)
    line = "The score was the same, 0.0, for all 4 completions: nothing but the KL was learnt."
    assert line in said.splitlines()
    assert line in (tmp_path / "out" / "README.md").read_text()


def test_no_score_at_all(run, tmp_path):
    said = run(tmp_path / "out", reward=["judge_of_words.py:unjudged"], kl_coef=0)
    assert "None of the 8 completions was given a score: nothing was learnt." in said.splitlines()
    assert {row["score"] for row in lines_of(tmp_path / "out" / "samples.jsonl")} == {None}


def test_a_resumed_run_has_one_log_of_everything(run, tmp_path):
    out = tmp_path / "out"
    run(out, max_steps=2)
    run(out, resume_from_checkpoint="true", resume_changes=["max_steps"])
    logs = lines_of(out / "log.jsonl")
    assert [log["step"] for log in logs if "loss" in log] == [1, 2, 3, 4]
    assert [log["step"] for log in logs if "eval_reward/score/mean" in log] == [0, 4]


def test_a_smoke_run_needs_nothing(run, world, tmp_path, monkeypatch):
    out = tmp_path / "out"
    given = ["--smoke", "--output_dir", str(out), "--disable_tqdm", "true", "--use_cpu", "true"]
    said = run.with_arguments(["--config", str(RECIPES / "ppo.yaml"), *given])
    assert re.search(r"On 8 held-out prompts the mean score went from \S+ ± \S+ to \S+ ± \S+,$", said, re.M)
    assert diff(last_command(said), monkeypatch, world) in (0, None)


@pytest.mark.parametrize("option", ["--max_steps", "--max-steps"])
def test_a_smoke_run_takes_the_steps_that_are_asked_for(option, run, tmp_path):
    out = tmp_path / "out"
    run.with_arguments(["--config", str(RECIPES / "ppo.yaml"), "--smoke", option, "3", "--output_dir", str(out)])
    assert max(log["step"] for log in lines_of(out / "log.jsonl")) == 3


@pytest.mark.slow
def test_two_processes_train_one_policy(world, tmp_path):
    out = tmp_path / "out"
    arguments = ["--config", RECIPES / "ppo.yaml", *options(world, out, processes=2, per_device_train_batch_size=2)]
    done = launch(str(RECIPES / "ppo.py"), *arguments, timeout=200, cwd=world, HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("(8 held out)") == done.stdout.count("klft diff") == 1
    logs = lines_of(out / "log.jsonl")
    assert [log["step"] for log in logs if "loss" in log] == [1, 2, 3, 4]
    samples = lines_of(out / "samples.jsonl")
    assert len(samples) == len({row["prompt"] for row in samples}) == 8
    assert all(two_digits(row["score"]) in done.stdout for row in samples[:3])
    assert yaml.safe_load((out / "run.yaml").read_text())["processes"] == 2


REFUSED = [
    ({"reward": None}, "needs --reward (module:function, file.py:function or a reward model). --smoke runs"),
    ({"prompts": "no.jsonl"}, "--prompts no.jsonl: there is no such file"),
    ({"prompts": "text.jsonl"}, "--prompts text.jsonl: there is no such file. Did you mean 'texts.jsonl'?"),
    ({"reward": ["judge_of_word.py:w5"]}, "there is no file judge_of_word.py. Did you mean 'judge_of_words.py'?"),
    ({"prompts": "empty.txt"}, "--prompts empty.txt --prompt_column question: empty.txt is empty"),
    ({"prompts": "broken.jsonl"}, "--prompts broken.jsonl --prompt_column question: broken.jsonl: "),
    ({"prompt_column": "questoin"}, "it has ['question', 'answer']. Did you mean 'question'?"),
    ({"prompt_column": "prompt"}, "it has ['question', 'answer']: name it with --prompt_column"),
    ({"prompt_column": "number", "prompts": "numbers.jsonl"}, "prompt 0 must be text, or messages"),
    ({"prompts": "few.txt", "prompt_column": "prompt"}, "has 3 prompt(s), and one rollout takes 4"),
    ({"prompts_split": "dev"}, "--prompts_split does nothing with --prompts"),
    ({"held_out": 1}, "--held_out must be a share of the prompts, at least 0 and below 1, got 1.0"),
    ({"reward": ["nowhere_to_be:found"]}, "--reward nowhere_to_be:found: ModuleNotFoundError: No module named"),
    ({"reward": ["nowhere.py:found"]}, "--reward nowhere.py:found: FileNotFoundError: there is no file nowhere.py"),
    ({"reward": ["judge_of_words.py"]}, "name the function in it too, as judge_of_words.py:my_reward"),
    ({"reward": ["judge_of_words.py:shrot"]}, "there is no 'shrot' in it. Did you mean 'short'?"),
    ({"reward": ["judge_of_words:shrot"]}, "there is no 'shrot' in it. Did you mean 'short'?"),
    ({"reward": ["judge_of_words.py:constant"]}, "--reward judge_of_words.py:constant is no function, but a int"),
    (
        {"reward": ["judge_of_words.py:broken"]},
        "two made-up completions: ValueError: reward function 'broken' returned",
    ),
    (
        {"reward": ["judge_of_words.py:strict"]},
        "two made-up completions: TypeError: reward function 'strict' got an unexpected keyword argument",
    ),
    (
        {"reward": ["judge_of_words.py:raising"]},
        "TypeError: reward function 'raising' missing a required argument: 'solution'. It is",
    ),
    (
        {"reward": ["no_folder"]},
        "--reward no_folder: there is no such folder",
    ),
    ({"reward_label": ["good"]}, "--reward_label has 1 label(s), and --reward 0 model(s): []"),
    (
        {"reward": ["judge"], "reward_label": ["good"]},
        "--reward judge, loading it: ValueError: this reward model has one output",
    ),
    ({"reward_weights": [1, 2]}, "--reward_weights has 2 weight(s), and --reward names 1: ['judge_of_words.py:w5']"),
    ({"model_name_or_path": "no_folder"}, "--model_name_or_path no_folder: there is no such folder"),
    ({"load_in_4bit": "true"}, "--load_in_4bit does nothing in this recipe: leave it out"),
    ({"lora_r": 4}, "--lora_r does nothing without --use_peft"),
    ({"learning_rate": -3}, "learning_rate must be"),
    ({"promts": "x"}, "unknown option --promts. Did you mean --prompts?"),
    ({"processes": 3}, "asked for 3 process(es), got 1"),
]


@pytest.mark.parametrize(("changed", "said"), REFUSED)
def test_what_cannot_work_is_one_line(changed, said, world, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(world)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (world / "empty.txt").write_text("")
    (world / "few.txt").write_text("w1\nw2\nw3\n")
    (world / "broken.jsonl").write_text('{"question": "a"\n')
    (world / "numbers.jsonl").write_text('{"number": 3}\n' * 8)
    given = options(world, tmp_path / "out", **changed)
    given = [part for part in given if part != "--reward"] if changed.get("reward", "") is None else given
    assert said in error_of("ppo", given, monkeypatch, capsys)
    assert not list(tmp_path.glob("out/*"))


@pytest.mark.parametrize(("changed", "said"), [
    ({}, "Continue it with --resume_from_checkpoint true, or replace it with --overwrite_output_dir true, or name"),
    ({"kl_controller": "pi"}, "--kl_controller pi needs kl_target"),
    ({"logging_nan_inf_filter": "true"}, "logging_nan_inf_filter must be False"),  # is no option=value
])  # fmt: skip
def test_an_error_says_options_as_the_command_line_takes_them(changed, said, world, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(world)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "out" / "checkpoint-1").mkdir(parents=True)
    (tmp_path / "out" / "checkpoint-1" / "trainer_state.json").write_text("{}")
    assert said in error_of("ppo", options(world, tmp_path / "out", **changed), monkeypatch, capsys)


def test_missing_options_are_named_together(monkeypatch, capsys):
    line = error_of("ppo", [], monkeypatch, capsys)
    assert all(f"--{name} (" in line for name in ("model_name_or_path", "prompts", "reward"))


@pytest.mark.parametrize("given", [{}, {"dataset_name": "p.jsonl"}, {"reward": "judge_of_words:w5"}])
def test_the_demo_does_not_train_your_model_on_its_prompts_or_reward(given, world, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(world)
    arguments = ["--processes", "1", "--output_dir", str(tmp_path / "out"), "--model_name_or_path", "policy"]
    arguments += [part for name, value in given.items() for part in (f"--{name}", value)]
    assert error_of("ppo_reviews", arguments, monkeypatch, capsys).endswith("recipes/ppo.py")


@pytest.mark.parametrize(("copies", "share", "rollout", "held"), [
    (1, 0.1, 4, 10), (1, 0.05, 4, 8), (1, 0.0, 4, 0), (3, 0.1, 4, 30), (1, 0.1, 96, 4), (1, 0.1, 100, 0),
    (4, 0.9, 4, 99), (10, 0.9, 4, 256),
])  # fmt: skip
def test_prompts_held_out_are_not_trained_on(copies, share, rollout, held, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(RECIPES))
    recipe = runpy.run_path(str(RECIPES / "ppo.py"))
    distinct = 100 if copies < 10 else 300
    prompts = [f"w{i}" for i in range(distinct)] * copies
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    own = recipe["OwnArguments"](prompts=str(tmp_path / "prompts.txt"), held_out=share)
    args = tiny.config(tmp_path, per_device_train_batch_size=rollout)
    train, kept_out = recipe["read_own_prompts"](own, args)
    alone = set(kept_out["prompt"]) if kept_out else set()
    assert len(alone) == (len(kept_out) if kept_out else 0) == held
    assert alone.isdisjoint(train["prompt"])
    assert len(train) == copies * (distinct - held) >= rollout
    assert alone | set(train["prompt"]) == set(prompts)


def test_a_mean_score_has_its_standard_error(monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPES))
    from ppo_run import mean_score

    scores = [0.0, 1.0, 3.0, 4.0]
    metrics = {"eval_reward/score/mean": 2.0, "eval_reward/score/std": statistics.pstdev(scores)}
    assert mean_score(metrics, 4) == f"2.0 ± {statistics.stdev(scores) / 2:.2g}"
    assert mean_score(metrics, 1) == "2.0"
    assert mean_score({}, 4) == "nan"
