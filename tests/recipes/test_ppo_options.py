"""PPO's recipes: what is wrong with an option is said before what takes seconds is imported; --help in groups."""

import json
import runpy
import subprocess
import sys

import pytest
from support.processes import environment
from support.recipes import RECIPES, error_of

HEAVY = ["torch", "transformers.training_args"]
REPORT = f"""
import pathlib, runpy, sys
sys.argv = sys.argv[1:]
sys.path.insert(0, str(pathlib.Path(sys.argv[0]).parent))
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as ended:
    print("code", ended.code)
print("loaded", [name for name in {HEAVY} if name in sys.modules])
"""


def ended(recipe, arguments, cwd):
    """(the error line, exit code, which heavy modules were imported) of a recipe in a process of its own."""
    command = [sys.executable, "-c", REPORT, str(RECIPES / f"{recipe}.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment(), timeout=120)
    said = done.stdout.splitlines()
    assert len(said) == 2, done.stdout + done.stderr
    return done.stderr.strip(), said[0], said[1]


OWN = ["--prompts", "bad.yaml", "--reward", "builtins:len"]
EARLY = [
    ("ppo", ["--smoke", "--lerning_rate", "3"], "unknown option --lerning_rate. Did you mean --learning_rate?", 0),
    ("ppo", ["--smoke", "--lr", "1e-4"], "unknown option --lr. Did you mean --learning_rate?", 0),
    ("ppo", ["--smoke", "--model", "x"], "unknown option --model. Did you mean --model_name_or_path?", 0),
    ("ppo", ["--smoke", "--dataset", "x"], "unknown option --dataset. Did you mean --prompts?", 0),
    ("ppo", ["--smoke", "--config", "bad.yaml"], "bad.yaml:1: unknown key 'kl_coeff'. Did you mean 'kl_coef'?", 0),
    ("ppo", ["--smoke", "--load_in_4bit", "1"], "--load_in_4bit does nothing in this recipe: leave it out", 0),
    ("ppo", ["--smoke", "--held_out", "2"], "--held_out must be a share of the prompts, at least 0 and below 1", 0),
    ("ppo", [*OWN, "--model_name_or_path", "./polcy"], "--model_name_or_path ./polcy: there is no such folder", 0),
    ("ppo", ["--smoke", "--model_name_or_path", "no"], "--model_name_or_path no: there is no such folder, and HF_", 0),
    ("ppo", ["--smoke", "--reward", "a/b/judge"], "--reward a/b/judge: there is no such folder", 0),
    ("ppo_reviews", ["--kl_ceof", "3"], "unknown option --kl_ceof. Did you mean --kl_coef?", 0),
    ("ppo_reviews", ["--dataset_streaming"], "--dataset_streaming does nothing in this recipe: leave it out", 0),
    ("ppo", ["--smoke", "--learning_rate", "-3"], "--learning_rate must be finite and >= 0, got -3.0", 1),
    ("ppo", ["--smoke", "--kl_controller", "adaptive"], "PPOConfig: --kl_controller adaptive needs kl_target", 1),
    ("ppo", ["--smoke", "--config", "twice.yaml"], "PPOConfig: total_episodes and max_steps say the same thing", 1),
    ("ppo", ["--smoke", "--kl_placement", "loss"], "PPOConfig: k1 as a loss has a gradient of zero", 1),
    ("ppo", ["--smoke", "--log_completions", "--logging_strategy=no"], "PPOConfig: log_completions would be ign", 1),
    ("ppo", ["--smoke", "--dataloader_num_workers", "2"], "PPOConfig: dataloader_num_workers must be 0", 1),
    ("ppo_reviews", ["--kl_estimator", "k4"], "--kl_estimator must be one of k1, k2, k3, exact, got 'k4'", 1),
]


@pytest.mark.parametrize(("recipe", "arguments", "said", "heavy"), EARLY)
def test_a_wrong_option_is_answered_before_the_heavy_imports(recipe, arguments, said, heavy, tmp_path):
    (tmp_path / "bad.yaml").write_text("kl_coeff: 3\n")
    (tmp_path / "twice.yaml").write_text("max_steps: 3\ntotal_episodes: 64\n")
    line, code, loaded = ended(recipe, arguments, tmp_path)
    assert line.startswith(f"error: {said}")
    assert "\n" not in line
    assert code == "code 2"
    assert loaded == f"loaded {HEAVY[:heavy]}"


VALUES = [
    (["--kl_coef", "nan"], "--kl_coef must be finite and >= 0, got nan"),
    (["--max_steps", "abc"], "--max_steps must be a whole number, got 'abc'"),
    (["--max_steps=1.5"], "--max_steps must be a whole number, got '1.5'"),
    (["--save_total_limit", "0"], "--save_total_limit must be finite and >= 1, got 0"),
    (["--config", "typed.yaml"], "typed.yaml:1: kl_coef must be a number, got [3]"),
    (["--config", "no.yaml"], "no.yaml: No such file or directory"),
    (["--report_to", "wandb"], "--report_to wandb: it is not installed: pip install klft[wandb], or say none"),
    (["--prompts", "rows.jsonl"], "rows.jsonl has no column 'prompt'; it has ['question']: name it with"),
    (["--prompts", "rows.csv", "--prompt_column", "a"], "rows.csv has no column 'a'; it has ['question', 'b']"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "said"), VALUES)
def test_values_and_columns(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "typed.yaml").write_text("kl_coef: [3]\n")
    (tmp_path / "rows.jsonl").write_text('{"question": "a"}\n')
    (tmp_path / "rows.csv").write_text("question,b\n1,2\n")
    given = ["--smoke", "--output_dir", str(tmp_path / "out"), *arguments]
    line = error_of("ppo", given, monkeypatch, capsys)
    assert said in line
    assert not (tmp_path / "out").exists()


def test_what_is_right_is_let_through(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPES))
    import ppo_options
    from trl import ModelConfig

    (tmp_path / "good.yaml").write_text("kl_coef: 1e-2\nreward: [a:b]\nkl_target: null\nuse_cpu: true\nmax_steps: 3\n")
    given = ["--config", str(tmp_path / "good.yaml"), "--learning-rate", "3e-4", "--reward_weights", "1", "2", "--bf16"]
    monkeypatch.setattr(sys, "argv", ["ppo.py", *given, "--kl_estimator=k3", "--resume_from_checkpoint", "true"])
    own = runpy.run_path(str(RECIPES / "ppo.py"))["OwnArguments"]
    ppo_options.check_names(own, ModelConfig)
    ppo_options.check_values(own, ModelConfig)
    made, model_args = ppo_options.parse_light(own, ModelConfig)
    assert made.reward == ["a:b"]
    assert model_args == ModelConfig()


def test_declared_fields_are_those_of_the_classes(monkeypatch):
    """Read off the sources, which are not imported: as `dataclasses` has them."""
    monkeypatch.syspath_prepend(str(RECIPES))
    import ppo_options

    from klft import PPOConfig
    from klft.arguments import hints

    real = hints(PPOConfig)
    found = {name: kind for name, kind in ppo_options.all_fields().items() if not name.startswith("_")}
    assert real.keys() - found.keys() == set()
    simple = {name: kind for name, kind in found.items() if kind in ppo_options.TYPES.values() and name in real}
    assert len(simple) > 60
    assert {name: real[name] for name in simple} == simple


def shown(recipe, option, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(RECIPES / f"{recipe}.py"), option])
    monkeypatch.syspath_prepend(str(RECIPES))
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as done:
        runpy.run_path(str(RECIPES / f"{recipe}.py"), run_name="__main__")
    assert done.value.code == 0
    return capsys.readouterr().out


def groups(text):
    """Title -> names of the options under it."""
    found, title = {}, ""
    for line in text.splitlines():
        if line.startswith("  --"):
            found.setdefault(title, []).append(line.split(":")[0].strip(" -"))
        elif line and line[0] != " ":
            title = line
    return found


@pytest.mark.parametrize(("recipe", "own", "unused"), [
    ("ppo", "Prompts, reward and launch.", "model_init_kwargs"),
    ("ppo_reviews", "Data, reward and launch.", "dataset_streaming"),
])  # fmt: skip
def test_help_is_in_groups(recipe, own, unused, monkeypatch, capsys):
    text = shown(recipe, "--help", monkeypatch, capsys)
    assert max(map(len, text.splitlines())) <= 120
    assert "accelerate launch" in text
    found = groups(text)
    model, trainer = "The model, and a LoRA on it", "Of transformers.Trainer; all of them: --help-all"
    assert list(found) == [own, "PPO and its KL penalty", model, trainer]
    assert "reward" in found[own]
    assert {"kl_coef", "learning_rate", "kl_log_tokens"} <= set(found["PPO and its KL penalty"])
    assert {"model_name_or_path", "use_peft"} <= set(found[model])
    assert {"output_dir", "max_steps", "report_to", "seed"} <= set(found[trainer])
    assert len(found[trainer]) < 20
    names = [name for group in found.values() for name in group]
    assert len(set(names)) == len(names)
    assert not {"load_in_4bit", unused} & set(names)


def test_help_all_has_every_option(monkeypatch, capsys):
    from trl import ModelConfig

    from klft import PPOConfig
    from klft.arguments import hints

    text = shown("ppo", "--help-all", monkeypatch, capsys)
    assert "~20% " in text
    assert "%%" not in text  # as argparse has it
    found = groups(text)
    names = {name for group in found.values() for name in group}
    refused = {"load_in_8bit", "load_in_4bit", "bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_quant_storage"}
    assert hints(PPOConfig).keys() | hints(ModelConfig).keys() == (
        (names | refused | {"model_init_kwargs"}) - set(found["Prompts, reward and launch."])
    )
    assert "Of transformers.Trainer" in found


def test_a_single_module_for_a_lora(tmp_path, monkeypatch, capsys):
    common = ["--smoke", "--use_cpu", "true", "--use_peft", "--output_dir", str(tmp_path), "--lora_target_modules"]
    line = error_of("ppo", [*common, "q_prj"], monkeypatch, capsys)
    assert "--lora_target_modules q_prj: the model has no such module. Did you mean 'q_proj'? Its linear" in line
    arguments = ["--config", str(RECIPES / "ppo.yaml"), *common, "q_proj"]
    monkeypatch.setattr(sys, "argv", [str(RECIPES / "ppo.py"), *arguments])
    runpy.run_path(str(RECIPES / "ppo.py"), run_name="__main__")
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == ["q_proj"]
