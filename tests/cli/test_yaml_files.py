"""Configuration files that are out to do harm, or say what they do not mean; and one line for what is wrong."""

import os
import sys
from dataclasses import dataclass

import pytest
from support import tiny

from klft import PPOConfig
from klft.arguments import check_positive, one_line_errors, parse_arguments
from klft.cli import main


@dataclass
class Settings:
    """Some of each type."""

    kl_coef: float = 0.05
    steps: int = 3
    name: str | None = None
    weights: list[float] | None = None


def parsed(tmp_path, text):
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    return parse_arguments((Settings,), ["--config", str(path)])[0]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("steps: 1\nweights:\n  - {a: 1,\n     a: 2}\n", r":4: the key 'a' stands in line 3 already"),
        ("steps: 010\n", r':1: 010 is no decimal number, and YAML reads 8: write 8, or "010" for text'),
        ("name: x\nsteps: 1:30\n", r":2: 1:30 is no decimal number, and YAML reads 90"),
        ("weights: [1.0, -1:30.5]\n", r":1: -1:30.5 is no decimal number, and YAML reads -90.5"),
        ("env: {OMP_NUM_THREADS: 010}\n", r":1: 010 is no decimal number"),
        ("kl_coef: .nan\n", r":1: \.nan is no finite number"),
        ("steps: 1\nweights: [0.5, -.inf]\n", r":2: -\.inf is no finite number"),
        ("weights: [1.0e+400]\n", r":1: 1\.0e\+400 is no finite number"),
        ("kl_coef: nan\n", r":1: kl_coef must be a number, got 'nan'"),
        ("kl_coef: 1e400\n", r":1: kl_coef must be a number, got '1e400'"),
        ("steps: [" + "x, " * 200 + "]\n", r"got \['x', .{60,75}$"),
        ("weights: &a [*a]\n", r":1: more than 10,000 values, aliases unfolded"),
        ("weights: *a\n", r":1: found undefined alias"),
        ("weights: " + "[" * 3000 + "]" * 3000 + "\n", r":1: .* 20 levels: it is no configuration"),
        ("# " + "x" * (1 << 20) + "\n", "more than 1,048,576 bytes"),
    ],
)
def test_what_a_file_holds_wrongly_is_named(tmp_path, text, said):
    with pytest.raises(ValueError, match=said):
        parsed(tmp_path, text)


def test_aliases_of_aliases_end_before_anything_unfolds_them(tmp_path):
    bomb = "weights:\n  - &b0 [x,x,x,x,x,x,x,x,x]\n"
    bomb += "".join(f"  - &b{i} [{','.join([f'*b{i - 1}'] * 9)}]\n" for i in range(1, 10))
    with pytest.raises(ValueError, match=r":6: more than 10,000 values, aliases unfolded") as said:
        parsed(tmp_path, bomb)
    assert len(str(said.value)) < 300


@pytest.mark.parametrize(
    "name", ["PYTHONHOME", "LD_AUDIT", "BASH_ENV", "WANDB_BASE_URL", "HF_ENDPOINT", "pythonpath", "PYTHONWARNINGS"]
)
def test_a_file_may_set_few_variables(name, tmp_path, monkeypatch):
    monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match=rf":2: env may not set {name}; set it in the shell .*WANDB_PROJECT"):
        parsed(tmp_path, f"steps: 1\nenv: {{WANDB_PROJECT: p, {name}: /somewhere}}\n")
    assert name not in os.environ


def test_aliases_and_variables_that_a_file_may_have(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "before")
    made = parsed(tmp_path, "weights: &w [1.0, 2.0]\nname: '010'\nenv: {WANDB_PROJECT: klft}\n")
    assert (made.weights, made.name, os.environ["WANDB_PROJECT"]) == ([1.0, 2.0], "010", "klft")
    assert parsed(tmp_path, "name: &n x\nsteps: 0\nweights: [0.5, 1e-3]\n").name == "x"


@pytest.mark.parametrize(("option", "value"), [("kl_coef", "nan"), ("kl_coef", "-inf"), ("weights", "1e400")])
def test_a_number_on_the_command_line_is_finite(option, value):
    with pytest.raises(ValueError, match=f"^{option} must be a finite number, got {float(value)}$"):
        parse_arguments((Settings,), [f"--{option}={value}"])


def test_numbers_of_settings_are_positive_or_say_that_they_may_be_zero():
    check_positive(Settings(weights=[0.5, 2.0]))
    check_positive(Settings(kl_coef=0.0, weights=[0.0]), zero=("kl_coef", "weights"))
    for changed, said in (
        ({"kl_coef": 0.0}, "kl_coef must be above 0, got 0.0"),
        ({"steps": -1}, "steps must be above 0, got -1"),
        ({"weights": [1.0, -0.5]}, "weights must be above 0, got -0.5"),
    ):
        with pytest.raises(ValueError, match=f"^{said}$"):
            check_positive(Settings(**changed))
    with pytest.raises(ValueError, match=r"^steps must be 0 or more, got -1$"):
        check_positive(Settings(steps=-1), zero=("steps",))


# --- one line --------------------------------------------------------------------------------------------------------


def test_a_failure_while_running_is_said_by_the_process_that_saw_it(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["recipe"])
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as ended, one_line_errors(exit_code=1):
        raise ValueError("the reference is \x1b[31mred\x1b]0;pwned\x07\nand \u202eno")
    assert ended.value.code == 1
    assert capsys.readouterr().err == "error: the reference is \\x1b[31mred\\x1b]0;pwned\\x07 and \\u202eno\n"


@pytest.mark.parametrize("command", ["diff", "doctor"])
def test_no_control_character_of_a_name_reaches_the_terminal(command, capsys, monkeypatch, tmp_path):
    name = "esc\x1b[31mred\x1b]0;pwned\x07"
    tiny.llama().save_pretrained(tmp_path / name)
    (tmp_path / "texts.txt").write_text("w1 w2\n")
    more = [tmp_path / name, "--texts", tmp_path / "texts.txt", "-o", tmp_path / "page.html"]
    monkeypatch.setattr(sys, "argv", list(map(str, ["klft", command, tmp_path / name, *more * (command == "diff")])))
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main()
    out, err = capsys.readouterr()
    assert ended.value.code == 2
    assert "esc\\x1b[31mred" in err
    assert "\x1b" not in out + err


@pytest.mark.parametrize(("line", "arguments", "length"), [
    ("max_steps: 7", ["--num_train_epochs", "2"], (-1, None, 2)),
    ("total_episodes: 64", ["--max_steps", "5"], (5, None, 3)),
    ("num_train_epochs: 4", ["--max-steps=6"], (6, None, 3)),
    ("max_steps: 7", ["--kl_coef", "0.2"], (7, None, 3)),
])  # fmt: skip
def test_how_long_as_the_command_line_says_it_in_whichever_words(tmp_path, line, arguments, length):
    path = tmp_path / "run.yaml"
    path.write_text(f"output_dir: {tmp_path}\n{line}\n")
    (made,) = parse_arguments((PPOConfig,), ["--config", str(path), *arguments])
    assert (made.max_steps, made.total_episodes, made.num_train_epochs) == length


@pytest.mark.parametrize(("given", "similar"), [
    ("kl_ceof", "kl_coef"),
    ("kl_co", "kl_coef"),  # no abbreviations: --lr might be three options
    ("lr", "learning_rate"),
    ("lr=1e-4", "learning_rate"),
    ("lr_", "lr_scheduler_type"),
    ("epochs", "num_train_epochs"),
    ("batch-size", "per_device_train_batch_size"),
    ("max_length", "max_completion_length"),
    ("beta", "kl_coef"),
    ("conf", "config"),
])  # fmt: skip
def test_an_option_that_is_none_names_a_similar_one(given, similar):
    name = given.partition("=")[0].replace("-", "_")
    with pytest.raises(ValueError, match=rf"^unknown option --{name}. Did you mean --{similar}\?$"):
        parse_arguments((PPOConfig,), ["--output_dir", "out", f"--{given}", "2"])


def test_a_name_from_elsewhere_is_one_of_these_fields_or_nothing_is_suggested(tmp_path):
    with pytest.raises(ValueError, match=r":1: unknown key 'beta'. Did you mean 'kl_coef'\?$"):
        parsed(tmp_path, "beta: 0.1\n")
    with pytest.raises(ValueError, match=r"unknown option --lr$"):
        parse_arguments((Settings,), ["--lr", "2"])


def test_a_switch_that_is_on_can_be_turned_off(tmp_path):
    (made,) = parse_arguments((PPOConfig,), ["--output_dir", str(tmp_path), "--no_self_test"])
    assert not made.self_test
