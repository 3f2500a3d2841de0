"""klft doctor: this machine and two models, from the command line; what it finds decides how it ends."""

import json
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support import pings, tiny

from klft import cli, doctor


def run(*arguments):
    done = subprocess.run(
        [sys.executable, "-m", "klft.cli", "doctor", *map(str, arguments)], capture_output=True, text=True
    )
    return done.returncode, done.stdout, done.stderr


def saved(folder, model):
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def checked(*names, **options):
    defaults = {"dtype": "auto", "device": "cpu", "trust_remote_code": False, "adapter": False}
    return {c.name: c for c in doctor.models(*names, **(defaults | options))}


@pytest.mark.slow
def test_a_healthy_machine_and_model(tmp_path):
    code, text, errors = run(saved(tmp_path / "model", tiny.llama()), "--json")
    checks = json.loads(text)
    assert (code, errors) == (0, "")
    assert {c["status"] for c in checks} <= {"ok", "skipped"}
    names = [c["name"] for c in checks]
    assert names[:5] == ["python", "packages", "device", "disk", "processes"]
    assert "policy: padding" in names
    assert set(checks[0]) == {"name", "status", "text"}


def test_a_problem_ends_it_with_1_and_says_what_to_do(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "environment", list)
    model, other = saved(tmp_path / "model", tiny.llama()), saved(tmp_path / "other", tiny.llama(seed=5))
    monkeypatch.setattr(sys, "argv", ["klft", "doctor", str(model), "--reference", str(other)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    text = capsys.readouterr().out
    assert "problem  start" in text
    assert "nothing in common" in text
    assert text.splitlines()[-1].endswith("checks, 1 problem")


def test_an_adapter_against_its_base(tmp_path):
    base = tiny.llama()
    saved(tmp_path / "base", base)
    base = base.from_pretrained(tmp_path / "base")
    adapter = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, p in adapter.named_parameters():
            if "lora_B" in name:
                p.normal_()
    saved(tmp_path / "adapter", adapter)
    checks = checked(str(tmp_path / "adapter"), None, adapter=True)
    assert {c.status for c in checks.values()} == {"ok", "skipped", "note"}
    assert checks["start"].status == "note"
    assert checks["reference stays"].text == "what is trained moves the policy, and not the reference"


def test_an_adapter_with_biases_is_refused(tmp_path):
    saved(tmp_path / "base", tiny.gpt2())
    base = tiny.gpt2().from_pretrained(tmp_path / "base")
    config = LoraConfig(r=2, target_modules=["c_attn"], bias="all", task_type="CAUSAL_LM", fan_in_fan_out=True)
    saved(tmp_path / "adapter", get_peft_model(base, config))
    with pytest.raises(ValueError, match="bias='all' trains biases of the base model"):
        checked(str(tmp_path / "adapter"), None, adapter=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--adapter"], "name MODEL too"),
        (["x", "--reference", "y", "--adapter"], "leave --reference out"),
    ],
)
def test_usage(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["klft", "doctor", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    text, errors = capsys.readouterr()
    assert (ended.value.code, text) == (2, "")
    assert message in errors
    assert len(errors.splitlines()) == 1


# ---- this machine ----------------------------------------------------------------------------------------------------


def test_old_and_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr(doctor, "requires", lambda _: ["torch>=99", "no-such-package>=1", "nothing; extra == 'test'"])
    check = doctor._packages()
    assert check.status == "problem"
    assert f"torch {torch.__version__} is not >=99" in check.text
    assert "no-such-package is missing" in check.text
    assert "nothing" not in check.text


def test_a_full_disk_is_a_problem(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "FREE_GIGABYTES", 1e9)
    check = doctor._disk(tmp_path)
    assert check.status == "problem"
    assert str(tmp_path) in check.text


@pytest.mark.parametrize(
    ("ping", "seconds", "message"), [(pings.dies, 120, "has no network"), (pings.hangs, 2, "no answer after 2 s")]
)
def test_processes_that_cannot_meet(monkeypatch, ping, seconds, message):
    monkeypatch.setattr(doctor, "_ping", ping)
    monkeypatch.setattr(doctor, "PING_SECONDS", seconds)
    check = doctor._two_processes()
    assert check.status == "problem"
    assert message in check.text
