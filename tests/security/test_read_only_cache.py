"""A second user of caches that the first one filled, and that only the first may write to."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support import tiny
from support.processes import environment

RECIPES = Path(__file__).parents[2] / "recipes"
OWNER = 65534  # somebody else
SECOND_USER = """
import os, sys
from pathlib import Path

sys.path.insert(0, sys.argv[1])
cache = Path(os.environ["KLFT_CACHE"])
for folder in (cache, Path(os.environ["HF_HUB_CACHE"])):
    try:
        (folder / "mine").mkdir()
        sys.exit(f"{folder} can be written")
    except PermissionError:
        pass
import reviews
from klft.loading import find_tokenizer, load_model

print(reviews.ensure_world().parent == cache)
print(load_model("some/model").config.vocab_size, len(find_tokenizer("some/model")))
"""


def hub_cache(folder):
    """A model as the hub's cache holds it."""
    snapshot = folder / "models--some--model" / "snapshots" / ("0" * 40)
    tiny.llama().save_pretrained(snapshot)
    tiny.tokenizer().save_pretrained(snapshot)
    refs = folder / "models--some--model" / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)


def hand_over(folder):
    """To somebody else, and nobody may write."""
    for path in [folder, *folder.rglob("*")]:
        os.chown(path, OWNER, OWNER)
        path.chmod(0o555 if path.is_dir() else 0o444)


@pytest.mark.slow
@pytest.mark.skipif(
    not hasattr(os, "getuid") or os.getuid() != 0 or shutil.which("setpriv") is None,
    reason="files of another user's are made by root; setpriv takes away root's power to write to them",
)
@pytest.mark.parametrize("offline", ["1", "0"])
def test_a_second_user_needs_only_to_read(offline, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPES))
    import reviews

    monkeypatch.setattr(subprocess, "run", lambda command, **_: Path(command[3]).mkdir())  # as if it built it
    (tmp_path / "cache").mkdir()
    world = reviews.ensure_world(tmp_path / "cache")
    monkeypatch.undo()
    (tmp_path / "cache" / f"{world.name}.lock").unlink(missing_ok=True)
    hub_cache(tmp_path / "hub")
    for name in ("cache", "hub"):
        hand_over(tmp_path / name)
    variables = environment(
        KLFT_CACHE=str(tmp_path / "cache"), HF_HUB_CACHE=str(tmp_path / "hub"), HF_HUB_OFFLINE=offline,
        HF_ENDPOINT="http://127.0.0.1:9", HOME=str(tmp_path / "home"),
    )  # fmt: skip
    variables.pop("HF_HOME", None)
    command = ["setpriv", "--bounding-set", "-all", "--inh-caps", "-all", sys.executable, "-c", SECOND_USER, RECIPES]
    done = subprocess.run(command, capture_output=True, text=True, env=variables, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["True", "32", "32"]
