"""Nobody is asked for anything: training, comparing and reporting on what is on this disk look no host up."""

import subprocess
import sys
from pathlib import Path

import pytest
from support import tiny
from support.processes import environment

from klft.cli import main
from klft.diagnostics import write_report
from klft.loading import load_model

HUB = "hub.invalid"  # no such host, anywhere
HERE = {"127.0.0.1", "::1", "localhost"}
# Before anything is imported: every host that Python looks up or connects to, whichever library does it.
LISTENING = """
import runpy, sys

def listen(event, given):
    if event in ("socket.getaddrinfo", "socket.gethostbyname"):
        print(given[0], file=heard, flush=True)
    elif event in ("socket.connect", "socket.sendto") and isinstance(given[1], tuple):
        print(given[1][0], file=heard, flush=True)

heard = open(sys.argv.pop(1), "w")
sys.addaudithook(listen)
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def compare(folder):
    """klft diff, with texts of every kind of file."""
    for name, text in {"txt": "w1 w2 w3", "jsonl": '{"text": "w1 w2 w3"}', "csv": "text\nw1 w2 w3"}.items():
        texts = folder / f"texts.{name}"
        texts.write_text(text + "\n")
        sys.argv = ["klft", "diff", f"{folder}/policy", f"{folder}/reference", "--texts", str(texts)]
        sys.argv += ["-o", f"{folder}/page.html"]
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code, texts


def train(folder):
    """Models by name, an adapter too, everything that writes, a resume, and the page."""
    settings = {"save_strategy": "steps", "save_steps": 1.0, "kl_log_tokens": 1, "log_completions": True}
    for name, given in {"whole": {}, "adapter": {"peft_config": tiny.lora()}}.items():
        for steps in (1, 2):
            run = tiny.trainer(
                folder / name, f"{folder}/policy", f"{folder}/judge",
                given=given | {"processing_class": None}, max_steps=steps, **settings,
            )  # fmt: skip
            run.train(resume_from_checkpoint=steps == 2)
        write_report(folder / name, folder / f"{name}.html")


@pytest.mark.slow
def test_what_is_on_this_disk_is_used_without_asking_anyone(tmp_path):
    for name, model in {"policy": tiny.llama(), "reference": tiny.llama(5), "judge": tiny.critic()}.items():
        model.save_pretrained(tmp_path / name)
        tiny.tokenizer().save_pretrained(tmp_path / name)
    command = [sys.executable, "-c", LISTENING, tmp_path / "heard", __file__, tmp_path]
    online = environment(HF_HUB_OFFLINE="0", HF_ENDPOINT=f"http://{HUB}", HF_HOME=str(tmp_path / "home"))
    done = subprocess.run(command, capture_output=True, text=True, env=online, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    heard = [set(part.split()) - HERE for part in (tmp_path / "heard").read_text().split(HUB, 1)]
    assert heard == [set(), {HUB}], "a model that is not here: the hub, at least twice, and nobody else"


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    compare(folder)
    train(folder)
    with pytest.raises(ValueError, match=r"some/model.* does not answer"):
        load_model("some/model")
